"""From sections as they were written to a run's configuration; jsonargparse checks types and builds the classes."""

from __future__ import annotations

from argparse import Action, ArgumentError
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import yaml  # type: ignore[import-untyped, unused-ignore]
from jsonargparse import ArgumentParser, Namespace, set_loader

from ..errors import ConfigError, in_a_line, wrong
from ..optim.imported import Imported
from ..random_streams import seeded
from ..runs.reading import load_yaml
from ..screen import as_shown
from ..training.config import CLASS_SECTIONS, GROUPS, Config, instantiate
from .arguments import PLAIN, actions, add_class, add_other
from .classes import HELD, find_class, imported, is_class, short
from .gate import named_errors
from .help import help_text
from .messages import alternatives, must_be, no_setting
from .settings import read_sections, set_options, split_config, takes

_FP16 = " (fp16 needs loss scaling: each rank's scale would be another and enter the weights)"

#: Types and values that fit: rows of a comparison have most of them in common.
_FITTING: set[tuple[Any, str]] = set()

set_loader("yaml", load_yaml, (yaml.YAMLError,))  # here, not for all who import the package


def parse(arguments: Sequence[str], program: str = "hpc-grawa train") -> Config:
    """Read command line and files; bad input ends the program with one line and status 2.

    ``--print_config`` prints the configuration as a file that ``--config`` takes, and ends the program; so does
    ``--help``, or ``--SECTION.help [CLASS]``, with what can be set.

    Args:
        arguments: of the command line; ``--config`` takes a YAML file or a recipe's name, later options win. Naming
            another class for a section forgets the settings of the class before.
        program: for messages.
    """
    with named_errors(program):
        if any(word in ("-h", "--help") or word.partition("=")[0].endswith(".help") for word in arguments):
            print(help_text(program, arguments), end="")
            raise SystemExit(0)
        files, options = split_config([word for word in arguments if word != "--print_config"])
        config = _config(files, options)
        if "--print_config" in arguments:
            whole = as_shown(config.text) == config.text
            print(config.text if whole else yaml.safe_dump(load_yaml(config.text), sort_keys=False), end="")
            raise SystemExit(0)
    return config


def _config(files: Sequence[str], options: Sequence[tuple[str, str]]) -> Config:
    settings, others = read_sections(files, options)
    variant = settings["method"].pop("variant", None)
    classes = {name: find_class(name, settings[name]["class_path"]) for name in CLASS_SECTIONS}
    # One for each section, as jsonargparse looks for each setting among all of a parser's.
    parsers = {name: _section(name, found, "dict_kwargs" in settings[name]) for name, found in classes.items()}
    parsers |= {name: _other(name) for name in (*GROUPS, *PLAIN)}
    _check(parsers, settings, whole=False)  # what is wrong in a file is so where an option wins, too
    called = set_options(settings, others)
    _check(parsers, settings, whole=True)
    torchs_held = _import_held(settings)
    parsed = Namespace()  # type: ignore[no-untyped-call]
    try:
        for name, parser in parsers.items():
            parsed[name] = parser.parse_object({name: settings[name]} if name in settings else {})[name]
    except ArgumentError as error:
        raise ConfigError(in_a_line(error)) from None
    for key in HELD:
        section, name = key.split(".")
        _check_made(key, parsed[section].get("init_args", {}).get(name))
    # Nested classes are built by jsonargparse; the model only later, once its random stream is seeded.
    model, metric = parsed.model, parsed.metric
    rest = {key: value for key, value in vars(parsed).items() if key not in ("model", "metric", "loss")}
    if torchs := issubclass(classes["optimizer"], torch.optim.Optimizer):
        own = rest.pop("optimizer").init_args.as_dict()
    built = instantiate(Namespace(**rest))  # type: ignore[no-untyped-call]
    with seeded(built.run.seed):  # weights that it draws are the same on all ranks
        built.loss = instantiate(Namespace(loss=parsed.loss)).loss  # type: ignore[no-untyped-call]
    if torchs:
        built.optimizer = Imported(kind=classes["optimizer"], groups=own.pop("groups", None), arguments=own)
    settled = [
        *_settled(model, settings["model"], built.data.model_arguments()),
        *_settled(metric, settings["metric"], built.data.metric_arguments()),
    ]
    for arguments, key, _ in settled:
        del arguments[key]
    for key, path in torchs_held.items():
        section, name = key.split(".")
        made = parsed[section].init_args[name].init_args
        own = Namespace(**made.arguments, groups=made.groups)  # type: ignore[no-untyped-call]
        parsed[section].init_args[name] = Namespace(class_path=path, init_args=own)  # type: ignore[no-untyped-call]
    # Without what the data settle, so that it fits other data too.
    parts = ((parser, Namespace(**{name: parsed[name]})) for name, parser in parsers.items())  # type: ignore[no-untyped-call]
    text = "".join(parser.dump(part, skip_unset=False, skip_validation=True) for parser, part in parts)
    for arguments, key, value in settled:
        arguments[key] = value
    built.metric = instantiate(Namespace(metric=metric)).metric  # type: ignore[no-untyped-call]
    return Config(
        **{name: built[name] for name in CLASS_SECTIONS if name != "model"},
        **{name: built[name] for name in (*GROUPS, *PLAIN)},
        method_name=variant or classes["method"].__name__,
        model_name=short(model.class_path),
        text=text,
        called=called,
        _model=model,
    )


