"""Losses beside a model: sharpness of the worst and of the mean neighbour, and how wide its valley is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .estimators import Estimate
from .objective import Objective


def sam_sharpness(objective: Objective, rho: float = 0.05, adaptive: bool = False) -> float:
    """f(θ + ρ g/‖g‖) - f(θ); adaptive: f(θ + ρ T²g/‖Tg‖) - f(θ), T = |θ|. 0 where there is no gradient.

    Args:
        objective: f.
        rho: ρ.
        adaptive: whether the neighbourhood has each parameter's own scale.

    Source: Foret et al., Sharpness-Aware Minimization, ICLR 2021; Kwon et al., ASAM, ICML 2021.
    """
    value, gradient = objective.gradient()
    at = objective.vector.data.to(gradient.dtype)
    scale = at.abs() if adaptive else torch.ones_like(at)
    norm = float((scale * gradient).double().norm())
    return objective.value(at + rho / norm * scale.square() * gradient) - value if norm else 0.0


def keskar_sharpness(objective: Objective, epsilon: float = 5e-4, iterations: int = 10) -> float:
    """100·(max f(θ + δ) - f(θ)) / (1 + f(θ)), |δ_i| ≤ ε(|θ_i| + 1), by that many iterations of L-BFGS-B.

    Source: Keskar et al., On Large-Batch Training for Deep Learning, ICLR 2017, metric 2.1 with A = I.

    Args:
        objective: f.
        epsilon: ε.
        iterations: of L-BFGS-B.
    """
    value, start = objective.value(), objective.vector.data.detach().clone()
    bounds = (epsilon * (start.double().abs() + 1)).cpu().numpy()

    def search(gradient_at: Callable[[Tensor], tuple[float, Tensor]]) -> float:
        from scipy.optimize import minimize

        worst = value

        def lower(delta: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, object]:
            nonlocal worst
            found, gradient = gradient_at(start + torch.from_numpy(delta).to(start))
            worst = max(worst, found) if math.isfinite(found) else math.nan
            return -found, -gradient.double().cpu().numpy()

        box = np.stack((-bounds, bounds), 1)
        exactly = {"maxiter": iterations, "gtol": 0, "ftol": 0}  # flat models would end by its tolerances
        minimize(lower, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=box, options=exactly)
        return worst

    worst = _led(objective, search, start)
    return 100 * (worst - value) / (1 + value)


def lpf(objective: Objective, sigma: float = 5e-4, samples: int = 100, seed: int = 0) -> Estimate:
    """E f(θ + δ), δ ~ N(0, σ²I): the loss through a low-pass filter.

    Args:
        objective: f.
        sigma: σ.
        samples: M.
        seed: the same on all ranks.

    Source: Bisla, Wang and Choromanska, Low-Pass Filtering SGD for Recovering Flat Optima, AISTATS 2022.
    """
    generator, at = torch.Generator().manual_seed(seed), objective.vector.data
    values = [
        objective.value(at + sigma * torch.randn(len(at), generator=generator, dtype=torch.float64).to(at))
        for _ in range(samples)
    ]
    return Estimate.of(torch.tensor(values, dtype=torch.float64))


def valley_width(
    objective: Objective, center: Tensor, ranks: Sequence[Tensor], kappa: float = 2.0, reach: float = 1000.0
) -> list[tuple[float | None, bool]]:
    """How far from the center towards each rank the loss reaches κ·f(center), and whether the search ended before.

    Looked at are an eighth of the way to the rank, a quarter, and so on, to ``reach`` times the way, so that a barrier
    between them is found where it is as wide as that; then the place by bisection. None towards a rank that is the
    center. NaN where the rank is not finite, or f(center) is not positive and finite, so that κ·f(center) is no bound.

    Args:
        objective: f.
        center: ``[P]``.
        ranks: ``[P]`` each.
        kappa: κ.
        reach: where the search ends, in parts of the way: ranks may end close together in a wide valley.
    """
    bound = kappa * objective.value(center)
    found: list[tuple[float | None, bool]] = []
    for rank in ranks:
        distance = float((rank - center).double().norm())
        if distance == 0 or not (0 < bound < math.inf and math.isfinite(distance)):
            found.append((None if distance == 0 else math.nan, False))
            continue
        below, above = 0.0, 0.125
        while (high := objective.value(torch.lerp(center, rank, above)) < bound) and above < reach:
            below, above = above, min(reach, 2 * above)
        if high:
            found.append((reach * distance, True))
            continue
        while above - below > 1e-3 * above:
            middle = (below + above) / 2
            inside = objective.value(torch.lerp(center, rank, middle)) < bound
            below, above = (middle, above) if inside else (below, middle)
        found.append(((below + above) / 2 * distance, False))
    return found


def _led(
    objective: Objective, search: Callable[[Callable[[Tensor], tuple[float, Tensor]]], float], like: Tensor
) -> float:
    """What a search on rank 0 finds, with all ranks' gradients at the places that it asks for."""
    comm = objective.comm

    def ask(more: bool, at: Tensor) -> Tensor | None:
        word = torch.cat((at.double(), torch.tensor([float(more)], dtype=torch.float64, device=at.device)))
        told = comm.broadcast(word, 0, "evaluate").wait()
        return told[:-1].to(like) if told[-1] else None

    answer = torch.zeros(1, dtype=torch.float64)
    if comm.rank == 0:

        def gradient_at(at: Tensor) -> tuple[float, Tensor]:
            place = ask(True, at)
            assert place is not None
            return objective.gradient(place)

        answer += search(gradient_at)
        ask(False, like)
    else:
        while (place := ask(True, like)) is not None:
            objective.gradient(place)
    return float(comm.broadcast(answer, 0, "evaluate").wait())
