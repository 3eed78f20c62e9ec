"""A run cut off anywhere and resumed is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import own
import pytest
import torch
from conftest import DEVICES
from launcher import called, environment, launch, launched, start
from table import as_words, kinds, plain
from test_cli import LINE, running

from hpc_grawa import cli, simulate
from hpc_grawa.averaging.probe import probe_gradient
from hpc_grawa.cli.main import TRY_AGAIN
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.data.sharding import Sampler
from hpc_grawa.errors import ConfigError
from hpc_grawa.runs.checkpoint import Checkpoints, model_file
from hpc_grawa.runs.lock import BEAT, DEAD, Lock
from hpc_grawa.runs.log import write_atomically
from hpc_grawa.runs.record import group, read_run
from hpc_grawa.training.config import Config
from hpc_grawa.training.loop import fit
from hpc_grawa.training.worker import Worker

WORLD, STEPS = 3, 18
METHODS = {
    **{name: " ".join(as_words(name)).removeprefix("--method=") for name in kinds()},
    "LGRAWA, averaged momenta and statistics": "LGRAWA --method.local_momentum=average --method.buffers=average",
    "LGRAWA, pooled": "LGRAWA --method.rounds=pooled",
    "LGRAWA, AdamW, bf16": "LGRAWA --optimizer=AdamW --optimizer.clip_norm=1 --optimizer.accumulate=2 --precision=bf16",
    "LocalSGD, NAdam in groups, averaged": "LocalSGD --optimizer=torch.optim.NAdam --method.local_momentum=average "
    '--optimizer.groups=[{"match":"ndim<2","lr_factor":2}]',
    "LGRAWA, a model that draws": "LGRAWA --model=own.Random",
    "LGRAWA, a model with extra state": "LGRAWA --model=own.Counting",
    "LocalLGRAWA, a model of many buffers": "LocalLGRAWA --model=own.Remembering --method.buffers=average",
}
#: What lies apart from the method.
OTHERS = {
    "LGRAWA, SAM around RAdam, averaged": "LGRAWA --method.local_momentum=average --optimizer=SAM "
    "--optimizer.base=torch.optim.RAdam --optimizer.base.lr=.01",
    "LocalSGD, LPFSGD": "LocalSGD --optimizer=LPFSGD",
    "EntropySGD": "DataParallel --optimizer=EntropySGD --optimizer.period=4",
    "schedule-free": "DataParallel --optimizer=schedulefree.AdamWScheduleFree",
    **{f"LGRAWA, {split}": f"LGRAWA --data.batch_size=100 --data.split={split}" for split in ("reshuffled", "full")},
    "LGRAWA, fraction": "LGRAWA --data.split=fraction --data.fraction=0.1",
}


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


class Cut(Exception):
    """The job ends here."""


def config(method: str, *words: str) -> Config:
    period = [] if method.split()[0] in plain("shares") else ["--method.period=4"]
    often = ["--save.unit=steps", "--save.every=5", "--eval.unit=steps", "--eval.every=6", "--log.every=3"]
    shape = ["--run.control_every=3", "--schedule=Cosine", "--budget.seconds=null", f"--budget.steps={STEPS}"]
    shape += ["--eval.train_examples=50", "--eval.bn_batches=2"]
    made = parse(
        ["--config=digits", f"--method={method.split()[0]}", *method.split()[1:], *period, *often, *shape, *words]
    )
    made.check(WORLD)
    return made


def run(made: Config, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)

    def body(comm: Communicator) -> dict[str, Any]:
        return fit(made, comm, new_folder=None if comm.rank else lambda: folder, speaks=False)

    return simulate(WORLD, body)


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every run ends before this local step."""
    take = Worker.step

    def cut(worker: Worker) -> Any:
        if worker.local_steps == step:
            raise Cut
        return take(worker)

    monkeypatch.setattr(Worker, "step", cut)


