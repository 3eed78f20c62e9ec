"""What may ride in a round's flat message beside the parameters: momenta, running statistics, and other buffers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn, optim

from ..batchnorm import STATISTICS, Pooling, norms
from ..buffers import as_bytes, from_bytes, frozen_parameters, put
from ..comm import Communicator
from ..errors import ConfigError
from ..vector import ParameterVector


class Rider(ABC):
    """Tensors that travel with the parameters: each rank takes over a sum of all ranks' ones."""

    #: The names of what was taken on.
    riding: Sequence[str] = ()

    def shares(self, weights: Tensor, alive: Tensor) -> Tensor:
        """What each rank's tensors are multiplied by in the sum, ``[W]``; here so that it is the uniform average.

        Args:
            weights: of the ranks' parameters, ``[W, K]``.
            alive: ``[W]``, the ranks that are finite.
        """
        return alive.double() / alive.sum()

    def agree(self, comm: Communicator) -> None:  # noqa: B027
        """Make sure, before a round, that all ranks pack alike; all ranks must."""

    def heal(self) -> bool:
        """This rank is not finite: whether the optimizer's state is left as what the sums can be taken over in."""
        return False

    def candidates(self) -> dict[str, Tensor]:
        """This rank's tensors that ride only once ranks differ in them; the same names on every rank."""
        return {}

    def take_on(self, names: Sequence[str]) -> None:  # noqa: B027
        """Let those of its ``candidates`` that are named ride from now on."""

    @abstractmethod
    def pack(self) -> list[Tensor]:
        """This rank's tensors, of the same number and shapes on every rank and, but for ``take_on``, in every round."""

    @abstractmethod
    def unpack(self, sums: list[Tensor]) -> None:
        """Take over the sums, in the order of ``pack``."""


class LocalMomentum(Rider):
    """The optimizer's state tensors of a parameter's shape (SGD's momentum; Adam's two moments).

    Raises:
        ConfigError: by ``agree``, on all ranks, where the state of one holds what is no number to average (8-bit
            codes), or is sparse; by ``pack`` where it has come to.
    """

    def __init__(self, vector: ParameterVector, optimizer: optim.Optimizer) -> None:
        self._vector, self._optimizer = vector, optimizer
        #: The same on all ranks; empty until one of them has a state.
        self._keys: list[tuple[nn.Parameter, str]] = []

    def agree(self, comm: Communicator) -> None:
        if self._keys:
            return
        try:
            own, problem = self._found(), ""
        except ConfigError as error:
            own, problem = [], str(error)
        said = [json.loads(message) for message in comm.gather_bytes(json.dumps([own, problem]).encode())]
        for _, refused in said:
            if refused:
                raise ConfigError(refused)
        held: dict[int, dict[str, None]] = {}
        for found, _ in said:
            for i, keys in found:
                held.setdefault(i, {}).update(dict.fromkeys(keys))
        if held:
            self._keys = self._joined(held)

    def _found(self) -> list[tuple[int, list[str]]]:
        """The numbers of the parameters that have a state here, each with the names of what rides of it."""
        numbered = enumerate(self._vector.parameters)
        states = [(i, p.shape, state) for i, p in numbered if (state := self._optimizer.state.get(p))]
        kept = [(key, t, shape) for _, shape, state in states for key, t in state.items() if isinstance(t, Tensor)]
        for key, t, _ in kept:
            _refuse(key, t)
        others = {"step", *(key for key, t, shape in kept if t.shape != shape)}
        return [
            (i, [k for k, t in state.items() if isinstance(t, Tensor) and k not in others]) for i, _, state in states
        ]

    def _joined(self, held: dict[int, dict[str, None]]) -> list[tuple[nn.Parameter, str]]:
        """Each parameter with each name that a rank has there; one that none has stepped with those of its group."""
        numbers, joined = {id(p): i for i, p in enumerate(self._vector.parameters)}, []
        for group in self._optimizer.param_groups:
            params = [(numbers[id(p)], p) for p in group["params"] if p.requires_grad]
            names = dict.fromkeys(key for i, _ in params for key in held.get(i, ())) or held[min(held)]
            joined += [(p, key) for key in names for i, p in params if key in held.get(i, names)]
        return joined

    def _state(self) -> list[tuple[nn.Parameter, Tensor | None]]:
        state = self._optimizer.state
        held = ((p, state.get(p, {}).get(key)) for p, key in self._keys)
        return [(p, t if isinstance(t, Tensor) and t.shape == p.shape else None) for p, t in held]

    def pack(self) -> list[Tensor]:
        state = self._state()
        for (_, key), (_, own) in zip(self._keys, state, strict=True):
            if own is not None:
                _refuse(key, own)
        return [torch.zeros_like(p) if own is None else own for p, own in state]

    def heal(self) -> bool:
        """Drop all states but those of which nothing else than counts is left when the means have been taken over."""
        riding: dict[Tensor, list[str]] = {}
        for p, key in self._keys:
            riding.setdefault(p, []).append(key)
        for held, state in list(self._optimizer.state.items()):
            rest = [t for key, t in state.items() if isinstance(t, Tensor) and key not in riding.get(held, ())]
            if held not in riding or any(t.numel() > 1 or not bool(t.isfinite()) for t in rest):
                del self._optimizer.state[held]
        return bool(self._optimizer.state)

    def unpack(self, averages: list[Tensor]) -> None:
        pairs = [(own, new) for (_, own), new in zip(self._state(), averages, strict=True) if own is not None]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [new for _, new in pairs])


