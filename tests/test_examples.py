"""The examples in docstrings of the package."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
from launcher import ROOT

MODULES = [file.relative_to(ROOT) for file in sorted((ROOT / "hpc_grawa").rglob("*.py")) if ">>> " in file.read_text()]


@pytest.mark.parametrize("file", MODULES, ids=str)
def test_examples_give_what_they_say(file: Path) -> None:
    module = import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
    assert doctest.testmod(module).failed == 0  # it prints them
