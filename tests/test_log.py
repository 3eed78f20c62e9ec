"""Run folders: made once, by one; and files that are there are whole."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_grawa.errors import ConfigError
from hpc_grawa.runs.log import Log, human_bytes, new_folder, open_run, write_atomically


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


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345_678, "12.3 MB"), (5e12, "5 TB")]
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text
