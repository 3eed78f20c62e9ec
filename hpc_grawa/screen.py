"""What a screen can show: lines as wide as it is, and of characters that it lacks what stands in their place."""

from __future__ import annotations

import codecs
import io
import shutil
import sys
from textwrap import fill

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

    Greek letters by name, ``±`` as ``+-``; bytes of a file's name that are no text, and letters, as ``\udcff``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="hpc_grawa.spell")


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
