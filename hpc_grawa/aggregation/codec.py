"""The interface of codecs: what a bucket of the gradient becomes on its way to other ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..comm import Communicator, Work


@dataclass(frozen=True, eq=False)
class Bucket:
    """Whole tensors of the gradient that leave together; the same object at every step.

    Attributes:
        comm: the ranks that share.
        numbers: tell its messages apart, one each.
        tensors: which these are of the vector's, from the last to the first.
        span: where they lie in a vector ``[P]``.
        gradient: their part of the gradient, in fp32 at least: this rank's at ``launch``, after ``land`` what ranks
            step with.
        views: of ``gradient``, each in its parameter's shape, in the order of ``tensors``.
        message: ``gradient``, in the last bucket of a codec that sums with the flags before it.
    """

    comm: Communicator
    numbers: Sequence[int]
    tensors: Sequence[int]
    span: slice
    gradient: Tensor
    views: Sequence[Tensor]
    message: Tensor


class Codec(ABC):
    """What a bucket is on the wire: ``launch``, for each further message ``follow``, then ``land``.

    All ranks call it alike, ``launch`` perhaps from a gradient hook. It sends what it likes of a bucket by
    ``bucket.comm``, each message with the next of ``bucket.numbers``, and never waits for another bucket's.
    ``bucket.gradient`` is its own from ``launch`` to ``land``, which must leave the same bits there on all ranks.
    """

    #: Messages of a bucket, each of which needs what the one before has brought.
    messages: int = 1
    #: Whether it sums ``bucket.message`` as it is, so that flags may ride there. Else they travel by themselves.
    sums: bool = False

    @abstractmethod
    def launch(self, bucket: Bucket) -> Work:
        """Send a bucket's first message."""

    def follow(self, bucket: Bucket, work: Work) -> Work:
        """Send the message that needs what ``work`` brings; called ``messages - 1`` times."""
        raise NotImplementedError(f"{type(self).__name__} sends {self.messages} messages a bucket, and has no follow()")

    @abstractmethod
    def land(self, bucket: Bucket, work: Work) -> None:
        """Make ``bucket.gradient`` what ranks step with, from what the last message brings.

        It must not be finite where a rank's gradient was not, so that all ranks see it.
        """

    def reset(self) -> None:  # noqa: B027 - most keep nothing
        """Forget what was kept of gradients: one was not finite, and all ranks skip its step."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank keeps between steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take over what ``state_dict`` gave, from whatever device, right after it was built."""
