"""Comparisons that are started elsewhere, by ``--submit`` and ``--launcher``: what sbatch and its tasks are given."""

from __future__ import annotations

import os
from pathlib import Path

import own
import pytest
from launcher import called

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


@pytest.mark.parametrize("words", ["--gpus-per-node=2 slurm/compare.sh", "--exclusive slurm/my-compare.sh"])
def test_options_of_sbatch_stay_as_they_are(words: str, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = called(capsys, *COMPARE, "--methods=LGRAWA", "--submit", words)
    assert ended.status == 0, ended.said
    assert sbatch.read_text().splitlines()[1:-1] == words.split()
