"""MPI through mpi4py: blocking collectives, run in order by one communication thread.

Non-blocking MPI collectives advance only inside MPI calls, so they hardly overlap with Python; a thread that blocks in
the ordinary ones does, at the cost of a hand-over of about 0.1 ms. The main thread waits on a Python event, so signals
still reach it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import LostContact
from ..screen import flush
from .base import Communicator, Work
from .meter import Purpose, Verb
from .store import StoreCounter

#: MPI's classes of errors that are in a call, and tell nothing of other ranks.
_MISUSE = ("ARG", "BUFFER", "COMM", "COUNT", "NO_MEM", "OP", "RANK", "ROOT", "TRUNCATE", "TYPE")


class _Call:
    """One collective, handed from the main thread to the communication thread."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function = function
        self.finished = threading.Event()
        self.result: Tensor | None = None
        self.error: BaseException | None = None
        self.done_at = 0.0

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:  # handed to the rank's main thread, which raises it
            self.error = error
        self.done_at = time.perf_counter()
        self.finished.set()


class _CallWork(Work):
    def __init__(self, call: _Call) -> None:
        super().__init__(self._take)
        self._call = call

    def _take(self) -> Tensor:
        self._call.finished.wait()
        self.done_at = self._call.done_at
        if self._call.error is not None:
            raise self._call.error
        assert self._call.result is not None
        return self._call.result


class _Thread:
    """The communication thread, shared by a communicator and its parts, so that all keep the program's order."""

    def __init__(self, several: bool) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._device: torch.device | None = None
        if several:
            self._thread = threading.Thread(target=self._serve, name="hpc_grawa-mpi", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()

    def use(self, device: torch.device) -> None:
        """Be on this GPU: a thread that has never been on one has no context there, without which MPI cannot copy."""
        if device != self._device:
            torch.cuda.set_device(device)
            torch.cuda.current_stream(device).synchronize()  # some releases of torch make a context where one is used
            self._device = device

    def run(self, function: Callable[[], Tensor]) -> _CallWork:
        call = _Call(function)
        if self._thread is None:
            call.run()
        else:
            self._calls.put(call)
        return _CallWork(call)

    def close(self) -> None:
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None


class MPICommunicator(Communicator):
    """All ranks of ``MPI.COMM_WORLD``, on a duplicate of it; or a part of them."""

    backend = "mpi"

    def __init__(self, part: tuple[MPICommunicator, Any] | None = None) -> None:
        MPI = _started()
        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup() if part is None else part[1]
        ranks = None if part is None else [part[0].ranks[m] for m in self._comm.allgather(part[0].rank)]
        super().__init__(self._comm.Get_rank(), self._comm.Get_size(), ranks)
        if part is not None:
            self._thread: _Thread = part[0]._thread
            self._reads_cuda: bool = part[0]._reads_cuda
            return
        self._reads_cuda = torch.cuda.is_available() and reads_cuda()
        # All MPI calls after this line come from one thread, so SERIALIZED is enough; below it, calls run at once.
        self._thread = _Thread(MPI.Query_thread() >= MPI.THREAD_SERIALIZED)
        atexit.register(self.close)
        self._end_together()

    def carries(self, x: Tensor, verb: Verb) -> bool:
        return not x.is_cuda or self._reads_cuda

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        # Made here: memory that the caller's stream has given back may have been in use until it is synchronized.
        result = x
        if verb == "allgather":
            result = x.new_empty((self.size, *x.shape))
        elif verb == "alltoall":
            result = torch.empty_like(x)
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()  # MPI knows no streams
        # Calls are paired by their order: the thread keeps the program's, which is the same on all ranks.
        return self._thread.run(lambda: self._collective(verb, x, result, root))

    def _collective(self, verb: Verb, x: Tensor, result: Tensor, root: int) -> Tensor:
        def buffer(t: Tensor) -> Any:
            return t if t.is_cuda else t.numpy()

        if x.is_cuda:
            self._thread.use(x.device)
        with self._contact():
            if verb == "allreduce":
                self._comm.Allreduce(self._mpi.IN_PLACE, buffer(x))
            elif verb == "broadcast":
                self._comm.Bcast(buffer(x), root)
            elif verb == "allgather":
                self._comm.Allgather(buffer(x), buffer(result))
            else:
                self._comm.Alltoall(buffer(x), buffer(result))
        return result

    @contextmanager
    def _contact(self) -> Iterator[None]:
        """Within the block what MPI says of a call is that a rank is gone, unless it speaks of the call itself."""
        try:
            yield
        except self._mpi.Exception as error:
            if error.Get_error_class() in [getattr(self._mpi, f"ERR_{what}") for what in _MISUSE]:
                raise
            raise LostContact(str(error)) from error

    def _counter(self) -> StoreCounter:
        return StoreCounter(self)

    def _split(self, parts: list[list[int]], own: int) -> MPICommunicator:
        made: list[MPICommunicator] = []

        def split() -> Tensor:
            with self._contact():
                made.append(MPICommunicator((self, self._comm.Split(own, self.rank))))
            return torch.empty(0)

        self._thread.run(split).metered(self.meter, "setup", None, self.ranks).wait()
        return made[0]

    def abort(self, status: int = 1) -> None:
        flush()
        self._mpi.COMM_WORLD.Abort(status)

    def close(self) -> None:
        if os.getpid() == self._process:
            self._thread.close()


def _started() -> Any:
    """mpi4py's MPI, started.

    By ctypes, which lets other threads run meanwhile: mpi4py would hold them all up until every rank has come, and at
    the end until every rank has gone, the one that watches for ranks that never do among them.
    """
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize = False
    from mpi4py import MPI

    if not MPI.Is_initialized():
        library, process = ctypes.CDLL(MPI.__file__), os.getpid()
        library.MPI_Init_thread(None, None, int(MPI.THREAD_MULTIPLE), ctypes.byref(ctypes.c_int()))
        MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py makes exceptions of them

        def end() -> None:
            if os.getpid() == process and not MPI.Is_finalized():
                library.MPI_Finalize()

        atexit.register(end)
    return MPI


def reads_cuda() -> bool:
    """Whether the MPI library reads and writes CUDA memory: asked of the library, or said by its site's variable."""
    from mpi4py import MPI

    try:
        return bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
    except (OSError, AttributeError):  # an MPI without the question
        return any(os.environ.get(v) == "1" for v in ("MPICH_GPU_SUPPORT_ENABLED", "MV2_USE_CUDA", "I_MPI_OFFLOAD"))


def library() -> tuple[str, dict[str, bool]]:
    """The MPI library's name and release, and what it can do, without starting it."""
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize = False
    from mpi4py import MPI

    name = " ".join(MPI.Get_library_version().strip("\0").split(",")[0].split()[:4])
    return f"{name}, mpi4py {mpi4py.__version__}", {"CUDA": reads_cuda()}
