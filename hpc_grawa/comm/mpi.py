"""MPI through mpi4py: blocking collectives, run in order by one communication thread.

Non-blocking MPI collectives advance only inside MPI calls, so they hardly overlap with Python; a thread that blocks in
the ordinary ones does, at the cost of a hand-over of about 0.1 ms. The main thread waits on a Python event, so signals
still reach it.
"""

from __future__ import annotations

import atexit
import queue
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .base import Communicator, Purpose, Verb, Work


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
    def __init__(self, call: _Call, *args: object) -> None:
        super().__init__(self._take, *args)  # type: ignore[arg-type]
        self._call = call

    def _take(self) -> Tensor:
        self._call.finished.wait()
        self.done_at = self._call.done_at
        if self._call.error is not None:
            raise self._call.error
        assert self._call.result is not None
        return self._call.result


class MPICommunicator(Communicator):
    """All ranks of ``MPI.COMM_WORLD``, on a duplicate of it."""

    backend = "mpi"

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        super().__init__(self._comm.Get_rank(), self._comm.Get_size())
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        # All MPI calls after this line come from one thread, so SERIALIZED is enough; below it, calls run at once.
        self._thread: threading.Thread | None = None
        if MPI.Query_thread() >= MPI.THREAD_SERIALIZED:
            self._thread = threading.Thread(target=self._serve, name="hpc_grawa-mpi", daemon=True)
            self._thread.start()
        atexit.register(self.close)
        self._end_together()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        # Calls are paired by their order: the thread keeps the program's, which is the same on all ranks.
        call = _Call(lambda: self._collective(verb, x, root))
        if self._thread is None:
            call.run()
        else:
            self._calls.put(call)
        return _CallWork(call, self.meter, purpose)

    def _collective(self, verb: Verb, x: Tensor, root: int) -> Tensor:
        buffer = x.numpy()
        if verb == "allreduce":
            self._comm.Allreduce(self._mpi.IN_PLACE, buffer)
            return x
        if verb == "broadcast":
            self._comm.Bcast(buffer, root)
            return x
        if verb == "allgather":
            result = torch.empty((self.size, *x.shape), dtype=x.dtype)
            self._comm.Allgather(buffer, result.numpy())
            return result
        result = torch.empty_like(x)
        self._comm.Alltoall(buffer, result.numpy())
        return result

    def abort(self, status: int = 1) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._mpi.COMM_WORLD.Abort(status)

    def close(self) -> None:
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None
