"""The loss of many batches as that of one: what a batch's loss divides, and what it divides by, are summed apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode

from .forward import eagerly

#: Means over targets are weighted by class, and leave one out.
_OF_CLASSES = ("cross_entropy", "nll_loss", "linear_cross_entropy")


def sums(loss: Callable[[Any, Any], Tensor], output: Any, target: Any, examples: int, total: int) -> Tensor:
    """Numerator and denominator ``[2]``, float64: sums of them over batches give the loss of all as one batch.

    - A loss with a method ``sums(output, target)`` → ``[2]`` says them itself.
    - Of what a function of ``torch.nn.functional`` returns, called by the loss or by a module in it, they are known:
      ``reduction: mean`` (with class weights, ``ignore_index``, label smoothing), ``batchmean``, and ``sum``, whose
      total has no denominator.
    - What is computed from such means that divide by the same, as a weighted sum of them is, divides by that.
    - A loss that is not reduced is averaged over its elements; one with an attribute ``reduction`` that is ``sum`` is a
      sum. Anything else is assumed to be the mean over the batch's examples.

    Args:
        loss: (output, target) → loss of a batch, a tensor.
        output: of the model.
        target: beside it.
        examples: in this batch.
        total: in all batches.
    """
    if hasattr(loss, "sums"):
        own: Tensor = loss.sums(output, target)
        return own.double()
    with eagerly(), _Reductions() as reductions:
        value = loss(output, target)
    # Denominators of a sum add up to 1.
    for result, numerator, denominator in reductions.found:
        if value is result:
            return _pair(numerator, examples / total if denominator is None else denominator)
    if value.numel() > 1:
        return _pair(value.double().sum(), value.numel())
    value = value.double().reshape(())
    if getattr(loss, "reduction", None) == "sum":
        return _pair(value, examples / total)
    found = {float(denominator) for _, _, denominator in reductions.found if denominator is not None}
    denominator = found.pop() if len(found) == 1 else float(examples)
    return _pair(value * denominator if denominator else torch.zeros_like(value), denominator)


def _pair(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    return torch.stack((numerator, torch.as_tensor(denominator).to(numerator)))


class _Reductions(TorchFunctionMode):
    """Within the block losses of ``torch.nn.functional`` are reduced in float64, and noted.

    Attributes:
        found: results, each with its numerator and denominator, None for a sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor, Tensor | float | None]] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        signature = _signature(function)
        if signature is None:
            return function(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        old = given.get("size_average"), given.get("reduce")
        reduction = given["reduction"] if old == (None, None) else _reduction.legacy_get_string(*old)
        if reduction not in ("mean", "batchmean", "sum"):
            return function(*args, **kwargs)
        given |= {"reduction": "none"} | {name: None for name in ("size_average", "reduce") if name in given}
        each = function(*call.args, **call.kwargs)
        if function.__name__ == "ctc_loss" and reduction == "mean":
            each = each / torch.as_tensor(given["target_lengths"], device=each.device).clamp(min=1)
        numerator = each.double().sum()
        denominator = None if reduction == "sum" else _denominator(function.__name__, given, reduction, each)
        result = (numerator / (1 if denominator is None else denominator)).to(each.dtype)
        self.found.append((result, numerator, denominator))
        return result


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Of a loss with a reduction, else None."""
    if getattr(function, "__module__", None) != nn.functional.__name__:
        return None
    signature = inspect.signature(function)
    return signature if "reduction" in signature.parameters else None


def _denominator(name: str, given: dict[str, Any], reduction: str, each: Tensor) -> Tensor | float:
    """What a mean divides by.

    Args:
        name: of the function.
        given: its arguments.
        reduction: ``mean`` or ``batchmean``.
        each: what it makes without a reduction.
    """
    target, weight = given.get("target"), given.get("weight")
    if name in _OF_CLASSES and isinstance(target, Tensor) and not target.is_floating_point():
        ignored = given["ignore_index"]
        counts = target != (-100 if ignored is None else ignored)
        weights: Tensor = counts if weight is None else weight.double()[target.where(counts, 0)] * counts
        return weights.sum()
    if name in ("mse_loss", "l1_loss") and weight is not None:
        return float(weight.double().sum())
    return len(each) if reduction == "batchmean" and each.dim() else each.numel()
