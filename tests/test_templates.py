"""What ``slurm/`` and the program must agree on, without a controller: templates, recipes, messages of its README."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hpc_grawa.cli.settings import read_settings, recipes

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "slurm"
TEMPLATES = sorted(path.name for path in SLURM.glob("*.sh") if path.name not in ("common.sh", "chain.sh", "site.sh"))
#: Recipe, and how many nodes of four GPUs.
SETTINGS = {
    "cifar10.sh": ("cifar10_resnet20", 1),
    "cifar100.sh": ("cifar100_wrn28x10", 2),
    "imagenet.sh": ("imagenet_resnet50", 3),
}
#: Messages of SLURM and Open MPI.
FOREIGN = (
    *("JobState=", "ExitCode=", "scontrol show", "sbatch: ", "srun: error", "srun: launch", "(Partition", "***"),
    *(".../bin/activate", "The application appears", "mpi_pmix.c", "Gloo connect", "Requested operation"),
    *("gloo::IoException", "Process 0 exit"),
)
#: What stands for values in the README's messages.
VALUES = r"\.\.\./lock\.json|\bjob \.\.\.|\bstopped$|\.\.\.|'[^']*'|\b\d+\b|\bsrun\b|\bmpi\b|\bhorovodrun --gloo\b"


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_a_header_and_one_line(template: str) -> None:
    lines = (SLURM / template).read_text().splitlines()
    body = [line for line in lines if not line.startswith("#")]
    assert lines[0] == "#!/usr/bin/env bash" and f"#SBATCH --job-name={template.removesuffix('.sh')}" in lines
    assert len(body) == (3 if template == "compare.sh" else 1)  # it reads its words from a plan
    assert body[-1].startswith('[ -r "${SLURM_SUBMIT_DIR:-}/slurm/common.sh" ] || ')
    assert body[-1].endswith('"${run[@]}"' if template == "compare.sh" else '"$@"')


def test_templates_name_recipes_that_are_there() -> None:
    assert set(TEMPLATES) == {*SETTINGS, "lgrawa_imagenet.sh", "scaling.sh", "compare.sh", "prepare_imagenet.sh"}
    for template, (recipe, nodes) in SETTINGS.items():
        text = (SLURM / template).read_text()
        assert recipe in recipes() and f'common.sh" {recipe} "$@"' in text and f"#SBATCH --nodes={nodes}\n" in text
    # What the user named: the template of ImageNet, for this method.
    named, imagenet = ((SLURM / f"{name}.sh").read_text() for name in ("lgrawa_imagenet", "imagenet"))
    assert named.replace("=lgrawa_imagenet", "=imagenet").replace("_resnet50_lgrawa ", "_resnet50 ") == imagenet
    assert 'common.sh" cifar10_resnet20 "$@"' in (SLURM / "scaling.sh").read_text()


#: Starts nothing: it prints the words, and if asked leaves what a run does that has finished and then crashes.
SRUN = r"""#!/bin/bash
while [ "$1" != hpc-grawa ]; do shift; done
printf '%s\0' "$@"
[ -n "${CRASH:-}" ] || exit 0
run=runs/$(printf '%s\n' "$@" | grep -A1 -x -e --run.name | tail -n 1)
mkdir -p "$run" && echo '"state": "finished"' >"$run/summary.json"
exit 139
"""


def started(folder: Path, template: str, *words: str, **variables: str) -> list[list[str]]:
    """The words of each ``hpc-grawa`` that a job of a template starts in ``folder``, by an srun that starts nothing."""
    srun = folder / "bin/srun"
    if not srun.exists():
        shutil.copytree(SLURM, folder / "slurm", ignore=shutil.ignore_patterns("site.sh", "logs"))
        (folder / "slurm/logs").mkdir()
        srun.parent.mkdir(exist_ok=True)
        srun.write_text(SRUN)
        srun.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NAME": template, "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(
        ["bash", f"slurm/{template}.sh", *words],
        cwd=folder,
        env={"PATH": f"{srun.parent}:/usr/bin:/bin", **job, **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return [call.split("\0")[:-1] for call in done.stdout.split("hpc-grawa\0")[1:]]


def test_a_template_finds_the_data_of_any_recipe_of_the_package_and_leaves_others_alone(tmp_path: Path) -> None:
    """Digits have no path, and a file of the user's says its own."""
    (tmp_path / "my.yaml").write_text("data: Digits")
    for recipe in (*recipes(), "cifar10_resnet20_easgd", "my.yaml"):
        [words] = started(tmp_path, "cifar10", recipe, "--dry-run")
        assert words[:3] == ["train", "--config", recipe]
        file = str(tmp_path / recipe) if recipe == "my.yaml" else recipe
        kind = read_settings([file])["data"]["class_path"].rpartition(".")[2]
        cifar = "cifar100" if recipe.startswith("cifar100") else "cifar10"
        place = {"CIFAR": cifar, "ImageNet": "imagenet", "Text": "text", "Digits": None}[kind]
        paths = [words[at + 1] for at, word in enumerate(words) if word == "--data.path"]
        assert paths == ([] if place is None else [f"data/{place}"]), recipe
    for other in ("--config=my.yaml", "--data=own.Numbers", "--data.class_path=own.Numbers"):
        [words] = started(tmp_path, "imagenet", other, "--dry-run", STAGE="/disk")
        assert not {"--data.path", "--data.stage"} & set(words)
    [words] = started(tmp_path, "imagenet", "--dry-run", STAGE="/disk", DATA="/there")
    assert {"--data.path", "/there/imagenet", "--data.stage", "/disk"} < set(words)