def result(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The center, the records and the summary, without what a clock says."""
    state = torch.load(folder / "center.pt", weights_only=True)
    state = {k: t.tolist() if isinstance(t, torch.Tensor) else t for k, t in state.items()}
    clocked = ("seconds", "examples_per_second", "slowest", "started", "gpu_memory")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in record.items() if k not in clocked} for record in records]
    summary = json.loads((folder / "summary.json").read_text())
    same = ("steps", "rounds", "healed", "epochs", "bytes_sent", "payload_bytes", "consensus_distance", "best_step")
    return state, kept, {k: summary[k] for k in (*same, "local_test_loss", "center_train_loss", "center_test_loss")}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_run_cut_off_twice_equals_the_uninterrupted_one(
    name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With momentum, a schedule, words under way at the saves, saves between rounds (pooled: after the next one)."""
    monkeypatch.setattr("torch.backends.cudnn.deterministic", True)
    made = config((METHODS | OTHERS)[name], f"--device={device}")
    run(made, tmp_path / "whole")
    for step in (9, 17):
        with monkeypatch.context() as patched:
            cut_at(step, patched)
            with pytest.raises(Cut):
                run(made, tmp_path / "cut")
    run(made, tmp_path / "cut")
    for cut, whole in zip(result(tmp_path / "cut"), result(tmp_path / "whole"), strict=True):
        assert cut == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LGRAWA", "DataParallel", *kinds("levels")])
def test_wherever_a_run_is_cut_off_it_equals_the_uninterrupted_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(METHODS[name])
    run(made, tmp_path / "whole")
    for step in range(STEPS):
        folder = tmp_path / str(step)
        with monkeypatch.context() as patched:
            cut_at(step, patched)
            with pytest.raises(Cut):
                run(made, folder)
        run(made, folder)
        assert result(folder) == result(tmp_path / "whole"), step


def test_with_a_limit_in_seconds_the_clock_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints by the clock, too: all ranks make them at the same step."""
    limits = ("--budget.steps=null", "--budget.seconds=1.5", "--save.unit=seconds", "--save.every=0.2")
    made, take = config("LGRAWA", *limits, "--eval.every=1000"), Worker.step

    last = 0.0

    def cut(worker: Worker) -> Any:
        nonlocal last
        last = max(last, worker.facts.seconds)
        if worker.facts.seconds > 0.8:
            raise Cut
        return take(worker)

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "step", cut)
        with pytest.raises(Cut):
            run(made, tmp_path)
    manifests = [json.loads(m.read_text()) for m in sorted(tmp_path.glob("checkpoints/0*/manifest.json"))]
    assert 0.2 <= manifests[-1]["seconds"] <= last
    began = time.monotonic()
    summary = run(made, tmp_path)[0]
    assert 1.5 <= summary["training_seconds"] <= manifests[-1]["seconds"] + time.monotonic() - began
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("step", "seconds"):
        seen = [record[name] for record in records if record["event"] == "train"]
        assert seen == sorted(seen)
    after = [r["seconds"] for r in records if r["event"] == "train" and r["step"] > manifests[-1]["step"]]
    assert after[0] >= manifests[-1]["seconds"]


def test_saving_changes_nothing(tmp_path: Path) -> None:
    run(config("LGRAWA"), tmp_path / "with")
    run(config("LGRAWA", "--save.every=.inf"), tmp_path / "without")
    assert result(tmp_path / "with") == result(tmp_path / "without")
    assert not (tmp_path / "without" / "checkpoints").exists()
    saved = sorted(p.name for p in (tmp_path / "with" / "checkpoints").iterdir())
    assert saved == ["000000010", "000000015", "latest"]


def test_a_run_cut_off_before_its_first_checkpoint_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config("LGRAWA")
    run(made, tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_at(4, patched)
        with pytest.raises(Cut):
            run(made, tmp_path / "cut")
    run(made, tmp_path / "cut")
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------
# Checkpoints.
# ---------------------------------------------------------------------------------------------------------


def saved(folder: Path, steps: tuple[int, ...], keep: int = 2) -> None:
    def body(comm: Communicator) -> None:
        checkpoints = Checkpoints(folder, comm, keep)
        for step in steps:
            state = {"x": torch.full((5,), float(comm.rank)), "step": step, "nested": [None, (1, "a")]}
            assert checkpoints.save(step, state, {"seconds": 1.5}) == []
            state["x"].fill_(-1)  # what is saved is what it was
        assert checkpoints.step == steps[-1]
        assert checkpoints.settle() == []
        assert (checkpoints.step, checkpoints.settle()) == (math.inf, [])

    simulate(WORLD, body)


def loaded(folder: Path) -> list[tuple[int, Any, tuple[str, ...]]]:
    def body(comm: Communicator) -> tuple[int, Any, tuple[str, ...]]:
        restored = Checkpoints(folder, comm).load()
        assert restored is not None and (restored.world_size, restored.manifest["seconds"]) == (WORLD, 1.5)
        assert restored.state["x"].tolist() == [comm.rank] * 5
        return restored.step, restored.state["nested"], restored.skipped

    return simulate(WORLD, body)


def test_the_newest_is_loaded_and_the_last_are_kept(tmp_path: Path) -> None:
    assert simulate(WORLD, lambda comm: Checkpoints(tmp_path / "none", comm).load()) == [None] * WORLD
    saved(tmp_path, (10, 20, 30, 30))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000020", "000000030", "latest"]
    assert loaded(tmp_path) == [(30, [None, (1, "a")], ())] * WORLD


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, (10, 20))
    file = tmp_path / "000000020" / ("manifest.json" if damage == "manifest" else "rank-0001.pt")
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2])
    for step, _, skipped in loaded(tmp_path):
        assert step == 10
        assert all(str(file) in told for told in skipped) and skipped[0].startswith("rank ")
    for place in tmp_path.glob("0*"):
        (place / "rank-0002.pt").write_bytes(b"")

    def body(comm: Communicator) -> str:
        with pytest.raises(
            ConfigError, match=r"no checkpoint in .* is whole on every rank: start anew .*rank-0002"
        ) as error:
            Checkpoints(tmp_path, comm).load()
        return str(error.value)

    assert len(set(simulate(WORLD, body))) == 1


def test_a_newer_checkpoint_that_was_passed_over_takes_no_whole_one_s_place(tmp_path: Path) -> None:
    saved(tmp_path, (100, 200))
    (tmp_path / "000000200/rank-0000.pt").write_bytes(b"")
    assert loaded(tmp_path)[0][0] == 100
    saved(tmp_path, (150,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000100", "000000150", "latest"]


def test_a_rank_that_cannot_write_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """All ranks are told, whichever it is, and go on; nothing of the new one remains."""
    saved(tmp_path, (10,))

    def body(comm: Communicator) -> list[str]:
        checkpoints = Checkpoints(tmp_path, comm)
        assert checkpoints.save(20, {"x": torch.zeros(500_000 if comm.rank == 1 else 5)}, {}) == []
        return checkpoints.save(30, {"x": 0}, {}) + checkpoints.settle()

    with own.files_limited(1_000_000):
        told = simulate(WORLD, body)
    assert told == [["step 20: not saved, the checkpoints before stay: rank 1: [Errno 27] File too large"]] * WORLD
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000010", "000000030", "latest"]
    assert (tmp_path / "latest").read_text() == "000000030\n"


class Killed(BaseException):
    """The job ends here, between two things that it does to the disk."""


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("step", [10, 20])
def test_a_save_killed_anywhere_leaves_a_whole_checkpoint(
    step: int, keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before or the new one, also where the new one replaces the one before."""

    def save(folder: Path, step: int, value: float) -> None:
        def body(comm: Communicator) -> list[str]:
            checkpoints = Checkpoints(folder, comm, keep)
            return checkpoints.save(step, {"x": torch.full((9,), value + comm.rank)}, {}) + checkpoints.settle()

        assert simulate(WORLD, body) == [[]] * WORLD

    def load(comm: Communicator) -> tuple[int, list[float], tuple[str, ...]]:
        restored = Checkpoints(folder, comm).load()
        assert restored is not None
        return restored.step, (restored.state["x"] - comm.rank).tolist(), restored.skipped

    left: float = math.inf

    def mortal(function: Any) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*args, **kwargs)

        return act

    for place, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (Path, "rename"), (Path, "mkdir")):
        monkeypatch.setattr(place, name, mortal(getattr(place, name)))
    for number in range(1000):
        left, folder = math.inf, tmp_path / str(number)
        save(folder, 10, 0.0)
        left = number
        try:
            save(folder, step, 100.0)
        except (Killed, RuntimeError):  # torch.save ends with one of its own
            assert left < 0
        killed, left = left < 0, math.inf
        assert set(map(repr, simulate(WORLD, load))) <= {
            repr((10, [0.0] * 9, ())),
            repr((step, [100.0] * 9, ())),
        }
        if not killed:
            break
        save(folder, 30, 300.0)
        assert simulate(WORLD, load)[0][0] == 30
        assert len([p for p in folder.iterdir() if p.is_dir()]) <= keep
    assert number > 8


