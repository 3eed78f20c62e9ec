"""What a model keeps outside of parameters and buffers: attributes of its modules, and what is in them."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .buffers import put

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_RANDOM = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_MUTABLE = frozenset((*_CONTAINERS, *_RANDOM, np.ndarray, Tensor))
#: What ``nn.Module`` keeps itself.
_ITS_OWN = frozenset(nn.Module().__dict__)


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Within the block modules may change, replace and add attributes; afterwards all are as before, bit for bit.

    So is what lies in them, in lists, dicts, sets and deques too: arrays, plain tensors, and random generators.
    """
    before = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
    seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    undo = [
        step
        for _, then in before
        for name, value in then.items()
        if name not in _ITS_OWN
        for step in _undo(value, seen)
    ]
    try:
        yield
    finally:
        for now, then in before:
            restore(now, then)
        for step in undo:
            step()


def restore(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Give a dict its former items, without a write where nothing has changed."""
    for name in set(now.keys()) - then.keys():
        del now[name]
    for name, value in then.items():
        if name not in now or now[name] is not value:
            now[name] = value


def _undo(value: Any, seen: set[int]) -> Iterator[Callable[[], Any]]:
    """What gives ``value``, and all in it that can change, its present state again."""
    if type(value) not in _MUTABLE or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Generator):
        yield partial(value.set_state, value.get_state())
    elif isinstance(value, random.Random):
        yield partial(value.setstate, value.getstate())
    elif isinstance(value, np.random.Generator):
        yield partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
    elif isinstance(value, np.random.RandomState):
        yield partial(value.set_state, value.get_state())
    elif isinstance(value, np.ndarray):
        if value.flags.writeable:
            yield partial(np.copyto, value, value.copy())
    elif isinstance(value, Tensor):
        if value.layout == torch.strided and not value.is_nested:
            yield partial(put, value, value.detach().clone())
    else:
        yield partial(_refill, value, copy.copy(value))
        for child in value.values() if isinstance(value, dict) else value:
            yield from _undo(child, seen)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(content)


def with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    """By name the modules that say themselves what else ``state_dict`` holds of them (``get_extra_state``)."""
    own = nn.Module.get_extra_state
    return {name: module for name, module in model.named_modules() if type(module).get_extra_state is not own}
