"""A slow network on any machine: any communicator, its messages taking what they would over an emulated link.

A message takes hops · a + bytes · b, with the latency a and the seconds per byte b of the link, and hops and bytes as
``cost`` says: a ring for allreduce, a tree for broadcast. It begins when the last of its ranks has sent its part, which
a sum of one number tells all ranks at once: no clock of one is compared with that of another. Every rank has a line of
its own, whose bandwidth messages under way at the same time share evenly. The message itself goes its real way
meanwhile, and ``wait`` sleeps for what is left: nothing where the rank has computed for long enough. The link is never
faster than the real one.

Ranks that share a host may have a faster pair: it holds for communicators whose ranks are all on one host. Parts of one
split that cross hosts are taken to send at the same time, so those that leave one host share its line.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..errors import wrong
from ..network import host_identity
from .base import Communicator, SharedCounter, Work
from .meter import Meter, Purpose, Verb
from .simulated import SimulatedCommunicator

_BITS = {"bit": "1", "kbit": "1e3", "mbit": "1e6", "gbit": "1e9"}
_SECONDS = {"us": "1e-6", "ms": "1e-3", "s": "1"}
#: What is said of any other text.
MUST = (
    "must be the bandwidth and latency of a link (1gbit,100us), and perhaps those between ranks of one host, and how "
    "many share one (1gbit,100us,100gbit,1us,4); positive, in bit, kbit, mbit or gbit, and us, ms or s"
)


@dataclass(frozen=True)
class Pair:
    """What a link is.

    Attributes:
        latency: a, in seconds.
        per_byte: b, in seconds: the inverse of the bandwidth.
    """

    latency: float
    per_byte: float


@dataclass(frozen=True)
class Network:
    """An emulated network.

    Attributes:
        text: as it was given.
        between: the link between hosts; between all ranks, where ``within`` is None.
        within: the link of ranks that share a host.
        ranks_per_host: consecutive ranks that count as those of one host, to methods too; None: those that are.
    """

    text: str
    between: Pair
    within: Pair | None = None
    ranks_per_host: int | None = None

    @classmethod
    def read(cls, text: str) -> Network:
        """What ``--network`` says.

        Raises:
            ConfigError: it cannot be.

        Example:
            >>> Network.read("1gbit,100us").between
            Pair(latency=0.0001, per_byte=8e-09)
        """
        words = [word.strip().lower() for word in text.split(",")]
        pairs = [_pair(*words[i : i + 2]) for i in (0, 2) if len(words) > i + 1]
        ranks = int(words[4]) if len(words) == 5 and words[4].isdecimal() else 0
        known = [pair for pair in pairs if pair is not None]
        if len(words) not in (2, 4, 5) or len(known) < len(words) // 2 or (len(words) == 5 and not ranks):
            raise wrong("network", text, MUST)
        return cls(text, known[0], known[1] if known[1:] else None, ranks or None)

    def pair(self, crosses: bool) -> Pair:
        """What holds among ranks that cross hosts, or that are all on one."""
        return self.between if crosses or self.within is None else self.within


def _pair(bandwidth: str, latency: str) -> Pair | None:
    bits, seconds = _amount(bandwidth, _BITS), _amount(latency, _SECONDS)
    return Pair(seconds, 8 / bits) if bits and seconds else None


def _amount(text: str, units: dict[str, str]) -> float | None:
    """A positive number with its unit, or None."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]+)", text)
    try:
        return float(Fraction(found[1]) * Fraction(units.get(found[2], "0"))) or None if found else None
    except OverflowError:
        return None


def cost(verb: Verb | Literal["barrier", "counter"], payload: int, world_size: int) -> tuple[int, float]:
    """How many latencies a message takes, and how many bytes pass the link of a rank, one after the other.

    allreduce: ring, 2(W-1) and 2n(W-1)/W. broadcast: tree, ⌈log₂W⌉ and n⌈log₂W⌉. allgather, n the own part: W-1 and
    n(W-1). alltoall: W-1 and n(W-1)/W. barrier: 2⌈log₂W⌉. counter: 2, to the rank that keeps it and back.

    Example:
        >>> cost("allreduce", 1000, 4), cost("broadcast", 1000, 4)
        ((6, 1500.0), (2, 2000))
    """
    others, doublings = world_size - 1, (world_size - 1).bit_length()
    return {
        "allreduce": (2 * others, 2 * payload * others / world_size),
        "allgather": (others, payload * others),
        "alltoall": (others, payload * others / world_size),
        "broadcast": (doublings, payload * doublings),
        "barrier": (2 * doublings, 0),
        "counter": (2 if others else 0, 0),
    }[verb]


