"""Which example a rank sees at which step: pure functions of (seed, rank, step), nothing to replay or to save.

All draws come from NumPy's ``SeedSequence`` and the raw words of ``PCG64``, which its compatibility policy fixes for
good (``Generator.permutation`` may change): the same on every platform and release, independent of any global state.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, require, wrong

#: ``disjoint``: fixed shards; ``reshuffled``: a new disjoint partition each epoch, as ``DistributedSampler`` gives;
#: ``full``: each rank its own permutations of everything; ``fraction``: a fixed random subset per rank, drawn by
#: (seed, rank) from everything: two ranks share about p²·N examples, and all W together see about (1 - (1-p)^W)·N.
Split = Literal["disjoint", "reshuffled", "full", "fraction"]

Index = NDArray[np.int64]

# One stream of random bits per purpose.
_SHARD, _ORDER, _AUGMENT, _PROBE, _HELD_OUT = range(5)


def _words(count: int, seed: int, *stream: int) -> NDArray[np.uint64]:
    return np.asarray(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)).random_raw(count))


def _permutation(size: int, seed: int, *stream: int) -> Index:
    return np.argsort(_words(size, seed, *stream), kind="stable").astype(np.int64, copy=False)


def _draw(size: int, count: int, seed: int, *stream: int) -> Index:
    """``count`` of ``size`` numbers without replacement in O(count): Fisher-Yates on a sparse array."""
    moved: dict[int, int] = {}
    drawn = np.empty(count, np.int64)
    for i, word in enumerate(_words(count, seed, *stream).tolist()):
        j = i + word % (size - i)
        drawn[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return drawn


def shard_size(size: int, batch_size: int, world_size: int, split: Split = "disjoint", fraction: float = 1.0) -> int:
    """Examples that the rank with the fewest sees per pass over its shard.

    Args:
        size: examples in the training set, N.
        batch_size: examples per rank and step.
        world_size: ranks, W.
        split: how they share the examples.
        fraction: of the examples that a rank keeps, in (0, 1]; used by the split ``fraction`` alone.

    Raises:
        ConfigError: a batch does not fit into the shard, or a value is impossible.
    """
    require(split in get_args(Split), "data.split", repr(split), f"one of {', '.join(get_args(Split))}")
    require(0 < fraction <= 1, "data.fraction", fraction, "in (0, 1]")
    if fraction != 1 and split != "fraction":
        raise wrong("data.fraction", fraction, f"only data.split fraction has one, data.split is {split}")
    require(batch_size >= 1, "data.batch_size", batch_size, "1 or more examples per rank")
    shard = {"full": size, "fraction": round(fraction * size)}.get(split, size // world_size)
    if batch_size > shard:
        raise wrong(
            "data.batch_size",
            batch_size,
            f"must be at most {shard}, the examples in a rank's shard "
            f"(split {split}, {size} examples, {world_size} ranks)",
        )
    return shard


class Sampler:
    """An endless stream of full batches, of which any can be had without the ones before.

    A rank's positions ``step·B, ..., step·B + B - 1`` run through permutations of its shard drawn by (seed, epoch),
    across the seams. In the split ``reshuffled`` the ranks deal one common stream among themselves like cards, so every
    N consecutive positions of it, an epoch, hold every example once; shards differ in size by at most one.

    An epoch is N examples of all ranks together under every split, so that budgets, schedules and evaluations in epochs
    mean the same work. In one a rank goes once through its shard (``disjoint``), through a W-th of everything
    (``full``), or 1/(W·p) times through its fraction p.

    Args:
        size: examples in the training set, N.
        batch_size: examples per rank and step, B.
        rank: of this process.
        world_size: ranks, W.
        seed: of all draws.
        split: how the ranks share the examples.
        fraction: of the examples that a rank keeps, in (0, 1]; used by the split ``fraction`` alone.

    Raises:
        ConfigError: a batch does not fit into the shard, or a value is impossible.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        split: Split = "disjoint",
        fraction: float = 1.0,
    ) -> None:
        """Draws the shard; the permutations follow when they are needed."""
        shard = shard_size(size, batch_size, world_size, split, fraction)
        self.size, self.batch_size, self.rank, self.world_size, self.seed = size, batch_size, rank, world_size, seed
        self.split, self.fraction = split, fraction
        if split == "disjoint":
            self._shard = np.sort(_permutation(size, seed, _SHARD)[rank::world_size])
        elif split == "fraction":
            self._shard = np.sort(_permutation(size, seed, _SHARD, rank)[:shard])
        else:
            self._shard = np.arange(size)
        common = split == "reshuffled"
        self._stream, self._first, self._stride = (0, rank, world_size) if common else (rank, 0, 1)
        self._orders: dict[int, Index] = {}

    def __str__(self) -> str:
        least, most = self.size // self.world_size, math.ceil(self.size / self.world_size)
        own = f"{least:,}" if least == most else f"{least:,} or {most:,}"
        return {
            "disjoint": f"disjoint: each rank keeps {own} examples, which no other has",
            "reshuffled": f"reshuffled: each epoch gives each rank another {own} examples, which no other gets in it",
            "full": "full: each rank goes through all examples, in an order of its own",
            "fraction": f"fraction {self.fraction:g}: each rank keeps {len(self._shard):,} examples, which others may "
            "have too",
        }[self.split]

    @property
    def steps_per_epoch(self) -> int:
        """⌈N/(W·B)⌉, the same on all ranks."""
        return math.ceil(self.size / (self.world_size * self.batch_size))

    @property
    def shard(self) -> Tensor:
        """The examples that this rank may see, ascending ``[n]``; all of them where the split is no fixed one."""
        return torch.from_numpy(self._shard)

    def indices(self, step: int) -> Tensor:
        """The examples ``[B]`` (int64) of this rank's batch number ``step``."""
        position = np.arange(step * self.batch_size, (step + 1) * self.batch_size) * self._stride + self._first
        epoch, place = np.divmod(position, len(self._shard))
        order = [self._order(e)[place[epoch == e]] for e in range(epoch[0], epoch[-1] + 1)]
        return torch.from_numpy(self._shard[np.concatenate(order)])

    def generator(self, step: int) -> torch.Generator:
        """A fresh generator for the augmentation of this rank's batch number ``step``."""
        (word,) = _words(1, self.seed, _AUGMENT, self.rank, step).tolist()
        return torch.Generator().manual_seed(word >> 1)

    def probe_indices(self, round: int, batches: int = 1, source: Literal["all", "shard"] = "all") -> Tensor:
        """Fresh batches ``[batches, B]`` (int64) drawn by (seed, rank, round), no example twice.

        Args:
            round: number of the averaging round.
            batches: how many.
            source: the whole training set, or this rank's shard of it.

        Raises:
            ConfigError: there are not as many examples.
        """
        size = self.size if source == "all" else len(self._shard)
        count = batches * self.batch_size
        if not 0 < count <= size:
            raise ConfigError(f"{batches} batches of {self.batch_size} examples: must be 1 to {size} examples in all")
        drawn = _draw(size, count, self.seed, _PROBE, self.rank, round)
        chosen = drawn if source == "all" else self._shard[drawn]
        return torch.from_numpy(chosen).view(batches, self.batch_size)

    def _order(self, epoch: int) -> Index:
        if epoch not in self._orders:
            order = _permutation(len(self._shard), self.seed, _ORDER, self._stream, epoch)
            # A batch touches two epochs at most.
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) == 1} | {epoch: order}
        return self._orders[epoch]


def held_out(size: int, validation: int, seed: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Split ``range(size)`` into examples to train on and examples to validate on.

    Args:
        size: examples in all, N.
        validation: how many of them are held out, in [0, N).
        seed: of the draw.
        labels: classes ``[N]`` (non-negative integers); if given, each class is held out in proportion to its size
            (Webster's method).

    Returns:
        Ascending indices (int64) ``[N - validation]`` and ``[validation]``.

    Raises:
        ConfigError: validation is outside [0, N).
    """
    require(0 <= validation < size, "data.validation", validation, f"0 or more and below {size}, the training examples")
    order = _permutation(size, seed, _HELD_OUT)
    if labels is not None:
        drawn = labels.numpy()[order]
        counts = np.bincount(drawn)
        by_class = np.argsort(drawn, kind="stable")
        within_class = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
        order = order[by_class][np.argsort((within_class + 0.5) / np.repeat(counts, counts), kind="stable")]
    train, held = np.sort(order[validation:]), np.sort(order[:validation])
    return torch.from_numpy(train), torch.from_numpy(held)
