"""The global random streams: torch's, that of the current GPU, NumPy's, and ``random``'s."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Streams = tuple[Any, ...]


def streams() -> Streams:
    """Where every stream stands."""
    # Not where no GPU is in use: to ask would wake it.
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), np.random.get_state(), random.getstate(), device


def set_streams(found: Streams) -> None:
    """Put every stream where it stood."""
    torch.set_rng_state(found[0])
    np.random.set_state(found[1])
    random.setstate(found[2])
    if found[3] is not None:
        torch.cuda.set_rng_state(found[3])


@contextmanager
def kept() -> Iterator[None]:
    """Within the block random numbers may be drawn; afterwards every stream stands where it stood."""
    found = streams()
    try:
        yield
    finally:
        set_streams(found)


@contextmanager
def seeded(seed: int, *key: int) -> Iterator[None]:
    """Within the block every stream is that of (seed, *key); afterwards each stands where it stood."""
    first, second, *words = np.random.SeedSequence(seed % 2**64, spawn_key=key).generate_state(12).tolist()
    with kept():
        torch.default_generator.manual_seed(first << 32 | second)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed(first << 32 | second)
        np.random.seed(words)
        random.seed(second << 32 | first)
        yield


def packed(found: Streams) -> Streams:
    """As tensors and numbers, which a checkpoint may hold."""
    name, words, *rest = found[1]
    return found[0], (name, torch.from_numpy(words.astype(np.int64)), *rest), found[2], found[3]


def unpacked(found: Streams) -> Streams:
    """What ``packed`` was given."""
    name, words, *rest = found[1]
    return found[0], (name, words.numpy().astype(np.uint32), *rest), found[2], found[3]
