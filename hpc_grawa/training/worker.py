"""One rank's share of a run."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import buffers, nests, optim, random_streams
from ..attributes import with_extra_state
from ..comm import Communicator
from ..data import Nest, Splits, in_advance
from ..errors import in_a_line, wrong
from ..forward import autocast, undisturbed
from ..launch import local_device
from ..methods.averaging import is_schedule_free
from ..methods.run import learning_rate
from ..schedules import RunFacts
from ..vector import ParameterVector
from .budget import Clock
from .config import Config
from .preflight import data_told, fail_together, new_model


class Worker:
    """One rank's share of a run: its data, model, optimizer and method, one local step at a time.

    Args:
        config: checked, the same on all ranks.
        comm: the ranks; all must make a worker.

    Raises:
        ConfigError: model, data, loss and metric do not fit together; on all ranks.
        RanksDisagree: ranks do not have the same model or method.
    """

    def __init__(self, config: Config, comm: Communicator) -> None:
        self.config, self.comm = config, comm
        self.device = local_device(wanted=config.device)
        self.clock = Clock(self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # events and random streams are those of the current device
            torch.cuda.reset_peak_memory_stats(self.device)  # that of a comparison's run before
        seed = config.run.seed
        self.splits = config.data.load()
        self.sampler = config.data.sampler(comm.rank, comm.size, seed)
        self.model = first_model(config, self.splits, comm, self.device)
        #: By which it is seen that a run goes on with others.
        self.data_told = data_told(config, self.splits, comm)
        _seed_all(_own_seed(seed, comm.rank))
        self.vector = _vector_of(config, self.model, comm)
        self.total_steps = config.budget.total_steps(self.sampler.steps_per_epoch)
        self.facts = RunFacts(
            warmup_steps=config.schedule.warmup,
            total_steps=self.total_steps,
            steps_per_epoch=self.sampler.steps_per_epoch,
        )
        self.optimizer = optim.build(config.optimizer, self.vector, self.facts)
        #: What the configuration says of its groups, before any step writes there.
        self._options = [_options(group) for group in self.optimizer.param_groups]
        if is_schedule_free(self.optimizer):
            self.optimizer.train()  # type: ignore[attr-defined]
        scale = config.schedule.scale(comm.size)
        self._peaks = [group["lr"] * scale for group in self.optimizer.param_groups]
        self.facts.lr = self.facts.peak_lr = learning_rate(self.optimizer) * scale
        #: Whether the center has the training loss that ends the run.
        self.reached = False
        #: Local steps of this rank; under pooled rounds not those that ``facts`` counts.
        self.local_steps = 0
        self._batches = self._in_order()
        self._forward = self._compiled() if config.compile else self.model
        self.run = config.method.build(
            comm,
            self.vector,
            self.optimizer,
            Probe(self),
            facts=self.facts,
            clock=lambda: self.clock.seconds,
            control_every=config.run.control_every,
            start=config.run.start,
        )
        self._closure = self.run.closure(self._part_loss, config.clip_norm, config.accumulate)

    def step(self) -> Tensor | None:
        """One local step, and the round if one is due; returns its loss, a 0-d tensor.

        Under pooled rounds it may be the round alone, without a step and a loss.
        """
        facts = self.facts
        factor = float(self.config.schedule(facts))
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        loss: Tensor | None = None
        if self.run.before_step():
            with self.comm.meter.loading(self.device):
                self._batch = nests.moved(next(self._batches), self.device)
                self._cut: list[tuple[Nest, Nest]] = []
            with self.comm.meter.span("compute", "local step"):
                loss = self.optimizer.step(self._closure)  # type: ignore[assignment, arg-type]
            self.local_steps += 1
            self.run.after_step(loss)
        facts.progress = min(1.0, self.used)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """All that survives a step; all ranks must call it, between steps."""
        self.vector.check()  # else what is saved is not what was trained
        return {
            "parameters": self.vector.data,
            "frozen": [p.detach() for p in self._frozen()],
            "buffers": buffers.state(self.model),
            "extra": {name: module.get_extra_state() for name, module in with_extra_state(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "options": self._options,
            "data": self.data_told,
            "run": self.run.state_dict(),
            "local_steps": self.local_steps,
            "seconds": self.clock.settled,
            "meter": self.comm.meter.state_dict(),
            "random": random_streams.packed(random_streams.streams()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken: the same model, method, data and ranks."""
        self._take_facts(state["run"]["facts"])
        self.vector.data.copy_(state["parameters"])
        self._take_outside(state)
        self._load_optimizer(state)
        self.local_steps = state["local_steps"]
        self.clock.restart(state["seconds"])
        self.comm.meter.load_state_dict(state["meter"])
        self.run.load_state_dict(state["run"])
        self.facts.progress = min(1.0, self.used)  # of the budget that it has now
        random_streams.set_streams(random_streams.unpacked(state["random"]))

    def start_from(self, state: dict[str, Any]) -> str:
        """Go on from another world's center, which all ranks start from; the data are shared anew.

        Args:
            state: of rank 0 there.

        Returns:
            What all ranks have started from, in words.
        """
        self._take_facts(state["run"]["facts"])
        synchronizers = state["run"]["synchronizers"]
        center = synchronizers[-1]["averager"]["center"] if synchronizers else state["parameters"]
        self.vector.data.copy_(state["parameters"] if center is None else center)
        self._take_outside(state)
        if is_schedule_free(self.optimizer):  # what it means is in its state
            self._load_optimizer(state)
        self.local_steps = state["run"]["facts"]["step"]
        self.clock.restart(state["seconds"])
        self.comm.meter.load_state_dict(state["meter"])
        self.run.start_from(state["run"])
        self.facts.progress = min(1.0, self.used)
        return "the center" if center is not None else "rank 0's parameters, as there was no round yet"

    def check_groups(self, state: dict[str, Any]) -> None:
        """Raise ``ConfigError`` unless the optimizer has groups of the parameters as where ``state`` was taken."""
        groups = state["optimizer"]["param_groups"], self.optimizer.param_groups
        then, now = ([len(group["params"]) for group in own] for own in groups)
        if then != now:
            fix = f"must make groups of {then} parameters, as when the run was saved, and makes groups of {now}"
            raise wrong("optimizer.groups", self.config.optimizer.groups, fix)

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        # torch takes all options of groups from the state: those that are configured otherwise now, are so again.
        then = state.get("options", self._options)  # older states have none
        for group, now, before in zip(self.optimizer.param_groups, self._options, then, strict=True):
            group.update({key: value for key, value in now.items() if key not in before or before[key] != value})

    @contextmanager
    def meant(self) -> Iterator[None]:
        """Within the block the parameters are those to use, where the optimizer trains others (schedule-free)."""
        if not is_schedule_free(self.optimizer):
            yield
            return
        trained = self.vector.data.clone()
        self.optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.optimizer.train()  # type: ignore[attr-defined]
            self.vector.data.copy_(trained)  # what an optimizer computes back has round-off

    def _frozen(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if not p.requires_grad]

    def _take_facts(self, saved: dict[str, Any]) -> None:
        """Go on with a run's facts, and see how many steps are left; before its periods, which ask for both."""
        facts, budget = self.facts, self.config.budget
        facts.load_state_dict(saved)
        self.total_steps = facts.total_steps = budget.total_steps(self.sampler.steps_per_epoch, facts.base)
        facts.base_share = budget.share_at(facts.base)

    def _take_outside(self, state: dict[str, Any]) -> None:
        for p, saved in zip(self._frozen(), state["frozen"], strict=True):
            buffers.put(p, saved)
        buffers.load_state(self.model, state["buffers"])
        modules = with_extra_state(self.model)
        for name, extra in state.get("extra", {}).items():  # older states have none
            modules[name].set_extra_state(extra)

    def _in_order(self) -> Iterator[tuple[Nest, Nest]]:
        """This rank's batches from that of the present step on; begins when the first is asked for."""
        sampler = self.sampler
        numbers = count(self.local_steps)
        wanted = ((sampler.indices(n), sampler.generator(n)) for n in numbers)
        yield from in_advance(self.splits.train, wanted, self.device)

    def said(self) -> dict[str, Any]:
        """What a heartbeat says of this rank; asked for by another thread."""
        return {"step": self.facts.step, "used": min(1.0, self.used), "training": self.clock.seconds}

    @property
    def used(self) -> float:
        """The share of the budget used, 1 or more at the end; the same on all ranks."""
        return 1.0 if self.reached else self.config.budget.used(self.facts, self.total_steps)

    def _part_loss(self, part: tuple[int, int] = (0, 1)) -> Tensor:
        """The loss of part (i, M) of the batch."""
        if len(self._cut) != part[1]:
            self._cut = self.parts(self._batch, part[1])
        return self.loss(self._cut[part[0]])

    def parts(self, batch: tuple[Nest, Nest], count: int) -> list[tuple[Nest, Nest]]:
        """The equal parts, one after another, that the gradient of a batch is the mean of."""
        return nests.parts(batch, self.sampler.batch_size, count)

    def loss(self, batch: tuple[Nest, Nest]) -> Tensor:
        """The mean loss of a batch, or of a part of it."""
        inputs, targets = batch
        with autocast(self.config.precision, self.vector.data.device):
            loss: Tensor = self.config.loss(self._forward(inputs), targets)
        return loss

    def _compiled(self) -> Callable[[Nest], Any]:
        """The model, compiled for the parts of a batch, forward and backward, before any clock runs or hook listens.

        Raises:
            ConfigError: it cannot be, or not here; on all ranks if on one.
        """
        compiled: Callable[[Nest], Any] = torch.compile(self.model)
        self._forward = compiled
        batch = nests.moved(next(self._in_order()), self.device)
        count = self.config.accumulate * self.config.optimizer.parts
        problem = ""
        try:
            with undisturbed(self.model):
                self.loss(self.parts(batch, count)[0]).backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # the compiler's, or of the model in it
            why = in_a_line(error, named=True)[:300]
            problem = f"compile is true: must be false: {self.config.model_name} cannot be compiled here ({why})"
        fail_together(self.comm, problem)
        self.model.zero_grad()
        return compiled


