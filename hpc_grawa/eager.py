"""Compiled modules run as they were written where somebody watches what they do."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def eagerly() -> AbstractContextManager[Any]:
    """Within the block what is compiled runs uncompiled: hooks and modes would be compiled out, or in."""
    # Nothing is compiled where nobody has imported the compiler, and to import it takes seconds.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
