"""The folder that jobs are submitted from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site(tmp_path / "a site")
    monkeypatch.chdir(made.folder)
    yield made
    print(made.logs())  # shown where the test failed
