"""Sampling, held-out splits, augmentation, digits."""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpc_grawa.data import ArraySplit, Augmentation, Digits, Sampler, Split, held_out
from hpc_grawa.errors import ConfigError

SPLITS: tuple[tuple[Split, float], ...] = (("disjoint", 1.0), ("reshuffled", 1.0), ("full", 1.0), ("fraction", 0.3))
WORLDS = ((103, 4, 5), (64, 4, 16), (30, 1, 7), (17, 3, 5))  # N, W, B; N = 64 has no seam inside a batch


def samplers(size: int, world: int, batch: int, split: Split, fraction: float = 1.0, seed: int = 36) -> list[Sampler]:
    return [Sampler(size, batch, rank, world, seed, split, fraction) for rank in range(world)]


def stream(sampler: Sampler, positions: int) -> list[int]:
    """The first ``positions`` examples that a rank sees."""
    steps = -(-positions // sampler.batch_size)
    seen: list[int] = torch.cat([sampler.indices(step) for step in range(steps)]).tolist()
    return seen[:positions]


def epochs(seen: list[int], size: int) -> list[list[int]]:
    return [seen[i : i + size] for i in range(0, len(seen), size)]


@pytest.mark.parametrize(("size", "world", "batch"), WORLDS)
def test_disjoint_shards_partition_the_set_and_each_pass_sees_its_shard_once(size: int, world: int, batch: int) -> None:
    ranks = samplers(size, world, batch, "disjoint")
    shards = [sampler.shard.tolist() for sampler in ranks]
    assert sorted(i for shard in shards for i in shard) == list(range(size))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for sampler, shard in zip(ranks, shards, strict=True):
        passes = epochs(stream(sampler, 4 * len(shard)), len(shard))
        assert all(sorted(one) == shard for one in passes)
        assert all(one != next_one for one, next_one in pairwise(passes))


@pytest.mark.parametrize(("size", "world", "batch"), WORLDS)
def test_reshuffled_is_a_new_partition_in_every_epoch(size: int, world: int, batch: int) -> None:
    ranks = samplers(size, world, batch, "reshuffled")
    seen = [stream(sampler, 4 * size) for sampler in ranks]
    dealt = [(rank, seen[rank][turn]) for turn in range(4 * size) for rank in range(world)][: 4 * size]
    parts = []
    for start in range(0, 4 * size, size):
        epoch = dealt[start : start + size]
        assert sorted(example for _, example in epoch) == list(range(size))
        shares = [frozenset(example for r, example in epoch if r == rank) for rank in range(world)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        parts.append(tuple(shares))
    assert len(set(parts)) == (4 if world > 1 else 1)


@pytest.mark.parametrize(("size", "world", "batch"), WORLDS)
def test_full_gives_each_rank_its_own_permutations_of_everything(size: int, world: int, batch: int) -> None:
    passes = [tuple(one) for s in samplers(size, world, batch, "full") for one in epochs(stream(s, 3 * size), size)]
    assert all(sorted(one) == list(range(size)) for one in passes)
    assert len(set(passes)) == 3 * world


def test_fraction_gives_each_rank_a_fixed_random_subset() -> None:
    ranks = samplers(200, 4, 16, "fraction", 0.25)
    subsets = [tuple(sampler.shard.tolist()) for sampler in ranks]
    for sampler, subset in zip(ranks, subsets, strict=True):
        assert len(set(subset)) == 50 and set(subset) <= set(range(200))
        passes = epochs(stream(sampler, 150), 50)
        assert all(sorted(one) == list(subset) for one in passes) and passes[0] != passes[1]
    assert len(set(subsets)) == 4


@pytest.mark.parametrize(("split", "fraction"), SPLITS)
def test_any_batch_can_be_had_without_the_ones_before(split: Split, fraction: float) -> None:
    steps = 60
    sequential = Sampler(103, 5, 1, 4, 36, split, fraction)
    expected = [sequential.indices(step) for step in range(steps)]
    assert all(batch.shape == (5,) and batch.dtype == torch.int64 for batch in expected)
    jumping = Sampler(103, 5, 1, 4, 36, split, fraction)
    for step in np.random.default_rng(0).permutation(steps).tolist():
        assert torch.equal(jumping.indices(step), expected[step])
        assert torch.equal(Sampler(103, 5, 1, 4, 36, split, fraction).indices(step), expected[step])
    assert len(sequential._orders) <= 2
    assert Sampler(103, 5, 1, 4, 36, split, fraction).indices(10**9).shape == (5,)


@pytest.mark.parametrize(("split", "fraction"), SPLITS)
def test_draws_depend_on_seed_and_rank_and_on_no_global_state(split: Split, fraction: float) -> None:
    def draw(seed: int, rank: int) -> list[Any]:
        sampler = Sampler(103, 5, rank, 4, seed, split, fraction)
        augmentation = torch.rand(2, generator=sampler.generator(1)).tolist()
        return [sampler.indices(9).tolist(), sampler.probe_indices(2).tolist(), augmentation]

    expected = draw(36, 1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert draw(36, 1) == expected
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # type: ignore[index]
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    assert draw(36, 1) == expected
    for other in (draw(720, 1), draw(36, 2)):
        assert all(a != b for a, b in zip(other, expected, strict=True))


def test_draws_are_the_same_on_every_platform_and_release() -> None:
    sampler = Sampler(20, 4, 0, 2, seed=36)
    drawn = [sampler.indices(step).tolist() for step in range(3)]
    assert drawn == [[10, 1, 12, 9], [15, 14, 6, 11], [4, 13, 11, 14]]
    assert sampler.probe_indices(0).tolist() == [[1, 13, 19, 9]]


@pytest.mark.parametrize(("split", "fraction"), SPLITS)
@pytest.mark.parametrize(("size", "world", "batch"), WORLDS)
def test_an_epoch_has_as_many_steps_on_all_ranks_and_under_every_split(
    size: int, world: int, batch: int, split: Split, fraction: float
) -> None:
    batch = min(batch, round(0.3 * size))
    (steps,) = {sampler.steps_per_epoch for sampler in samplers(size, world, batch, split, fraction)}
    assert (steps - 1) * world * batch < size <= steps * world * batch


def test_fractions_of_two_ranks_are_drawn_apart() -> None:
    """Two shares of p have p² in common, four together see 1 - (1-p)⁴: within 5 standard deviations."""
    shares = [set(s.shard.tolist()) for s in samplers(4000, 4, 1, "fraction", 0.25)]
    for i, one in enumerate(shares):
        assert all(abs(len(one & other) - 250) < 5 * 12 for other in shares[i + 1 :])
    assert abs(len(set().union(*shares)) - 4000 * (1 - 0.75**4)) < 5 * 20


@pytest.mark.parametrize("world", [1, 3])
def test_a_fraction_of_everything_is_full(world: int) -> None:
    for one, other in zip(samplers(103, world, 5, "fraction"), samplers(103, world, 5, "full"), strict=True):
        assert all(torch.equal(one.indices(step), other.indices(step)) for step in range(60))


@pytest.mark.parametrize("split", ["disjoint", "reshuffled", "full"])
def test_only_the_split_fraction_has_a_fraction(split: Split) -> None:
    message = rf"data\.fraction is 0\.5: only data\.split fraction has one, data\.split is {split}"
    with pytest.raises(ConfigError, match=message):
        Sampler(103, 5, 0, 4, 36, split, 0.5)


@pytest.mark.parametrize(
    ("split", "fraction", "said"),
    [
        ("disjoint", 1.0, "disjoint: each rank keeps 25 or 26 examples, which no other has"),
        ("reshuffled", 1.0, "reshuffled: each epoch gives each rank another 25 or 26 examples, which no other gets "),
        ("full", 1.0, "full: each rank goes through all examples, in an order of its own"),
        ("fraction", 0.3, "fraction 0.3: each rank keeps 31 examples, which others may have too"),
    ],
)
def test_a_split_says_what_each_rank_gets(split: Split, fraction: float, said: str) -> None:
    assert {str(s)[: len(said)] for s in samplers(103, 4, 5, split, fraction)} == {said}


def test_probes_are_fresh_draws_without_replacement() -> None:
    sampler = Sampler(103, 5, 2, 4, seed=36)
    rounds = [sampler.probe_indices(k, batches=3) for k in range(200)]
    assert all(drawn.shape == (3, 5) and len(drawn.unique()) == 15 for drawn in rounds)
    assert len({tuple(drawn.flatten().tolist()) for drawn in rounds}) == 200
    # Each example is drawn 200 * 15 / 103 = 29 times on average, with standard deviation 5, by the whole set's odds.
    counts = torch.bincount(torch.cat([drawn.flatten() for drawn in rounds]), minlength=103)
    assert len(counts) == 103 and counts.min() > 5 and counts.max() < 55
    assert sampler.probe_indices(0, batches=20).unique().numel() == 100
    own = [sampler.probe_indices(k, source="shard").flatten() for k in range(100)]
    assert torch.equal(torch.cat(own).unique(), sampler.shard)
    with pytest.raises(ConfigError, match=r"21 batches of 5 .* 103"):
        sampler.probe_indices(0, batches=21)


@pytest.mark.parametrize(
    ("split", "fraction", "shard"),
    [("disjoint", 1.0, 25), ("reshuffled", 1.0, 25), ("full", 1.0, 103), ("fraction", 0.1, 10)],
)
def test_a_batch_may_be_as_large_as_the_smallest_shard_and_no_larger(split: Split, fraction: float, shard: int) -> None:
    Sampler(103, shard, 3, 4, 36, split, fraction)
    with pytest.raises(ConfigError, match=rf"data\.batch_size is {shard + 1}: must be at most {shard}"):
        Sampler(103, shard + 1, 0, 4, 36, split, fraction)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("validation", [0, 1, 17, 99])
def test_held_out_examples_are_a_part_of_the_set(validation: int, labelled: bool) -> None:
    labels = torch.from_numpy(np.random.default_rng(1).choice(5, 100, p=[0.5, 0.2, 0.15, 0.1, 0.05]))
    train, held = held_out(100, validation, seed=0, labels=labels if labelled else None)
    assert len(held) == validation
    assert sorted(train.tolist() + held.tolist()) == list(range(100))
    again, _ = held_out(100, validation, seed=0, labels=labels if labelled else None)
    other, _ = held_out(100, validation, seed=1, labels=labels if labelled else None)
    assert torch.equal(train, again)
    assert torch.equal(train, other) == (validation == 0)
    if labelled:
        due = torch.bincount(labels) * validation / 100
        assert (torch.bincount(labels[held], minlength=5) - due).abs().max() <= 1


@pytest.mark.parametrize("validation", [-1, 100])
def test_an_impossible_held_out_size_is_named(validation: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.validation is {validation}"):
        held_out(100, validation, seed=0)


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
AUGMENTATIONS = (
    Augmentation(),
    Augmentation(flip=True),
    Augmentation(padding=4),
    Augmentation(flip=True, padding=4, crop=32),
    Augmentation(flip=True, crop=28),
    Augmentation(flip=True, padding=2, crop=20),
)


def images(count: int = 40, side: tuple[int, int] = (32, 32)) -> ArraySplit:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (count, 3, *side), dtype=torch.uint8, generator=generator)
    return ArraySplit(pixels, torch.randint(10, (count,), generator=generator), MEAN, STD)


def augmented(split: ArraySplit, augmentation: Augmentation, channels_last: bool = False) -> ArraySplit:
    return ArraySplit(split.images, split.labels, MEAN, STD, augmentation, channels_last)


def normalised(pixels: Tensor) -> Tensor:
    """In float64, by definition."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.double() / 255 - mean) / std


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("side", [(32, 32), (32, 40)])
def test_augmentation_equals_the_one_image_at_a_time(
    augmentation: Augmentation, channels_last: bool, side: tuple[int, int]
) -> None:
    split = images(side=side)
    index = torch.randint(40, (64,), generator=torch.Generator().manual_seed(1))
    inputs, labels = augmented(split, augmentation, channels_last).batch(index, torch.Generator().manual_seed(2))

    draws, pad = torch.Generator().manual_seed(2), augmentation.padding
    tall, wide = (augmentation.crop or s for s in side)
    choices = (1 + augmentation.flip, side[0] + 2 * pad - tall + 1, side[1] + 2 * pad - wide + 1)
    flips, tops, lefts = (torch.randint(n, (64, 1), generator=draws).flatten().tolist() for n in choices)
    for i, (flip, top, left) in enumerate(zip(flips, tops, lefts, strict=True)):
        image = split.images[index[i]].numpy()
        image = image[:, :, ::-1] if flip else image
        image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))[:, top : top + tall, left : left + wide]
        expected = normalised(torch.from_numpy(image.copy()))
        torch.testing.assert_close(inputs[i].double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(labels, split.labels[index])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert inputs.dtype == torch.float32 and inputs.is_contiguous(memory_format=layout)


def test_augmentation_reaches_every_window_and_flips_half() -> None:
    side = 6
    ramp = torch.arange(1, side * side + 1, dtype=torch.uint8).view(1, 1, side, side)
    split = ArraySplit(ramp, torch.zeros(1, dtype=torch.int64), [0.0], [1 / 255], Augmentation(True, 1, side))
    inputs, _ = split.batch(torch.zeros(2000, dtype=torch.int64), torch.Generator().manual_seed(0))
    centers = inputs[:, 0, 2:4, 2:4].round().int()  # never padding
    flipped = centers[:, 0, 0] > centers[:, 0, 1]
    assert abs(flipped.float().mean().item() - 0.5) < 5 * 0.5 / 2000**0.5
    seen = centers.flatten(1).unique(dim=0)
    assert len(seen) == 2 * 3 * 3


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_without_a_generator_images_are_as_they_are(augmentation: Augmentation, channels_last: bool) -> None:
    split = images()
    index = torch.tensor([3, 3, 39, 0])
    inputs, labels = augmented(split, augmentation, channels_last).batch(index)
    edge = (32 - (augmentation.crop or 32)) // 2
    expected = normalised(split.images[index][:, :, edge : 32 - edge, edge : 32 - edge])
    torch.testing.assert_close(inputs.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(labels, split.labels[index])


def test_batches_leave_images_and_global_streams_alone() -> None:
    split = augmented(images(), Augmentation(flip=True, padding=4))
    before, state = split.images.clone(), torch.get_rng_state()
    split.batch(torch.arange(40), torch.Generator().manual_seed(0))
    split.batch(torch.arange(40))
    assert torch.equal(split.images, before) and torch.equal(torch.get_rng_state(), state)


def test_a_subset_shares_the_images() -> None:
    whole = augmented(images(), Augmentation(flip=True, padding=4))
    part = whole.subset(torch.tensor([30, 5, 12])).subset(torch.tensor([2, 0]))
    assert len(part) == 2 and part.images.data_ptr() == whole.images.data_ptr()
    assert torch.equal(part.labels, whole.labels[[12, 30]])
    for seed in (None, 3):
        draws = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
        for mine, theirs in zip(
            part.batch(torch.tensor([0, 1]), draws[0]), whole.batch(torch.tensor([12, 30]), draws[1]), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_arrays_that_do_not_fit_are_refused() -> None:
    pixels, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="uint8"):
        ArraySplit(pixels.float(), labels, MEAN, STD)
    with pytest.raises(ValueError, match="3 labels"):
        ArraySplit(pixels, labels[:3], MEAN, STD)
    with pytest.raises(ValueError, match="crop is 9"):
        ArraySplit(pixels, labels, MEAN, STD, Augmentation(padding=4, crop=9))


def test_digits() -> None:
    data = Digits(validation=137)
    data.check(world_size=4)
    loaded = data.load()
    assert loaded.validation is not None
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (1300, 137, 360)
    assert data.train_size() == 1300 and data.input_shape == (1, 8, 8)
    assert data.model_arguments() == {"in_channels": 1, "num_classes": 10}
    inputs, labels = loaded.train.batch(data.sampler(0, 4, seed=36).indices(0))
    assert inputs.shape == (32, 1, 8, 8) and labels.shape == (32,)


def test_digits_are_split_by_classes_and_normalised() -> None:
    datasets = pytest.importorskip("sklearn.datasets").load_digits()
    loaded = Digits().load()
    parts = [split.batch(torch.arange(len(split))) for split in (loaded.train, loaded.test)]
    every = torch.bincount(torch.from_numpy(datasets.target))
    for (_, labels), count in zip(parts, (1437, 360), strict=True):
        assert (torch.bincount(labels) - every * count / 1797).abs().max() <= 1
    std, mean = torch.std_mean(parts[0][0].double(), correction=0)
    assert abs(mean) < 1e-6 and abs(std - 1) < 1e-6
    # The two parts together are the 1,797 originals: 17 grey levels, each image once.
    levels = torch.cat([inputs for inputs, _ in parts]).flatten(1)
    low, high = levels.min(), levels.max()
    recovered = ((levels - low) / (high - low) * 16).round().numpy()
    assert sorted(map(tuple, recovered)) == sorted(map(tuple, datasets.data))


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for attempt in (Digits().load, lambda: Digits().check(1)):
        with pytest.raises(ConfigError, match=r"scikit-learn.*\[demo\]"):
            attempt()


def test_a_batch_larger_than_the_shard_of_digits_is_found_early() -> None:
    Digits(batch_size=359).check(world_size=4)
    with pytest.raises(ConfigError, match=r"data\.batch_size is 360: must be at most 359"):
        Digits(batch_size=360).check(world_size=4)
