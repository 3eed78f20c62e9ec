"""Run folders: made once, by one; and files that are there are whole."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import own
import pytest
import torch
from launcher import called
from test_cli import LINE

from hpc_grawa import cli
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError
from hpc_grawa.runs.log import Log, human_bytes, new_folder, open_run, write_atomically
from hpc_grawa.schedules import RunFacts
from hpc_grawa.training.ending import failure_recorded


def _race(directory: str, barrier: Any, results: Any) -> None:
    for number in range(20):
        barrier.wait()
        try:
            results.put((number, new_folder(directory, f"run {number}").name))
        except ConfigError as error:
            results.put((number, str(error)))


def test_of_processes_that_make_the_same_folder_exactly_one_gets_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_race, args=(str(tmp_path / "runs"), barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in range(60)]
    for process in processes:
        process.join()
    for number in range(20):
        told = sorted(text for n, text in answers if n == number)
        assert told[0] == f"run {number}"
        for message in told[1:]:
            assert message.startswith(f"run.name is run {number}: ") and "never overwritten" in message


def test_unnamed_runs_of_the_same_second_get_numbers(tmp_path: Path) -> None:
    names = [new_folder(str(tmp_path), "LGRAWA-1", numbered=True).name for _ in range(3)]
    assert names == ["LGRAWA-1", "LGRAWA-1.2", "LGRAWA-1.3"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.dir is .*/file: no folder can be made there \(File exists\)"):
        new_folder(str(tmp_path / "file"), "name")
    with pytest.raises(ConfigError, match=r"run\.dir is .*/file/x: no folder can be made there \(Not a directory\)"):
        new_folder(str(tmp_path / "file" / "x"), "name")


def test_half_written_files_are_never_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")

    def power_cut(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", power_cut)
        patch.setattr(Path, "rename", power_cut)
        for content in ("new", {"weight": torch.ones(3)}):
            with pytest.raises(KeyboardInterrupt):
                write_atomically(path, content)
    assert path.read_text() == "old"
    write_atomically(path, {"weight": torch.ones(3)})
    assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.ones(3))


def test_the_environment_says_where_a_run_took_place(tmp_path: Path) -> None:
    open_run(tmp_path, "budget: {steps: 1}\n", 3, "mpi")
    found = json.loads((tmp_path / "environment.json").read_text())
    assert (tmp_path / "config.yaml").read_text() == "budget: {steps: 1}\n"
    assert (found["world_size"], found["backend"]) == (3, "mpi")
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_log_writes_lines_at_once_and_only_where_it_has_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, silent = Log(tmp_path, speaks=True), Log(None, speaks=False)
    for each in (log, silent):
        each.record("train", step=1, loss=0.5)
        each.say("a line")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "train", "step": 1, "loss": 0.5}\n'
    assert capsys.readouterr().out == "a line\n"
    for each in (log, silent):
        each.close()


# A full disk


def test_lines_that_a_full_disk_refuses_are_written_in_their_order_once_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said once; what is lost at the end is said too. A checkpoint counts them, as they are still to come."""
    file, lines = tmp_path / "metrics.jsonl", [f'{{"event": "train", "step": {step}}}\n' for step in range(6)]
    log = Log(tmp_path, speaks=True)

    def record(*steps: int) -> str:
        for step in steps:
            log.record("train", step=step)
        assert log.written == len("".join(lines[: steps[-1] + 1]))
        return capsys.readouterr().out

    assert record(0) == ""
    with own.files_limited(50):
        told = f"log        {file} cannot be written (File too large): lines are kept until it can\n"
        assert record(1, 2, 3) == told
        assert file.read_text() == "".join(lines)[:50]
    assert record(4) == "" and file.read_text() == "".join(lines[:5])
    with own.files_limited(file.stat().st_size):
        assert record(5) == told
        log.close()
    assert capsys.readouterr().out == f"log        {file} lacks its last {len(lines[5])} bytes: they are lost\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_tensorboard_s_events_not_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    log = Log(tmp_path, speaks=True, tensorboard=True)
    log.go_on(0, -1)
    with own.files_limited(40):
        log.record("train", step=1, loss=0.5)
        log.close()
    assert "log        no more events for TensorBoard ([Errno 27] File too large" in capsys.readouterr().out


def test_training_ends_as_it_should_where_its_records_find_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.plain_process(monkeypatch)
    words = ["train", *LINE, "--budget.steps=100", "--log.every=1", "--log.tensorboard=false", "--run.name=a"]
    with own.files_limited(10_000):
        status, output, errors = called(capsys, *words, f"--run.dir={tmp_path}")
    assert (status, errors) == (0, "") and output.count("metrics.jsonl cannot be written (File too large)") == 1
    assert (tmp_path / "a/metrics.jsonl").stat().st_size == 10_000
    assert json.loads((tmp_path / "a/summary.json").read_text())["state"] == "finished"


@contextmanager
def output_full() -> Iterator[None]:
    """Within the block the standard output is on a full disk; nothing may be left for it that would fail at the end."""
    with open("/dev/full", "w") as full, redirect_stdout(full):
        yield
        full.flush()


def test_a_full_disk_under_the_standard_output_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.plain_process(monkeypatch)
    words = ["train", *LINE, "--budget.steps=4", "--log.tensorboard=false", "--run.name=a", f"--run.dir={tmp_path}"]
    with output_full():
        cli.main(words)
    assert json.loads((tmp_path / "a/summary.json").read_text())["state"] == "finished"
    assert capsys.readouterr() == ("", "")


def test_what_is_printed_on_a_full_disk_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with output_full(), pytest.raises(SystemExit) as ended:
        cli.main(["methods"])
    told = "hpc-grawa methods: error: the output cannot be written: No space left on device\n"
    assert ended.value.code == 1 and capsys.readouterr() == ("", told)


def test_word_of_a_failure_is_whole_or_absent_and_the_first_stays(tmp_path: Path) -> None:
    def fail() -> list[str]:
        with pytest.raises(ZeroDivisionError), failure_recorded(str(tmp_path), SingleCommunicator(), RunFacts(step=7)):
            raise ZeroDivisionError
        return [path.read_text() for path in tmp_path.iterdir()]

    with own.files_limited(0):
        assert fail() == []
    (word,) = fail()
    assert (json.loads(word)["state"], json.loads(word)["steps"]) == ("failed", 7)
    (tmp_path / "summary.json").write_text("the first")
    assert fail() == ["the first"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345_678, "12.3 MB"), (5e12, "5 TB")]
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text
