"""data_prep/imagenet.py and verify.py on small archives of ILSVRC 2012's layout, most of them of real images."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ilsvrc import ROOT, Images, archives, devkit, folders, jpeg, promising, real, script, tar, train_tar, val_tar

from hpc_grawa.data import imagenet as packed

Image = pytest.importorskip("PIL.Image", reason="Pillow decodes the images")

imagenet, verify = script("imagenet"), script("verify")
SCRIPT = ROOT / "data_prep" / "imagenet.py"
A, B = "n01440764", "n02102040"


def made(per_class: int = 3, classes: tuple[str, ...] = (A, B)) -> Images:
    """Smooth images of several sizes, which need no real ones."""
    return {
        wnid: {f"{n}.JPEG": jpeg(40 + 8 * n, 48, seed=10 * i + n) for n in range(per_class)}
        for i, wnid in enumerate(classes)
    }


def prepare(out: Path, *words: str) -> int:
    status: int = imagenet.main([*words, "--out", str(out), "--workers", "2"])
    return status


def refused(capsys: pytest.CaptureFixture[str], out: Path, options: list[str], *words: str) -> None:
    """Exit status 2, one line on stderr with ``words``, and no complete folder."""
    capsys.readouterr()
    assert prepare(out, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("imagenet.py: ")
    for word in words:
        assert word in line
    assert not (out / "meta.json").exists()


def checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """What verify.py says of a folder."""
    capsys.readouterr()
    status = verify.main([str(folder)])
    said = capsys.readouterr()
    return status, said.out + said.err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(out: Path, part: str) -> list[tuple[str, bytes, int]]:
    """Name, content and label of each image, by its index and by the tar files, which must agree."""
    meta = json.loads((out / "meta.json").read_text())
    rows = np.load(out / f"{part}.npy")
    members: dict[tuple[int, int], tuple[str, bytes]] = {}
    for shard in range(meta["shards"][part]):
        with tarfile.open(out / f"{part}-{shard:05}.tar") as archive:
            for member in archive:
                handle = archive.extractfile(member)
                assert handle is not None
                members[shard, member.offset_data] = (member.name, handle.read())
    assert len(members) == len(rows) == meta["counts"][part]
    found = []
    for shard, offset, length, label, crc32 in rows.tolist():
        name, content = members[shard, offset]
        assert len(content) == length and zlib.crc32(content) == crc32
        assert name.startswith(f"{meta['wnids'][label]}/")
        found.append((name, content, label))
    return found


def pixels(content: bytes) -> Any:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_packs_real_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = real("train", 9), real("val", 4)
    options = archives(tmp_path / "in", train, val)
    out = tmp_path / "new" / "out"
    assert prepare(out, *options, "--resize=128", "--quality=95", "--shard_mb=1") == 0
    said = capsys.readouterr().out
    assert "90 + 40 images of 10 classes, as the development kit says" in said
    meta = json.loads((out / "meta.json").read_text())
    assert meta["counts"] == {"train": 90, "val": 40} and meta["wnids"] == sorted(train)
    assert meta["classes"][:2] == ["tench, Tinca tinca", "English springer"]
    names = {f"{part}-{n:05}.tar" for part, n_of in meta["shards"].items() for n in range(n_of)}
    assert {path.name for path in out.iterdir()} == {"meta.json", "train.npy", "val.npy", *names}

    originals = {f"{w}/{w}_{n}.jpg": c for w, of in train.items() for n, c in enumerate(of.values(), 7)}
    packed = stored(out, "train")
    assert {name for name, _, _ in packed} == originals.keys()
    for name, content, _ in packed:
        with Image.open(io.BytesIO(content)) as image, Image.open(io.BytesIO(originals[name])) as original:
            assert image.format == "JPEG" and image.mode == "RGB" and min(image.size) == 128
            small = original.convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(small).astype(int) - np.asarray(image)).mean() < 6
    # A validation image has the class that the ground truth gives its number: that of the folder it came from.
    by_content = [(pixels(c).mean((0, 1)), w) for w, of in val.items() for c in of.values()]
    for _, content, label in stored(out, "val"):
        near = min(by_content, key=lambda known: float(np.abs(known[0] - pixels(content).mean((0, 1))).sum()))
        assert meta["wnids"][label] == near[1]
    assert checked(out, capsys) == (
        0,
        f"{out}: complete and unchanged, 90 train + 40 val images, {len(names) + 2} files\n",
    )


def test_packs_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"train": made(3, ("cat", "dog")), "val": made(2, ("cat", "dog"))}
    out = tmp_path / "out"
    assert prepare(out, *folders(tmp_path / "in", parts), "--resize=0") == 0
    assert "without a development kit" in capsys.readouterr().out
    assert [name for name, _, _ in stored(out, "val")] == ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"]
    assert [label for _, _, label in stored(out, "train")] == [0, 0, 0, 1, 1, 1]
    assert pixels(stored(out, "train")[2][1]).shape == (48, 56, 3)


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG")])
def test_whatever_an_image_is_it_becomes_an_rgb_jpeg(mode: str, kind: str, tmp_path: Path) -> None:
    content = jpeg(64, 48, mode, kind)
    images = {"train": {"cat": {"odd.JPEG": content}}, "val": {"cat": {"odd.JPEG": content}}}
    assert prepare(tmp_path / "out", *folders(tmp_path / "in", images), "--quality=98") == 0
    ((name, packed, _),) = stored(tmp_path / "out", "train")
    with Image.open(io.BytesIO(packed)) as image:
        assert (name, image.format, image.mode, image.size) == ("cat/odd.jpg", "JPEG", "RGB", (64, 48))
    assert np.abs(pixels(packed) - pixels(content)).mean() < 3


def test_of_grey_of_16_bits_the_upper_8_are_kept(tmp_path: Path) -> None:
    values = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    images = {"train": {"cat": {"deep.png": buffer.getvalue()}}, "val": {"cat": {"deep.png": buffer.getvalue()}}}
    assert prepare(tmp_path / "out", *folders(tmp_path / "in", images), "--quality=98") == 0
    ((_, packed, _),) = stored(tmp_path / "out", "train")
    assert np.abs(pixels(packed) - (values >> 8).astype(float)[..., None]).mean() < 3


def test_what_cannot_be_packed_is_told_before_anything_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"cat": {f"{'猫' * 40}.png": jpeg(64, 48, "RGB", "PNG")}}
    options = folders(tmp_path / "long", {"train": long, "val": long})
    refused(capsys, tmp_path / "out", options, "too long a name for a tar file; rename it")
    train = tmp_path / "long/train"
    refused(capsys, tmp_path / "out", [f"--train={train}", f"--val={train}"], "is --train and --val")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("inks", "colour"),  # of cyan, magenta, yellow, black; what ink absorbs is its complement
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 255, 0, 128), (127, 0, 127)),
    ],
)
def test_inks_become_the_colour_that_they_print(inks: tuple[int, ...], colour: tuple[int, ...], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (64, 48), inks).save(buffer, "JPEG", quality=100)
    content = buffer.getvalue()
    assert b"\xff\xee\x00\x0eAdobe" in content  # which stores inks inverted, as the CMYK images of ILSVRC 2012
    images = {"train": {"cat": {"ink.JPEG": content}}, "val": {"cat": {"ink.JPEG": content}}}
    assert prepare(tmp_path / "out", *folders(tmp_path / "in", images)) == 0
    ((_, packed, _),) = stored(tmp_path / "out", "train")
    assert np.abs(pixels(packed) - colour).max() <= 4


@pytest.mark.parametrize("damage", ["flipped", "undecodable"])
def test_what_was_packed_is_read_again_before_the_folder_is_called_complete(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out = folders(tmp_path / "in", {"train": made(), "val": made(1)}), tmp_path / "out"
    if damage == "flipped":  # on the disk, after it was written and summed
        honest = imagenet.write_whole

        def write_whole(path: Path, content: bytes) -> None:
            honest(path, content)
            if path.name == "val.npy":
                packed = bytearray((out / "train-00000.tar").read_bytes())
                packed[1500] ^= 1
                (out / "train-00000.tar").write_bytes(packed)

        monkeypatch.setattr(imagenet, "write_whole", write_whole)
        refused(capsys, out, options, str(out), "train-00000.tar: its content is not what was written")
    else:  # in memory, before: all sums are right
        monkeypatch.setattr(imagenet.Encoder, "__call__", lambda *_: b"no image")
        refused(capsys, out, options, str(out), "cannot be decoded", "8 in all")


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import imagenet
status = imagenet.main(sys.argv[2:])
# Not ru_maxrss, which begins at that of the process that has started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""


#: Has the C library give freed memory back: what it keeps for threads, up to 9 MB if busy, is not the program's.
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.JPEG", quality=95)
    peaks, sizes = [], []
    for count in (300, 3000):
        folder = tmp_path / str(count)
        for part, images in (("train", count), ("val", 1)):
            (folder / part / A).mkdir(parents=True)
            for number in range(images):
                os.link(tmp_path / "noise.JPEG", folder / part / A / f"{number}.JPEG")
        words = [f"--train={folder / 'train'}", f"--val={folder / 'val'}", f"--out={folder / 'out'}"]
        words += ["--workers=2", "--shard_mb=4", "--quality=95"]
        command = [sys.executable, "-c", PEAK, str(SCRIPT.parent), *words]
        given = {**os.environ, **GIVES_BACK}
        done = subprocess.run(command, env=given, capture_output=True, text=True, check=True, timeout=120)
        peaks.append(1024 * int(done.stdout.splitlines()[-1]))
        sizes.append(sum(file.stat().st_size for file in (folder / "out").glob("*.tar")))
    more = sizes[1] - sizes[0]
    assert more > 50e6
    assert peaks[1] - peaks[0] < 8e6


def test_what_is_packed_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    options = folders(tmp_path / "in", {"train": made(20), "val": made(1)})
    for workers in ("1", "7"):
        assert imagenet.main([*options, "--out", str(tmp_path / workers), f"--workers={workers}"]) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "7")


def test_a_second_run_finds_its_work_done_and_other_content_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, out = folders(tmp_path / "in", {"train": made(), "val": made(1)}), tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    assert prepare(out, *options) == 0
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(out, *options) == 0
    assert "already holds exactly this" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    assert prepare(out, *options, "--quality=50") == 2
    assert "holds other data" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    refused(capsys, other, options, str(other), "not empty")
    assert contents(other) == {"thesis.tex": b"precious"}
    refused(capsys, other / "thesis.tex", options, "is a file")


# Refusals


def test_refuses_archives_that_are_mixed_up_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archives(tmp_path, made(), made(1))
    train, val, kit = (str(tmp_path / name) for name in ("train.tar", "val.tar", "devkit.tar.gz"))

    def options(*paths: str) -> list[str]:
        return [f"--{name}={path}" for name, path in zip(("train", "val", "devkit"), paths, strict=False)]

    out = tmp_path / "out"
    refused(capsys, out, options(val, val, kit), "val.tar", "it is the validation archive")
    refused(capsys, out, options(train, train, kit), "train.tar", "it is the training archive")
    refused(capsys, out, options(train, val, val), "val.tar", "is not the development kit", "meta.mat")
    refused(capsys, out, options(train, val), "devkit is missing", "ILSVRC2012_devkit_t12.tar.gz")
    refused(capsys, out, options(kit, val, kit), "devkit.tar.gz", "not a plain tar archive")
    refused(capsys, out, options(train, str(tmp_path / "nowhere"), kit), "nowhere", "no such file")
    assert not out.exists()


@pytest.mark.parametrize("archive", ["train", "val", "devkit"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_refuses_a_truncated_archive_by_name(
    archive: str, share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = archives(tmp_path, made(), made(2))
    path = tmp_path / {"train": "train.tar", "val": "val.tar", "devkit": "devkit.tar.gz"}[archive]
    whole = path.read_bytes()
    content = len(whole) if archive == "devkit" else len(whole.rstrip(b"\0"))  # a tar ends in kilobytes of nothing
    path.write_bytes(whole[: int(share * content)])
    refused(capsys, tmp_path / "out", options, str(path), "image-net.org")


def test_refuses_an_archive_that_ends_between_two_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = archives(tmp_path, made(), made(2))
    with tarfile.open(tmp_path / "val.tar") as archive:
        last = archive.getmembers()[-1]
    whole = (tmp_path / "val.tar").read_bytes()
    (tmp_path / "val.tar").write_bytes(whole[: last.offset])
    refused(capsys, tmp_path / "out", options, "val.tar", "truncated after 3 files")


@pytest.mark.parametrize("name", ["../x.JPEG", "/tmp/x.JPEG", "a/../../x.JPEG", "..", "./x.JPEG"])
@pytest.mark.parametrize("where", ["train", "class", "val"])
def test_refuses_a_path_in_an_archive(
    name: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = made()
    options = archives(tmp_path / "in", train, made(1))
    inner = {wnid: tar((f"{wnid}_{n}.JPEG", c) for n, c in enumerate(of.values())) for wnid, of in train.items()}
    evil = (name, jpeg(32, 32))
    if where == "class":
        inner[A] = tar([(f"{A}_0.JPEG", jpeg(32, 32)), evil])
    if where == "val":
        tar([("ILSVRC2012_val_00000001.JPEG", jpeg(32, 32)), evil], tmp_path / "in" / "val.tar")
    else:
        files = [(f"{wnid}.tar", content) for wnid, content in inner.items()]
        tar([*files, evil] if where == "train" else files, tmp_path / "in" / "train.tar")
    before = sorted(tmp_path.rglob("*"))
    refused(capsys, tmp_path / "in" / "out", options, repr(name), "unpack it" if name[:2] == "./" else "do not use it")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("wnid", ["../x", "/tmp/x", "..", "n0144076", "n01440764/..", "n01440764\n", "n٠١٢٣٤٥٦٧"])
def test_refuses_a_class_of_the_development_kit_that_is_no_name(
    wnid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = made()
    train, val = folders(tmp_path / "in", {"train": images, "val": made(1)})[1::2]
    devkit({A: images[A], wnid: images[B]}, [A, wnid], tmp_path / "devkit.tar.gz")
    before = sorted(tmp_path.rglob("*"))
    options = [f"--train={train}", f"--val={val}", f"--devkit={tmp_path / 'devkit.tar.gz'}"]
    refused(capsys, tmp_path / "out", options, "devkit.tar.gz", f"has a class {wnid!r}", "must be n01440764")
    assert sorted(tmp_path.rglob("*")) == before


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    options = folders(tmp_path / "in", {"train": made(), "val": made(1)})
    assert prepare(tmp_path / "straight", *options) == 0
    (tmp_path / "in" / "train" / A).rename(tmp_path / "elsewhere")
    (tmp_path / "in" / "train" / A).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "0.JPEG").rename(tmp_path / "alone.JPEG")
    (tmp_path / "elsewhere" / "0.JPEG").symlink_to(tmp_path / "alone.JPEG")
    assert prepare(tmp_path / "out", *options) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_refuses_a_link_in_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = archives(tmp_path, made(), made(1))
    with tarfile.open(tmp_path / "val.tar", "a") as archive:
        link = tarfile.TarInfo("ILSVRC2012_val_00000003.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    refused(capsys, tmp_path / "out", options, "val.tar", "ILSVRC2012_val_00000003.JPEG", "a link")


def test_counts_are_those_of_the_development_kit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = made(), made(2)
    options, out = archives(tmp_path, train, val), tmp_path / "out"
    fewer = {**train, B: dict(list(train[B].items())[:-1])}
    train_tar(fewer, tmp_path / "train.tar")
    refused(capsys, out, options, "n02102040.tar", "holds 2 images", "says 3")
    train_tar({A: train[A]}, tmp_path / "train.tar")
    refused(capsys, out, options, "no n02102040.tar", "1 classes missing")
    train_tar({**train, "n09999999": train[A]}, tmp_path / "train.tar")
    refused(capsys, out, options, "n09999999.tar", "does not know")
    train_tar(train, tmp_path / "train.tar")
    truth = val_tar({A: val[A]}, tmp_path / "val.tar")
    refused(capsys, out, options, "val.tar", "holds 2 images", "labels of 4")
    devkit(train, truth, tmp_path / "devkit.tar.gz")
    assert prepare(out, *options) == 0
    assert json.loads((out / "meta.json").read_text())["counts"] == {"train": 6, "val": 2}


def test_class_folders_are_counted_by_the_development_kit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = made(3), made(2)
    options, out = folders(tmp_path / "in", {"train": train, "val": val}), tmp_path / "out"
    kit = tmp_path / "devkit.tar.gz"
    options.append(f"--devkit={kit}")
    truth = [A, B, B, A]
    devkit({**train, B: {**train[B], "more": b""}}, truth, kit)
    refused(capsys, out, options, str(tmp_path / "in" / "train" / B), "holds 3 images", "says 4")
    devkit(train, [*truth, A], kit)
    refused(capsys, out, options, str(tmp_path / "in" / "val" / A), "holds 2 images", "says 3")
    devkit(train, [B] * 4, kit)
    refused(capsys, out, options, str(tmp_path / "in" / "val" / A), "holds 2 images", "says 0")
    devkit(train, [A] * 4, kit)
    refused(capsys, out, options, str(tmp_path / "in" / "val" / A), "holds 2 images", "says 4")
    devkit(train, [A] * 2, kit)
    refused(capsys, out, options, str(tmp_path / "in" / "val" / B), "holds 2 images", "says 0")
    devkit({**train, "n09999999": train[A]}, truth, kit)
    refused(capsys, out, options, "no folder 'n09999999'")
    devkit({A: train[A]}, [A, A], kit)
    refused(capsys, out, options, f"folder {B!r}")
    assert not out.exists()
    devkit(train, truth, kit)
    assert prepare(out, *options) == 0
    meta = json.loads((out / "meta.json").read_text())
    assert meta["counts"] == {"train": 6, "val": 4}
    assert meta["classes"] == ["tench, Tinca tinca", "English springer"]


def test_class_folders_are_counted_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = folders(tmp_path / "a", {"train": made(2), "val": made(1, (A,))})
    refused(capsys, out, options, "no folder 'n02102040'", "same classes")
    options = folders(tmp_path / "b", {"train": made(2, (A,)), "val": made(1)})
    refused(capsys, out, options, "folder 'n02102040'", "no class of the training images")
    options = folders(tmp_path / "c", {"train": {A: {"notes.txt": b"x"}}, "val": made(1, (A,))})
    refused(capsys, out, options, "notes.txt", "is no image")
    options = folders(tmp_path / "d", {"train": {A: {}}, "val": made(1, (A,))})
    refused(capsys, out, options, "holds no images")
    options = folders(tmp_path / "e", {"train": {A: {"x.png": jpeg(9, 9), "x.jpg": jpeg(9, 9)}}, "val": made(1, (A,))})
    refused(capsys, out, options, "two images", f"{A}/x.jpg")
    assert not out.exists()


@pytest.mark.parametrize("option", ["--quality=0", "--quality=101", "--workers=0", "--resize=-1", "--shard_mb=0"])
def test_refuses_impossible_settings(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = folders(tmp_path / "in", {"train": made(1), "val": made(1)})
    capsys.readouterr()
    assert imagenet.main([*options, "--out", str(tmp_path / "out"), option]) == 2
    key, _, value = option.removeprefix("--").partition("=")
    assert f"{key} is {value}: must be" in capsys.readouterr().err


# Corrupt images


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "header"])
def test_corrupt_images_are_reported_and_left_out_on_demand_only(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = made(4)
    whole = images[B]["2.JPEG"]
    broken = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no image" * 9, "header": whole[:30]}[
        damage
    ]
    images[B]["2.JPEG"] = broken
    out, options = tmp_path / "out", folders(tmp_path / "in", {"train": images, "val": made(1)})
    refused(capsys, out, options, "1 corrupt image", f"train/{B}/2.jpg", "--skip_corrupt")
    assert prepare(out, *options, "--skip_corrupt") == 0
    said = capsys.readouterr().out
    assert "left out     1 corrupt" in said and "goes on after" in said
    meta = json.loads((out / "meta.json").read_text())
    assert meta["left_out"] == [f"train/{B}/2.jpg"] and meta["counts"] == {"train": 7, "val": 2}
    assert f"{B}/2.jpg" not in [name for name, _, _ in stored(out, "train")]


def test_an_image_that_was_corrupt_is_read_again_once_it_is_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = made(4), tmp_path / "out"
    options = folders(tmp_path / "in", {"train": images, "val": made(1)})
    file = tmp_path / "in" / "train" / B / "2.JPEG"
    file.write_bytes(bytes(len(images[B]["2.JPEG"])))
    refused(capsys, out, options, "1 corrupt image")
    file.write_bytes(images[B]["2.JPEG"])
    assert prepare(out, *options) == 0
    assert json.loads((out / "meta.json").read_text())["left_out"] == []
    assert prepare(tmp_path / "straight", *options) == 0
    assert contents(out) == contents(tmp_path / "straight")


# Interruptions


def begun(out: Path, options: list[str]) -> subprocess.Popen[bytes]:
    words = [*options, "--out", str(out), "--workers=2", "--shard_mb=1", "--resize=200"]
    return subprocess.Popen([sys.executable, str(SCRIPT), *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def written(out: Path) -> int:
    """Bytes in images' files, the one under way included."""
    found = 0
    for path in out.glob("*.tar*"):  # a name that begins with a point is among them
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found += path.stat().st_size
    return found


