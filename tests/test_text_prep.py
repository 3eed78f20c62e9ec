"""data_prep/text.py on small texts: what it leaves, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ilsvrc import script
from launcher import ROOT

SCRIPT = ROOT / "data_prep" / "text.py"
PARTS = ("train", "validation", "test")
text: Any = script("text")
verify: Any = script("verify")


def prepare(out: Path, *files: Path, **options: Any) -> int:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    status: int = text.main(["--files", *map(str, files), "--out", str(out), *words])
    return status


def refused(
    capsys: pytest.CaptureFixture[str], out: Path, *files: Path, words: tuple[str, ...], **options: Any
) -> None:
    """Exit status 2, one line on stderr with ``words``, and nothing new on disk."""
    before = sorted(out.parent.rglob("*"))
    capsys.readouterr()
    assert prepare(out, *files, **options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("text.py: ")
    for word in words:
        assert word in line
    assert sorted(out.parent.rglob("*")) == before


def written(folder: Path, *contents: bytes) -> list[Path]:
    files = [folder / f"{number}.txt" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    return files


CONTENTS = ("Ω, ω and \N{GOTHIC LETTER AHSA}.\r\n".encode() * 9, "eins zwei drei é\n".encode() * 40, b"")


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_parts_together_are_the_files_one_after_the_other(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = written(tmp_path, *CONTENTS), tmp_path / "new" / "out"
    assert prepare(out, *files, tokens=kind, validation=0.1, test=0.2) == 0
    facts = json.loads((out / "meta.json").read_text())
    parts = [np.load(out / f"{part}.npy") for part in PARTS]
    assert {path.name for path in out.iterdir()} == {"meta.json", *(f"{part}.npy" for part in PARTS)}
    stream = np.concatenate(parts)
    whole = b"".join(CONTENTS)
    if kind == "bytes":
        assert facts["vocabulary"] is None and facts["vocabulary_size"] == 256 and stream.tobytes() == whole
    else:
        characters = facts["vocabulary"]
        assert characters == sorted(set(whole.decode())) and facts["vocabulary_size"] == len(characters)
        assert "".join(characters[token] for token in stream) == whole.decode()
    total = len(stream)
    assert facts["counts"] == dict(zip(PARTS, map(len, parts), strict=True))
    assert (len(parts[1]), len(parts[2])) == (int(0.1 * total), int(0.2 * total))
    assert {part.dtype for part in parts} == {np.dtype(np.uint8)} and facts["dtype"] == "uint8"
    for source, content in zip(facts["sources"], CONTENTS, strict=True):
        assert (source["bytes"], source["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert [source["file"] for source in facts["sources"]] == [file.name for file in files]
    assert verify.main([str(out)]) == 0
    assert f"{len(parts[2]):,} test {kind}, 3 files" in capsys.readouterr().out


def test_many_characters_take_two_bytes_each(tmp_path: Path) -> None:
    content = "".join(map(chr, range(0x4E00, 0x4E00 + 300))) * 3
    assert prepare(tmp_path / "out", *written(tmp_path, content.encode()), tokens="characters") == 0
    facts = json.loads((tmp_path / "out" / "meta.json").read_text())
    stream = np.concatenate([np.load(tmp_path / "out" / f"{part}.npy") for part in PARTS])
    assert stream.dtype == np.uint16 and facts["dtype"] == "uint16"
    assert "".join(facts["vocabulary"][token] for token in stream) == content


@pytest.mark.parametrize(("kind", "bits"), [("bytes", 3.0), ("characters", 2.0)])
def test_the_entropy_is_per_byte(kind: str, bits: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight equally frequent tokens are 3 bits each, of 1 byte, or 1.5 on average."""
    content = "abcdäöüß" if kind == "characters" else "abcdefgh"
    assert prepare(tmp_path / "out", *written(tmp_path, content.encode() * 50), tokens=kind) == 0
    assert f"entropy      {bits:.2f} bits per byte" in capsys.readouterr().out


def test_a_second_run_finds_its_work_done_and_other_content_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,), out = written(tmp_path, b"some text\n" * 30), tmp_path / "out"
    assert prepare(out, file) == 0
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(out, file) == 0
    assert "already holds exactly this" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    refused(capsys, out, file, tokens="characters", words=(str(out), "not empty", "--out"))
    refused(capsys, file, file, words=("is a file",))


def test_what_cannot_be_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, latin, short = written(tmp_path, b"some text\n" * 30, "é".encode("latin-1") + b"a" * 99, b"a" * 30)
    out = tmp_path / "out"
    refused(capsys, out, tmp_path / "nowhere", words=("nowhere", "No such file", "check the path"))
    refused(capsys, out, good, tmp_path, words=("is a folder", f"{tmp_path}/*"))
    refused(capsys, out, good, latin, tokens="characters", words=(str(latin), "byte 0 is no UTF-8", "--tokens bytes"))
    refused(capsys, out, short, words=("30 tokens leave 1 for validation", "must be 2 at least"))
    refused(capsys, out, good, test=1.5, words=("--test is 1.5", "between 0 and 1"))
    refused(capsys, out, good, validation=0, words=("--validation is 0", "between 0 and 1"))
    refused(capsys, out, good, validation=0.5, test=0.5, words=("300 tokens leave 0 for train",))


def test_leaves_nothing_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = written(tmp_path, b"some text\n" * 30)
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "test.npy":
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(capsys, tmp_path / "out", file, words=("test.npy", "No space left on device"))


def test_killed_in_mid_write_it_leaves_no_folder_and_can_run_again(tmp_path: Path) -> None:
    (file,), out = written(tmp_path, b"some text\n" * 30), tmp_path / "out"
    program = (
        "import os, pathlib, sys, text\n"
        "write = pathlib.Path.write_bytes\n"
        "def half(path, content):\n"
        "    write(path, content[: len(content) // 2])\n"
        "    os.kill(os.getpid(), 9)\n"
        "pathlib.Path.write_bytes = half\n"
        "text.main(sys.argv[1:])\n"
    )
    words = ("--files", str(file), "--out", str(out))
    killed = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=SCRIPT.parent, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert prepare(out, file) == 0 and verify.main([str(out)]) == 0


def test_what_the_script_says_you_see_of_pythons_own_library(tmp_path: Path) -> None:
    """The command of its docstring and of the READMEs, in a shell."""
    (command,) = {
        line.strip()
        for page in ("README.md", "data_prep/README.md", "data_prep/text.py")
        for line in (ROOT / page).read_text().splitlines()
        if line.strip().startswith("python data_prep/text.py") and "os.__file__" in line
    }
    shown = subprocess.run(
        ["bash", "-c", command.replace("python ", f"{sys.executable} ").replace("data/text", str(tmp_path / "out"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"^reading +1\d\d files, [\d,]{9} bytes$", shown, re.M)
    bits = re.search(r"^entropy +([\d.]+) bits per byte", shown, re.M)
    assert bits and 4.4 < float(bits[1]) < 4.7
    assert shown.splitlines()[-1] == f"use it with  --data Text --data.path {tmp_path / 'out'}"