def first_model(config: Config, splits: Splits, comm: Communicator, device: torch.device) -> nn.Module:
    """The model with the weights that this rank begins with; all ranks must call it."""
    seed = config.run.seed
    # One stream for the common start, then one per rank (dropout, and starts that are to differ).
    _seed_all(seed if config.run.start == "common" else _own_seed(seed, comm.rank))
    return new_model(config, splits, comm, device)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What a group of an optimizer says of itself in numbers, words and their lists, which no step changes in place."""
    return {key: copy.copy(value) for key, value in group.items() if key != "params" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return type(value) in (bool, int, float, str, type(None))


def _vector_of(config: Config, model: nn.Module, comm: Communicator) -> ParameterVector:
    """The model's parameters; ``ConfigError`` on all ranks where they cannot be one vector on one."""
    vector: ParameterVector | None = None
    problem = ""
    try:
        vector = ParameterVector(model)
    except ValueError as error:
        problem = f"model is {config.model_name}: {error}"
    fail_together(comm, problem)
    assert vector is not None
    return vector


class Probe:
    """The losses of this rank's fresh batches, ``probe_batches`` for each round, in a training batch's parts."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._next = 0
        self._batches = self._from(0)

    def set_round(self, number: int) -> None:
        """Go to the first batch of a round."""
        first = number * self._worker.config.method.probe_batches
        if self._next != first:  # resumed
            self._next, self._batches = first, self._from(first)

    def __call__(self) -> Iterator[Tensor]:
        worker = self._worker
        self._next += 1
        with worker.comm.meter.loading(worker.device):
            batch = nests.moved(next(self._batches), worker.device)
        parts = worker.config.accumulate
        for part in worker.parts(batch, parts):
            yield worker.loss(part) / parts

    def _from(self, number: int) -> Iterator[tuple[Nest, Nest]]:
        """The batches from that of a number on, which are made ahead; begins when the first is asked for."""
        worker = self._worker
        method = worker.config.method
        source: Literal["all", "shard"] = "shard" if method.probe_from == "shard" else "all"
        size = method.probe_batches
        places = (divmod(n, size) for n in count(number))
        wanted = (worker.sampler.probe_indices(round_, size, source)[place] for round_, place in places)
        yield from in_advance(worker.splits.train, ((index, None) for index in wanted), worker.device)


def _own_seed(seed: int, rank: int) -> int:
    return (seed * 1_000_003 + rank + 1) % 2**63


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
