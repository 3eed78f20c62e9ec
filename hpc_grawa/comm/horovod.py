"""Horovod: messages are paired by name, negotiated and run by Horovod's own background thread."""

from __future__ import annotations

import atexit
import ctypes
import os
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..errors import LostContact
from ..launch import own_slot
from ..screen import flush
from .base import DRAINS, Communicator, Work, sharing
from .meter import Purpose, Verb
from .store import StoreCounter

#: The same number in Open MPI, MPICH and what is made of them.
_MPI_THREAD_MULTIPLE = 3


class HorovodCommunicator(Communicator):
    """All ranks that Horovod was started with (``horovodrun``, ``mpirun`` or ``srun``), or a part of them.

    Args:
        part: a communicator, some of its ranks, and what their messages are named after.
        gpus: whether this rank may send from its GPU, the current device.
    """

    backend = "horovod"
    _made = 0

    def __init__(self, part: tuple[HorovodCommunicator, tuple[int, ...], str] | None = None, gpus: bool = True) -> None:
        import horovod.torch as hvd

        self._hvd = hvd
        if part is not None:
            root, ranks, self._name = part
            super().__init__(ranks.index(root.rank), len(ranks), ranks)
            self._root: HorovodCommunicator = root
            self._gpu: bool = root._gpu
            return
        #: Of the last message.
        self._handle: int | None = None
        self._ours = not hvd.is_initialized()
        if self._ours:
            # Horovod's thread asks all others every millisecond what is next, and spins in Open MPI until they answer.
            # Where threads outnumber cores it must let them compute, or they answer late.
            os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
            # Messages that happen to be there at once would be fused, and a sum's order, and so its last bits, depend
            # on what it is fused with. Buckets are large enough to go by themselves.
            os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
            if own_slot().launcher != "horovodrun --gloo":
                _start_mpi(hvd)
            hvd.init()
        # A process that is forked has none of Horovod's threads, whose end its shutdown would wait for.
        os.register_at_fork(after_in_child=lambda: atexit.unregister(hvd.mpi_ops._basics.shutdown))
        super().__init__(hvd.rank(), hvd.size())
        # Names are the process's: those of a second communicator must be others. All ranks make them in one order.
        HorovodCommunicator._made += 1
        self._root, self._name = self, f"hpc_grawa{HorovodCommunicator._made}"
        self._sets: dict[tuple[int, ...], Any] = {self.ranks: hvd.global_process_set}
        self._parts = 0
        self._gpu = False  # while ranks tell each other their GPUs
        self._gpu = self._send_from_gpus(gpus and (hvd.nccl_built() > 0 or hvd.cuda_built()))
        self._end_together()
        atexit.register(self._drain)  # after Horovod's shutdown, so before it

    def _drain(self) -> None:
        until = time.monotonic() + DRAINS
        with suppress(Exception):  # somebody has read it, or Horovod was shut down
            while self._handle is not None and os.getpid() == self._process and time.monotonic() < until:
                if self._hvd.poll(self._handle):
                    break
                time.sleep(1e-3)

    def _send_from_gpus(self, able: bool) -> bool:
        """Whether all ranks can: each has a GPU, NCCL wants one for each. All ranks must call it, able or not."""
        gpus = self.gather_gpus(torch.cuda.current_device() if able and torch.cuda.is_available() else None)
        return None not in gpus and (not self._hvd.nccl_built() or sharing(gpus) is None)

    def carries(self, x: Tensor, verb: Verb) -> bool:
        return not x.is_cuda or self._gpu

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        # A name fixed per (purpose, bucket) lets Horovod's response cache skip the negotiation in later rounds.
        hvd, name, among = self._hvd, f"{self._name}.{purpose}.{verb}.{bucket}", self._root._sets[self.ranks]
        try:
            if verb == "allreduce":
                handle = hvd.allreduce_async_(x, op=hvd.Sum, name=name, process_set=among)
            elif verb == "broadcast":
                handle = hvd.broadcast_async_(x, self.ranks[root], name=name, process_set=among)
            elif verb == "allgather":
                handle = hvd.allgather_async(x[None], name=name, process_set=among)
            else:
                handle = hvd.alltoall_async(x, name=name, process_set=among)
        except hvd.mpi_ops.HorovodInternalError as error:
            if not hvd.is_initialized():  # the program has shut it down itself
                raise
            raise LostContact(str(error)) from error  # a rank was lost while this one computed

        self._root._handle = handle

        def wait() -> Tensor:
            # hvd.synchronize blocks in C++; polling keeps Ctrl-C and signals alive. Its own loop sleeps as long.
            while not hvd.poll(handle):
                time.sleep(1e-4)
            try:
                result = hvd.synchronize(handle)
            except RuntimeError as error:
                raise LostContact(str(error)) from error
            received: Tensor = result[0] if isinstance(result, tuple) else result
            return received

        return Work(wait)

    def _counter(self) -> StoreCounter:
        return StoreCounter(self)

    def _split(self, parts: list[list[int]], own: int) -> HorovodCommunicator:
        # Every process must know every process set, in one order: they tell each other theirs.
        root = self._root
        members = tuple(self.ranks[m] for m in parts[own])
        told = {tuple(map(int, text.split())) for text in root.gather_bytes(" ".join(map(str, members)).encode())}
        new = sorted(told - set(root._sets))
        if new:
            root._add_sets(new)
        root._parts += 1
        return HorovodCommunicator((root, members, f"{root._name}.{root._parts}"))

    def _add_sets(self, new: list[tuple[int, ...]]) -> None:
        hvd = self._hvd
        if not self._ours:
            try:
                self._sets |= {ranks: hvd.add_process_set(list(ranks)) for ranks in new}
            except ValueError as error:
                raise RuntimeError(
                    "Horovod was started without process sets, which this method or data.stage needs: leave out "
                    'hvd.init() before hpc_grawa\'s, or call hvd.init(process_sets="dynamic"), which slows messages'
                ) from error
            return
        # Horovod starts again with all sets: one that may be given more at any time ("dynamic") lets messages stand
        # for up to seconds. No message of another rank is under way: all have just answered the last one.
        self._sets |= {ranks: hvd.ProcessSet(list(ranks)) for ranks in new}
        with self.meter.waiting("setup", self.ranks):
            hvd.shutdown()
            hvd.init(process_sets=[known for known in self._sets.values() if known is not hvd.global_process_set])

    def abort(self, status: int = 1) -> None:
        # Without a shutdown handshake: the launcher sees the death of this rank and ends the others.
        flush()
        os._exit(status)

    def close(self) -> None:
        if os.getpid() == self._process and self._hvd.is_initialized():
            self._hvd.shutdown()


def _start_mpi(hvd: Any) -> None:
    """Start MPI before Horovod does, which would end it with itself; MPI cannot be started twice.

    By the library that Horovod was built on, which need not be that of mpi4py.
    """
    if not hvd.mpi_built():
        return
    mpi = hvd.mpi_ops._basics.MPI_LIB_CTYPES
    started = ctypes.c_int()
    mpi.MPI_Initialized(ctypes.byref(started))
    if not started.value:
        mpi.MPI_Init_thread(None, None, _MPI_THREAD_MULTIPLE, ctypes.byref(ctypes.c_int()))
        process = os.getpid()
        # After Horovod's shutdown, which is registered later.
        atexit.register(lambda: mpi.MPI_Finalize() if os.getpid() == process else None)


def library() -> tuple[str, dict[str, bool]]:
    """Horovod's release, and what it was built with, without starting it."""
    import horovod
    import horovod.torch as hvd

    built = {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "NCCL": hvd.nccl_built() > 0, "CUDA": hvd.cuda_built()}
    return horovod.__version__, built
