"""A model's buffers: as they were after a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Within the block buffers may be changed, resized, replaced; afterwards the same tensors hold the same numbers."""
    held = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    try:
        yield
    finally:
        for module, own in held:
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in values:
                if buffer.shape != value.shape:
                    buffer.resize_(value.shape)
                buffer.copy_(value)
