"""The gradient of a fresh batch at a model's parameters, taken so that nothing of it remains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import attributes, buffers, random_streams
from ..forward import NoDropout, eagerly
from ..hooks import gradients_aside
from ..vector import ParameterVector

#: Returns the loss (0-d tensor) of a fresh batch, or yields losses of its parts, whose gradients add up. One that has a
#: method ``set_round(number)`` is told before which of the run's rounds it is for.
Probe = Callable[[], Tensor | Iterable[Tensor]]


class Counted:
    """A probe that counts the rounds it is called for: those of groups and of all ranks, so that none draws alike.

    Args:
        probe: called for a loss.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._set_round: Callable[[int], None] = getattr(probe, "set_round", lambda number: None)
        #: Rounds that it was called for.
        self.taken = 0

    def __call__(self) -> Tensor | Iterable[Tensor]:
        return self._probe()

    def begin_round(self) -> int:
        """The number of the round that the next calls are for, from 0 on."""
        number, self.taken = self.taken, self.taken + 1
        self._set_round(number)
        return number


def probe_gradient(
    vector: ParameterVector, probe: Probe, batches: int = 1, seed: Sequence[int] = (0,)
) -> tuple[Tensor | None, ...]:
    """The mean gradient of ``batches`` calls of ``probe()`` at the current parameters, leaving no trace.

    Loss after loss is computed by the model itself and taken back at once, as in training, but without dropout and
    gradient hooks, uncompiled, and with random streams of their own. Afterwards parameters, ``.grad``, buffers,
    modules' attributes and random streams are what they were, bit for bit.

    Args:
        vector: the parameters.
        probe: called ``batches`` times.
        batches: how many.
        seed: of the random streams.

    Returns:
        One gradient per parameter tensor, None where the losses do not depend on it.

    Raises:
        ValueError: a loss is no number, or depends on no parameter.
    """
    own = set(vector.parameters)
    with (
        random_streams.seeded(*seed),
        _as_it_was(vector.model),
        gradients_aside(vector.parameters),
        eagerly(),
        _no_cached_casts(),
        NoDropout(),
        torch.enable_grad(),
    ):
        for _ in range(batches):
            losses = probe()
            for loss in losses if isinstance(losses, Iterator | list | tuple) else (losses,):
                check_loss(loss, "probe()", "a fresh batch")
                with gradients_aside(_leaves(loss) - own):
                    torch.autograd.backward(loss, torch.full_like(loss, 1 / batches))
        return tuple(p.grad for p in vector.parameters)


def check_loss(loss: object, giver: str, batch: str) -> None:
    """Raise ``ValueError``, which names the giver and its batch, unless a backward pass can begin at the loss."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"{giver} gave {found}: it must return the loss of {batch}, a tensor of one number")
    if not loss.requires_grad:
        raise ValueError(
            f"{giver} gave a loss that depends on no trainable parameter: compute it with gradients on (no "
            f"torch.no_grad(), no detach(), no item())"
        )


def _leaves(loss: Tensor) -> set[Tensor]:
    """The tensors whose ``.grad`` a backward pass of ``loss`` adds to."""
    found: set[Tensor] = set()
    first: Any = torch.autograd.graph.get_gradient_edge(loss).node
    seen, ahead = {first}, [first]
    while ahead:
        node = ahead.pop()
        if node.name() == "torch::autograd::AccumulateGrad":
            found.add(node.variable)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        ahead.extend(new)
    return found


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Within the block a model may change and replace what it holds; afterwards all is as before, bit for bit.

    Forward passes change more than buffers: embeddings with ``max_norm`` renormalise parameters, tables are made anew
    and their sizes noted in attributes, and a model may draw from generators of its own.
    """
    with buffers.values_kept(model.parameters()), buffers.kept(model.modules()), attributes.kept(model):
        yield


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Autocast keeps casts of parameters, with their graphs; none passes the borders of the block."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
