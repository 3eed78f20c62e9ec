"""Gradients as products of thin matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..comm import Work
from .codec import Bucket
from .packed import ErrorFeedback, Group, Packed


class LowRank(ErrorFeedback):
    """M̂ = P Q̄ᵀ of M = G + e: P = orthonormal(mean of MQ), then Q̄ = mean of MᵀP, one step of power iteration.

    At full rank P is of M itself, so that all of it is sent whatever was before.

    Args:
        rank: r, of a matrix n × m at most min(n, m).
        min_compression: a matrix is compressed where this many times r(n + m) is less than nm.
        waits: whether the coming step still shares the plain mean.
    """

    messages = 2

    def __init__(self, rank: int, min_compression: float, waits: Callable[[], bool]) -> None:
        self._rank, self._min_compression, self._waits = rank, min_compression, waits
        #: Of each bucket what it sends first, [P of all matrices | exact tensors], and then, [Q of all matrices].
        self._first: dict[Bucket, Tensor] = {}
        self._second: dict[Bucket, Tensor] = {}
        #: Of each bucket and group of B matrices: P [B, n, r] and Q [B, m, r] in these.
        self._factors: dict[Bucket, list[tuple[Tensor, Tensor]]] = {}

    def _size_of(self, shape: Sequence[int]) -> tuple[int, int, int]:
        n, m = shape[0], math.prod(shape[1:])
        return n, m, min(self._rank, n, m)

    def _compresses(self, shape: tuple[int, ...]) -> bool:
        if len(shape) < 2:
            return False
        n, m, r = self._size_of(shape)
        return self._min_compression * r * (n + m) < n * m

    def _place_of_exact(self, bucket: Bucket, kept: Packed, others: Sequence[int]) -> Tensor:
        sizes = [(len(group.tensors), *self._size_of(group.data.shape[1:])) for group in kept.groups]
        thin = [b * n * r for b, n, _, r in sizes]
        exact = sum(bucket.views[k].numel() for k in others)
        first = self._first[bucket] = bucket.gradient.new_zeros(sum(thin) + exact)
        second = self._second[bucket] = bucket.gradient.new_zeros(sum(b * m * r for b, _, m, r in sizes))
        *ps, rest = torch.split(first, [*thin, exact])
        qs = torch.split(second, [b * m * r for b, _, m, r in sizes]) if sizes else ()
        self._factors[bucket] = [
            (p.view(b, n, r), q.view(b, m, r)) for p, q, (b, n, m, r) in zip(ps, qs, sizes, strict=True)
        ]
        return rest

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        super().prepare(buckets)
        self._seed()

    def _groups(self, bucket: Bucket) -> list[tuple[Group, Tensor, Tensor, Tensor]]:
        """Of each group: itself, M [B, n, m], P and Q."""
        pairs = zip(self._kept[bucket].groups, self._factors[bucket], strict=True)
        return [(group, group.data.view(*group.data.shape[:2], q.shape[1]), p, q) for group, (p, q) in pairs]

    def _seed(self) -> None:
        for bucket in self._buckets:
            for group, _, _, q in self._groups(bucket):
                for row, i in zip(q, group.tensors, strict=True):
                    row.copy_(torch.from_numpy(np.random.default_rng(i).standard_normal(row.shape)))

    def launch(self, bucket: Bucket) -> Work:
        if self._waits():
            return bucket.comm.allreduce(bucket.gradient, "gradient", bucket.numbers[0])
        self._kept[bucket].add_gradients()
        self._exact[bucket].take_gradients()
        for _, m, p, q in self._groups(bucket):
            if p.shape == m.shape:  # Q is that of the gradient before, which may have been zero
                p.copy_(m)
            else:
                torch.bmm(m, q, out=p)
        return bucket.comm.allreduce(self._first[bucket], "gradient", bucket.numbers[0])

    def follow(self, bucket: Bucket, work: Work) -> Work:
        if self._waits() or not self._factors[bucket]:
            return work
        work.wait().mul_(1 / bucket.comm.size)
        for _, m, p, q in self._groups(bucket):
            # Householder's columns are orthonormal and finite also where P has lost rank, or is zero.
            p.copy_(torch.linalg.qr(p).Q)
            torch.bmm(m.mT, p, out=q)
            m.baddbmm_(p, q.mT, alpha=-1)
        return bucket.comm.allreduce(self._second[bucket], "gradient", bucket.numbers[1])

    def land(self, bucket: Bucket, work: Work) -> None:
        work.wait().mul_(1 / bucket.comm.size)
        if self._waits():
            return
        for group, _, p, q in self._groups(bucket):
            torch._foreach_copy_(group.gradients, torch.bmm(p, q.mT).view(group.data.shape).unbind())
        self._exact[bucket].become_gradients()

    def reset(self) -> None:
        super().reset()
        self._seed()

    def state_dict(self) -> dict[str, Any]:
        groups = (group for bucket in self._buckets for group in self._groups(bucket))
        q = {i: row for group, _, _, rows in groups for i, row in zip(group.tensors, rows, strict=True)}
        return {**super().state_dict(), "q": q}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for bucket in self._buckets if state else ():
            for group, _, _, q in self._groups(bucket):
                for row, i in zip(q, group.tensors, strict=True):
                    row.copy_(state["q"][i])
