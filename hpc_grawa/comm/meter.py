"""What is counted of a rank's messages: calls, bytes and seconds per purpose."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from ..runs.heartbeat import not_begun
from .trace import Kind, Trace

Verb = Literal["allreduce", "allgather", "alltoall", "broadcast"]
#: What a message is for. Only the first group is training; the others are neither timed nor counted in its bytes.
TRAINING_PURPOSES = ("control", "center", "gradient", "ticket")
Purpose = Literal["control", "center", "gradient", "ticket", "setup", "evaluate"]


def bytes_sent(verb: Verb | Literal["counter"], payload: int, world_size: int) -> float:
    """Bytes one rank sends for a message of ``payload`` bytes with bandwidth-optimal algorithms.

    allreduce 2n(W-1)/W, allgather n(W-1) (n the own part), alltoall and broadcast n(W-1)/W. A number drawn from a
    counter goes to the rank that keeps it and comes back: 2n(W-1)/W, as one rank sends the answers of all.
    """
    others = world_size - 1
    return {
        "allreduce": 2 * payload * others / world_size,
        "allgather": payload * others,
        "alltoall": payload * others / world_size,
        "broadcast": payload * others / world_size,
        "counter": 2 * payload * others / world_size,
    }[verb]


class Meter:
    """Counts a rank's messages: calls and bytes per purpose, seconds inside ``Work.wait`` and hidden before it.

    Seconds in a ``control`` gather are *waiting*: the message is a few hundred bytes, so what it takes is the time
    until the last rank arrives; over an emulated link what it takes from then on is communication. Seconds in every
    other wait, for tickets of pooled rounds too, are *communication*.
    *Hidden* seconds are those in which a message was under way while this rank went on computing. *Loading* is the time
    until the next batch is there.

    On CUDA a wait returns before the message has arrived, and the device may still be at work on the last batch while
    the host waits for the next: seconds are then those between two events of the stream, read where they are asked for.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes_sent: defaultdict[str, float] = defaultdict(float)
        self.payload_bytes: Counter[str] = Counter()
        self.hidden_seconds = 0.0
        #: What this rank stands still for, since when on the clock of ``time.perf_counter``, and for which ranks.
        self.waits_for: tuple[str, float, Sequence[int]] | None = None
        #: How far it has come, for its heartbeats; asked for by another thread.
        self.said: Callable[[], dict[str, Any]] = not_begun
        #: What it does else.
        self.activity = "computes"
        #: Where spans of time are kept, if any.
        self.trace: Trace | None = None
        self._hidden_until = 0.0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def started(self, verb: Verb | Literal["counter"], purpose: str, x: Tensor, world_size: int) -> None:
        payload = x.numel() * x.element_size()
        self.calls[purpose] += 1
        self.payload_bytes[purpose] += payload
        self.bytes_sent[purpose] += bytes_sent(verb, payload, world_size)

    def waited(
        self,
        purpose: str,
        began: float,
        waited_from: float,
        waited_until: float,
        done: float | None,
        sent: float | None = None,
    ) -> None:
        link = 0.0
        if purpose == "control" and sent is not None:
            link = waited_until - min(max(waited_from, sent), waited_until)
            self._seconds["link"] += link
        self._seconds[purpose] += waited_until - waited_from - link
        self._note(purpose, began, waited_from, waited_until, done)

    def waited_on_device(
        self, purpose: str, began: float, waited_from: float, events: tuple[torch.cuda.Event, torch.cuda.Event]
    ) -> None:
        self._events.append((purpose, *events))
        self._note(purpose, began, waited_from, time.perf_counter(), None)
        self._read_events(wait=False)  # nobody may ever ask for the seconds

    def state_dict(self) -> dict[str, Any]:
        """All counts so far."""
        return {
            "calls": dict(self.calls),
            "bytes_sent": dict(self.bytes_sent),
            "payload_bytes": dict(self.payload_bytes),
            "seconds": dict(self.seconds),
            "hidden_seconds": self.hidden_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.calls, self.payload_bytes = Counter(state["calls"]), Counter(state["payload_bytes"])
        self.bytes_sent, self._seconds = defaultdict(float, state["bytes_sent"]), defaultdict(float, state["seconds"])
        self.hidden_seconds = state["hidden_seconds"]

    @contextmanager
    def busy(self, activity: str) -> Iterator[None]:
        """Within the block this rank does something else than to compute local steps."""
        self.activity = activity
        try:
            yield
        finally:
            self.activity = "computes"

    @contextmanager
    def waiting(self, purpose: str, ranks: Sequence[int]) -> Iterator[None]:
        """Within the block this rank stands still for others."""
        self.waits_for = purpose, time.perf_counter(), ranks
        try:
            yield
        finally:
            self.waits_for = None

    def stood(self, seconds: float) -> None:
        """Count seconds until the last rank had come as waiting."""
        self._seconds["control"] += seconds

    @contextmanager
    def loading(self, device: torch.device) -> Iterator[None]:
        """Count the block, in which the model stands still for its next batch."""
        on_device = device.type == "cuda"
        if on_device:
            begins, ends = cuda_event(), cuda_event()
            stream = torch.cuda.current_stream(device)
            begins.record(stream)
        began = time.perf_counter()
        with self.busy("loads its next batch"), self.span("load", "batch"):
            yield
        if on_device:
            ends.record(stream)
            self._events.append(("load", begins, ends))
            self._read_events(wait=False)
        else:
            self._seconds["load"] += time.perf_counter() - began

    def span(self, kind: Kind, name: str) -> AbstractContextManager[None]:
        """Keep the span of the block, where spans are kept."""
        return nullcontext() if self.trace is None else self.trace.span(kind, name)

    def _note(self, purpose: str, began: float, waited_from: float, waited_until: float, done: float | None) -> None:
        if self.trace is not None:
            self.trace.add("wire", purpose, began, done or waited_until)
            self.trace.add("wait", purpose, waited_from, waited_until)
        if purpose in ("center", "gradient"):
            # Messages overlap each other: count the union of their intervals, not their sum.
            start, end = max(began, self._hidden_until), min(waited_from, done or waited_from)
            if end > start:
                self.hidden_seconds += end - start
                self._hidden_until = end

    @property
    def seconds(self) -> defaultdict[str, float]:
        """Seconds inside ``Work.wait`` by purpose; on CUDA waits for what is still under way."""
        self._read_events(wait=True)
        return self._seconds

    def _read_events(self, wait: bool) -> None:
        while self._events and (wait or self._events[0][2].query()):  # type: ignore[no-untyped-call]
            purpose, start, end = self._events.popleft()
            if wait:
                end.synchronize()
            self._seconds[purpose] += start.elapsed_time(end) / 1000

    @property
    def waiting_seconds(self) -> float:
        return self.seconds["control"]

    @property
    def loading_seconds(self) -> float:
        return self.seconds["load"]

    @property
    def communication_seconds(self) -> float:
        return sum(self.seconds[purpose] for purpose in ("center", "gradient", "ticket", "link"))

    @property
    def training_bytes_sent(self) -> int:
        return round(sum(self.bytes_sent[p] for p in TRAINING_PURPOSES))

    @property
    def training_payload_bytes(self) -> int:
        return sum(self.payload_bytes[p] for p in TRAINING_PURPOSES)


def cuda_event() -> torch.cuda.Event:
    """An event that tells the time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
