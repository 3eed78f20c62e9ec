"""Tensors of a bucket side by side, and codecs that keep what they have not sent of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codec import Bucket, Codec


class Group(NamedTuple):
    """Tensors of one shape.

    Attributes:
        data: ``[B, *shape]``.
        gradients: the bucket's views ``[*shape]`` of the B tensors.
        tensors: which they are of the vector's.
    """

    data: Tensor
    gradients: list[Tensor]
    tensors: list[int]


class Packed:
    """Some tensors of a bucket in one buffer, contiguous whatever their memory format, those of one shape together.

    Args:
        bucket: theirs.
        places: of the tensors in the bucket's.
        data: the buffer ``[n]``; None for a new one.
    """

    def __init__(self, bucket: Bucket, places: Sequence[int], data: Tensor | None = None) -> None:
        shapes = [tuple(view.shape) for view in bucket.views]
        places = sorted(places, key=lambda k: shapes[k])
        self.gradients = [bucket.views[k] for k in places]
        sizes = [gradient.numel() for gradient in self.gradients]
        self.data = bucket.gradient.new_zeros(sum(sizes)) if data is None else data
        pieces = zip(torch.split(self.data, sizes), self.gradients, strict=True) if sizes else ()
        self.views = [piece.view(gradient.shape) for piece, gradient in pieces]
        self.groups: list[Group] = []
        start = 0
        for shape, same in groupby(places, key=lambda k: shapes[k]):
            members = list(same)
            stop = start + sum(bucket.views[k].numel() for k in members)
            data = self.data[start:stop].view(len(members), *shape)
            self.groups.append(Group(data, [bucket.views[k] for k in members], [bucket.tensors[k] for k in members]))
            start = stop
        self._start = bucket.span.start - bucket.gradient.storage_offset()

    def add_gradients(self) -> None:
        if self.views:
            torch._foreach_add_(self.views, self.gradients)

    def take_gradients(self) -> None:
        if self.views:
            torch._foreach_copy_(self.views, self.gradients)

    def become_gradients(self) -> None:
        if self.views:
            torch._foreach_copy_(self.gradients, self.views)

    def within(self, vector: Tensor) -> list[Tensor]:
        """Where the tensors are in a vector ``[P]``, laid out as the gradient is."""
        start = self._start + vector.storage_offset()
        return [vector.as_strided(g.shape, g.stride(), start + g.storage_offset()) for g in self.gradients]


class ErrorFeedback(Codec):
    """A codec that compresses some tensors, and adds to the next gradient what it has not sent of this one.

    The others it shares exactly.
    """

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self._size = max(bucket.span.stop for bucket in buckets)
        #: What this rank has still to send; from ``launch`` on with the gradient.
        self._kept: dict[Bucket, Packed] = {}
        self._exact: dict[Bucket, Packed] = {}
        for bucket in buckets:
            chosen = [k for k, view in enumerate(bucket.views) if self._compresses(tuple(view.shape))]
            others = [k for k in range(len(bucket.views)) if k not in chosen]
            self._kept[bucket] = Packed(bucket, chosen)
            self._exact[bucket] = Packed(bucket, others, self._place_of_exact(bucket, self._kept[bucket], others))

    @abstractmethod
    def _compresses(self, shape: tuple[int, ...]) -> bool:
        """Whether tensors of this shape are compressed."""

    def _place_of_exact(self, bucket: Bucket, kept: Packed, others: Sequence[int]) -> Tensor | None:
        """The buffer of tensors that are shared exactly; None for one of their own."""
        return None

    def reset(self) -> None:
        for kept in self._kept.values():
            kept.data.zero_()

    def state_dict(self) -> dict[str, Any]:
        residual = self._buckets[0].gradient.new_zeros(self._size)
        for kept in self._kept.values():
            if kept.views:
                torch._foreach_copy_(kept.within(residual), kept.views)
        return {"residual": residual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:  # of a run that has kept nothing yet
            return
        residual = state["residual"].to(self._buckets[0].gradient)
        for kept in self._kept.values():
            if kept.views:
                torch._foreach_copy_(kept.views, kept.within(residual))
