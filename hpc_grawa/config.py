"""The configuration of a run: typed sections, read by jsonargparse, checked before any communicator exists."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import nn

from . import data, methods, metrics, models, optim, schedules  # noqa: F401 - their classes are found by name
from .budget import Budget
from .comm import Backend
from .control import CONTROL_EVERY
from .data import Data
from .errors import ConfigError
from .evaluate import Precision
from .methods import Method
from .metrics import Metric
from .optim import LocalOptimizer
from .schedules import Schedule

RECIPES = Path(__file__).parent / "recipes"

#: Sections that hold one class each: their type, and the class where none is given.
CLASS_SECTIONS: dict[str, tuple[type, str | None]] = {
    "method": (Method, "LGRAWA"),
    "optimizer": (LocalOptimizer, "SGD"),
    "schedule": (Schedule, "hpc_grawa.schedules.Constant"),
    "model": (nn.Module, None),
    "data": (Data, None),
    "loss": (nn.Module, "torch.nn.CrossEntropyLoss"),
    "metric": (Metric, "Accuracy"),
}


@dataclass
class Evaluation:
    """When and how the center is evaluated; the clock stands still meanwhile.

    Attributes:
        every: evaluations are this far apart.
        unit: of ``every``.
        bn_batches: un-augmented training batches per rank from which BatchNorm statistics are recalibrated.
        train_examples: training examples, evenly spaced, on which training accuracy is measured at the end.
    """

    every: float = 1.0
    unit: Literal["steps", "epochs", "seconds"] = "epochs"
    bn_batches: int = 16
    train_examples: int = 10_000

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible values."""
        if not 0 < self.every < math.inf:
            raise ConfigError(f"eval.every is {self.every}: must be positive")
        for name in ("bn_batches", "train_examples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"eval.{name} is {getattr(self, name)}: must be at least 1")


@dataclass
class Logging:
    """What is written down.

    Attributes:
        every: steps between training records in metrics.jsonl.
    """

    every: int = 50

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible values."""
        if self.every < 1:
            raise ConfigError(f"log.every is {self.every}: must be at least 1 step")


@dataclass
class Identity:
    """Which run this is.

    Attributes:
        name: of the run's folder; null: method and time.
        dir: the folder of runs.
        seed: of all random draws.
        start: ``common``: all ranks begin with rank 0's parameters; ``independent``: each with its own.
        control_every: steps between control words where rounds are rarer; a limit in seconds is that exact.
    """

    name: str | None = None
    dir: str = "runs"
    seed: int = 0
    start: Literal["common", "independent"] = "common"
    control_every: int = CONTROL_EVERY

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible values."""
        if self.name is not None and (not self.name or self.name != Path(self.name).name or self.name in (".", "..")):
            raise ConfigError(f"run.name is {self.name}: must be the name of a folder, without a path (see run.dir)")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"run.seed is {self.seed}: must be 0 or more")
        if self.control_every < 1:
            raise ConfigError(f"run.control_every is {self.control_every}: must be at least 1 step")


@dataclass
class Config:
    """A run's configuration, ready to use. ``build_model`` and ``text`` come from what was parsed."""

    method: Method
    optimizer: LocalOptimizer
    schedule: Schedule
    data: Data
    loss: nn.Module
    metric: Metric
    budget: Budget
    eval: Evaluation
    log: Logging
    run: Identity
    precision: Precision
    backend: Backend
    model_name: str
    text: str
    _model: Namespace = field(repr=False)

    def build_model(self) -> nn.Module:
        """The model, initialised from torch's present random stream."""
        return _instantiate(Namespace(model=self._model)).model  # type: ignore[no-any-return]

    def check(self, world_size: int) -> None:
        """Find every impossible value, without communicating or loading data.

        Raises:
            ConfigError: one line that names key, value and what is allowed.
        """
        for section in (self.budget, self.eval, self.log, self.run):
            section.check()
        self.data.check(world_size)
        batch, parts = self.data.batch_size, self.optimizer.accumulate
        if batch % parts:
            raise ConfigError(f"optimizer.accumulate is {parts}: must divide data.batch_size, which is {batch}")
        wanted = self.method.probe_batches * batch
        if wanted > self.data.train_size():
            raise ConfigError(
                f"method.probe_batches is {self.method.probe_batches}: {wanted} examples, but the training set has "
                f"{self.data.train_size()}"
            )


