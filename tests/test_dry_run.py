"""A dry run says what the run then does."""

from __future__ import annotations

import re

import own
import pytest

from hpc_grawa import cli, simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.training.loop import fit

#: Two parameters, so that a control word and a ticket count as much as a center; 2 steps an epoch on 4 ranks.
LINE = ("--model=own.Line", "--data=own.Numbers", "--loss=MSELoss", "--metric=own.R2", "--optimizer.lr=0.05")
STEPS, EPOCHS = 16, 8
FIRST = ("--method=LocalSGD", "--method.sharing=DataParallel", "--method.period=PostLocal", "--method.period.steps=4")
LEVELS = ("--method=LSGD", "--method.period=8", "--method.group_period=2")


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """Its lines by what they begin with."""
    cli.main(["train", *LINE, f"--budget.steps={STEPS}", *words, "--dry_run", "--world_size=4"])
    return {line[:18].strip(): line[18:] for line in capsys.readouterr().out.splitlines()}


@pytest.mark.parametrize(
    ("words", "farewell"),  # what numbers a run's last control word holds where no round carries it
    [
        (("--method=LocalSGD", "--method.period=4"), 0),
        (("--method=LocalSGD", "--method.period=4", "--method.rounds=pooled"), 10 + 1),
        (("--method=LGRAWA", "--method.period=8", "--method.rounds=pooled"), 10 + 2),
        ((*LEVELS, "--method.ranks_per_group=2"), 0),
        (LEVELS, 0),
        (("--method=DataParallel", "--run.control_every=1000"), 10),
        ((*FIRST, "--method.period.switch=4"), 0),
        ((*FIRST, "--method.period.switch=100", "--run.control_every=1000"), 10),
        ((*FIRST, "--method.period.switch=8", "--method.group_period=2"), 0),
    ],
    ids=["lockstep", "pooled", "pooled by layers", "groups", "hosts", "gradients", "first", "only", "first, groups"],
)
def test_the_bytes_of_a_dry_run_are_those_of_the_run(
    words: tuple[str, ...], farewell: int, capsys: pytest.CaptureFixture[str]
) -> None:
    told = re.search(r"([\d.]+) (k?B) per epoch$", dry_run(capsys, *words)["sent per rank"])
    assert told
    config = parse([*LINE, f"--budget.steps={STEPS}", *words])
    summary = simulate(4, lambda comm: fit(config, comm, speaks=False))[0]
    assert summary["steps"] == STEPS and summary["epochs"] == EPOCHS
    sent = float(told[1]) * {"B": 1, "kB": 1000}[told[2]] * EPOCHS
    assert sent + 8 * farewell * 3 == pytest.approx(summary["bytes_sent"], rel=0.005)


def test_a_dry_run_tells_levels_apart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(capsys, *LEVELS, "--method.ranks_per_group=2")
    assert "hosts" not in lines
    assert lines["rounds"] == (
        "1 per epoch among 2 ranks, every 2 local steps; 0.25 per epoch among 4 ranks, every 8 local steps"
    )
    group, all_ranks = 8 * (1 / 2) + 8 * 11 * 1, 8 * (3 / 4) + 8 * 11 * 3  # the leader; control word and score
    assert lines["sent per rank"] == (
        f"{group:.0f} B per round among 2 ranks, {all_ranks:.0f} B per round among 4 ranks, 0 B per step, "
        f"{group + all_ranks / 4:.0f} B per epoch"
    )


def test_a_dry_run_tells_how_long_gradients_are_shared(capsys: pytest.CaptureFixture[str]) -> None:
    """Periods after it stand at their shares of the whole run."""
    rounds = dry_run(capsys, *FIRST, "--method.period.switch=8")["rounds"]
    after = "0.5 per epoch, every 4 (at 50%), 4 (at 75%), 4 (at 100%) local steps"
    assert rounds == f"none in 8 steps, which share gradients; then {after}"


def test_hosts_of_a_dry_run_are_as_large_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """A host of two ranks is a group of two; alone, all ranks are on one host."""
    groups = dry_run(capsys, *LEVELS, "--method.ranks_per_group=2")
    hosts = dry_run(capsys, *LEVELS, "--ranks_per_host=2")
    for line in ("rounds", "sent per rank"):
        assert hosts[line] == groups[line]
    assert hosts["hosts"] == "2 of 2 ranks (--ranks_per_host)"
    emulated = dry_run(capsys, *LEVELS, "--network=1gbit,1us,1gbit,1us,2")
    assert (emulated["hosts"], emulated["rounds"]) == ("2 of 2 ranks (--network)", groups["rounds"])
    one = dry_run(capsys, *LEVELS)
    assert one["hosts"] == "1 of 4 ranks (--ranks_per_host)" and "every 2 local steps" in one["rounds"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks_per_host=2"], "ranks_per_host is 2: must come with --dry_run"),
        (["--ranks_per_host=0", "--dry_run"], "ranks_per_host is 0: must be at least 1 rank"),
    ],
)
def test_ranks_per_host_belong_to_a_dry_run(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *LINE, "--method=LSGD", f"--budget.steps={STEPS}", *words])
    assert message in capsys.readouterr().err


def test_a_dry_run_tells_what_messages_take_over_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    """A ring for the sum, W - 1 hops for the control word, of 10 numbers; on one host by its own pair."""

    def told(*words: str) -> tuple[float, str]:
        lines = dry_run(capsys, *words)
        taken = re.search(r"\+ ([\d.]+) s of messages over \S+, if nothing hides them$", lines["time per epoch"])
        assert taken
        return float(taken[1]), lines["sent per rank"]

    seconds, sent = told("--method=DataParallel", "--network=1mbit,10ms")
    per_step = re.search(r"(\d+) B per step", sent)
    assert per_step
    assert seconds == pytest.approx(2 * (6 * 0.01 + float(per_step[1]) * 8e-6), rel=0.01)  # 2 steps
    rounds = "--method=LocalSGD", "--method.period=4"  # half a one per epoch
    least = (6 * 0.01 + 8 * 1.5 * 8e-6) + 3 * (0.01 + 80 * 8e-6)
    assert told(*rounds, "--network=1mbit,10ms")[0] == pytest.approx(least / 2, rel=0.01)
    two_hosts = "--network=1mbit,10ms,1mbit,5ms"
    assert told(*rounds, two_hosts, "--ranks_per_host=2")[0] == pytest.approx(least / 2, rel=0.01)
    assert told(*rounds, two_hosts)[0] == pytest.approx((least - 9 * 0.005) / 2, rel=0.01)
