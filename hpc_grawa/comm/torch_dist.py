"""torch.distributed: Gloo for CPUs, NCCL for GPUs, whatever launcher started the ranks."""

from __future__ import annotations

import atexit
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, rendezvous  # type: ignore[attr-defined]

from ..errors import ConfigError, LostContact
from ..launch import Slot, local_device, own_slot
from ..network import first_host, first_port, interface_of, own_name_is_reachable, way_to
from ..screen import flush
from .base import DRAINS, Communicator, Work, sharing
from .meter import Purpose, Verb
from .store import StoreCounter, join, serve, shared_store

#: A message waits as long as its slowest rank computes: Gloo's waits are watched, and end with the ranks' names.
_A_DAY = timedelta(days=1)
#: Beyond the limit for messages: NCCL's, at which nobody may stand, end by themselves where the watch sees no wait.
_BEYOND = 60.0
#: What a group is made of: tensors on the CPU go by Gloo whatever those on GPUs go by.
_KINDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}


class TorchCommunicator(Communicator):
    """All ranks of the launcher on PyTorch's default process group, or a part of them.

    Under NCCL, tensors on the CPU (the control word) go through Gloo.

    Args:
        backend: ``gloo`` or ``nccl``.
        slot: of this process.
        part: a communicator and the group of some of its ranks.
        limit: seconds that a message may take.

    Raises:
        ConfigError: several ranks would share a GPU under NCCL, or have chosen different backends.
    """

    backend: Literal["gloo", "nccl"]

    def __init__(
        self,
        backend: Literal["gloo", "nccl"],
        slot: Slot | None = None,
        part: tuple[TorchCommunicator, Any, list[int]] | None = None,
        limit: float = math.inf,
    ) -> None:
        self.backend, self._closed = backend, False
        self._last: Any = None
        limited = backend == "nccl" and limit + _BEYOND < _A_DAY.total_seconds()
        self._limit = timedelta(seconds=limit + _BEYOND) if limited else _A_DAY
        if part is not None:
            root, group, ranks = part
            self._limit = root._limit
            self._group: Any = group
            super().__init__(ranks.index(root.ranks[root.rank]), len(ranks), ranks)
            return
        slot, ours = slot or own_slot(), not dist.is_initialized()
        device = None if ours else dist.group.WORLD.bound_device_id  # type: ignore[union-attr]
        if backend == "nccl" and device is None and (ours or slot.launcher is not None):
            device = local_device(slot)
        if backend == "nccl" and device is not None:
            torch.cuda.set_device(device)
        if ours:
            self._start_group(slot)
        super().__init__(dist.get_rank(), dist.get_world_size())
        # Where a program has started the default group itself, its messages and ours must not meet.
        self._group = dist.group.WORLD if ours else dist.new_group(timeout=self._limit, backend=_KINDS[backend])
        if device is not None:  # else the model's will tell
            self.check_device(device)
        self._end_together()
        atexit.register(self._drain)

    def _start_group(self, slot: Slot) -> None:
        """Start the default process group on all ranks of the launcher."""
        if slot.local_size == slot.size and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name need not resolve to an address it has
        store = find_each_other(slot)
        check_backends(slot, store, self.backend, self._limit)
        name = shared_interface(slot, store) if sys.platform == "linux" else None
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name
        kind, rank, size = _KINDS[self.backend], slot.rank, slot.size
        dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=self._limit)

    def check_device(self, device: torch.device) -> None:
        if self.backend == "nccl" and device.type == "cuda" and (pair := sharing(self.gather_gpus(device))):
            raise ConfigError(
                f"backend is nccl: ranks {pair[0]} and {pair[1]} would share a GPU, which NCCL cannot; must be gloo, "
                f"mpi or horovod, or one rank per GPU (each with its model on its own)"
            )

    def carries(self, x: Tensor, verb: Verb) -> bool:
        # Gloo copies to the host by itself, but for these two verbs only.
        return not x.is_cuda or self.backend == "nccl" or verb in ("allreduce", "broadcast")

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        # Calls are paired by their order within the group, which is the program's.
        result = x
        if verb == "allgather":
            result = x.new_empty((self.size, *x.shape))
        elif verb == "alltoall":
            result = torch.empty_like(x)
        if not result.numel():
            return Work(lambda: result)
        if self._closed:
            raise RuntimeError("this communicator was closed")  # no group is the program's own
        work: Any
        with _contact():
            if verb == "allreduce":
                work = dist.all_reduce(x, group=self._group, async_op=True)
            elif verb == "broadcast":
                work = dist.broadcast(x, self.ranks[root], group=self._group, async_op=True)
            elif verb == "allgather":
                work = dist.all_gather_into_tensor(result.view(-1), x.view(-1), group=self._group, async_op=True)
            else:
                work = dist.all_to_all_single(result, x, group=self._group, async_op=True)
        self._last = work

        def wait() -> Tensor:
            # Gloo's wait blocks in C++: polling keeps Ctrl-C and signals alive. NCCL's only orders the stream.
            while not result.is_cuda and not work.is_completed():
                time.sleep(5e-5)
            try:
                work.wait()
            except RuntimeError as error:
                raise LostContact(str(error)) from error
            return result

        return Work(wait)

    def _counter(self) -> StoreCounter:
        return StoreCounter(self)

    def _split(self, parts: list[list[int]], own: int) -> TorchCommunicator:
        ranks = [self.ranks[m] for m in parts[own]]
        with self.meter.waiting("setup", self.ranks), _contact():
            group = dist.new_group(
                ranks, timeout=self._limit, backend=_KINDS[self.backend], use_local_synchronization=True
            )
        return TorchCommunicator(self.backend, part=(self, group, ranks))

    def abort(self, status: int = 1) -> None:
        # Without a word to the others: the launcher sees the death of this rank and ends them.
        flush()
        os._exit(status)

    def close(self) -> None:
        if os.getpid() == self._process and dist.is_initialized() and not self._closed:
            dist.destroy_process_group(self._group)  # of the program's own only what was made beside it
        self._closed = True

    def _drain(self) -> None:
        until = time.monotonic() + DRAINS
        while self._last is not None and not self._closed and os.getpid() == self._process and time.monotonic() < until:
            if self._last.is_completed():
                break
            time.sleep(1e-3)


