"""What a run would be, found by making its first steps: ``hpc-grawa train --dry_run``."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import replace

from torch import Tensor

from .comm.base import Communicator, Purpose, Verb, Work
from .comm.single import LocalCounter
from .config import Config
from .log import human_bytes
from .worker import Worker

STEPS = 5


class MirrorCommunicator(Communicator):
    """A world of ``size`` ranks that all hold what this process holds: sums are multiples, gathers repeat."""

    backend = "none"

    def __init__(self, size: int) -> None:
        super().__init__(0, size)

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        if verb == "allreduce":
            x.mul_(self.size)
        result = x.expand(self.size, *x.shape).clone() if verb == "allgather" else x
        return Work(lambda: result)

    def _counter(self) -> LocalCounter:
        return LocalCounter()

    def node(self) -> MirrorCommunicator:
        return self

    def carries(self, x: Tensor, verb: Verb) -> bool:
        return True

    def _split(self, parts: list[list[int]], own: int) -> MirrorCommunicator:
        return MirrorCommunicator(len(parts[own]))

    def abort(self, status: int = 1) -> None:
        raise SystemExit(status)


def plan(config: Config, world_size: int) -> str:
    """Batch, learning rate, steps, rounds, bytes, memory and time of a run of ``world_size`` ranks, as lines of text.

    Makes a few steps and one round on this process, timed; writes nothing.
    """
    comm = MirrorCommunicator(world_size)
    worker = Worker(config, comm)
    synchronizers = worker.run.synchronizers
    periods = [s.period for s in synchronizers]
    for s in synchronizers:
        s.period, s.pool = math.inf, None  # steps and rounds are timed apart
    worker.step()
    start = time.perf_counter()
    for _ in range(STEPS):
        worker.step()
    seconds = (time.perf_counter() - start) / STEPS
    per_step = comm.meter.bytes_sent["gradient"] / (STEPS + 1)
    before, start = _round_bytes(comm), time.perf_counter()
    for s in synchronizers:
        s.round()
    round_seconds = time.perf_counter() - start
    per_round = _round_bytes(comm) - before
    epoch = worker.sampler.steps_per_epoch
    rounds = sum(epoch / period for period in periods)
    batch = config.data.batch_size
    limits = [f"{worker.total_steps:,} steps"] if worker.total_steps else []
    limits += [f"{config.budget.seconds:g} s"] if config.budget.seconds else []
    # The steps that this comes to at the speed just measured.
    per_step_seconds = seconds + rounds / epoch * round_seconds
    steps = min(worker.total_steps or math.inf, (config.budget.seconds or math.inf) / per_step_seconds)
    parameters = worker.vector.data.numel() * worker.vector.data.element_size()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = [
        f"method            {config.method}",
        f"effective batch   {batch} per rank x {world_size} ranks = {batch * world_size}",
        f"learning rate     {_rates(config, worker, max(1, round(steps)), per_step_seconds)}",
        f"budget            {' or '.join(limits)}; {epoch:,} steps per epoch",
        f"rounds            {rounds:.4g} per epoch" + (f", every {periods[0]:g} local steps" if periods else ""),
        f"sent per rank     {human_bytes(per_round)} per round, {human_bytes(per_step)} per step, "
        f"{human_bytes(per_round * rounds + per_step * epoch)} per epoch",
        f"memory per rank   {human_bytes(memory)} at its peak here; parameters {human_bytes(parameters)}",
        f"time per epoch    {seconds * epoch:.3g} s of local steps ({1000 * seconds:.3g} ms each, timed over {STEPS}) "
        f"+ {round_seconds * rounds:.2g} s of rounds, without the network",
    ]
    return "\n".join(lines)


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
