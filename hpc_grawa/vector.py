"""A model's parameters as one 1-D tensor, of which the model's own tensors are views."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import ConfigError, LostView, wrong
from .lazy import unfinished

#: ``tensor``: every parameter tensor; ``module``: the parameters one module holds directly; or groups of name patterns.
Partition = Literal["tensor", "module"] | list[list[str]]


@dataclass(frozen=True)
class Layers:
    """A partition of a vector's tensors into L layers, each weighted by itself.

    Attributes:
        names: of the L layers.
        index: of each tensor's layer, in the vector's order of tensors.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    #: For the tensors given and reached of late: the layers of the given ones, and whether each layer is idle.
    _on_device: dict[object, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def norms(self, tensors: Sequence[Tensor | None], reached: AbstractSet[int] | None = None) -> Tensor:
        """Frobenius norms ``[L]`` of the layers of gradients; +∞ where a layer has none.

        In fp32 (float64 for float64 tensors), of dense tensors without a host synchronisation. A norm that overflows is
        NaN.

        Args:
            tensors: one per parameter, or None, which counts as zero beside others of its layer.
            reached: the numbers of those that a backward pass has computed; zeros elsewhere are as good as None. None:
                all that are given.
        """
        given = [i for i, t in enumerate(tensors) if t is not None]
        if not given:
            return torch.full((len(self),), torch.inf)
        present = [t.coalesce().values() if t.is_sparse else t for t in tensors if t is not None]
        exact = torch.promote_types(present[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(present, 2, dtype=exact))
        everywhere = len(given) == len(self.index) and (reached is None or len(reached) == len(self.index))
        if not everywhere or self.index != tuple(given):
            key = tuple(given), None if reached is None else frozenset(reached), norms.device
            if key not in self._on_device:  # kept: a copy to the device would be one per step
                if len(self._on_device) >= 64:
                    self._on_device.clear()
                self._on_device[key] = self._places(given, reached, norms.device)
            layer, idle = self._on_device[key]
            norms = norms.new_zeros(len(self)).index_add_(0, layer, norms.square()).sqrt_()
            norms = norms.masked_fill_(idle & (norms == 0), -torch.inf)
        return norms.nan_to_num_(nan=torch.nan, posinf=torch.nan, neginf=torch.inf)

    def _places(
        self, given: list[int], reached: AbstractSet[int] | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        busy = {self.index[i] for i in given if reached is None or i in reached}
        idle = [layer not in busy for layer in range(len(self))]
        return torch.tensor([self.index[i] for i in given], device=device), torch.tensor(idle, device=device)


class ParameterVector:
    """All trainable parameters of a model as views of one 1-D tensor ``data`` ``[P]``.

    Build it after the model has its final dtype, device and memory format, before or after the optimizer. Frozen
    parameters and buffers stay outside; a tied weight is in it once. A view keeps its parameter's memory format.

    Args:
        model: any module with at least one trainable parameter.

    Raises:
        ConfigError: the model is wrapped by another way of training together (``DistributedDataParallel``, FSDP), or
            two parameters lie in the same memory.
        ValueError: no trainable parameter, one without a shape yet (a lazy module), or parameters of several dtypes or
            devices (both are listed).

    Example:
        >>> vector = ParameterVector(nn.Linear(2, 1))
        >>> vector.data.zero_().shape
        torch.Size([3])
    """

    def __init__(self, model: nn.Module) -> None:
        _refuse_wrappers(model)
        self.model = model
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("the model has no trainable parameter")
        if (name := unfinished(model)) is not None:
            raise ValueError(
                f"'{name}' has no shape yet (a lazy module): pass a batch through the model before "
                f"ParameterVector(model)"
            )
        kinds: dict[tuple[torch.dtype, torch.device], str] = {}
        for name, p in named:
            kinds.setdefault((p.dtype, p.device), name)
        if len(kinds) > 1:
            found = ", ".join(f"'{name}' {dtype} on {device}" for (dtype, device), name in kinds.items())
            raise ValueError(f"all trainable parameters must have one dtype and device, found {found}")
        if not named[0][1].is_floating_point():
            raise ValueError(f"trainable parameters must be floating point, '{named[0][0]}' is {named[0][1].dtype}")
        _refuse_shared_memory(named)
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        self.names = tuple(name for name, _ in named)
        self.parameters = [p for _, p in named]
        self.sizes = tuple(p.numel() for p in self.parameters)
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        self.offsets = tuple(end - size for end, size in zip(ends, self.sizes, strict=True))
        first = self.parameters[0]
        self.data = torch.empty(sum(self.sizes), dtype=first.dtype, device=first.device)
        #: Sums, centers and pulls are held in at least fp32.
        self.exact_dtype = torch.promote_types(first.dtype, torch.float32)
        for view, p in zip(self.views(self.data), self.parameters, strict=True):
            view.copy_(p.data)
            p.data = view

    def __len__(self) -> int:
        return self.data.numel()

    def views(self, vector: Tensor) -> list[Tensor]:
        """Views of any vector ``[P]`` in the shapes and memory formats of the parameters."""
        start = vector.storage_offset()
        return [
            vector.as_strided(p.shape, p.stride() if _dense(p) else _contiguous_strides(p), start + offset)
            for p, offset in zip(self.parameters, self.offsets, strict=True)
        ]

    @property
    def outside(self) -> list[tuple[str, Tensor]]:
        """What the model holds beside the vector: frozen parameters and buffers, with titles."""
        frozen = [(f"frozen parameter '{name}'", p) for name, p in self.model.named_parameters() if not p.requires_grad]
        return [*frozen, *((f"buffer '{name}'", buffer) for name, buffer in self.model.named_buffers())]

    def check(self) -> None:
        """Raise ``LostView`` if the model's trainable parameters are no longer those that live in ``data``."""
        now = dict(self.model.named_parameters())
        base, width = self.data.data_ptr(), self.data.element_size()
        for name, p, offset in zip(self.names, self.parameters, self.offsets, strict=True):
            moved = p.numel() > 0 and p.data_ptr() != base + offset * width
            if now.pop(name, None) is not p or moved:
                raise LostView(
                    f"parameter '{name}' no longer lives in the ParameterVector, so averaging would not reach it: "
                    f"something replaced it or its memory (p.data = ..., model.double(), "
                    f"model.to(memory_format=...), flatten_parameters() of an RNN, another nn.Parameter); "
                    f"do that before ParameterVector(model), "
                    f"afterwards change values in place (p.data.copy_(...))"
                )
            if not p.requires_grad:
                raise LostView(
                    f"parameter '{name}' was frozen after ParameterVector(model) was built: freeze it before, give it "
                    f"a learning rate of 0, or {_ANEW}"
                )
        for name, p in now.items():
            if p.requires_grad:
                raise LostView(
                    f"parameter '{name}' was added or unfrozen after ParameterVector(model) was built, so ranks would "
                    f"not share it: do that before, or {_ANEW}"
                )

    def check_trained(self) -> None:
        """Raise ``LostView`` if a parameter was frozen or unfrozen since; one look at each, so cheap at every step."""
        if not all(map(_is_trained, self.parameters)) or any(map(_is_trained, self._frozen)):
            self.check()

    def layers(self, partition: Partition = "tensor") -> Layers:
        """Divide the parameters into layers.

        Args:
            partition: ``tensor``, ``module`` (a module's own parameters, leaf or not), or a list of groups, each a
                list of parameter names or patterns (``"features.*"``).

        Raises:
            ConfigError: a tensor is in no group or in several.
        """
        if partition == "tensor":
            return Layers(self.names, tuple(range(len(self.names))))
        if partition == "module":
            owners = [name.rpartition(".")[0] for name in self.names]
            names = tuple(dict.fromkeys(owners))
            return Layers(names, tuple(names.index(owner) for owner in owners))
        if isinstance(partition, str):
            raise wrong("layers", partition, "must be 'tensor', 'module' or a list of groups")
        index = []
        for name in self.names:
            groups = [g for g, patterns in enumerate(partition) if any(fnmatch.fnmatchcase(name, x) for x in patterns)]
            if len(groups) != 1:
                where = f"groups {groups}" if groups else "no group"
                raise ConfigError(f"layers: every trainable tensor must be in one group, '{name}' is in {where}")
            index.append(groups[0])
        empty = [g for g in range(len(partition)) if g not in index]
        if empty:
            raise ConfigError(f"layers: group {partition[empty[0]]} matches no trainable tensor")
        return Layers(tuple("+".join(group) for group in partition), tuple(index))

    def scale(self, x: Tensor, weights: Sequence[float], layers: Layers | None, out: Tensor) -> Tensor:
        """``out = weights ⊙ x``: one weight for all, or one per layer.

        Args:
            x: ``[P]``.
            weights: one number, or L of them.
            layers: the L layers; unused with one weight.
            out: ``[P]``, overwritten.
        """
        if len(weights) == 1:
            if out.dtype == x.dtype:
                return torch.mul(x, weights[0], out=out)
            return out.copy_(x).mul_(weights[0])
        assert layers is not None
        parts = list(zip(self.offsets, self.sizes, layers.index, strict=True))
        if x.device.type == "cpu" and out.dtype == x.dtype:
            # One pass over memory; a launch per tensor costs nothing here.
            for offset, size, layer in parts:
                torch.mul(x[offset : offset + size], weights[layer], out=out[offset : offset + size])
            return out
        out.copy_(x)
        torch._foreach_mul_([out[o : o + n] for o, n, _ in parts], [weights[layer] for _, _, layer in parts])
        return out

    @contextmanager
    def swapped(self, vector: Tensor) -> Iterator[None]:
        """Within the block the model has the parameters ``vector`` ``[P]``; afterwards its own, bit for bit."""
        own = self.data.clone()
        self.data.copy_(vector)
        try:
            yield
        finally:
            self.data.copy_(own)


_is_trained = operator.attrgetter("requires_grad")
_ANEW = (
    "begin anew: finish() of this run on all ranks (optimizer.run.finish()), the model takes the center "
    "(run.vector.data.copy_(run.center)), then change requires_grad, and a new optimizer over the same model"
)
#: Wrappers of PyTorch that share a model's gradients or parameters themselves.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def _refuse_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        wrapper = next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            raise ConfigError(
                f"the model is wrapped in PyTorch's {wrapper}, which shares gradients at every step itself: pass the "
                f"plain module (model.module), and hpc_grawa.DataParallel() as the method for what the wrapper does"
            )


def _refuse_shared_memory(named: Sequence[tuple[str, Tensor]]) -> None:
    """A weight tied by its memory alone: in the vector it would be two, which part in training."""
    held = [(p.data_ptr(), p, name) for name, p in named if p.numel() and p.layout == torch.strided]
    spans = sorted((start, start + _span(p), name) for start, p, name in held if start)  # 0 on the device "meta"
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            raise ConfigError(
                f"parameters '{one}' and '{other}' lie in the same memory but are two, which training would part: tie "
                f"them as one (b.weight = a.weight), or give each memory of its own (p.data = p.data.clone())"
            )


def _span(p: Tensor) -> int:
    """Bytes from the first of its numbers to the end of the last."""
    steps = sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True))
    return (steps + 1) * p.element_size()


def _dense(p: Tensor) -> bool:
    """Whether ``p`` fills its memory without gaps or overlap, in any order of dimensions (channels_last does)."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(p))


def _contiguous_strides(p: Tensor) -> tuple[int, ...]:
    return torch.empty(p.shape, device="meta").stride()
