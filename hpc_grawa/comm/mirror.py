"""A world of equal ranks in one process, for dry runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .base import Communicator, Work
from .meter import Purpose, Verb
from .single import LocalCounter


class Message(NamedTuple):
    """One that was sent among ``size`` ranks."""

    verb: Verb
    purpose: Purpose
    bytes: int
    size: int


class MirrorCommunicator(Communicator):
    """A world of ``size`` ranks that all hold what this process holds: sums are multiples, gathers repeat.

    Args:
        size: number of ranks.
        ranks_per_host: consecutive ranks that share a host (the last may have fewer).
        ranks: of all in the world where this is a part of it.
    """

    backend = "none"

    def __init__(self, size: int, ranks_per_host: int, ranks: Sequence[int] | None = None) -> None:
        super().__init__(0, size, ranks)
        self.ranks_per_host = ranks_per_host
        #: Whether a method has asked which ranks share a host.
        self.hosts_matter = False
        #: What was sent, by parts of this world too.
        self.messages: list[Message] = []

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        self.messages.append(Message(verb, purpose, x.nbytes, self.size))
        if verb == "allreduce":
            x.mul_(self.size)
        result = x.expand(self.size, *x.shape).clone() if verb == "allgather" else x
        return Work(lambda: result)

    def _counter(self) -> LocalCounter:
        return LocalCounter()

    def node(self) -> Communicator:
        self.hosts_matter = True
        if self._node is None:
            self._node = self.split([rank // self.ranks_per_host for rank in self.ranks])
        return self._node

    def carries(self, x: Tensor, verb: Verb) -> bool:
        return True

    def _split(self, parts: list[list[int]], own: int) -> MirrorCommunicator:
        part = MirrorCommunicator(len(parts[own]), self.ranks_per_host, [self.ranks[m] for m in parts[own]])
        part.messages = self.messages
        return part

    def abort(self, status: int = 1) -> None:
        raise SystemExit(status)
