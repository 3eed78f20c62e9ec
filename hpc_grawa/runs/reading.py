"""The files of a run's folder, read back: what is damaged is one line that names it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from jsonargparse import get_loader

from ..errors import Damaged, in_a_line


def read_text(file: Path, errors: str = "strict") -> str | None:
    """What a file of a run's folder holds; None if there is none.

    Args:
        file: to be read.
        errors: as ``open`` has it: what to do with bytes that are no text.

    Raises:
        Damaged: it is there, and cannot be read, or is no text; names it.
    """
    try:
        return file.read_text(encoding="utf-8", errors=errors)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise Damaged(f"{file} is not text: {error}") from None


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file of a run's folder; None if there is no file.

    Raises:
        Damaged: it is there, and holds something else; names it.
    """
    text = read_text(file)
    return None if text is None else parse_object(text, str(file))


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object; ``Damaged`` that names ``where`` it should be if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Damaged(f"{where} is {text[:40]!r}: must be a JSON object")
    return found


#: Where bytes of a file's name that are no text, lone surrogates in Python, stand for YAML, which refuses them.
_ASIDE = {0xDC00 + byte: 0x10FF00 + byte for byte in range(0x80, 0x100)}
_BACK = {aside: own for own, aside in _ASIDE.items()}
_plain_yaml = get_loader("yaml")


def load_yaml(text: str) -> Any:
    """Read YAML as jsonargparse does, and in it the names of files as they are in this process's locale."""
    text = re.sub(r"\\uDC([89A-F][0-9A-F])", lambda found: chr(0x10FF00 + int(found[1], 16)), text, flags=re.I)
    return _in_this_locale(_plain_yaml(text.translate(_ASIDE)))


def _in_this_locale(value: Any) -> Any:
    if isinstance(value, dict):
        return {_in_this_locale(key): _in_this_locale(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_this_locale(item) for item in value]
    if isinstance(value, str):
        return os.fsdecode(value.translate(_BACK).encode("utf-8", "surrogateescape"))
    return value


def parse_settings(text: str, where: str) -> dict[str, Any]:
    """The sections in YAML; ``Damaged`` that names ``where`` they should be if there are none."""
    try:
        found = load_yaml(text)
    except Exception as error:  # what a loader raises is its own affair
        raise Damaged(f"{where} is not YAML: {in_a_line(error)}") from None
    if not isinstance(found, dict):
        raise Damaged(f"{where} is {text[:40]!r}: must hold a run's settings")
    return found
