"""Rates on a strongly convex problem: E‖x - x*‖² over steps, and how often the center is lower than every rank.

    python benchmarks/studies/convex.py --figure convex.png

Logistic regression on the digits with (.01/2)‖x‖², 4 simulated ranks, batches of 32 from disjoint shards, plain SGD
with η_t = 1 / (μ(t + t₀)), μ = .01, t₀ = L/μ: η_0 = 1/L. x* is Newton's, to a gradient of 1e-12. Theorem 2 of the
GRAWA paper says O(1/t). Slopes are of log E‖x - x*‖² over log t in the last decade, with the interval that holds 95 %
of those of resampled seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpc_grawa
from hpc_grawa import methods, simulate
from hpc_grawa.comm import Communicator
from hpc_grawa.data import Digits
from hpc_grawa.report.table import aligned
from hpc_grawa.schedules import RunFacts

WORLD, BATCH, DECAY = 4, 32, 0.01
PERIOD = 8
METHODS: dict[str, methods.Method] = {
    "GRAWA": methods.GRAWA(period=PERIOD, prox=0.0),
    "MGRAWA": methods.MGRAWA(period=PERIOD, prox=0.0),
    "LGRAWA": methods.LGRAWA(period=PERIOD, prox=0.0),
    "EASGD": methods.EASGD(period=PERIOD),
    "LSGD": methods.LSGD(period=PERIOD, prox=0.0),
    "LocalSGD": methods.LocalSGD(period=PERIOD),
    "DataParallel": methods.DataParallel(),
}


class Regression(nn.Module):
    """Classes of images, and the whole loss with its regularisation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        flat = torch.cat([p.flatten() for p in self.parameters()])
        return F.cross_entropy(self.linear(x), y) + DECAY / 2 * flat.square().sum()


