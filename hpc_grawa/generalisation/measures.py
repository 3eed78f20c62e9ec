"""All measures of one network, by their numbers in Jiang et al., Fantastic Generalization Measures, ICLR 2020.

None was checked against the paper itself: definitions and numbers are those by which its followers know them, so that a
row is to be compared by its definition. Tests hold each to its closed form on a linear network of two layers.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ..comm import Communicator
from ..data import Examples
from ..errors import ConfigError, in_a_line
from ..flatness.objective import Objective
from .folding import fold
from .noise import DELTA, Errors, Largest, aware_bound, bounds, gaussian, worst
from .norms import Layer, kernel_norm, layers, of_products, operator_norm, parameters, path_norm, square, vc_dimension

#: What the measures are called, and their numbers in the paper as public code of its followers has them.
NUMBERS = {
    "vc_dimension": "19",
    "parameters": "20",
    "cross_entropy": "21",
    "inverse_margin": "22",
    "entropy": "23",
    "spectral_init": "29",
    "spectral_orig": "30",
    "spectral_product_over_margin": "31",
    "spectral_product": "32",
    "frobenius_over_spectral": "33",
    "spectral_mean_over_margin": "34",
    "spectral_mean": "35",
    "frobenius_product_over_margin": "36",
    "frobenius_product": "37",
    "frobenius_mean_over_margin": "38",
    "frobenius_mean": "39",
    "frobenius_distance": "40",
    "spectral_distance": "41",
    "parameter_norm": "42",
    "path_norm_over_margin": "43",
    "path_norm": "44",
    "fisher_rao": "45",
    "pac_bayes_init": "48",
    "pac_bayes_orig": "49",
    "sharpness_init": "51",
    "sharpness_orig": "52",
    "pac_bayes_flatness": "53",
    "sharpness_flatness": "54",
    "pac_bayes_mag_init": "56",
    "pac_bayes_mag_orig": "57",
    "sharpness_mag_init": "59",
    "sharpness_mag_orig": "60",
    "pac_bayes_mag_flatness": "61",
    "sharpness_mag_flatness": "62",
}


@dataclass
class Measured:
    """What was found.

    Attributes:
        values: by name; where a margin is not positive, or a network errs too much without noise, what is over the
            margin or the noise is infinite, and NaN where a measure is not defined (a layer that is zero).
        left_out: by name, why a measure cannot be computed.
        notes: what a row has to say beside, such as BatchNorm that stays.
    """

    values: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def measures(
    model: nn.Module,
    start: nn.Module | None,
    examples: Examples,
    comm: Communicator | None = None,
    limit: int | None = None,
    bound: float = 0.1,
    batch_size: int = 500,
    seed: int = 0,
) -> Measured:
    """All measures of a classifier; all ranks must call it together.

    Args:
        model: trained; a copy is measured, in eval mode.
        start: the same with its initial weights, or None where these are not known.
        examples: those it was trained on; targets are classes.
        comm: ranks that share the work; None: this process alone.
        limit: only so many examples.
        bound: of the training error under disturbances; beside it, what it rises by.
        batch_size: examples per pass and rank.
        seed: of noise.

    Raises:
        ConfigError: it is no classifier of one head, or has no layers with weights.
    """
    found = Measured()
    inputs, targets = examples.batch(torch.arange(1))
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor) or targets.is_floating_point():
        raise ConfigError("measures are those of classifiers: inputs must be one tensor, and targets classes")
    device = next(model.parameters()).device
    one = inputs.to(device, next(model.parameters()).dtype if inputs.is_floating_point() else inputs.dtype)
    folded = fold(model, one)
    if folded.kept:
        found.notes.append(f"BatchNorm stays, as scales of channels: {', '.join(folded.kept)}")
    begun = None if start is None else fold(start, one).model
    with torch.no_grad():
        output = folded.model(one)
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ConfigError("measures are those of classifiers with one head: outputs must be logits [B, classes]")
    own = layers(folded.model, one)
    first = None if begun is None else layers(begun, one)
    for parameter in folded.model.parameters():
        parameter.requires_grad_(False)
    for layer in own:
        layer.module.weight.requires_grad_(True)
    ones = Objective(folded.model, nn.CrossEntropyLoss(), examples, comm, limit, batch_size)
    errors = copy.copy(ones)
    errors._loss = Errors()
    values = found.values
    values |= _of_outputs(ones)
    values |= _of_weights(own, first, values["margin"], tuple(one.shape[1:]))
    values["path_norm"], linear = path_norm(folded.model, tuple(one.shape[1:]))
    if not linear:
        found.notes.append("path_norm is no sum over paths: the network is not linear along a ray, as with ReLU it is")
    values["path_norm_over_margin"] = values["path_norm"] * values["inverse_margin"]
    slopes, lacks = _fisher_rao(ones)
    if lacks:
        found.left_out["fisher_rao"] = f"there is no forward derivative of the network: {lacks}"
    else:
        values["fisher_rao"] = (len(own) + 1) ** 2 * slopes
    values |= _of_noise(ones, errors, own, first, bound, seed, len(examples))
    if start is None:
        why = "the initial weights are not known"
        for name in NUMBERS:
            if name.endswith(("_init", "_distance")) or "_mag_orig" in name:
                values.pop(name, None)
                found.left_out[name] = why
    return found


def _of_outputs(ones: Objective) -> dict[str, float]:
    """Cross-entropy, training error, the 10th percentile of margins, entropy of the outputs."""
    margins, sums = [], torch.zeros(4, dtype=torch.float64)
    for output, target, count in ones.outputs():
        logits = output.double()
        right = logits.gather(1, target[:, None])[:, 0]
        others = logits.scatter(1, target[:, None], -math.inf).max(1).values
        margins.append(right - others)
        logs = logits.log_softmax(1)
        sums += torch.stack(
            (
                -logs.gather(1, target[:, None]).sum(),
                (logits.argmax(1) != target).sum(),
                torch.special.entr(logs.exp()).sum(),
                logits.new_tensor(count),
            )
        ).cpu()
    ones.comm.allreduce(sums, "evaluate").wait()
    told = [
        torch.frombuffer(bytearray(row), dtype=torch.float64)
        for row in ones.comm.gather_bytes(torch.cat(margins).cpu().numpy().tobytes() if margins else b"", "evaluate")
        if row
    ]
    margin = float(torch.quantile(torch.cat(told), 0.1))
    return {
        "cross_entropy": float(sums[0] / sums[3]),
        "training_error": float(sums[1] / sums[3]),
        "entropy": float(sums[2] / sums[3]),
        "margin": margin,
        "inverse_margin": 1 / margin**2 if margin > 0 else math.inf,
    }


def _of_weights(own: list[Layer], first: list[Layer] | None, margin: float, shape: tuple[int, ...]) -> dict[str, float]:
    norms = [operator_norm(layer) ** 2 for layer in own]
    kernels = [kernel_norm(layer.weight) ** 2 for layer in own]
    frobenius = [square(layer.weight) for layer in own]
    found = {"vc_dimension": vc_dimension(own, shape[-1]), "parameters": parameters(own)}
    spectral = of_products(norms, frobenius, margin)
    found |= {
        "spectral_product": spectral["product"],
        "spectral_product_over_margin": spectral["product_over_margin"],
        "spectral_orig": spectral["ratio"],
        "frobenius_over_spectral": spectral["ratios"],
        "spectral_mean_over_margin": spectral["mean_over_margin"],
        "spectral_mean": spectral["mean"],
        "kernel_spectral_product": of_products(kernels, frobenius, margin)["product"],
        "kernel_spectral_orig": of_products(kernels, frobenius, margin)["ratio"],
        "parameter_norm": sum(frobenius),
    }
    of_frobenius = of_products(frobenius, frobenius, margin)
    found |= {
        "frobenius_product": of_frobenius["product"],
        "frobenius_product_over_margin": of_frobenius["product_over_margin"],
        "frobenius_mean_over_margin": of_frobenius["mean_over_margin"],
        "frobenius_mean": of_frobenius["mean"],
    }
    if first is not None:
        moved = [layer.weight.double() - begun.weight.double() for layer, begun in zip(own, first, strict=True)]
        distances = [square(change) for change in moved]
        found |= {
            "spectral_init": of_products(norms, distances, margin)["ratio"],
            "kernel_spectral_init": of_products(kernels, distances, margin)["ratio"],
            "frobenius_distance": sum(distances),
            "spectral_distance": sum(
                operator_norm(layer, weight=change) ** 2 for layer, change in zip(own, moved, strict=True)
            ),
            "kernel_spectral_distance": sum(kernel_norm(change) ** 2 for change in moved),
        }
    return found


def _fisher_rao(ones: Objective) -> tuple[float, str]:
    """Mean over examples of ⟨w, ∇_w ℓ_i⟩², by one forward derivative along w for a batch; and why there is none."""
    model, sums, lacks = ones.model, torch.zeros(2, dtype=torch.float64), ""
    weights = dict(zip(ones.vector.names, ones.vector.parameters, strict=True))
    given = {name: p.detach() for name, p in weights.items()}
    for inputs, targets in ones.pairs():

        def each(moved: dict[str, Tensor], inputs: Any = inputs, targets: Any = targets) -> Tensor:
            # Not tied: a layer that the model knows by two names is one, whose weight would be given back wrong.
            output = functional_call(model, moved, (inputs,), tie_weights=False)
            return nn.functional.cross_entropy(output, targets, reduction="none")

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what torch itself loads for its first jvp
            try:
                slopes: Tensor = jvp(each, (given,), (given,))[1]
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:  # where there are examples; all ranks hear of it below
                lacks = in_a_line(error)[:200] or type(error).__name__
                break
        sums += torch.stack((slopes.double().square().sum(), slopes.new_tensor(len(slopes)).double())).cpu()
    ones.comm.allreduce(sums, "evaluate").wait()
    told = [text.decode() for text in ones.comm.gather_bytes(lacks.encode(), "evaluate") if text]
    return (math.nan, told[0]) if told else (float(sums[0] / sums[1]), "")


def _of_noise(
    ones: Objective,
    errors: Objective,
    own: list[Layer],
    first: list[Layer] | None,
    bound: float,
    seed: int,
    examples: int,
) -> dict[str, float]:
    w = ones.vector.data.double()
    start = torch.cat([one.weight.double().flatten() for one in first]) if first is not None else torch.zeros_like(w)
    inside = torch.cat([one.weight.double().flatten() for one in own])
    norms = {"orig": float(inside.square().sum())}
    if first is not None:
        norms["init"] = float((inside - start).square().sum())
    rises = errors.value() + bound
    logs = math.log(2 * len(w))
    found: dict[str, float] = {}
    kinds: dict[str, tuple[Callable[..., Largest], float, float]] = {
        "pac_bayes": (partial(gaussian, errors, seed=seed), 4.0, 1.0),
        "sharpness": (partial(worst, ones), 4.0 / logs, 4 * (logs - math.log(DELTA))),
    }
    for name, (search, scale, added) in kinds.items():
        plain, aware = search(bound, aware=False), search(bound, aware=True)
        found |= {f"{name}_size": plain.size, f"{name}_tolerance": plain.tolerance}
        found |= {f"{name}_mag_size": aware.size, f"{name}_mag_tolerance": aware.tolerance}
        found[f"{name}_size_where_it_rises"] = search(rises, aware=False, near=plain.size).size
        found[f"{name}_flatness"] = _inverse(plain.size)
        found[f"{name}_mag_flatness"] = _inverse(aware.size)
        for kind, norm in norms.items():
            found[f"{name}_{kind}"] = bounds(plain.size, norm, examples, scale)
            found[f"{name}_mag_{kind}"] = aware_bound(aware.size, inside, start, norm, examples, added)
    return found


def _inverse(size: float) -> float:
    return 1 / size**2 if size else math.inf
