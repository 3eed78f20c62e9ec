"""What all methods share: a method is built into a ``Run``, which the training loop calls after every step."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, optim

from ..averaging.agreement import agree
from ..averaging.control import Control
from ..averaging.probe import Probe as Probe
from ..buffers import as_bytes, check_kinds, from_bytes, put
from ..comm import Communicator
from ..errors import ConfigError, require
from ..schedules import RunFacts
from ..vector import ParameterVector
from .run import Run, learning_rate


@dataclass(kw_only=True)
class Method(ABC):
    """A way of training together. Its fields are the paper's hyper-parameters."""

    #: Batches of the gradient probe and where they are drawn; methods with a probe make them fields.
    probe_batches = 1
    probe_from = "all"
    #: Whether ``after_step`` needs the loss.
    needs_loss: ClassVar[bool] = False
    #: How evaluated models get BatchNorm statistics; averaging methods make it a field.
    buffers = "recalibrate"

    def build(
        self,
        comm: Communicator,
        vector: ParameterVector,
        optimizer: optim.Optimizer,
        probe: Probe | None = None,
        *,
        facts: RunFacts | None = None,
        clock: Callable[[], float] | None = None,
        control_every: int | None = None,
        start: Literal["common", "independent"] = "common",
    ) -> Run:
        """Make the method ready to train; all ranks must call it.

        Args:
            comm: the ranks.
            vector: this rank's parameters.
            optimizer: steps them; its learning rate is read, its state reset where the method says so.
            probe: returns the loss of a fresh batch; only methods that score by gradients of it need one.
            facts: shared with the caller's schedule.
            clock: training seconds; rank 0's count. None: seconds since this call.
            control_every: steps between control words where rounds are rarer; None: 100, 10 while gradients are shared.
            start: ``common``: all ranks begin with rank 0's parameters and buffers; ``independent``: with their own.

        Raises:
            ConfigError: the optimizer does not step the model's trainable parameters, or steps others, or is of a kind
                that the method cannot train with; the probe is no function; a parameter or buffer is of a kind that
                ranks cannot share; or ranks share a GPU under NCCL.
            RanksDisagree: model, kind of device, method, facts or package version differ among ranks.
            ValueError: something that the method needs was not given; the message says what to pass.
        """
        if probe is not None and not callable(probe):
            raise ConfigError(
                f"probe is a {type(probe).__name__}: must be a function that returns the loss of a fresh batch "
                f"(probe=loss, not probe=loss())"
            )
        require(control_every is None or control_every >= 1, "control_every", control_every, "at least 1 step")
        self._check(optimizer, vector, probe)
        facts = facts or RunFacts()
        state = [_state_told(optimizer)] if self.steps_alike else []
        device = vector.data.device
        agree(comm, [*self._description(vector, facts), *state])
        comm.check_device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # events and random streams are those of the current device
        if start == "common":
            data = vector.data if vector.data.dtype == vector.exact_dtype else vector.data.view(torch.uint8)
            comm.broadcast(data, 0, "setup").wait()
            _take_over(comm, [tensor for _, tensor in vector.outside])
        facts.lr = facts.lr or learning_rate(optimizer)
        run = Run(comm, vector, optimizer, Control(comm, facts, clock, control_every))
        run.common_start = start == "common"
        comm.meter.said = partial(_said, facts)
        self._assemble(run, probe)
        return run

    def _check(self, optimizer: optim.Optimizer, vector: ParameterVector, probe: Probe | None) -> None:
        """Raise ``ConfigError`` unless the optimizer can train the vector by this method, with this probe."""
        check_kinds(vector.model)
        held = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        missing = [name for name, p in zip(vector.names, vector.parameters, strict=True) if p not in held]
        if missing:
            raise ConfigError(
                f"the optimizer does not step parameter '{missing[0]}' of the model ({len(missing)} of "
                f"{len(vector.names)} trainable ones): give it all of them, or freeze those that it is not to train "
                f"(requires_grad_(False)), or, where two optimizers train one model, give each run a module of its own "
                f"part (torch.nn.ParameterList)"
            )
        others = held - set(vector.parameters)
        if others:
            raise ConfigError(
                f"the optimizer steps {len(others)} tensors that are no parameters of the model (one of shape "
                f"{tuple(next(iter(others)).shape)}), so ranks would not share them: pass a module that holds them all"
            )

    @property
    def steps_alike(self) -> bool:
        """Whether all ranks make the same steps from the start, so that their optimizers must begin alike."""
        return False

    @abstractmethod
    def _assemble(self, run: Run, probe: Probe | None) -> None:
        """Give the run its aggregator and synchronizers."""

    def _description(self, vector: ParameterVector, facts: RunFacts) -> list[str]:
        try:
            package = version("hpc-grawa")
        except PackageNotFoundError:
            package = "not installed"
        parameters = [
            f"parameter '{name}' {tuple(p.shape)} {p.dtype} strides {p.stride()}"
            for name, p in zip(vector.names, vector.parameters, strict=True)
        ]
        others = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in vector.outside]
        device = f"a model on {vector.data.device.type}"
        return [f"hpc_grawa {package}", device, f"method {self}", *_told(facts), *parameters, *others]


def _told(facts: RunFacts) -> list[str]:
    """What ranks compare of facts that do not change, by which periods and methods decide what is sent."""
    names = ("peak_lr", "warmup_steps", "total_steps", "steps_per_epoch")
    return [f"facts.{name} {getattr(facts, name)} (all ranks need the same: give each rank 0's)" for name in names]


def _state_told(optimizer: optim.Optimizer) -> str:
    """What ranks compare of the state of an optimizer that has made steps."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = [(i, key, value) for i, p in enumerate(parameters) for key, value in optimizer.state.get(p, {}).items()]
    if not held:
        return "a new optimizer"
    file = io.BytesIO()
    # The file says of each tensor where it lies, which differs between the GPUs of a host.
    torch.save([(i, key, v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v) for i, key, v in held], file)
    state = hashlib.sha256(file.getvalue()).hexdigest()[:8]
    return (
        f"an optimizer that has made steps (state {state}; where gradients are shared all ranks need the same: begin "
        f"with a new optimizer, or load rank 0's state_dict on all)"
    )


def _said(facts: RunFacts) -> dict[str, Any]:
    """What heartbeats say of a run."""
    return {"step": facts.step, "used": facts.progress, "training": facts.seconds}


def _take_over(comm: Communicator, tensors: list[Tensor]) -> None:
    """Make ``tensors``, of whatever dtypes and devices, rank 0's: one message of bytes."""
    pieces = [as_bytes(t).to(tensors[0].device) for t in tensors]
    if pieces:
        message = comm.broadcast(torch.cat(pieces), 0, "setup").wait()
        for t, piece in zip(tensors, torch.split(message, [len(p) for p in pieces]), strict=True):
            put(t, from_bytes(piece, t.dtype, t.shape))
