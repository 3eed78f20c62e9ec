"""Models that their first forward pass completes: lazy parameters, and buffers that are made on demand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import is_lazy

from . import random_streams
from .buffers import put


def unfinished(model: nn.Module) -> str | None:
    """The first parameter or buffer that has no shape yet; None where all have one."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return next((name for name, tensor in named if is_lazy(tensor)), None)


@contextmanager
def completing(model: nn.Module) -> Iterator[None]:
    """Within the block the model may be completed; beside that nothing of its forward passes remains.

    What gets its shape there, or another one, keeps it and its values. All else has its values again, bit for bit, and
    random streams stand where they stood.
    """
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if not is_lazy(buffer)}
    try:
        with random_streams.kept():
            yield
    finally:
        for name, buffer in model.named_buffers():
            own = kept.get(name)
            if own is not None and (own.shape, own.dtype) == (buffer.shape, buffer.dtype):
                put(buffer, own)
