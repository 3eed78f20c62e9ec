"""Horovod: messages are paired by name, negotiated and run by Horovod's own background thread."""

from __future__ import annotations

import os
import sys
import time

from torch import Tensor

from .base import Communicator, Purpose, Verb, Work


class HorovodCommunicator(Communicator):
    """All ranks that Horovod was started with (``horovodrun``, ``mpirun`` or ``srun``)."""

    backend = "horovod"

    def __init__(self) -> None:
        import horovod.torch as hvd

        hvd.init()
        self._hvd = hvd
        super().__init__(hvd.rank(), hvd.size())
        self._end_together()

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        # A name fixed per (purpose, bucket) lets Horovod's response cache skip the negotiation in later rounds.
        hvd, name = self._hvd, f"hpc_grawa.{purpose}.{verb}.{bucket}"
        if verb == "allreduce":
            handle = hvd.allreduce_async_(x, op=hvd.Sum, name=name)
        elif verb == "broadcast":
            handle = hvd.broadcast_async_(x, root, name=name)
        elif verb == "allgather":
            handle = hvd.allgather_async(x[None], name=name)
        else:
            handle = hvd.alltoall_async(x, name=name)

        def wait() -> Tensor:
            # hvd.synchronize blocks in C++; polling keeps Ctrl-C and signals alive. Its own loop sleeps as long.
            while not hvd.poll(handle):
                time.sleep(1e-4)
            result = hvd.synchronize(handle)
            received: Tensor = result[0] if isinstance(result, tuple) else result
            return received

        return Work(wait, self.meter, purpose)

    def abort(self, status: int = 1) -> None:
        # Without a shutdown handshake: the launcher sees the death of this rank and ends the others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def close(self) -> None:
        if self._hvd.is_initialized():
            self._hvd.shutdown()