@cache
def _section(name: str, found: type, free: bool) -> ArgumentParser:
    """A parser of a section that holds a class; a ``free`` one has ``dict_kwargs``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}.class_path", type=str, required=True)
    if free:
        parser.add_argument(f"--{name}.dict_kwargs", type=dict)
    add_class(parser, found, f"{name}.init_args")
    return parser


@cache
def _other(name: str) -> ArgumentParser:
    """A parser of a group of settings, or of one outside of groups and classes."""
    parser = ArgumentParser(exit_on_error=False)
    add_other(parser, name)
    return parser


def _settled(
    section: Namespace, written: dict[str, Any], found: dict[str, object]
) -> list[tuple[Namespace, str, object]]:
    """What the data settle of a class: its arguments, and key and value of those it has and was not given."""
    arguments = section.get("init_args", Namespace())  # type: ignore[no-untyped-call]
    given = written.get("init_args") or {}  # a class may take none
    return [(arguments, key, value) for key, value in found.items() if key in arguments and key not in given]


def _check(parsers: dict[str, ArgumentParser], settings: dict[str, Any], whole: bool) -> None:
    """Raise ``ConfigError`` for a setting that is unknown, null or of another type, or, of the whole, missing."""
    for name, value in settings.items():
        if name in CLASS_SECTIONS:
            arguments = value.get("init_args") or {}
            _check_all(actions(parsers[name], f"{name}.init_args"), arguments, name, short(value["class_path"]), whole)
        elif name in GROUPS:
            _check_all(actions(parsers[name], name), value, name, "", whole)
        elif name not in PLAIN:
            outside = [f"{group}.{key}" for group in GROUPS for key in actions(parsers[group], group)]
            full = ".".join([name, *list(value)[:1]]) if isinstance(value, dict) else name
            raise ConfigError(no_setting(full, [*CLASS_SECTIONS, *outside, *PLAIN]))
        elif value is None and PLAIN[name][1] is not None:
            raise wrong(name, "null", "must have a value, or be left out")
        else:
            _check_type(name, PLAIN[name][0], value)


def _check_all(known: dict[str, Action], given: dict[str, Any], section: str, owner: str, whole: bool) -> None:
    """The same for the settings of a group or class; what has a class is looked into."""
    for name in given:
        if name not in known:
            keys = [f"{section}.{key}" for key in known]
            keys += [f"{key}.{name}" for key in keys if key in HELD and takes(key, HELD[key][1], name)]
            raise ConfigError(no_setting(f"{section}.{name}", keys, owner))
    missing = [f"{section}.{name}" for name, action in known.items() if action.required and name not in given]
    if missing and whole:
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise ConfigError(f"{', '.join(missing)} {are} missing: {owner or section} needs {them}")
    for name, value in given.items():
        action, key = known[name], f"{section}.{name}"
        kind = getattr(action, "_typehint", action.type)
        kinds = [origin for _, origin in alternatives(kind)]
        if value is None:
            free = any(one in (None, type(None), Any, object) for one in kinds)
            if not free and (action.required or action.default is not None):
                raise wrong(key, "null", must_be(key, kind, None))
            continue
        path = value.get("class_path") if isinstance(value, dict) else None
        if isinstance(path, str) and not any(one in (dict, Any) for one in kinds):
            found = find_class(key, path) if key in HELD else imported(path)[0]
            inside = value.get("init_args") or {}
            if not isinstance(inside, dict):
                raise wrong(f"{key}.init_args", inside, "must hold settings (key: value)")
            _check_class(found, inside, key, whole)
            if not whole:
                continue  # options may give what it is missing
            value = _as_imported(key, value)
        _check_type(key, kind, value)


def _check_class(found: object, given: dict[str, Any], key: str, whole: bool) -> None:
    """The same for a class that a setting holds."""
    if isinstance(found, type):
        _check_all(actions(_of(found), "of"), given, key, found.__name__, whole)


def _import_held(settings: dict[str, Any]) -> dict[str, str]:
    """Put ``Imported`` in the place of torch's optimizers that settings hold; returns their import paths by key."""
    paths = {}
    for key in HELD:
        section, name = key.split(".")
        inside = settings[section].get("init_args") or {}
        made = _as_imported(key, inside.get(name))
        if made is not inside.get(name):
            paths[key], inside[name] = inside[name]["class_path"], made
    return paths


