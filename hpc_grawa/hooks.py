"""Gradient hooks: to be told where backward passes end, and switched off while gradients are taken aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn


def after_backward(parameters: Sequence[nn.Parameter], function: Callable[[], None]) -> set[int]:
    """Call ``function`` at the end of every backward pass that reaches one of the parameters, if it ends well.

    Passes within a pass (reentrant checkpointing makes them) are parts of it.

    Returns:
        The numbers of the parameters reached so far; the caller empties it.
    """
    reached: set[int] = set()
    # Held by the engine as long as their pass lives, so a pass that has failed leaves none behind.
    ends: WeakValueDictionary[int, Callable[[], None]] = WeakValueDictionary()

    def reach(i: int, _: Tensor) -> None:
        reached.add(i)
        number = torch._C._current_graph_task_id()
        if number not in ends:

            def end() -> None:
                del ends[number]
                if not ends:
                    function()

            ends[number] = end
            torch.autograd.Variable._execution_engine.queue_callback(end)

    for i, p in enumerate(parameters):
        p.register_post_accumulate_grad_hook(partial(reach, i))  # type: ignore[no-untyped-call]
    return reached


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
