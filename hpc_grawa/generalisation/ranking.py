"""Measures beside each other: how well each ranks a set of runs by their gap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .correlation import conditional_information, granulated, psi, tau
from .measures import NUMBERS

#: Standard deviation of the noise on the gap that the oracle sees.
ORACLE_NOISE = 0.02
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
        information: the conditional mutual information.
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
    found: Sequence[Mapping[str, float]], gaps: Sequence[float], axes: Mapping[str, Sequence[str]], seed: int
) -> list[Ranking]:
    """How well each measure ranks the runs by their gap, and at the end an oracle that sees the gap with noise."""
    noisy = np.array(gaps) + ORACLE_NOISE * np.random.default_rng(seed).normal(size=len(gaps))
    names = [name for name in NUMBERS if any(name in one for one in found)]
    columns = {name: [one.get(name, math.nan) for one in found] for name in names}
    rankings = []
    for name, column in {**columns, "oracle": noisy.tolist()}.items():
        runs = [run for run, value in enumerate(column) if not math.isnan(value)]
        values, own = [column[run] for run in runs], [gaps[run] for run in runs]
        inside = {axis: [places[run] for run in runs] for axis, places in axes.items()}
        over_all, along = tau(values, own), granulated(values, own, inside)
        information = conditional_information(values, own, inside)
        left_out = len(column) - len(runs)
        rankings.append(
            Ranking(name, over_all.value, over_all.pairs, over_all.ties, along, psi(along), information, left_out)
        )
    return rankings
