"""Numbers as bytes, and the mean gradient in numbers of 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..comm import Work
from .codec import Bucket, Codec


def as_message(parts: Sequence[Tensor]) -> Tensor:
    """Tensors ``[n]`` of any dtypes, one after another as bytes."""
    return torch.cat([part.view(torch.uint8) for part in parts])


def as_parts(rows: Tensor, kinds: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """What ``as_message`` has joined on each rank: of bytes ``[W, n]`` the parts ``[W, count]``, for (count, dtype)."""
    sizes = [count * dtype.itemsize for count, dtype in kinds]
    # Copied, as numbers must begin at a multiple of their size.
    parts = [part.clone(memory_format=torch.contiguous_format).flatten() for part in torch.split(rows, sizes, 1)]
    return [part.view(dtype).view(len(rows), count) for part, (count, dtype) in zip(parts, kinds, strict=True)]


class ReducedWire(Codec):
    """g ← q((1/W) Σ_m q(g_m)) with q the rounding to a dtype of 16 bits: each rank sums a part, then all gather them.

    No backend need add in that dtype, or know it: it travels as bytes. Sums are made in fp32 at least. What overflows
    is infinite on all ranks.
    """

    messages = 2

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def launch(self, bucket: Bucket) -> Work:
        ranks = bucket.comm.size
        whole = pad(bucket.gradient.to(self._dtype), (0, -len(bucket.gradient) % ranks))
        rows = whole.view(torch.uint8).view(ranks, 2 * len(whole) // ranks)
        return bucket.comm.alltoall(rows, "gradient", bucket.numbers[0])

    def follow(self, bucket: Bucket, work: Work) -> Work:
        ranks = bucket.comm.size
        numbers = work.wait().flatten().view(self._dtype).to(bucket.gradient.dtype)
        mean = numbers.view(ranks, len(numbers) // ranks).sum(0).mul_(1 / ranks).to(self._dtype)
        return bucket.comm.allgather(mean.view(torch.uint8), "gradient", bucket.numbers[1])

    def land(self, bucket: Bucket, work: Work) -> None:
        bucket.gradient.copy_(work.wait().flatten().view(self._dtype)[: len(bucket.gradient)])
