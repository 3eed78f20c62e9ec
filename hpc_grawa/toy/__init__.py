"""Methods on a function of two numbers whose valleys differ in their flatness only."""

from .figure import draw
from .table import table
from .vincent import Descent, Vincent, descend, valley, vincent

__all__ = ["Descent", "Vincent", "descend", "draw", "table", "valley", "vincent"]