def killed_again_and_again(tmp_path: Path, per_class: int, kills: int) -> None:
    """Kill the conversion after random numbers of bytes, resume it, and compare with one that was left in peace."""
    options = archives(tmp_path / "in", real("train", per_class), real("val", per_class // 2))
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert begun(straight, options).wait(120) == 0
    chance, interrupted = random.Random(0), 0
    for _ in range(kills):
        enough = sum(path.stat().st_size for path in out.glob("*.tar")) + chance.uniform(0, 3e6)
        job = begun(out, options)
        while job.poll() is None and written(out) < enough:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        interrupted += job.poll() is None
        job.kill()
        job.wait(60)
    assert interrupted
    assert begun(out, options).wait(120) == 0
    assert contents(out) == contents(straight)


@pytest.mark.slow
def test_a_killed_conversion_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, per_class=40, kills=4)


@pytest.mark.slow
def test_a_conversion_that_is_killed_many_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, per_class=100, kills=30)


class Killed(BaseException):
    """Ends the process, as far as the conversion can tell."""


@pytest.mark.parametrize("call", ["fsync", "rename", "unlink"])
def test_every_moment_between_two_steps_on_disk_is_a_good_one_to_be_killed(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End the conversion before its first, second, third ... call that changes the disk, and go on each time."""
    options = folders(tmp_path / "in", {"train": made(6), "val": made(2)})
    monkeypatch.setattr(imagenet, "MEGABYTE", 4000, raising=True)
    assert prepare(tmp_path / "straight", *options, "--shard_mb=1") == 0
    assert len(list((tmp_path / "straight").glob("train-*.tar"))) > 2
    owner: Any = os if call == "fsync" else Path
    honest: Callable[..., Any] = getattr(owner, call)
    for moment in range(1, 100):
        left = moment

        def until(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return honest(*arguments, **options)

        out = tmp_path / f"out{moment}"
        with monkeypatch.context() as patch:
            patch.setattr(owner, call, until)
            try:
                assert prepare(out, *options, "--shard_mb=1") == 0
                break
            except Killed:
                pass
        assert prepare(out, *options, "--shard_mb=1") == 0
        assert contents(out) == contents(tmp_path / "straight")
    assert moment > 3


def test_few_images_are_held_at_a_time_and_they_come_in_order() -> None:
    asked = 0

    def tasks() -> Iterator[Callable[[], int]]:
        nonlocal asked
        for number in range(200):
            asked += 1
            yield lambda n=number: (time.sleep(0.001 * (n % 3)), n)[1]  # type: ignore[misc]

    for expected, found in enumerate(imagenet.in_order(tasks(), workers=3)):
        assert found == expected and asked <= expected + 1 + 4 * 3
    assert asked == 200


def test_progress_says_how_much_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = imagenet.Progress("train", 1000, 100)
    progress(101, 0)
    assert not capsys.readouterr().out
    progress._start -= 100
    progress._shown -= 100
    progress(300, 12_345_678_900)
    assert capsys.readouterr().out == "train        300 of 1,000 images, 12.35 GB, 2/s, ETA 0:05:50\n"


def test_does_not_continue_another_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = made(4)
    images[B]["2.JPEG"] = b"broken"
    out, options = tmp_path / "out", folders(tmp_path / "in", {"train": images, "val": made(1)})
    refused(capsys, out, options, "corrupt")
    refused(capsys, out, [*options, "--quality=70"], "beginning of a conversion", "other settings")
    (tmp_path / "in" / "train" / A / "9.JPEG").write_bytes(jpeg(20, 20))
    refused(capsys, out, options, "beginning of a conversion", "other images")


def test_two_conversions_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, out = folders(tmp_path / "in", {"train": made(1), "val": made(1)}), tmp_path / "out"
    out.mkdir()
    with imagenet.locked(out):
        refused(capsys, out, options, "another process is writing it")
    assert prepare(out, *options) == 0


# verify.py


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (12_000, 12_000), (60_000, 60_000)])
def test_an_image_of_too_many_pixels_is_corrupt_by_its_header(
    kind: str, width: int, height: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever Pillow says of it, in one line."""
    images, out = made(2), tmp_path / "out"
    content = bytearray(jpeg(40, 30, kind=kind))
    if kind == "PNG":
        content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    else:
        at = content.index(b"\xff\xc0")
        content[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    images[B]["1.JPEG"] = bytes(content)
    options = folders(tmp_path / "in", {"train": images, "val": made(1)})
    assert prepare(out, *options) == 2
    said = capsys.readouterr()
    assert re.search(rf"corrupt      {tmp_path}/in/train/{B}, 1.JPEG: .* pixels", said.out)
    assert "1 corrupt image" in said.err and len(said.err.splitlines()) == 1
    assert prepare(out, *options, "--skip_corrupt") == 0


def test_a_large_image_is_packed_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, to the same bytes."""
    options = folders(tmp_path / "in", {"train": made(2), "val": made(1)})
    assert prepare(tmp_path / "a", *options) == 0
    monkeypatch.setattr(imagenet, "MANY_PIXELS", 100)
    assert prepare(tmp_path / "b", *options) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"bytes": 5}', "\udcff"])
def test_a_damaged_record_of_a_conversion_is_made_again(content: str, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"train-{number:05}.tar").write_bytes(b"shard")
        (tmp_path / f".train-{number:05}.json").write_text(content, errors="surrogateescape")
    assert imagenet.completed(tmp_path, "train", skip_corrupt=False) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_facts_are_damaged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, options = tmp_path / "out", folders(tmp_path / "in", {"train": made(1), "val": made(1)})
    assert prepare(out, *options) == 0
    (out / "meta.json").write_text("{")
    capsys.readouterr()
    assert prepare(out, *options) == 2 and "holds other data" in capsys.readouterr().err


def test_an_image_has_as_many_pixels_in_the_scripts_as_in_the_package() -> None:
    assert (imagenet.MOST_PIXELS, imagenet.ROW) == (packed.MOST_PIXELS, packed.ROW)


def test_images_out_of_order_are_found() -> None:
    """Else those that are checked would be others than those that are read."""
    rows = np.array([(0, 512, 9, 0, 0), (1, 512, 9, 0, 0), (0, 2048, 9, 0, 0), (1, 2048, 9, 0, 0)], verify.ROW)
    assert verify.misplaced(rows, [4096, 4096], 1) == 2
    assert verify.misplaced(rows[[0, 2, 1, 3]], [4096, 4096], 1) is None
    assert packed.misplaced(rows, [4096, 4096], 1) is None


HOSTILE = ("outside", "far", "long", "empty", "before", "shards", "rows")


@pytest.mark.parametrize(
    "damage", ["bit", "short", "missing", "index", "label", "meta", "unfinished", "image", "pixels", *HOSTILE]
)
def test_verify_finds_damage(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare(out, *folders(tmp_path / "in", {"train": made(), "val": made(1)})) == 0
    assert checked(out, capsys)[0] == 0
    file, meta = out / "train-00000.tar", json.loads((out / "meta.json").read_text())
    content, rows = bytearray(file.read_bytes()), np.load(out / "train.npy")
    expected = {
        "bit": "train-00000.tar: its content",
        "short": f"train-00000.tar: has {len(content) - 1:,} bytes",
        "missing": "train-00000.tar: is missing",
        "index": "no member begins there",
        "label": "the index says otherwise",
        "meta": "meta.json or the index is damaged",
        "unfinished": "the folder is not complete",
        "image": "cannot be decoded",
        "pixels": "has more than 67,108,864 pixels",
        "shards": "meta.json: has 4 files, not 1000000000 of train",
        "rows": "meta.json or the index is damaged",
    }.get(damage, "train.npy: says of image 1 what cannot be: ")
    if damage == "bit":
        content[1000] ^= 1
    if damage == "index":
        rows["offset"][1] += 512
    if damage in ("outside", "far", "before"):
        rows["offset"][1] = {"outside": 2**40, "far": 2**64 - 1, "before": 7}[damage]
    if damage in ("long", "empty"):
        rows["length"][1] = {"long": 2**32 - 1, "empty": 0}[damage]
    if damage == "shards":
        meta["shards"]["train"] = 10**9
    if damage == "pixels":
        start = int(rows["offset"][1])
        at = content.index(b"\xff\xc0", start)
        content[at + 5 : at + 9] = (9000).to_bytes(2, "big") * 2
        rows["crc32"][1] = zlib.crc32(content[start : start + int(rows["length"][1])])
    if damage == "label":
        rows["label"][1] ^= 1
    if damage == "image":
        start = int(rows["offset"][1])
        content[start : start + 4] = bytes(4)
        rows["crc32"][1] = zlib.crc32(content[start : start + int(rows["length"][1])])
    file.write_bytes(content[: -1 if damage == "short" else None])
    np.save(out / "train.npy", rows)
    if damage == "rows":
        (out / "train.npy").write_bytes(promising((out / "train.npy").read_bytes(), 6 * 10**12))
    if damage == "missing":
        file.unlink()
    if damage == "meta":
        (out / "meta.json").write_text("[1]")
    elif damage == "unfinished":
        (out / "meta.json").unlink()
    elif damage not in ("bit", "short"):  # what sums cannot find
        for name in ("train-00000.tar", "train.npy"):
            if (out / name).exists():
                meta["sha256"][name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
        (out / "meta.json").write_text(json.dumps(meta))
    status, said = checked(out, capsys)
    assert status == 2 and expected in said and len(said.splitlines()) == 1


def test_verify_checks_a_folder_of_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "train_labels.npy", np.arange(9, dtype=np.uint8))
    digest = hashlib.sha256((tmp_path / "train_labels.npy").read_bytes()).hexdigest()
    facts = {"counts": {"train": 9, "test": 0}, "sha256": {"train_labels.npy": digest}}
    (tmp_path / "meta.json").write_text(json.dumps(facts))
    assert checked(tmp_path, capsys) == (0, f"{tmp_path}: complete and unchanged, 9 train + 0 test images, 1 files\n")
    np.save(tmp_path / "train_labels.npy", np.zeros(9, dtype=np.uint8))
    assert checked(tmp_path, capsys)[0] == 2


def test_runs_as_a_script(tmp_path: Path) -> None:
    def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        words = (str(ROOT / "data_prep" / name), *words)
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=tmp_path)

    options = folders(tmp_path / "in", {"train": made(1), "val": made(1)})
    done = run("imagenet.py", *options, "--out", "out")
    assert done.returncode == 0 and f"--data ImageNet --data.path {tmp_path / 'out'}" in done.stdout
    assert run("verify.py", "out").returncode == 0
    failed = run("verify.py", "in")
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1
    assert "--devkit" in run("imagenet.py", "--help").stdout
