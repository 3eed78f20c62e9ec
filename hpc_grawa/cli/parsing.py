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
from ..runs.reading import load_yaml
from ..screen import as_shown
from ..training.config import CLASS_SECTIONS, GROUPS, Config, instantiate
from .arguments import PLAIN, actions, add_class, add_others
from .classes import OF_METHODS, find_class, imported, is_class, key_of, short
from .gate import named_errors
from .help import help_text
from .messages import alternatives, must_be, no_setting
from .settings import read_sections, set_options, split_config

_FP16 = " (fp16 needs loss scaling: each rank's scale would be another and enter the weights)"

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
    parser = ArgumentParser(exit_on_error=False)
    classes = {name: find_class(name, settings[name]["class_path"]) for name in CLASS_SECTIONS}
    for name, found in classes.items():
        parser.add_argument(f"--{name}.class_path", type=str, required=True)
        if "dict_kwargs" in settings[name]:
            parser.add_argument(f"--{name}.dict_kwargs", type=dict)
        add_class(parser, found, f"{name}.init_args")
    add_others(parser)
    _check(parser, settings, whole=False)  # what is wrong in a file is so where an option wins, too
    called = set_options(settings, others)
    _check(parser, settings, whole=True)
    try:
        parsed = parser.parse_object(settings)
    except ArgumentError as error:
        raise ConfigError(in_a_line(error)) from None
    for name in OF_METHODS:
        _check_made(name, parsed.method.get("init_args", {}).get(name))
    # Nested classes are built by jsonargparse; the model only later, once its random stream is seeded.
    model, metric = parsed.model, parsed.metric
    rest = {key: value for key, value in vars(parsed).items() if key not in ("model", "metric")}
    if torchs := issubclass(classes["optimizer"], torch.optim.Optimizer):
        own = rest.pop("optimizer").init_args.as_dict()
    built = instantiate(Namespace(**rest))  # type: ignore[no-untyped-call]
    if torchs:
        built.optimizer = Imported(kind=classes["optimizer"], groups=own.pop("groups", None), arguments=own)
    settled = [
        *_settled(model, settings["model"], built.data.model_arguments()),
        *_settled(metric, settings["metric"], built.data.metric_arguments()),
    ]
    for arguments, key, _ in settled:
        del arguments[key]
    text = parser.dump(parsed, skip_unset=False)  # without what the data settle, so that it fits other data too
    for arguments, key, value in settled:
        arguments[key] = value
    built.metric = instantiate(Namespace(metric=metric)).metric  # type: ignore[no-untyped-call]
    return Config(
        **{name: built[name] for name in CLASS_SECTIONS if name != "model"},
        **{name: built[name] for name in (*GROUPS, *PLAIN)},
        model_name=short(model.class_path),
        text=text,
        called=called,
        _model=model,
    )


def _settled(
    section: Namespace, written: dict[str, Any], found: dict[str, object]
) -> list[tuple[Namespace, str, object]]:
    """What the data settle of a class: its arguments, and key and value of those it has and was not given."""
    arguments = section.get("init_args", Namespace())  # type: ignore[no-untyped-call]
    given = written.get("init_args") or {}  # a class may take none
    return [(arguments, key, value) for key, value in found.items() if key in arguments and key not in given]


def _check(parser: ArgumentParser, settings: dict[str, Any], whole: bool) -> None:
    """Raise ``ConfigError`` for a setting that is unknown, null or of another type, or, of the whole, missing."""
    for name, value in settings.items():
        if name in CLASS_SECTIONS:
            arguments = value.get("init_args") or {}
            _check_all(actions(parser, f"{name}.init_args"), arguments, name, short(value["class_path"]), whole)
        elif name in GROUPS:
            _check_all(actions(parser, name), value, name, name, whole)
        elif name not in PLAIN:
            outside = [f"{group}.{key}" for group in GROUPS for key in actions(parser, group)]
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
            raise ConfigError(no_setting(f"{section}.{name}", [f"{section}.{key}" for key in known]))
    missing = [f"{section}.{name}" for name, action in known.items() if action.required and name not in given]
    if missing and whole:
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise ConfigError(f"{', '.join(missing)} {are} missing: {owner} needs {them}")
    for name, value in given.items():
        action, key = known[name], f"{section}.{name}"
        kind = getattr(action, "_typehint", action.type)
        kinds = [origin for _, origin in alternatives(kind)]
        if value is None:
            free = any(one in (None, type(None), Any, object) for one in kinds)
            if not free and (action.required or action.default is not None):
                raise wrong(key, "null", must_be(name, kind, None))
            continue
        path = value.get("class_path") if isinstance(value, dict) else None
        if isinstance(path, str) and not any(one in (dict, Any) for one in kinds):
            found = find_class(name, path) if name in OF_METHODS else imported(path)[0]
            _check_class(found, value.get("init_args") or {}, key, whole)
            if not whole:
                continue  # options may give what it is missing
        _check_type(key, kind, value)


def _check_class(found: object, given: dict[str, Any], key: str, whole: bool) -> None:
    """The same for a class that a setting holds."""
    if isinstance(found, type):
        parser = ArgumentParser(exit_on_error=False)
        add_class(parser, found, "of")
        _check_all(actions(parser, "of"), given, key, found.__name__, whole)


def _check_made(name: str, given: object) -> None:
    """Raise ``ConfigError`` for what an object that a method's setting holds says of itself when it is made."""
    if isinstance(given, Namespace):
        arguments = given.get("init_args")
        try:
            find_class(name, given.class_path)(**(arguments.as_dict() if arguments else {}))
        except ConfigError as error:
            if error.what is None:
                raise
            raise wrong(f"{key_of(name)}.{short(error.what)}", error.value, error.fix) from None


def _check_type(key: str, kind: Any, value: Any) -> None:
    """Raise ``ConfigError`` for a value that jsonargparse does not take for one of that type."""
    try:
        _alone(kind).parse_object({"it": value})
    except ArgumentError:
        found = imported(value)[0] if isinstance(value, str) and "." in value else None
        if any(one is Callable or (isinstance(one, type) and is_class(found, one)) for _, one in alternatives(kind)):
            _check_class(found, {}, key, whole=True)
        why = _FP16 if (key, value) == ("precision", "fp16") else ""
        raise wrong(key, value, must_be(short(key), kind, None if value == "null" else value) + why) from None


@cache
def _alone(kind: Any) -> ArgumentParser:
    """A parser of one setting, ``it``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    return parser