def _as_imported(key: str, value: Any) -> Any:
    """A setting that holds an optimizer: one of torch's as the class of this package that makes it."""
    if key not in HELD or not isinstance(value, dict):
        return value
    if not is_class(kind := find_class(key, value["class_path"]), torch.optim.Optimizer):
        return value
    try:
        arguments = _of(kind).parse_object({"of": value.get("init_args") or {}}).of.as_dict()
    except ArgumentError as error:
        raise ConfigError(in_a_line(error)) from None
    inside = {"groups": arguments.pop("groups", None), "kind": value["class_path"], "arguments": arguments}
    return {"class_path": f"{Imported.__module__}.{Imported.__name__}", "init_args": inside}


def _check_made(name: str, given: object) -> None:
    """Raise ``ConfigError`` for what an object that a setting holds says of itself when it is made."""
    if isinstance(given, Namespace):
        arguments = given.get("init_args")
        try:
            find_class(name, given.class_path)(**(arguments.as_dict() if arguments else {}))
        except ConfigError as error:
            if error.what is None:
                raise
            own = "" if error.what == name.partition(".")[0] else f".{short(error.what)}"
            raise wrong(f"{name}{own}", error.value, error.fix) from None


def _check_type(key: str, kind: Any, value: Any) -> None:
    """Raise ``ConfigError`` for a value that jsonargparse does not take for one of that type."""
    if (kind, repr(value)) in _FITTING:
        return
    try:
        _alone(kind).parse_object({"it": value})
        _FITTING.add((kind, repr(value)))
    except ArgumentError:
        found = imported(value)[0] if isinstance(value, str) and "." in value else None
        if any(one is Callable or (isinstance(one, type) and is_class(found, one)) for _, one in alternatives(kind)):
            _check_class(found, {}, key, whole=True)
        why = _FP16 if (key, value) == ("precision", "fp16") else ""
        raise wrong(key, value, must_be(key, kind, None if value == "null" else value) + why) from None


@cache
def _of(found: type) -> ArgumentParser:
    """A parser of one class's settings, ``of``."""
    parser = ArgumentParser(exit_on_error=False)
    add_class(parser, found, "of")
    return parser


@cache
def _alone(kind: Any) -> ArgumentParser:
    """A parser of one setting, ``it``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    return parser
