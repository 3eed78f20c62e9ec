"""Gradients as signs, one bit each, and a few numbers that say how large they are."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..comm import Work
from .codec import Bucket
from .packed import ErrorFeedback
from .wires import as_message, as_parts


def packed(bits: Tensor) -> Tensor:
    """Bits ``[n]`` of bool as bytes ``[⌈n/8⌉]``, the first of a byte its lowest."""
    eights = pad(bits.view(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    packed = eights[:, 0].clone()
    for place in range(1, 8):
        packed |= eights[:, place] << place
    return packed


def bits_of_bytes(like: Tensor) -> Tensor:
    """The bits of all bytes, as numbers 0 and 1 ``[256, 8]``: ``bits_of_bytes(x)[bytes.int()]`` undoes ``packed``."""
    bytes_, places = (torch.arange(n, dtype=torch.uint8, device=like.device) for n in (256, 8))
    return ((bytes_[:, None] >> places) & 1).to(like.dtype)


class _Signs(ErrorFeedback):
    """p̂ = low where p < 0, else high, of p = g + e, with two such levels for each row of entries; e ← p - p̂."""

    #: Numbers that tell a row's levels.
    numbers: int

    @abstractmethod
    def _rows(self, data: Tensor) -> Tensor:
        """Tensors of one shape ``[B, *shape]`` as rows ``[R, n]``, each with levels of its own."""

    @abstractmethod
    def _measure(self, p: Tensor, above: Tensor) -> Tensor:
        """What tells the levels of rows ``[R, n]``: ``[R, numbers]``, not finite where an entry of the row is not.

        ``above`` is 1 where p ≥ 0, else 0.
        """

    @abstractmethod
    def _levels(self, measured: Tensor) -> tuple[Tensor, Tensor]:
        """From ``[R, numbers]`` the levels low and high, ``[R, 1]`` each."""

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        super().prepare(buckets)
        self._bits = bits_of_bytes(buckets[0].gradient)

    def launch(self, bucket: Bucket) -> Work:
        kept, exact = self._kept[bucket], self._exact[bucket]
        kept.add_gradients()
        exact.take_gradients()
        bits = kept.data >= 0
        rows = [self._rows(group.data) for group in kept.groups]
        above = self._of_groups(bits.to(kept.data.dtype), rows)
        measured = [self._measure(*pair) for pair in zip(rows, above, strict=True)]
        message = as_message([exact.data, *(values.flatten() for values in measured), packed(bits)])
        work = bucket.comm.allgather(message, "gradient", bucket.numbers[0])
        for p, signs, values in zip(rows, above, measured, strict=True):
            low, high = self._levels(values)
            p.sub_(signs.mul_(high - low).add_(low))
        return work

    def land(self, bucket: Bucket, work: Work) -> None:
        kept, exact, ranks = self._kept[bucket], self._exact[bucket], bucket.comm.size
        rows = [self._rows(group.data) for group in kept.groups]
        counts = [len(exact.data), *(len(p) * self.numbers for p in rows)]
        kinds = [(count, exact.data.dtype) for count in counts]
        exacts, *measured, bytes_ = as_parts(work.wait(), [*kinds, (-(-len(kept.data) // 8), torch.uint8)])
        exact.data.copy_(exacts.sum(0).mul_(1 / ranks))
        exact.become_gradients()
        sums = [torch.zeros_like(p) for p in rows]
        for m in range(ranks):
            above = self._bits.index_select(0, bytes_[m].int()).flatten()[: len(kept.data)]
            for total, signs, values in zip(sums, self._of_groups(above, rows), measured, strict=True):
                low, high = self._levels(values[m].view(-1, self.numbers))
                total.add_(signs.mul_(high - low).add_(low))
        for total, group in zip(sums, kept.groups, strict=True):
            torch._foreach_copy_(group.gradients, total.mul_(1 / ranks).view(group.data.shape).unbind())

    @staticmethod
    def _of_groups(packed: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
        """Numbers in the order of ``Packed.data``, in the shapes of these rows."""
        pieces = torch.split(packed, [p.numel() for p in rows]) if rows else ()
        return [piece.view(p.shape) for piece, p in zip(pieces, rows, strict=True)]


class OneBit(_Signs):
    """Of each row of a matrix ``[out, rest]`` the mean of entries ≥ 0 and that of those below; vectors exactly."""

    numbers = 2

    def _compresses(self, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2

    def _rows(self, data: Tensor) -> Tensor:
        return data.view(len(data) * data.shape[1], math.prod(data.shape[2:]))

    def _measure(self, p: Tensor, above: Tensor) -> Tensor:
        count = above.sum(1)
        low = p.clamp(max=0).sum(1) / (p.shape[1] - count).clamp(min=1)
        high = p.clamp(min=0).sum(1) / count.clamp(min=1)
        return torch.stack((low, high), 1)

    def _levels(self, measured: Tensor) -> tuple[Tensor, Tensor]:
        return measured[:, :1], measured[:, 1:]


class ScaledSigns(_Signs):
    """Of each tensor the mean of |p|, with the sign of p; that of 0 is +."""

    numbers = 1

    def _compresses(self, shape: tuple[int, ...]) -> bool:
        return True

    def _rows(self, data: Tensor) -> Tensor:
        return data.view(len(data), math.prod(data.shape[1:]))

    def _measure(self, p: Tensor, above: Tensor) -> Tensor:
        return p.abs().mean(1, keepdim=True)

    def _levels(self, measured: Tensor) -> tuple[Tensor, Tensor]:
        return -measured, measured
