"""Gradient hooks: to be told where backward passes end, and switched off while gradients are taken aside."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakMethod, WeakValueDictionary

import torch
from torch import Tensor, nn


def gradient_hooks(parameters: Iterable[Tensor], method: Callable[[int, Tensor], None]) -> list[Any]:
    """Handles of hooks that call ``method(i, p)`` once ``p.grad`` of the i-th parameter is there.

    They do not keep the method's owner alive: it holds the parameters, and no garbage collection finds a cycle that
    leads through such hooks.
    """
    owner = WeakMethod(method)

    def call(i: int, p: Tensor) -> None:
        if (found := owner()) is not None:
            found(i, p)

    return [p.register_post_accumulate_grad_hook(partial(call, i)) for i, p in enumerate(parameters)]  # type: ignore[no-untyped-call]


class AfterBackward:
    """As long as it lives, calls ``function`` at the end of backward passes that reach a parameter, if they end well.

    Where a pass reaches the parameters of several of these, their functions are called in one order, that of the latest
    made first, whatever order gradients came in. A pass within a pass (reentrant checkpointing) is a part of it.

    Args:
        parameters: to be reached.
        function: to be called.

    Attributes:
        reached: the numbers of the parameters reached so far; for the owner to empty.
    """

    _count = itertools.count()

    def __init__(self, parameters: Sequence[nn.Parameter], function: Callable[[], None]) -> None:
        self.function, self.number = function, next(self._count)
        self.reached: set[int] = set()
        self._handles = gradient_hooks(parameters, self._reach)

    def _reach(self, i: int, _: Tensor) -> None:
        self.reached.add(i)
        _told_at_its_end().add(self)

    def close(self) -> None:
        """Hear of no further pass."""
        for handle in self._handles:
            handle.remove()


class _Pass(set[AfterBackward]):
    """Whom a backward pass under way has reached."""

    def end(self, number: int) -> None:
        del _passes[number]
        node = torch._C._current_autograd_node()
        if node is None:
            for one in sorted(self, key=lambda one: one.number, reverse=True):
                one.function()
            return
        # The node is another pass's, which goes on and need not reach any of the parameters by itself.
        handle: Any = None

        def within(*_: object) -> None:
            handle.remove()
            _told_at_its_end().update(self)

        handle = node.register_hook(within)


#: By their numbers. The engine holds them as long as they live, so one that fails, and never ends, leaves none behind.
_passes: WeakValueDictionary[int, _Pass] = WeakValueDictionary()


def _told_at_its_end() -> _Pass:
    """Of the pass under way, in a hook."""
    number = torch._C._current_graph_task_id()
    found = _passes.get(number)
    if found is None:
        found = _passes[number] = _Pass()
        torch.autograd.Variable._execution_engine.queue_callback(partial(found.end, number))
    return found


@contextmanager
def gradients_aside(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Within the block the leaves have no gradients and no gradient hooks; afterwards their own again.

    Hooks on their ``AccumulateGrad`` nodes are off, too.
    """
    with ExitStack() as stack:
        for leaf in leaves:
            node = torch.autograd.graph.get_gradient_edge(leaf).node
            stack.callback(setattr, leaf, "grad", leaf.grad)
            leaf.grad = None
            for hooks in (leaf._backward_hooks, getattr(leaf, "_post_accumulate_grad_hooks", None), *_hooks_of(node)):
                if hooks:
                    stack.callback(hooks.update, dict(hooks))
                    hooks.clear()
        yield


def _hooks_of(node: Any) -> Iterator[dict[int, Any]]:
    """The dicts that hold a node's hooks, which a handle of one more hook knows."""
    for register in (node.register_hook, node.register_prehook):
        handle = register(print)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        yield hooks
