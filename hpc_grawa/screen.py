"""What people see: lines as wide as their screen, and of characters that it lacks what stands in their place."""

from __future__ import annotations

import codecs
import io
import os
import shutil
import sys
from contextlib import suppress
from textwrap import fill
from typing import TextIO

from .launch import own_slot

#: Columns of a screen that does not wrap.
ENDLESS = 10_000
#: Of what this package writes, in ASCII.
_SPELLED = {
    "←": "<-",
    "→": "->",
    "·": "*",
    "⊙": "*",
    "×": "x",
    "±": "+-",
    "−": "-",
    "–": "-",
    "∝": "~",
    "≥": ">=",
    "≤": "<=",
    "√": "sqrt",
    "Σ": "sum",
    "∇": "grad ",
    "‖": "||",
    "⌈": "ceil(",
    "⌉": ")",
    "⌊": "floor(",
    "⌋": ")",
    "Δ": "Delta",
    "ᵀ": "^T",
    "½": "1/2",
    "²": "^2",
    "⁸": "^8",
    "₂": "_2",
    "\u0304": "_mean",  # x̄
    "…": "...",
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "ε": "epsilon",
    "η": "eta",
    "κ": "kappa",
    "λ": "lambda",
    "μ": "mu",
    "π": "pi",
    "ρ": "rho",
    "σ": "sigma",
    "τ": "tau",
}


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    return "".join(_SPELLED.get(c, c).encode("ascii", "backslashreplace").decode() for c in unknown), error.end


codecs.register_error("hpc_grawa.spell", _spell)


def spell_unknown_characters() -> None:
    r"""From now on print what the screen's encoding lacks in ASCII, instead of raising ``UnicodeEncodeError``.

    Greek letters by name, ``±`` as ``+-``; bytes of a file's name that are no text, and letters, as ``\udcff``. What is
    printed where the program was started without an output (``>&-``) is lost.
    """
    if not (sys.stdout and sys.stderr):
        nowhere = open(os.devnull, "w")  # noqa: SIM115 - as long as the program
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="hpc_grawa.spell")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line by one write: horovodrun puts its prefix before each, and an unbuffered print makes two.

    A line for which there is no room, on a full disk say, is lost: that neither ends a job nor keeps it from ending.

    Args:
        text: the line, or several.
        stream: the standard output (None) or error.

    Raises:
        BrokenPipeError: whoever read the standard output is gone.
    """
    stream = stream or sys.stdout
    if stream is None:  # in a script that was started without an output
        return
    try:
        stream.write(text + "\n")
        stream.flush()
    except (OSError, ValueError) as error:  # no room, closed
        if isinstance(error, BrokenPipeError) and stream is sys.stdout:
            raise
        drop(stream)


def drop(stream: TextIO) -> None:
    """Lose what a stream could not write so far, which would fail again when the program ends."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # no file, but a notebook's; closed
        place = stream.fileno()
        kept = os.dup(place)
        os.dup2(nowhere.fileno(), place)
        stream.flush()
        os.dup2(kept, place)
        os.close(kept)


def flush() -> None:
    """Both streams, before a process is ended."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # no room, closed, none
            stream.flush()


def as_shown(text: str) -> str:
    """``text`` as the screen will show it, which may take more room."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "hpc_grawa.spell").decode(encoding)


def is_terminal() -> bool:
    """Whether somebody looks on: not at a launcher's rank, to which mpirun gives a terminal that it makes itself."""
    return sys.stdout.isatty() and own_slot().launcher is None


def columns(most: int = ENDLESS) -> int:
    """The width of the terminal, ``most`` of a wider one and where there is none."""
    return min(most, shutil.get_terminal_size().columns) if is_terminal() else most


def counted(number: int, thing: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "rank"), counted(12, "rank")
        ('1 rank', '12 ranks')
    """
    return f"{number} {thing}" + "s" * (number != 1)


def wrapped(line: str, most: int = ENDLESS, first: str = "", others: str = "") -> str:
    """A line as several that fit the screen, the first and the others behind indents."""
    return fill(
        as_shown(line),
        columns(most),
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
        break_long_words=False,
    )
