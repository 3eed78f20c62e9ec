"""The folder that jobs are submitted from."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import LIMIT, Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site(tmp_path / "a site")
    monkeypatch.chdir(made.folder)
    yield made
    # Where the test has failed they would take nodes and cores from others.
    subprocess.run(["scancel", *made.jobs], capture_output=True, timeout=LIMIT, check=False)
    print(made.logs())  # shown where the test failed
