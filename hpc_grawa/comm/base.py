"""What every backend offers: sums, gathers and broadcasts of tensors, each returning a ``Work`` to wait for."""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from traceback import format_exception
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from ..errors import LostContact
from ..network import host_identity
from ..runs.heartbeat import Watch
from ..screen import say
from .meter import TRAINING_PURPOSES, Meter, Purpose, Verb, cuda_event


class Work:
    """A message under way. ``wait()`` blocks until it has arrived and returns the result, again and again.

    On CUDA the result is ready for the current stream, not yet for the host.
    """

    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self._wait = wait
        self._meter: Meter | None = None
        self._purpose = ""
        self._device: torch.device | None = None
        self._ranks: Sequence[int] = ()
        self._began = time.perf_counter()
        self._result: Tensor | None = None
        #: When the message arrived, on the clock of ``time.perf_counter``, where the backend knows it.
        self.done_at: float | None = None
        #: When the last of the ranks had sent its part, where the backend knows it.
        self.sent_at: float | None = None

    def metered(self, meter: Meter, purpose: str, device: torch.device | None, ranks: Sequence[int]) -> Work:
        """Have the time of the wait counted, that of this GPU if there is one."""
        self._meter, self._purpose, self._device, self._ranks = meter, purpose, device, ranks
        return self

    def wait(self) -> Tensor:
        if self._result is None:
            meter, start = self._meter, time.perf_counter()
            if meter is None:
                self._result = self._wait()
                return self._result
            with meter.waiting(self._purpose, self._ranks):
                if self._device is not None:
                    events, stream = (cuda_event(), cuda_event()), torch.cuda.current_stream(self._device)
                    events[0].record(stream)
                    self._result = self._wait()
                    events[1].record(stream)
                    meter.waited_on_device(self._purpose, self._began, start, events)
                else:
                    self._result = self._wait()
                    until = time.perf_counter()
                    meter.waited(self._purpose, self._began, start, until, self.done_at, self.sent_at)
        return self._result


class SharedCounter(Protocol):
    """A number that all ranks add to."""

    def add(self, amount: int) -> int:
        """Add atomically and return the sum, which no other rank gets; no other rank need call."""


def sharing(gpus: Sequence[bytes | None]) -> tuple[int, int] | None:
    """The first two ranks that have one and the same GPU, which NCCL refuses.

    Example:
        >>> sharing([b"a", b"b", None, None, b"b"])
        (1, 4)
    """
    return next(((gpus.index(gpu), rank) for rank, gpu in enumerate(gpus) if gpu and gpus.index(gpu) < rank), None)


#: Seconds for which a rank that ends waits for its last message, which nobody reads: if it left before the others have
#: sent their part, theirs would fail.
DRAINS = 10.0

#: What travels where a counter is added to.
TICKET = torch.zeros(1, dtype=torch.int64)


class MeteredCounter:
    """A counter whose messages are counted, each of them a ticket."""

    def __init__(self, counter: SharedCounter, comm: Communicator) -> None:
        self._counter, self._comm = counter, comm

    def add(self, amount: int) -> int:
        """Add and return the sum, which takes a message to the rank that keeps the counter, and its answer."""
        meter, began = self._comm.meter, time.perf_counter()
        meter.started("counter", "ticket", TICKET, self._comm.size)
        with meter.waiting("ticket", self._comm.ranks[:1]):
            total = self._counter.add(amount)
        meter.waited("ticket", began, began, time.perf_counter(), None)
        return total


