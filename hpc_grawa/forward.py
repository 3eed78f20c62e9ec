"""Forward passes beside those of training: uncompiled, without dropout, in a mode, and so that nothing remains."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import attributes, buffers, random_streams
from .comm import Communicator

Precision = Literal["fp32", "bf16"]


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """bf16 where a layer profits from it, over fp32 parameters; nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block all modules are in eval mode; afterwards each in its own again."""
    with _modes_kept(model):
        model.eval()
        yield


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Within the block all modules are in the modes they train in: those they have, if the model is in training mode.

    Otherwise ``model.train()`` says which. Afterwards each is in its own again.
    """
    with _modes_kept(model):
        if not model.training:
            model.train()
        yield


@contextmanager
def undisturbed(model: nn.Module, comm: Communicator | None = None) -> Iterator[None]:
    """Within the block buffers and attributes may change and random numbers be drawn; afterwards all are as before.

    With ``comm`` the model begins the block with one set of buffers and frozen parameters on all ranks, see
    ``buffers.shared``; ``ConfigError`` if one is of a kind that ranks cannot share.
    """
    if comm is not None:
        buffers.check_kinds(model)
    one_set = nullcontext() if comm is None else buffers.shared(model, comm)
    with random_streams.kept(), attributes.kept(model), buffers.kept(model.modules()), one_set:
        yield


def eagerly() -> AbstractContextManager[Any]:
    """Within the block what is compiled runs uncompiled: hooks and modes would be compiled out, or in."""
    # Nothing is compiled where nobody has imported the compiler, and to import it takes seconds.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _unchecked(function: Any) -> Any:
    """A copy of a function of torch's that does not look for modes."""
    checks = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda _: False)
    return FunctionType(function.__code__, {**function.__globals__, **checks}, argdefs=function.__defaults__)


class NoDropout(TorchFunctionMode):
    """Within the block no dropout is applied, by modules or functions, whatever mode they are in."""

    #: What runs backward passes, and within them the forward passes that checkpointing computes again. A function that
    #: a mode handles runs with the mode off; these must not.
    _BACKWARD: ClassVar[dict[Any, Any]] = {
        function: _unchecked(function) for function in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
    }
    _DROPOUT = frozenset(
        [
            *(nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d),
            *(nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout),
            *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_),
            *(torch.alpha_dropout, torch.alpha_dropout_),
            *(torch.feature_alpha_dropout, torch.feature_alpha_dropout_),
        ]
    )
    #: Functions that apply dropout inside; a float among their positional arguments is its rate.
    _WITH_DROPOUT = frozenset(
        [
            *(nn.functional.scaled_dot_product_attention, nn.functional.multi_head_attention_forward),
            *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
        ]
    )

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self._BACKWARD:
            with self:
                return self._BACKWARD[function](*args, **kwargs)
        if function in self._DROPOUT:
            return args[0] if args else kwargs["input"]
        if function in self._WITH_DROPOUT:
            args = tuple(0.0 if isinstance(value, float) else value for value in args)
            kwargs = {name: 0.0 if name == "dropout_p" else value for name, value in kwargs.items()}
        return function(*args, **kwargs)
