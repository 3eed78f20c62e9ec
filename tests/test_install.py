"""`pip install .` takes what an environment has: it never brings another torch. Horovod's build names what it lacks.

The environments here are thrown away after. No network: pip has no index, so whatever it would replace or add is an
error that names it.
"""

from __future__ import annotations

import configparser
import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import setuptools
import torch
from launcher import HOROVOD

from hpc_grawa.install import horovod

REPO = Path(__file__).parents[1]
SITE_PACKAGES = Path(torch.__file__).parents[1]
LEFT_OUT = ("hpc_grawa*", "__editable__*", "horovod*", ".throw-away-*", "*.pyc.*", "include", "tests")


@pytest.fixture
def environment() -> Iterator[Path]:
    """An empty environment, on the file system of this one so that files can be hard links."""
    with tempfile.TemporaryDirectory(dir=SITE_PACKAGES, prefix=".throw-away-") as folder:
        venv.create(folder)
        yield Path(folder)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What an install reads, copied, for pip builds in the folder that it is given."""
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tmp_path)
    shutil.copytree(REPO / "hpc_grawa", tmp_path / "hpc_grawa", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def site_packages(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


def link(source: Path, target: Path) -> None:
    """Copy a folder by hard links: real files, which pip may remove without harm, but 5 GB in seconds."""
    ignored = shutil.ignore_patterns(*LEFT_OUT)
    shutil.copytree(source, target, copy_function=os.link, symlinks=True, dirs_exist_ok=True, ignore=ignored)


def pip_install(environment: Path, checkout: Path) -> None:
    command = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "-q"]
    done = subprocess.run(
        [*command, "--no-index", "--no-build-isolation", checkout],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))},
    )
    assert done.returncode == 0, done.stderr


def python(environment: Path, code: str, cwd: Path) -> str:
    command = [environment / "bin/python", "-I", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout.strip()


def lower_bounds() -> dict[str, str]:
    settings = configparser.ConfigParser()
    settings.read(REPO / "setup.cfg")
    found = {}
    for requirement in settings["options"]["install_requires"].split():
        match = re.fullmatch(r"([a-z0-9]+)(?:\[.*\])?>=([\d.]+)", requirement)
        assert match, f"{requirement} is more than a lower bound: it can replace what is there"
        found[match[1]] = match[2]
    return found


def test_the_oldest_releases_are_kept(environment: Path, checkout: Path) -> None:
    """Stand-ins, which pip cannot tell from the real thing: the lower bounds suffice, and nothing else is asked for."""
    site = site_packages(environment)
    for name, release in lower_bounds().items():
        record = site / f"{name}-{release}.dist-info"
        record.mkdir()
        extra = "Provides-Extra: signatures\n" if name == "jsonargparse" else ""
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n{extra}")
        (record / "INSTALLER").write_text("pip\n")
        (record / "RECORD").write_text(f"{name}.py,,\n{record.name}/METADATA,,\n{record.name}/RECORD,,\n")
        (site / f"{name}.py").write_text(f"__version__ = '{release}'\n")
    for pattern in ("setuptools", "setuptools-*.dist-info", "_distutils_hack", "pkg_resources"):
        for source in Path(setuptools.__file__).parents[1].glob(pattern):
            link(source, site / source.name)

    pip_install(environment, checkout)

    for name, release in lower_bounds().items():
        assert python(environment, f"import {name}; print({name}.__version__)", checkout) == release
    for file in ("py.typed", "install/constraints.txt", "install/horovod.py", "recipes/demo.yaml"):
        assert (site / "hpc_grawa" / file).is_file(), file
    assert (environment / "bin/hpc-grawa").is_file()


@pytest.mark.slow
def test_the_torch_that_is_there_is_kept(environment: Path, checkout: Path) -> None:
    """The real thing: every package of this environment but ours."""
    site = site_packages(environment)
    link(SITE_PACKAGES, site)
    releases = "from importlib.metadata import distributions as d; print(sorted((i.name, i.version) for i in d()))"
    before = python(environment, releases, checkout)

    pip_install(environment, checkout)

    assert python(environment, releases, checkout) == str(sorted([*eval(before), ("hpc-grawa", "0.1.0")]))
    seen = python(environment, "import torch, hpc_grawa; print(torch.__version__, hpc_grawa.__file__)", checkout)
    assert seen == f"{torch.__version__} {site / 'hpc_grawa/__init__.py'}"


TARGET = horovod.Target("2.15.0+cu132", Path("bin/mpicxx"), "openmpi4.1.8", ("$ORIGIN/../../../..",), "")


def test_horovod_is_kept_by_what_it_was_built_for() -> None:
    others = [replace(TARGET, torch="2.13.0+cu130"), replace(TARGET, mpi="mpi0123abcd"), replace(TARGET, gpu="NCCL")]
    assert len({horovod.cache_key(target) for target in [TARGET, *others]}) == 4


def test_an_edit_that_does_not_fit_is_named(tmp_path: Path) -> None:
    edit = horovod.Edit("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 20)")
    with pytest.raises(horovod.AnchorNotFoundError, match=r"CMakeLists\.txt .* no 'set\(CMAKE_CXX_STANDARD 14\)'"):
        horovod.apply(edit, tmp_path)
    (tmp_path / "CMakeLists.txt").write_text("project(horovod)\nset(CMAKE_CXX_STANDARD 14)\n")
    horovod.apply(edit, tmp_path)
    assert (tmp_path / "CMakeLists.txt").read_text() == "project(horovod)\nset(CMAKE_CXX_STANDARD 20)\n"


def test_horovod_without_a_compiler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(horovod, "find_target", lambda: TARGET)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert horovod.main([]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Horovod 0.28.1: not installed. no C++ compiler") and err.count("\n") == 1


@pytest.mark.skipif(not HOROVOD, reason="Horovod is not built here")
def test_horovods_rendezvous_forgets_every_address_once_all_have_found_each_other() -> None:
    """Of a scope of both ranks, though a scope of one is done in between; else the next start finds old ones."""
    from horovod.runner.common.util.hosts import SlotInfo
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port = server.start()
    server.init([SlotInfo("here", rank, rank, 0, 2, 2, 1) for rank in range(2)])

    def ask(method: str, key: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, f"/{key}", body=b"address" if method == "PUT" else None)
        return connection.getresponse().status

    for key in ("local_here/0", "local_here/1", "cross_0/0"):
        assert ask("PUT", key) == 200 == ask("GET", key)
    for key in ("local_here/0", "cross_0/0", "local_here/1"):
        assert ask("DELETE", key) == 200
    found = [ask("GET", key) for key in ("local_here/0", "local_here/1", "cross_0/0")]
    server.stop()
    assert found == [404, 404, 404]


def test_a_torch_that_a_module_brings_is_seen_by_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/site/torch")
    assert horovod.before_others(Path("/tools")) == "/tools:/site/torch"
    monkeypatch.delenv("PYTHONPATH")
    assert horovod.before_others("/tools") == "/tools"
