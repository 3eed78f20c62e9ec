"""The configuration of a run: typed sections, checked before any communicator exists.

Sections with a class each: ``method``, ``optimizer``, ``schedule``, ``model``, ``data``, ``loss``, ``metric``; a class
of one's own is given by its import path. Plain sections: ``budget.{seconds,epochs,steps}`` (the first reached ends the
run), ``eval.{every,unit,batch_size,bn_batches,train_examples,flatness}``, ``save.{every,unit,keep,ranks}``,
``log.{every,tensorboard}``, ``run.{name,dir,seed,start,resume,control_every}``, ``clip_norm`` (of the gradient, after
sharing), ``accumulate`` (parts a batch is computed in), ``precision``, ``compile``, ``backend``, ``network`` (a link to
emulate), ``device``, ``comm_timeout``. On the command line a ``-`` within a name is as good as a ``_``.

What a method has of its own in a file stands there under ``methods``, as in ``methods: {EASGD: {method.period: 16}}``:
where that method runs it wins over the rest of that file, elsewhere it is left out. ``methods`` may also name variants,
as in ``QSR: {method: LocalSGD, method.period: QSR}``, which run by ``--method QSR``: with what is said of their class,
then of them. ``--config digits_easgd`` is short for a recipe and a method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from ..comm import Backend, Network
from ..data import Data, shard_size
from ..errors import require, wrong
from ..forward import Precision
from ..launch import Wanted
from ..methods import Method
from ..methods.averaging import AveragingMethod
from ..metrics import Metric
from ..optim import LocalOptimizer
from ..schedules import Schedule
from .budget import Budget
from .evaluate import BATCH

#: Sections that hold one class each: their type, and the class where none is given.
CLASS_SECTIONS: dict[str, tuple[type, str | None]] = {
    "method": (Method, "LGRAWA"),
    "optimizer": (LocalOptimizer, "SGD"),
    "schedule": (Schedule, "Constant"),
    "model": (nn.Module, None),
    "data": (Data, None),
    "loss": (nn.Module, "CrossEntropyLoss"),
    "metric": (Metric, "Accuracy"),
}


@dataclass
class Evaluation:
    """When and how the center is evaluated; the clock stands still meanwhile.

    Attributes:
        every: evaluations are this far apart.
        unit: of ``every``.
        batch_size: examples per forward pass of an evaluation.
        bn_batches: un-augmented training batches per rank from which BatchNorm statistics are recalibrated.
        train_examples: training examples, evenly spaced, on which training loss and metric are measured at the end.
        flatness: training examples, evenly spaced, on which gradient norm, SAM's sharpness and the valley's width are
            measured around the center at each evaluation (about 10 passes over them and 13 per rank); 0: not at all.
    """

    every: float = 1.0
    unit: Literal["steps", "epochs", "seconds"] = "epochs"
    batch_size: int = BATCH
    bn_batches: int = 16
    train_examples: int = 10_000
    flatness: int = 0

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible values."""
        require(0 < self.every < math.inf, "eval.every", self.every, "positive and finite")
        for name in ("batch_size", "bn_batches", "train_examples"):
            require(getattr(self, name) >= 1, f"eval.{name}", getattr(self, name), "at least 1")
        require(self.flatness >= 0, "eval.flatness", self.flatness, "a number of examples, or 0")


@dataclass
class Logging:
    """What is written down.

    Attributes:
        every: steps between training records in metrics.jsonl.
        tensorboard: write event files for TensorBoard beside it, where TensorBoard is installed.
    """

    every: int = 50
    tensorboard: bool = True

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible values."""
        require(self.every >= 1, "log.every", self.every, "at least 1 step")


@dataclass
class Saving:
    """When checkpoints are made; the clock stands still while the state is copied, then training goes on.

    Attributes:
        every: checkpoints are this far apart.
        unit: of ``every``.
        keep: how many are kept.
        ranks: whether at the end each rank's own model is kept (``models/rank-0003.pt``), which ``hpc-grawa flatness``
            looks at beside the center.
    """

    every: float = 600.0
    unit: Literal["steps", "epochs", "seconds"] = "seconds"
    keep: int = 2
    ranks: bool = True

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible values."""
        require(self.every > 0, "save.every", self.every, "positive, .inf for no checkpoints")
        require(self.keep >= 1, "save.keep", self.keep, "at least 1")


@dataclass
class Identity:
    """Which run this is.

    Attributes:
        name: of the run's folder; null: method and time, or, to be resumed, method and SLURM job.
        dir: the folder of runs.
        seed: of all random draws.
        start: ``common``: all ranks begin with rank 0's parameters; ``independent``: each with its own, by methods that
            average from the first step on.
        control_every: steps between control words where rounds are rarer; null: 100, or 10 while gradients are shared.
            A limit in seconds or a signal is seen within two of them, or by the next round.
        resume: ``auto``: where the folder is there already, go on from its last checkpoint; a finished run is done.
    """

    name: str | None = None
    dir: str = "runs"
    seed: int = 0
    start: Literal["common", "independent"] = "common"
    control_every: int | None = None
    resume: Literal["never", "auto"] = "never"

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible values."""
        folder = self.name is None or (self.name == Path(self.name).name and self.name not in ("", ".", ".."))
        require(folder, "run.name", self.name, "the name of a folder, without a path (see run.dir)")
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "0 or more")
        every = self.control_every
        require(every is None or every >= 1, "run.control_every", every, "at least 1 step")


#: Settings of a step, which were the optimizer's: ``optimizer.clip_norm`` goes on being understood.
OF_A_STEP = ("clip_norm", "accumulate")


def renamed(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a saved configuration, each by its name of today."""
    moved = {f"optimizer.{name}": name for name in OF_A_STEP if name not in flat}
    return {moved.get(key, key): value for key, value in flat.items()}