def test_too_little_space_is_an_error_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("hpc_grawa.runs.checkpoint.shutil.disk_usage", lambda place: usage)
    with pytest.raises(
        ConfigError, match=r"save.keep is 2: 3 checkpoints of 3 ranks and their models need 2.5 MB, .* has 1 MB"
    ):
        run(config("LGRAWA"), tmp_path / "a")
    run(config("LGRAWA", "--save.every=.inf"), tmp_path / "b")


@pytest.mark.parametrize("method", ["LGRAWA", "SlowMo", "Parle", "PowerSGD", "EFSign", "DataParallel"])
def test_the_space_that_is_asked_for_is_what_a_run_takes(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of AdamW's moments and all that methods keep; within 30 %, as files hold more than tensors."""
    asked = []
    monkeypatch.setattr(Checkpoints, "check_space", lambda self, *needed: asked.append(needed))
    run(config(method, "--optimizer=AdamW", "--save.keep=1", "--model.width=32"), tmp_path / "a")
    (checkpoint, model), *others = asked
    assert others == [(checkpoint, model)] * (WORLD - 1)
    files = [file.stat().st_size for file in (tmp_path / "a").glob("checkpoints/*/rank-*.pt")]
    assert len(files) == WORLD
    assert all(file == pytest.approx(checkpoint, rel=0.3) for file in files)
    kept = [model_file(tmp_path / "a", rank) for rank in range(WORLD)]
    assert all(file.is_file() == bool(model) for file in kept)
    assert not model or all(file.stat().st_size == pytest.approx(model, rel=0.3) for file in kept)


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    """Its room is the next one's, whose step is another; a folder of the user's stays."""
    saved(tmp_path, (10,))
    left = tmp_path / "000000015.partial"
    left.mkdir()
    (left / "rank-0000.pt").write_bytes(b"half")
    others = ["2024", "7.partial", "best"]
    for other in others:
        (tmp_path / other).mkdir()
    assert loaded(tmp_path)[0][0] == 10
    checkpoints = Checkpoints(tmp_path, SingleCommunicator())
    with pytest.MonkeyPatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)._replace(free=0)
        patched.setattr("hpc_grawa.runs.checkpoint.shutil.disk_usage", lambda place: usage)
        with pytest.raises(ConfigError) as before:
            checkpoints.check_space(10**9)
        (left / "rank-0000.pt").write_bytes(bytes(10**6))
        with pytest.raises(ConfigError) as after:
            checkpoints.check_space(10**9)
    room = [re.search(r"has ([\d.]+ .?B) for them", str(error.value)) for error in (before, after)]
    assert [found and found[1][-2:] for found in room] == ["kB", "MB"]
    held = Checkpoints.save
    with pytest.MonkeyPatch.context() as patched:

        def save(self: Checkpoints, *words: Any) -> list[str]:
            told = held(self, *words)
            assert not left.exists()  # before anything is written
            return told

        patched.setattr(Checkpoints, "save", save)
        saved(tmp_path, (20,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000010", "000000020", *others, "latest"]


def test_a_checkpoint_that_cannot_be_named_the_latest_is_taken_back(tmp_path: Path) -> None:
    """So that what is said of it holds, and its room is the next one's."""
    saved(tmp_path, (10, 20))
    (tmp_path / "latest").unlink()
    (tmp_path / "latest/in the way").mkdir(parents=True)

    def body(comm: Communicator) -> list[str]:
        checkpoints = Checkpoints(tmp_path, comm)
        for step in (20, 30):
            checkpoints.save(step, {"x": torch.zeros(5)}, {"seconds": 1.5})
            (told,) = checkpoints.settle()
            assert told.startswith(f"step {step}: not saved, the checkpoints before stay: rank 0: ")
            assert checkpoints.saved is None
        return []

    simulate(WORLD, body)
    there = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
    assert there == ["000000010", "000000020", "latest"]
    shutil.rmtree(tmp_path / "latest")
    assert loaded(tmp_path)[0][0] == 20  # the first one


@pytest.mark.parametrize("readable", [True, False])
def test_a_file_stop_ends_a_run_that_saves_once(
    readable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whosever it is, and where a checkpoint is due at that step anyway."""
    stop, steps, take = tmp_path / "a/STOP", [], Checkpoints.save
    stop.parent.mkdir()
    stop.write_text("") if readable else stop.mkdir()

    def save(self: Checkpoints, step: int, *words: Any) -> list[str]:
        steps.append(step)
        return take(self, step, *words)

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr("hpc_grawa.training.ending.POLL_EVERY", -1.0)
    summary = run(config("LGRAWA", "--save.every=1"), tmp_path / "a")[0]
    assert (summary["state"], stop.exists()) == ("stopped", False)
    assert sorted(steps) == sorted([*range(1, summary["steps"] + 1)] * WORLD)
    assert (tmp_path / "a/checkpoints/latest").read_text() == f"{summary['steps']:09d}\n"


def test_another_world_starts_from_the_center_if_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks go on where three stopped: all from the last center, to the same number of steps."""
    made = config("LGRAWA", "--log.tensorboard=false")  # whose writer outlives a run that is cut
    with monkeypatch.context() as patched:
        cut_at(13, patched)
        with pytest.raises(Cut):
            run(made, tmp_path)

    def body(comm: Communicator, any_world: bool = False) -> dict[str, Any]:
        return fit(made, comm, new_folder=None if comm.rank else lambda: tmp_path, speaks=False, any_world=any_world)

    before = own.contents(tmp_path)
    with pytest.raises(ConfigError, match=r"world size is 2: must be 3, as when .* --resume-world any"):
        simulate(2, body)
    assert own.contents(tmp_path) == before
    (tmp_path / "ranks").mkdir(exist_ok=True)
    (tmp_path / "ranks/0002.json").write_text("{}")
    take, starts = Worker.start_from, {}

    def start(worker: Worker, state: dict[str, Any]) -> str:
        found = take(worker, state)
        starts[worker.comm.rank] = worker.vector.data.clone()
        return found

    monkeypatch.setattr(Worker, "start_from", start)
    resumed = int((tmp_path / "checkpoints/latest").read_text())
    state = torch.load(tmp_path / f"checkpoints/{resumed:09d}/rank-0000.pt", weights_only=True)["worker"]["run"]
    summary = simulate(2, lambda comm: body(comm, any_world=True))[0]
    center = state["synchronizers"][0]["averager"]["center"]
    assert torch.equal(starts[0], center) and torch.equal(starts[1], center)
    assert (summary["world_size"], summary["steps"]) == (2, STEPS)
    rounds = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"round"' in line]
    # The checkpoint of step 10 may or may not have been on the disk.
    expected = {5: [(4, 3), (9, 2), (13, 2), (17, 2), (18, 2)], 10: [(4, 3), (8, 3), (14, 2), (18, 2)]}
    assert [(event["step"], len(event["ranks"])) for event in rounds] == expected[resumed]
    assert summary["center_test_accuracy"] > 0.3
    assert sorted(p.name for p in (tmp_path / "ranks").iterdir()) == ["0000.json", "0001.json"]


@pytest.mark.parametrize("split", ["disjoint", "reshuffled", "full", "fraction"])
def test_another_world_shares_the_data_anew(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its batches are those that a run of so many ranks has from that step on; a line says how they share."""
    share = ("--data.split=fraction", "--data.fraction=0.1") if split == "fraction" else (f"--data.split={split}",)
    made, seen, draw = config("LocalSGD", "--log.tensorboard=false", *share), {}, Sampler.indices
    with monkeypatch.context() as patched:
        cut_at(13, patched)
        with pytest.raises(Cut):
            run(made, tmp_path)
    resumed = int((tmp_path / "checkpoints/latest").read_text())

    def noted(sampler: Sampler, step: int) -> torch.Tensor:
        return seen.setdefault((sampler.rank, step), draw(sampler, step))

    monkeypatch.setattr(Sampler, "indices", noted)
    simulate(2, lambda comm: fit(made, comm, new_folder=None if comm.rank else lambda: tmp_path, any_world=True))
    for rank in range(2):
        alone = made.data.sampler(rank, 2, made.run.seed)
        steps = [step for m, step in seen if m == rank and step >= resumed]
        assert steps == list(range(resumed, STEPS)) and all(torch.equal(draw(alone, n), seen[rank, n]) for n in steps)
    assert f"split      {made.data.sampler(0, 2, 0)}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["LGRAWA", "LGRAWA, pooled", *kinds("levels")])
def test_another_world_goes_on_counting(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounds and healed ranks add up over both worlds; no probe draws what one of the rounds before drew."""
    made, take, probes = config(METHODS[name]), Worker.step, []

    def cut(worker: Worker) -> Any:
        if worker.facts.step >= 13:
            raise Cut
        if worker.comm.rank == 1 and worker.local_steps == 2:
            worker.vector.data.fill_(torch.nan)
        return take(worker)

    def probed(vector: Any, probe: Any, batches: int, seed: Any) -> Any:
        probes.append(seed[1:])
        return probe_gradient(vector, probe, batches, seed)

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "step", cut)
        with pytest.raises(Cut):
            run(made, tmp_path)
    resumed = int((tmp_path / "checkpoints/latest").read_text())
    state = torch.load(tmp_path / f"checkpoints/{resumed:09d}/rank-0000.pt", weights_only=True)["worker"]["run"]
    before = sum(s["rounds"] for s in state["synchronizers"])
    assert before >= 1 and state["synchronizers"][0]["healed"] == 1
    monkeypatch.setattr("hpc_grawa.averaging.scores.probe_gradient", probed)
    drawn, draw = [], Sampler.probe_indices
    monkeypatch.setattr(Sampler, "probe_indices", lambda s, *args: drawn.append(args[0]) or draw(s, *args))
    summary = simulate(
        2, lambda comm: fit(made, comm, new_folder=None if comm.rank else lambda: tmp_path, any_world=True)
    )[0]
    assert re.search(
        rf"^resumed    at step {resumed}, after .* s of training; 2 ranks after 3, all from the center$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    numbers = [record["round"] for record in records if record["event"] == "round"]
    assert (summary["rounds"], summary["healed"]) == (len(numbers), 1) and summary["rounds"] > before
    if "LGRAWA" in name:
        assert numbers == list(range(1, len(numbers) + 1))
        for rank in range(2):
            own_rounds = [number for m, number in probes if m == rank]
            assert own_rounds == list(range(before, before + len(own_rounds))) and len(numbers) - 1 in own_rounds
        assert min(drawn) == before


@pytest.mark.parametrize("world", [2, 8])
def test_in_another_world_epochs_go_on(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget, the learning rate and evaluations in epochs; so many steps are theirs as are left there."""
    often = ("--eval.unit=epochs", "--eval.every=0.5", "--log.every=1", "--log.tensorboard=false")
    made = config("LGRAWA", "--budget.steps=null", "--budget.epochs=2", *often)
    with monkeypatch.context() as patched:
        cut_at(13, patched)
        with pytest.raises(Cut):
            run(made, tmp_path)
    resumed = int((tmp_path / "checkpoints/latest").read_text())
    before, now = (made.data.sampler(0, size, 0).steps_per_epoch for size in (WORLD, world))
    last = resumed + math.ceil((2 - Fraction(resumed, before)) * now)

    def epochs(step: int) -> float:
        return float(Fraction(min(step, resumed), before) + Fraction(max(step - resumed, 0), now))

    summary = simulate(
        world, lambda comm: fit(made, comm, new_folder=None if comm.rank else lambda: tmp_path, any_world=True)
    )[0]
    assert (summary["state"], summary["steps"], summary["epochs"]) == ("finished", last, epochs(last))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = [record["step"] for record in records if record["event"] == "evaluate"]
    assert seen == [0, *(next(n for n in range(last) if epochs(n) >= half / 2) for half in (1, 2, 3)), last]
    trained = [record for record in records if record["event"] == "train"]
    assert [record["step"] for record in trained] == list(range(1, last + 1))
    for record in trained:
        assert record["epoch"] == epochs(record["step"])
        falls = 0.05 * (1 + math.cos(math.pi * epochs(record["step"] - 1) / 2))
        assert record["lr"] == pytest.approx(falls, abs=0.1 / now)  # the last step may end behind the second epoch


@pytest.mark.parametrize(
    ("optimizer", "change", "expected"),
    [
        (("SGD",), ("weight_decay=0.5", "momentum=0.5"), {"weight_decay": 0.5, "momentum": 0.5, "nesterov": True}),
        (("AdamW",), ("beta2=0.5", "weight_decay=0"), {"betas": (0.9, 0.5), "weight_decay": 0.0, "eps": 1e-8}),
        (("Muon",), ("weight_decay=0.5",), {"weight_decay": 0.5}),
        (("SAM", "base=torch.optim.RAdam", "base.lr=.01"), ("base.weight_decay=0.5",), {"weight_decay": 0.5}),
    ],
)
def test_a_changed_setting_of_the_optimizer_is_that_of_the_steps_that_follow(
    optimizer: tuple[str, ...],
    change: tuple[str, ...],
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its state is that of the checkpoint."""
    name, *settings = optimizer
    words = ["--log.tensorboard=false", f"--optimizer={name}", *(f"--optimizer.{word}" for word in settings)]
    with monkeypatch.context() as patched:
        cut_at(13, patched)
        with pytest.raises(Cut):
            run(config("LocalSGD", *words), tmp_path)
    take, seen = Worker.step, []

    def noted(worker: Worker) -> Any:
        assert worker.optimizer.state
        seen.extend({key: group[key] for key in expected} for group in worker.optimizer.param_groups)
        return take(worker)

    monkeypatch.setattr(Worker, "step", noted)
    run(config("LocalSGD", *words, *(f"--optimizer.{word}" for word in change)), tmp_path)
    assert seen and all(found == expected for found in seen)


def test_other_groups_of_the_optimizer_are_refused_before_anything_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        cut_at(13, patched)
        with pytest.raises(Cut):
            run(config("LGRAWA", "--log.tensorboard=false"), tmp_path)
    before = own.contents(tmp_path)
    groups = '--optimizer.groups=[{"match":"ndim<2","weight_decay":0}]'
    with pytest.raises(
        ConfigError, match=r"^optimizer.groups is \[.*\]: must make groups of \[11\] .*, and makes groups of \[4, 7\]$"
    ):
        run(config("LGRAWA", "--log.tensorboard=false", groups), tmp_path)
    assert own.contents(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------
# The program.
# ---------------------------------------------------------------------------------------------------------

WORDS = (
    *("train", "--config=digits", "--run.name=a", "--run.resume=auto", "--save.unit=steps", "--save.every=7"),
    *("--method.period=4", "--budget.seconds=null", "--eval.train_examples=50", "--log.every=5", "--backend=mpi"),
)


@launched
@pytest.mark.slow
def test_a_killed_job_started_again_equals_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL of both ranks wherever they are, three times; then the finished run is left as it is."""
    words = (*WORDS, "--budget.steps=150", "--eval.unit=steps", "--eval.every=40")
    status, _, errors = launch(*words, f"--run.dir={tmp_path}/whole", ranks=2)
    assert status == 0, errors
    again = (*words, f"--run.dir={tmp_path}/cut")
    folder = tmp_path / "cut" / "a"
    for saves in (1, 3, 6):
        job = start(*again, ranks=2, start_new_session=True)
        wait_for(folder / "checkpoints" / "latest", "", saves * 7)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        for process in running(f"--run.dir={tmp_path}/cut"):
            os.kill(process, signal.SIGKILL)
        assert not (folder / "summary.json").exists()
        os.utime(folder / "lock.json", (0, 0))  # as a minute would
    status, output, errors = launch(*again, ranks=2)
    assert status == 0 and "resumed    at step " in output, errors
    for cut, whole in zip(result(folder), result(tmp_path / "whole" / "a"), strict=True):
        assert cut == whole
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    status, output, errors = launch(*again, ranks=2)
    assert (status, output) == (0, f"hpc-grawa train: {folder} is finished\n"), errors
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


def wait_for(latest: Path, _: str, step: int) -> None:
    end = time.monotonic() + 90
    while not (latest.exists() and int(latest.read_text() or 0) >= step):
        assert time.monotonic() < end, f"step {step} was never saved"
        time.sleep(0.02)


def test_what_a_run_does_not_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another configuration, unless it is allowed; another job at work; no name where none can be found again."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    words = (*WORDS, "--backend=single", f"--run.dir={tmp_path}")
    folder = tmp_path / "a"

    def refused(*more: str) -> str:
        status, output, errors = called(capsys, *words, *more)
        assert (status, output) == (2, "backend    single (no launcher, asked for), 1 rank\n"[: len(output)])
        return errors.removeprefix("hpc-grawa train: error: ").strip()

    assert called(capsys, *words, "--budget.steps=8")[0] == 0
    (folder / "summary.json").unlink()
    assert refused("--budget.steps=8", "--method.pull=0.7") == (
        f"method.pull is 0.7: must be 0.5, as it was when {folder} began; give the run another name, or allow this "
        f"with --allow-change method.pull"
    )
    file = folder / "config.yaml"
    now = file.read_text()
    assert now.count("\nclip_norm: null\naccumulate: 1\n") == 1
    older = now.replace("\nclip_norm: null\naccumulate: 1\n", "\n")
    file.write_text(older.replace("    nesterov:", "    clip_norm: 0.5\n    accumulate: 1\n    nesterov:"))
    assert refused("--budget.steps=8").startswith("clip_norm is None: must be 0.5, as it was when ")
    file.write_text(older.replace("    nesterov:", "    clip_norm: null\n    accumulate: 1\n    nesterov:"))
    holder = Lock(folder, "job 17_2")
    assert re.match(
        rf"run.name is a: job 17_2 on .* \(process {os.getpid()}\) is at work in {folder}, its last sign of life \d+ s",
        refused("--budget.steps=8"),
    )
    holder.release()
    status, output, errors = called(
        capsys, *words, "--budget.steps=12", "--allow-change", "budget", "--comm-timeout=500"
    )
    assert status == 0 and "resumed    at step 7" in output, errors
    assert json.loads((folder / "summary.json").read_text())["steps"] == 12
    assert refused("--run.name=null", "--budget.steps=8") == (
        "run.resume is auto: must be never without run.name, where SLURM gives the job no number"
    )


def test_a_run_goes_on_by_the_budget_and_the_groups_that_it_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first step: the schedule of the steps that are left, and lists among a group's settings too."""
    own.plain_process(monkeypatch)

    def worker(steps: int, beta: float) -> Worker:
        groups = f"--optimizer.groups=[{{match: '*.weight', betas: [{beta}, 0.99]}}]"
        words = ["--config=digits", "--method=LGRAWA", "--optimizer=AdamW", groups, "--schedule=Cosine"]
        return Worker(parse([*words, "--budget.seconds=null", f"--budget.steps={steps}"]), SingleCommunicator())

    first, second = worker(12, 0.5), worker(24, 0.7)
    for _ in range(6):
        first.step()
    assert first.facts.progress == 0.5
    second.load_state_dict(first.state_dict())
    assert second.facts.progress == 0.25
    assert [min(group["betas"]) for group in second.optimizer.param_groups] == [0.9, 0.7]


CHANGING = (*LINE, "--method.period=4", "--log.tensorboard=false", "--save.unit=steps", "--save.every=4")


def test_settings_that_were_changed_on_the_way_are_told_and_make_no_seed_of_another_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is such a run one of a comparison; of a run that had made no checkpoint nothing of the old ones is left."""
    train = ("train", *CHANGING, f"--run.dir={tmp_path}", "--run.resume=auto")
    for name, steps in (("short", 12), ("long", 20)):
        assert called(capsys, *train, f"--run.name={name}", f"--budget.steps={steps}")[0] == 0
    for name, step in (("changed", 10), ("anew", 3)):
        with monkeypatch.context() as patched:
            cut_at(step, patched)
            with pytest.raises(Cut):
                cli.main([*train, f"--run.name={name}", "--budget.steps=12"])
        status, output, errors = called(
            capsys, *train, f"--run.name={name}", "--budget.steps=20", "--allow-change=budget"
        )
        assert status == 0, errors
        assert ("changed    budget.steps from 12 to 20\n" in output) is (name == "changed")
    labels = {label: len(runs) for label, runs in group([read_run(run) for run in tmp_path.iterdir()]).items()}
    assert labels == {"LGRAWA steps=12": 1, "LGRAWA steps=20": 2, "LGRAWA steps=12, then 20": 1}
    (tmp_path / "study").mkdir()
    shutil.copytree(tmp_path / "changed", tmp_path / "study/LGRAWA-0")
    compare = ("compare", *CHANGING, f"--run.dir={tmp_path}", "--run.name=study", "--methods=LGRAWA")
    for steps in (12, 20):
        status, _, errors = called(capsys, *compare, f"--budget.steps={steps}")
        assert status == 2 and f"was made with 'steps: 12, then 20', now it is 'steps: {steps}'" in errors


@pytest.mark.slow
def test_a_lock_is_taken_over_from_a_job_that_is_dead_or_was_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lock.json"
    held = json.dumps({"job": "job 5", "restarts": 0, "host": "far", "pid": 1})
    file.write_text(held)
    began = time.monotonic()
    Lock(tmp_path, "job 5", 1).release()
    assert not capsys.readouterr().out and not file.exists()
    assert BEAT < time.monotonic() - began < 30  # in which what is left of it hears of it
    file.write_text(held)
    os.utime(file, (time.time() - 57,) * 2)
    began = time.monotonic()
    Lock(tmp_path, "job 6").release()
    assert 1 < time.monotonic() - began < 50 and not file.exists()
    assert re.fullmatch(
        r"waiting    up to 10 s for job 5 on far \(process 1\), silent for (5[789]|6\d) s\n", capsys.readouterr().out
    )


def test_a_lock_is_not_taken_from_a_job_whose_clock_is_late(tmp_path: Path) -> None:
    """Some file systems date by the clock of the host that writes."""
    file, ended = tmp_path / "lock.json", threading.Event()
    file.write_text(json.dumps({"job": "job 5", "restarts": 0, "host": "far", "pid": 1}))

    def touch() -> None:
        while not ended.wait(0.1):
            os.utime(file, (time.time() - 2 * DEAD,) * 2)  # later than it says itself, at first

    other = threading.Thread(target=touch)
    other.start()
    try:
        with pytest.raises(ConfigError, match=r"job 5 on far .* is at work"):
            Lock(tmp_path, "job 6")
    finally:
        ended.set()
        other.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heir", "restarts", "said", "state"),
    [("job 6", 1, "ending", None), ("job 5", 1, "stopped", "T"), ("job 5", 0, "ending", None)],
)
def test_who_has_lost_its_lock_does_nothing_more(
    heir: str, restarts: int, said: str, state: str | None, tmp_path: Path
) -> None:
    """Ended by itself; or stopped, until somebody wakes it to end, where the same job was started again elsewhere."""
    code = (
        "import sys, time, pathlib; from hpc_grawa.runs.lock import Lock; "
        "Lock(pathlib.Path(sys.argv[1]), 'job 5'); time.sleep(60)"
    )
    loser = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    file = tmp_path / "lock.json"
    while not file.is_file():
        time.sleep(0.1)
    content = json.dumps({"job": heir, "restarts": restarts, "host": "far", "pid": 1})
    write_atomically(file, content)
    assert loser.stderr is not None
    assert loser.stderr.readline() == f"{file} is {heir}'s now: {said}\n"
    if state is not None:
        end = time.monotonic() + 60
        while Path(f"/proc/{loser.pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
            assert time.monotonic() < end
            time.sleep(0.05)
        loser.send_signal(signal.SIGCONT)
    assert loser.wait(60) == 2
    assert file.read_text() == content


def test_a_job_of_slurm_finds_its_run_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    words = (*WORDS, "--backend=single", f"--run.dir={tmp_path}", "--run.name=null", "--budget.steps=8")
    assert called(capsys, *words)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["LGRAWA-17_2"]
    assert called(capsys, *words)[1].endswith("LGRAWA-17_2 is finished\n")


def test_told_to_end_where_it_cannot_save_a_run_says_from_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", *LINE, "--method.period=4", "--budget.steps=60", "--log.tensorboard=false", "--run.name=a")
    words += ("--run.resume=auto", f"--run.dir={tmp_path}")
    take, at = Worker.step, 0

    def told(worker: Worker) -> Any:
        if worker.local_steps == at:
            os.kill(os.getpid(), signal.SIGUSR2)
        return take(worker)

    monkeypatch.setattr(Worker, "step", told)

    def ended(step: int, room: int) -> tuple[str, int]:
        nonlocal at
        at = step
        with own.files_limited(room):
            status, output, errors = called(capsys, *words)
        assert status == TRY_AGAIN, errors
        steps: int = json.loads((tmp_path / "a" / "summary.json").read_text())["steps"]
        began = "ended      timed out by SIGUSR2 (rank 0), "
        assert output.splitlines()[-1].startswith(began), output
        return output.splitlines()[-1].removeprefix(began), steps

    little, enough = 5_000, 1_000_000  # a checkpoint has 10,000 bytes
    line, steps = ended(9, little)
    assert line == f"not saved at step {steps}: the same command goes on from the start"
    line, saved = ended(9, enough)
    assert line == f"saved at step {saved}; the same command goes on"
    line, steps = ended(saved + 5, little)
    assert saved < steps and line == f"not saved at step {steps}: the same command goes on from step {saved}"
    at = -1
    status, output, errors = called(capsys, *words)
    assert status == 0 and f"resumed    at step {saved}, " in output, errors


def told_to_end(job: Any, folder: Path, state: str, cause: str) -> dict[str, Any]:
    """The summary of a job that was told to end, and says so."""
    output, errors = job.communicate(timeout=90)
    assert job.returncode == TRY_AGAIN, errors
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert (summary["state"], summary["cause"]) == (state, cause)
    assert f"ended      {state} by {cause} (rank {summary['rank']}), saved at step {summary['steps']}" in output
    return summary


@launched
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "causes"), [("LGRAWA", ("SIGUSR2", "SIGTERM", "STOP")), ("DataParallel", ("SIGTERM",))]
)
def test_a_signal_to_one_rank_has_all_save_at_one_step(method: str, causes: tuple[str, ...], tmp_path: Path) -> None:
    """Ahead of a limit, say; the next job goes on, and equals one that was never told."""
    period = [] if method == "DataParallel" else ["--method.period=4"]
    words = ["train", *LINE, "--model=own.Slow", f"--method={method}", *period, "--budget.steps=100", "--backend=mpi"]
    words += ["--log.every=2", "--run.control_every=4", "--run.name=a", "--run.resume=auto"]
    assert launch(*words, f"--run.dir={tmp_path}/whole", ranks=2)[0] == 0
    folder, again = tmp_path / "cut" / "a", (*words, f"--run.dir={tmp_path}/cut")
    for cause in causes:
        rank = 0 if cause == "STOP" else 1
        job = start(*again, ranks=2)
        records, sizes, end = folder / "metrics.jsonl", [0], time.monotonic() + 60
        while len(sizes) < 6:  # it has been growing for a while
            size = records.stat().st_size if records.exists() else 0
            sizes = [*sizes, size] if size > sizes[-1] else sizes if size == sizes[-1] else [size]
            assert time.monotonic() < end
            time.sleep(0.02)
        if cause == "STOP":
            (folder / "STOP").touch()
        else:
            ranks = [p for p in running(f"--run.dir={tmp_path}/cut") if rank_of(p) == str(rank)]
            os.kill(ranks[0], signal.Signals[cause])
        state = {"SIGUSR2": "timed out", "SIGTERM": "preempted", "STOP": "stopped"}[cause]
        summary = told_to_end(job, folder, state, cause)
        assert summary["rank"] == rank and 0 < summary["steps"] < 100
        saved = {len(json.loads(m.read_text())["files"]) for m in folder.glob("checkpoints/0*/manifest.json")}
        assert saved == {2} and not (folder / "STOP").exists()
    status, output, errors = launch(*again, ranks=2)
    assert status == 0 and f"resumed    at step {summary['steps']}" in output, errors
    for cut, whole in zip(result(folder), result(tmp_path / "whole" / "a"), strict=True):
        assert cut == whole


@launched
@pytest.mark.slow
def test_a_term_at_the_limit_is_the_limit_s_and_a_file_may_hold_a_signal_s_name(tmp_path: Path) -> None:
    """As ``slurm/common.sh`` says the limit, and writes such a file for a launcher that would die of the signal."""
    words = ["train", *LINE, "--model=own.Slow", "--method=LGRAWA", "--method.period=4", "--budget.steps=1000"]
    words += ["--run.control_every=4", "--run.name=a", "--run.resume=auto", f"--run.dir={tmp_path}", "--backend=mpi"]
    folder, now = tmp_path / "a", time.time()
    for at, cause, state in (
        (now + 3600, "SIGTERM", "preempted"),
        (now + 50, "SIGTERM", "timed out"),
        (None, "SIGUSR2", "timed out"),
    ):
        records = folder / "metrics.jsonl"
        before = records.stat().st_size if records.exists() else 0
        job = start(*words, ranks=1, env=environment(HPC_GRAWA_ENDS=f"{at or 0:.0f}"))
        end = time.monotonic() + 60
        while not records.exists() or '"event": "round"' not in records.read_text()[before:]:  # signals are heeded then
            assert time.monotonic() < end
            time.sleep(0.05)
        if at is None:
            (folder / "STOP").write_text(f"{cause}\n")
        else:
            ranks = [p for p in running(f"--run.dir={tmp_path}") if rank_of(p) == "0"]
            os.kill(ranks[0], signal.Signals[cause])
        told_to_end(job, folder, state, cause)


@pytest.mark.slow
def test_the_last_evaluation_is_made_again_where_it_was_cut_off(tmp_path: Path) -> None:
    words = ["train", *LINE, "--model=own.Slow", "--method=LGRAWA", "--method.period=2", "--budget.steps=6"]
    words += ["--save.unit=steps", "--save.every=4", "--eval.every=100", "--eval.batch_size=1", "--run.name=a"]
    words += ["--run.resume=auto", "--eval.train_examples=8"]
    assert launch(*words, f"--run.dir={tmp_path}/whole")[0] == 0
    folder, again = tmp_path / "cut" / "a", (*words, f"--run.dir={tmp_path}/cut")
    job, end = start(*again), time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or '"round": 3' not in (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.5)  # a signal is heeded until the loop is over; the evaluation takes seconds
    job.send_signal(signal.SIGUSR2)
    job.communicate(timeout=30)
    assert job.returncode == -signal.SIGUSR2 and not (folder / "summary.json").exists()
    os.utime(folder / "lock.json", (0, 0))  # as a minute would
    status, output, errors = launch(*again)
    assert status == 0 and "resumed    at step 4, " in output, errors
    for cut, whole in zip(result(folder), result(tmp_path / "whole" / "a"), strict=True):
        assert cut == whole


COMPARED = ("compare", *LINE, "--methods=LocalSGD,LGRAWA", "--seeds=1", "--method.period=4", "--run.name=study")
STUDY = ("LocalSGD-1", "LGRAWA-1")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR2, TRY_AGAIN), (signal.SIGINT, 130)])
def test_a_comparison_that_is_told_to_end_says_so_and_goes_on_where_it_was(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its first run and in its second; it then equals one that was never told, bit for bit."""
    words = (*COMPARED, "--budget.steps=20", "--log.every=3", "--log.tensorboard=false")
    assert called(capsys, *words, f"--run.dir={tmp_path}/whole")[0] == 0
    take, tells = Worker.step, ""

    def told(worker: Worker) -> Any:
        if worker.config.method_name == tells and worker.local_steps == 6:
            os.kill(os.getpid(), number)
        return take(worker)

    monkeypatch.setattr(Worker, "step", told)
    again = (*words, f"--run.dir={tmp_path}/cut")
    for method, rows in (("LocalSGD", 0), ("LGRAWA", 1)):
        tells = method
        found = called(capsys, *again)
        assert (found.status, found.errors) == (status, "")
        assert found.output.count("\n| LocalSGD ") == rows and "; the same command goes on\n" in found.output
    tells = ""
    found = called(capsys, *again)
    assert found.status == 0 and "resumed    at step " in found.output, found.errors
    assert sorted(p.name for p in (tmp_path / "cut/study").iterdir() if p.is_dir()) == sorted(STUDY)
    for name in STUDY:
        assert result(tmp_path / "cut/study" / name) == result(tmp_path / "whole/study" / name)


def test_a_comparison_by_other_settings_leaves_what_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run gets a folder with a number; what was cut off goes on with the settings that it had."""
    take = Worker.step

    def told(worker: Worker) -> Any:
        if worker.local_steps == 6:
            os.kill(os.getpid(), signal.SIGUSR2)
        return take(worker)

    def compare(steps: int) -> str:
        found = called(capsys, *COMPARED, "--methods=LGRAWA", f"--budget.steps={steps}", f"--run.dir={tmp_path}")
        assert found.status == (TRY_AGAIN if "ended      " in found.output else 0), found.errors
        return found.output

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "step", told)
        compare(20)
        compare(30)
    first, second = tmp_path / "study/LGRAWA-1", tmp_path / "study/LGRAWA-1.2"
    before = own.contents(first)
    assert "resumed    at step " in compare(30)
    assert own.contents(first) == before and json.loads((second / "summary.json").read_text())["steps"] == 30


@launched
@pytest.mark.slow
def test_a_comparison_on_several_ranks_goes_on_where_it_was_told_to_end(tmp_path: Path) -> None:
    words = (*COMPARED, "--model=own.Slow", "--budget.steps=40", "--run.control_every=4", "--log.every=2")
    words += ("--backend=mpi", "--log.tensorboard=false")
    assert launch(*words, f"--run.dir={tmp_path}/whole", ranks=2)[0] == 0
    again, study = (*words, f"--run.dir={tmp_path}/cut"), tmp_path / "cut/study"
    job, records, end = start(*again, ranks=2), study / "LGRAWA-1/metrics.jsonl", time.monotonic() + 90
    while not records.exists() or '"round": 2' not in records.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(next(p for p in running(f"--run.dir={tmp_path}/cut") if rank_of(p) == "1"), signal.SIGTERM)
    output, errors = job.communicate(timeout=90)
    assert job.returncode == TRY_AGAIN and "\n| LocalSGD " in output and "| LGRAWA " not in output, errors
    status, output, errors = launch(*again, ranks=2)
    assert status == 0 and "resumed    at step " in output and "\n| LGRAWA " in output, errors
    for name in STUDY:
        assert result(study / name) == result(tmp_path / "whole/study" / name)


def rank_of(process: int) -> str | None:
    variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    return next((v.partition("=")[2] for v in variables if v.startswith("OMPI_COMM_WORLD_RANK=")), None)
