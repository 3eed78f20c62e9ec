"""Trust ratios of LARS and LAMB, layer by layer: how long a step is beside the layer's weights.

    python benchmarks/studies/trust.py data/cifar10 --figure trust.png

The network and images of ``large_batch.yaml``, one process, batches of ``--batch_size``. Shown is, at the first step
and at the end of each fifth of the run, LARS's trust·‖w‖/(‖g‖ + β‖w‖) and LAMB's ‖w‖/‖u‖ of every weight tensor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import hpc_grawa
from hpc_grawa.data import CIFAR
from hpc_grawa.models import SmallCNN
from hpc_grawa.optim import LAMB, LARS, LocalOptimizer
from hpc_grawa.report.figure import COLOURS, logarithmic, saved_figure
from hpc_grawa.report.table import aligned
from hpc_grawa.schedules import RunFacts


def ratio_of_lars(settings: LARS, p: nn.Parameter, before: Tensor, state: dict[str, Tensor], step: int) -> float:
    assert p.grad is not None
    w, g = before.norm(), p.grad.norm()
    return float(settings.trust * w / (g + settings.weight_decay * w))


def ratio_of_lamb(settings: LAMB, p: nn.Parameter, before: Tensor, state: dict[str, Tensor], step: int) -> float:
    first = state["exp_avg"] / (1 - settings.beta1**step)
    second = state["exp_avg_sq"] / (1 - settings.beta2**step)
    return float(before.norm() / (first / (second.sqrt() + settings.eps) + settings.weight_decay * before).norm())


def train(
    settings: LocalOptimizer, ratio: Callable[..., float], data: CIFAR, steps: int, batch_size: int
) -> tuple[dict[str, list[float]], list[int]]:
    """Ratios of each layer at the steps that come with them; every one is that of the step as it was made."""
    torch.manual_seed(0)
    examples = data.load().train
    model = SmallCNN(in_channels=3, width=8, depth=4)
    vector = hpc_grawa.ParameterVector(model)
    optimizer: optim.Optimizer = settings.build(vector, RunFacts(total_steps=steps))
    peak, warmup = optimizer.param_groups[0]["lr"], 20
    names = {p: name for name, p in model.named_parameters() if p.dim() > 1}
    at = [1, *(round(steps * part / 5) for part in range(1, 6))]
    found: dict[str, list[float]] = {name: [] for name in names.values()}
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, step / warmup)
        x, y = examples.batch(torch.randint(len(examples), (batch_size,)))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = {p: p.detach().clone() for p in names if step in at}
        optimizer.step()
        for p, start in before.items():
            found[names[p]].append(ratio(settings, p, start, optimizer.state[p], step))
    return found, at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the folder of data_prep/cifar.py")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--figure", type=Path, default=Path("trust.png"))
    words = parser.parse_args()
    data = CIFAR(path=words.data, augment=False, examples=18432, validation=2048)
    found = {}
    for name, settings, ratio in (("LARS", LARS(lr=4.0), ratio_of_lars), ("LAMB", LAMB(lr=4e-3), ratio_of_lamb)):
        found[name], at = train(settings, ratio, data, words.steps, words.batch_size)
        grid = [[name, *(f"step {step}" for step in at)]]
        grid += [[layer, *(f"{value:.3g}" for value in ratios)] for layer, ratios in found[name].items()]
        print("\n".join(aligned(grid)), end="\n\n", flush=True)
    with saved_figure(words.figure, (10.0, 4.2)) as figure:
        for place, (name, layers) in enumerate(found.items()):
            axes = figure.add_axes((0.07 + 0.48 * place, 0.15, 0.42, 0.72))
            for number, (layer, ratios) in enumerate(layers.items()):
                axes.semilogy(np.array(at), ratios, color=COLOURS[number % len(COLOURS)], linewidth=1.5, label=layer)
            logarithmic(axes.yaxis, (1, 2, 5))
            axes.set_xlabel("step")
            axes.set_title(f"Trust ratios of {name}", size=13, weight="bold", loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            if place:
                axes.legend(frameon=False, fontsize=8, loc="lower right")
    print(f"figure  {words.figure}")


if __name__ == "__main__":
    main()