#: Sections with fixed keys.
GROUPS: dict[str, type] = {"budget": Budget, "eval": Evaluation, "save": Saving, "log": Logging, "run": Identity}


@dataclass
class Config:
    """A run's configuration, ready to use. ``build_model`` and ``text`` come from what was parsed.

    Attributes:
        clip_norm: largest norm of the gradient, after sharing; None for none.
        accumulate: equal parts the batch is computed in, to save memory.
        compile: whether local steps are computed by ``torch.compile``.
        network: bandwidth and latency of an emulated link, as of ``hpc_grawa.comm.throttled``.
        method_name: of the variant that runs, or of the method's class.
        called: settings that the command line has given by another name than today's, and that name.
    """

    method: Method
    optimizer: LocalOptimizer
    schedule: Schedule
    data: Data
    loss: nn.Module
    metric: Metric
    budget: Budget
    eval: Evaluation
    save: Saving
    log: Logging
    run: Identity
    clip_norm: float | None
    accumulate: int
    precision: Precision
    compile: bool
    backend: Backend
    network: str | None
    device: Wanted
    comm_timeout: float
    method_name: str
    model_name: str
    text: str
    called: dict[str, str]
    _model: Namespace = field(repr=False)

    def build_model(self) -> nn.Module:
        """The model, initialised from torch's present random stream."""
        model: nn.Module = instantiate(Namespace(model=self._model)).model  # type: ignore[no-untyped-call]
        return model

    def name(self, key: str) -> str:
        """What messages call a setting: as it was given."""
        return self.called.get(key, key)

    def check(self, world_size: int | None) -> None:
        """Find every impossible value, without communicating or loading data.

        Args:
            world_size: None where ranks are started elsewhere: what holds for any number of them, on any host.

        Raises:
            ConfigError: one line that names key, value and what is allowed.
        """
        for name in GROUPS:
            getattr(self, name).check()
        require(self.comm_timeout > 0, "comm_timeout", self.comm_timeout, "positive, .inf for no limit")
        if self.network is not None:
            Network.read(self.network)
        if world_size is None:
            world_size = 1
            Data.check(self.data, 1)  # data of a class may ask for what their own host has, as processors
        else:
            self.data.check(world_size)
        batch, parts = self.data.batch_size, self.accumulate
        if (norm := self.clip_norm) is not None:
            require(0 < norm < math.inf, self.name("clip_norm"), f"{norm:g}", "positive, or null")
        require(parts >= 1, self.name("accumulate"), parts, "at least 1 part")
        if batch % parts:
            raise wrong(self.name("accumulate"), parts, f"must divide data.batch_size, which is {batch}")
        if batch // parts % self.optimizer.parts:
            of = "data.batch_size" if parts == 1 else f"data.batch_size / {self.name('accumulate')}"
            raise wrong("optimizer.parts", self.optimizer.parts, f"must divide {of}, which is {batch // parts}")
        size, data, method = self.data.train_size(), self.data, self.method
        alike = "common where gradients are shared: ranks that begin apart would stay apart, as all make the same steps"
        require(self.run.start == "common" or not method.steps_alike, "run.start", self.run.start, alike)
        if self.budget.seconds is not None and isinstance(method, AveragingMethod) and method.rounds == "pooled":
            number = "a number under pooled rounds and a budget in seconds, as ranks hear of the clock at rounds"
            require(isinstance(method.period, int), "method.period", method.period, number)
        if method.probe_from == "shard":
            size = shard_size(size, batch, world_size, data.split, data.fraction)
        most = f"at most {size // batch}, the batches in the {size} examples that the probe draws from"
        require(method.probe_batches * batch <= size, "method.probe_batches", method.probe_batches, most)


def instantiate(parsed: Namespace) -> Namespace:
    """Build the classes of a part of what was parsed."""
    built: Namespace = _maker(tuple(name for name in (*CLASS_SECTIONS, *GROUPS) if name in parsed)).instantiate(parsed)
    return built


@cache
def _maker(sections: tuple[str, ...]) -> ArgumentParser:
    """What builds the classes of sections."""
    parser = ArgumentParser(exit_on_error=False)
    for name in sections:
        if name in CLASS_SECTIONS:
            parser.add_argument(f"--{name}", type=CLASS_SECTIONS[name][0])
        else:
            parser.add_class_arguments(GROUPS[name], name)
    return parser
