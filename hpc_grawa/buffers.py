"""A model's buffers: as they were after a block, and one set for all ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .comm import Communicator
from .errors import ConfigError


@contextmanager
def kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block buffers that the modules hold themselves may be changed, resized, replaced.

    Afterwards the same tensors hold the same numbers.
    """
    held = [(module, dict(module._buffers)) for module in modules]
    tensors = {id(t): t for _, own in held for t in own.values() if t is not None}
    with values_kept(tensors.values()):
        try:
            yield
        finally:
            for module, own in held:
                module._buffers.clear()
                module._buffers.update(own)


@contextmanager
def values_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within the block tensors may be changed and resized; afterwards they hold the same numbers, bit for bit."""
    values = [(t, t.detach().clone()) for t in tensors if not is_lazy(t)]
    try:
        yield
    finally:
        for t, value in values:
            if t.shape != value.shape:
                t.resize_(value.shape)
            put(t, value)


def put(own: Tensor, value: Tensor) -> None:
    """Write a value of the same shape into a tensor, which graphs that a caller keeps do not take for a change."""
    own = own.data
    if own.layout == torch.strided and not own.is_nested:  # of a tensor expanded by stride 0 one copy can be written
        once = tuple(slice(1 if n > 1 and step == 0 else n) for n, step in zip(own.shape, own.stride(), strict=True))
        own, value = own[once], value[once]
    own.copy_(value)


@contextmanager
def shared(model: nn.Module, comm: Communicator) -> Iterator[None]:
    """Within the block the model has one rank's buffers and frozen parameters: the lowest rank's where none is NaN.

    Buffers, of whatever shapes, stay so (see ``kept``). Frozen parameters are sent only where ranks differ; afterwards
    they are this rank's own again. All ranks must enter it. Two small gathers, and one message of bytes.
    """
    if comm.size == 1:
        yield
        return
    held, frozen = state(model), list(frozen_parameters(model).values())
    tensors = [t for t in held.values() if t is not None]
    sound = not any(bool(t.isnan().any()) for t in (*tensors, *frozen) if t.is_floating_point())
    kinds = {k: None if t is None else (list(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in held.items()}
    message = json.dumps([sound, kinds, [checksum(p) for p in frozen]]).encode()
    said = [json.loads(message) for message in comm.gather_bytes(message, "evaluate")]
    root = next((rank for rank, (whole, _, _) in enumerate(said) if whole), 0)
    sums = zip(*(own for _, _, own in said), strict=True)
    apart = [p for p, own in zip(frozen, sums, strict=True) if len(set(own)) > 1]
    given = {k: kind and (getattr(torch, kind[1]), torch.Size(kind[0])) for k, kind in said[root][1].items()}
    sizes = [kind[0].itemsize * kind[1].numel() if kind else 0 for kind in given.values()]
    sizes += [p.dtype.itemsize * p.numel() for p in apart]
    with values_kept(apart):
        if sum(sizes):
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=next(model.parameters()).device)
            if comm.rank == root:
                torch.cat([as_bytes(t).to(flat.device) for t in (*tensors, *apart)], out=flat)
            comm.broadcast(flat, root, "evaluate").wait()
            pieces = torch.split(flat, sizes)
            for (name, kind), piece in zip(given.items(), pieces[: len(given)], strict=True):
                _put(model, name, from_bytes(piece, *kind) if kind else None)
            for p, piece in zip(apart, pieces[len(given) :], strict=True):
                put(p, from_bytes(piece, p.dtype, p.shape))
        yield


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name those that no optimizer trains; a model may change them itself (momentum encoders, mean teachers)."""
    return {name: p for name, p in model.named_parameters() if not p.requires_grad and not is_lazy(p)}


def checksum(t: Tensor) -> int:
    """Σ j³·(column j) + Σ i³·(row i) over a tensor's bits, laid out as a square of integers, whose sums may overflow.

    Others of the same shape have it, but for chance, only if they are the same bit for bit. It makes no copy.
    """
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(t.dtype.itemsize, torch.int64)
    bits = _in_a_row(t).view(whole)
    side = max(math.isqrt(len(bits)), 1)
    square, rest = torch.tensor_split(bits, [len(bits) // side * side])
    square = square.view(-1, side)
    sums = torch.cat((square.sum(0, dtype=whole), square.sum(1, dtype=whole), rest)).long()
    return int((sums * torch.arange(1, len(sums) + 1, device=sums.device) ** 3).sum())


def check_kinds(model: nn.Module) -> None:
    """Raise ``ConfigError`` if a parameter or buffer is of a kind that has no bytes to send, or cannot be written."""
    for what, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, t in named:
            if (found := None if is_lazy(t) else _odd(t)) is not None:
                raise ConfigError(f"{what} '{name}' is {found[0]}, which ranks cannot share: {found[1]}")


def _odd(t: Tensor) -> tuple[str, str] | None:
    """What kind of tensor it is, if not a usual one, and what to do."""
    parts = "register {} instead, and make it of them in forward()"
    if t.is_nested:
        return "a nested tensor", parts.format("its values() and offsets()")
    if t.layout == torch.sparse_coo:
        return "sparse (COO)", parts.format("its indices() and values()")
    if t.layout != torch.strided:
        return f"of layout {t.layout}", parts.format("the dense tensors that it is made of")
    if t.is_quantized:
        return f"quantized ({t.dtype})", parts.format("its int_repr(), scales and zero points")
    if is_traceable_wrapper_subclass(t):
        return f"a {type(t).__name__}", parts.format("the plain tensors that it is made of")
    if t.is_inference():
        return "a tensor of inference mode", "register a clone() of it, made outside of inference mode"
    return None


def state(model: nn.Module) -> dict[str, Tensor | None]:
    """All buffers of the model by name, None where there is none yet."""
    return {
        f"{path}.{name}".removeprefix("."): None if buffer is None else buffer.detach()
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is None or not is_lazy(buffer)
    }


def load_state(model: nn.Module, state: dict[str, Tensor | None]) -> None:
    """Take over what ``state`` gave of the same model, from whatever device, also where shapes have changed since."""
    for name, value in state.items():
        _put(model, name, value)


def _put(model: nn.Module, name: str, value: Tensor | None) -> None:
    path, _, name = name.rpartition(".")
    held = model.get_submodule(path)._buffers
    own = held.get(name)
    if own is not None and value is not None and (own.shape, own.dtype) == (value.shape, value.dtype):
        put(own, value)
    else:
        held[name] = None if value is None else value.to(next(model.parameters()).device, copy=True)


def as_bytes(t: Tensor) -> Tensor:
    """The bytes ``[n]`` of a tensor, uint8."""
    return _in_a_row(t).view(torch.uint8)


def _in_a_row(t: Tensor) -> Tensor:
    return t.detach().resolve_conj().resolve_neg().contiguous().flatten()


def from_bytes(message: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """What ``as_bytes`` was given."""
    return message.clone().view(dtype).view(shape)
