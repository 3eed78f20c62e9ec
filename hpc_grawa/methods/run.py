"""A method at work on one rank: what a training loop of one's own calls.

All ranks make the same calls: ``Method.build``, ``after_step`` after every step of the optimizer, ``finish``.

- The probe returns the loss of a fresh batch, or yields the losses of its parts one by one, whose gradients add up
  (``probe_batches: k`` calls it k times). Its gradient is taken aside, without dropout, and nothing of it remains; what
  it draws from torch's, NumPy's and Python's random streams differs from round to round and rank to rank. A probe with
  a method ``set_round(number)`` is told before which of the run's rounds it is for, from 0 on, also after a resume.
- ``value = closure()`` before ``optimizer.step()`` does what ``optimizer.step(closure)`` does, for what lies between
  the two. An optimizer may ask for parts itself, for a gradient that is not shared, or one that leaves BatchNorm's
  running statistics alone: ``closure(share=False, part=(i, M), track=False)``.
- With ``rounds="pooled"`` a fast rank makes more of a round's steps than a slow one, and the loop asks before each:
  ``while run.facts.step < N: if run.before_step(): ...; run.after_step(loss)``, where the dots are the step.
- ``finish`` is the last round; BatchNorm statistics of the center are the loop's to recalibrate
  (``hpc_grawa.evaluate.recalibrate``). ``center`` is overwritten by the next round: ``run.center.clone()`` keeps it.
- Checkpoints: each rank saves ``model.state_dict()``, ``optimizer.state_dict()`` and ``run.state_dict()`` (scores,
  centers, where in the period it is), and loads the three after ``build`` or ``DistributedOptimizer``.
- Freezing or unfreezing parameters is told at the next step, as ranks would not share them. It begins a new phase, by
  any method: ``run.finish()``, ``run.vector.data.copy_(run.center)``, ``requires_grad_(...)``, and ``build`` or
  ``DistributedOptimizer`` over the same model once more.
- Models that their first forward pass completes (``nn.LazyLinear``, tables made on demand) make one before
  ``ParameterVector(model)``.
- A rank that makes fewer steps than others, returns early or hangs ends the job with a line that names it, the last
  after ``connect(comm_timeout=600)`` seconds. Ranks that ``torch.multiprocessing.spawn`` has started ``connect()``
  finds by their process group; a process forked from a rank cannot send its messages.
- A ``DataLoader`` may have workers; those of ``forkserver`` and ``spawn`` import the script once more, so all of it,
  ``connect()`` and ``hvd.init()`` too, belongs under ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain, repeat
from typing import Any, Protocol
from weakref import finalize, ref

import torch
from torch import Tensor, nn, optim

from ..aggregation import Aggregator
from ..averaging.control import Control
from ..averaging.probe import check_loss
from ..averaging.synchronizer import Round, Synchronizer
from ..batchnorm import frozen
from ..comm import Communicator
from ..errors import ConfigError, LostView, label, require, wrong
from ..optim.base import UNGROUPED
from ..schedules import RunFacts
from ..vector import ParameterVector

#: Why a closure is not evaluated twice where gradients are shared.
ONCE = (
    "an optimizer that evaluates its closure several times in a step decides by its own rank's loss, and ranks would "
    "part: take one that evaluates it once, or a method that averages"
)
_ENDED = (
    "after the run has ended (finish() or close()), which no other rank would hear of: build a new run over the same "
    "model to go on"
)


#: What an optimizer says to ``GradScaler`` by.
_TAKES_SCALE = "_step_supports_amp_scaling"


def learning_rate(optimizer: optim.Optimizer) -> float:
    """η of a run: that of the parameters in no group of the settings, else the first that is not a frozen one's 0."""
    ungrouped = (group for group in optimizer.param_groups if group.get(UNGROUPED))
    return next((lr for group in chain(ungrouped, optimizer.param_groups) if (lr := float(group["lr"]))), 0.0)


