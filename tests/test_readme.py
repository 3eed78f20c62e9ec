"""The READMEs say nothing that was not run: every command, Python block and link of theirs."""

from __future__ import annotations

import json
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launcher import BIN, ROOT, called, environment
from test_text import prepared

from hpc_grawa import simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.training.loop import fit

#: In the order in which a newcomer reads them.
PAGES = {
    p: (ROOT / p).read_text() for p in ("README.md", "slurm/README.md", "data_prep/README.md", "benchmarks/README.md")
}
README = "\n".join(PAGES.values())
#: A tiny budget in place of the README's, and 2 ranks of its 4, so that what is tested is that the command works.
SHORT = ["--budget.seconds", "1000", "--budget.steps", "3", "--eval.train_examples", "50", "--eval.bn_batches", "1"]

#: What measures a model is made to look at less of it.
FEW = {
    "flatness": shlex.split("--examples 16 --measures loss,spectrum --steps 3 --points 3"),
    "measures": shlex.split("--examples 16"),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


BACKENDS = ("auto", "mpi", "horovod", "gloo", "nccl")


def launched() -> list[tuple[str, str, str]]:
    """The launcher table's cells: command with the dots filled in, backend, and what the table says of it."""
    rows = re.findall(r"^\| `([^`]*hpc-grawa train \.\.\.)` \|(.*)\|$", README, re.M)
    cells = [(command, [cell.strip() for cell in rest.split("|")]) for command, rest in rows]
    assert all(len(said) == len(BACKENDS) for _, said in cells)
    return [
        (command.replace("...", f"--config digits --backend {backend}"), backend, text)
        for command, said in cells
        for backend, text in zip(BACKENDS, said, strict=True)
    ]


def start(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = re.sub(r"(-np |--nproc-per-node |localhost:)4\b", r"\g<1>2", command)
    return subprocess.run(
        shlex.split(command), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = start(command, folder)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture
def newcomer(tmp_path: Path) -> Path:
    """A folder in which the README's commands find what they need: small sets as ``data_prep`` leaves them."""
    data = tmp_path / "data" / "cifar10"
    data.mkdir(parents=True)
    draw = np.random.default_rng(0)
    counts = {"train": 2000, "test": 100}
    for part, count in counts.items():
        np.save(data / f"{part}_images.npy", draw.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
        np.save(data / f"{part}_labels.npy", draw.integers(0, 10, count, dtype=np.uint8))
    facts = {"name": "CIFAR-10", "counts": counts, "classes": list("0123456789"), "mean": [0.5] * 3, "std": [0.25] * 3}
    (data / "meta.json").write_text(json.dumps(facts))
    prepared(tmp_path, "bytes", times=80).rename(data.with_name("text"))
    write_own_file("diabetes.py", tmp_path)
    write_own_file("waves.py", tmp_path)
    return tmp_path


def write_own_file(name: str, folder: Path) -> None:
    """The Python block that begins with the name of the file that it is."""
    (folder / name).write_text(next(b for b in blocks("python") if b.startswith(f"# {name}\n")))


def test_make_targets_exist() -> None:
    targets = [c.split()[1] for c in commands() if c.startswith("make ")]
    targets += re.findall(r"`(?:\w+=\S+ )?make (\w[\w-]*)", README)
    assert {"demo", "test", "lint", "bench", "env", "wheels"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


#: What is run here.
RUN = ("mpirun -np 4 hpc-grawa ", "mpirun -np 2 hpc-grawa ", "hpc-grawa ")
#: What other tests run, or nobody: it needs SLURM, several hosts, ImageNet, or makes the environment.
ELSEWHERE = (
    *("make ", "MPI=system make ", "pip install .", "python hpc_grawa/install/horovod.py", "python data_prep/"),
    *(
        "source ",
        "module load ",
        "cp slurm/site.sh",
        "apt-get install ",
        "mpirun -np 12 hpc-grawa train --config imagenet",
    ),
    *("sbatch ", "srun ", "squeue ", "bash slurm/chain.sh ", "CHAIN=", "tail ", "touch ", "cat "),
    *("'$(which' 'mpirun)' --hostfile", "horovodrun -np 12 -H a:4", "horovodrun --gloo -np 12 -H a:4"),
)


def test_every_command_is_of_a_known_kind() -> None:
    assert [c for c in commands() if not c.startswith((*RUN, *ELSEWHERE))] == []


def test_links_lead_somewhere() -> None:
    """Files and headings that pages link to, and what they say to read by pydoc, are there."""
    for page, text in PAGES.items():
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            file = (ROOT / page).parent / target if target else ROOT / page
            assert file.is_file(), f"{page}: {target}"
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if heading else []
            assert not heading or heading in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}, (
                heading
            )
    modules = re.findall(r"python -m pydoc ([\w.]+)|, `(hpc_grawa\.training\.config)`", README)
    assert len(modules) >= 5 and all(pydoc.locate(a or b) for a, b in modules)


@pytest.mark.slow
def test_hpc_grawa_commands_of_the_readme(newcomer: Path) -> None:
    """In the README's order, as one newcomer would type them, on a small set in CIFAR-10's format."""
    ran = 0
    for command in dict.fromkeys(commands()):  # what pages repeat once
        if not command.startswith(RUN):
            continue
        only_says = re.search(r"[-.](help|print_config)", command)
        trains = re.search(r"hpc-grawa (train|compare) ", command) and not only_says
        words = shlex.split(command)
        # As a shell does: what matches no file stays.
        words = [str(w) for word in words for w in ("*" in word and sorted(newcomer.glob(word))) or [word]]
        shortened = SHORT if trains else ["--steps", "8"] if words == ["hpc-grawa", "toy"] else []
        for name, few in FEW.items():
            shortened += few if f"hpc-grawa {name} " in command else []
        run(shlex.join(words + shortened), newcomer)
        ran += 1
    assert ran >= 17
    figures = ("figure.png", "table.csv", "toy.png", "flatness.png", "landscape.png", "measures.csv", "measures.png")
    assert all((newcomer / file).is_file() for file in figures)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "backend", "said"), launched())
def test_launcher_table(command: str, backend: str, said: str, tmp_path: Path) -> None:
    """A cell is a run with that backend, or one line that names it."""
    if command.startswith("srun"):
        pytest.skip("needs a SLURM cluster")
    horovod = (BIN / "horovodrun").exists()
    if (command.startswith("horovodrun") or backend == "horovod") and not horovod:
        pytest.skip("Horovod is not built here")
    if said.startswith("needs") and torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    words = f"{command} --run.name x {shlex.join(SHORT)}"
    if said.startswith(("needs", "refused")):
        done = start(words, tmp_path)
        assert done.returncode != 0 and not (tmp_path / "runs" / "x").exists()
        assert (done.stdout + done.stderr).count(f"error: backend is {backend}") == 1
        return
    taken = {"runs": backend}.get(said) or next(b for b in said.replace(";", "").split() if b != "horovod" or horovod)
    assert re.search(rf"backend +{taken} \(", run(words, tmp_path).stdout)
    summary = json.loads((tmp_path / "runs" / "x" / "summary.json").read_text())
    assert (summary["backend"], summary["world_size"]) == (taken, 2 if "4" in command else 1)


def test_the_comparison_that_is_submitted_can_be_planned(
    newcomer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [line] = re.findall(r"`hpc-grawa (compare --config [^`]*--submit [^`]*)`", PAGES["slurm/README.md"])
    monkeypatch.chdir(newcomer)
    monkeypatch.setenv("PATH", "/nowhere")
    status, _, errors = called(capsys, *shlex.split(line))
    assert (status, errors) == (2, "hpc-grawa compare: error: sbatch cannot be found: submit where SLURM is\n")


def scripts(*ends: str) -> str:
    """One program (one launch) of several scripts, each of which begins as README's scripts do."""
    begin = next(b for b in blocks("python") if "def loss():" in b and "import" in b)
    return "".join(f"{begin}\n\n{end}\n" for end in ends)


def test_own_loop(tmp_path: Path) -> None:
    (tmp_path / "own_loop.py").write_text(scripts(next(b for b in blocks("python") if b.startswith("comm = "))))
    output = run(f"mpirun -np 2 {shlex.quote(sys.executable)} own_loop.py", tmp_path).stdout
    losses = {float(x) for x in re.findall(r"rank \d: loss ([\d.]+)", output)}
    assert losses and max(losses) < 0.5, output


def test_horovod_script(tmp_path: Path) -> None:
    """The script before and after its change, and with the other methods that the changed line may name."""
    pytest.importorskip("horovod.torch")
    lines = blocks("diff")[0].splitlines()
    before, after = ("\n".join(x[1:] for x in lines if not x.startswith(sign)) for sign in "+-")
    named = re.findall(r"`(hpc_grawa\.\w+\([^`]*\))`(?= in its place| trains as)", README)
    assert len(named) == 2 and after.count("hpc_grawa.LGRAWA(period=8), probe=loss") == 1
    others = [after.replace("hpc_grawa.LGRAWA(period=8), probe=loss", method) for method in named]
    (tmp_path / "scripts.py").write_text(scripts(before, after, *others))
    output = run(f"mpirun -np 2 {shlex.quote(sys.executable)} scripts.py", tmp_path).stdout
    losses = re.findall(r"rank (\d): loss ([\d.]+)", output)
    assert sorted(rank for rank, _ in losses) == list("00001111") and max(float(x) for _, x in losses) < 0.5, output


@pytest.mark.slow
def test_own_model_data_loss_and_metric(tmp_path: Path) -> None:
    write_own_file("diabetes.py", tmp_path)
    train, evaluate = (c for c in commands() if re.search(r"[/.][Dd]iabetes\b", c))
    finished = run(train, tmp_path).stdout.splitlines()[-1]
    found = re.search(r"test r2: center ([-\d.]+), mean", finished)
    assert found and 0.4 < float(found[1]) < 0.65, finished
    assert run(evaluate, tmp_path).stdout.strip().endswith(f"test r2 {found[1]}")


@pytest.mark.slow
def test_many_simulated_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = next(b for b in blocks("python") if "simulate(64" in b)
    (tmp_path / "many.py").write_text(program)
    runpy.run_path(str(tmp_path / "many.py"))
    assert capsys.readouterr().out == program.splitlines()[-1].removeprefix("# ") + "\n"


def test_own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_module.py").write_text(next(b for b in blocks("python") if "FollowTheLeader" in b))
    monkeypatch.syspath_prepend(tmp_path)
    config = parse(["--config=digits", "--method=my_module.FollowTheLeader", "--method.period=2", *SHORT])
    summary = simulate(2, lambda comm: fit(config, comm, speaks=False))[0]
    assert (summary["method"], summary["rounds"], summary["consensus_distance"]) == ("FollowTheLeader", 2, 0)