class Communicator(ABC):
    """Sums, gathers and broadcasts tensors among ``size`` ranks.

    Every verb starts at once and returns a ``Work``. All ranks make the same calls in the same order; a call is
    identified by ``(purpose, bucket)``, which must not be in use by another message under way.

    Args of every verb:
        x: a contiguous tensor, of one shape and dtype on all ranks.
        purpose: what the message is for (accounting, and its name on backends that pair by name).
        bucket: tells messages of one purpose apart.
    """

    backend: str
    rank: int
    size: int
    #: What link is emulated between the ranks, if any.
    network: str | None = None
    #: Whether a thread of PyTorch's may wait for a message, as it does at the end of a backward pass on a GPU.
    waits_anywhere = True

    def __init__(self, rank: int, size: int, ranks: Sequence[int] | None = None) -> None:
        self.rank, self.size = rank, size
        #: The ranks of all in the world, which ``split`` makes parts of.
        self.ranks = tuple(range(size) if ranks is None else ranks)
        self._meter = Meter()
        self._whole: Communicator | None = None
        #: Bucket numbers given out so far, by purpose.
        self._numbers: Counter[Purpose] = Counter()
        self._node: Communicator | None = None
        self._buffers: dict[object, Tensor] = {}
        #: Ends waits without end; None where ranks cannot be lost.
        self.watch: Watch | None = None
        self._process = os.getpid()

    @property
    def meter(self) -> Meter:
        """Counts this rank's messages; that of the whole where this is a part."""
        return self._meter if self._whole is None else self._whole.meter

    @meter.setter
    def meter(self, meter: Meter) -> None:
        self._meter = meter

    def numbers(self, purpose: Purpose, count: int = 1) -> range:
        """Bucket numbers of messages that may be under way beside others of the purpose; all ranks ask in one order."""
        if self._whole is not None:
            return self._whole.numbers(purpose, count)
        self._numbers[purpose] += count
        return range(self._numbers[purpose] - count, self._numbers[purpose])

    def are_latest(self, numbers: range, purpose: Purpose) -> bool:
        """Whether nobody has asked for numbers since these were given."""
        if self._whole is not None:
            return self._whole.are_latest(numbers, purpose)
        return self._numbers[purpose] == numbers.stop

    def allreduce(self, x: Tensor, purpose: Purpose, bucket: int = 0) -> Work:
        """Sum ``x`` over all ranks, in place; not of uint8, which Horovod cannot add."""
        return self._start("allreduce", x, purpose, bucket)

    def allgather(self, x: Tensor, purpose: Purpose, bucket: int = 0) -> Work:
        """Gather every rank's ``x`` into a new tensor ``[size, *x.shape]``, in order of rank."""
        return self._start("allgather", x, purpose, bucket)

    def alltoall(self, x: Tensor, purpose: Purpose, bucket: int = 0) -> Work:
        """Send row m of ``x`` ``[size, ...]`` to rank m; row m of the new tensor came from rank m."""
        if x.dim() == 0 or x.shape[0] != self.size:
            raise ValueError(f"alltoall needs one row per rank: {self.size} rows, got shape {tuple(x.shape)}")
        return self._start("alltoall", x, purpose, bucket)

    def broadcast(self, x: Tensor, root: int, purpose: Purpose, bucket: int = 0) -> Work:
        """Overwrite ``x`` on every rank with that of rank ``root``."""
        if not 0 <= root < self.size:
            raise ValueError(f"broadcast from rank {root}: must be in 0..{self.size - 1}")
        return self._start("broadcast", x, purpose, bucket, root)

    def barrier(self) -> None:
        """Return after all ranks have called it."""
        self.allreduce(torch.zeros(1, dtype=torch.int64), "setup").wait()

    def meet(self) -> None:
        """Return after all ranks have called it; until then counts as waiting, and no message is counted."""
        began = time.perf_counter()
        self.barrier()
        self.meter.stood(time.perf_counter() - began)

    def split(self, colors: Sequence[int]) -> Communicator:
        """The communicator of the ranks of this rank's color, in order of rank; its meter is this one's.

        All ranks of the job must call it at the same time, for whichever communicators they split.

        Args:
            colors: of all ranks ``[size]``, the same on all of them, so that each rank knows every part.

        Example:
            >>> from hpc_grawa import simulate
            >>> simulate(4, lambda comm: comm.split([0, 0, 1, 1]).ranks)
            [(0, 1), (0, 1), (2, 3), (2, 3)]
        """
        self._check_process()
        if len(colors) != self.size:
            raise ValueError(f"split needs one color per rank: {self.size}, got {len(colors)}")
        parts = [[m for m in range(self.size) if colors[m] == color] for color in sorted(set(colors))]
        part = self._split(parts, next(i for i, part in enumerate(parts) if self.rank in part))
        part._whole = self
        return part

    def node(self) -> Communicator:
        """The communicator of the ranks on this host; all ranks must make the first call together."""
        if self._node is None:
            hosts = self.gather_bytes(host_identity().encode())
            self._node = self.split([hosts.index(host) for host in hosts])
        return self._node

    def gather_gpus(self, gpu: int | torch.device | None) -> list[bytes | None]:
        """Every rank's GPU, the same for the same one only; all must call it, those that have none with None."""
        told = ""
        if gpu is not None:
            uuid = getattr(torch.cuda.get_device_properties(gpu), "uuid", gpu)
            told = f"{host_identity()} {uuid}"
        return [found or None for found in self.gather_bytes(told.encode())]

    def check_device(self, device: torch.device) -> None:  # noqa: B027 - most send from any
        """Raise ``ConfigError`` on all ranks, which must call it, if tensors of these devices cannot be sent."""

    def counter(self) -> SharedCounter:
        """A new counter of all ranks, at 0; all must call it."""
        self._check_process()
        return MeteredCounter(self._counter(), self)

    @abstractmethod
    def _counter(self) -> SharedCounter: ...

    def gather_bytes(self, message: bytes, purpose: Purpose = "setup") -> list[bytes]:
        """Gather a byte string of any length from every rank."""
        lengths = self.allgather(torch.tensor([len(message)]), purpose).wait().flatten().tolist()
        padded = torch.zeros(max([1, *lengths]), dtype=torch.uint8)
        if message:
            padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        rows = self.allgather(padded, purpose).wait()
        return [row[:n].numpy().tobytes() for row, n in zip(rows, lengths, strict=True)]

    def _start(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int = 0) -> Work:
        self._check_process()
        if not x.is_contiguous():
            raise ValueError(f"{verb} needs a contiguous tensor, got strides {x.stride()} for shape {tuple(x.shape)}")
        self.meter.started(verb, purpose, x, self.size)
        launch = self._launch if self.carries(x, verb) else self._launch_staged
        device = x.device if x.is_cuda else None
        return launch(verb, x.detach(), purpose, bucket, root).metered(self.meter, purpose, device, self.ranks)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"process {os.getpid()} was forked from rank {self.rank} of {self.size} at step "
                f"{self.meter.said()['step']}, whose messages it cannot send: let only the rank itself communicate, "
                f"and start processes that do by a launcher"
            )

    def _launch_staged(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        """Send a tensor of a device that the backend cannot read by way of the host."""
        key = (verb, purpose, bucket, x.shape, x.dtype)
        host = self._buffers.get(key)
        if host is None:
            # Page-locked memory is copied twice as fast, and without the host.
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            if purpose in TRAINING_PURPOSES:
                self._buffers[key] = host
        host.copy_(x, non_blocking=True)
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()  # the backend reads it from another thread
        work = self._launch(verb, host, purpose, bucket, root)

        def wait() -> Tensor:
            # On the current stream, as the next copy into the same buffer will be: neither overtakes the other.
            result = work.wait()
            if verb in ("allreduce", "broadcast"):
                return x.copy_(result, non_blocking=True)
            return result.to(x.device)

        return Work(wait)

    def drop_buffers(self) -> None:
        """Forget the host memory that messages of a run went through; what is under way keeps its own."""
        self._buffers.clear()

    def carries(self, x: Tensor, verb: Verb) -> bool:
        """Whether the backend reads and writes ``x`` where it lies."""
        return not x.is_cuda

    @abstractmethod
    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        """Start the message on this backend."""

    @abstractmethod
    def _split(self, parts: list[list[int]], own: int) -> Communicator:
        """The communicator of ``parts[own]``; the parts (ranks of this communicator) are disjoint and in order."""

    @abstractmethod
    def abort(self, status: int = 1) -> None:
        """End the job on all ranks now; for a rank that cannot go on while others wait for it."""

    def _end_together(self) -> None:
        """From now on an exception that nobody catches ends the job on all ranks, after its traceback."""
        speak = sys.excepthook

        def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            time.sleep(min(self.rank, 2))  # where all ranks fail alike, the lowest speaks for them
            if speak is sys.__excepthook__:  # which writes in pieces: launchers put lines of their own between them
                say("".join(format_exception(kind, error, trace)).removesuffix("\n"), sys.stderr)
            else:
                speak(kind, error, trace)
            if os.getpid() != self._process:
                os._exit(1)  # of a process that was forked: the rank itself goes on
            news = ""
            if isinstance(error, LostContact) and self.watch is not None:
                time.sleep(1)  # for the last word of the one that is gone
                gone = self.watch.news()
                news = f" at step {self.meter.said()['step']}" + (f" ({gone})" if gone else "")
            say(f"rank {self.rank} of {self.size} failed{news}: ending the job on all ranks", sys.stderr)
            time.sleep(0.2)  # for the launcher to pass it on before its own words about the end
            self.abort()

        sys.excepthook = end

    def close(self) -> None:  # noqa: B027 - nothing to do is a valid way to close
        """Finish what is under way and release the backend."""
