"""What foretells the gap between training and test: measures of networks, and how well they rank runs."""

from .correlation import conditional_information, granulated, psi, tau
from .folding import fold
from .measures import NUMBERS, Measured, measures

__all__ = ["NUMBERS", "Measured", "conditional_information", "fold", "granulated", "measures", "psi", "tau"]
