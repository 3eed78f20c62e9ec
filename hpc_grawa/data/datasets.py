"""Map-style data sets of torch, or whatever else gives its examples by number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from ..errors import ConfigError, in_a_line, require
from ..nests import Nest
from ..random_streams import seeded
from .base import CPU, Data, Splits
from .sharding import held_out
from .workers import Workers, make_batch

#: Gives all examples: by the first form the parser takes a class and its settings, by the second any function.
Maker = Callable[[], Dataset[Any]] | Callable[[], Any]


@dataclass(kw_only=True)
class Datasets(Data):
    """Examples of map-style data sets, given by import path; batches are made by collate.

    Random numbers that an example or ``collate`` draws from torch, ``numpy.random`` or ``random`` come, in training,
    from streams of (seed, rank, step), and otherwise from a stream of the example: a resumed run sees what an
    uninterrupted one does. A generator that the data set keeps for itself it has to seed from one of these each time.

    Attributes:
        train: a class of data sets, whose settings follow (``--data.train.root``), or a function without arguments that
            returns one: what to train on.
        test: the same: what to test on.
        collate: list of examples → (inputs, targets); null: torch's ``default_collate``, examples being such pairs.
        workers: processes per rank that make batches; 0: the rank makes them itself.
        start_method: of these processes; both take what can be pickled. A fork would copy a rank in the midst of its
            communication.
    """

    train: Maker
    test: Maker
    collate: Callable[[list[Any]], Any] | None = None
    workers: int = 0
    start_method: Literal["forkserver", "spawn"] = "forkserver"

    def size(self) -> int:
        return len(self._train)

    def load(self) -> Splits:
        sets, collate = (self._train, self._test), self.collate or default_collate
        workers = Workers(self.workers, self.start_method, (*sets, collate)) if self.workers else None
        train, test = (
            DatasetExamples(found, collate, torch.arange(len(found)))
            if workers is None
            else AheadExamples(found, collate, torch.arange(len(found)), workers, which)
            for which, found in enumerate(sets)
        )
        if not self.validation:
            return Splits(train, None, test)
        kept, held = held_out(len(train), self.validation, seed=0)
        return Splits(train.subset(kept), train.subset(held), test)

    def check(self, world_size: int) -> None:
        require(self.workers >= 0, "data.workers", self.workers, "0 or more processes per rank")
        super().check(world_size)

    @cached_property
    def _train(self) -> Any:
        return self._made("train")

    @cached_property
    def _test(self) -> Any:
        return self._made("test")

    def _made(self, name: str) -> Any:
        try:
            with seeded(0):  # what it draws, a split say, is the same on all ranks
                found = getattr(self, name)()
            iterable = isinstance(found, IterableDataset)
            count = 0 if iterable else len(found)
        except Exception as error:  # what an own class raises is its own affair
            what = in_a_line(error, named=True)
            raise ConfigError(f"data.{name}: must make a data set that has a length; {what[:300]}") from error
        if iterable or not hasattr(found, "__getitem__"):
            raise ConfigError(
                f"data.{name} makes {type(found).__name__}: must be map-style (__len__, __getitem__), as ranks share "
                f"examples by number; make a list of what an IterableDataset gives, or an index of its records"
            )
        if not count:
            raise ConfigError(f"data.{name} makes {type(found).__name__}: must have at least one example")
        return found


class DatasetExamples:
    """Examples of a data set, made when they are asked for.

    Args:
        dataset: has ``__getitem__``.
        collate: list of examples → (inputs, targets).
        index: which of them to see ``[N]`` (int64).
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], index: Tensor) -> None:
        """Makes nothing."""
        self.dataset, self.collate, self.index = dataset, collate, index

    def __len__(self) -> int:
        """Number of examples, N."""
        return len(self.index)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Nest, Nest]:
        """What ``collate`` makes of the examples ``index``; the seed of the generator is that of all random streams."""
        numbers, seed = self._wanted(index, generator)
        return cast("tuple[Nest, Nest]", make_batch(self.dataset, self.collate, numbers, seed))

    def subset(self, index: Tensor) -> DatasetExamples:
        """The examples ``index`` of these."""
        return DatasetExamples(self.dataset, self.collate, self.index[index])

    def _wanted(self, index: Tensor, generator: torch.Generator | None) -> tuple[list[int], int | None]:
        return self.index[index].tolist(), None if generator is None else generator.initial_seed()


class AheadExamples(DatasetExamples):
    """The same, made by other processes meanwhile; bit for bit the same, too.

    Args:
        dataset: as above.
        collate: as above.
        index: as above.
        workers: who make them.
        which: the number of the data set, there.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], index: Tensor, workers: Workers, which: int
    ) -> None:
        super().__init__(dataset, collate, index)
        self._workers, self._which = workers, which
        #: Batches that are to be made while one is used.
        self.ahead = 2 * workers.count

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Nest, Nest]:
        """As ``start``, waited for."""
        return self.start(index, generator)()

    def start(
        self, index: Tensor, generator: torch.Generator | None = None, device: torch.device = CPU
    ) -> Callable[[], tuple[Nest, Nest]]:
        """Begin to make a batch; what is returned waits for it."""
        return self._workers.start(self._which, *self._wanted(index, generator))

    def subset(self, index: Tensor) -> AheadExamples:
        """The examples ``index`` of these, made by the same processes."""
        return AheadExamples(self.dataset, self.collate, self.index[index], self._workers, self._which)