def _refuse_scaling(run: Run) -> Callable[[], None]:
    """Steps by ``GradScaler`` end in an error until what is returned is called, or nobody holds the run."""

    def refuse(optimizer: Any, args: Any, kwargs: Any) -> None:
        if hasattr(optimizer, "grad_scale"):
            del optimizer.grad_scale, optimizer.found_inf  # or a step without GradScaler would find them
        elif kwargs.get("grad_scaler") is None:
            return
        raise ConfigError(
            "GradScaler cannot scale the loss here: every rank would choose a scale of its own and leave out steps "
            "of its own; train in bfloat16 (torch.autocast with dtype=torch.bfloat16), which needs none, or float32"
        )

    scaled: Any = run.optimizer
    #: Of all runs of this optimizer: what the attribute was before each.
    before: list[Any] = scaled.__dict__.setdefault("_refused_by", [])
    before.append(getattr(scaled, _TAKES_SCALE, False))
    # Has GradScaler.step call step() itself, with the scale in an attribute, instead of skipping steps.
    setattr(scaled, _TAKES_SCALE, True)
    handle = scaled.register_step_pre_hook(refuse)

    optimizer = ref(scaled)  # which may hold the run

    def accept() -> None:
        handle.remove()
        if len(before) > 1:
            del before[-1]
        elif (found := optimizer()) is not None:
            setattr(found, _TAKES_SCALE, before.pop())

    return finalize(run, accept)


class Closure(Protocol):
    """What an optimizer calls to get its gradient: ``closure(share=True, part=(0, 1), track=True) -> loss``."""

    def __call__(self, share: bool = True, part: tuple[int, int] = (0, 1), track: bool = True) -> Tensor:
        """Compute the gradient of a part of the batch; returns the part's share of the loss, see ``Run.closure``."""


