"""The program hpc-grawa."""

from .main import main

__all__ = ["main"]
