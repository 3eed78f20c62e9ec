"""Where descents end from many random starts: how flat their valleys are, and how many end at a saddle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..methods import Method
from ..report.table import aligned
from .vincent import DOMAIN, descend, valley, vincent

RANKS, DIMENSIONS = 4, 2
#: |∂f/∂x_d| below which a coordinate has come to rest.
_AT_REST = 1e-2


@dataclass(frozen=True)
class End:
    """Where the center of one descent is after the last step.

    Attributes:
        kind: a ``minimum``, in the bowl of one, where f curves up in every coordinate; a ``saddle``, at rest where f
            curves down in some coordinate; or still ``moving``.
        curvature: the largest second derivative at the minimum of its bowl; NaN beside one.
    """

    kind: Literal["minimum", "saddle", "moving"]
    curvature: float


def end_of(x: Tensor) -> End:
    """What x ``[D]`` is.

    Example:
        >>> end_of(valley(torch.tensor([1.0, 8.0]))).kind
        'minimum'
    """
    x = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(vincent(x), x, create_graph=True)
    bends = torch.stack([torch.autograd.grad(g, x, retain_graph=True)[0][d] for d, g in enumerate(slope)])
    if float(bends.min()) > 0:  # at rest or on its way: in a flat bowl that takes thousands of steps
        return End("minimum", 100 / (len(x) * float(valley(x.detach()).min()) ** 2))
    return End("saddle" if float(slope.detach().abs().max()) <= _AT_REST else "moving", float("nan"))


def ends(
    methods: Mapping[str, Method],
    starts: int,
    seed: int,
    steps: int,
    lr: float,
    watch: Callable[[int], None] = lambda done: None,
) -> dict[str, list[End]]:
    """The ends of every method from the same starts, drawn evenly from the domain, on all processors.

    Args:
        methods: by name.
        starts: sets of a start for each of four ranks.
        seed: of the draws.
        steps: of each rank.
        lr: of gradient descent.
        watch: told how many descents are done.
    """
    draw = torch.Generator().manual_seed(seed)
    low, high = DOMAIN
    drawn = torch.rand(starts, RANKS, DIMENSIONS, generator=draw, dtype=torch.float64) * (high - low) + low
    found: dict[str, list[End | None]] = {name: [None] * starts for name in methods}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        tasks = {
            pool.submit(_end, method, start.tolist(), steps, lr): (name, number)
            for name, method in methods.items()
            for number, start in enumerate(drawn)
        }
        try:
            for done, task in enumerate(as_completed(tasks), 1):
                name, number = tasks[task]
                found[name][number] = task.result()
                watch(done)
        except BaseException:  # one that left the domain, Ctrl-C: the others need not end first
            pool.shutdown(cancel_futures=True)
            raise
    return {name: [end for end in one if end is not None] for name, one in found.items()}


def _end(method: Method, start: list[list[float]], steps: int, lr: float) -> End:
    torch.set_num_threads(1)
    descent = descend(method, steps, lr, start)
    center = descent.center[-1]
    return end_of(center if bool(center.isfinite().all()) else descent.ranks[:, -1].mean(0))


def table(found: Mapping[str, list[End]]) -> str:
    """Markdown: of each method the mean curvature of the minima it ends in, and how often it ends elsewhere."""
    grid = [["method", "curvature of its minima, ± standard error", "median", "minima", "saddles", "moving"]]
    for method, one in found.items():
        curvatures = np.array([end.curvature for end in one if end.kind == "minimum"])
        kinds = [sum(end.kind == kind for end in one) / len(one) for kind in ("minimum", "saddle", "moving")]
        mean = "-"
        if len(curvatures):
            error = curvatures.std(ddof=1) / len(curvatures) ** 0.5 if len(curvatures) > 1 else float("nan")
            mean = f"{curvatures.mean():.3g} ± {error:.2g}"
        median = f"{np.median(curvatures):.3g}" if len(curvatures) else "-"
        grid.append([method, mean, median, *(f"{100 * share:.1f} %" for share in kinds)])
    return "\n".join(aligned(grid))
