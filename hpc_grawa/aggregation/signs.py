"""Gradients as signs, one bit each, and a few numbers that say how large they are."""

from __future__ import annotations

import math
from abc import abstractmethod

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
    return eights.bitwise_left_shift(_places(bits.device)).sum(1, dtype=torch.uint8)


def unpacked(bytes_: Tensor, n: int) -> Tensor:
    """Of ``packed`` bytes the bits ``[n]``."""
    return bytes_[:, None].bitwise_right_shift(_places(bytes_.device)).bitwise_and_(1).view(torch.bool).flatten()[:n]


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


class _Signs(ErrorFeedback):
    """p̂ = low where p < 0, else high, of p = g + e, with two such levels for each row of entries; e ← p - p̂."""

    #: Numbers that tell a row's levels.
    numbers: int

    @abstractmethod
    def _rows(self, data: Tensor) -> Tensor:
        """Tensors of one shape ``[B, *shape]`` as rows ``[R, n]``, each with levels of its own."""

    @abstractmethod
    def _measure(self, rows: Tensor) -> Tensor:
        """What tells the levels of rows ``[R, n]``: ``[R, numbers]``, not finite where an entry of the row is not."""

    @abstractmethod
    def _levels(self, measured: Tensor) -> tuple[Tensor, Tensor]:
        """From ``[R, numbers]`` the levels low and high, ``[R, 1]`` each."""

    def launch(self, bucket: Bucket) -> Work:
        kept, exact = self._kept[bucket], self._exact[bucket]
        kept.add_gradients()
        exact.take_gradients()
        rows = [self._rows(group.data) for group in kept.groups]
        measured = [self._measure(p) for p in rows]
        message = as_message([exact.data, *(values.flatten() for values in measured), packed(kept.data >= 0)])
        work = bucket.comm.allgather(message, "gradient", bucket.numbers[0])
        for p, values in zip(rows, measured, strict=True):
            low, high = self._levels(values)
            p.sub_(torch.where(p >= 0, high, low))
        return work

    def land(self, bucket: Bucket, work: Work) -> None:
        kept, exact, ranks = self._kept[bucket], self._exact[bucket], bucket.comm.size
        rows = [self._rows(group.data) for group in kept.groups]
        counts = [len(exact.data), *(len(p) * self.numbers for p in rows)]
        kinds = [(count, exact.data.dtype) for count in counts]
        exacts, *measured, bytes_ = as_parts(work.wait(), [*kinds, (-(-len(kept.data) // 8), torch.uint8)])
        exact.data.copy_(exacts.sum(0).mul_(1 / ranks))
        exact.become_gradients()
        means = [torch.zeros_like(p) for p in rows]
        for m in range(ranks):
            signs = torch.split(unpacked(bytes_[m], len(kept.data)), [p.numel() for p in rows]) if rows else ()
            for mean, sign, values in zip(means, signs, measured, strict=True):
                low, high = self._levels(values[m].view(-1, self.numbers))
                mean.add_(torch.where(sign.view(mean.shape), high, low))
        for mean, group in zip(means, kept.groups, strict=True):
            torch._foreach_copy_(group.gradients, mean.mul_(1 / ranks).view(group.data.shape).unbind())


class OneBit(_Signs):
    """Of each row of a matrix ``[out, rest]`` the mean of entries ≥ 0 and that of those below; vectors exactly."""

    numbers = 2

    def _compresses(self, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2

    def _rows(self, data: Tensor) -> Tensor:
        return data.view(len(data) * data.shape[1], math.prod(data.shape[2:]))

    def _measure(self, rows: Tensor) -> Tensor:
        above = (rows >= 0).sum(1, dtype=rows.dtype)
        low = rows.clamp(max=0).sum(1) / (rows.shape[1] - above).clamp(min=1)
        high = rows.clamp(min=0).sum(1) / above.clamp(min=1)
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

    def _measure(self, rows: Tensor) -> Tensor:
        return rows.abs().mean(1, keepdim=True)

    def _levels(self, measured: Tensor) -> tuple[Tensor, Tensor]:
        return -measured, measured
