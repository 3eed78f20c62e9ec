"""Run folders that are damaged: one line that names what is, and the state before it where there is one."""

from __future__ import annotations

import collections
import enum
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import own
import pytest
import torch
from launcher import called
from own import contents

from hpc_grawa import cli, simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.errors import ConfigError
from hpc_grawa.runs.checkpoint import Checkpoints
from hpc_grawa.runs.lock import Lock
from hpc_grawa.training.loop import fit
from hpc_grawa.training.resume import RunPlace
from hpc_grawa.training.worker import Worker

STEPS, CUT = 16, 14
WORDS = ("--model=own.Line", "--data=own.Numbers", "--loss=MSELoss", "--metric=own.R2", "--optimizer.lr=0.05")
WORDS += ("--method=LGRAWA", "--method.period=4", f"--budget.steps={STEPS}", "--save.unit=steps", "--save.every=4")
WORDS += ("--eval.unit=steps", "--eval.every=4", "--run.name=a", "--run.resume=auto", "--log.tensorboard=false")


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


class Cut(Exception):
    """The job ends here."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The same run, finished, and cut off by a failure before its end, with checkpoints of steps 4 and 8."""
    base = tmp_path_factory.mktemp("runs")
    take = Worker.step

    def cut(worker: Worker) -> Any:
        if worker.local_steps == CUT:
            raise Cut
        return take(worker)

    with pytest.MonkeyPatch.context() as patch:
        own.plain_process(patch)
        cli.main(["train", *WORDS, f"--run.dir={base}/finished"])
        patch.setattr(Worker, "step", cut)
        with pytest.raises(Cut):
            cli.main(["train", *WORDS, f"--run.dir={base}/interrupted"])
    (base / "interrupted/a/lock.json").write_text('{"job": "job 5", "restarts": 0, "host": "far", "pid": 1}\n')
    yield {name: base / name / "a" for name in ("finished", "interrupted")}
    shutil.rmtree(base)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def halved(file: Path) -> None:
    content = file.read_bytes()[: file.stat().st_size // 2]
    # Of lines that all say something: what is wrong is what is not there.
    file.write_bytes(content[: content.rfind(b": true") + 7] if file.suffix == ".yaml" else content)


def binary(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 2)


def list_instead(file: Path) -> None:
    file.write_text("[1, 2]\n")


def nested(file: Path) -> None:
    file.write_text("[" * 100_000 + "\n")


def without_keys(file: Path) -> None:
    file.write_text("{}\n")


def of_other_types(file: Path) -> None:
    """Every value is another thing: texts numbers, numbers texts."""

    def other(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: other(inner) for key, inner in value.items()}
        return 7 if isinstance(value, str) else ["x"] if isinstance(value, list) else {"y": None}

    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.suffix == ".jsonl" else None
    found = [json.loads(file.read_text())] if lines is None else [{**other(x), "event": x["event"]} for x in lines]
    file.write_text("".join(json.dumps(other(x) if lines is None else x) + "\n" for x in found))


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


def unreadable(place: Path) -> None:
    """For whoever may read everything, too."""
    gone(place)
    place.symlink_to(place)


def gone(place: Path) -> None:
    shutil.rmtree(place) if place.is_dir() else place.unlink()


def file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("text\n")


Damage = Callable[[Path], None]
_FILE: tuple[Damage, ...] = (emptied, halved, binary, list_instead, without_keys, folder_instead, unreadable, gone)
_JSON = (*_FILE, nested, of_other_types)
FILES = {
    "config.yaml": _FILE,
    "environment.json": _JSON,
    "summary.json": _JSON,
    "metrics.jsonl": _JSON,
    "center.pt": _FILE,
    "lock.json": _JSON,
    "ranks/0000.json": _JSON,
    "checkpoints/latest": _FILE,
    "checkpoints/000000008/manifest.json": _JSON,
    "checkpoints/000000008/rank-0000.pt": _FILE,
    "checkpoints/000000008": (file_instead, unreadable, gone),
    "checkpoints": (file_instead, unreadable, gone),
    "ranks": (file_instead, unreadable, gone),
}


def damaged(run: Path, name: str, damage: Damage, to: Path) -> Path:
    """A damaged copy of a run; a lock in it is that of a dead job."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to / "a", symlinks=True)
    damage(to / "a" / name)
    if os.path.lexists(to / "a/lock.json"):
        os.utime(to / "a/lock.json", (0, 0), follow_symlinks=False)
    return to / "a"


def told(errors: str, program: str, place: Path) -> bool:
    """Whether that is one line which names the place."""
    return errors.count("\n") == 1 and errors.startswith(f"hpc-grawa {program}: error: ") and str(place) in errors


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["finished", pytest.param("interrupted", marks=pytest.mark.slow)])  # trains each time
def test_a_damaged_run_goes_on_from_the_state_before_or_one_line_names_what_is_damaged(
    kind: str, name: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it goes on it ends, bit for bit, as the run that was not damaged."""
    whole = torch.load(runs["finished"] / "center.pt", weights_only=True)
    if not (runs[kind] / name).exists():
        pytest.skip(f"a run that is {kind} has no {name}")
    for damage in FILES[name]:
        folder = damaged(runs[kind], name, damage, tmp_path / "b")
        finished = kind == "finished" and name != "summary.json"
        status, output, errors = called(capsys, "train", *WORDS, f"--run.dir={folder.parent}")
        assert (status, errors) == (0, "") or (status == 2 and told(errors, "train", folder / name)), (damage, errors)
        if status == 0 and not (finished and name == "center.pt"):
            center = torch.load(folder / "center.pt", weights_only=True)
            assert all(torch.equal(center[key], whole[key]) for key in whole), (damage, output)
            if name == "metrics.jsonl":
                status, output, errors = called(capsys, "table", str(folder))
                assert (status, errors) == (0, "") or (status == 2 and told(errors, "table", folder / name)), errors


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["finished", "interrupted"])
def test_a_damaged_run_is_reported_or_one_line_names_what_is_damaged(
    kind: str, name: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (runs[kind] / name).exists():
        pytest.skip(f"a run that is {kind} has no {name}")
    folder = tmp_path / "b/a"
    commands = [["status", str(folder)], ["table", str(folder), str(runs["finished"]), f"--csv={tmp_path}/table.csv"]]
    if kind == "finished":
        commands.append(["evaluate", str(folder)])
    if name in ("config.yaml", "summary.json", "metrics.jsonl"):
        commands.append(["table", str(folder), f"--figure={tmp_path}/figure.svg"])
    for damage in FILES[name]:
        damaged(runs[kind], name, damage, folder.parent)
        for words in commands:
            status, output, errors = called(capsys, *words)
            # Without the file it may be no run at all, or none that was evaluated: then the folder is named.
            place = folder if damage in (gone, emptied, folder_instead, unreadable) else folder / name
            right = (status, errors) == (0, "") or (status == 2 and told(errors, words[0], place))
            assert right, (damage, words, output, errors)


def test_where_no_checkpoint_is_whole_one_line_says_what_to_do(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(runs["interrupted"], "checkpoints/000000004/manifest.json", without_keys, tmp_path / "b")
    halved(folder / "checkpoints/000000008/rank-0000.pt")
    for more in ([], ["--resume-world=any"]):
        status, _, errors = called(capsys, "train", *WORDS, f"--run.dir={folder.parent}", *more)
        assert status == 2 and told(errors, "train", folder / "checkpoints/000000004/manifest.json"), errors
        assert f"{folder}/checkpoints/000000008/rank-0000.pt has " in errors
        assert "is whole on every rank: start anew under another run.name, or remove that folder" in errors


def test_a_newest_checkpoint_that_nobody_names_is_taken_and_this_is_said(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(runs["interrupted"], "checkpoints/latest", binary, tmp_path / "b")
    status, output, errors = called(capsys, "train", *WORDS, f"--run.dir={folder.parent}")
    assert status == 0 and f"{folder.resolve()}/checkpoints/latest names no checkpoint" in output, errors
    assert "resumed    at step 8" in output


def test_signs_of_life_that_are_damaged_are_named_and_the_others_shown(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(runs["interrupted"], "ranks/0000.json", lambda file: None, tmp_path / "b")
    for number, damage in enumerate((without_keys, of_other_types, binary), 1):
        shutil.copy(folder / "ranks/0000.json", folder / f"ranks/{number:04d}.json")
        damage(folder / f"ranks/{number:04d}.json")
    status, output, _ = called(capsys, "status", str(folder))
    assert status == 0 and output.count("| 0 ") == 1
    assert output.count(": no sign of life") == 3 and f"damaged    {folder}/ranks/0003.json: no sign of life" in output


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "summary.json"])
def test_a_comparison_with_a_damaged_run_makes_it_again_or_one_line_names_it(
    name: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", *(w for w in WORDS if not w.startswith(("--method=", "--run")))]
    words += ["--methods=LGRAWA", "--run.name=c", f"--run.dir={tmp_path}"]
    assert called(capsys, *words)[0] == 0
    run = tmp_path / "c/LGRAWA-0"
    shutil.copytree(run, tmp_path / "whole")
    for damage in (halved, binary, without_keys):
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "whole", run)
        damage(run / name)
        status, output, errors = called(capsys, *words)
        again = name == "summary.json" and "(1 of 1) is in" not in output
        needless = name == "environment.json"  # of a finished run, which says all that is asked elsewhere
        assert (status == 0 and (again or needless)) or (status == 2 and told(errors, "compare", run)), (damage, errors)
        shutil.rmtree(tmp_path / "c/LGRAWA-0.2", ignore_errors=True)


# Starts that are refused


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("refusal", ["no space", "no checkpoint is whole", "what cannot be saved", "records"])
def test_a_start_that_is_refused_leaves_the_run_as_it_was(
    refusal: str,
    killed: bool,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its end, its records and its heartbeats, byte for byte; the next start goes on and says how the run had ended."""
    folder = damaged(runs["interrupted"], "summary.json", gone if killed else lambda file: None, tmp_path / "b")
    words, more, told, good = ("train", *WORDS, f"--run.dir={folder.parent}"), [], refusal, contents(folder)
    with monkeypatch.context() as patch:
        if refusal == "no space":
            usage = shutil.disk_usage(tmp_path)._replace(free=0)
            patch.setattr("hpc_grawa.runs.checkpoint.shutil.disk_usage", lambda place: usage)
            more, told = ["--save.keep=99999", "--allow-change=save.keep"], "save.keep is 99999: 100000 "
        elif refusal == "no checkpoint is whole":
            for name in ("000000004", "000000008"):
                binary(folder / "checkpoints" / name / "rank-0000.pt")
            told = "no checkpoint in "
        elif refusal == "what cannot be saved":
            more, told = ["--optimizer=own.Marking", "--allow-change=optimizer"], "nothing can be saved: rank 0: "
        else:
            unreadable(folder / "metrics.jsonl")
            told = f"{folder}/metrics.jsonl cannot be written"
        before = contents(folder)
        status, _, errors = called(capsys, *words, *more)
    assert status == 2 and errors.startswith(f"hpc-grawa train: error: {told}"), errors
    assert contents(folder) == before
    for name, content in good.items():
        if before.get(name) != content:
            (folder / name).unlink()
            (folder / name).write_bytes(content)
    status, output, errors = called(capsys, *words)
    assert (status, errors) == (0, "") and "resumed    at step 8" in output
    ended = "ended by failed: Cut:  before its ranks had saved" if killed else "failed by Cut: "
    assert f"before     {ended}" in output


def test_another_number_of_ranks_is_refused_before_anything_is_said_or_changed(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the newest checkpoint that says how many saved it; a damaged one of others is passed over."""
    monkeypatch.chdir(tmp_path)
    words = ("train", *WORDS, "--run.dir=here")
    config, folder = parse([*words[1:], "--budget.steps=9"]), tmp_path / "here/a"
    folder.mkdir(parents=True)
    simulate(2, lambda comm: fit(config, comm, new_folder=None if comm.rank else lambda: folder, speaks=False))
    text = json.dumps({"state": "preempted", "cause": "SIGTERM", "rank": 1, "steps": 9}) + "\n"
    (folder / "summary.json").write_text(text)
    before = contents(folder)
    allowed = "--allow-change=budget"
    assert called(capsys, *words, allowed) == (
        2,
        "",
        "hpc-grawa train: error: world size is 1: must be 2, as when here/a was saved; or go on from its "
        "center with --resume-world any\n",
    )
    assert contents(folder) == before
    status, output, _ = called(capsys, "status", "here/a")
    assert status == 0 and output.startswith("here/a: preempted by SIGTERM (rank 1)\n")
    newest = max(folder.glob("checkpoints/0*"))
    without_keys(newest / "manifest.json")
    assert called(capsys, *words, allowed)[:2] == (2, "")
    shutil.copytree(runs["interrupted"] / "checkpoints/000000008", newest, dirs_exist_ok=True)
    status, output, errors = called(capsys, *words, allowed)
    assert status == 0 and "before     preempted by SIGTERM (rank 1)" in output, errors


# A run that another process has finished


def test_who_waited_for_the_lock_of_a_run_that_then_finished_leaves_it_as_it_is(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the processes that were started at one moment one trains; the others end without a word of training."""
    shutil.copytree(runs["interrupted"], tmp_path / "a")
    place = RunPlace(parse([*WORDS, f"--run.dir={tmp_path}"]))
    assert not place.finished
    (tmp_path / "a/lock.json").unlink()
    holder = Lock(tmp_path / "a", "job 5")

    def finish() -> None:
        time.sleep(0.5)  # the other waits by then, or does not: the outcome is the same
        shutil.copytree(runs["finished"], tmp_path / "a", dirs_exist_ok=True)
        holder.release()

    other = threading.Thread(target=finish)
    other.start()
    assert place.open() is None
    other.join()
    place.close()
    assert f"finished   {tmp_path}/a, by another job meanwhile" in capsys.readouterr().out
    for name in ("summary.json", "metrics.jsonl", "center.pt"):
        assert (tmp_path / "a" / name).read_bytes() == (runs["finished"] / name).read_bytes()
    assert not (tmp_path / "a/lock.json").exists()


def test_all_ranks_end_where_the_run_was_finished_meanwhile() -> None:
    config = parse([*WORDS, "--run.name=b"])
    assert (
        simulate(3, lambda comm: fit(config, comm, new_folder=None if comm.rank else lambda: None))
        == [{"state": "finished"}] * 3
    )


@pytest.mark.slow
def test_of_many_who_wait_for_a_lock_one_gets_it_at_a_time(tmp_path: Path) -> None:
    """Released, it goes to one of them; the next ones get it once that has let it go."""
    first, held, most = Lock(tmp_path, "job 0"), [], []

    def take(number: int) -> None:
        lock = Lock(tmp_path, f"job {number}")
        held.append(number)
        most.append(len(held))
        time.sleep(0.2)
        held.remove(number)
        lock.release()

    others = [threading.Thread(target=take, args=(number,)) for number in range(1, 5)]
    for thread in others:
        thread.start()
    time.sleep(0.5)
    first.release()
    for thread in others:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_locks_of_two_found_empty_one_after_the_other_are_no_sign_of_life(tmp_path: Path) -> None:
    """A lock is empty between being made and being written: seen so twice, it may be two, one after the other."""
    file = tmp_path / "lock.json"
    file.touch()
    os.utime(file, (time.time() - 5,) * 2)

    def the_next_one() -> None:
        time.sleep(0.5)
        file.unlink()
        file.touch()
        time.sleep(1.2)  # the one who waits looks once a second
        file.unlink()

    other = threading.Thread(target=the_next_one)
    other.start()
    lock = Lock(tmp_path, "job 1")
    other.join()
    assert json.loads(file.read_text())["job"] == "job 1"
    lock.release()


@pytest.mark.parametrize("damage", [emptied, binary, list_instead, nested, unreadable])
def test_a_lock_of_nobody_is_taken_over_and_one_damaged_later_ends_nobody(tmp_path: Path, damage: Damage) -> None:
    file = tmp_path / "lock.json"
    file.write_text("{}")
    damage(file)
    os.utime(file, (time.time() + 1e6,) * 2 if damage is binary else (0, 0), follow_symlinks=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpc_grawa.runs.lock.DEAD", 1.0)  # of a time that lies in the future, too
        lock = Lock(tmp_path, "job 1")
    assert json.loads(file.read_text())["job"] == "job 1"
    damage(file)
    lock._beat_once()
    lock.release()


# Checkpoints that can be read


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Pair(NamedTuple):
    a: int
    b: int


class Marked(torch.Tensor):
    pass


def written_and_read(folder: Path, state: Any, ranks: int = 2) -> list[Any]:
    def body(comm: Communicator) -> Any:
        checkpoints = Checkpoints(folder, comm)
        assert (
            checkpoints.save(1, {"x": [{"y": state if comm.rank == ranks - 1 else 0}]}, {"seconds": np.float64(1)})
            == []
        )
        assert checkpoints.settle() == []
        restored = checkpoints.load()
        assert restored is not None and restored.manifest["seconds"] == 1
        return restored.state["x"][0]["y"]

    return simulate(ranks, body)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        ({np.int64(1): (np.float64(2.0), [None, 1j])}, {1: (2.0, [None, 1j])}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
        ({1, np.int32(2)}, {1, 2}),
        (torch.Size([2, 3]), torch.Size([2, 3])),
        (torch.bfloat16, torch.bfloat16),
        (10**30, 10**30),
        (b"bytes", b"bytes"),
    ],
)
def test_what_is_saved_is_read_and_numbers_of_numpy_are_numbers(tmp_path: Path, state: Any, expected: Any) -> None:
    read = written_and_read(tmp_path, state)[-1]
    assert read == expected and type(read) is type(expected)


@pytest.mark.parametrize(
    "state",
    [
        Colour.RED,
        Level.LOW,
        Pair(1, 2),
        own.Plain(),
        np.ones(3),
        np.longdouble(1),
        np.datetime64("2026-01-01"),
        Marked(torch.ones(2)),
        frozenset([1]),
        range(3),
        len,
        torch.Generator(),
        {Colour.RED: 1},
    ],
    ids=lambda state: type(state).__name__,
)
def test_what_could_not_be_read_back_is_refused_on_all_ranks_by_its_key(tmp_path: Path, state: Any) -> None:
    where = "a key of x[0].y" if isinstance(state, dict) else "x[0].y"
    kind = Colour if isinstance(state, dict) else type(state)

    def body(comm: Communicator) -> str:
        checkpoints = Checkpoints(tmp_path, comm)
        held = {"x": [{"y": state if comm.rank == 1 else 0}]}
        for refuse in (lambda: checkpoints.check(held), lambda: checkpoints.save(1, held, {})):
            with pytest.raises(ConfigError) as error:
                refuse()
        return str(error.value)

    for message in simulate(2, body):
        assert message.startswith(
            f"nothing can be saved: rank 1: {where} is of type {kind.__module__}.{kind.__qualname__}, "
        )
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_of_numpys_numbers_is_saved_and_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *WORDS, "--schedule=own.NumpyCosine"]
    assert called(capsys, *words, f"--run.dir={tmp_path}/whole")[0] == 0
    take = Worker.step

    def cut(worker: Worker) -> Any:
        if worker.local_steps == CUT:
            raise Cut
        assert {type(group["lr"]) for group in worker.optimizer.param_groups} == {float}
        return take(worker)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "step", cut)
        with pytest.raises(Cut):
            cli.main([*words, f"--run.dir={tmp_path}/cut"])
    status, output, errors = called(capsys, *words, f"--run.dir={tmp_path}/cut")
    assert status == 0 and "resumed    at step 8" in output, errors
    whole, again = (torch.load(tmp_path / name / "a/center.pt", weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_what_cannot_be_saved_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train", *WORDS, "--optimizer=own.Marking", f"--run.dir={tmp_path}")
    status, _, errors = called(capsys, *words)
    key = "worker.optimizer.param_groups[0].mode"
    assert status == 2 and errors.startswith(
        f"hpc-grawa train: error: nothing can be saved: rank 0: {key} is of type own"
    )
    assert errors.count("\n") == 1 and "evaluate" not in (tmp_path / "a/metrics.jsonl").read_text()
    assert called(capsys, *words, "--save.every=.inf", "--run.name=b")[0] == 0
