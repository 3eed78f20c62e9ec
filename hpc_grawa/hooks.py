"""The ends of backward passes, heard of by hooks of the parameters that they reach."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn


def after_backward(parameters: Sequence[nn.Parameter], function: Callable[[], None]) -> Callable[[], None]:
    """Call ``function`` at the end of every backward pass that reaches one of the parameters, if it ends well.

    Where a pass reaches the parameters of several calls, their functions are called in one order, the latest call's
    first, whatever order gradients came in. A pass within a pass (reentrant activation checkpointing) is a part of it.

    Returns:
        A function that takes it back.
    """
    listener = _Listener(function)

    def reached(_: Tensor) -> None:
        number = torch._C._current_graph_task_id()
        if number != listener.reached_by:
            listener.reached_by = number
            if number not in _reached:
                _reached[number] = WeakSet()
                torch.autograd.Variable._execution_engine.queue_callback(lambda: _ended(number))
            _reached[number].add(listener)

    handles = [p.register_post_accumulate_grad_hook(reached) for p in parameters]  # type: ignore[no-untyped-call]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


class _Listener:
    """Waits for the ends of backward passes; the number says who came first."""

    _count = itertools.count()

    def __init__(self, function: Callable[[], None]) -> None:
        self.function, self.number, self.reached_by = function, next(self._count), -1


#: Whom the passes under way have reached, by the passes' numbers; one that has failed never ends.
_reached: dict[int, WeakSet[_Listener]] = {}
#: Per thread, whom passes within the one under way have reached.
_within = threading.local()


def _ended(number: int) -> None:
    listeners = {*_reached.pop(number), *_within.__dict__.pop("listeners", ())}
    if torch._C._current_autograd_node() is not None:  # a node of another pass, which goes on, has made this one
        _within.listeners = listeners
        return
    for listener in sorted(listeners, key=lambda one: one.number, reverse=True):
        listener.function()