def _refuse(key: str, value: Tensor) -> None:
    """Raise ``ConfigError`` for what is no number to average, or not there on all ranks alike."""
    if value.numel() <= 1:
        return
    if value.is_sparse:
        raise ConfigError(
            "method.local_momentum is average: the optimizer's state of a sparse gradient is sparse, and has not the "
            "same entries on all ranks; must be keep or reset, or the embedding one with sparse=False"
        )
    kind = type(value).__name__ if type(value) not in (Tensor, nn.Parameter) else str(value.dtype)
    if kind != str(value.dtype) or not value.is_floating_point():
        raise ConfigError(
            f"method.local_momentum is average: the optimizer's state '{key}' is of {kind}, codes and no numbers to "
            f"average; must be keep or reset, or the optimizer one that keeps its state in floating point"
        )


class RunningStatistics(Pooling, Rider):
    """BatchNorm's running statistics, pooled over the ranks where all are finite."""

    def shares(self, weights: Tensor, alive: Tensor) -> Tensor:
        return alive.double()


class WeightBuffers(Rider):
    """Buffers that belong to the weights: all that ``state_dict`` holds but running statistics of BatchNorm's kind.

    And frozen parameters, once ranks differ in them: the model changes them itself (momentum encoders, mean teachers).
    Each rank takes over those of the rank that weighs most: they belong together as one rank has them (a spectral
    norm's two unit vectors, a code and how often it was used), which a mean need not. Integers ride as their bytes.
    A buffer whose shape has changed on either side since this was made stays each rank's own.

    Args:
        vector: whose model's buffers ride, beside its parameters in ``exact_dtype``.
    """

    def __init__(self, vector: ParameterVector) -> None:
        statistics = {id(m): STATISTICS for m in norms(vector.model)}
        self._exact, self._device = vector.exact_dtype, vector.data.device
        self._held: list[tuple[Mapping[str, Tensor | None], str, torch.Size, torch.dtype]] = [
            (module._buffers, name, buffer.shape, buffer.dtype)
            for module in vector.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
            if name not in module._non_persistent_buffers_set and name not in statistics.get(id(module), ())
        ]
        self._model, self._frozen = vector.model, frozen_parameters(vector.model)

    def __len__(self) -> int:
        return len(self._held) + len(self._frozen)

    def candidates(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._frozen.items() if name not in self.riding}

    def take_on(self, names: Sequence[str]) -> None:
        taken = [name for name in names if name in self.candidates()]
        for path in taken:
            p, (owner, _, name) = self._frozen[path], path.rpartition(".")
            self._held.append((self._model.get_submodule(owner)._parameters, name, p.shape, p.dtype))
        self.riding = (*self.riding, *taken)

    def shares(self, weights: Tensor, alive: Tensor) -> Tensor:
        return torch.zeros(len(weights)).index_fill_(0, weights.mean(1).argmax(), 1.0)

    def _own(self) -> list[Tensor | None]:
        """This rank's, None where it is no longer what it was."""
        present = [(held.get(name), shape, dtype) for held, name, shape, dtype in self._held]
        return [t if t is not None and (t.shape, t.dtype) == (s, d) else None for t, s, d in present]

    def _as_they_are(self, dtype: torch.dtype) -> bool:
        if dtype.itemsize < 2:  # floating point of 8 bits is not promoted
            return False
        return dtype.is_floating_point and torch.promote_types(dtype, self._exact) == self._exact

    def pack(self) -> list[Tensor]:
        own = self._own()
        flags = torch.tensor([t is not None for t in own], device=self._device)
        tensors = [
            torch.zeros(shape, dtype=dtype, device=self._device) if t is None else t
            for t, (_, _, shape, dtype) in zip(own, self._held, strict=True)
        ]
        return [flags, *(t if self._as_they_are(t.dtype) else as_bytes(t) for t in tensors)]

    def unpack(self, sums: list[Tensor]) -> None:
        flags, *found = sums
        for own, there, new in zip(self._own(), flags.tolist(), found, strict=True):
            if own is not None and there:
                put(own, new if self._as_they_are(own.dtype) else from_bytes(new.byte(), own.dtype, own.shape))
