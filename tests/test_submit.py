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
    ended = called(capsys, *words, "--backend=single", "--comm_timeout=50", "--run.control_every=30")
    assert ended.status == 0, ended.said
    file = Path("runs/study/LGRAWA-0/config.yaml")
    text = file.read_text()
    assert "    channels_last: true\n" in text
    file.write_text(text.replace("    channels_last: true\n", "    channels_last: true\n    stage: /there\n"))
    ended = called(capsys, *words, "--run.control_every=30", "--submit=slurm/compare.sh")
    assert ended.said == "nothing to submit: all 1 runs are in runs/study\n"
    ended = called(capsys, *words, "--submit=slurm/compare.sh")
    assert (ended.status, sbatch.exists()) == (2, False)
    assert "runs/study/LGRAWA-0 was made with 'control_every: 30', now it is 'control_every: 20'" in ended.errors
