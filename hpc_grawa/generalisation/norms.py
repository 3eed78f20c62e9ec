"""Measures of a network's weights alone: how many there are, and norms of layers, distances, and paths."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from ..errors import ConfigError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A layer with weights.

    Attributes:
        name: in the model.
        module: the layer.
        shape: of its input, without the batch.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def weight(self) -> Tensor:
        """W ``[out, ...]``."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight


#: Normalisations that no norm of weights sees.
_BY_INPUT = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _InstanceNorm)


def passes(
    model: nn.Module, inputs: Tensor, kinds: tuple[type[nn.Module], ...]
) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Each call of a module of these kinds, in order: its name, the module, what it was given and its output."""
    found: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    names = {module: name for name, module in model.named_modules()}

    def see(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        found.append((names[module], module, next(iter((*given, *named.values()))), output))

    hooks = [m.register_forward_hook(see, with_kwargs=True) for m in names if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def layers(model: nn.Module, inputs: Tensor) -> list[Layer]:
    """The layers with a matrix of weights, in the order in which ``inputs`` pass them.

    Raises:
        ConfigError: there is none, one of them is used twice, there are weights elsewhere (of attention, recurrence,
            embeddings, parametrisations), or what it normalises by depends on its input.
    """
    own = type(model).__name__
    passed = passes(model, inputs, (*_CONVOLUTIONS, nn.Linear))
    found = [Layer(name, module, tuple(given.shape[1:])) for name, module, given, _ in passed]
    if not found:
        raise ConfigError(f"{own} has no convolution or linear layer, so no norms of layers")
    if len({id(layer.module.weight) for layer in found}) < len(found):
        raise ConfigError(f"{own} uses a layer or its weight twice, so norms over layers mean nothing")
    inside = {id(layer.module.weight) for layer in found}
    for name, p in model.named_parameters():
        if p.dim() > 1 and id(p) not in inside:
            raise ConfigError(
                f"{own} has weights, '{name}', of no convolution or linear layer, or of one that its forward pass does "
                f"not use, so it has no measures"
            )
    for name, module in model.named_modules():
        if isinstance(module, _BY_INPUT):
            raise ConfigError(f"{own} normalises by each input, '{name}', so norms of its layers say little of it")
    return found


def operator_norm(layer: Layer, tolerance: float = 1e-6, most: int = 500, weight: Tensor | None = None) -> float:
    """The spectral norm of a layer as a map of its inputs, by power iteration; a convolution's is not its kernel's.

    It ends where a step adds less than ``tolerance``, a share, which may leave a thousandth of the norm.
    """
    weight = (layer.weight if weight is None else weight).double()
    if isinstance(layer.module, nn.Linear):
        return float(torch.linalg.matrix_norm(weight, 2))
    module = layer.module
    assert isinstance(module, _CONVOLUTIONS)
    x = torch.randn(1, *layer.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(weight.device)
    norm = 0.0
    for _ in range(most):
        x = (x / x.norm()).requires_grad_()
        y: Tensor = module._conv_forward(x, weight, None)  # as it pads
        before, norm = norm, float(y.detach().norm())
        (back,) = torch.autograd.grad(y, x, y.detach())  # KᵀK x
        x = back
        if abs(norm - before) <= tolerance * norm:
            break
    return norm


def kernel_norm(weight: Tensor) -> float:
    """The spectral norm of ``[out, rest]``."""
    return float(torch.linalg.matrix_norm(weight.double().flatten(1), 2))


def square(weight: Tensor) -> float:
    """‖W‖_F²."""
    return float(weight.double().square().sum())


def parameters(found: Sequence[Layer]) -> float:
    """Σ_i k_i² c_{i-1}(c_i + 1). Source: Jiang et al., equation 20."""
    return float(sum(_kernel(one) * one.weight.shape[1] * (len(one.weight) + 1) for one in found))


def vc_dimension(found: Sequence[Layer], width: int) -> float:
    """d·log₂(6dn)³·Σ_i k_i² c_i c_{i-1}, n the width of an image. Source: Jiang et al., equation 19."""
    d = len(found)
    sizes = sum(_kernel(one) * one.weight.shape[1] * len(one.weight) for one in found)
    return float(d * math.log2(6 * d * width) ** 3 * sizes)


def _kernel(layer: Layer) -> int:
    return layer.weight[0, 0].numel()


def of_products(squares: Sequence[float], frobenius: Sequence[float], margin: float) -> dict[str, float]:
    """Measures 29 to 39 of Jiang et al. from the squared norms of layers, in logarithms of their products.

    Args:
        squares: ‖W_i‖² of each layer, spectral or Frobenius.
        frobenius: what stands above them: ‖W_i‖_F², or ‖W_i - W_i⁰‖_F².
        margin: γ.

    Returns:
        Infinite over a margin that is not positive; NaN where a layer is zero.
    """
    if min(squares) <= 0:
        return dict.fromkeys(
            ("product", "product_over_margin", "ratios", "ratio", "mean", "mean_over_margin"), math.nan
        )
    log_product = sum(map(math.log, squares))
    ratios = sum(f / s for f, s in zip(frobenius, squares, strict=True))
    over_margin = log_product - 2 * math.log(margin) if margin > 0 else math.inf
    d = len(squares)
    return {
        "product": log_product,
        "product_over_margin": over_margin,
        "ratios": ratios,
        "ratio": over_margin + math.log(ratios) if ratios > 0 else math.nan,
        "mean": d * math.exp(log_product / d),
        "mean_over_margin": d * math.exp(over_margin / d),
    }


def path_norm(model: nn.Module, shape: tuple[int, ...]) -> tuple[float, bool]:
    """Σ over outputs of f_{w²}(1): the network with its weights squared, no biases, at an input of ones; in float64.

    Source: Jiang et al., equation 44; Neyshabur, Salakhutdinov and Srebro, Path-SGD, 2015.

    Args:
        model: in eval mode.
        shape: of an input.

    Returns:
        The path norm; and whether twice the input gives twice the output there, without which it sums over no paths.
    """
    squared = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, p in squared.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            else:
                p.square_()
        for module in squared.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()
                assert module.running_var is not None
                module.running_var.copy_((module.running_var + module.eps) ** 2 - module.eps)
        ones = torch.ones(1, *shape, dtype=torch.float64, device=next(squared.parameters()).device)
        once, twice = squared(ones), squared(2 * ones)
        return float(once.sum()), bool(torch.allclose(twice, 2 * once, rtol=1e-6, atol=0))