def minimum(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """x* by Newton's method, and the largest curvature at the start, L."""

    def loss(flat: Tensor) -> Tensor:
        weight, bias = flat[:640].reshape(10, 64), flat[640:]
        return F.cross_entropy(x @ weight.T + bias, y) + DECAY / 2 * flat.square().sum()

    flat = torch.zeros(650, dtype=torch.float64)
    for _ in range(50):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        hessian = torch.autograd.functional.hessian(loss, flat)
        if float(gradient.norm()) < 1e-12:
            break
        flat = flat - torch.linalg.solve(hessian, gradient)
    else:
        raise SystemExit("Newton's method has not converged")
    return flat, float(torch.linalg.matrix_norm(torch.autograd.functional.hessian(loss, 0 * flat), 2))


def descend(
    method: methods.Method, data: tuple[Tensor, Tensor], best: Tensor, largest: float, steps: int, seed: int
) -> tuple[list[float], int, int]:
    """‖x - x*‖² of the ranks' mean at ``marks``; rounds, and how many of them had a center lower than every rank."""
    x, y = data
    shards = shards_of(len(y), seed)
    at = set(marks(steps))

    def body(comm: Communicator) -> tuple[list[float], int, int]:
        model = Regression()
        vector = hpc_grawa.ParameterVector(model)
        optimizer = torch.optim.SGD(vector.parameters, 1.0)
        draw, shard = torch.Generator().manual_seed(1000 * seed + comm.rank), shards[comm.rank]
        facts = RunFacts(total_steps=steps)

        def loss() -> Tensor:
            some = shard[torch.randint(len(shard), (BATCH,), generator=draw)]
            return model.loss(x[some], y[some])

        def probe() -> Tensor:
            some = torch.randint(len(y), (BATCH,), generator=draw)
            return model.loss(x[some], y[some])

        run = method.build(comm, vector, optimizer, probe, facts=facts)
        closure = run.closure(loss)
        found, rounds, lower = [], 0, 0
        seen = []
        run.on_round = seen.append
        for step in range(1, steps + 1):
            optimizer.param_groups[0]["lr"] = 1 / (DECAY * step + largest)
            value = optimizer.step(closure)
            before = vector.data.clone()
            run.after_step(value)
            if seen:
                seen.clear()
                rounds += 1
                whole = [whole_loss(model, vector, p, x, y) for p in (before, run.center)]
                table = comm.allgather(torch.tensor(whole, dtype=torch.float64), "evaluate").wait()
                lower += bool((table[:, 1] <= table[:, 0].min() + 1e-15).all())
            if step in at:
                mean = vector.data / comm.size
                comm.allreduce(mean, "evaluate").wait()
                found.append(float((mean - best).square().sum()))
        run.finish()
        return found, rounds, lower

    return simulate(WORLD, body)[0]


def shards_of(examples: int, seed: int) -> tuple[Tensor, ...]:
    return torch.randperm(examples, generator=torch.Generator().manual_seed(seed)).chunk(WORLD)


def whole_loss(model: Regression, vector: hpc_grawa.ParameterVector, parameters: Tensor, x: Tensor, y: Tensor) -> float:
    with vector.swapped(parameters), torch.no_grad():
        return float(model.loss(x, y))


def marks(steps: int) -> list[int]:
    """Steps, evenly spaced on a logarithmic axis."""
    return sorted({round(t) for t in np.geomspace(10, steps, 30)})


def slope(curves: np.ndarray[tuple[int, int], np.dtype[np.float64]], at: list[int]) -> tuple[float, float, float]:
    """Of the mean over seeds in the last decade, and its 95 % interval."""
    late = np.array(at) >= at[-1] / 10
    t = np.log(np.array(at)[late])

    def of(some: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> float:
        return float(np.polyfit(t, np.log(some.mean(0)[late]), 1)[0])

    generator = np.random.default_rng(0)
    again = [of(curves[generator.integers(len(curves), size=len(curves))]) for _ in range(1000)]
    return of(curves), *map(float, np.quantile(again, (0.025, 0.975)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--figure", type=Path, default=Path("convex.png"))
    words = parser.parse_args()
    data = Digits().load()
    x, y = data.train.batch(torch.arange(len(data.train)))
    x = x.flatten(1).double()
    best, largest = minimum(x, y)
    at, curves = marks(words.steps), {}
    grid = [["method", "slope", "95 %", "E|x - x*|² at the end", "f(c) ≤ all f(x_m)"]]
    for name, method in METHODS.items():
        runs = [descend(method, (x, y), best, largest, words.steps, seed) for seed in range(words.seeds)]
        curves[name] = np.array([found for found, _, _ in runs])
        found, low, high = slope(curves[name], at)
        rounds, lower = (sum(run[i] for run in runs) for i in (1, 2))
        share = f"{100 * lower / rounds:.1f} % of {rounds:,}" if rounds else "-"
        grid.append([name, f"{found:.2f}", f"{low:.2f} to {high:.2f}", f"{curves[name][:, -1].mean():.3g}", share])
        print(grid[-1], flush=True)
    print("\n".join(aligned(grid)))
    off = [
        float((minimum(x[own], y[own])[0] - best).square().sum())
        for seed in range(words.seeds)
        for own in shards_of(len(y), seed)
    ]
    print(f"\nminima of the shards' own losses: |x - x*|² {min(off):.2f} to {max(off):.2f}")
    draw(curves, at, words.figure)


def draw(curves: dict[str, np.ndarray[tuple[int, int], np.dtype[np.float64]]], at: list[int], path: Path) -> None:
    from hpc_grawa.report.figure import COLOURS, FAINT, logarithmic, saved_figure

    with saved_figure(path, (8.0, 5.0)) as figure:
        axes = figure.add_axes((0.11, 0.12, 0.85, 0.78))
        for number, (name, found) in enumerate(curves.items()):
            axes.loglog(at, found.mean(0), color=COLOURS[number % len(COLOURS)], linewidth=1.5, label=name)
        first = next(iter(curves.values())).mean(0)
        axes.loglog(at, first[-1] * at[-1] / np.array(at), "--", color=FAINT, linewidth=1, label="1/t")
        logarithmic(axes.xaxis, (1,))
        logarithmic(axes.yaxis, (1,))
        axes.set_xlabel("local steps of each rank, t")
        axes.set_title("E‖x − x*‖², mean of the ranks", size=13, weight="bold", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    main()
