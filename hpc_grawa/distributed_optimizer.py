"""The one line of a Horovod script that changes: an optimizer whose steps are those of a method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn, optim

from .aggregation import Aggregator
from .comm import Communicator, connect
from .errors import ConfigError
from .methods import Method, Probe, Run
from .scores import after_backward
from .vector import ParameterVector


def DistributedOptimizer(
    optimizer: optim.Optimizer,
    model: nn.Module,
    method: Method,
    *,
    probe: Probe | None = None,
    comm: Communicator | None = None,
    backward_passes_per_step: int = 1,
) -> Any:
    """Let ``optimizer.step()`` share gradients before, or average parameters after it, as the method does.

    x_m ← step(x_m, g) where g is the method's: (1/W) Σ_j g_j or the rank's own; then, in its rounds,
    x_m ← x_m + λ(c - x_m). All ranks must call this; they begin with rank 0's parameters and buffers. The same
    optimizer comes back, so that schedulers, ``zero_grad`` and ``state_dict`` go on working; attached to it are

    - ``run``: the method at work (``center``, ``facts``, and ``finish()`` to call after the last step);
    - ``synchronize()``: return when gradients are shared, to clip them before ``step()``, which then does not share
      again; nothing under methods that average parameters;
    - ``skip_synchronize()``: a block in which ``step()`` relies on ``synchronize()`` having been called.

    Under pooled rounds ``step()`` makes the rounds that are due before it returns; what ranks then do together they
    decide by ``run.facts``.

    Args:
        optimizer: steps all trainable parameters of the model, and no others.
        model: in its final dtype, device and memory format.
        method: any; one that needs the loss gets it from ``step(closure)``.
        probe: returns the loss of a fresh batch; only methods that score by gradients of it need one.
        comm: the ranks. None: ``hpc_grawa.comm.connect()``, whether Horovod is initialised already or not; it has the
            limit for waits too.
        backward_passes_per_step: gradients of so many backward passes add up to a step's; only the last pass shares.

    Raises:
        ConfigError: the optimizer is wrapped already, or does not hold the model's trainable parameters.
        ValueError: something that the method needs was not given; the message says what to pass.
        RanksDisagree: model, method or package version differ among ranks.

    Example:
        >>> import hpc_grawa
        >>> def train(comm):
        ...     model = nn.Linear(2, 1)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     optimizer = hpc_grawa.DistributedOptimizer(optimizer, model, hpc_grawa.DataParallel(), comm=comm)
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.full((4, 2), comm.rank + 1.0)).square().mean().backward()
        ...         optimizer.synchronize()
        ...         nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ...         optimizer.step()
        ...     return model.weight
        >>> torch.equal(*hpc_grawa.simulate(2, train))
        True
    """
    if hasattr(optimizer, "skip_synchronize"):
        raise ConfigError(
            "the optimizer is distributed already, by DistributedOptimizer of hpc_grawa or Horovod: wrap the plain "
            "torch optimizer, once"
        )
    if backward_passes_per_step < 1:
        raise ConfigError(f"backward_passes_per_step is {backward_passes_per_step}: must be at least 1")
    _check_parameters(optimizer, model)
    comm = connect() if comm is None else comm
    run = method.build(comm, ParameterVector(model), optimizer, probe)
    steps = _Steps(run, method, backward_passes_per_step)
    optimizer.register_step_pre_hook(steps.before)
    optimizer.register_step_post_hook(steps.after)
    distributed: Any = optimizer
    distributed.run = run
    distributed.synchronize = steps.synchronize
    distributed.skip_synchronize = steps.skip_synchronize
    # Has GradScaler.step call step() itself, with the scale in this attribute, instead of skipping steps.
    distributed._step_supports_amp_scaling = True
    return distributed


def _check_parameters(optimizer: optim.Optimizer, model: nn.Module) -> None:
    held = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for p, name in trained.items() if p not in held]
    if missing:
        raise ConfigError(
            f"the optimizer does not step parameter '{missing[0]}' of the model ({len(missing)} of {len(trained)} "
            f"trainable ones): give it all of them, or freeze those that it is not to train (requires_grad_(False))"
        )
    others = held - set(trained)
    if others:
        raise ConfigError(
            f"the optimizer steps {len(others)} tensors that are no parameters of the model (one of shape "
            f"{tuple(next(iter(others)).shape)}), so ranks would not share them: pass a module that holds all of them"
        )


class _Steps:
    """Tells a run of the steps that its optimizer makes.

    Args:
        run: to be told.
        method: of the run.
        passes_per_step: backward passes of a step, the last of which shares gradients.
    """

    def __init__(self, run: Run, method: Method, passes_per_step: int) -> None:
        self._run, self._method, self._passes_per_step = run, method, passes_per_step
        self._parameters = run.vector.parameters
        self._shares = type(run.aggregator) is not Aggregator
        #: The aggregator's own gradients; where ``.grad`` is another tensor, backward or somebody else put it there.
        self._own = [p.grad if self._shares else None for p in self._parameters]
        self._skipping = False
        self._started = False
        after_backward(self._parameters, self._passed)
        self._begin()

    def _begin(self) -> None:
        while not self._run.before_step():  # a round of pooled ranks
            pass
        self._passes = 0
        self._synchronized = False
        self._counts = True
        self._loss: Tensor | None = None
        self._start_before_last_pass()

    def _start_before_last_pass(self) -> None:
        if self._passes == self._passes_per_step - 1:
            self._run.aggregator.start()

    def _passed(self) -> None:
        if self._synchronized:
            raise RuntimeError(
                "a backward pass after this step's gradients were shared: call optimizer.synchronize() after the last "
                "backward pass of a step only, and take no optimizer that evaluates its closure several times in a step"
            )
        self._passes += 1
        self._start_before_last_pass()

    def synchronize(self) -> None:
        """Return when gradients are shared: every ``.grad`` is then the one that ``step()`` steps with."""
        if self._shares and not self._synchronized:
            self._run.aggregator.finish()
            self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Within the block ``step()`` relies on ``synchronize()`` having been called."""
        self._skipping = True
        try:
            yield
        finally:
            self._skipping = False

    def before(
        self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Complete the gradients of ``step()``, or have them completed where its closure has computed them."""
        if hasattr(optimizer, "grad_scale"):
            raise ConfigError(
                "GradScaler cannot scale the loss here: every rank would choose a scale of its own and leave out steps "
                "of its own; train in bfloat16 (torch.autocast with dtype=torch.bfloat16), which needs none, or float32"
            )
        named = "closure" in kwargs
        closure = kwargs["closure"] if named else args[1] if len(args) > 1 else None
        if closure is None:
            self._complete(None)
            return None

        def complete() -> Any:
            loss = closure()
            self._complete(loss)
            return loss

        return (args, {**kwargs, "closure": complete}) if named else ((args[0], complete, *args[2:]), kwargs)

    def _complete(self, loss: Any) -> None:
        self._counts = not self._creates_state()
        if not self._counts:
            return
        if loss is None and self._method.needs_loss:
            name = type(self._method).__name__
            raise ConfigError(
                f"{name} scores ranks by their training loss: call optimizer.step(closure), where closure() returns "
                f"it, or without DistributedOptimizer {name}(...).build(...) and after each step run.after_step(loss)"
            )
        if self._loss is None and loss is not None:
            self._loss = torch.as_tensor(loss)
        if self._shares:
            self._share()
        if not self._started:
            self._started = True
            self._recenter()

    def _share(self) -> None:
        if self._skipping and not self._synchronized:
            raise RuntimeError(
                "optimizer.step() within skip_synchronize(): call optimizer.synchronize() before, after the last "
                "backward pass"
            )
        if not self._passes and any(p.grad is not None and bool(p.grad.any()) for p in self._parameters):
            raise RuntimeError(
                "optimizer.step() with gradients that no backward pass has made since the last step, so that they "
                "would not be shared: call loss.backward() before each step"
            )
        self.synchronize()

    def _creates_state(self) -> bool:
        """Whether this step, of zero gradients that somebody put there, only makes the optimizer create its state.

        ``hvd.broadcast_optimizer_state`` makes it, on some ranks perhaps and not on others.
        """
        return (
            not self._passes
            and not self._run.optimizer.state
            and all(
                p.grad is not None and p.grad is not own and not p.grad.any()
                for p, own in zip(self._parameters, self._own, strict=True)
            )
        )

    def _recenter(self) -> None:
        """Centers of the start are the parameters that are there now: since then a checkpoint may have been loaded."""
        for synchronizer in self._run.synchronizers:
            center = synchronizer.averager.center
            if center is not None and not synchronizer.rounds:
                center.copy_(self._run.vector.data)

    def after(self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the step."""
        if self._counts:
            self._run.after_step(self._loss)
            self._begin()
        self._counts = True
