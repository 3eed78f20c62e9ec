"""The one line of a Horovod script that changes: an optimizer whose steps are those of a method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn, optim

from .comm import Communicator, connect
from .errors import ConfigError, label, require, wrong
from .hooks import AfterBackward
from .methods import Method, Probe, Run
from .methods.run import ONCE
from .schedules import RunFacts
from .vector import ParameterVector

#: What Horovod's DistributedOptimizer takes and this one does not: what to write instead.
_HOROVOD = {
    "named_parameters": "leave it out: the model names its parameters",
    "compression": "leave it out: gradients are sent as they are, or by hpc_grawa.DataParallel(wire='fp16'); PowerSGD, "
    "OneBitSGD and the like send less",
    "op": "leave it out: gradients are averaged, as by hvd.Average (for hvd.Sum multiply the loss by hvd.size())",
    "gradient_predivide_factor": "leave it out: gradients are summed in fp32 at least, then divided by hvd.size()",
    "num_groups": "leave it out, and say how large a message may be: hpc_grawa.DataParallel(bucket_mb=25)",
    "groups": "leave it out, and say how large a message may be: hpc_grawa.DataParallel(bucket_mb=25)",
    "sparse_as_dense": "leave it out: sparse gradients are shared as dense ones",
    "process_set": "pass comm=hpc_grawa.comm.connect().split(colors), with one color for each set of ranks",
}


def DistributedOptimizer(
    optimizer: optim.Optimizer,
    model: nn.Module,
    method: Method,
    *,
    probe: Probe | None = None,
    comm: Communicator | None = None,
    facts: RunFacts | None = None,
    backward_passes_per_step: int = 1,
    **of_horovod: Any,
) -> Any:
    """Let ``optimizer.step()`` share gradients before, or average parameters after it, as the method does.

    x_m ← step(x_m, g) where g is the method's: (1/W) Σ_j g_j or the rank's own; then, in its rounds,
    x_m ← x_m + λ(c - x_m). All ranks must call this; they begin with rank 0's parameters and buffers. The same
    optimizer comes back, so that schedulers, ``zero_grad``, ``state_dict`` and Horovod's broadcasts, before or after
    this call, go on working; attached to it are

    - ``run``: the method at work (``center``, ``facts``, ``state_dict()`` for checkpoints, and ``finish()`` to call
      after the last step; then the optimizer, or a new one, may be distributed anew);
    - ``synchronize()`` and ``skip_synchronize()``: Horovod's, which may stay where they are.

    Where gradients are shared, they are while backward runs, and when ``backward()`` returns every ``.grad`` is the
    mean of all ranks: clip or scale it as in a script of one process. A further backward pass before the step is shared
    as well, so all ranks must make the same ones. (A rank whose step has none takes part in ``step()``.) Several
    optimizers, each with a model of its own, may be trained by one pass or by turns; where a generator's loss passes
    through a discriminator, freeze the latter meanwhile (``requires_grad_(False)``), or its gradients are shared for
    nothing. Two optimizers for parts of one model (Muon and AdamW) take each an ``nn.ParameterList`` of its part as
    ``model``. Of a script's own SAM, with ``first_step`` and ``second_step``, distribute the base optimizer, which
    makes the step; those of ``hpc_grawa.optim`` are for ``run.closure(loss)``. ``GradScaler`` is refused: ranks would
    choose different scales; train in bfloat16, which needs none.

    Under pooled rounds ``step()`` makes the rounds that are due before it returns, and asks for the period of the next
    with the learning rate that there is then; what ranks then do together they decide by ``run.facts``.

    Args:
        optimizer: steps all trainable parameters of the model, and no others.
        model: in its final dtype, device and memory format.
        method: any; one that needs the loss gets it from ``step(closure)``.
        probe: returns the loss of a fresh batch; only methods that score by gradients of it need one.
        comm: the ranks. None: those of ``hpc_grawa.comm.connect()``, whether Horovod is initialised already or not; it
            has the limit for waits too. Where the script has called ``hvd.init()`` itself, steps are the same bit for
            bit each time with HOROVOD_FUSION_THRESHOLD=0 only: what is fused, and so the order of sums, depends on
            timing.
        facts: what a period is to know of the run (``QSR`` its warm-up, peak learning rate and length).
        backward_passes_per_step: gradients of so many backward passes add up to a step's; only the last pass shares.
        of_horovod: arguments of Horovod's that were left in the call; each is refused with what to write instead.

    Raises:
        ConfigError: the optimizer is wrapped already, or does not hold the model's trainable parameters; or an argument
            is Horovod's, or of another kind than it should be.
        ValueError: something that the method needs was not given; the message says what to pass.
        RanksDisagree: model, method, facts or package version differ among ranks.

    Example:
        >>> import hpc_grawa
        >>> def train(comm):
        ...     model = nn.Linear(2, 1)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     optimizer = hpc_grawa.DistributedOptimizer(optimizer, model, hpc_grawa.DataParallel(), comm=comm)
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.full((4, 2), comm.rank + 1.0)).square().mean().backward()
        ...         nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ...         optimizer.step()
        ...     return model.weight
        >>> torch.equal(*hpc_grawa.simulate(2, train))
        True
    """
    _check_arguments(optimizer, model, method, of_horovod)
    ended = _ended_steps(optimizer)
    if ended is None and hasattr(optimizer, "skip_synchronize"):
        raise ConfigError(
            "the optimizer is distributed already, by DistributedOptimizer of hpc_grawa or Horovod: wrap the plain "
            "torch optimizer, once, or after optimizer.run.finish() once more"
        )
    require(backward_passes_per_step >= 1, "backward_passes_per_step", backward_passes_per_step, "at least 1")
    comm = _world() if comm is None else comm
    run = method.build(comm, ParameterVector(model), optimizer, probe, facts=facts)
    if ended is not None:
        ended.leave()
    steps = _Steps(run, method, backward_passes_per_step)
    distributed: Any = optimizer
    distributed.run = run
    distributed.synchronize = steps.synchronize
    distributed.skip_synchronize = steps.skip_synchronize
    return distributed


@cache
def _world() -> Communicator:
    """All ranks, connected once: on one communicator the messages of several optimizers keep one order."""
    return connect()


def _check_arguments(optimizer: Any, model: Any, method: Any, of_horovod: dict[str, Any]) -> None:
    for name in of_horovod:
        if name not in _HOROVOD:
            raise TypeError(f"DistributedOptimizer() got an unexpected keyword argument '{name}'")
        raise ConfigError(f"{name} is an argument of Horovod's DistributedOptimizer: {_HOROVOD[name]}")
    if not isinstance(optimizer, optim.Optimizer):
        raise wrong("optimizer", repr(optimizer), "must be a torch.optim.Optimizer")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}: must be the torch.nn.Module that the optimizer trains")
    if not isinstance(method, Method):
        found = method.__name__ if isinstance(method, type) else repr(method)
        example = f"{found}()" if isinstance(method, type) and issubclass(method, Method) else "LGRAWA(period=32)"
        raise wrong("method", found, f"must be an instance of a method, such as hpc_grawa.{example}")


def _ended_steps(optimizer: optim.Optimizer) -> _Steps | None:
    """What an earlier call has attached to the optimizer, if its run has ended."""
    steps = getattr(getattr(optimizer, "synchronize", None), "__self__", None)
    return steps if isinstance(steps, _Steps) and steps.run.closed else None


class _Steps:
    """Tells a run of the steps that its optimizer makes.

    Args:
        run: to be told.
        method: of the run.
        passes_per_step: backward passes of a step, the last of which shares gradients.
    """

    def __init__(self, run: Run, method: Method, passes_per_step: int) -> None:
        self.run, self._method, self._passes_per_step = run, method, passes_per_step
        self._parameters = run.vector.parameters
        #: PyTorch's thread of a GPU ends a backward pass there.
        self._shares_in_backward = run.comm.waits_anywhere or not run.vector.data.is_cuda
        #: The aggregator's own gradients; where ``.grad`` is another tensor, backward or somebody else put it there.
        self._own = [p.grad if run.aggregator.shares else None for p in self._parameters]
        self._skipping = False
        self._started = False
        run.on_close.append(AfterBackward(self._parameters, self._passed).close)
        hooks = run.optimizer.register_step_pre_hook, run.optimizer.register_step_post_hook
        self._handles = [hooks[0](self.before), hooks[1](self.after)]
        self._begin()

    def leave(self) -> None:
        """Let the optimizer's steps be."""
        for handle in self._handles:
            handle.remove()

    def _begin(self) -> None:
        while not self.run.before_step():  # a round of pooled ranks
            pass
        self._passes = 0
        self._evaluations = 0
        self._synchronized = False
        self._counts = True
        self._loss: Tensor | None = None
        self._start_before_last_pass()

    def _start_before_last_pass(self) -> None:
        if self._passes == self._passes_per_step - 1:
            self.run.aggregator.start()

    def _passed(self) -> None:
        self._passes += 1
        self._synchronized = False
        if self._passes < self._passes_per_step:
            self._start_before_last_pass()
        elif self._shares_in_backward:
            self.synchronize()
            if self._passes_per_step == 1:  # a further pass before the step is shared as well
                self.run.aggregator.start()

    def synchronize(self) -> None:
        """Return when gradients are shared: every ``.grad`` is then the one that ``step()`` steps with."""
        if self.run.aggregator.shares and not self._synchronized:
            self.run.aggregator.finish()
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
        if self.run.closed:
            raise RuntimeError(
                "optimizer.step() after the run has ended (optimizer.run.finish() or close()), which no other rank "
                "would hear of: wrap it once more by DistributedOptimizer(optimizer, model, method) to go on"
            )
        named = "closure" in kwargs
        closure = kwargs["closure"] if named else args[1] if len(args) > 1 else None
        if closure is None:
            self._complete(None)
            return None

        def complete(*args: Any, **kwargs: Any) -> Any:
            if args or kwargs:
                name, own = label(optimizer), type(self._method).__name__
                raise ConfigError(
                    f"the optimizer is a {name}, which asks its closure for gradients that are not shared, or of parts "
                    f"of the batch: without DistributedOptimizer, run = hpc_grawa.{own}(...).build(comm, "
                    f"hpc_grawa.ParameterVector(model), optimizer) and closure = run.closure(loss), then for each step "
                    f"run.after_step(optimizer.step(closure))"
                )
            self._evaluations += 1
            if self.run.aggregator.shares and self._evaluations > 1:
                raise RuntimeError(ONCE)
            loss = closure()
            if not self.run.aggregator.shares:
                self.run.aggregator.finish()
                self.run.aggregator.complete()
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
        if self.run.aggregator.shares:
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
        fresh = self._synchronized or self.run.aggregator.given
        if not fresh and any(p.grad is not None and bool(p.grad.any()) for p in self._parameters):
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
            not self._started
            and not self._passes
            and not self.run.optimizer.state
            and all(
                p.grad is not None and p.grad is not own and not p.grad.any()
                for p, own in zip(self._parameters, self._own, strict=True)
            )
        )

    def _recenter(self) -> None:
        """Centers of the start are the parameters that are there now: since then a checkpoint may have been loaded."""
        for synchronizer in self.run.synchronizers:
            if not synchronizer.completed and not synchronizer.position:
                synchronizer.averager.restart()

    def after(self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the step."""
        if self._counts:
            self.run.after_step(self._loss)
            self._begin()
        self._counts = True