class Parser(ArgumentParser):
    """jsonargparse's parser with errors of one line.

    Ranks other than 0 end silently with status 0: an error on one of them would make mpirun kill rank 0 before it has
    spoken.
    """

    #: Whether this rank prints; None for the parsers that jsonargparse makes of this class for nested keys.
    speaks: bool | None = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line on the rank that speaks, exit status 2; silence and 0 on the others."""
        if self.speaks is None:
            super().error(message, ex)
        if self.speaks:
            print(f"{self.prog}: error: {_one_line(message)}", file=sys.stderr, flush=True)
        raise SystemExit(2 if self.speaks else 0)


def make_parser(program: str = "hpc-grawa train", speaks: bool = True) -> Parser:
    """The parser of a run's configuration."""
    parser = Parser(
        prog=program,
        description="Trains one model per rank with one method. Every option may stand in a file given by --config.",
    )
    parser.speaks = speaks
    parser.add_argument("--config", action="config", help=f"A YAML file or a recipe ({', '.join(recipes())}).")
    for name, (base, _) in CLASS_SECTIONS.items():
        parser.add_argument(f"--{name}", type=base, required=True, help=f"A {base.__name__}, by name or import path.")
    for name, section in (("budget", Budget), ("eval", Evaluation), ("log", Logging), ("run", Identity)):
        parser.add_class_arguments(section, name)
    parser.add_argument("--precision", type=Precision, default="fp32", help="bf16 computes under autocast.")
    parser.add_argument("--backend", type=Backend, default="auto", help="How ranks communicate.")
    return parser


def recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse(arguments: Sequence[str], program: str = "hpc-grawa train", speaks: bool = True) -> Config:
    """Read command line and files; bad input ends the program with one line and status 2.

    Args:
        arguments: of the command line; ``--config`` takes a YAML file or a recipe's name, later options win. Naming
            another class for a section forgets the settings of the class before.
        program: for messages.
        speaks: whether this rank prints them.
    """
    parser = make_parser(program, speaks)
    try:
        settings, options = read_settings(arguments)
        settings.pop("compare", None)
        for name, (_, default) in CLASS_SECTIONS.items():
            chosen = _chosen_class(options, name)
            if chosen and _short(chosen) != _short(_class_of(settings.get(name))):
                settings.pop(name, None)
            if not chosen and name not in settings:
                if default is None:
                    raise ConfigError(f"{name} is missing: give --{name} CLASS, or a recipe (--config {recipes()[0]})")
                settings[name] = default
        parsed = parser.parse_args([f"--config={json.dumps(settings)}", *options])
        return _config(parser, parsed, settings, options)
    except ConfigError as error:
        parser.error(str(error))


def _config(parser: Parser, parsed: Namespace, settings: dict[str, Any], options: Sequence[str]) -> Config:
    parsed.pop("config", None)
    model = parsed.pop("model")
    # Nested classes are built by jsonargparse; the model only later, once its random stream is seeded.
    built = _instantiate(parsed)
    own = (settings.get("model") or {}).get("init_args", {}) if isinstance(settings.get("model"), dict) else {}
    for key, value in built.data.model_arguments().items():
        named = key in own or any(o.split("=")[0] == f"--model.{key}" for o in options)
        if key in model.init_args and not named:
            model.init_args[key] = value
    parsed.model = model
    return Config(
        **{name: built[name] for name in CLASS_SECTIONS if name != "model"},
        **{name: built[name] for name in ("budget", "eval", "log", "run", "precision", "backend")},
        model_name=_short(model.class_path),
        text=parser.dump(parsed, skip_none=False),
        _model=model,
    )


