"""What a setting may be, in words: from its type and its value."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, is_typeddict

from torch import Tensor

from .classes import PATH, choice, imported

_WORDS: dict[Any, str] = {
    NoneType: "null",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "key: value pairs",
}


def alternatives(kind: Any) -> list[tuple[Any, Any]]:
    """The types of a union, or the type itself; each with what it is without arguments.

    Example:
        >>> alternatives(int | list[float])
        [(<class 'int'>, <class 'int'>), (list[float], <class 'list'>)]
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [(one, get_origin(one) or one) for one in kinds]


def must_be(key: str, kind: Any, value: Any) -> str:
    """What a value of a type must be.

    Args:
        key: some have classes that need no import path (``method.period``).
        kind: the type.
        value: which it is not.

    Example:
        >>> must_be("steps", int | None, "x"), must_be("unit", Literal["steps", "epochs"], 3)
        ('must be a whole number or null', 'must be one of steps, epochs')
    """
    kinds = alternatives(kind)
    # torch's lr: float | Tensor
    kinds = [one for one in kinds if one != (Tensor, Tensor)] or kinds
    return "must be " + " or ".join(dict.fromkeys(_words(key, *one, value) for one in kinds))


def _words(key: str, kind: Any, origin: Any, value: Any) -> str:
    arguments = get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}"
    if origin is list and arguments and arguments[0] in (int, float):
        return f"a list of {'whole ' if arguments[0] is int else ''}numbers"
    if origin in _WORDS:
        return _WORDS[origin]
    if is_typeddict(origin):
        return _WORDS[dict]
    if isinstance(origin, type) and issubclass(origin, Enum):
        return f"one of {', '.join(origin.__members__)}"
    if origin is Callable:
        return _class_words(key, "function", f"a function or a class of type {kind}", value)
    if isinstance(origin, type):
        return _class_words(key, origin.__name__, f"a class derived from {origin.__name__}", value)
    return str(kind)


def _class_words(key: str, name: str, derived: str, value: Any) -> str:
    """Of what holds an object of a class, or a function."""
    if value is None:
        return f"a {name}"
    if isinstance(value, dict):
        return "a class (class_path: CLASS with init_args: {its settings})"
    if isinstance(value, str) and not value.startswith(("[", "{")):
        if "." not in value or not all(part.isidentifier() for part in value.split(".")):
            return choice(key)
        _, why = imported(value)
        if why:
            return f"{PATH}: {why}"
    return derived


def no_setting(key: str, keys: Sequence[str], owner: str = "") -> str:
    """A key that does not exist, in a class ``owner`` if any: the one that was meant, and its neighbours."""
    missing = f"{key} is no setting of {owner}" if owner else f"{key} is no setting"
    section = (key.rpartition(".")[0] or key) + "."
    neighbours = [k.removeprefix(section) for k in keys if k.startswith(section)]
    inner = [k for k in keys if k != key and k.startswith(section) and k.endswith("." + key.removeprefix(section))]
    near = inner or [section + k for k in difflib.get_close_matches(key.removeprefix(section), neighbours, 1)]
    near += difflib.get_close_matches(key, [k for k in keys if not k.startswith(section)], 1)
    allowed = neighbours or list(dict.fromkeys(k.partition(".")[0] for k in keys))
    if not allowed:
        return f"{missing}: there are none here"
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{missing}: {hint}must be one of {', '.join(allowed)}"
