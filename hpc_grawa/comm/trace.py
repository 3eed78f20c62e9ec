"""Where a run's time went, span by span: one Chrome trace of all ranks (``hpc-grawa train --trace``)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from . import Communicator

#: What a rank does: load a batch, compute a local step or probe, fill a message, have one under way, wait for one, read
#: one.
Kind = Literal["load", "compute", "pack", "wire", "wait", "unpack"]
#: Spans kept per rank; a run of many hours has more than a viewer can show.
LIMIT = 100_000


class Trace:
    """Spans of one rank's time.

    Make it right after a barrier: ranks' clocks are aligned there, to the time a barrier takes. On CUDA spans are those
    of the host, which runs ahead of the device.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._spans: list[tuple[Kind, str, float, float]] = []
        #: Spans left out because there were too many.
        self.dropped = 0

    def add(self, kind: Kind, name: str, begin: float, end: float) -> None:
        """Keep a span, in seconds of ``time.perf_counter``."""
        if len(self._spans) < LIMIT:
            self._spans.append((kind, name, begin - self._began, end - self._began))
        else:
            self.dropped += 1

    @contextmanager
    def span(self, kind: Kind, name: str) -> Iterator[None]:
        """Keep the span of the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, name, begin, time.perf_counter())

    def seconds(self, kind: Kind) -> float:
        """Of all spans of a kind, without what they waited for messages."""
        found = [(begin, end) for one, _, begin, end in self._spans if one == kind]
        waits = [(begin, end) for one, _, begin, end in self._spans if one == "wait"] if kind != "wait" else []
        inside = sum(end - begin for begin, end in waits if any(a <= begin and end <= b for a, b in found))
        return sum(end - begin for begin, end in found) - inside

    def gather(self, comm: Communicator) -> str | None:
        """The trace of all ranks as Chrome's JSON, on rank 0; all ranks must call it.

        Each rank is a process of the viewer, with one row for what it does and one for its messages under way.
        """
        messages = comm.gather_bytes(json.dumps([self.dropped, self._spans]).encode(), "evaluate")
        if comm.rank:
            return None
        events: list[dict[str, object]] = []
        for rank, message in enumerate(messages):
            dropped, spans = json.loads(message)
            left_out = f" (the last {dropped} spans are left out)" if dropped else ""
            events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}{left_out}"}})
            free: list[float] = []  # when each row of messages is free: those under way at once have a row each
            for kind, name, begin, end in sorted(spans, key=lambda span: span[2]):
                row = 0
                if kind == "wire":
                    row = next((i for i, until in enumerate(free) if until <= begin), len(free)) + 1
                    free[row - 1 : row] = [end]
                times = {"ts": round(1e6 * begin, 1), "dur": round(1e6 * (end - begin), 1)}
                events.append({"ph": "X", "name": f"{kind} {name}", "cat": kind, "pid": rank, "tid": row, **times})
            for row in range(len(free) + 1):
                title = {"name": "messages" if row else "rank"}
                events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": title})
        return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
