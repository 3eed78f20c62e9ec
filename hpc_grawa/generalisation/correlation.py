"""How well a measure foretells the gap between training and test: Jiang et al., ICLR 2020, section 2."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

#: Of each run the value of each axis; None where it has none.
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
    products = [x * y for _, _, x, y in _pairs(measure, gap)]
    value = sum(products) / len(products) if products else math.nan
    return Tau(value, len(products), products.count(0))


def granulated(
    measure: Sequence[float], gap: Sequence[float], axes: Axes, others: Axes | None = None
) -> dict[str, float]:
    """τ along each axis: the mean over the cells in which all else is fixed; NaN for an axis without pairs.

    Pairs of runs that do not differ in the axis (of two seeds, say) do not count. The mean of all is Ψ.

    Args:
        measure: of each run.
        gap: likewise.
        axes: along which to compare.
        others: that are fixed too, in pairs of runs that both have them (not None): a method's period say, where only
            some of the methods have one.

    Source: Jiang et al., equation 5 and 6.

    Example:
        >>> axes = {"lr": [1, 2, 1, 2], "depth": [1, 1, 2, 2]}
        >>> granulated([1, 2, 3, 4], [1, 2, 4, 3], axes)
        {'lr': 0.0, 'depth': 1.0}
    """
    found = {}
    for axis in axes:
        beside = [*(values for other, values in axes.items() if other != axis), *(others or {}).values()]
        fixed, partial = ([v for v in beside if (None in v) == some] for some in (False, True))
        cells: dict[tuple[object, ...], list[int]] = {}
        for run in range(len(measure)):
            cells.setdefault(tuple(values[run] for values in fixed), []).append(run)
        taus = []
        for runs in cells.values():
            pairs = _pairs([measure[r] for r in runs], [gap[r] for r in runs])
            along = [
                x * y
                for a, b, x, y in pairs
                if axes[axis][runs[a]] != axes[axis][runs[b]] and _agree(partial, runs[a], runs[b])
            ]
            if along:
                taus.append(sum(along) / len(along))
        found[axis] = sum(taus) / len(taus) if taus else math.nan
    return found


def _agree(partial: Sequence[Sequence[object]], a: int, b: int) -> bool:
    """Whether two runs have the same of all that both have."""
    return all(values[a] is None or values[b] is None or values[a] == values[b] for values in partial)


def psi(along: Mapping[str, float]) -> float:
    """Ψ: the mean of what ``granulated`` gives, over the axes that have a value."""
    known = [value for value in along.values() if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def conditional_information(measure: Sequence[float], gap: Sequence[float], axes: Axes, most: int = 2) -> float:
    """The least over sets S of at most ``most`` axes of I(V_μ; V_gap | U_S) / H(V_gap | U_S).

    V are the signs of the differences in pairs of runs that differ in some axis and agree in the axes S, U_S their
    values there. Pairs with one gap are dropped, each pair counts in both orders, and entropies are those of the
    frequencies: where the measure ties it says nothing. NaN without a pair.

    Source: Jiang et al., section 2.2.3. (The competition of the same authors on predicting generalisation scores
    otherwise: it keeps pairs that differ in S.)

    Example:
        >>> axes = {"lr": [1, 2, 1, 2], "depth": [1, 1, 2, 2]}
        >>> conditional_information([1, 2, 3, 4], [10, 20, 30, 40], axes)
        1.0
    """
    places = list(zip(*axes.values(), strict=True)) or [()] * len(measure)
    signs = [(a, b, x * y) for a, b, x, y in _pairs(measure, gap) if y and places[a] != places[b]]
    least = math.nan
    for size in range(most + 1):
        for chosen in combinations(range(len(axes)), size):
            counts: dict[tuple[object, ...], Counter[int]] = {}
            for a, b, product in signs:
                values = tuple(places[a][axis] for axis in chosen)
                if values == tuple(places[b][axis] for axis in chosen):
                    counts.setdefault(values, Counter())[product] += 1
            if not (total := sum(pair.total() for pair in counts.values())):
                continue
            # In both orders V_gap is 1 as often as -1, so that H(V_gap | U_S) is one bit. Of it V_μ says, where it is
            # not 0, one bit less the entropy of whether they agree.
            told = sum((pair[1] + pair[-1]) / total * (1 - _entropy((pair[1], pair[-1]))) for pair in counts.values())
            least = told if math.isnan(least) else min(told, least)
    return least


def _entropy(counts: Sequence[int]) -> float:
    """In bits."""
    shares = [count / sum(counts) for count in counts if count]
    return -sum(share * math.log2(share) for share in shares)


def _pairs(measure: Sequence[float], gap: Sequence[float]) -> Iterator[tuple[int, int, int, int]]:
    """Of each pair of runs: which, and the signs of their differences in the measure and the gap (0 for ∞ and ∞)."""

    def sign(x: float, y: float) -> int:
        return int(x > y) - int(x < y)

    for a, b in combinations(range(len(measure)), 2):
        yield a, b, sign(measure[a], measure[b]), sign(gap[a], gap[b])
