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

    def after_step(self) -> None:  # noqa: B027
        """See a local step."""

    def agree(self, comm: Communicator) -> None:  # noqa: B027
        """Make sure that all ranks pack alike, where a rank has made no step yet; all ranks must."""

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
        ConfigError: by ``after_step`` or ``pack``, where the state holds what is no number to average (8-bit codes), or
            is sparse.
    """

    def __init__(self, vector: ParameterVector, optimizer: optim.Optimizer) -> None:
        self._vector, self._optimizer = vector, optimizer
        self._keys: list[tuple[nn.Parameter, str]] = []
        #: Parameters that had a state when it was last looked through.
        self._stepped = 0
        self._packed = False

    def after_step(self) -> None:
        stepped = len(self._optimizer.state)
        if stepped != self._stepped and not self._packed:  # before rounds of groups, in which a healed rank forgets
            self._stepped, self._keys = stepped, self._found()

    def agree(self, comm: Communicator) -> None:
        if self._packed:
            return
        numbers = {id(p): i for i, p in enumerate(self._vector.parameters)}
        own = json.dumps([(numbers[id(p)], key) for p, key in self._keys]) if self._keys else ""
        said = next(filter(None, comm.gather_bytes(own.encode(), "center")), b"[]")
        self._keys = [(self._vector.parameters[i], key) for i, key in json.loads(said)]

    def _state(self) -> list[tuple[nn.Parameter, Tensor | None]]:
        self._keys = self._keys or self._found()
        state = self._optimizer.state
        return [(p, state.get(p, {}).get(key)) for p, key in self._keys]

    def _found(self) -> list[tuple[nn.Parameter, str]]:
        """Each parameter with each of its tensors' names, which those of a group share (Muon's and AdamW's differ)."""
        state, keys = self._optimizer.state, []
        stepped = [p for p in self._vector.parameters if state.get(p)]
        for group in self._optimizer.param_groups:
            params = [p for p in group["params"] if p.requires_grad]
            # A rank may have made no gradient of what others have.
            like = next((p for p in params if state.get(p)), stepped[0] if stepped else None)
            for key, value in ({} if like is None else state[like]).items():
                _refuse_codes(key, value)
                if like is not None and key != "step" and isinstance(value, Tensor) and value.shape == like.shape:
                    keys += [(p, key) for p in params]
        return keys

    def pack(self) -> list[Tensor]:
        self._packed = True
        state = self._state()
        if any(own is not None and own.is_sparse for _, own in state):
            raise ConfigError(
                "method.local_momentum is average: the optimizer's state of a sparse gradient is sparse, and has not "
                "the same entries on all ranks; must be keep or reset, or the embedding one with sparse=False"
            )
        return [torch.zeros_like(p) if own is None else own for p, own in state]

    def unpack(self, averages: list[Tensor]) -> None:
        pairs = [(own, new) for (_, own), new in zip(self._state(), averages, strict=True) if own is not None]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [new for _, new in pairs])


def _refuse_codes(key: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return
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
