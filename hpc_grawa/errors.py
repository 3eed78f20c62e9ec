"""The errors of this package, each named after what went wrong, and what any error says in one line."""

from __future__ import annotations

import math


class ConfigError(ValueError):
    """What was asked for cannot work: a setting, or the folder, data or program that it names.

    Names key, value and what is allowed: who has asked can ask otherwise. Ends a program with one line and status 2.

    Attributes:
        what: the key, where ``wrong`` made it; else None.
        value: of the key.
        fix: what is allowed.
    """

    what: str | None = None
    value: object = None
    fix: str = ""


def wrong(what: str, value: object, fix: str) -> ConfigError:
    """The error of a key whose value cannot be.

    Example:
        >>> wrong("data.fraction", 0, "must be in (0, 1]")
        ConfigError('data.fraction is 0: must be in (0, 1]')
    """
    error = ConfigError(f"{what}: {fix}" if value == "" else f"{what} is {value}: {fix}")
    error.what, error.value, error.fix = what, value, fix
    return error


def require(condition: bool, what: str, value: object, allowed: str) -> None:
    """Raise ``ConfigError`` unless the condition holds: a key's value must be what is allowed."""
    if not condition:
        raise wrong(what, value, f"must be {allowed}")


def not_negative(section: str, settings: object, *names: str) -> None:
    """Raise ``ConfigError`` unless each of these settings of a section is a finite number ≥ 0."""
    for name in names:
        value = getattr(settings, name)
        require(0 <= value < math.inf, f"{section}.{name}", value, "a number of 0 or more")


def unit_interval(section: str, settings: object, *names: str) -> None:
    """Likewise, unless each is in [0, 1] (NaN is not)."""
    for name in names:
        value = getattr(settings, name)
        require(0 <= value <= 1, f"{section}.{name}", value, "in [0, 1]")


def below_one(section: str, settings: object, *names: str) -> None:
    """Likewise, unless each is in [0, 1), as momenta and decays are."""
    for name in names:
        value = getattr(settings, name)
        require(0 <= value < 1, f"{section}.{name}", value, "in [0, 1)")


class RanksDisagree(RuntimeError):
    """Ranks that must agree (model, method, learning rate, period, step) do not; names the rank and the difference."""


class NonFinite(ArithmeticError):
    """A number that every rank needs is NaN or infinite on all of them; raised on all ranks at one step."""


class Damaged(RuntimeError):
    """A file of a run, or an image of packed data, is not what was written; names it and what is wrong with it.

    Raised on the ranks that read it: no other setting mends it. Ends a program with one line and status 2.
    """


class LostView(RuntimeError):
    """A parameter no longer lives in its ``ParameterVector``; names the parameter and the likely cause."""


class Unmatched(RuntimeError):
    """Simulated ranks made different calls, or some ended while others wait; names the ranks and their calls."""


class LostContact(RuntimeError):
    """A message can no longer arrive, as a rank is gone; says what the backend said."""


def in_a_line(error: BaseException, named: bool = False) -> str:
    r"""What an error says, on one line; ``named``: after the name of its type.

    Example:
        >>> in_a_line(ValueError("two\n  lines")), in_a_line(ValueError("two"), named=True)
        ('two lines', 'ValueError: two')
    """
    return " ".join((f"{type(error).__name__}: {error}" if named else str(error)).split())


def label(thing: object) -> str:
    """What messages call an optimizer: the name of the class that it was made by, if it says one, else of its own."""
    return str(getattr(thing, "label", type(thing).__name__))
