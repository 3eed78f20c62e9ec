"""What a run would be, found by making its first steps: ``hpc-grawa train --dry_run``."""

from __future__ import annotations

import math
import resource
import time
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..comm import Network
from ..comm.base import TICKET
from ..comm.meter import bytes_sent
from ..comm.mirror import MirrorCommunicator
from ..methods import Run
from ..periods import Constant, Period, length
from ..runs.log import human_bytes
from ..schedules import RunFacts
from .config import Config
from .worker import Worker

STEPS = 5
#: Of a run, at which something is shown.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Level:
    """One synchronizer's rounds.

    Attributes:
        ranks: that take part in one.
        periods: local steps of each in turn; a single number, where it is the same for all.
        bytes: that a rank sends in one, with the tickets drawn for its steps.
        seconds: that one took.
        link: seconds that its messages take over the emulated network.
    """

    ranks: int
    periods: Sequence[float]
    bytes: float
    seconds: float
    link: float

    @property
    def period(self) -> float:
        """Their mean."""
        return sum(self.periods) / len(self.periods)


def plan(config: Config, world_size: int, ranks_per_host: int) -> str:
    """Batch, learning rate, steps, rounds, bytes, memory and time of a run of ``world_size`` ranks, as lines of text.

    Makes a few steps and one round of each level on this process, timed; writes nothing.
    """
    network = None if config.network is None else Network.read(config.network)
    comm = MirrorCommunicator(world_size, ranks_per_host, network)
    worker = Worker(config, comm)
    run, shares_still = worker.run, worker.run.shares_still
    run.shares_still = lambda _: True  # if at all, until rounds are to be timed
    asked, pooled = _apart(run)
    worker.step()
    start = time.perf_counter()
    for _ in range(STEPS):
        worker.step()
    seconds = (time.perf_counter() - start) / STEPS
    per_step = comm.meter.bytes_sent["gradient"] / (STEPS + 1)
    link_per_step = comm.link_seconds["gradient"] / (STEPS + 1)
    # The steps that the budget comes to at the speed just measured.
    steps = min(worker.total_steps or math.inf, (config.budget.seconds or math.inf) / seconds)
    whole = max(1, round(steps))
    # How many of them share gradients before the run averages.
    shared = next((n for n in range(whole) if not shares_still(_facts(config, worker, n, whole, seconds))), whole)
    if 0 < shared < whole:
        run.begin_averaging()
        asked, pooled = _apart(run)
        worker.step()
    levels = []
    for s, ask in zip(run.synchronizers, asked, strict=True):
        before, start = _of_rounds(comm.meter.bytes_sent), time.perf_counter()
        link = _of_rounds(comm.link_seconds)
        s.round()
        took, sent = time.perf_counter() - start, _of_rounds(comm.meter.bytes_sent) - before
        link = _of_rounds(comm.link_seconds) - link
        level = Level(s.averager.comm.size, _periods(ask, config, worker, shared, whole, seconds), sent, took, link)
        if pooled:  # a rank's last ticket finds none left
            level.bytes += (level.period + 1) * bytes_sent("counter", TICKET.nbytes, world_size)
            level.link += (level.period + 1) * comm.over_network("counter", TICKET.nbytes)
        levels.append(level)
    epoch = worker.sampler.steps_per_epoch
    # Of the run as a whole.
    averaging = epoch * (1 - shared / whole)
    sharing = epoch - averaging if shared else epoch
    sent = per_step * sharing + sum(averaging / v.period * v.bytes for v in levels)
    link = link_per_step * sharing + sum(averaging / v.period * v.link for v in levels)
    round_seconds = sum(averaging / level.period * level.seconds for level in levels)
    batch = config.data.batch_size
    limits = [f"{worker.total_steps:,} steps"] if worker.total_steps else []
    limits += [f"{config.budget.seconds:g} s"] if config.budget.seconds else []
    # Likewise with rounds.
    per_step_seconds = seconds + (round_seconds + link) / epoch
    steps = min(worker.total_steps or math.inf, (config.budget.seconds or math.inf) / per_step_seconds)
    parameters = worker.vector.data.numel() * worker.vector.data.element_size()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    over = "without the network"
    if network is not None:
        over = f"+ {link:.3g} s of messages over {network.text}, if nothing hides them"
    warm = f"; warm-up of {config.schedule.warmup:,} steps" if config.schedule.warmup else ""
    lines = [
        f"method            {config.method}",
        f"effective batch   {batch} per rank x {world_size} ranks = {batch * world_size}",
        f"split             {worker.sampler}",
        f"learning rate     {_rates(config, worker, max(1, round(steps)), per_step_seconds)}"
        f"{config.schedule.told(worker.facts.peak_lr, world_size)}{warm}",
        f"budget            {' or '.join(limits)}; {epoch:,} steps per epoch",
        f"rounds            {_rounds(levels, epoch, shared)}",
        f"sent per rank     {_sent(levels)}{human_bytes(per_step)} per step, {human_bytes(sent)} per epoch",
        f"memory per rank   {human_bytes(memory)} at its peak here; parameters {human_bytes(parameters)}",
        f"time per epoch    {seconds * epoch:.3g} s of local steps ({1000 * seconds:.3g} ms each, timed over {STEPS}) "
        f"+ {round_seconds:.2g} s of rounds, {over}",
    ]
    if comm.hosts_matter:
        hosts = math.ceil(world_size / comm.ranks_per_host)
        said = "--network" if network is not None and network.ranks_per_host else "--ranks_per_host"
        lines.insert(5, f"hosts             {hosts} of {comm.ranks_per_host} ranks ({said})")
    return "\n".join(lines)


