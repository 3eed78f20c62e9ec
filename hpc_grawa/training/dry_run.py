"""What a run would be, found by making its first steps: ``hpc-grawa train --dry_run``."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..comm.base import TICKET, Communicator
from ..comm.meter import bytes_sent
from ..comm.mirror import MirrorCommunicator
from ..runs.log import human_bytes
from .config import Config
from .worker import Worker

STEPS = 5


@dataclass
class Level:
    """One synchronizer's rounds.

    Attributes:
        ranks: that take part in one.
        period: local steps between them.
        bytes: that a rank sends in one, with the tickets drawn for its steps.
        seconds: that one took.
    """

    ranks: int
    period: float
    bytes: float
    seconds: float


def plan(config: Config, world_size: int, ranks_per_host: int) -> str:
    """Batch, learning rate, steps, rounds, bytes, memory and time of a run of ``world_size`` ranks, as lines of text.

    Makes a few steps and one round of each level on this process, timed; writes nothing.
    """
    comm = MirrorCommunicator(world_size, ranks_per_host)
    worker = Worker(config, comm)
    synchronizers = worker.run.synchronizers
    periods = [s.period for s in synchronizers]
    tickets = [0 if s.pool is None else s.period + 1 for s in synchronizers]  # a rank's last one finds none left
    for s in synchronizers:
        s.period, s.pool = math.inf, None  # steps and rounds are timed apart
    worker.step()
    start = time.perf_counter()
    for _ in range(STEPS):
        worker.step()
    seconds = (time.perf_counter() - start) / STEPS
    per_step = comm.meter.bytes_sent["gradient"] / (STEPS + 1)
    levels = []
    for s, period, drawn in zip(synchronizers, periods, tickets, strict=True):
        before, start = _round_bytes(comm), time.perf_counter()
        s.round()
        took, sent = time.perf_counter() - start, _round_bytes(comm) - before
        sent += drawn * bytes_sent("counter", TICKET.nbytes, world_size)
        levels.append(Level(s.averager.comm.size, period, sent, took))
    epoch = worker.sampler.steps_per_epoch
    sent = per_step * epoch + sum(epoch / level.period * level.bytes for level in levels)
    round_seconds = sum(epoch / level.period * level.seconds for level in levels)
    batch = config.data.batch_size
    limits = [f"{worker.total_steps:,} steps"] if worker.total_steps else []
    limits += [f"{config.budget.seconds:g} s"] if config.budget.seconds else []
    # The steps that this comes to at the speed just measured.
    per_step_seconds = seconds + round_seconds / epoch
    steps = min(worker.total_steps or math.inf, (config.budget.seconds or math.inf) / per_step_seconds)
    parameters = worker.vector.data.numel() * worker.vector.data.element_size()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = [
        f"method            {config.method}",
        f"effective batch   {batch} per rank x {world_size} ranks = {batch * world_size}",
        f"learning rate     {_rates(config, worker, max(1, round(steps)), per_step_seconds)}",
        f"budget            {' or '.join(limits)}; {epoch:,} steps per epoch",
        f"rounds            {_rounds(levels, epoch)}",
        f"sent per rank     {_sent(levels)}{human_bytes(per_step)} per step, {human_bytes(sent)} per epoch",
        f"memory per rank   {human_bytes(memory)} at its peak here; parameters {human_bytes(parameters)}",
        f"time per epoch    {seconds * epoch:.3g} s of local steps ({1000 * seconds:.3g} ms each, timed over {STEPS}) "
        f"+ {round_seconds:.2g} s of rounds, without the network",
    ]
    if comm.hosts_matter:
        hosts = math.ceil(world_size / ranks_per_host)
        lines.insert(4, f"hosts             {hosts} of {ranks_per_host} ranks (--ranks_per_host)")
    return "\n".join(lines)


def _rounds(levels: Sequence[Level], epoch: int) -> str:
    """How many there are, and how often; of several levels each with its ranks."""
    if not levels:
        return "none"
    return "; ".join(
        f"{epoch / level.period:.4g} per epoch{_among(level, levels)}, every {level.period:g} local steps"
        for level in levels
    )


def _sent(levels: Sequence[Level]) -> str:
    return "".join(f"{human_bytes(level.bytes)} per round{_among(level, levels)}, " for level in levels)


def _among(level: Level, levels: Sequence[Level]) -> str:
    return f" among {level.ranks} ranks" if len(levels) > 1 else ""


def _round_bytes(comm: Communicator) -> float:
    return comm.meter.bytes_sent["center"] + comm.meter.bytes_sent["control"]


def _rates(config: Config, worker: Worker, steps: int, seconds: float) -> str:
    """The learning rate at the first of so many steps of so many seconds, at quarters, and at the last."""
    shown = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        step = math.floor(share * (steps - 1))
        facts = replace(worker.facts, step=step, seconds=step * seconds, progress=step / steps)
        shown.append(f"{config.optimizer.lr * config.schedule(facts):.3g} at {share:.0%}")
    return ", ".join(shown)
