"""W ranks in one process: they run one at a time and hand over only where one waits for the others.

The global random streams (torch, NumPy, ``random``) belong to the running rank: each rank finds them as it left them.
So a run is deterministic at any W, and calls that do not match are an error that names the ranks, never a hang.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import Unmatched
from .base import Communicator, Purpose, Verb, Work

T = TypeVar("T")


class _Cancelled(BaseException):
    """Raised in a rank that can never go on because another has failed."""


@dataclass
class _Collective:
    """The n-th call of every rank: complete when all have made it."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, tuple[object, ...]] = field(default_factory=dict)
    results: list[Tensor] | None = None


def _streams() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_streams(streams: tuple[Any, ...]) -> None:
    torch.set_rng_state(streams[0])
    np.random.set_state(streams[1])
    random.setstate(streams[2])


def _describe(call: tuple[object, ...]) -> str:
    verb, purpose, bucket, root, shape, dtype = call
    return f"{verb} '{purpose}' bucket {bucket} root {root} of {shape} {dtype}"


class _World:
    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = 0
        self.woken = threading.Condition()
        self.streams = [_streams() for _ in range(size)]
        self.made = [0] * size
        self.waits_for: dict[int, int] = {}
        self.ended: set[int] = set()
        self.collectives: dict[int, _Collective] = {}
        self.failure: BaseException | None = None

    def post(self, rank: int, call: tuple[object, ...], x: Tensor) -> int:
        number = self.made[rank]
        self.made[rank] += 1
        collective = self.collectives.setdefault(number, _Collective())
        for other, theirs in collective.calls.items():
            if theirs != call:
                raise Unmatched(
                    f"call {number} of rank {rank} is {_describe(call)}, that of rank {other} is {_describe(theirs)}"
                )
        collective.calls[rank], collective.inputs[rank] = call, x
        if len(collective.calls) == self.size:
            collective.results = _carry_out(call, [collective.inputs[m] for m in range(self.size)])
        return number

    def take(self, rank: int, number: int) -> Tensor:
        collective = self.collectives[number]
        if collective.results is None:
            self.waits_for[rank] = number
            self._hand_over(rank)
            del self.waits_for[rank]
        assert collective.results is not None
        result = collective.results[rank]
        del collective.inputs[rank]
        if not collective.inputs:
            del self.collectives[number]
        return result

    def run(self, rank: int, function: Callable[[], None]) -> None:
        """The life of one rank's thread."""
        try:
            self._await_turn(rank)
            function()
        except _Cancelled:
            pass
        except BaseException as error:  # re-raised by simulate() in the caller's thread
            self.fail(error)
        finally:
            self.ended.add(rank)
            self._give_turn(rank)

    def fail(self, error: BaseException) -> None:
        """End every rank at its next wait; the first failure counts."""
        with self.woken:
            self.failure = self.failure or error
            self.woken.notify_all()

    def _hand_over(self, rank: int) -> None:
        self._give_turn(rank)
        self._await_turn(rank)

    def _await_turn(self, rank: int) -> None:
        with self.woken:
            self.woken.wait_for(lambda: self.turn == rank or self.failure is not None)
        if self.failure is not None:
            raise _Cancelled
        _set_streams(self.streams[rank])

    def _give_turn(self, rank: int) -> None:
        self.streams[rank] = _streams()
        with self.woken:
            if self.failure is None:
                order = [(rank + k) % self.size for k in range(1, self.size + 1)]
                able = [m for m in order if m not in self.ended and self._can_go_on(m)]
                if able:
                    self.turn = able[0]
                elif any(collective.results is None for collective in self.collectives.values()):
                    self.failure = Unmatched(self._standstill())
            self.woken.notify_all()

    def _can_go_on(self, rank: int) -> bool:
        return rank not in self.waits_for or self.collectives[self.waits_for[rank]].results is not None

    def _standstill(self) -> str:
        waiting = [
            f"rank {m} waits in call {n}, {_describe(self.collectives[n].calls[m])}"
            for m, n in sorted(self.waits_for.items())
        ]
        ended = [f"rank {m} has ended after {self.made[m]} calls" for m in sorted(self.ended)]
        return "; ".join(waiting + ended)


def _carry_out(call: tuple[object, ...], inputs: list[Tensor]) -> list[Tensor]:
    verb, root = call[0], call[3]
    if verb == "allgather":
        return [torch.stack(inputs) for _ in inputs]
    if verb == "alltoall":
        return [torch.stack([x[m] for x in inputs]) for m in range(len(inputs))]
    source = inputs[root if isinstance(root, int) else 0]
    if verb == "allreduce":
        for x in inputs[1:]:
            source += x
    for x in inputs:
        if x is not source:
            x.copy_(source)
    return inputs


class SimulatedCommunicator(Communicator):
    """One of the ranks of ``simulate``."""

    backend = "simulated"

    def __init__(self, rank: int, world: _World) -> None:
        super().__init__(rank, world.size)
        self._world = world

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        number = self._world.post(self.rank, (verb, purpose, bucket, root, tuple(x.shape), x.dtype), x)
        return Work(lambda: self._world.take(self.rank, number), self.meter, purpose)

    def abort(self, status: int = 1) -> None:
        raise SystemExit(status)


def simulate(world_size: int, function: Callable[[Communicator], T]) -> list[T]:
    """Call ``function(comm)`` on ``world_size`` simulated ranks and return their results in order of rank.

    Args:
        world_size: number of ranks.
        function: what each rank does; it sees its rank in ``comm.rank``.

    Raises:
        Unmatched: ranks made different calls, or one waits for ranks that have ended.
        BaseException: whatever the first failing rank raised; the others are ended.

    Example:
        >>> simulate(3, lambda comm: comm.allreduce(torch.ones(1) * comm.rank, "setup").wait().item())
        [3.0, 3.0, 3.0]
    """
    world, results, before = _World(world_size), {}, _streams()

    def live(rank: int) -> None:
        results[rank] = function(SimulatedCommunicator(rank, world))

    threads = [
        threading.Thread(target=world.run, args=(m, lambda m=m: live(m)), name=f"rank {m}", daemon=True)
        for m in range(world_size)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as interruption:  # Ctrl-C reaches this thread only
        world.fail(interruption)
    _set_streams(before)
    if world.failure is not None:
        raise world.failure
    return [results[m] for m in range(world_size)]
