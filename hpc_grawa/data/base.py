"""What training asks of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..comm import Communicator
from ..errors import require
from ..nests import Nest
from .sharding import Sampler, Split, shard_size

CPU = torch.device("cpu")


class Examples(Protocol):
    """Examples that can be had by number, a batch at a time."""

    def __len__(self) -> int:
        """Number of examples, N."""

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Nest, Nest]:
        """Inputs and targets of the examples ``index`` ``[B]`` (int64): tensors ``[B, ...]``, or nests of them.

        The model gets the inputs as one argument, be they a tensor, a tuple, a list or a dict.
        With a generator they are augmented by its draws (training), without one they are as they are (evaluation).
        """


@runtime_checkable
class Ahead(Examples, Protocol):
    """Examples whose batches can be prepared, by threads say, while something else is computed."""

    def start(
        self, index: Tensor, generator: torch.Generator | None = None, device: torch.device = CPU
    ) -> Callable[[], tuple[Nest, Nest]]:
        """Begin to prepare a batch; what is returned waits for it and gives what ``batch`` would.

        It is going to be used on ``device``, and may already lie there.
        """


#: Batches that are prepared while one is used, unless examples say otherwise (``ahead``).
AHEAD = 2


def in_advance(
    examples: Examples, wanted: Iterable[tuple[Tensor, torch.Generator | None]], device: torch.device = CPU
) -> Iterator[tuple[Nest, Nest]]:
    """The batches of ``examples`` that are wanted, in order; where they can be, the next ones are prepared meanwhile.

    Args:
        examples: that the batches are of.
        wanted: index and generator of each batch; may be endless.
        device: that they are going to be used on; they need not lie there yet.
    """
    if not isinstance(examples, Ahead):
        yield from (examples.batch(index, generator) for index, generator in wanted)
        return
    ahead: int = getattr(examples, "ahead", AHEAD)
    begun: deque[Callable[[], tuple[Nest, Nest]]] = deque()
    for index, generator in wanted:
        begun.append(examples.start(index, generator, device))
        if len(begun) > ahead:
            yield begun.popleft()()
    while begun:
        yield begun.popleft()()


@dataclass(frozen=True)
class Splits:
    """What to train, validate and test on; no example is in two of them.

    Attributes:
        train: examples that gradients come from.
        validation: examples that choices are made by, or None.
        test: examples that results are reported on.
    """

    train: Examples
    validation: Examples | None
    test: Examples


@dataclass(kw_only=True)
class Data(ABC):
    """A data set and how ranks share it. A data set of your own says how large it is and how it is loaded.

    Attributes:
        batch_size: examples per rank and step.
        validation: training examples held out for validation; the same ones in every run.
        split: disjoint (fixed shards), reshuffled (a new disjoint partition each epoch), full (each rank sees
            everything) or fraction (each rank keeps a random subset). An epoch is as many examples as there are, of all
            ranks together.
        fraction: of the examples that a rank keeps under the split fraction, in (0, 1].
    """

    batch_size: int = 128
    validation: int = 0
    split: Split = "disjoint"
    fraction: float = 1.0

    @abstractmethod
    def size(self) -> int:
        """Training examples, those held out for validation included; cheap, without loading them."""

    @abstractmethod
    def load(self) -> Splits:
        """Read the examples into memory."""

    def train_size(self) -> int:
        """Training examples, N; cheap, without loading them."""
        return self.size() - self.validation

    def check(self, world_size: int) -> None:
        """Find impossible values without loading or communicating anything.

        Raises:
            ConfigError: the message names key, value and what is allowed.
        """
        size = self.size()
        require(0 <= self.validation < size, "data.validation", self.validation, f"0 to {size - 1} of {size} examples")
        shard_size(self.train_size(), self.batch_size, world_size, self.split, self.fraction)

    def sampler(self, rank: int, world_size: int, seed: int) -> Sampler:
        """The batches of one rank of ``world_size``, as indices into ``load().train``."""
        return Sampler(self.train_size(), self.batch_size, rank, world_size, seed, self.split, self.fraction)

    def near(self, splits: Splits, comm: Communicator, seed: int, say: Callable[[str], None]) -> Splits:
        """What ``load`` gave, where this rank reads it fastest; called by all ranks together before the clock starts.

        Args:
            splits: from ``load``.
            comm: the ranks.
            seed: of the run, from which ``sampler`` draws.
            say: prints a line, on rank 0.
        """
        return splits

    def prepare_model(self, model: nn.Module) -> None:  # noqa: B027 - most data ask nothing of a model
        """Bring a new model into the memory format of the inputs, where that matters."""

    def model_arguments(self) -> dict[str, object]:
        """Keyword arguments that the data settle, a vocabulary's size say; cheap, without loading the examples.

        A model gets those that it has a default for and was not given.
        """
        return {}

    def metric_arguments(self) -> dict[str, object]:
        """The same for a metric: the bytes that each token stands for, say."""
        return {}


@dataclass(kw_only=True)
class ImageData(Data):
    """A data set of labelled images.

    Attributes:
        channels_last: lay images out as ``torch.channels_last``, which convolutions prefer.
    """

    channels_last: bool = True

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width in pixels of what a model sees."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""

    def prepare_model(self, model: nn.Module) -> None:
        """Weights in ``torch.channels_last`` where the images are."""
        if self.channels_last:
            model.to(memory_format=torch.channels_last)

    def model_arguments(self) -> dict[str, object]:
        """``in_channels`` and ``num_classes``."""
        return {"in_channels": self.input_shape[0], "num_classes": len(self.classes)}