def _apart(run: Run) -> tuple[list[Period], bool]:
    """Have no rounds, so that they and steps are timed apart; returns the periods, and whether rounds are pooled."""
    asked, pooled = [s.ask for s in run.synchronizers], run.pooled
    for s in run.synchronizers:
        s.ask, s.pool = Constant(math.inf), None
    return asked, pooled


def _rounds(levels: Sequence[Level], epoch: int, shared: int) -> str:
    """How many there are, and how often; of several levels each with its ranks."""
    if not levels:
        return "none"
    before = f"none in {shared:,} steps, which share gradients; then " if shared else ""
    return before + "; ".join(
        f"{epoch / v.period:.4g} per epoch{_among(v, levels)}, every {_steps(v.periods, shared)} local steps"
        for v in levels
    )


def _steps(periods: Sequence[float], shared: int) -> str:
    """Of one period the number; of several those at quarters of the run, of which some steps may share gradients."""
    if len(periods) == 1:
        return f"{periods[0]:g}"
    ends = list(accumulate(periods, initial=shared))[1:]
    shown = [(share, bisect(ends, share * ends[-1])) for share in SHARES if share * ends[-1] >= shared]
    return ", ".join(f"{periods[min(at, len(ends) - 1)]:g} (at {share:.0%})" for share, at in shown)


def _sent(levels: Sequence[Level]) -> str:
    return "".join(f"{human_bytes(level.bytes)} per round{_among(level, levels)}, " for level in levels)


def _among(level: Level, levels: Sequence[Level]) -> str:
    return f" among {level.ranks} ranks" if len(levels) > 1 else ""


def _of_rounds(by_purpose: Mapping[str, float]) -> float:
    return by_purpose["center"] + by_purpose["control"]


def _periods(ask: Period, config: Config, worker: Worker, step: float, steps: int, seconds: float) -> list[float]:
    """Of each round from a step on, of a run of so many steps of so many seconds."""
    if isinstance(ask, Constant) and ask.steps < math.inf:
        return [ask.steps]
    periods = []
    while step < steps:
        periods.append(min(length(ask, _facts(config, worker, math.floor(step), steps, seconds)), steps - step))
        step += periods[-1]
    return periods


def _facts(config: Config, worker: Worker, step: int, steps: int, seconds: float) -> RunFacts:
    """Before a step of a run of so many steps of so many seconds."""
    facts = replace(worker.facts, step=step, seconds=step * seconds, progress=step / steps)
    return replace(facts, lr=facts.peak_lr * config.schedule(facts))


def _rates(config: Config, worker: Worker, steps: int, seconds: float) -> str:
    """The learning rate at the first of so many steps of so many seconds, at quarters, and at the last."""
    shown = []
    for share in SHARES:
        facts = _facts(config, worker, math.floor(share * (steps - 1)), steps, seconds)
        shown.append(f"{facts.lr:.3g} at {share:.0%}")
    return ", ".join(shown)
