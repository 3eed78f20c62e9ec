"""The interface of codecs: what a bucket of the gradient becomes on its way to other ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
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
        absent: at ``launch``, which of ``tensors`` (by place) have no gradient on this rank, and count as zero.
    """

    comm: Communicator
    numbers: Sequence[int]
    tensors: Sequence[int]
    span: slice
    gradient: Tensor
    views: Sequence[Tensor]
    message: Tensor
    absent: list[int] = field(default_factory=list)


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
    #: Whether it must ``inspect`` a step's whole gradient before the first bucket leaves; none leaves from a hook then.
    whole: bool = False
    #: Whether gradients may be shared once a step only, as each time counts as a step in what it keeps.
    once: bool = False

    def prepare(self, buckets: Sequence[Bucket]) -> None:  # noqa: B027 - most keep nothing
        """Make what is kept for these buckets, which are all that will come."""

    def inspect(self, gradient: Tensor) -> None:  # noqa: B027
        """Look at this rank's whole gradient ``[P]``, in its own dtype, if it is to be ``whole``."""

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

    def close(self) -> None:  # noqa: B027
        """Gradients are shared no more: give back what was taken over from others."""
