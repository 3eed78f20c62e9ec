"""The interface of gradient sharing, and its null: each rank keeps its own gradient."""

from __future__ import annotations

from typing import Any

from torch import optim


class Aggregator:
    """Each rank steps with its own gradient.

    A step is ``zero_grad``, a backward pass for each part of the batch, before the last of them ``start``, and at the
    end ``finish``: only the last pass shares. The gradient may be clipped then, and ``complete`` is what comes after.

    Attributes:
        shares: whether ranks step with a gradient that they have in common.
    """

    shares = False

    @property
    def given(self) -> bool:
        """Whether gradients have come that are still to be shared."""
        return False

    def zero_grad(self, optimizer: optim.Optimizer) -> None:
        """Forget the gradient of the last step."""
        optimizer.zero_grad(set_to_none=True)

    def start(self) -> None:
        """The coming backward completes the gradient: it may be shared while it is computed."""

    def finish(self) -> None:
        """Return when every ``.grad`` is the gradient of the loss to step with."""

    def complete(self) -> None:
        """Add what is no gradient of the loss, and so is not clipped with it."""

    def close(self) -> None:
        """Share no more: take hooks off the parameters; sends nothing."""

    def settle(self) -> None:
        """The run ends: raise what was still to be found out about the last step."""

    def stepped(self) -> None:
        """The optimizer has stepped; raises ``RuntimeError`` if it did so with gradients that were to be shared."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank keeps between steps, such as the part of its gradients that is still to be sent."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, right after it was built."""
