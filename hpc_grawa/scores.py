"""What a rank says about itself before a round: scores ``[K]``, from which the weights are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import random_streams
from .hooks import after_backward
from .vector import Layers, ParameterVector

#: Bias-corrected momentum of the scores in the GRAWA paper's section 5.3: .9⁸.
SCORE_MOMENTUM = 0.9**8


class Score(ABC):
    """Watches a rank between rounds and says ``K`` numbers about it at each.

    Attributes:
        size: K, the same on all ranks.
    """

    size: int = 1

    def observe(self, loss: Tensor | None) -> None:  # noqa: B027 - a score may have nothing to watch
        """See the loss (a 0-d tensor, or None) of a local step; never waits for the device."""

    @abstractmethod
    def take(self) -> Tensor:
        """The scores ``[K]`` of the round that begins now, float64 on the CPU."""

    def close(self) -> None:  # noqa: B027 - a score may watch nothing
        """Take off whatever it watches by."""

    def reset(self) -> None:  # noqa: B027 - a score may keep nothing
        """Forget everything: this rank has been healed from the center."""

    def state_dict(self) -> dict[str, Any]:
        """What it keeps between steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - a score may keep nothing
        """Take over what ``state_dict`` gave."""


class Equal(Score):
    """The same score on every rank, so that the inverse rule gives the uniform mean."""

    def take(self) -> Tensor:
        return torch.ones(1, dtype=torch.float64)