class Run:
    """A method at work on one rank: call ``after_step(loss)`` after every optimizer step, ``finish()`` at the end.

    Attributes:
        aggregator: shares gradients; the null one does nothing.
        synchronizers: average parameters; none where, or as long as, gradients are shared. The last averages over all
            ranks.
        control: decisions all ranks take alike.
        facts: step, learning rate and the like, the same on all ranks.
        common_start: whether all ranks began with the same parameters.
        closed: whether it has ended.
    """

    common_start = True
    closed = False

    def __init__(
        self, comm: Communicator, vector: ParameterVector, optimizer: optim.Optimizer, control: Control
    ) -> None:
        self.comm, self.vector, self.optimizer, self.control = comm, vector, optimizer, control
        self.facts = control.facts
        self.aggregator = Aggregator()
        self.synchronizers: list[Synchronizer] = []
        #: What synchronizers tell of their rounds, those of groups too.
        self.on_round: Callable[[Round], None] = lambda _: None
        #: Where gradients are shared before ranks average: whether they still are in the coming step.
        self.shares_still: Callable[[RunFacts], bool] = lambda _: False
        #: Whether they were up to here, so that all ranks have the same parameters.
        self._alike = False
        #: Sets up what averages then.
        self._average: Callable[[], None] | None = None
        #: Called by ``close``.
        self.on_close: list[Callable[[], None]] = [_refuse_scaling(self)]
        self._held = self._count_held()
        self._began = False
        self._shared = False
        #: The part whose gradient is there.
        self._made: tuple[int, int] | None = None

    def closure(self, loss: Callable[..., Tensor], clip_norm: float | None = None, accumulate: int = 1) -> Closure:
        """The way to a step's gradient, for ``optimizer.step(closure)``, or ``closure()`` before ``optimizer.step()``.

        ``closure(share, part, track)`` forgets the last gradient before part 0, adds ∇loss_i / M of part i of M, and
        returns loss_i / M, a 0-d tensor without a graph. In the backward pass that completes the last part, if it may
        ``share``, gradients are shared where the method shares them; then they are clipped, and what is no gradient of
        the loss, as Parle's pull, is added. Without ``track`` running statistics of BatchNorm are afterwards what they
        were before.

        Args:
            loss: returns the mean loss of the batch; where it is computed in parts, ``loss((i, M))`` that of the i-th
                of M equal parts. SAM, ASAM and torch's LBFGS call it several times in a step: each time of one batch,
                until ``after_step``.
            clip_norm: largest norm of the gradient, after sharing; None for none.
            accumulate: equal parts that the batch, or each of the parts asked for, is computed in, to save memory. Of a
                mean that leaves out targets or weighs them each part is then a mean of its own, and counts as much.

        Raises:
            ConfigError: an argument that cannot be; or, by the closure, gradients were shared in this step already.
            ValueError: by the closure, the loss is no number, or depends on no parameter.
            RuntimeError: by the closure, the run has ended.

        Example:
            >>> import hpc_grawa
            >>> from hpc_grawa.comm.single import SingleCommunicator
            >>> model, x = nn.Linear(2, 1, bias=False), torch.ones(1, 2)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> vector = hpc_grawa.ParameterVector(model)
            >>> run = hpc_grawa.DataParallel().build(SingleCommunicator(), vector, optimizer)
            >>> closure = run.closure(lambda: model(x).mean(), clip_norm=0.5)
            >>> loss = optimizer.step(closure)
            >>> run.after_step(loss)
            >>> round(float(model.weight.grad.norm()), 3)
            0.5
        """
        if not callable(loss):
            raise ConfigError(
                f"loss is a {type(loss).__name__}: must be a function that returns the loss of the batch "
                f"(run.closure(loss), not run.closure(loss()))"
            )
        require(clip_norm is None or 0 < clip_norm < math.inf, "clip_norm", clip_norm, "positive, or None")
        require(accumulate >= 1, "accumulate", accumulate, "at least 1 part")

        def closure(share: bool = True, part: tuple[int, int] = (0, 1), track: bool = True) -> Tensor:
            i, parts = part
            require(0 <= i < parts, "part", part, "(i, M), the i-th of M parts, counted from 0")
            if i > 0 and self._made != (i - 1, parts):
                raise wrong("part", part, f"must come right after {(i - 1, parts)}, whose gradient it adds to")
            if self.closed:
                raise RuntimeError(f"a backward pass {_ENDED}")
            last, pieces = share and i == parts - 1, parts * accumulate
            if last and self._shared and self.aggregator.shares:
                raise wrong(
                    "optimizer",
                    label(self.optimizer),
                    f"{ONCE}. (In a loop of your own: call "
                    f"run.after_step(loss) after every step of the optimizer, before the next closure)",
                )
            self._made = None
            if i == 0:
                self.aggregator.zero_grad(self.optimizer)
            total = torch.zeros((), device=self.vector.data.device)
            with torch.enable_grad(), nullcontext() if track else frozen(self.vector.model):
                for piece in range(i * accumulate, (i + 1) * accumulate):
                    value = loss() if pieces == 1 else loss((piece, pieces))
                    check_loss(value, "loss()", "the batch")
                    value = value / pieces
                    if last and piece == pieces - 1:  # now: the loss may need backward passes of its own
                        self.aggregator.start()
                    value.backward()  # type: ignore[no-untyped-call]
                    total = total + value.detach().reshape(())
            if last:
                self.aggregator.finish()
                self._shared = True
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(self.vector.parameters, clip_norm)
                self.aggregator.complete()
            self._made = i, parts
            return total

        return closure

    def share_first(
        self, aggregator: Aggregator, shares: Callable[[RunFacts], bool], average: Callable[[], None]
    ) -> None:
        """Share gradients as long as ``shares(facts)``, asked between steps; then ``average()`` sets up synchronizers.

        Until then there are none, and the run is one of gradient sharing alone.
        """
        self.aggregator, self.shares_still, self._average = aggregator, shares, average
        self._begin_averaging_if_due()

    def begin_averaging(self) -> None:
        """Share gradients no more, if that comes first, and set up what averages; all ranks must, between steps."""
        average, self._average = self._average, None
        if average is not None:
            self.aggregator.settle()
            self.aggregator.close()
            self.aggregator = Aggregator()
            average()
            self._alike = True

    def _begin_averaging_if_due(self) -> None:
        # Deadlock argument: between steps the facts that it is asked by are the same on all ranks.
        if self._average is not None and not self.shares_still(self.facts):
            self.begin_averaging()

    @property
    def pooled(self) -> bool:
        """Whether ranks make as many local steps as they can, see ``before_step``."""
        return any(s.pool is not None for s in self.synchronizers)

    def before_step(self) -> bool:
        """Whether to make a local step now; always True in lockstep.

        Under pooled rounds False says that a round was run instead. All ranks then have the same ``facts``, in which
        only rounds count steps: what ranks do together (evaluate, end) they decide by these.
        """
        self.facts.lr = learning_rate(self.optimizer)
        return all(s.before_step() for s in self.synchronizers)

    def after_step(self, loss: Tensor | None = None) -> None:
        """Count a local step; observe its loss, pull, and run a round if one is due.

        Args:
            loss: of the step, a 0-d tensor; only methods that score by it need it.

        Raises:
            LostView: a parameter was frozen or unfrozen, or the optimizer was given one, since ``build``.
        """
        if self.closed:
            raise RuntimeError(f"a step {_ENDED}")
        if self._began:
            self.vector.check_trained()
        else:  # what a first pass does to a model, once
            self.vector.check()
            self._began = True
        if self._count_held() != self._held:
            self._check_held()
        self.aggregator.stepped()
        self._shared = self._alike = False
        self.facts.lr = learning_rate(self.optimizer)
        for synchronizer in self.synchronizers:  # a round's first step: its period is decided by the facts before it
            synchronizer.observe(loss)
        if not self.pooled:
            self.facts.advance()
        for synchronizer in self.synchronizers:
            synchronizer.round_if_due()
        if not self.pooled:
            period = self.synchronizers[-1].period if self.synchronizers else math.inf
            self.control.after_step(period, self.aggregator.shares)
        self._begin_averaging_if_due()

    def _count_held(self) -> int:
        return sum(len(group["params"]) for group in self.optimizer.param_groups)

    def _check_held(self) -> None:
        self.vector.check()
        held = {p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        if held != set(self.vector.parameters):
            raise LostView(
                "the optimizer was given parameters, or lost some, after the run was built (add_param_group), so ranks "
                "would not share what it steps: finish() of this run on all ranks, then a new one over the model"
            )
        self._held = self._count_held()

    def finish(self) -> None:
        """End with a round at the last step, shortened if need be, and ``close``; all ranks must.

        Under pooled rounds ranks may call it at different times: it returns when all have.
        """
        if self.closed:
            return
        self.aggregator.settle()
        for synchronizer in self.synchronizers:
            synchronizer.finish()
        self.control.finish()
        self.close()

    def close(self) -> None:
        """Take all hooks off the model, so that another run may begin over the same model; sends nothing.

        ``center``, ``facts`` and ``state_dict`` stay; steps are refused from now on.
        """
        self.closed = True
        self.aggregator.close()
        for synchronizer in self.synchronizers:
            synchronizer.score.close()
        # Those of the next run have other numbers, so these would stay.
        for comm in (self.comm, *(s.averager.comm for s in self.synchronizers)):
            comm.drop_buffers()
        for stop in self.on_close:
            stop()

    def state_dict(self) -> dict[str, Any]:
        """All that survives a step beside parameters, buffers and the optimizer's state; all ranks must call it.

        A loop's checkpoint is of each rank its own ``(model.state_dict(), optimizer.state_dict(), run.state_dict())``,
        and what its data and random streams need. Between steps; under pooled rounds right after a round.
        """
        self.aggregator.settle()
        self.control.settle()
        return {
            "facts": self.facts.state_dict(),
            "aggregator": self.aggregator.state_dict(),
            "synchronizers": [s.state_dict() for s in self.synchronizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, right after ``build``."""
        self.facts.load_state_dict(state["facts"])
        if state["synchronizers"]:
            self.begin_averaging()
            self._alike = False
        if "aggregator" in state:  # older states have none
            self.aggregator.load_state_dict(state["aggregator"])
        for synchronizer, own in zip(self.synchronizers, state["synchronizers"], strict=True):
            synchronizer.load_state_dict(own)
        self._begin_averaging_if_due()
        self.control.resume()

    def start_from(self, state: dict[str, Any]) -> None:
        """Go on where another world's ``state_dict`` was taken, right after ``build``: with its facts and its counts.

        The parameters stay as they are, the same on all ranks; centers start there. What ranks there had still to share
        of their gradients was of each its own, and is dropped. Epochs go on from those that were over there.
        """
        self.facts.load_state_dict(state["facts"])
        self._begin_averaging_if_due()
        # The last averages over all ranks, before and now; a level below it may be new.
        saved = [(s["rounds"], s["healed"]) for s in reversed(state["synchronizers"])]
        counts = chain(saved, repeat((0, 0)))
        for synchronizer, (rounds, healed) in zip(reversed(self.synchronizers), counts, strict=False):
            synchronizer.averager.restart()
            synchronizer.restart(rounds, healed)
        self.control.resume()

    @property
    def local(self) -> Tensor:
        """The model ``[P]`` that this rank stands for: the parameters, unless the method trains others."""
        return self.synchronizers[-1].averager.local if self.synchronizers else self.vector.data

    @property
    def center(self) -> Tensor:
        """The center ``[P]`` of the last round; where gradients are shared, the parameters, the same on all ranks.

        A coming round (or step) overwrites this tensor: ``run.center.clone()`` keeps it.

        Raises:
            RuntimeError: there was no round yet, so that each rank has parameters of its own.
        """
        self.vector.check()
        if not self.synchronizers:
            return self.vector.data
        center = self.synchronizers[-1].averager.center
        if center is None and self._alike:
            return self.vector.data
        if center is None:
            raise RuntimeError(
                "there is no center before the first round: make as many steps as the method's period, or call "
                "run.finish(), which ends with a round"
            )
        return center
