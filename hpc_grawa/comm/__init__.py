"""Communication: one ``Communicator`` interface, one file per backend."""

from .base import Communicator, Meter, Purpose, Work
from .simulated import simulate

__all__ = ["Communicator", "Meter", "Purpose", "Work", "simulate"]