class Transfer:
    """The bytes of a message on a line.

    Args:
        seconds: that they would take alone.
    """

    def __init__(self, seconds: float) -> None:
        self.left = seconds
        #: When the last of them was through, once they are.
        self.through: float | None = None


class Line:
    """What messages under way at the same time share: each of M gets 1/M of the bandwidth."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: list[Transfer] = []
        self._now = 0.0

    def send(self, seconds: float, at: float) -> Transfer:
        """Begin what would take so many seconds alone; ``at`` is not before that of the transfer before."""
        with self._lock:
            self._advance(at)
            self._under_way.append(Transfer(seconds))
            return self._under_way[-1]

    def through(self, transfer: Transfer) -> float:
        """When the last byte is through, unless other transfers begin before."""
        with self._lock:
            if transfer.through is not None:
                return transfer.through
            return self._now + sum(min(other.left, transfer.left) for other in self._under_way)

    def _advance(self, to: float) -> None:
        while self._under_way and self._now < to:
            least, count = min(transfer.left for transfer in self._under_way), len(self._under_way)
            served = min(least, (to - self._now) / count)
            self._now += served * count
            for transfer in self._under_way:
                transfer.left -= served
                if transfer.left <= 0:
                    transfer.through = self._now
            self._under_way = [transfer for transfer in self._under_way if transfer.through is None]
        self._now = max(self._now, to)


class _Message:
    """A message on the emulated link.

    Args:
        start: arrives when the last of the ranks has sent its part.
        latency: in all, in seconds.
        seconds: that its bytes take alone.
        line: that they take.
    """

    def __init__(self, start: Work, latency: float, seconds: float, line: Line) -> None:
        self._start, self._latency, self._seconds, self._line = start, latency, seconds, line
        self._begun = threading.Event()
        self._error: BaseException | None = None
        #: When the last of the ranks had sent its part, once it has.
        self.sent_at: float | None = None

    def begin(self) -> None:
        """Wait for the last of the ranks, in the thread that does."""
        try:
            self._start.wait()
            self.sent_at = self._start.done_at or time.perf_counter()
            self._transfer = self._line.send(self._seconds, self.sent_at)
        except BaseException as error:  # handed to the rank's main thread, which raises it
            self._error = error
        self._begun.set()

    def wait(self) -> float:
        """Return when it has arrived, and say when that was."""
        self._begun.wait()
        if self._error is not None:
            raise self._error
        # Another one that is sent meanwhile, from a hook in a thread of its own, makes it later.
        while time.perf_counter() < (arrival := self._line.through(self._transfer) + self._latency):
            _sleep_until(arrival)
        return arrival


def _sleep_until(then: float) -> None:
    time.sleep(max(0.0, then - time.perf_counter()))


@cache
def _starting() -> queue.SimpleQueue[_Message]:
    """Messages in the program's order. A thread hears of each when all ranks have begun it, while the rank computes."""
    messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()

    def serve() -> None:
        while True:
            messages.get().begin()

    threading.Thread(target=serve, name="hpc_grawa-link", daemon=True).start()
    return messages


class _SlowWork(Work):
    """A message that has arrived when it has both really and on the emulated link."""

    def __init__(self, work: Work, message: _Message, began: float) -> None:
        super().__init__(self._take)
        self._work, self._message = work, message
        self._began = began  # it is under way from then on, also while the real one is still being sent

    def _take(self) -> Tensor:
        result = self._work.wait()
        self.done_at = max(self._work.done_at or 0.0, self._message.wait())
        self.sent_at = self._message.sent_at
        return result


class _SlowCounter:
    def __init__(self, counter: SharedCounter, seconds: float) -> None:
        self._counter, self._seconds = counter, seconds

    def add(self, amount: int) -> int:
        began = time.perf_counter()
        total = self._counter.add(amount)
        _sleep_until(began + self._seconds)
        return total


