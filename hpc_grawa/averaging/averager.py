"""Weighted averaging of parameters: weight rules, and the averager that makes a center and pulls ranks to it."""

from __future__ import annotations

from collections.abc import Callable
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

    Zero scores share the weight equally (the limit of s → 0); a score that is not finite gets weight 0. Equal scores
    give the uniform mean. So does a column in which no rank has anything to say: all scores are +∞ (no gradient), or
    all finite ones are negative (round-off).

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
    zero = finite & (norms == 0)
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

    It averages whatever 1-D vector it is given. ``start`` sends, ``finish`` receives and pulls; a blocking round is
    the two in a row. Where all weight is one rank's, its vector is broadcast instead of summed.

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
        #: The center ``[P]`` of the last round; None before the first. It is overwritten by the next ``start``.
        self.center: Tensor | None = None
        self._number = comm.numbers("center").start
        self._message: Tensor | None = None
        self._work: Work | None = None

    def agree(self, number: int) -> None:
        """Decide before round ``number``, counted from 1, what rides in its message; all ranks must.

        They look at rounds 1, 2, 4, 8, ..., which in the long run costs nothing. (Deadlock argument: number and names
        of candidates are the same on all ranks, and so are the gathered checksums that they decide by.)
        """
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
            self._work = self.comm.allreduce(message, "center", self._number)
        else:
            self._work = self.comm.broadcast(message, leader, "center", self._number)

    def _pack(self, x: Tensor, weights: Tensor, alive: Tensor) -> tuple[Tensor, int | None]:
        """This rank's message, and the rank whose message the sum is, if it is one rank's alone."""
        rank, size = self.comm.rank, len(self.vector)
        own = weights[rank].tolist()
        packed = [[t.detach() for t in rider.pack()] for rider in self.riders]
        lengths = [t.numel() for tensors in packed for t in tensors]
        if self._message is None or len(self._message) != size + sum(lengths):
            self._message = torch.empty(size + sum(lengths), dtype=self.vector.exact_dtype, device=x.device)
            parts = iter(torch.split(self._message[size:], lengths) if lengths else ())
            self._seats = [[next(parts).view(t.shape) for t in tensors] for tensors in packed]
        shares = [rider.shares(weights, alive) for rider in self.riders]
        table = torch.column_stack((weights, *shares))
        leader = ((table == 1).all(1) & (table.count_nonzero(0) == 1).all()).nonzero().flatten().tolist()
        if leader and leader[0] != rank:
            return self._message, leader[0]
        share = self._message[:size]
        if any(own):
            self.vector.scale(x, own, self.layers, out=share)
        else:
            share.zero_()  # not 0·x: that is NaN where x is
        for tensors, seats, amount in zip(packed, self._seats, (float(s[rank]) for s in shares), strict=True):
            if not tensors:
                continue
            if amount:
                torch._foreach_copy_(seats, tensors)
                torch._foreach_mul_(seats, amount)
            else:
                torch._foreach_zero_(seats)
        return self._message, leader[0] if leader else None

    def finish(self, x: Tensor, healed: bool = False) -> None:
        """Receive the center and pull ``x`` ``[P]`` in place; a healed rank's ``x`` becomes the center."""
        assert self._work is not None, "finish() without start()"
        message = self._work.wait()
        self._work = None
        for rider, seats in zip(self.riders, self._seats, strict=True):
            rider.unpack(seats)
        self._mix(x, message[: len(self.vector)], healed)

    def state_dict(self) -> dict[str, Any]:
        """What it keeps between rounds."""
        return {"center": self.center, "riding": [name for rider in self.riders for name in rider.riding]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, from whatever device."""
        center = state["center"]
        self.center = None if center is None else center.to(self.vector.data.device, copy=True)
        for rider in self.riders:
            rider.take_on(state["riding"])

    def _mix(self, x: Tensor, average: Tensor, healed: bool) -> None:
        self.center = average
        pull(x, average, self.pull, replace=healed)


def pull(x: Tensor, target: Tensor, amount: float, replace: bool = False) -> None:
    """Move x in place: x ← x + amount · (target - x); with ``replace`` x ← target, whatever x was.

    Exact at both ends: amount 0 leaves x bit for bit, amount 1 makes it the target.
    """
    if replace or amount == 1:
        x.copy_(target)
    elif amount == 0:
        return
    elif x.dtype == target.dtype:
        x.lerp_(target, amount)
    else:
        x.copy_(torch.lerp(x.to(target.dtype), target, amount))
