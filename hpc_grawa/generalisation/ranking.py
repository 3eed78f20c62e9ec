"""Measures beside each other: how well each ranks a set of runs by their gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .correlation import Axes, conditional_information, granulated, psi, tau
from .measures import NUMBERS

#: Standard deviation of the noise on the gap that the oracle sees, and of how many draws of it the mean is shown.
ORACLE_NOISE, ORACLE_DRAWS = 0.02, 10
#: τ over all and Ψ of the lecture's table.
LECTURE = {
    "vc_dimension": (-0.251, -0.154),
    "parameters": (-0.175, -0.154),
    "inverse_margin": (0.124, 0.121),
    "entropy": (0.148, 0.124),
    "cross_entropy": (0.149, 0.147),
    "frobenius_distance": (-0.263, -0.341),
    "spectral_orig": (-0.537, -0.434),
    "parameter_norm": (0.073, 0.052),
    "path_norm": (0.373, 0.311),
    "fisher_rao": (0.078, 0.154),
    "sharpness_orig": (0.400, 0.398),
    "pac_bayes_orig": (0.293, 0.360),
    "sharpness_mag_flatness": (0.484, 0.516),
    "pac_bayes_mag_flatness": (0.365, 0.315),
    "oracle": (0.714, 0.487),
}


class Ranking(NamedTuple):
    """How well a measure ranks runs by their gap.

    Attributes:
        name: of the measure.
        tau: Kendall's τ.
        pairs: of runs that have the measure.
        ties: of them those that are equal in it or in the gap.
        along: τ along each axis.
        psi: the mean of these.
        information: the conditional mutual information; NaN without a pair.
        left_out: runs without the measure.
    """

    name: str
    tau: float
    pairs: int
    ties: int
    along: dict[str, float]
    psi: float
    information: float
    left_out: int


def ranked(
    found: Sequence[Mapping[str, float]], gaps: Sequence[float], axes: Axes, others: Axes | None = None, seed: int = 0
) -> list[Ranking]:
    """How well each measure ranks the runs by their gap, and at the end an oracle that sees the gap with noise.

    Args:
        found: of each run its measures by name; one that it has not, or that is NaN, leaves it out.
        gaps: of each run.
        axes: that span the grid.
        others: settings in which runs differ beside.
        seed: of the oracle's noise.
    """
    names = [name for name in NUMBERS if any(name in one for one in found)]
    columns = {name: [one.get(name, math.nan) for one in found] for name in names}
    rankings = [_ranking(name, column, gaps, axes, others or {}) for name, column in columns.items()]
    noise = ORACLE_NOISE * np.random.default_rng(seed).normal(size=(ORACLE_DRAWS, len(gaps)))
    draws = [_ranking("oracle", (np.array(gaps) + one).tolist(), gaps, axes, others or {}) for one in noise]

    def mean(of: Callable[[Ranking], float]) -> float:
        return float(np.mean([of(one) for one in draws]))

    along = {axis: mean(lambda one, axis=axis: one.along[axis]) for axis in axes}  # type: ignore[misc]
    tau, psi, information = mean(lambda one: one.tau), mean(lambda one: one.psi), mean(lambda one: one.information)
    return [*rankings, draws[0]._replace(tau=tau, along=along, psi=psi, information=information)]


def _ranking(name: str, column: Sequence[float], gaps: Sequence[float], axes: Axes, others: Axes) -> Ranking:
    runs = [run for run, value in enumerate(column) if not math.isnan(value)]
    values, own = [column[run] for run in runs], [gaps[run] for run in runs]
    inside, beside = ({key: [places[run] for run in runs] for key, places in some.items()} for some in (axes, others))
    over_all, along = tau(values, own), granulated(values, own, inside, beside)
    information = conditional_information(values, own, inside)
    left_out = len(column) - len(runs)
    return Ranking(name, over_all.value, over_all.pairs, over_all.ties, along, psi(along), information, left_out)