@contextmanager
def _contact() -> Iterator[None]:
    """Within the block what PyTorch says of the others is that contact to one is lost."""
    try:
        yield
    except dist.DistError as error:
        raise LostContact(str(error)) from error


def find_each_other(slot: Slot) -> Store:
    """Where the ranks of a job find each other, from what their launcher says.

    torchrun serves a store itself. Else rank 0 serves one, at a port that comes from the job's name and moves on where
    it is taken; the others know it by that name. Its host is MASTER_ADDR, this host if the job has no other, or the
    first of srun's; where mpirun started several hosts, MPI tells.

    Raises:
        ConfigError: the launcher does not say where rank 0 is.
        TimeoutError: rank 0 was not found there.
    """
    if slot.launcher == "torchrun":
        # Unlike ours it is there already, at the port it says.
        store, _, _ = next(rendezvous("env://", slot.rank, slot.size))
        return store  # type: ignore[no-any-return]
    if slot.size == 1:
        return serve(0, slot.job)
    host = first_host(slot)
    if host is not None:
        port = first_port(slot)
        return serve(port, slot.job) if slot.rank == 0 else join([host], port, slot.job)
    if slot.launcher == "mpirun" and find_spec("mpi4py") is not None:
        from .mpi import MPICommunicator

        comm = MPICommunicator()
        if comm.size == slot.size:
            return shared_store(comm)
    raise ConfigError(
        f"backend is gloo or nccl under {slot.launcher}, which does not say on which host rank 0 is: set MASTER_ADDR "
        f"to that host's name"
    )


def check_backends(slot: Slot, store: Store, backend: str, limit: timedelta) -> None:
    """Raise ``ConfigError`` on all ranks, which must call it, unless all have chosen this backend."""
    number = store.add(f"backends told by {slot.rank}", 1)  # a program may connect again
    keys = [f"backend {number} of {rank}" for rank in range(slot.size)]
    store.set(keys[slot.rank], backend)
    store.wait(keys, limit)
    told = [found.decode() for found in store.multi_get(keys)]
    if differ := [rank for rank, found in enumerate(told) if found != told[0]]:
        raise ConfigError(
            f"backend is {told[differ[0]]} on rank {differ[0]} and {told[0]} on rank 0: must be one on all, which auto "
            f"takes where each rank sees a GPU, or none does"
        )


def shared_interface(slot: Slot, store: Store) -> str | None:
    """The network interface between the hosts, where none is set and Gloo would not find it; all ranks must call it.

    Gloo listens where the host's name points, which may be at the host itself. The ranks of other hosts than rank 0's
    know their way to it, and it knows its way back to them.
    """
    host = os.environ.get("MASTER_ADDR") or str(getattr(store, "host", ""))
    way = next((address for address in way_to(host) if not address.startswith(("127.", "0."))), "")
    store.set(f"way of {slot.rank}", way)
    if "GLOO_SOCKET_IFNAME" in os.environ or own_name_is_reachable():
        return None
    if not way:
        ways = store.multi_get([f"way of {rank}" for rank in range(slot.size)])
        there = next((found.decode() for found in ways if found), "")  # none where the hosts are one after all
        way = next(iter(way_to(there)), "") if there else ""
    return interface_of(way)
