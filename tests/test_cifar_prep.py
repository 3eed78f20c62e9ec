"""data_prep/cifar.py on small archives of the published format, and the data set that reads what it writes."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_grawa.data import CIFAR
from hpc_grawa.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data_prep" / "cifar.py"

spec = importlib.util.spec_from_file_location("cifar_prep", SCRIPT)
assert spec is not None and spec.loader is not None
cifar: Any = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = cifar
spec.loader.exec_module(cifar)

Files = dict[str, bytes]
FOLDERS = {"CIFAR-10": "cifar-10-batches-py", "CIFAR-100": "cifar-100-python"}
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def dumps(value: Any) -> bytes:
    """Pickle as Python 2 and NumPy 1 did when the sets were published: byte strings, protocol 2."""

    def write(value: Any) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(write(k) + write(v) for k, v in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        if isinstance(value, bytes):
            return b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        assert isinstance(value, np.ndarray) and value.dtype == np.uint8
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + write(b"b") + b"\x87R"
        dtype = b"cnumpy\ndtype\n" + write(b"u1") + b"K\x00K\x01\x87R"
        dtype += b"(K\x03" + write(b"|") + b"NNN" + write(-1) * 2 + b"K\x00tb"
        return (
            array
            + b"(K\x01"
            + b"".join(map(write, value.shape))
            + b"\x86"
            + dtype
            + b"\x89"
            + write(value.tobytes())
            + b"tb"
        )

    return b"\x80\x02" + write(value) + b"."


def original(name: str, count: int = 6) -> tuple[Files, dict[str, np.ndarray[Any, Any]]]:
    """A small set of the published format, and the arrays it holds."""
    random = np.random.default_rng(0)
    published = next(p for p in cifar.PUBLISHED if p.name == name)
    classes = 10 if name == "CIFAR-10" else 100
    files: Files = {}
    held: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in ARRAYS}
    for part, batches in (("train", published.train), ("test", published.test)):
        for batch in batches:
            images = random.integers(0, 256, (count, 3072), np.uint8)
            labels = random.integers(0, classes, count)
            content = {published.label_key: labels.tolist(), b"data": images, b"filenames": [b"a.png"] * count}
            files[batch] = dumps(content)
            held[f"{part}_images"].append(images.reshape(-1, 3, 32, 32))
            held[f"{part}_labels"].append(labels)
    (meta,) = published.meta
    files[meta] = dumps({published.class_key: [b"class %d" % c for c in range(classes)], b"num_vis": 3072})
    return files, {name: np.concatenate(parts) for name, parts in held.items()}


def tar(path: Path, files: Mapping[str, bytes], folder: str, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]  # the mode is one of its literals
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def unpack(path: Path, files: Mapping[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Callable[[Files], None]:
    """Make ``files`` the published ones: their MD5s take the place of the real ones."""

    def put(files: Files) -> None:
        def known(table: Mapping[str, str]) -> dict[str, str]:
            return {name: cifar.md5(files[name]) if name in files else md5 for name, md5 in table.items()}

        sets = (
            dataclasses.replace(p, train=known(p.train), test=known(p.test), meta=known(p.meta))
            for p in cifar.PUBLISHED
        )
        monkeypatch.setattr(cifar, "PUBLISHED", tuple(sets))

    return put


def prepare(archive: Path, out: Path) -> int:
    status: int = cifar.main(["--archive", str(archive), "--out", str(out)])
    return status


def refused(capsys: pytest.CaptureFixture[str], archive: Path, out: Path, *words: str) -> None:
    """Exit status 2, one line on stderr with ``words``, and nothing new on disk."""
    before = sorted(out.parent.rglob("*"))
    capsys.readouterr()
    assert prepare(archive, out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cifar.py: ")
    for word in words:
        assert word in line
    assert sorted(out.parent.rglob("*")) == before


def test_the_writer_of_these_tests_pickles_as_numpy_reads() -> None:
    images = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    read = pickle.loads(dumps({b"data": images, b"labels": [3, 4]}), encoding="bytes")
    assert np.array_equal(read[b"data"], images) and read[b"labels"] == [3, 4]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("form", ["tar.gz", "tar", "folder", "folder around it"])
def test_writes_what_the_set_holds(
    name: str, form: str, tmp_path: Path, publish: Callable[[Files], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files, arrays = original(name)
    publish(files)
    if form.startswith("folder"):
        folder = unpack(tmp_path / "in" / FOLDERS[name], files)
        archive = folder if form == "folder" else folder.parent
    else:
        archive = tar(tmp_path / f"some.{form}", files, FOLDERS[name], "w:gz" if form == "tar.gz" else "w")
    out = tmp_path / "new" / "out"
    assert prepare(archive, out) == 0
    assert name in capsys.readouterr().out

    meta = json.loads((out / "meta.json").read_text())
    classes = 10 if name == "CIFAR-10" else 100
    train, test = len(arrays["train_labels"]), len(arrays["test_labels"])
    assert meta["name"] == name and meta["counts"] == {"train": train, "test": test} and meta["shape"] == [3, 32, 32]
    assert meta["classes"] == [f"class {c}" for c in range(classes)]
    assert {path.name for path in out.iterdir()} == {"meta.json", *(f"{a}.npy" for a in ARRAYS)}
    for array in ARRAYS:
        written = np.load(out / f"{array}.npy")
        assert written.dtype == np.uint8 and np.array_equal(written, arrays[array])
        assert meta["sha256"][f"{array}.npy"] == hashlib.sha256((out / f"{array}.npy").read_bytes()).hexdigest()
    pixels = arrays["train_images"] / 255
    np.testing.assert_allclose(meta["mean"], pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(meta["std"], pixels.std((0, 2, 3)), rtol=1e-12)


def test_reads_what_todays_numpy_pickles(tmp_path: Path, publish: Callable[[Files], None]) -> None:
    files, arrays = original("CIFAR-10")
    images = np.ascontiguousarray(arrays["test_images"].reshape(-1, 3072))
    files["test_batch"] = pickle.dumps({b"data": images, b"labels": arrays["test_labels"].tolist()}, protocol=4)
    publish(files)
    assert prepare(unpack(tmp_path / "in", files), tmp_path / "out") == 0
    assert np.array_equal(np.load(tmp_path / "out" / "test_images.npy"), arrays["test_images"])


def test_says_that_the_archive_is_the_published_one(
    tmp_path: Path,
    publish: Callable[[Files], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files, _ = original("CIFAR-10")
    publish(files)
    archive = tar(tmp_path / "a.tar.gz", files, FOLDERS["CIFAR-10"])
    assert prepare(archive, tmp_path / "one") == 0
    assert "not the published archive" in capsys.readouterr().out
    known = dataclasses.replace(cifar.PUBLISHED[0], archive_md5=cifar.md5(archive.read_bytes()))
    monkeypatch.setattr(cifar, "PUBLISHED", (known, cifar.PUBLISHED[1]))
    assert prepare(archive, tmp_path / "two") == 0
    assert f"{known.archive_md5}, as published" in capsys.readouterr().out


def test_a_second_run_finds_its_work_done_and_other_content_is_never_overwritten(
    tmp_path: Path, publish: Callable[[Files], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files, _ = original("CIFAR-10")
    publish(files)
    archive, out = tar(tmp_path / "a.tar.gz", files, FOLDERS["CIFAR-10"]), tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    assert prepare(archive, out) == 0
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(archive, out) == 0
    assert "already holds exactly this" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps

    damaged = bytearray((out / "test_images.npy").read_bytes())
    damaged[-1] ^= 1
    (out / "test_images.npy").write_bytes(damaged)
    refused(capsys, archive, out, str(out), "not empty", "--out")
    assert (out / "test_images.npy").read_bytes() == damaged

    other = unpack(tmp_path / "other", {"thesis.tex": b"precious"})
    refused(capsys, archive, other, str(other), "not empty")
    assert (other / "thesis.tex").read_bytes() == b"precious"
    refused(capsys, archive, other / "thesis.tex", "is a file")


def test_refuses_files_that_are_not_the_published_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, _ = original("CIFAR-10")
    found, expected = cifar.md5(files["data_batch_1"]), "c99cafc152244af753f735de768cd75f"
    archive = tar(tmp_path / "a.tar.gz", files, FOLDERS["CIFAR-10"])
    refused(capsys, archive, tmp_path / "out", str(archive), "data_batch_1", found, expected, cifar.SOURCE)
    folder = unpack(tmp_path / "in", files)
    refused(capsys, folder, tmp_path / "out", str(folder), "data_batch_1", found, expected, cifar.SOURCE)


@pytest.mark.parametrize("batch", ["data_batch_5", "test_batch", "batches.meta"])
def test_one_flipped_bit_in_any_file_is_found(
    batch: str, tmp_path: Path, publish: Callable[[Files], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files, _ = original("CIFAR-10")
    publish(files)
    files[batch] = files[batch][:-2] + bytes([files[batch][-2] ^ 1]) + files[batch][-1:]
    refused(capsys, unpack(tmp_path / "in", files), tmp_path / "out", batch, "MD5")


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.95])
def test_refuses_a_truncated_archive(
    mode: str, share: float, tmp_path: Path, publish: Callable[[Files], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files, _ = original("CIFAR-10")
    publish(files)
    archive = tar(tmp_path / "a.tar", files, FOLDERS["CIFAR-10"], mode)
    whole = archive.read_bytes()
    size = sum(map(len, files.values())) if mode == "w" else len(whole)  # a tar ends in kilobytes of nothing
    archive.write_bytes(whole[: int(share * size)])
    refused(capsys, archive, tmp_path / "out", str(archive), cifar.SOURCE)


@pytest.mark.parametrize(
    "content",
    [b"", b"not an archive" * 100, b"PK\x03\x04" + bytes(2000), gzip.compress(b"text" * 1000)],
    ids=["empty", "text", "zip", "gzip"],
)
def test_refuses_what_is_no_archive(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(content)
    refused(capsys, archive, tmp_path / "out", str(archive), "archive", cifar.SOURCE)


def test_refuses_a_missing_path_a_missing_batch_an_empty_folder_and_two_sets(
    tmp_path: Path, publish: Callable[[Files], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ten, _ = original("CIFAR-10")
    hundred, _ = original("CIFAR-100")
    publish(ten | hundred)
    out = tmp_path / "out"
    refused(capsys, tmp_path / "nowhere", out, "nowhere", "no such file")
    incomplete = {name: content for name, content in ten.items() if name != "data_batch_3"}
    refused(capsys, tar(tmp_path / "a.tar", incomplete, "x"), out, "CIFAR-10 without data_batch_3")
    refused(capsys, unpack(tmp_path / "empty", {}), out, "holds no CIFAR files")
    both = unpack(tmp_path / "both" / FOLDERS["CIFAR-10"], ten).parent
    unpack(both / FOLDERS["CIFAR-100"], hundred)
    refused(capsys, both, out, "CIFAR-10 and CIFAR-100", "name the folder")
    assert prepare(both / FOLDERS["CIFAR-100"], out) == 0


class Hostile:
    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("batch", ["data_batch_2", "batches.meta"])
@pytest.mark.parametrize(
    "hostile", [(os.mkdir, "mkdir"), (eval, ".eval"), (np.fromfile, "fromfile")], ids=["os", "eval", "numpy"]
)
def test_refuses_a_hostile_pickle_by_name_even_where_its_md5_is_right(
    batch: str,
    hostile: tuple[Callable[..., object], str],
    tmp_path: Path,
    publish: Callable[[Files], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    call, name = hostile
    trace = tmp_path / "trace"
    argument = f"__import__('os').mkdir({str(trace)!r})" if call is eval else str(trace)
    files, _ = original("CIFAR-10")
    files[batch] = pickle.dumps({"data": Hostile(call, argument)}, protocol=2)
    archive = tar(tmp_path / "a.tar.gz", files, FOLDERS["CIFAR-10"])
    refused(capsys, archive, tmp_path / "out", "MD5")
    publish(files)
    refused(capsys, archive, tmp_path / "out", batch, name, "which no CIFAR file needs")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        dumps([1, 2]),
        dumps({b"labels": [1]}),
        dumps({b"data": [1], b"labels": [1]}),
        dumps({b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]}),
        dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
        dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}),
        dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}),
        dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [b"cat"]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}, protocol=4),
        pickle.dumps({b"data": np.zeros((1, 3072), object), b"labels": [1]}, protocol=4),
        dumps({b"labels": [1]})[:-5],
        b"\x80\x02}q",
    ],
)
def test_refuses_a_pickle_that_is_no_batch(
    content: bytes, tmp_path: Path, publish: Callable[[Files], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files, _ = original("CIFAR-10")
    files["data_batch_4"] = content
    publish(files)
    refused(capsys, unpack(tmp_path / "in", files), tmp_path / "out", "data_batch_4", cifar.SOURCE)


def test_follows_no_path_and_no_link_of_an_archive(
    tmp_path: Path, publish: Callable[[Files], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files, arrays = original("CIFAR-10")
    publish(files)
    climbing = tar(tmp_path / "climbing.tar", files, "../../../../tmp/elsewhere")
    assert prepare(climbing, tmp_path / "out") == 0
    assert np.array_equal(np.load(tmp_path / "out" / "test_images.npy"), arrays["test_images"])

    secret = tmp_path / "secret"
    secret.write_bytes(files.pop("test_batch"))
    linked = tar(tmp_path / "linked.tar", files, "x", "w")
    with tarfile.open(linked, "a") as archive:
        link = tarfile.TarInfo("x/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    refused(capsys, linked, tmp_path / "out2", "CIFAR-10 without test_batch")


def test_leaves_nothing_where_writing_fails(
    tmp_path: Path,
    publish: Callable[[Files], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files, _ = original("CIFAR-10")
    publish(files)
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "test_labels.npy":
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    archive = tar(tmp_path / "a.tar.gz", files, FOLDERS["CIFAR-10"])
    monkeypatch.setattr(Path, "write_bytes", full)
    refused(capsys, archive, tmp_path / "out", "test_labels.npy", "No space left on device")


def test_runs_as_a_script(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)

    shown = run("--help")
    assert shown.returncode == 0 and "--archive" in shown.stdout
    failed = run("--archive", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.fixture
def folder(tmp_path: Path, publish: Callable[[Files], None]) -> Path:
    """A small CIFAR-10 as the script writes it: 100 images to train on, 20 to test on."""
    files, _ = original("CIFAR-10", count=20)
    publish(files)
    assert prepare(unpack(tmp_path / "in", files), tmp_path / "out") == 0
    return tmp_path / "out"


@pytest.mark.parametrize("crop", [28, 32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_data_set_reads_what_the_script_writes(folder: Path, crop: Any, channels_last: bool) -> None:
    data = CIFAR(path=str(folder), batch_size=8, validation=10, crop=crop, channels_last=channels_last)
    data.check(world_size=4)
    assert data.size() == 100 and data.train_size() == 90
    assert data.input_shape == (3, crop, crop) and data.model_arguments() == {"in_channels": 3, "num_classes": 10}
    loaded = data.load()
    assert loaded.validation is not None
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (90, 10, 20)

    images, labels = loaded.test.batch(torch.arange(20))
    edge = (32 - crop) // 2
    raw = np.load(folder / "test_images.npy")[:, :, edge : edge + crop, edge : edge + crop] / 255
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
    expected = (raw - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert np.array_equal(labels.numpy(), np.load(folder / "test_labels.npy"))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert images.is_contiguous(memory_format=layout)
    augmented, _ = loaded.train.batch(data.sampler(0, 4, seed=36).indices(0), torch.Generator().manual_seed(0))
    assert augmented.shape == (8, 3, crop, crop)


def test_normalisation_with_the_computed_moments(folder: Path) -> None:
    train = CIFAR(path=str(folder), normalisation="computed").load().train
    images, _ = train.batch(torch.arange(len(train)))
    std, mean = torch.std_mean(images.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(std, torch.ones(3).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("damage", ["absent", "empty", "foreign", "json", "shape", "missing", "short", "void", "npy"])
def test_a_wrong_folder_is_an_error_that_names_key_value_and_command(folder: Path, damage: str) -> None:
    if damage == "absent":
        shutil.rmtree(folder)
    if damage == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    if damage == "foreign":
        (folder / "meta.json").write_text('{"name": "MNIST"}')
    if damage == "json":
        (folder / "meta.json").write_text("[1, ")
    if damage == "shape":
        np.save(folder / "test_labels.npy", np.zeros(7, np.uint8))
    if damage == "missing":
        (folder / "train_labels.npy").unlink()
    content = (folder / "train_images.npy").read_bytes() if (folder / "train_images.npy").exists() else b""
    if damage == "short":
        (folder / "train_images.npy").write_bytes(content[:-1])
    if damage == "void":
        (folder / "train_images.npy").write_bytes(b"")
    if damage == "npy":
        (folder / "train_images.npy").write_bytes(b"x" * 5000)
    data = CIFAR(path=str(folder))
    for attempt in (data.load, data.size, lambda: data.check(4)):
        with pytest.raises(ConfigError) as raised:
            attempt()
        message = str(raised.value)
        assert "data.path" in message and str(folder) in message and "data_prep/cifar.py" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 26}, ("data.batch_size", "26", "25")),
        ({"batch_size": 0}, ("data.batch_size", "0", "1 or more")),
        ({"batch_size": 8, "validation": 100}, ("data.validation", "100", "99")),
        ({"batch_size": 8, "validation": -1}, ("data.validation", "-1")),
        ({"batch_size": 23, "validation": 10}, ("data.batch_size", "23", "22")),
        ({"batch_size": 8, "crop": 30}, ("data.crop", "30", "28, 32")),
        ({"batch_size": 8, "normalisation": "none"}, ("data.normalisation", "none", "published, computed")),
        ({"batch_size": 8, "split": "random"}, ("data.split", "random", "disjoint")),
        ({"batch_size": 8, "split": "fraction", "fraction": 1.5}, ("data.fraction", "1.5")),
        ({"batch_size": 8, "split": "fraction", "fraction": float("nan")}, ("data.fraction", "nan")),
        ({"batch_size": 8, "fraction": 0.5}, ("data.fraction", "0.5", "disjoint")),
        ({"batch_size": 11, "split": "fraction", "fraction": 0.1}, ("data.batch_size", "11", "10")),
    ],
)
def test_impossible_values_are_found_before_anything_is_loaded(
    folder: Path, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as raised:
        CIFAR(path=str(folder), **fields).check(world_size=4)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.slow
def test_the_complete_real_set(tmp_path: Path) -> None:
    """All 60,000 images; from the folder or archive that HPC_GRAWA_CIFAR10 names, or from ../shared."""
    archive = os.environ.get("HPC_GRAWA_CIFAR10")
    packed = ROOT.parent / "shared" / "data" / "cifar10-webp.zip"
    if archive is None:
        if not packed.exists():
            pytest.skip("no CIFAR-10 here: set HPC_GRAWA_CIFAR10")
        pytest.importorskip("PIL")
        expand = [sys.executable, str(packed.with_name("unpack_cifar.py")), str(packed), str(tmp_path)]
        subprocess.run(expand, check=True, capture_output=True)
        archive = str(tmp_path)
    out = tmp_path / "out"
    assert prepare(Path(archive), out) == 0
    meta = json.loads((out / "meta.json").read_text())
    assert meta["counts"] == {"train": 50_000, "test": 10_000} and meta["classes"][3] == "cat"
    np.testing.assert_allclose(meta["mean"], [0.4914, 0.4822, 0.4465], atol=5e-5)
    np.testing.assert_allclose(meta["std"], [0.2470, 0.2435, 0.2616], atol=5e-5)
    for part, count in (("train", 5000), ("test", 1000)):
        assert np.bincount(np.load(out / f"{part}_labels.npy")).tolist() == [count] * 10
    assert len(CIFAR(path=str(out)).load().train) == 50_000
