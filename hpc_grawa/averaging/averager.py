"""Weighted averaging of parameters: weight rules, and the averager that makes a center and pulls ranks to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..buffers import checksum
from ..comm import Communicator, Work
from ..errors import NonFinite
from ..vector import Layers, ParameterVector
from .riders import Rider

#: Scores ``[W, K]`` of the W ranks whose parameters are finite -> weights ``[W, K]``, every column of which sums to 1.
WeightRule = Callable[[Tensor], Tensor]


def inverse(scores: Tensor, power: float = 1.0) -> Tensor:
    """Weights inverse to the scores: β_m = |s_m|^{-q} / Σ_j |s_j|^{-q}, column by column.

    Zero scores share the weight equally (the limit of s → 0, if q > 0); a score that is not finite gets weight 0.
    Equal scores, and q = 0, give the uniform mean. So does a column in which no rank has anything to say: all scores
    are +∞ (no gradient), or all finite ones are negative (round-off).

    Args:
        scores: ``[W, K]``, float64; a minus sign marks a norm that is round-off.
        power: q; 1 in the experiments of the GRAWA paper, 2 in its proof for convex functions.

    Returns:
        Weights ``[W, K]``.

    Raises:
        NonFinite: a column has no finite score, and NaN among the others.

    Source: Dimlioglu and Choromanska, GRAWA (AISTATS 2024), equations 4-6.

    Example:
        >>> inverse(torch.tensor([[1.0], [3.0]])).flatten().tolist()
        [0.75, 0.25]
    """
    absent = (scores == torch.inf).all(0) & (len(scores) > 0)
    finite = _finite(torch.where(absent, 0.0, scores))
    roundoff = (scores.signbit() | ~finite).all(0)
    norms = torch.where(roundoff | absent, 0.0, scores.abs())
    zero = finite & (norms == 0) & (power > 0)
    # Dividing by the smallest norm first keeps s^-q inside the range of numbers.
    smallest = torch.where(finite, norms, torch.inf).amin(0)
    relative = torch.where(finite, norms / torch.where(smallest > 0, smallest, 1.0), torch.inf)
    raw = torch.where(zero.any(0), zero, finite * relative.pow(-power))
    return raw / raw.sum(0)


def argmin(scores: Tensor) -> Tensor:
    """All weight to the smallest finite score of each column, ties to the lowest rank.

    Args:
        scores: ``[W, K]``.

    Returns:
        One-hot weights ``[W, K]``.

    Raises:
        NonFinite: a column has no finite score.

    Source: Teng et al., Leader Stochastic Gradient Descent (NeurIPS 2019), equation 3.

    Example:
        >>> argmin(torch.tensor([[2.0], [1.0], [1.0]])).flatten().tolist()
        [0.0, 1.0, 0.0]
    """
    finite = _finite(scores)
    best = torch.where(finite, scores, torch.inf).argmin(0)
    return torch.zeros_like(scores).scatter_(0, best[None], 1.0)


def _finite(scores: Tensor) -> Tensor:
    finite = scores.isfinite()
    if not finite.any(0).all():
        column = int((~finite.any(0)).nonzero()[0])
        raise NonFinite(
            f"no rank has a finite score for layer {column} of {scores.shape[1]}: training has diverged on all ranks; "
            f"lower the learning rate or start from an earlier state"
        )
    return finite


class Averager:
    """Makes the center c = Σ_m β_m ⊙ x_m by one message and pulls every rank to it: x_m ← x_m + λ(c - x_m).

    It averages whatever 1-D vector ``source`` is. ``start`` sends, ``finish`` receives and pulls; a blocking round is
    the two in a row. Where all weight is one rank's, its vector is broadcast instead of summed. Another kind overrides
    ``_mix``; what it has besides parameters and center is ``own`` or ``kept``, and may be its ``source`` or ``local``.

    Args:
        comm: the ranks that average.
        vector: whose lengths and layers the weights refer to.
        pull: λ in [0, 1].
        layers: the L layers for weights of K = L; unused with K = 1.
    """

    def __init__(self, comm: Communicator, vector: ParameterVector, pull: float, layers: Layers | None = None) -> None:
        self.comm, self.vector, self.pull, self.layers = comm, vector, pull, layers
        #: What travels in the same message.
        self.riders: list[Rider] = []
        #: The center ``[P]`` of the last round; None before the first.
        self.center: Tensor | None = None
        #: Whether ``center`` stays what it is from ``start`` to ``finish``; takes memory for a second message, but for
        #: one that is ``kept``, which stays in any case.
        self.keeps_center = False
        #: Vectors ``[P]`` of this rank beside its parameters, by name; they begin at these, and heal with them.
        self.own: dict[str, Tensor] = {}
        #: What lasts over rounds and is the same on all ranks, by name; a rank that has NaN there is given it anew.
        self.kept: dict[str, Tensor] = {}
        self._number = comm.numbers("center").start
        #: One, or two by turns: first the one under way or landed last.
        self._messages: list[_Message] = []
        self._work: Work | None = None

    @property
    def source(self) -> Tensor:
        """This rank's vector ``[P]`` that is averaged."""
        return self.vector.data

    @property
    def local(self) -> Tensor:
        """The model ``[P]`` that this rank stands for."""
        return self.vector.data

    @property
    def finite(self) -> bool:
        """Whether this rank's vectors are."""
        return all(map(self._is_finite, (self.vector.data, *self.own.values())))

    @property
    def intact(self) -> bool:
        """Whether what is ``kept`` is finite here."""
        return all(map(self._is_finite, self.kept.values()))

    def _is_finite(self, x: Tensor) -> bool:
        # One pass, no allocation: a sum is finite only if every term is (overflow counts as diverged).
        return bool(x.sum(dtype=self.vector.exact_dtype).isfinite())

    def mend(self, root: int) -> None:
        """Give all ranks what is ``kept`` on rank ``root``; all ranks must."""
        for t in self.kept.values():
            self.comm.broadcast(t, root, "center", self._number).wait()

    def heal(self) -> None:
        """Make this rank's vectors, which were not finite, the center."""
        assert self.center is not None
        for x in (self.vector.data, *self.own.values()):
            x.copy_(self.center)

    def restart(self) -> None:
        """Begin anew where the parameters are, the same on all ranks: so are vectors and center, all else kept is 0."""
        for t in self.kept.values():
            t.zero_()
        for x in (*self.own.values(), *([] if self.center is None else [self.center])):
            x.copy_(self.vector.data)

    def after_step(self, prox: float) -> None:
        """See a local step: x ← x + prox · (center - x)."""
        if prox and self.center is not None:
            pull(self.vector.data, self.center, prox)

    def agree(self, number: int) -> None:
        """Decide before round ``number``, counted from 1, what rides in its message; all ranks must.

        They look for what differs at rounds 1, 2, 4, 8, ..., which in the long run costs nothing. (Deadlock argument:
        number and names of candidates are the same on all ranks, and so are the gathered checksums that they decide
        by, and what each rider has gathered.)

        Args:
            number: of the round.
        """
        for rider in self.riders:
            rider.agree(self.comm)
        if self.comm.size == 1 or number & (number - 1):
            return
        own = {name: checksum(t) for rider in self.riders for name, t in rider.candidates().items()}
        if own:
            rows = self.comm.allgather(torch.tensor(list(own.values())), "center", self._number).wait()
            apart = [name for name, differs in zip(own, (rows != rows[0]).any(0).tolist(), strict=True) if differs]
            for rider in self.riders:
                rider.take_on(apart)

    def start(self, x: Tensor, weights: Tensor, alive: Tensor) -> None:
        """Send this rank's share of the center.

        Args:
            x: ``[P]``, this rank's vector; may be non-finite if its weights are zero.
            weights: ``[W, K]``, the same on all ranks.
            alive: ``[W]``, the ranks whose riders count.
        """
        with self.comm.meter.span("pack", "center"):
            message, leader = self._pack(x, weights, alive)
        if leader is None:
            self._work = self.comm.allreduce(message.flat, "center", self._number)
        else:
            self._work = self.comm.broadcast(message.flat, leader, "center", self._number)

    def _pack(self, x: Tensor, weights: Tensor, alive: Tensor) -> tuple[_Message, int | None]:
        """This rank's message, and the rank whose message the sum is, if it is one rank's alone."""
        rank, size = self.comm.rank, len(self.vector)
        own = weights[rank].tolist()
        packed = [[t.detach() for t in rider.pack()] for rider in self.riders]
        message = self._free_message([[t.shape for t in tensors] for tensors in packed])
        shares = [rider.shares(weights, alive) for rider in self.riders]
        table = torch.column_stack((weights, *shares))
        leader = ((table == 1).all(1) & (table.count_nonzero(0) == 1).all()).nonzero().flatten().tolist()
        if leader and leader[0] != rank:
            return message, leader[0]
        share = message.flat[:size]
        if any(own):
            self.vector.scale(x, own, self.layers, out=share)
        else:
            share.zero_()  # not 0·x: that is NaN where x is
        for tensors, seats, amount in zip(packed, message.seats, (float(s[rank]) for s in shares), strict=True):
            if not tensors:
                continue
            if amount:
                torch._foreach_copy_(seats, tensors)
                torch._foreach_mul_(seats, amount)
            else:
                torch._foreach_zero_(seats)
        return message, leader[0] if leader else None

    def _free_message(self, riding: list[list[torch.Size]]) -> _Message:
        """Room for the next message: not where the center is, if that is kept."""
        lengths = [len(self.vector), *(shape.numel() for shapes in riding for shape in shapes)]
        if not self._messages or len(self._messages[0].flat) != sum(lengths):
            second = self.keeps_center and "center" not in self.kept
            self._messages = [self._new_message(lengths, riding) for _ in range(1 + second)]
        elif self.center is not None and self.center.data_ptr() == self._messages[0].flat.data_ptr():
            self._messages.reverse()
        return self._messages[0]

    def _new_message(self, lengths: list[int], riding: list[list[torch.Size]]) -> _Message:
        flat = torch.empty(sum(lengths), dtype=self.vector.exact_dtype, device=self.vector.data.device)
        _, *parts = torch.split(flat, lengths)
        seats = iter(parts)
        return _Message(flat, [[next(seats).view(shape) for shape in shapes] for shapes in riding])

    def finish(self, x: Tensor, healed: bool = False) -> None:
        """Receive the center and pull ``x`` ``[P]`` in place; a healed rank's vectors become the center."""
        assert self._work is not None, "finish() without start()"
        message = self._work.wait()
        self._work = None
        for rider, seats in zip(self.riders, self._messages[0].seats, strict=True):
            rider.unpack(seats)
        self._mix(x, message[: len(self.vector)])
        if healed:
            self.heal()

    def state_dict(self) -> dict[str, Any]:
        """What it keeps between rounds."""
        riding = [name for rider in self.riders for name in rider.riding]
        return {"center": self.center, "riding": riding, **self.own, **self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, from whatever device, in place: others may hold the center."""
        center = state["center"]
        if center is None or self.center is None:
            self.center = None if center is None else center.to(self.vector.data.device, copy=True)
        else:
            self.center.copy_(center)
        for name, t in {**self.own, **self.kept}.items():
            t.copy_(state[name])
        for rider in self.riders:
            rider.take_on(state["riding"])

    def _mix(self, x: Tensor, average: Tensor) -> None:
        """Move center and ``x`` ``[P]``, given the weighted average ``[P]``, which lasts until ``start``."""
        self.center = average
        pull(x, average, self.pull)


@dataclass
class _Message:
    """What travels: ``flat`` holds the share of the center, then the riders' tensors, of which ``seats`` are views."""

    flat: Tensor
    seats: list[list[Tensor]]


def pull(x: Tensor, target: Tensor, amount: float) -> None:
    """Move x in place: x ← x + amount · (target - x).

    Exact at both ends: amount 0 leaves x bit for bit, amount 1 makes it the target.
    """
    if amount == 1:
        x.copy_(target)
    elif amount == 0:
        return
    elif x.dtype == target.dtype:
        x.lerp_(target, amount)
    else:
        x.copy_(torch.lerp(x.to(target.dtype), target, amount))