class TrainingLoss(Score):
    """The mean training loss of the local steps since the last round; without any, that of the round before."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._last = torch.full((1,), torch.nan, dtype=torch.float64)

    def observe(self, loss: Tensor | None) -> None:
        if loss is None:
            raise ValueError("this method scores ranks by their training loss: call after_step(loss) with it")
        value = loss.detach().to(torch.float64) if loss.device.type == "cpu" else loss.detach().float()
        self._sum = value.clone() if self._sum is None else self._sum.to(value) + value
        self._count += 1

    def take(self) -> Tensor:
        if self._sum is not None:
            self._last = (self._sum.to("cpu", torch.float64) / self._count).reshape(1)
            self._sum, self._count = None, 0
        return self._last

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "count": self._count, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._count, self._last = state["sum"], state["count"], state["last"].cpu()


class Momentum:
    """v_t = b v_{t-1} + (1-b) s_t, v_0 = 0, with bias correction v_t / (1-b^t), element by element.

    What is not finite does not enter. It stays on the device of what enters it, and waits for nothing.
    """

    def __init__(self, b: float) -> None:
        self._b = b
        self._mean: Tensor | None = None
        self._count: Tensor | None = None

    def update(self, s: Tensor) -> None:
        """Let ``s`` ``[K]`` enter."""
        if self._mean is None or self._count is None:
            self._mean, self._count = torch.zeros_like(s), torch.zeros_like(s)
        mean, count = self._mean.to(s), self._count.to(s)  # loaded from wherever they were
        finite = s.isfinite()
        self._mean, self._count = torch.where(finite, torch.lerp(s, mean, self._b), mean), count + finite

    @property
    def value(self) -> Tensor | None:
        """The bias-corrected mean ``[K]``, NaN where nothing has entered; None before the first ``update``."""
        if self._mean is None or self._count is None:
            return None
        return self._mean / (1 - self._b**self._count)

    def reset(self) -> None:
        """Begin anew."""
        self._mean = self._count = None

    def state_dict(self) -> dict[str, Any]:
        """What has entered."""
        return {"mean": self._mean, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self._mean, self._count = state["mean"], state["count"]


#: How layer norms become scores: ‖g‖₂ of all parameters, Σ_l ‖g_l‖_F, or (‖g_l‖_F)_l.
Reduction = Literal["vector", "sum", "layers"]


def reduce(norms: Tensor, reduction: Reduction) -> Tensor:
    """Scores ``[K]`` from layer norms ``[L]``."""
    if reduction == "vector":
        return norms.square().sum().sqrt().reshape(1)
    return norms.sum().reshape(1) if reduction == "sum" else norms


class GradientNorm(Score):
    """Norms of the gradient of a fresh batch, with momentum over rounds.

    ``vector``: ‖g‖₂ of all parameters (K = 1). ``sum``: Σ_l ‖g_l‖_F (K = 1). ``layers``: (‖g_l‖_F)_l (K = L). A norm
    that is not finite is passed on but does not enter the momentum.

    Args:
        vector: the parameters; the gradient is taken at their current values.
        layers: the L layers.
        probe: returns the loss (0-d tensor) of a fresh batch; called with dropout off, and nothing that it does to
            parameters' gradients, buffers or random streams remains.
        reduction: ``vector``, ``sum`` or ``layers``.
        momentum: b in [0, 1).

    Source: Dimlioglu and Choromanska, GRAWA (AISTATS 2024), section 5.3 and algorithms 2 and 3.
    """

    def __init__(
        self,
        vector: ParameterVector,
        layers: Layers,
        probe: Callable[[], Tensor],
        reduction: Reduction,
        momentum: float = SCORE_MOMENTUM,
    ) -> None:
        self.size = len(layers) if reduction == "layers" else 1
        self._vector, self._layers, self._probe = vector, layers, probe
        self._reduction, self._momentum = reduction, Momentum(momentum)

    def take(self) -> Tensor:
        norms = self._layers.norms(probe_gradient(self._vector, self._probe))
        raw = reduce(norms, self._reduction).to("cpu", torch.float64)
        self._momentum.update(raw)
        smooth = self._momentum.value
        assert smooth is not None
        return torch.where(raw.isfinite(), smooth, raw)

    def reset(self) -> None:
        self._momentum.reset()

    def state_dict(self) -> dict[str, Any]:
        return self._momentum.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._momentum.load_state_dict(state)


class RunningGradientNorm(Score):
    """Norms of the training gradients: their running mean over the local steps since the last round.

    The norms are taken where a backward pass ends, before clipping and weight decay; of several backward passes for one
    step those of the last, which completes the gradient. They stay on the device until a round. Without a step since
    the last round the score is that of the round before.

    Args:
        vector: the parameters.
        layers: the L layers.
        reduction: ``vector``, ``sum`` or ``layers``.
        momentum: b in [0, 1).

    Source: Dimlioglu and Choromanska, GRAWA (AISTATS 2024), appendix G.
    """

    def __init__(self, vector: ParameterVector, layers: Layers, reduction: Reduction, momentum: float = 0.85) -> None:
        self.size = len(layers) if reduction == "layers" else 1
        self._parameters, self._layers = vector.parameters, layers
        self._reduction, self._momentum = reduction, Momentum(momentum)
        self._latest: Tensor | None = None
        self._last = torch.full((self.size,), torch.nan, dtype=torch.float64)
        self._stop = after_backward(self._parameters, self._measure)

    def close(self) -> None:
        self._stop()

    def _measure(self) -> None:
        self._latest = reduce(self._layers.norms([p.grad for p in self._parameters]), self._reduction)

    def observe(self, loss: Tensor | None) -> None:
        if self._latest is None:  # gradients that came without a backward pass
            self._measure()
        assert self._latest is not None
        self._momentum.update(self._latest)
        self._latest = None

    def take(self) -> Tensor:
        mean = self._momentum.value
        if mean is not None:
            self._last = mean.to("cpu", torch.float64)
            self._momentum.reset()
        return self._last

    def reset(self) -> None:
        self._momentum.reset()
        self._latest, self._last = None, torch.full_like(self._last, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self._momentum.state_dict(), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._momentum.load_state_dict(state["momentum"])
        self._last = state["last"].cpu()


class _Probed(nn.Module):
    """Holds the model while ``functional_call`` gives it other tensors, whoever calls it."""

    def __init__(self, model: nn.Module, probe: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that a probe that is a module is no submodule, with second names for the model's tensors.
        self._probe = (probe,)

    def forward(self) -> Tensor:
        return self._probe[0]()


def probe_gradient(vector: ParameterVector, probe: Callable[[], Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient of ``probe()`` at the current parameters, leaving no trace.

    The model computes with fresh leaf tensors on the parameters' memory and with copies of its buffers, so neither
    ``.grad``, gradient hooks, nor BatchNorm's running statistics are touched; random streams are restored.

    Returns:
        One gradient per parameter tensor, None where the loss does not depend on it.
    """
    model = vector.model
    leaves = [p.detach().requires_grad_() for p in vector.parameters]
    tensors: dict[str, Tensor] = {f"model.{name}": leaf for name, leaf in zip(vector.names, leaves, strict=True)}
    tensors |= {f"model.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    with random_streams.kept(), NoDropout(), torch.enable_grad():
        loss = torch.func.functional_call(_Probed(model, probe), tensors, (), tie_weights=True)
        return torch.autograd.grad(loss, leaves, allow_unused=True)


class NoDropout(TorchFunctionMode):
    """Within the block no dropout is applied, by modules or functions, whatever mode they are in."""

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
        if function in self._DROPOUT:
            return args[0] if args else kwargs["input"]
        if function in self._WITH_DROPOUT:
            args = tuple(0.0 if isinstance(value, float) else value for value in args)
            kwargs = {name: 0.0 if name == "dropout_p" else value for name, value in kwargs.items()}
        return function(*args, **kwargs)
