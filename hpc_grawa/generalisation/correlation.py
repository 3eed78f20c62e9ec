"""How well a measure foretells the gap between training and test: Jiang et al., ICLR 2020, section 2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
#: Of each run the value of each axis.
Axes = Mapping[str, Sequence[object]]


@dataclass(frozen=True)
class Tau:
    """Kendall's τ over pairs of runs.

    Attributes:
        value: the mean of the products of signs; NaN without a pair.
        pairs: that there are.
        ties: of them those in which the measure or the gap is the same.
    """

    value: float
    pairs: int
    ties: int


def tau(measure: Sequence[float], gap: Sequence[float]) -> Tau:
    """τ = mean over pairs of sign(μ_a - μ_b)·sign(gap_a - gap_b); a tie counts as 0.

    Example:
        >>> tau([1, 2, 3], [1, 3, 2])
        Tau(value=0.3333333333333333, pairs=3, ties=0)
    """
    products = [product for _, _, product in _products(measure, gap)]
    value = sum(products) / len(products) if products else math.nan
    return Tau(value, len(products), products.count(0))


def granulated(measure: Sequence[float], gap: Sequence[float], axes: Axes) -> dict[str, float]:
    """τ along each axis: the mean over the cells in which all other axes are fixed; NaN for an axis without pairs.

    Pairs of runs that do not differ in the axis (of two seeds, say) do not count. The mean of all is Ψ.

    Source: Jiang et al., equation 5 and 6.

    Example:
        >>> axes = {"lr": [1, 2, 1, 2], "depth": [1, 1, 2, 2]}
        >>> granulated([1, 2, 3, 4], [1, 2, 4, 3], axes)
        {'lr': 0.0, 'depth': 1.0}
    """
    found = {}
    for axis in axes:
        cells: dict[tuple[object, ...], list[int]] = {}
        for run in range(len(measure)):
            cells.setdefault(tuple(axes[other][run] for other in axes if other != axis), []).append(run)
        taus = []
        for runs in cells.values():
            pairs = _products([measure[r] for r in runs], [gap[r] for r in runs])
            along = [product for a, b, product in pairs if axes[axis][runs[a]] != axes[axis][runs[b]]]
            if along:
                taus.append(sum(along) / len(along))
        found[axis] = sum(taus) / len(taus) if taus else math.nan
    return found


def psi(along: Mapping[str, float]) -> float:
    """Ψ: the mean of what ``granulated`` gives, over the axes that have a value."""
    known = [value for value in along.values() if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def conditional_information(measure: Sequence[float], gap: Sequence[float], axes: Axes, most: int = 2) -> float:
    """The least over sets S of at most ``most`` axes of I(V_μ; V_gap | U_S) / H(V_gap | U_S).

    V are the signs of the differences in pairs of runs that agree in the axes S, U_S their values there; ties are
    dropped, each pair counts in both orders, and entropies are those of the frequencies. 0 where nothing is known.

    Source: Jiang et al., section 2.2.3.

    Example:
        >>> axes = {"lr": [1, 2, 1, 2], "depth": [1, 1, 2, 2]}
        >>> conditional_information([1, 2, 3, 4], [10, 20, 30, 40], axes)
        1.0
    """
    signs = [(a, b, product) for a, b, product in _products(measure, gap) if product]
    least = math.inf
    for size in range(most + 1):
        for chosen in combinations(axes, size):
            counts: dict[tuple[object, ...], list[int]] = {}
            for a, b, product in signs:
                values = tuple(axes[axis][a] for axis in chosen)
                if values == tuple(axes[axis][b] for axis in chosen):
                    counts.setdefault(values, [0, 0])[int(product > 0)] += 1
            total = sum(map(sum, counts.values()))
            if not total:
                continue
            # In both orders V_gap is 1 as often as -1, so that H(V_gap | U_S) is one bit, and what V_μ says of it is
            # one bit less the entropy of whether they agree.
            told = sum(sum(pair) / total * (1 - _entropy(pair)) for pair in counts.values())
            least = min(least, told)
    return 0.0 if least == math.inf else least


def _entropy(counts: Sequence[int]) -> float:
    """In bits."""
    shares = [count / sum(counts) for count in counts if count]
    return -sum(share * math.log2(share) for share in shares)


def _products(measure: Sequence[float], gap: Sequence[float]) -> Iterator[tuple[int, int, int]]:
    """Of each pair of runs: which, and the product of the signs of their differences."""
    for a, b in combinations(range(len(measure)), 2):
        signs = np.sign(measure[a] - measure[b]), np.sign(gap[a] - gap[b])
        yield a, b, int(signs[0] * signs[1])
