"""Horovod: messages are paired by name, negotiated and run by Horovod's own background thread."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from torch import Tensor

from .base import Communicator, Purpose, Verb, Work


class HorovodCommunicator(Communicator):
    """All ranks that Horovod was started with (``horovodrun``, ``mpirun`` or ``srun``), or a part of them."""

    backend = "horovod"

    def __init__(self, part: tuple[HorovodCommunicator, Any, str] | None = None) -> None:
        import horovod.torch as hvd

        self._hvd = hvd
        if part is not None:
            root, self._set, self._name = part
            ranks = self._set.ranks
            super().__init__(ranks.index(root.rank), len(ranks), ranks)
            self._root: HorovodCommunicator = root
            self._gpu: bool = root._gpu
            return
        hvd.init(process_sets="dynamic")
        super().__init__(hvd.rank(), hvd.size())
        self._root, self._set, self._name = self, hvd.global_process_set, "hpc_grawa"
        self._sets: dict[tuple[int, ...], Any] = {self.ranks: self._set}
        self._parts = 0
        self._gpu = torch.cuda.is_available() and (hvd.nccl_built() > 0 or hvd.cuda_built())
        self._end_together()

    def carries(self, x: Tensor, verb: Verb) -> bool:
        return not x.is_cuda or self._gpu

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        # A name fixed per (purpose, bucket) lets Horovod's response cache skip the negotiation in later rounds.
        hvd, name, among = self._hvd, f"{self._name}.{purpose}.{verb}.{bucket}", self._set
        if verb == "allreduce":
            handle = hvd.allreduce_async_(x, op=hvd.Sum, name=name, process_set=among)
        elif verb == "broadcast":
            handle = hvd.broadcast_async_(x, self.ranks[root], name=name, process_set=among)
        elif verb == "allgather":
            handle = hvd.allgather_async(x[None], name=name, process_set=among)
        else:
            handle = hvd.alltoall_async(x, name=name, process_set=among)

        def wait() -> Tensor:
            # hvd.synchronize blocks in C++; polling keeps Ctrl-C and signals alive. Its own loop sleeps as long.
            while not hvd.poll(handle):
                time.sleep(1e-4)
            result = hvd.synchronize(handle)
            received: Tensor = result[0] if isinstance(result, tuple) else result
            return received

        return Work(wait)

    def _split(self, parts: list[list[int]], own: int) -> HorovodCommunicator:
        # Every process must add every process set, in one order: they tell each other theirs.
        root = self._root
        members = tuple(self.ranks[m] for m in parts[own])
        told = {tuple(map(int, text.split())) for text in root.gather_bytes(" ".join(map(str, members)).encode())}
        for ranks in sorted(told - set(root._sets)):
            try:
                root._sets[ranks] = self._hvd.add_process_set(list(ranks))
            except ValueError as error:
                raise RuntimeError(
                    'Horovod was started without process sets: call hvd.init(process_sets="dynamic"), or leave out '
                    "hvd.init() before hpc_grawa's"
                ) from error
        root._parts += 1
        return HorovodCommunicator((root, root._sets[members], f"hpc_grawa.{root._parts}"))

    def abort(self, status: int = 1) -> None:
        # Without a shutdown handshake: the launcher sees the death of this rank and ends the others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def close(self) -> None:
        if self._hvd.is_initialized():
            self._hvd.shutdown()
