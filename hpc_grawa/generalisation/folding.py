"""A model without its BatchNorm, where that can be: each is folded into the one layer that it follows."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..errors import ConfigError, in_a_line
from .norms import passes

#: What a BatchNorm can be folded into.
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
#: How they compute, which a class of one's own may do otherwise.
_FORWARDS = {kind.forward for kind in (*_LAYERS, _BatchNorm)}
_INNER = {None, *(getattr(kind, "_conv_forward", None) for kind in _LAYERS)}


@dataclass
class Folded:
    """A copy of a model in eval mode, with BatchNorm folded where it is the only one that sees its layer's output.

    Attributes:
        model: the copy; what was folded is an identity there.
        folded: names of the BatchNorms that were.
        kept: names of those that stay, as a scale and a shift of each channel: they follow no layer, or not alone.
    """

    model: nn.Module
    folded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


class _Tracer(fx.Tracer):
    """Looks into no layer and no BatchNorm, one's own that compute as torch's do among them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        as_torch = type(m).forward in _FORWARDS and getattr(type(m), "_conv_forward", None) in _INNER
        return as_torch or super().is_leaf_module(m, module_qualified_name)


def fold(model: nn.Module, inputs: Tensor | None = None) -> Folded:
    """Fold BatchNorm into the layers before.

    Args:
        model: it is copied.
        inputs: of a forward pass, which shows outputs of linear layers whose features are not what is normalised; None:
            all are ``[B, features]``.

    Raises:
        ConfigError: it has BatchNorm, and what follows what cannot be seen, or it cannot be copied.
    """
    try:
        found = Folded(copy.deepcopy(model).eval())
    except Exception as error:  # such as of torch's older weight_norm
        raise ConfigError(f"{type(model).__name__} cannot be copied: {in_a_line(error)[:200]}") from error
    norms = [name for name, module in found.model.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return found
    for name in norms:
        if found.model.get_submodule(name).running_mean is None:
            raise ConfigError(f"'{name}' has no running statistics, so there is nothing to fold it by")
    try:
        graph = _Tracer().trace(found.model)
    except Exception as error:  # of the model's forward, which may do anything
        raise ConfigError(
            f"BatchNorm of {type(model).__name__} cannot be folded, as torch.fx cannot follow its forward pass: "
            f"{in_a_line(error)[:200]}"
        ) from error
    modules = dict(found.model.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    uses = Counter(id(module.weight) for module in modules.values() if isinstance(module, _LAYERS))
    # A weight that the forward pass asks for is used beside its layer.
    uses.update(id(operator.attrgetter(str(node.target))(found.model)) for node in graph.nodes if node.op == "get_attr")
    # BatchNorm normalises the second dimension, which of a linear layer on sequences is not that of its features.
    linear = [] if inputs is None else passes(found.model, inputs, (nn.Linear,))
    sequences = {name for name, _, _, output in linear if output.dim() != 2}
    for name in norms:
        before = _layer_before(calls.get(name, []), calls, modules)
        if before is None or before in sequences or uses[id(modules[before].weight)] > 1:
            found.kept.append(name)
            continue
        _fold_into(modules[before], modules[name])
        for parent in modules.values():  # it may have several names
            for child in [key for key, module in parent._modules.items() if module is modules[name]]:
                parent._modules[child] = nn.Identity()
        found.folded.append(name)
    return found


def _layer_before(nodes: list[fx.Node], calls: dict[str, list[fx.Node]], modules: dict[str, nn.Module]) -> str | None:
    """The layer whose output only this BatchNorm sees, both called once; None if there is none."""
    if len(nodes) != 1 or len(nodes[0].all_input_nodes) != 1:
        return None
    (before,) = nodes[0].all_input_nodes
    name = str(before.target)
    if before.op != "call_module" or len(before.users) != 1 or len(calls[name]) != 1:
        return None
    # A weight that is computed (weight_norm, parametrisations) cannot be set.
    return name if isinstance(modules[name], _LAYERS) and "weight" in modules[name]._parameters else None


def _fold_into(layer: nn.Module, norm: _BatchNorm) -> None:
    assert isinstance(layer, _LAYERS) and norm.running_mean is not None and norm.running_var is not None
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    given = norm.running_mean, norm.running_var, norm.eps, scale, shift
    with torch.no_grad():
        layer.weight, layer.bias = fuse(layer.weight, layer.bias, *given)
