"""W ranks in one process: they run one at a time and hand over only where one waits for the others.

The global random streams (torch's, that of the GPU too, NumPy's, ``random``'s) belong to the running rank: each rank
finds them as it left them.
So a run is deterministic at any W, and calls that do not match are an error that names the ranks, never a hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import Unmatched
from ..random_streams import set_streams, streams
from .base import Communicator, Work
from .meter import Purpose, Verb
from .single import LocalCounter

T = TypeVar("T")


class _Cancelled(BaseException):
    """Raised in a rank that can never go on because another has failed."""


@dataclass
class _Collective:
    """The n-th call of every rank of a communicator: complete when all have made it."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, tuple[object, ...]] = field(default_factory=dict)
    results: list[Tensor] | None = None
    time: float = 0.0


class _Group:
    """The ranks of one communicator, and their calls."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.made = [0] * len(self.ranks)
        self.collectives: dict[int, _Collective] = {}
        self.parts: dict[object, _Group] = {}
        self.counters: dict[int, LocalCounter] = {}


def _describe(call: tuple[object, ...]) -> str:
    verb, purpose, bucket, root, shape, dtype = call
    return f"{verb} '{purpose}' bucket {bucket} root {root} of {shape} {dtype}"


class _World:
    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = 0
        self.woken = threading.Condition()
        self.streams = [streams() for _ in range(size)]
        self.clocks = [0.0] * size
        self.waits_for: dict[int, tuple[_Group, int]] = {}
        self.ended: set[int] = set()
        self.groups = [_Group(range(size))]
        self.failure: BaseException | None = None

    def post(self, group: _Group, rank: int, call: tuple[object, ...], x: Tensor) -> int:
        number, world_rank = group.made[rank], group.ranks[rank]
        group.made[rank] += 1
        collective = group.collectives.setdefault(number, _Collective())
        for other, theirs in collective.calls.items():
            if theirs != call:
                raise Unmatched(
                    f"call {number} of rank {world_rank} is {_describe(call)}, that of rank {group.ranks[other]} is "
                    f"{_describe(theirs)}"
                )
        collective.calls[rank], collective.inputs[rank] = call, x
        collective.time = max(collective.time, self.clocks[world_rank])
        if len(collective.calls) == len(group.ranks):
            collective.results = _carry_out(call, [collective.inputs[m] for m in range(len(group.ranks))])
        return number

    def take(self, group: _Group, rank: int, number: int) -> Tensor:
        collective, world_rank = group.collectives[number], group.ranks[rank]
        if collective.results is None:
            self.waits_for[world_rank] = group, number
            self.hand_over(world_rank)
            del self.waits_for[world_rank]
        assert collective.results is not None
        self.clocks[world_rank] = max(self.clocks[world_rank], collective.time)
        result = collective.results[rank]
        del collective.inputs[rank]
        if not collective.inputs:
            del group.collectives[number]
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

    def hand_over(self, rank: int) -> None:
        self._give_turn(rank)
        self._await_turn(rank)

    def _await_turn(self, rank: int) -> None:
        with self.woken:
            self.woken.wait_for(lambda: self.turn == rank or self.failure is not None)
        if self.failure is not None:
            raise _Cancelled
        set_streams(self.streams[rank])

    def _give_turn(self, rank: int) -> None:
        # After a failure all ranks run at once. Two threads that ask torch for its stream may stop each other for ever:
        # it holds a lock while it makes the tensor, which may collect garbage, which may let another thread go on.
        if self.failure is None:
            self.streams[rank] = streams()
        with self.woken:
            if self.failure is None:
                order = [(rank + k) % self.size for k in range(1, self.size + 1)]
                able = [m for m in order if m not in self.ended and self._can_go_on(m)]
                if able:
                    self.turn = min(able, key=lambda m: self.clocks[m])  # the first of equals
                elif any(c.results is None for group in self.groups for c in group.collectives.values()):
                    self.failure = Unmatched(self._standstill())
            self.woken.notify_all()

    def _can_go_on(self, rank: int) -> bool:
        group, number = self.waits_for.get(rank, (None, 0))
        return group is None or group.collectives[number].results is not None

    def _standstill(self) -> str:
        waiting = []
        for m, (group, n) in sorted(self.waits_for.items()):
            among = "" if group is self.groups[0] else f" among ranks {group.ranks}"
            call = group.collectives[n].calls[group.ranks.index(m)]
            waiting.append(f"rank {m} waits in call {n}{among}, {_describe(call)}")
        ended = [f"rank {m} has ended after {self.groups[0].made[m]} calls" for m in sorted(self.ended)]
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


class _SimulatedCounter:
    def __init__(self, world: _World, rank: int, counter: LocalCounter) -> None:
        self._world, self._rank, self._counter = world, rank, counter

    def add(self, amount: int) -> int:
        self._world.hand_over(self._rank)  # whoever comes earlier adds first
        return self._counter.add(amount)


class SimulatedCommunicator(Communicator):
    """One of the ranks of ``simulate``.

    Ranks have clocks, which stand still unless ``elapse`` moves them: a rank with an earlier one adds to counters
    first, and a message arrives when the last of its ranks has sent it.
    """

    backend = "simulated"
    #: All ranks' backward passes on a GPU have one thread: a rank that waits in it would stop those it waits for.
    waits_anywhere = False

    def __init__(self, world: _World, group: _Group, rank: int) -> None:
        super().__init__(rank, len(group.ranks), group.ranks)
        self._world, self._group = world, group
        self._splits = self._counters = 0

    @property
    def clock(self) -> float:
        """This rank's simulated seconds."""
        return self._world.clocks[self.ranks[self.rank]]

    def elapse(self, seconds: float) -> None:
        """Let this rank's clock run for so long, as a local step would."""
        self._world.clocks[self.ranks[self.rank]] += seconds

    def _counter(self) -> _SimulatedCounter:
        self._counters += 1
        counter = self._group.counters.setdefault(self._counters, LocalCounter())
        return _SimulatedCounter(self._world, self.ranks[self.rank], counter)

    def carries(self, x: Tensor, verb: Verb) -> bool:
        return True

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        world, group, rank = self._world, self._group, self.rank
        number = world.post(group, rank, (verb, purpose, bucket, root, tuple(x.shape), x.dtype), x)
        return Work(lambda: world.take(group, rank, number))

    def _split(self, parts: list[list[int]], own: int) -> SimulatedCommunicator:
        self._splits += 1
        key = self._splits, tuple(map(tuple, parts)), own
        if key not in self._group.parts:
            group = self._group.parts[key] = _Group([self.ranks[m] for m in parts[own]])
            self._world.groups.append(group)
        return SimulatedCommunicator(self._world, self._group.parts[key], parts[own].index(self.rank))

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
    world, results, before = _World(world_size), {}, streams()

    def live(rank: int) -> None:
        results[rank] = function(SimulatedCommunicator(world, world.groups[0], rank))

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
        for thread in threads:  # until its next wait a rank uses the streams
            if thread.ident is not None:
                thread.join()
    set_streams(before)
    if world.failure is not None:
        raise world.failure
    return [results[m] for m in range(world_size)]
