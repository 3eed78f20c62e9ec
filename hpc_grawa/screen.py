"""What a screen that does not know a character shows in its place."""

from __future__ import annotations

import codecs
import io
import sys

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
    "½": "1/2",
    "²": "^2",
    "⁸": "^8",
    "₂": "_2",
    "\u0304": "_mean",  # x̄
    "…": "...",
    "α": "alpha",
    "β": "beta",
    "η": "eta",
    "λ": "lambda",
    "μ": "mu",
    "π": "pi",
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