def test_scaling_takes_another_recipe_too(tmp_path: Path) -> None:
    """Its own ends after 15 minutes by itself."""
    assert read_settings(["cifar10_resnet20"])["budget"] == {"seconds": 900}
    for nodes, words in enumerate(started(tmp_path, "scaling", "digits", "--dry-run", SLURM_JOB_NUM_NODES="2"), 1):
        assert words[:3] == ["train", "--config", "digits"] and f"scaling-7-{nodes}nodes" in words
        assert not [word for word in words if word.startswith("--budget")]
    assert nodes == 2
    named = started(tmp_path, "scaling", "--run.name", "study", "--dry-run", SLURM_JOB_NUM_NODES="2")
    assert [words[-1] for words in named] == ["study-1nodes", "study-2nodes"]  # a run for each size all the same


def test_a_run_that_has_finished_is_that_whatever_its_ranks_do_then(tmp_path: Path) -> None:
    """Libraries may crash while they end."""
    assert len(started(tmp_path, "scaling", SLURM_JOB_NUM_NODES="3", CRASH="yes")) == 3


def test_a_chain_counts_the_progress_of_each_size(tmp_path: Path) -> None:
    """None of them has made a checkpoint before its first link."""
    calls = started(tmp_path, "scaling", "--dry-run", CHAIN="all", SLURM_JOB_NUM_NODES="3")
    assert [words[words.index("--run.name") + 1] for words in calls] == ["all-1nodes", "all-2nodes", "all-3nodes"]


@pytest.mark.parametrize(
    ("answers", "ours"),
    [
        (["echo RUNNING 0"], True),
        (["echo 'ERROR: ld.so: object cannot be preloaded' >&2; echo RUNNING 0"], True),
        (["echo RUNNING 1"], False),  # another attempt is under way
        (["echo COMPLETING 0"], False),
        (["echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"], False),
        (["echo 'Socket timed out' >&2; exit 1"] * 3 + ["echo RUNNING 0"], True),
        (["echo 'Socket timed out' >&2; exit 1"] * 6, False),
    ],
)
def test_whose_job_it_is_as_slurm_says_when_it_answers(answers: list[str], ours: bool, tmp_path: Path) -> None:
    for number, answer in enumerate(answers):
        (tmp_path / f"answer{number}").write_text(answer)
    function = re.findall(r"^still_ours\(\).*?^}$", (SLURM / "common.sh").read_text(), re.M | re.S)[0]
    squeue = 'n=$(ls asked 2>/dev/null | wc -l); mkdir -p asked; : >"asked/$n"; bash "answer$n"'
    script = f"say() {{ :; }}; sleep() {{ :; }}; squeue() {{ {squeue}; }}; {function}; still_ours 7"
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, timeout=100
    )
    assert (done.returncode == 0) == ours, done.stderr
    assert len(list((tmp_path / "asked").iterdir())) == len(answers)


def shown(node: ast.AST) -> str:
    """A string of the program, or what stands for one."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(shown, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def texts() -> str:
    """All strings of the program and the scripts; a dot of three stands for what they put in."""
    found = []
    for path in (ROOT / "hpc_grawa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("wrong", "require"):
                *_, what, _, fix = node.args
                found.append(f"{shown(what)} is …: {'must be ' * (node.func.id == 'require')}{shown(fix)}")
            elif isinstance(node, ast.JoinedStr | ast.Constant):
                found.append(shown(node))
    found += [re.sub(r"\$\{[^}]*\}|\$\w+", "…", path.read_text()) for path in SLURM.glob("*.sh")]
    return "\n".join(found)


def test_the_messages_of_the_symptom_table_are_those_of_the_program() -> None:
    table = (SLURM / "README.md").read_text().partition("| what you see |")[2].partition("\n\n")[0]
    rows = [re.split(r" \| ", line.removeprefix("| ").removesuffix(" |")) for line in table.splitlines()[2:]]
    assert all(len(row) == 3 and all(row) for row in rows)
    quoted = [message for row in rows for message in re.findall(r"`([^`]+ [^`]+)`", row[0])]
    ours = [message for message in quoted if not message.startswith(FOREIGN)]
    assert len(ours) > 15
    said = texts()
    for message in ours:
        parts = [part.strip() for part in re.split(VALUES, message.removeprefix("hpc-grawa train: error: "))]
        fixed = [part for part in parts if len(part) > 6]
        assert fixed, message
        assert not [part for part in fixed if part not in said], message
