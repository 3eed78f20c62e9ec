"""A world of equal ranks in one process, for dry runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from .base import Communicator, Work
from .meter import Purpose, Verb
from .single import LocalCounter
from .throttled import Network, cost


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
        ranks_per_host: consecutive ranks that share a host (the last may have fewer), unless the network says it.
        network: that is emulated, if any.
        ranks: of all in the world where this is a part of it.
    """

    backend = "none"

    def __init__(
        self, size: int, ranks_per_host: int, network: Network | None = None, ranks: Sequence[int] | None = None
    ) -> None:
        super().__init__(0, size, ranks)
        self.ranks_per_host, self._figures = (network and network.ranks_per_host) or ranks_per_host, network
        #: What messages would take over the network, each for itself, by purpose; those of parts too.
        self.link_seconds: defaultdict[str, float] = defaultdict(float)
        #: Whether a method has asked which ranks share a host.
        self.hosts_matter = False
        #: What was sent, by parts of this world too.
        self.messages: list[Message] = []

    def _launch(self, verb: Verb, x: Tensor, purpose: Purpose, bucket: int, root: int) -> Work:
        self.messages.append(Message(verb, purpose, x.nbytes, self.size))
        self.link_seconds[purpose] += self.over_network(verb, x.nbytes)
        if verb == "allreduce":
            x.mul_(self.size)
        result = x.expand(self.size, *x.shape).clone() if verb == "allgather" else x
        return Work(lambda: result)

    def over_network(self, verb: Verb | Literal["counter"], payload: int) -> float:
        """Seconds that a message would take over the network; 0 where none is emulated."""
        if self._figures is None:
            return 0.0
        hops, sent = cost(verb, payload, self.size)
        pair = self._figures.pair(crosses=len({rank // self.ranks_per_host for rank in self.ranks}) > 1)
        return hops * pair.latency + sent * pair.per_byte

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
        ranks = [self.ranks[m] for m in parts[own]]
        part = MirrorCommunicator(len(ranks), self.ranks_per_host, self._figures, ranks)
        part.messages, part.link_seconds = self.messages, self.link_seconds
        return part

    def abort(self, status: int = 1) -> None:
        raise SystemExit(status)