class ThrottledCommunicator(Communicator):
    """Another communicator's ranks, as if a link of these figures were between them.

    Values are bit for bit those of the other. Tensors on GPUs go by way of the host.

    Args:
        comm: which really sends.
        network: what the link is.
        part: one of the parts that a throttled communicator is split into: that, the parts, and which is this one.

    Raises:
        ConfigError: the ranks are simulated: they run one at a time, on clocks of their own.
    """

    def __init__(
        self,
        comm: Communicator,
        network: Network,
        part: tuple[ThrottledCommunicator, list[list[int]], int] | None = None,
    ) -> None:
        if isinstance(comm, SimulatedCommunicator):
            raise wrong("network", network.text, "must be null on simulated ranks, which run one at a time")
        self._comm, self._figures = comm, network
        super().__init__(comm.rank, comm.size, comm.ranks)
        self.backend, self.network, self.watch = comm.backend, network.text, comm.watch
        self.waits_anywhere = comm.waits_anywhere
        #: Of each rank; those of others differ where all ranks count as hosts of their own.
        self._hosts: list[object]
        self._lines: tuple[Line, Line]
        streams = 1
        if part is None:
            self._lines = Line(), Line()
            self._hosts = self._find_hosts()
        else:
            whole, parts, own = part
            self._lines = whole._lines
            self._hosts = [whole._hosts[m] for m in parts[own]]
            crossing = [there for p in parts if len(there := {whole._hosts[m] for m in p}) > 1]
            streams = max(1, *(sum(host in there for there in crossing) for host in self._hosts))
        crosses = len(set(self._hosts)) > 1
        self._pair = network.pair(crosses)
        self._line = self._lines[crosses]
        self._streams = streams if crosses else 1

    def _find_hosts(self) -> list[object]:
        if self._figures.within is None:
            return [*self.ranks]
        if self._figures.ranks_per_host is not None:
            return [rank // self._figures.ranks_per_host for rank in self.ranks]
        return [*self._comm.gather_bytes(host_identity().encode())]

    @property
    def meter(self) -> Meter:
        return self._comm.meter

    @meter.setter
    def meter(self, meter: Meter) -> None:
        self._comm.meter = meter

    def numbers(self, purpose: Purpose, count: int = 1) -> range:
        return self._comm.numbers(purpose, count)

    def are_latest(self, numbers: range, purpose: Purpose) -> bool:
        return self._comm.are_latest(numbers, purpose)

    def node(self) -> Communicator:
        per_host = self._figures.ranks_per_host
        if self._node is None and per_host is not None:
            self._node = self.split([rank // per_host for rank in self.ranks])
        return super().node()

    def barrier(self) -> None:
        self._check_process()
        self.meter.started("allreduce", "setup", torch.zeros(1, dtype=torch.int64), self.size)
        if self.size > 1:
            with self.meter.waiting("setup", self.ranks):
                self._begin("barrier", 0, "setup", 0).wait()

    def meet(self) -> None:
        self._check_process()
        self._comm.meet()

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        if self.size == 1:
            return self._comm._launch(verb, x, purpose, bucket, root)
        began = time.perf_counter()
        message = self._begin(verb, x.nbytes, purpose, bucket)
        return _SlowWork(self._comm._launch(verb, x, purpose, bucket, root), message, began)

    def _begin(self, verb: Verb | Literal["barrier"], payload: int, purpose: Purpose, bucket: int) -> _Message:
        hops, size = cost(verb, payload, self.size)
        # Of a bucket that nobody else has.
        start = self._comm._launch("allreduce", torch.zeros(1, dtype=torch.int64), purpose, ~bucket, 0)
        seconds = size * self._pair.per_byte * self._streams
        message = _Message(start, hops * self._pair.latency, seconds, self._line)
        _starting().put(message)
        return message

    def _counter(self) -> SharedCounter:
        hops, _ = cost("counter", 0, self.size)
        return _SlowCounter(self._comm._counter(), hops * self._pair.latency)

    def _split(self, parts: list[list[int]], own: int) -> Communicator:
        colors = {m: color for color, part in enumerate(parts) for m in part}
        inner = self._comm.split([colors[m] for m in range(self.size)])
        return ThrottledCommunicator(inner, self._figures, (self, parts, own))

    def abort(self, status: int = 1) -> None:
        self._comm.abort(status)

    def close(self) -> None:
        self._comm.close()


def slowed(comm: Communicator, network: str | None) -> Communicator:
    """The communicator itself, or as ``network`` says over an emulated link (``1gbit,100us``); all ranks must call it.

    Raises:
        ConfigError: the network cannot be, another is emulated already, or ranks are simulated.
    """
    if network is None:
        return comm
    if comm.network is not None:
        raise wrong(
            "network", network, f"must be null where ranks are on an emulated network of {comm.network} already"
        )
    return ThrottledCommunicator(comm, Network.read(network))
