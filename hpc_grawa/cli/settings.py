"""From YAML files, recipes and the options of a command line to one dictionary of sections."""

from __future__ import annotations

import re
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from ..errors import ConfigError, in_a_line, wrong
from ..runs.reading import load_yaml
from ..training.config import CLASS_SECTIONS, GROUPS, OF_A_STEP
from .classes import HELD, find_class, import_path, known_classes, short

RECIPES = Path(__file__).parents[1] / "recipes"
PAPERS = RECIPES / "papers"
#: Options by which a section's class is given an object of a class.
_HELD = {key.replace(".", inside): key for key in HELD for inside in (".", ".init_args.")}


def papers() -> list[str]:
    """Names of the papers whose comparisons can be made in any setting."""
    return sorted(path.stem for path in PAPERS.glob("*.yaml"))


def recipes() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def split_config(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split a command line into what it gives to ``--config``, and its other options: key and value."""
    files: list[str] = []
    options: list[tuple[str, str]] = []
    words = iter(arguments)
    for word in words:
        key, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(f"{word} belongs to no option: options are --key value")
        if not given and (value := next(words, "--")).startswith("--"):
            must = f"a file or one of {', '.join(recipes())}" if key == "config" else f"--{key} VALUE"
            raise ConfigError(f"{key} is missing after --{key}: must be {must}")
        if key == "config":
            files.append(value)
        else:
            options.append((key, value))
    return files, options


def read_sections(
    files: Sequence[str], options: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """What files hold, with the classes that options choose; the last that is named for a section wins.

    Naming another class for a section, or for a setting that holds one, forgets the settings of the class before.

    Returns:
        The sections, with values as they were written; and the other options, dotted keys of files among them.

    Raises:
        ConfigError: a file or recipe cannot be read, or a class cannot be what it is given for.
    """
    chosen: dict[str, Any] = {}
    held: dict[str, Any] = {}
    others: list[tuple[str, str]] = []
    for key, value in options:
        name = key.removesuffix(".class_path")
        if name in CLASS_SECTIONS:
            chosen[name] = class_section(name, _in_braces(name, value))
        elif name in _HELD:
            if name != key:
                find_class(_HELD[name], value)
            held[_HELD[name]] = _as_held(_HELD[name], _in_braces(_HELD[name], value))
        else:
            others.append((key, value))
    _move_to_step(chosen, "one option")
    settings = read_settings(files, chosen.pop("method", None))
    settings.pop("compare", None)
    _merge(settings, chosen)
    for name, (_, default) in CLASS_SECTIONS.items():
        if name not in settings:
            if default is None:
                raise ConfigError(f"{name} is missing: give --{name} CLASS, or a recipe (--config digits)")
            settings[name] = class_section(name, default)
    for key, value in held.items():
        section, name = key.split(".")
        _merge(settings[section].setdefault("init_args", {}), {name: value})
    dotted = [(key, settings.pop(key)) for key in [*settings] if "." in key]
    return settings, [*dotted, *others]


def set_options(settings: dict[str, Any], options: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Set what options say, later ones over earlier ones; returns by which name they called a setting of a step.

    Raises:
        ConfigError: an option goes into what is no class.
    """
    called: dict[str, str] = {}
    for key, value in options:
        name = key.removeprefix("optimizer.").removeprefix("init_args.")
        if name in OF_A_STEP and not (key != name and takes("optimizer", settings["optimizer"]["class_path"], name)):
            called[name] = name if key == name else f"optimizer.{name}"
            key = name
        path = [part for part in key.split(".") if part != "init_args"] or [key]
        if (held := ".".join(path[:2])) in HELD and takes(path[0], settings[path[0]]["class_path"], path[1]):
            path = path[:2] if path[2:] == ["class_path"] else path
            arguments, default = settings[path[0]].setdefault("init_args", {}), HELD[held][1]
            if len(path) == 2:
                value = _as_held(held, value)
            elif not isinstance(arguments.get(path[1]), dict):
                if default is None:
                    kinds = " or ".join(known_classes(held))
                    raise wrong(".".join(path), value, f"must come with a class, --{held} {kinds}")
                arguments[path[1]] = class_section(held, default)
        if len(path) == 1 and path[0] in CLASS_SECTIONS:
            section = {"class_path": settings[path[0]]["class_path"], "init_args": _in_braces(key, value)}
            value = class_section(path[0], section)
        if path[-1].endswith("+") and isinstance(value, str):
            value = _load(value, key, value)
        _set(settings, path, value)
    return called


def read_settings(files: Sequence[str], method: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read YAML files and recipes; later ones win, and a section of another class replaces the one before.

    What the ``methods`` of a file say of the method that runs wins over the rest of that file; what they say of the
    others is left out. They may also give a name to a variant, ``QSR: {method: LocalSGD, method.period: QSR}``: it runs
    where a method of that name is asked for, with what they say of its class and then of itself, and the section says
    its name (``variant``).

    Args:
        files: YAML files, recipes, or a recipe and a method in one (``digits_easgd``).
        method: the section that the command line gives; else the method is the last that a file names, or the default.

    Raises:
        ConfigError: a file or recipe does not exist, or does not hold sections.
    """
    read = [_read(name) for name in files]
    named = [one["method"] for one in read if "method" in one] + ([method] if method else [])
    chosen = named[-1] if named else class_section("method", CLASS_SECTIONS["method"][1])
    name = chosen["class_path"]
    path = _class_of(name, read)
    settings: dict[str, Any] = {}
    for one in [*read, {"method": method}] if method else read:
        lines = one.pop("methods", {})
        if "method" in one and one["method"]["class_path"] == name:
            one["method"] = {**one["method"], "class_path": path}
        _merge(settings, one)
        for own in (lines[key] for key in dict.fromkeys((path, name)) if lines.get(key)):
            _merge(settings, {"method": {"class_path": path}})
            sections = _as_sections(own, settings)
            if (other := {"method": {"class_path": path}, **sections}["method"]["class_path"]) != path:
                raise ConfigError(f"method is {short(other)} in methods: must be {short(path)} there")
            _merge(settings, sections)
    if path != name:
        settings["method"]["variant"] = name
    return settings


def _class_of(name: str, read: Sequence[dict[str, Any]]) -> str:
    """The import path of a method, or of the one that a variant in ``methods`` is of."""
    if "." in name:
        return name
    named = [lines["method"] for one in read if "method" in (lines := one["methods"].get(name, {}))]
    return str(class_section("method", named[-1])["class_path"]) if named else name


def class_section(name: str, section: object) -> dict[str, Any]:
    """``{"class_path": ..., "init_args": ...}``, whichever way a class was given."""
    section = {"class_path": section} if isinstance(section, str) else section
    keys = set(section) if isinstance(section, dict) else set()
    if not isinstance(section, dict) or "class_path" not in keys or keys - {"class_path", "init_args", "dict_kwargs"}:
        raise wrong(name, section, "must be a class, or class_path: CLASS with init_args: {its settings}")
    section = {**section, "class_path": import_path(name, str(section["class_path"]))}
    arguments = section.setdefault("init_args", None)
    if arguments is None:
        del section["init_args"]
    elif not isinstance(arguments, dict):
        raise wrong(f"{name}.init_args", arguments, "must hold settings (key: value)")
    else:
        section["init_args"] = {key: _as_held(f"{name}.{key}", value) for key, value in arguments.items()}
    return section


def _read(name: str) -> dict[str, Any]:
    try:
        path = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError as error:
        raise wrong("config", name, f"cannot be read ({error.strerror})") from None
    if text is None:
        recipe, _, method = name.rpartition("_")
        called = {known.lower(): known for known in known_classes("method")}
        if recipe in recipes() and method in called:
            return {**_read(recipe), "method": class_section("method", called[method])}
        raise wrong("config", name, f"must be a file or one of the recipes {', '.join(recipes())}")
    settings = _load(text, "config", name)
    if not isinstance(settings, dict):
        raise wrong("config", name, f"must hold sections (key: value), found {type(settings).__name__}")
    # method.class_path is short for the section, too.
    named = {_class_key(str(key)): section for key, section in settings.items()}
    settings = {key: _section(key, section, name) for key, section in named.items()}
    settings["methods"] = _methods(settings, name)
    _move_to_step(settings, name)
    return settings


def _class_key(key: str) -> str:
    """A section, where a dotted key names its class; else the key."""
    name = key.removesuffix(".class_path")
    return name if name in CLASS_SECTIONS else key


def _load(text: str, what: str, value: str) -> Any:
    try:
        return load_yaml(text)
    except Exception as error:  # what a loader raises is its own affair
        raise wrong(what, value, f"must be YAML ({in_a_line(error)})") from None


def _in_braces(what: str, value: Any) -> Any:
    """An option's value: settings in braces, or else as it was written."""
    return _load(value, what, value) if isinstance(value, str) and value.startswith("{") else value


def _section(name: str, section: Any, where: str) -> Any:
    """A section as a file may give it, with its class spelled out."""
    if name in GROUPS and not isinstance(section, dict):
        raise ConfigError(f"{name} is {section} in {where}: must hold settings (key: value)")
    return class_section(name, section) if name in CLASS_SECTIONS else section


def _methods(settings: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """What methods have of their own in a file, by import path; a comparison may say it where it names them."""
    own, compared = settings.get("methods") or {}, settings.get("compare")
    if isinstance(compared, dict) and isinstance(compared.get("methods"), dict) and isinstance(own, dict):
        more = {method: lines or own.get(method) for method, lines in compared["methods"].items()}
        own = {**own, **more}
        compared["methods"] = list(compared["methods"])
    if not isinstance(own, dict) or not all(isinstance(lines or {}, dict) for lines in own.values()):
        raise ConfigError(f"methods is {own} in {name}: must hold settings for methods (EASGD: {{method.period: 16}})")
    for method, lines in own.items():
        variant = "." not in import_path("method", str(method)) and "method" in (lines or {})
        find_class("method", class_section("method", lines["method"])["class_path"] if variant else str(method))
    return {import_path("method", str(method)): lines or {} for method, lines in own.items()}


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
    _move_to_step(sections, "methods")
    return sections


def _move_to_step(settings: dict[str, Any], where: str) -> None:
    """Take what belongs to the step out of the optimizer's settings, where it was, unless the optimizer knows it."""
    given = settings.get("optimizer", {}).get("init_args") or {}
    for name in OF_A_STEP:
        if name in given and not takes("optimizer", settings["optimizer"]["class_path"], name):
            if name in settings:
                both = f"{name} is {settings[name]} and optimizer.{name} is {given[name]}"
                raise ConfigError(f"{both} in {where}: must be given once, as {name}")
            settings[name] = given.pop(name)


def takes(key: str, path: str | None, name: str) -> bool:
    """Whether a class, of a section or held by one, has a setting of that name."""
    try:
        return name in signature(find_class(key, path or "")).parameters
    except (ConfigError, TypeError, ValueError):
        return False


def _as_held(name: str, value: Any) -> Any:
    """A section's setting: a class spelled out where it may hold one, and anything else as it is."""
    if name not in HELD:
        return value
    try:
        find_class(name, value["class_path"] if isinstance(value, dict) else value)
    except (ConfigError, KeyError, TypeError, AttributeError):  # no class; its type will say so
        return value
    return class_section(name, value)


def _merge(settings: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        old = settings.get(key)
        if not (isinstance(value, dict) and isinstance(old, dict)):
            settings[key] = value
        elif value.get("class_path") == old.get("class_path"):
            _merge(old, value)
        elif "class_path" not in value:
            there, own = old.get("init_args") or {}, value.get("init_args", value) or {}
            old["init_args"] = there if isinstance(own, dict) else own  # which the check of types refuses
            if isinstance(there, dict) and isinstance(own, dict):
                _merge(there, own)
        else:
            settings[key] = value


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    """Give a setting that an option names; classes on the way to it take it among their ``init_args``."""
    name, *inner = path
    if not inner:
        if name in GROUPS:
            value = _section(name, _in_braces(name, value), "an option")
        elif isinstance(value, str) and re.match(r"\{\s*['\"]?class_path\b", value):
            value = _load(value, name, value)
        if name.endswith("+"):
            name = name[:-1]
            there = settings.get(name)
            there = (_load(there, name, there) if isinstance(there, str) else there) or []
            value = [*(there if isinstance(there, list) else [there]), *(value if isinstance(value, list) else [value])]
        _merge(settings, {name: value})
        return
    old = settings.get(name)
    if inner == ["class_path"]:
        _merge(settings, {name: {"class_path": value}})
        return
    if isinstance(old, str) and "." in old:
        old = settings[name] = {"class_path": old}
    elif not isinstance(old, dict):
        old = settings[name] = {}
    if "class_path" in old:
        old["init_args"] = old.get("init_args") or {}
        old = old["init_args"]
    _set(old, inner, value)