def _instantiate(parsed: Namespace) -> Namespace:
    """Build the classes of a part of what was parsed."""
    keep = ArgumentParser(exit_on_error=False)
    for name, (base, _) in CLASS_SECTIONS.items():
        if name in parsed:
            keep.add_argument(f"--{name}", type=base)
    for name, section in (("budget", Budget), ("eval", Evaluation), ("log", Logging), ("run", Identity)):
        if name in parsed:
            keep.add_class_arguments(section, name)
    return keep.instantiate(parsed)


def read_settings(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split a command line into the merged settings of its ``--config`` files, and its other options.

    Raises:
        ConfigError: a file or recipe does not exist, or is no mapping.
    """
    settings: dict[str, Any] = {}
    options: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            value = next(words, None)
            if value is None:
                raise ConfigError(f"--config needs a file or a recipe: {', '.join(recipes())}")
        elif word.startswith("--config="):
            value = word.partition("=")[2]
        else:
            options.append(word)
            continue
        _merge(settings, _read(value))
    return settings, options


def _read(name: str) -> dict[str, Any]:
    path = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"config is {name}: no such file, and no such recipe; recipes are {', '.join(recipes())}")
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config is {name}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"config is {name}: must hold sections (key: value), found {type(settings).__name__}")
    return settings


def _merge(settings: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        old = settings.get(key)
        another_class = key in CLASS_SECTIONS and _short(_class_of(value)) not in ("", _short(_class_of(old)))
        if isinstance(value, dict) and isinstance(old, dict) and not another_class:
            _merge(old, value)
        else:
            settings[key] = value


def _class_of(section: object) -> str:
    if isinstance(section, dict):
        return str(section.get("class_path", ""))
    return section if isinstance(section, str) else ""


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _chosen_class(options: Sequence[str], section: str) -> str:
    chosen = ""
    for word, following in zip(options, [*options[1:], ""], strict=False):
        if word == f"--{section}":
            chosen = following
        elif word.startswith(f"--{section}="):
            chosen = word.partition("=")[2]
    return chosen


def _one_line(message: str) -> str:
    """jsonargparse's tree of causes as ``key: what is wrong``."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    keys, notes, given = [], [], ""
    options: list[str] = []
    for line in lines:
        if found := re.fullmatch(r'Parser key "(.+)":', line):
            keys.append(found[1])
        elif found := re.fullmatch(r"Problem with given class_path '(.+)':", line):
            options = _fields(found[1])
        elif found := re.fullmatch(r"Given value: (.*)", line):
            given = f", got {found[1]}"
        elif found := re.fullmatch(r"(?:Option|Key) '(.+)' is not (?:accepted|expected)", line):
            keys.append(found[1])
            near = difflib.get_close_matches(found[1], options, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            notes.append(f"no such key; {hint}allowed: {', '.join(options) or ', '.join(_top_level())}")
        elif found := re.match(r"unrecognized arguments: --(\S+)", line):
            key = found[1].partition("=")[0]
            near = difflib.get_close_matches(key, _top_level(), 1, 0.5)
            notes.append(f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else ""))
        elif not re.match(r"Does not validate|Subtypes:|Errors:|Given value type:", line):
            notes.append(line.lstrip("- "))
    text = "; ".join(dict.fromkeys(notes)) + given
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("Expected a ", "must be a ")
    text = text.replace("dot import path string: ", "known class or an import path, got ").replace(". Got value: ", ", got ")
    text = re.sub(r"typing.Literal\[(.+?)\]", r"one of \1", text).replace("must be a one of", "must be one of")
    text = text.replace("; must be a NoneType", " or null").replace("a int", "an int")
    return f"{'.'.join(keys)}: {text}" if keys else text


def _fields(class_path: str) -> list[str]:
    try:
        module, _, name = class_path.rpartition(".")
        return [p for p in inspect.signature(getattr(import_module(module), name)).parameters if p != "self"]
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _top_level() -> list[str]:
    keys = [action.dest for action in make_parser()._actions if action.dest not in ("help", "config")]
    return [key for key in keys if "print_" not in key]
