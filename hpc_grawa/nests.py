"""Inputs and targets of any shape: tensors, and tuples, lists, dicts and dataclasses of them, nested at will.

A nest's leaves are tensors (also ragged ones: ``PackedSequence``, ``torch.nested``), whatever else has a method ``to``
for devices (a graph, say), and texts, numbers and None, which stay as they are.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

Nest = Any

_PLAIN = (str, bytes, bool, int, float, complex, type(None))


def mapped(function: Callable[[Any], Any], nest: Nest) -> Nest:
    """The same nest, of the same types, with ``function`` of every leaf.

    Example:
        >>> mapped(len, {"words": ["a", "nest"], "pair": ("of", "texts")})
        {'words': [1, 4], 'pair': (2, 5)}
    """
    children = _children(nest)
    return function(nest) if children is None else _like(nest, [mapped(function, child) for child in children])


def moved(nest: Nest, device: torch.device) -> Nest:
    """The nest on ``device``; to a GPU by way of page-locked memory, from where the copy does not stop the host.

    Raises:
        TypeError: a leaf is of a type that is not moved.
    """

    def move(leaf: Any) -> Any:
        if isinstance(leaf, _PLAIN):
            return leaf
        if not hasattr(leaf, "to"):
            raise TypeError(f"{kind(leaf)} is in it: must be tensors, or tuples, lists and dicts of tensors")
        if isinstance(leaf, Tensor | PackedSequence):
            tensor = leaf if isinstance(leaf, Tensor) else leaf.data
            dense = tensor.layout == torch.strided and not tensor.is_nested
            if device.type == "cuda" and tensor.device.type == "cpu" and dense:
                leaf = leaf.pin_memory()
            return leaf.to(device, non_blocking=True)
        return leaf.to(device)

    return mapped(move, nest)


def parts(batch: tuple[Nest, Nest], length: int, count: int) -> list[tuple[Nest, Nest]]:
    """Cut inputs and targets of ``length`` examples into ``count`` batches, one after the other.

    Cut are tensors of that length along dimension 0, and lists and tuples of that many items, one per example; what has
    another length belongs to every example, and goes to all parts.

    Raises:
        TypeError: a leaf that cannot be cut.

    Example:
        >>> parts(({"x": torch.arange(4), "scale": 2.0}, ["a", "b", "c", "d"]), 4, 2)
        [({'x': tensor([0, 1]), 'scale': 2.0}, ['a', 'b']), ({'x': tensor([2, 3]), 'scale': 2.0}, ['c', 'd'])]
    """
    inputs, targets = batch
    if count == 1:
        return [(inputs, targets)]
    return list(zip(_cut(inputs, length, count), _cut(targets, length, count), strict=True))


def _cut(nest: Nest, length: int, count: int) -> list[Nest]:
    size = length // count
    if isinstance(nest, PackedSequence):
        sequences = unpack_sequence(nest)
        any_order = nest.sorted_indices is not None
        return [pack_sequence(some, enforce_sorted=not any_order) for some in _cut(sequences, length, count)]
    if isinstance(nest, Tensor):
        if nest.dim() == 0 or nest.size(0) != length:
            return [nest] * count
        if nest.is_nested:
            return [
                torch.nested.as_nested_tensor(list(some), layout=nest.layout)
                for some in _cut(nest.unbind(), length, count)
            ]
        return list(torch.split(nest, size))
    if type(nest) in (list, tuple) and len(nest) == length:
        return [nest[first : first + size] for first in range(0, length, size)]
    children = _children(nest)
    if children:
        columns = zip(*(_cut(child, length, count) for child in children), strict=True)
        return [_like(nest, list(column)) for column in columns]
    if children is None and not isinstance(nest, _PLAIN):
        raise TypeError(f"{kind(nest)} cannot be cut")
    return [nest] * count


def same_shape(nest: Nest, other: Nest, whole: Nest) -> bool:
    """Whether a part that ``parts`` cut out of ``whole`` is like ``other``, the batch of these examples alone.

    Padding may differ; the lengths along dimension 0, and all of what was not cut, may not.
    """
    uncut = {id(leaf) for leaf in leaves(whole)}
    ours, theirs = leaves(nest), leaves(other)
    return len(ours) == len(theirs) and all(
        _outline(a, all_of_it=id(a) in uncut) == _outline(b, all_of_it=id(a) in uncut)
        for a, b in zip(ours, theirs, strict=True)
    )


def _outline(leaf: Any, all_of_it: bool) -> object:
    if isinstance(leaf, PackedSequence):
        return len(unpack_sequence(leaf))
    if isinstance(leaf, Tensor):
        return leaf.size(0) if leaf.is_nested else tuple(leaf.shape) if all_of_it else (leaf.dim(), leaf.shape[:1])
    return leaf if isinstance(leaf, _PLAIN) else type(leaf)


def kind(nest: Nest) -> str:
    """What it is, in a few words: shapes, types and keys.

    Example:
        >>> kind({"ids": torch.zeros(8, 5, dtype=torch.int64), "boxes": [torch.zeros(2, 4)] * 8, "mask": None})
        '{ids: [8, 5] (int64), boxes: [[2, 4] (float32), and 7 more], mask: None}'
    """
    if isinstance(nest, Tensor):
        ragged = ", nested" if nest.is_nested else ""
        shape = [nest.size(0)] if nest.is_nested else list(nest.shape)
        return f"{shape} ({str(nest.dtype).removeprefix('torch.')}{ragged})"
    children = _children(nest)
    if children is None:
        return "None" if nest is None else f"of type {type(nest).__name__}"
    names = _keys(nest)
    if names is None:
        shown = [kind(child) for child in children[: 4 if len(children) <= 4 else 1]]
    else:
        shown = [f"{name}: {kind(child)}" for name, child in list(zip(names, children, strict=True))[:6]]
    if len(children) > len(shown):
        shown.append(f"and {len(children) - len(shown)} more")
    brackets = "[]" if isinstance(nest, list) else "()" if names is None else "{}"
    return f"{brackets[0]}{', '.join(shown)}{brackets[1]}"


def leaves(nest: Nest) -> list[Any]:
    """All its leaves, in order."""
    children = _children(nest)
    return [nest] if children is None else [leaf for child in children for leaf in leaves(child)]


def _keys(nest: Nest) -> list[Any] | None:
    """What a nest names its children by; None where it does not, or is a leaf."""
    if isinstance(nest, Tensor | PackedSequence):
        return None
    if isinstance(nest, Mapping):
        return list(nest)
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        return [field.name for field in dataclasses.fields(nest) if hasattr(nest, field.name)]
    return list(nest._fields) if isinstance(nest, tuple) and hasattr(nest, "_fields") else None


def _children(nest: Nest) -> list[Nest] | None:
    """Its children; None for a leaf."""
    if isinstance(nest, Tensor | PackedSequence):
        return None
    if isinstance(nest, list | tuple):
        return list(nest)
    names = _keys(nest)
    if names is None:
        return None
    return [nest[name] if isinstance(nest, Mapping) else getattr(nest, name) for name in names]


def _like(nest: Nest, children: list[Nest]) -> Nest:
    """A nest of the same type and keys with these children."""
    if type(nest) in (list, tuple):
        return type(nest)(children)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        maker: Any = type(nest)
        return maker._make(children)  # whatever its constructor asks for
    if isinstance(nest, list | tuple):
        return (list if isinstance(nest, list) else tuple)(children)
    named = dict(zip(_keys(nest) or (), children, strict=True))
    if not isinstance(nest, Mapping):
        new = copy.copy(nest)
        for name, child in named.items():
            object.__setattr__(new, name, child)  # whether frozen or not
        return new
    if not hasattr(nest, "__setitem__"):
        return named
    if isinstance(nest, dict | UserDict) or hasattr(nest, "__copy__"):
        new = copy.copy(nest)  # keeps what a constructor would ask for
    else:  # a copy would share with it what it keeps its children in
        new = copy.deepcopy(nest, {id(nest[name]): child for name, child in named.items()})
    for name, child in named.items():
        new[name] = child
    return new
