"""Methods on a function of two numbers whose valleys differ in their flatness only."""

from .figure import draw, draw_surfaces, draw_weights
from .rounds import Pulled, first_round
from .table import table
from .vincent import Descent, Vincent, descend, valley, vincent

__all__ = [
    "Descent",
    "Pulled",
    "Vincent",
    "descend",
    "draw",
    "draw_surfaces",
    "draw_weights",
    "first_round",
    "table",
    "valley",
    "vincent",
]
