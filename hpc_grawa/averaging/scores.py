"""What a rank says about itself before a round: scores ``[K]``, from which the weights are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal

import torch
from torch import Tensor

from ..hooks import AfterBackward
from ..vector import Layers, ParameterVector
from .probe import Counted, Probe, probe_gradient

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
        """The scores ``[K]`` of the round that begins now, float64 on the CPU; what they mean is the rule's affair."""

    def close(self) -> None:  # noqa: B027 - a score may watch nothing
        """Take off whatever it watches by."""

    def reset(self) -> None:  # noqa: B027 - a score may keep nothing
        """Forget everything: this rank has been healed from the center."""

    def begin_after(self, rounds: int) -> None:  # noqa: B027 - a score may not count
        """Go on with nothing in mind but how many rounds there were."""

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
        self.reset()

    def reset(self) -> None:
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
        #: Sum of what was not finite.
        self._rest: Tensor | None = None

    def update(self, s: Tensor) -> None:
        """Let ``s`` ``[K]`` enter."""
        if self._mean is None or self._count is None or self._rest is None:
            self._mean, self._count, self._rest = torch.zeros_like(s), torch.zeros_like(s), torch.zeros_like(s)
        mean, count, rest = self._mean.to(s), self._count.to(s), self._rest.to(s)  # loaded from wherever they were
        finite = s.isfinite()
        self._mean, self._count = torch.where(finite, torch.lerp(s, mean, self._b), mean), count + finite
        self._rest = torch.where(finite, rest, rest + s)

    @property
    def value(self) -> Tensor | None:
        """The bias-corrected mean ``[K]``; None before the first ``update``.

        Where nothing has entered it is +∞ if that was all there was, else NaN.
        """
        if self._mean is None or self._count is None or self._rest is None:
            return None
        return torch.where(self._count > 0, self._mean / (1 - self._b**self._count), self._rest)

    def reset(self) -> None:
        """Begin anew."""
        self._mean = self._count = self._rest = None

    def state_dict(self) -> dict[str, Any]:
        """What has entered."""
        return {"mean": self._mean, "count": self._count, "rest": self._rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self._mean, self._count, self._rest = state["mean"], state["count"], state["rest"]


#: How layer norms become scores: ‖g‖₂ of all parameters, Σ_l ‖g_l‖_F, or (‖g_l‖_F)_l.
Reduction = Literal["vector", "sum", "layers"]


def reduce(norms: Tensor, reduction: Reduction) -> Tensor:
    """Scores ``[K]`` from layer norms ``[L]``; a layer without a gradient (+∞) adds nothing to the others."""
    if reduction == "layers":
        return norms
    absent = norms == torch.inf
    known = norms.masked_fill(absent, 0)
    total = known.square().sum().sqrt() if reduction == "vector" else known.sum()
    # What overflows is NaN: +∞ says that there is no gradient.
    return torch.where(absent.all(), torch.inf, total.nan_to_num(nan=torch.nan, posinf=torch.nan)).reshape(1)


class Autocast:
    """A forward pre-hook that notes which dtype autocast computes in, if it is on; else that of the parameters.

    Where it is part of a compiled graph it must only write: a value that it read would have the graph made anew.
    """

    def __init__(self, vector: ParameterVector) -> None:
        self.dtype = self._exact = vector.data.dtype
        self._device = vector.data.device.type

    def __call__(self, *_: Any) -> None:
        """See a module that is about to compute."""
        on = torch.is_autocast_enabled(self._device)
        self.dtype = torch.get_autocast_dtype(self._device) if on else self._exact


def roundoff_bound(dtype: torch.dtype) -> float:
    """‖g_l‖/‖g‖ that round-off of computing in ``dtype`` stays below: 8·eps, or eps/10 in half precision.

    There the many rounded terms of a gradient are summed in fp32, where their errors average out: under bf16 autocast
    biases before BatchNorm had up to .07 eps (inputs of unit scale), the smallest layer of a healthy ResNet-56 .12 eps.
    """
    eps = torch.finfo(dtype).eps
    return eps / 10 if dtype.itemsize == 2 else 8 * eps


class Roundoff:
    """Tells which layers' gradients are round-off: ‖g_l‖ ≤ ``roundoff_bound(dtype of computation)``·‖g‖.

    A bias before BatchNorm has such a gradient: by the equations zero, in fact noise, which must weigh no rank. The
    dtype of computation is the coarsest that the model, or a module with one of its largest tensors, last ran in.

    Args:
        vector: the parameters.
    """

    def __init__(self, vector: ParameterVector) -> None:
        largest = sorted(zip(vector.sizes, vector.names, strict=True), reverse=True)[:4]
        watched = sorted({"", *(name.rpartition(".")[0] for _, name in largest)})
        self._notes = [Autocast(vector) for _ in watched]
        self._handles = [
            vector.model.get_submodule(name).register_forward_pre_hook(note)
            for name, note in zip(watched, self._notes, strict=True)
        ]

    @property
    def bound(self) -> float:
        """Of the dtype of computation."""
        return max(roundoff_bound(note.dtype) for note in self._notes)

    def mark(self, norms: Tensor) -> Tensor:
        """The norms ``[L]``, with a minus sign where they are round-off."""
        known = torch.where(norms.isfinite(), norms, 0)
        return torch.where(norms <= self.bound * known.square().sum().sqrt(), -norms, norms)

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """What modules ran in."""
        return {"dtypes": [note.dtype for note in self._notes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        for note, dtype in zip(self._notes, state["dtypes"], strict=True):
            note.dtype = dtype


class _GradientScore(Score):
    """What scores by gradient norms have in common.

    A score is +∞ where there is no gradient, and of several layers negative where it is round-off.
    """

    def __init__(self, vector: ParameterVector, layers: Layers, reduction: Reduction, momentum: float) -> None:
        self.size = len(layers) if reduction == "layers" else 1
        self._layers, self._reduction, self._momentum = layers, reduction, Momentum(momentum)
        self._roundoff = Roundoff(vector) if reduction == "layers" else None

    def _norms(self, gradient: Sequence[Tensor | None], reached: AbstractSet[int] | None = None) -> Tensor:
        return reduce(self._layers.norms(gradient, reached), self._reduction)

    def _marked(self, scores: Tensor) -> Tensor:
        return scores if self._roundoff is None else self._roundoff.mark(scores)

    def close(self) -> None:
        if self._roundoff is not None:
            self._roundoff.close()

    def state_dict(self) -> dict[str, Any]:
        roundoff = {} if self._roundoff is None else {"roundoff": self._roundoff.state_dict()}
        return {"momentum": self._momentum.state_dict(), **roundoff}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._momentum.load_state_dict(state["momentum"])
        if self._roundoff is not None:
            self._roundoff.load_state_dict(state["roundoff"])


class GradientNorm(_GradientScore):
    """Norms of the gradient of fresh batches, with momentum over rounds.

    ``vector``: ‖g‖₂ of all parameters (K = 1). ``sum``: Σ_l ‖g_l‖_F (K = 1). ``layers``: (‖g_l‖_F)_l (K = L). A norm
    that is not finite is passed on but does not enter the momentum.

    Args:
        vector: the parameters; the gradient is taken at their current values.
        layers: the L layers.
        probe: see ``probe_gradient``; called with dropout off, and nothing that it does remains. Its ``set_round``, if
            it has one, is told the round's number before: from 0 on, and on where the run is resumed.
        reduction: ``vector``, ``sum`` or ``layers``.
        momentum: b in [0, 1).
        batches: calls of the probe that a gradient is the mean of.
        rank: of this process. While a probe runs, random streams are those of (torch's initial seed, rank, round).

    Source: Dimlioglu and Choromanska, GRAWA (AISTATS 2024), section 5.3 and algorithms 2 and 3.
    """

    def __init__(
        self,
        vector: ParameterVector,
        layers: Layers,
        probe: Probe,
        reduction: Reduction,
        momentum: float = SCORE_MOMENTUM,
        batches: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(vector, layers, reduction, momentum)
        self._vector, self._batches, self._rank = vector, batches, rank
        self._probe = probe if isinstance(probe, Counted) else Counted(probe)
        self._seed = torch.initial_seed()

    def take(self) -> Tensor:
        seed = (self._seed, self._rank, self._probe.begin_round())
        gradient = probe_gradient(self._vector, self._probe, self._batches, seed)
        raw = self._norms(gradient).to("cpu", torch.float64)
        self._momentum.update(raw)
        smooth = self._momentum.value
        assert smooth is not None
        return self._marked(torch.where(raw.isfinite(), smooth, raw))

    def reset(self) -> None:
        self._momentum.reset()

    def begin_after(self, rounds: int) -> None:
        self._probe.taken += rounds

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seed": self._seed, "taken": self._probe.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._seed, self._probe.taken = state["seed"], state["taken"]


class RunningGradientNorm(_GradientScore):
    """Norms of the training gradients: their running mean over the local steps since the last round.

    The norms are taken where a backward pass ends, before clipping and weight decay; of several backward passes for one
    step those of the last, which completes the gradient. They stay on the device until a round. Without a step since
    the last round the score is that of the round before. Zeros that no backward pass has made are no gradient.

    Args:
        vector: the parameters.
        layers: the L layers.
        reduction: ``vector``, ``sum`` or ``layers``.
        momentum: b in [0, 1).

    Source: Dimlioglu and Choromanska, GRAWA (AISTATS 2024), appendix G.
    """

    def __init__(self, vector: ParameterVector, layers: Layers, reduction: Reduction, momentum: float = 0.85) -> None:
        super().__init__(vector, layers, reduction, momentum)
        self._parameters = vector.parameters
        self._latest: Tensor | None = None
        self._last = torch.full((self.size,), torch.nan, dtype=torch.float64)
        self._passes = AfterBackward(self._parameters, self._measure)

    def close(self) -> None:
        super().close()
        self._passes.close()

    def _measure(self) -> None:
        self._latest = self._norms([p.grad for p in self._parameters], self._passes.reached or None)

    def observe(self, loss: Tensor | None) -> None:
        if self._latest is None:  # gradients that came without a backward pass, or zeros in their place
            norms = self._norms([p.grad for p in self._parameters], self._passes.reached or None)
            self._latest = norms.masked_fill(norms == 0, torch.inf)
        self._momentum.update(self._latest)
        self._latest = None
        self._passes.reached.clear()

    def take(self) -> Tensor:
        mean = self._momentum.value
        if mean is not None:
            self._last = self._marked(mean.to("cpu", torch.float64))
            self._momentum.reset()
        return self._last

    def reset(self) -> None:
        self._momentum.reset()
        self._latest, self._last = None, torch.full_like(self._last, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._last = state["last"].cpu()
