"""The files of a run's folder, read back: what is damaged is one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonargparse import get_loader

from .errors import ConfigError


def read_text(file: Path) -> str | None:
    """What a file of a run's folder holds; None if there is none.

    Raises:
        ConfigError: it is there, and is no text; names it.
    """
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text: {error}") from None


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file of a run's folder; None if there is no file.

    Raises:
        ConfigError: it is there, and holds something else; names it.
    """
    text = read_text(file)
    return None if text is None else parse_object(text, str(file))


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object; ``ConfigError`` that names ``where`` it should be if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is {text[:40]!r}: must be a JSON object")
    return found


def parse_settings(text: str, where: str) -> dict[str, Any]:
    """The sections in YAML; ``ConfigError`` that names ``where`` they should be if there are none."""
    try:
        found = get_loader("yaml")(text)
    except Exception as error:  # what a loader raises is its own affair
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is {text[:40]!r}: must hold a run's settings")
    return found
