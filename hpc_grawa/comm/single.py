"""One process, no launcher: every message arrives at once."""

from __future__ import annotations

import os

from torch import Tensor

from .base import Communicator, Work
from .meter import Purpose, Verb


class LocalCounter:
    """A counter of one rank."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, amount: int) -> int:
        self._sum += amount
        return self._sum


class SingleCommunicator(Communicator):
    """A world of one rank."""

    backend = "single"

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _counter(self) -> LocalCounter:
        return LocalCounter()

    def carries(self, x: Tensor, verb: Verb) -> bool:
        return True

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        result = {"allgather": lambda: x[None].clone(), "alltoall": x.clone}.get(verb, lambda: x)()
        return Work(lambda: result)

    def _split(self, parts: list[list[int]], own: int) -> SingleCommunicator:
        return SingleCommunicator()

    def abort(self, status: int = 1) -> None:
        os._exit(status)
