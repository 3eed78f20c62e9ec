"""How much a network's weights can be disturbed before it errs: PAC-Bayes and sharpness measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flatness.objective import Objective

#: ε of the magnitude-aware measures, and the δ that the bound of those of the box holds with.
EPSILON, DELTA = 1e-3, 0.1


class Errors(nn.Module):
    """The share of examples that are told wrongly."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) != target).to(output.dtype).mean()

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        wrong = (output.argmax(1) != target).double()
        return torch.stack((wrong.sum(), torch.tensor(float(len(wrong)), dtype=torch.float64, device=wrong.device)))


@dataclass(frozen=True)
class Largest:
    """The largest size of a disturbance at which a network still errs no more than it may.

    Attributes:
        size: σ or α; 0 where it errs more without any, infinite where it never does, NaN where that cannot be found.
        tolerance: how far the search is from its end, as a share of the size; what draws of noise add is beside it.
    """

    size: float
    tolerance: float


def largest(error: Callable[[float], float], bound: float, near: float = math.nan, tolerance: float = 0.01) -> Largest:
    """The largest size with error(size) ≤ bound, by doubling or halving and bisection.

    Args:
        error: of a size; where it is above the bound, it may be any number above it.
        bound: of the error.
        near: a size that is expected to be not far away.
        tolerance: how far from it the found one may be, as a share.

    Example:
        >>> found = largest(lambda size: size**2, bound=0.25, tolerance=1e-3)
        >>> abs(found.size - 0.5) < 1e-3
        True
    """
    if error(0.0) > bound:
        return Largest(0.0, 0.0)
    begin, factor = (near, 1.1) if 0 < near < math.inf else (0.01, 2.0)
    low = high = begin
    if error(begin) <= bound:
        while error(high := factor * low) <= bound:
            low, factor = high, min(2.0, factor**2)
            if low > 1e6:
                return Largest(math.inf, 0.0)
    else:
        while error(low := high / factor) > bound:
            high, factor = low, min(2.0, factor**2)
            if high < 1e-12:
                return Largest(0.0, 0.0)
    while high - low > tolerance * high:
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) <= bound else (low, middle)
    return Largest(low, (high - low) / high)


def gaussian(
    errors: Objective, bound: float, aware: bool, near: float = math.nan, draws: int = 10, seed: int = 0
) -> Largest:
    """σ: the largest at which the mean error under N(0, σ²I) is ``bound`` at most.

    Magnitude-aware: under N(0, σ'²w² + ε²). The same draws for every σ.

    Args:
        errors: the share of examples that are told wrongly, as a function of the weights.
        bound: of the mean error.
        aware: whether noise is in proportion to each weight.
        near: where σ is expected.
        draws: of noise.
        seed: the same on all ranks.
    """
    at = errors.vector.data.clone()

    def error(size: float) -> float:
        if not size and not aware:
            return errors.value()
        generator = torch.Generator().manual_seed(seed)
        scale = (size**2 * at.square() + EPSILON**2).sqrt() if aware else torch.full_like(at, size)
        total = 0.0
        for _ in range(draws):
            noise = torch.randn(len(at), generator=generator, dtype=torch.float64).to(at)
            total += errors.value(at + scale * noise)
            if total > draws * bound:
                break
        return total / draws

    return largest(error, bound, near)


def worst(losses: Objective, bound: float, aware: bool, near: float = math.nan, steps: int = 20) -> Largest:
    """α: the largest at which the error of the worst neighbour with |u_j| ≤ α is ``bound`` at most.

    Magnitude-aware: with |u_j| ≤ α'|w_j| + ε. The worst is looked for by ascent along the sign of the gradient.

    Args:
        losses: what is ascended.
        bound: of the share of examples that are told wrongly.
        aware: whether the box is in proportion to each weight.
        near: where α is expected.
        steps: of the ascent, each of a fifth of the box.
    """
    at = losses.vector.data.clone()
    wrong = Errors()
    before, first = losses.gradient(at, wrong)
    if not bool(first.any()):  # of so sure a network that the loss is 0 in its precision
        return Largest(math.nan, math.nan)

    def error(size: float) -> float:
        box = size * at.abs() + EPSILON if aware else torch.full_like(at, size)
        u, most, gradient = torch.zeros_like(at), before, first
        for _ in range(steps if size or aware else 0):
            u = torch.clamp(u + 0.2 * box * gradient.sign().to(u), -box, box)
            one, gradient = losses.gradient(at + u, wrong)
            most = max(most, one)
            if most > bound:
                break
        return most

    return largest(error, bound, near)


def bounds(size: float, distance: float, examples: int, scale: float) -> float:
    """‖·‖²/(scale·size²) + ln(m/size) + 10: measures 48, 49 (scale 4) and 51, 52 (4/ln 2ω) of Jiang et al."""
    if not 0 < size < math.inf:
        return _limit(size)
    return distance / (scale * size**2) + math.log(examples / size) + 10


def _limit(size: float) -> float:
    """Of a bound where the size is 0, ∞ or NaN."""
    return math.nan if math.isnan(size) else -math.inf if size else math.inf


def aware_bound(size: float, w: Tensor, start: Tensor, norm: float, examples: int, added: float) -> float:
    """Measures 56, 57 (added 1) and 59, 60 (added 4 ln(2ω/δ)) of Jiang et al.

    ¼ Σ_j ln[(ε² + (size² + added)·‖·‖²/ω) / (ε² + size²(w_j - w_j⁰)²)] + ln(m/size) + 10.

    Args:
        size: σ' or α'.
        w: all weights ``[ω]``.
        start: w⁰ ``[ω]``.
        norm: ‖w - w⁰‖², or ‖w‖² (orig).
        examples: m, of the training set.
        added: beside size².
    """
    if not 0 < size < math.inf:
        return _limit(size)
    above = EPSILON**2 + (size**2 + added) * norm / len(w)
    below = EPSILON**2 + size**2 * (w - start).double().square()
    return float(0.25 * (math.log(above) - below.log()).sum()) + math.log(examples / size) + 10
