"""From the command line and YAML files to a run's configuration, by jsonargparse."""

from __future__ import annotations

import json
import math
import re
import sys
from argparse import Action
from collections.abc import Sequence
from dataclasses import is_dataclass
from importlib import import_module
from inspect import isabstract, signature
from itertools import islice, pairwise
from pathlib import Path
from types import GenericAlias
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_loader
from torch import nn

from .. import data, methods, metrics, models, optim, periods, schedules
from ..comm import Backend
from ..errors import ConfigError, in_a_line
from ..forward import Precision
from ..launch import Wanted
from ..optim import LocalOptimizer
from ..optim.imported import Imported
from ..periods import Period
from ..runs.reading import load_yaml
from ..screen import as_shown
from ..training.config import CLASS_SECTIONS, GROUPS, OF_A_STEP, Config, instantiate
from .messages import must_be, one_line

RECIPES = Path(__file__).parents[1] / "recipes"


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
            line = str(ex) if isinstance(ex, ConfigError) else one_line(message, self.keys(), known_classes)
            print(f"{self.prog}: error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(2 if self.speaks else 0)

    def keys(self) -> list[str]:
        """All keys outside of classes, as ``budget.seconds``, and the sections that hold a class."""
        keys = [action.dest.replace("optimizer.init_args.", "optimizer.") for action in self._actions]
        others = r"\.(help|class_path|init_args)$|^print_"
        return [key for key in keys if key not in ("help", "config", *GROUPS) and not re.search(others, key)]


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's, without all subclasses that a section's type has anywhere (torch has hundreds)."""

    def _get_help_string(self, action: Action) -> str:
        if action.dest in CLASS_SECTIONS:
            return action.help or ""
        return str(super()._get_help_string(action))  # type: ignore[no-untyped-call, unused-ignore]


def make_parser(
    program: str = "hpc-grawa train", speaks: bool = True, imported: type[torch.optim.Optimizer] | None = None
) -> Parser:
    """The parser of a run's configuration.

    Args:
        program: for messages.
        speaks: whether this rank prints them.
        imported: the class of the optimizer, where it is one of torch's kind.
    """
    parser = Parser(
        prog=program,
        description="Trains one model per rank with one method. Every option may stand in a file given by --config.",
        epilog="hpc-grawa train --dry_run [--world_size N] [--ranks_per_host N] only says what would happen. "
        "--trace writes trace.json; --resume_world any resumes with another number of ranks, from the center; "
        "--allow_change KEY (again for each key) resumes with a changed setting.",
        usage="%(prog)s [--config FILE_OR_RECIPE] [--dry_run] [--KEY VALUE ...]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.speaks = speaks
    parser.add_argument("--config", action="config", help=f"A YAML file or a recipe ({', '.join(recipes())}).")
    for name, (base, default) in CLASS_SECTIONS.items():
        if name == "optimizer" and imported is not None:
            _add_imported(parser, imported)
            continue
        whose = "yours, or of torch's (torch.optim.RAdam)" if name == "optimizer" else "yours"
        choice = f"{', '.join(known_classes(name))}, or the import path of a class of {whose}"
        without = f" Default: {default.rpartition('.')[2]}." if default else ""
        parser.add_argument(f"--{name}", type=base, required=True, help=f"{choice}.{without}")
    for name, group in GROUPS.items():
        parser.add_class_arguments(group, name)
    parser.add_argument(
        "--clip_norm", type=float | None, default=None, help="Largest norm of the gradient, after sharing; null: any."
    )
    parser.add_argument(
        "--accumulate", type=int, default=1, help="Equal parts the batch is computed in, to save memory."
    )
    parser.add_argument("--precision", type=Precision, default="fp32", help="bf16 computes under autocast.")
    parser.add_argument("--backend", type=Backend, default="auto", help="How ranks communicate.")
    parser.add_argument("--device", type=Wanted, default="auto", help="Where ranks compute; auto: on GPUs if any.")
    parser.add_argument(
        "--comm_timeout",
        type=float,
        default=600.0,
        help="Longest wait for a message in seconds; then the job ends and says which ranks did not come.",
    )
    return parser


def _add_imported(parser: Parser, found: type[torch.optim.Optimizer]) -> None:
    """Give the optimizer's section the settings of a class of torch's kind: its arguments without the parameters."""
    parser.add_argument("--optimizer.class_path", type=str, required=True, help="The class, an import path.")
    parser.add_class_arguments(found, "optimizer.init_args", skip={1, "groups"}, instantiate=False, fail_untyped=False)
    parser.add_argument(
        "--optimizer.init_args.groups",
        type=get_type_hints(LocalOptimizer)["groups"],
        default=None,
        help="Parameters with settings of their own, as of LocalOptimizer.",
    )


def _imported(section: dict[str, Any]) -> type[torch.optim.Optimizer] | None:
    """The class of the optimizer if it is one of torch's kind."""
    try:
        found = find_class("optimizer", section["class_path"])
    except Exception:  # of a module that cannot be imported; the parser will say so
        return None
    return found if issubclass(found, torch.optim.Optimizer) else None


def recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse(arguments: Sequence[str], program: str = "hpc-grawa train", speaks: bool = True) -> Config:
    """Read command line and files; bad input ends the program with one line and status 2.

    ``--print_config`` prints the configuration as a file that ``--config`` takes, and ends the program.

    Args:
        arguments: of the command line; ``--config`` takes a YAML file or a recipe's name, later options win. Naming
            another class for a section forgets the settings of the class before.
        program: for messages.
        speaks: whether this rank prints them.
    """
    parser = make_parser(program, speaks)
    try:
        if any(word in ("-h", "--help") or word.partition("=")[0].endswith(".help") for word in arguments):
            _help(parser, arguments)  # prints, and ends the program
        files, options = split_config(arguments)
        printing = "--print_config" in options
        chosen, options = _split_classes([word for word in options if word != "--print_config"])
        period = chosen.pop("period", None)
        settings = read_settings(files, chosen.get("method"))
        settings.pop("compare", None)
        for name, (_, default) in CLASS_SECTIONS.items():
            if name in chosen:
                _merge(settings, {name: chosen[name]})
            elif name not in settings:
                if default is None:
                    raise ConfigError(f"{name} is missing: give --{name} CLASS, or a recipe (--config digits)")
                settings[name] = _class_section(name, default)
        if period is not None:
            _merge(
                settings["method"], {"class_path": settings["method"]["class_path"], "init_args": {"period": period}}
            )
        _move_to_step(settings)
        options, called = _by_name_of_today(options, settings["optimizer"])
        if (imported := _imported(settings["optimizer"])) is not None:
            parser = make_parser(program, speaks, imported)
            options = [re.sub(r"^--optimizer\.(?!init_args\.)", "--optimizer.init_args.", word) for word in options]
        parsed = parser.parse_args([f"--config={_as_yaml(settings)}", *options])
        parsed.pop("config", None)
        config = _config(parser, parsed, settings, options, called)
    except ConfigError as error:
        parser.error(str(error), error)
    if printing:
        if speaks:
            whole = as_shown(config.text) == config.text
            print(config.text if whole else yaml.safe_dump(load_yaml(config.text), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def _help(parser: Parser, arguments: Sequence[str]) -> NoReturn:
    """Print what is asked for, and end the program."""
    files, options = split_config(arguments)
    words = [part.removesuffix(".class_path") for word in options for part in word.split("=", 1)]
    alone = "--optimizer.help" in words
    name = dict(pairwise(words)).get("--optimizer.help" if alone else "--optimizer")
    name = name or read_settings(files).get("optimizer", {}).get("class_path", "")
    if (imported := _imported({"class_path": name})) is not None:
        if alone:
            parser = Parser(prog=parser.prog, usage="%(prog)s", add_help=False, formatter_class=HelpFormatter)
            _add_imported(parser, imported)
        else:
            parser = make_parser(parser.prog, bool(parser.speaks), imported)
        text = parser.format_help().replace("optimizer.init_args", "optimizer")
        # torch's lr: float | Tensor
        tensors = r"  --optimizer\.\w+\.help \[.*?exit\.\n|\s\|\s+Tensor\b|,\s+known\s+subclasses:[^)]*"
        print(re.sub(tensors, "", text, flags=re.DOTALL), end="")
        raise SystemExit(0)
    parser.parse_args(options)
    raise SystemExit(0)


def _config(
    parser: Parser, parsed: Namespace, settings: dict[str, Any], options: Sequence[str], called: dict[str, str]
) -> Config:
    model = parsed.model
    for name, section in vars(parsed).items():
        if name in CLASS_SECTIONS:
            _refuse_nulls(name, find_class(name, section.class_path), section.get("init_args", {}))
        elif name in GROUPS:
            _refuse_nulls(name, GROUPS[name], section)
        elif section is None and name != "clip_norm":
            raise ConfigError(f"{name} is null: must have a value, or be left out")
    # Nested classes are built by jsonargparse; the model only later, once its random stream is seeded.
    rest = {key: value for key, value in vars(parsed).items() if key != "model"}
    if (imported := _imported(parsed.optimizer)) is not None:
        own = rest.pop("optimizer").init_args.as_dict()
    built = instantiate(Namespace(**rest))  # type: ignore[no-untyped-call]
    if imported is not None:
        groups = own.pop("groups", None)
        built.optimizer = Imported(kind=imported, arguments=own, groups=groups)
    given = settings.get("model", {}).get("init_args") or {}
    arguments = model.get("init_args", {})  # a model may take none
    settled = {
        key: value
        for key, value in built.data.model_arguments().items()
        if key in arguments
        and key not in given
        and not any(word.partition("=")[0] in (f"--model.{key}", f"--model.init_args.{key}") for word in options)
    }
    for key in settled:
        del arguments[key]
    text = parser.dump(parsed, skip_unset=False)  # without what the data settle, so that it fits other data too
    for key, value in settled.items():
        arguments[key] = value
    return Config(
        **{name: built[name] for name in CLASS_SECTIONS if name != "model"},
        **{name: built[name] for name in (*GROUPS, *OF_A_STEP, "precision", "backend", "device", "comm_timeout")},
        model_name=_name(model.class_path),
        text=text,
        called=called,
        _model=model,
    )


def _refuse_nulls(section: str, found: Any, settings: Any) -> None:
    """Raise ``ConfigError`` for a null that the setting's type has no room for: jsonargparse takes it everywhere."""
    try:
        # A dataclass may have fields of a class in another file, whose names only that file knows.
        types = get_type_hints(found if is_dataclass(found) else found.__init__)
        parameters = signature(found).parameters
    except (NameError, TypeError, ValueError):  # annotations that only a type checker can read, classes written in C
        return
    for key, value in dict(vars(settings) if isinstance(settings, Namespace) else settings).items():
        if value is None and key in types and key in parameters and parameters[key].default is not None:
            wanted = types[key]
            if wanted not in (Any, object) and type(None) not in get_args(wanted):
                raise ConfigError(f"{section}.{key} is null: {must_be(str(wanted))}")
        elif key == "period" and isinstance(value, Namespace):
            _refuse_nulls(f"{section}.{key}", find_class(key, value.class_path), value.get("init_args", {}))


def split_config(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into what it gives to ``--config``, and its other options."""
    files: list[str] = []
    options: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            value = next(words, None)
            if value is None:
                raise ConfigError(f"config is missing after --config: must be a file or one of {', '.join(recipes())}")
            files.append(value)
        elif word.startswith("--config="):
            files.append(word.partition("=")[2])
        else:
            options.append(word)
    return files, options


def read_settings(files: Sequence[str], method: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read YAML files and recipes; later ones win, and a section of another class replaces the one before.

    What the ``methods`` of a file say of the method that runs wins over the rest of that file; what they say of the
    others is left out.

    Args:
        files: YAML files, recipes, or a recipe and a method in one (``digits_easgd``).
        method: the section that the command line gives; else the method is the last that a file names, or the default.

    Raises:
        ConfigError: a file or recipe does not exist, or does not hold sections.
    """
    read = [_read(name) for name in files]
    named = [one["method"] for one in read if "method" in one] + ([method] if method else [])
    chosen = named[-1] if named else _class_section("method", CLASS_SECTIONS["method"][1])
    settings: dict[str, Any] = {}
    for one in read:
        own = one.pop("methods").get(chosen["class_path"])
        _merge(settings, one)
        if own:
            _merge(settings, {"method": {"class_path": chosen["class_path"]}})
            sections = _as_sections(own, settings)
            if (other := {"method": chosen, **sections}["method"]["class_path"]) != chosen["class_path"]:
                raise ConfigError(f"method is {_name(other)} in methods: must be {_name(chosen['class_path'])} there")
            _merge(settings, sections)
    return settings


def _read(name: str) -> dict[str, Any]:
    path = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
    if not path.is_file():
        recipe, _, method = name.rpartition("_")
        called = {known.lower(): known for known in known_classes("method")}
        if recipe in recipes() and method in called:
            return {**_read(recipe), "method": _class_section("method", called[method])}
        raise ConfigError(f"config is {name}: must be a file or one of the recipes {', '.join(recipes())}")
    settings = _load(path.read_text(encoding="utf-8", errors="replace"), f"config is {name}")
    if not isinstance(settings, dict):
        raise ConfigError(f"config is {name}: must hold sections (key: value), found {type(settings).__name__}")
    settings = {key: _section(key, section, name) for key, section in settings.items()}
    settings["methods"] = _methods(settings, name)
    _move_to_step(settings)
    return settings


def _methods(settings: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """What methods have of their own in a file, by import path; a comparison may say it where it names them."""
    own, compared = settings.get("methods") or {}, settings.get("compare")
    if isinstance(compared, dict) and isinstance(compared.get("methods"), dict) and isinstance(own, dict):
        more = {method: lines or own.get(method) for method, lines in compared["methods"].items()}
        own = {**own, **more}
        compared["methods"] = list(compared["methods"])
    if not isinstance(own, dict) or not all(isinstance(lines or {}, dict) for lines in own.values()):
        raise ConfigError(f"methods is {own} in {name}: must hold settings for methods (EASGD: {{method.period: 16}})")
    for method in own:
        find_class("method", str(method))
    return {_import_path("method", str(method)): lines or {} for method, lines in own.items()}


def _as_sections(lines: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Nested or dotted settings as sections; those of a class are for the class that ``settings`` have there."""
    sections: dict[str, Any] = {}
    # What names a class comes before what is set of it.
    for key, value in sorted(lines.items(), key=lambda line: str(line[0]).removesuffix(".class_path").count(".")):
        name, *inner = str(key).split(".")
        for part in reversed(inner):
            value = {part: value}
        if name in CLASS_SECTIONS and isinstance(value, dict) and "class_path" not in value:
            there = {**settings, **sections}.get(name, {}).get("class_path", CLASS_SECTIONS[name][1])
            if there is None:
                raise ConfigError(f"{name} is missing before {key} in methods: must be named in that file")
            value = {"class_path": there, "init_args": value.get("init_args", value)}
        _merge(sections, {name: _section(name, value, "methods")})
    _move_to_step(sections)
    return sections


def _move_to_step(settings: dict[str, Any]) -> None:
    """Take what belongs to the step out of the optimizer's settings, where it was, unless the optimizer knows it."""
    given = settings.get("optimizer", {}).get("init_args") or {}
    for name in OF_A_STEP:
        if name in given and not _takes(settings["optimizer"], name):
            settings[name] = given.pop(name)


def _by_name_of_today(options: Sequence[str], optimizer: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The same for options; also returns what they called these settings."""
    called: dict[str, str] = {}
    words = []
    for word in options:
        key, given, value = word.partition("=")
        name = key.removeprefix("--optimizer.").removeprefix("init_args.")
        if key.startswith("--optimizer.") and name in OF_A_STEP and not _takes(optimizer, name):
            called[name] = f"optimizer.{name}"
            key = f"--{name}"
        words.append(f"{key}{given}{value}")
    return words, called


def _takes(section: dict[str, Any], name: str) -> bool:
    """Whether the optimizer has a setting of that name."""
    try:
        return name in signature(find_class("optimizer", section["class_path"])).parameters
    except (ConfigError, TypeError, ValueError):
        return False


set_loader("yaml", load_yaml, (yaml.YAMLError,))  # here, not for all who import the package


def _load(text: str, what: str) -> Any:
    try:
        return load_yaml(text)
    except Exception as error:  # what a loader raises is its own affair
        raise ConfigError(f"{what}: must be YAML ({in_a_line(error)})") from None


def _section(name: str, section: Any, where: str) -> Any:
    """A section as a file may give it, with its class spelled out."""
    if name in GROUPS and not isinstance(section, dict):
        raise ConfigError(f"{name} is {section} in {where}: must hold settings (key: value)")
    return _class_section(name, section) if name in CLASS_SECTIONS else section


def _class_section(name: str, section: object) -> dict[str, Any]:
    """``{"class_path": ..., "init_args": ...}``, whichever way a class was given."""
    section = {"class_path": section} if isinstance(section, str) else section
    keys = set(section) if isinstance(section, dict) else set()
    if not isinstance(section, dict) or "class_path" not in keys or keys - {"class_path", "init_args", "dict_kwargs"}:
        raise ConfigError(
            f"{_key(name)} is {section}: must be a class, or class_path: CLASS with init_args: {{its settings}}"
        )
    section = {**section, "class_path": _import_path(name, str(section["class_path"]))}
    arguments = section.setdefault("init_args", None)
    if arguments is None:
        del section["init_args"]
    elif not isinstance(arguments, dict):
        raise ConfigError(f"{_key(name)}.init_args is {arguments}: must hold settings (key: value)")
    elif name == "method" and "period" in arguments:
        section["init_args"] = {**arguments, "period": _as_period(arguments["period"])}
    return section


def _as_period(value: Any) -> Any:
    """A method's period: a class spelled out, a number as it is."""
    try:
        find_class("period", value["class_path"] if isinstance(value, dict) else value)
    except Exception:  # no class, or of a module that cannot be imported; the parser will say so
        return value
    return _class_section("period", value)


def _merge(settings: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        old = settings.get(key)
        if not (isinstance(value, dict) and isinstance(old, dict)):
            settings[key] = value
        elif value.get("class_path") == old.get("class_path"):
            _merge(old, value)
        elif "class_path" not in value:
            _merge(old.setdefault("init_args", {}), value.get("init_args", value))
        else:
            settings[key] = value


def _as_yaml(value: Any) -> str:
    """YAML in one line; JSON except for numbers that JSON does not have."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_as_yaml(str(key))}: {_as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_yaml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    return json.dumps(value, default=str, ensure_ascii=False)  # YAML knows no pairs of surrogates


def _split_classes(options: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Split options into the class that is chosen last for each section (``--method LGRAWA``), and the others.

    A method's ``period`` is such a section where a class is chosen for it, not a number.
    """
    chosen: dict[str, Any] = {}
    others: list[str] = []
    period: list[str] = []
    words = iter(options)
    for word in words:
        key, given, value = word.partition("=")
        section = key.removeprefix("--").removesuffix(".class_path")
        if key.startswith("--") and section in CLASS_SECTIONS:
            value = value if given else next(words, "")
            chosen[section] = _load(value, f"{section} is {value}") if value.startswith("{") else value
        elif section in ("method.period", "method.init_args.period"):
            period = [word] if given else [word, *islice(words, 1)]
            value = period[-1].removeprefix(f"{key}=")
            found = _as_period(_load(value, f"method.period is {value}") if value.startswith("{") else value)
            chosen.pop("period", None)
            if key.endswith(".class_path"):
                find_class("period", value)
            if isinstance(found, dict) and "class_path" in found:
                chosen["period"], period = found, []
        else:
            others.append(word)
    others += period
    return {name: _class_section(name, section) for name, section in chosen.items()}, others


def _import_path(section: str, name: str) -> str:
    """One import path for each class of this package and each loss of torch, whatever it was called by."""
    known = known_classes(section).get(_name(name), name)
    root, dots, _ = name.partition(".")
    same = root in ("hpc_grawa", "torch") and known.startswith(f"{root}.")
    return known if not dots or same else name


def _name(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def known_classes(section: str) -> dict[str, str]:
    """The classes of a section, or of a method's ``period``, that need no import path, and their import paths."""
    if section not in (*CLASS_SECTIONS, "period"):
        return {}
    sources = (methods, optim, schedules, models, data, nn.modules.loss, metrics, periods)
    source = dict(zip((*CLASS_SECTIONS, "period"), sources, strict=True))[section]
    base = _base(section)
    return {
        name: f"{source.__name__.removesuffix('.modules.loss')}.{name}"
        for name, found in sorted(vars(source).items())
        if is_class(found, base) and found.__module__.startswith(source.__name__)
        if not isabstract(found) and not name.startswith("_")
    }


def _key(section: str) -> str:
    return "method.period" if section == "period" else section


def _base(section: str) -> type:
    return Period if section == "period" else CLASS_SECTIONS[section][0]


def find_class(section: str, name: str) -> type:
    """The class of a section that ``name`` or import path means.

    Raises:
        ConfigError: there is none, it cannot be imported, or it is no class of that section.
    """
    base = _base(section)
    module, _, attribute = _import_path(section, name).rpartition(".")
    known = ", ".join(known_classes(section))
    must = f"must be {known} or the import path of a class (package.module.Class)"
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{_key(section)} is {name}: {must}" + (f"; {error}" if module else "")) from None
    torchs = section == "optimizer" and is_class(found, torch.optim.Optimizer)
    stepless = torchs and found.step is torch.optim.Optimizer.step
    if not (torchs or is_class(found, base)) or isabstract(found) or stepless:
        raise ConfigError(f"{_key(section)} is {name}: must be a class derived from {base.__name__}, and not abstract")
    return found  # type: ignore[no-any-return]


def is_class(found: object, base: type) -> bool:
    """Whether ``found`` is a class derived from ``base`` (a generic alias passes for a class on Python 3.10)."""
    return isinstance(found, type) and not isinstance(found, GenericAlias) and issubclass(found, base)
