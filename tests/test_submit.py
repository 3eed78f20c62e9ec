"""Comparisons that are started elsewhere, by ``--submit`` and ``--launcher``: what sbatch and its tasks are given."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import own
import pytest
from launcher import ROOT, called
from test_templates import started

from hpc_grawa.cli import compare
from hpc_grawa.cli.parsing import parse

#: Notes its words, each on a line.
SBATCH = "#!/bin/sh\nprintf '%s\\n' \"$@\" >sbatch.said\necho Submitted batch job 7\n"
COMPARE = ("compare", "--config=digits", "--budget.seconds=null", "--budget.steps=2", "--run.name=study")


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own.plain_process(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What notes the words that sbatch is given: not there until it is called."""
    program = tmp_path / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "sbatch.said"


def words_of_task(plan: str, task: int) -> list[str]:
    """What a task of ``compare.sh`` hands on: a recipe, and options of ``hpc-grawa train``."""
    common = Path("slurm/common.sh")
    common.parent.mkdir(exist_ok=True)
    common.write_text("printf '%s\\0' \"$@\"\n")
    variables = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_SUBMIT_DIR": os.getcwd()}
    done = subprocess.run(["bash", ROOT / "slurm/compare.sh", plan], env=variables, capture_output=True, check=True)
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


@pytest.mark.parametrize("words", ["--gpus-per-node=2 slurm/compare.sh", "--exclusive slurm/my-compare.sh"])
def test_options_of_sbatch_stay_as_they_are(words: str, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = called(capsys, *COMPARE, "--methods=LGRAWA", "--submit", words)
    assert ended.status == 0, ended.said
    assert sbatch.read_text().splitlines()[1:-1] == words.split()


@pytest.mark.parametrize("way", ["--submit=slurm/compare.sh", "--launcher=true"])
def test_a_run_that_was_cut_off_goes_on_over_the_network_that_it_began_over(
    way: str, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("runs/study/LGRAWA-0")
    folder.mkdir(parents=True)
    words = (*COMPARE, "--methods=LGRAWA", way)
    for network, others in (("null", "10mbit,1ms"), ('"10mbit,1ms"', "null")):
        (folder / "environment.json").write_text(f'{{"network": {network}}}')
        began, now = (text.strip('"').replace("null", "None") for text in (network, others))
        status, _, errors = called(capsys, *words, f"--network={others}")
        assert (status, errors) == (
            2,
            f"hpc-grawa compare: error: run.name is study: {folder} was made with 'network: {began}', now it is "
            f"'network: {now}'; must be another --run.name, or remove that folder\n",
        )
        assert not sbatch.exists()
        ended = called(capsys, *words, "--network=" + network.strip('"'))
        assert ended.status == 0, ended.said
        sbatch.unlink(missing_ok=True)


def test_finished_runs_may_have_been_made_elsewhere_or_over_another_backend(
    sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``site.sh`` says for the tasks, of which the comparison's own line knows nothing."""
    words = (*COMPARE, "--methods=LGRAWA")
    task = ("--backend=mpi", "--comm_timeout=50", "--run.resume=auto", "--run.dir=runs/study", "--run.name=LGRAWA-0")
    text = parse([*COMPARE[1:], *task, "--log.every=30"]).text
    assert "    channels_last: true\n" in text
    text = text.replace("    channels_last: true\n", "    channels_last: true\n    stage: /there\n")
    run = Path("runs/study/LGRAWA-0")
    run.mkdir(parents=True)
    for name, content in {"config.yaml": text, "summary.json": '{"state": "finished"}'}.items():
        (run / name).write_text(content)
    ended = called(capsys, *words, "--log.every=30", "--run.control_every=7", "--submit=slurm/compare.sh")
    assert ended.said == "nothing to submit: all 1 runs are in runs/study\n"
    ended = called(capsys, *words, "--submit=slurm/compare.sh")
    assert (ended.status, sbatch.exists()) == (2, False)
    assert "runs/study/LGRAWA-0 was made with 'every: 30', now it is 'every: 50'" in ended.errors


def test_tasks_that_wait_keep_their_runs_when_others_are_submitted(
    sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More methods, fewer seeds: an array that waits, or is requeued, reads its own plan, whatever came after it."""
    arrays = (
        ("LGRAWA,EASGD", "1,2", ["LGRAWA-1", "EASGD-1", "LGRAWA-2", "EASGD-2"]),
        ("LGRAWA,EASGD,LocalSGD", "1", ["LGRAWA-1", "EASGD-1", "LocalSGD-1"]),
        ("EASGD", "2", ["EASGD-2"]),
    )
    plans = []
    for methods, seeds, runs in arrays:
        ended = called(
            capsys, *COMPARE, f"--methods={methods}", f"--seeds={seeds}", "--submit=--time=9 slurm/compare.sh"
        )
        assert ended.status == 0, ended.said
        array, time, script, plan = sbatch.read_text().splitlines()
        assert array == f"--array={','.join(map(str, range(len(runs))))}"
        assert (time, script, Path(plan).parent) == ("--time=9", "slurm/compare.sh", Path("runs/study"))
        plans.append(plan)
    for plan, (_, _, runs) in zip(plans, arrays, strict=True):
        for task, run in enumerate(runs):
            recipe, *options = words_of_task(plan, task)
            assert recipe == "digits" and f"--run.name={run}" in options and "--run.dir=runs/study" in options


def test_a_task_gets_every_word_as_it_was_given(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values of several lines, too, and names in any letters, or in bytes that are no text."""
    groups = '[{match: "*.bias",\n weight_decay: 0},\n {match: "it\'s $HOME\\\\", lr_factor: .5}]'
    folder = "läufe 実験 $x$ it's \udcff"
    words = (*COMPARE, "--methods=LGRAWA,EASGD", f"--run.dir={folder}", "--optimizer.groups", groups)
    ended = called(capsys, *words, "--submit=slurm/compare.sh")
    assert ended.status == 0, ended.said
    [plan] = Path(folder, "study").glob("plan-*.txt")
    for task, run in enumerate(("LGRAWA-0", "EASGD-0")):
        recipe, *options = words_of_task(str(plan), task)
        assert options[options.index("--optimizer.groups") + 1] == groups
        config = parse(["--config", recipe, *options])
        assert (config.run.name, config.run.dir) == (run, f"{folder}/study")


@pytest.mark.parametrize("way", ["--submit=slurm/compare.sh", "--launcher=touch started"])
@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--budget.seconds=-5"], "budget.seconds is -5.0: must be positive and finite"),
        (["--data.batch_size=2000"], "data.batch_size is 2000: must be at most 1437"),
        (["--network=1foo"], "network is 1foo: "),
        (["--grid=accumulate=1,5"], "accumulate is 5: must divide data.batch_size, which is 32"),
    ],
)
def test_what_no_run_could_be_made_with_is_not_submitted_nor_launched(
    words: list[str], error: str, way: str, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output, errors = called(capsys, *COMPARE, "--methods=LGRAWA", *words, way)
    assert (status, output, errors.count("\n")) == (2, "", 1) and f"error: {error}" in errors
    assert not any(path.exists() for path in (sbatch, Path("started"), Path("runs")))


def test_where_nothing_can_be_submitted_one_line_says_why(
    sbatch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no plan is left."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = (*COMPARE, "--methods=LGRAWA", "--submit=slurm/compare.sh")
    with monkeypatch.context() as disk:
        disk.setattr(compare, "write_atomically", full)
        status, _, errors = called(capsys, *words)
    assert status == 2 and errors.count("\n") == 1 and not sbatch.exists()
    assert "error: run.dir is runs: must be a folder where runs/study/plan-" in errors
    assert errors.endswith(".txt can be written (No space left on device)\n")
    monkeypatch.setenv("PATH", "/nowhere")
    status, _, errors = called(capsys, *words)
    assert (status, errors) == (2, "hpc-grawa compare: error: sbatch cannot be found: submit where SLURM is\n")
    assert list(Path("runs/study").iterdir()) == []


def test_a_task_trains_what_was_planned_on_the_data_that_the_recipe_names(
    sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data without a path, and data whose path a file of the user's says."""
    (tmp_path / "my.yaml").write_text(
        "{model: character_model.Transformer, loss: character_model.NextCharacter, metric: character_model.Perplexity,"
        f" data: {{class_path: character_model.Text, init_args: {{path: {ROOT / 'LICENSE'}}}}}, budget: {{steps: 2}}}}"
    )
    for recipe in ("digits", "my.yaml"):
        words = (f"--config={recipe}", "--methods=LGRAWA", f"--run.name={recipe}", "--submit=slurm/compare.sh")
        ended = called(capsys, "compare", *words)
        assert ended.status == 0, ended.said
        run = tmp_path / f"runs/{recipe}/LGRAWA-0"
        run.mkdir()
        (run / "summary.json").write_text('{"state": "finished"}')  # or the script would say that nothing was trained
        task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
        [given] = started(tmp_path, "compare", sbatch.read_text().splitlines()[-1], **task)
        config = parse(given[1:])
        assert (config.run.dir, config.run.name) == (f"runs/{recipe}", "LGRAWA-0")
        assert getattr(config.data, "path", None) == (str(ROOT / "LICENSE") if recipe == "my.yaml" else None)
