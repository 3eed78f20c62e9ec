"""Batches of packed ImageNet: what a straightforward reader makes of the same JPEGs, whatever the workers; staging."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import own
import pytest
import torch
import torch.nn.functional as F
from conftest import Ranks
from ilsvrc import archives, folders, jpeg, promising, real, script
from launcher import launch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_grawa import cli
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator, Meter, simulate
from hpc_grawa.data import Ahead, ImageNet, TensorExamples, imagenet, in_advance, staging
from hpc_grawa.data.base import AHEAD, CPU
from hpc_grawa.data.imagenet import MEAN, STD, View
from hpc_grawa.errors import ConfigError, Damaged
from hpc_grawa.metrics import TopAccuracy
from hpc_grawa.models import ResNet50, ResNet152, ViTB16
from hpc_grawa.training.evaluate import Evaluator
from hpc_grawa.training.worker import Worker

Image = pytest.importorskip("PIL.Image", reason="Pillow decodes the images")
torchvision = pytest.importorskip("torchvision", reason="torchvision decodes the images")

# torchvision 0.29 announces the end of its decoder; then Pillow's is used.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

SIZES = ((300, 200), (64, 96), (40, 40), (500, 120), (31, 257))


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 + 50 real images of 10 classes, packed from archives."""
    folder = tmp_path_factory.mktemp("real")
    options = archives(folder / "in", real("train", 10), real("val", 5))
    assert script("imagenet").main([*options, "--out", str(folder / "out"), "--shard_mb=1"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 + 10 smooth images of 2 classes and several sizes, in several files."""
    base, prep = tmp_path_factory.mktemp("made"), script("imagenet")
    parts = {
        part: {
            name: {f"{n:02}.png": jpeg(*SIZES[n % 5], kind="PNG", seed=100 * i + n) for n in range(count)}
            for i, name in enumerate(("cat", "dog"))
        }
        for part, count in (("train", 30), ("val", 5))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prep, "MEGABYTE", 50_000)
        options = folders(base / "in", parts)
        assert prep.main([*options, "--out", str(base / "out"), "--shard_mb=1", "--resize=128"]) == 0
    assert len(list((base / "out").glob("train-*.tar"))) > 3
    return base / "out"


def data(folder: Path, **settings: Any) -> ImageNet:
    return ImageNet(**{"path": str(folder), "batch_size": 8, **settings})


def stored(folder: Path, part: str, number: int) -> tuple[Any, int]:
    """An image by number, as Pillow decodes it, and its label."""
    shard, offset, length, label, _ = np.load(folder / f"{part}.npy")[number].item()
    content = (folder / f"{part}-{shard:05}.tar").read_bytes()[offset : offset + length]
    return Image.open(io.BytesIO(content)).convert("RGB"), label


def pixels(inputs: Tensor) -> Tensor:
    """What was normalised, 0 to 255."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (inputs.double() * std + mean) * 255


# One image


@pytest.mark.parametrize("kind", ["real_folder", "folder"])
def test_evaluation_sees_what_torchvision_makes_of_pillows_images(kind: str, request: pytest.FixtureRequest) -> None:
    from torchvision import transforms

    folder = request.getfixturevalue(kind)
    test = data(folder).load().test
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    inputs, labels = test.batch(torch.arange(len(test)))
    assert inputs.shape == (len(test), 3, 224, 224) and inputs.dtype == torch.float32
    for number, (found, label) in enumerate(zip(pixels(inputs), labels.tolist(), strict=True)):
        image, expected_label = stored(folder, "val", number)
        expected = torch.from_numpy(np.array(reference(image))).permute(2, 0, 1)
        assert label == expected_label
        assert (found - expected).abs().max() < 2.01 and (found - expected).abs().mean() < 0.3


@pytest.mark.parametrize("kind", ["real_folder", "folder"])
def test_training_sees_a_window_as_pillow_crops_resizes_and_mirrors_it(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    train, view = data(folder).load().train, View()
    index = torch.arange(len(train)).flip(0)
    inputs, labels = train.batch(index, torch.Generator().manual_seed(7))
    draws = view.draws(len(train), torch.Generator().manual_seed(7))
    mirrored = 0
    for number, found, label, drawn in zip(index.tolist(), pixels(inputs), labels.tolist(), draws, strict=True):
        image, expected_label = stored(folder, "train", number)
        top, left, height, width = view.window(image.height, image.width, drawn)
        box = (left, top, left + width, top + height)
        seen = image.crop(box).resize((224, 224), Image.Resampling.BILINEAR)
        if drawn[-1] < 0.5:
            seen, mirrored = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mirrored + 1
        expected = torch.from_numpy(np.array(seen)).permute(2, 0, 1)
        assert label == expected_label
        assert (found - expected).abs().max() < 2.01 and (found - expected).abs().mean() < 0.3
    assert 0.3 < mirrored / len(train) < 0.7


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 341), (500, 100), (3, 400), (400, 3), (1, 1)])
def test_windows_are_distributed_as_torchvisions(height: int, width: int) -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image, count = torch.empty(3, height, width), 4000
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    ours = [View().window(height, width, d) for d in View().draws(count, torch.Generator().manual_seed(1))]
    for top, left, h, w in ours:
        assert top >= 0 and left >= 0 and h > 0 and w > 0 and top + h <= height and left + w <= width
    a, b = np.array(theirs, float), np.array(ours, float)
    error = np.sqrt((a.var(0) + b.var(0)) / count)
    assert (np.abs(a.mean(0) - b.mean(0)) <= 4.5 * error + 1e-9).all()
    assert (np.abs(a.std(0) - b.std(0)) <= 4.5 * error + 1e-9).all()


def test_the_whole_image_is_a_window_where_that_is_asked_for() -> None:
    view = View(area=(1.0, 1.0))
    assert all(view.window(100, 100, d)[2:] == (100, 100) for d in view.draws(50, torch.Generator()) if d[1] == 0.5)
    assert View(area=(0.5, 0.5)).window(100, 100, [0.3, 0.5, 0.0, 0.0]) == (0, 0, 71, 71)
    assert view.window(10, 1000, [0.5] * 41) == (0, 493, 10, 13)  # nothing fits: the middle


# Batches


def test_batches_are_the_same_whatever_the_workers_and_the_order(folder: Path) -> None:
    sampler = data(folder).sampler(1, 2, seed=36)
    found = []
    for workers in (1, len(os.sched_getaffinity(0))):
        train = data(folder, workers=workers).load().train
        wanted = ((sampler.indices(n), sampler.generator(n)) for n in range(9))
        found.append(list(in_advance(train, wanted)))
    alone = data(folder, workers=1).load().train
    for n in (8, 3, 0, 5):
        batch = alone.batch(sampler.indices(n), sampler.generator(n))
        for batches in found:
            torch.testing.assert_close(batches[n], batch, rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_labels_and_validation(folder: Path, channels_last: bool) -> None:
    images = data(folder, validation=10, channels_last=channels_last, crop=48, resize=56)
    images.check(world_size=2)
    assert images.train_size() == 50 and images.classes == ("cat", "dog") and images.input_shape == (3, 48, 48)
    splits = images.load()
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (50, 10, 10)
    inputs, labels = splits.validation.batch(torch.arange(10))
    assert labels.bincount().tolist() == [5, 5]
    assert inputs.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    plain = data(folder, crop=48, resize=56).load()
    whole, _ = plain.train.batch(torch.arange(60))
    assert all(any(torch.equal(image, one) for one in whole) for image in inputs)


def test_pillow_decodes_to_the_same_pixels_where_torchvision_has_no_decoder(
    real_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data(real_folder)
    index = torch.arange(100)
    with_torchvision = images.load().train.batch(index, torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchvision.io", None)
        imagenet.decoder.cache_clear()
        images.check(1)
        with_pillow = images.load().train.batch(index, torch.Generator().manual_seed(0))
        patch.setitem(sys.modules, "PIL", None)
        imagenet.decoder.cache_clear()
        with pytest.raises(ConfigError, match=r"needs torchvision or Pillow.*hpc-grawa\[vision\]"):
            images.check(1)
    imagenet.decoder.cache_clear()
    torch.testing.assert_close(with_pillow, with_torchvision, rtol=0, atol=0)


def test_batches_leave_global_streams_alone(folder: Path) -> None:
    train, before = data(folder).load().train, torch.get_rng_state()
    train.batch(torch.arange(8), torch.Generator().manual_seed(0))
    train.batch(torch.arange(8))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_can_be_prepared_is_prepared_in_advance_and_no_further() -> None:
    begun: list[int] = []

    class Slow(TensorExamples):
        def start(self, index: Tensor, generator: torch.Generator | None = None, device: torch.device = CPU) -> Any:
            begun.append(int(index))
            return lambda: self.batch(index, generator)

    inputs = torch.arange(20)
    slow, plain = Slow(inputs, inputs), TensorExamples(inputs, inputs)
    assert isinstance(slow, Ahead) and not isinstance(plain, Ahead)
    for number, (found, _) in enumerate(in_advance(slow, ((inputs[n : n + 1], None) for n in range(20)))):
        assert found.item() == number and max(begun) <= number + 2
    assert begun == list(range(20))
    endless = in_advance(plain, ((inputs[:3], None) for _ in iter(int, 1)))
    assert next(endless)[0].tolist() == [0, 1, 2]


class Moves(TorchDispatchMode):
    """Notes the element type of whatever goes to another device, and its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and isinstance(found, Tensor) and args[0].device != found.device:
            self.seen.append((args[0].dtype, args[0].nbytes))
        return found


@pytest.mark.parametrize("channels_last", [False, True])
def test_bytes_go_to_the_device_and_a_batch_is_normalised_there(channels_last: bool, folder: Path) -> None:
    train = data(folder, channels_last=channels_last, crop=48, resize=56).load().train
    elsewhere = torch.device("meta")  # a device that every machine has; it keeps shapes alone
    batches = list(in_advance(train, ((torch.arange(n, n + 8), None) for n in range(2)), elsewhere))
    with Moves() as moves:
        batches += in_advance(train, [(torch.arange(8), torch.Generator())], elsewhere)
    assert moves.seen == [(torch.uint8, 8 * 48 * 48 * 3)]  # what normalises is there since the first batch
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for inputs, _ in batches:
        assert inputs.device == elsewhere and inputs.dtype == torch.float32 and inputs.shape == (8, 3, 48, 48)
        assert inputs.is_contiguous(memory_format=layout)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
def test_a_gpu_normalises_as_the_host_does(folder: Path) -> None:
    train, index = data(folder).load().train, torch.arange(16)
    expected, labels = train.batch(index, torch.Generator().manual_seed(1))
    wanted = ((index, torch.Generator().manual_seed(1)) for _ in range(5))
    for inputs, found in in_advance(train, wanted, torch.device("cuda", 0)):
        assert inputs.is_cuda and inputs.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(inputs.cpu(), expected, rtol=0, atol=0)
        assert torch.equal(found, labels)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Every pread from here on: the file and the offset."""
    seen: list[tuple[str, int]] = []
    honest, lock = os.pread, threading.Lock()

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        with lock:
            seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset))
        return honest(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    yield seen


def places(folder: Path, index: Tensor) -> set[tuple[str, int]]:
    rows = np.load(folder / "train.npy")[index.numpy()]
    return {(str(folder / f"train-{row['shard']:05}.tar"), int(row["offset"])) for row in rows}


def test_a_rank_reads_its_shard_and_its_probes_alone_one_pread_per_image(
    folder: Path, reads: list[tuple[str, int]]
) -> None:
    images = data(folder, batch_size=5)
    train, sampler = images.load().train, images.sampler(1, 3, seed=36)
    steps = 2 * len(sampler.shard) // 5
    for _ in in_advance(train, ((sampler.indices(n), sampler.generator(n)) for n in range(steps))):
        pass
    assert len(reads) == steps * 5 and set(reads) == places(folder, sampler.shard)
    reads.clear()
    probe = sampler.probe_indices(0).flatten()
    train.batch(probe)
    assert len(reads) == 5 and set(reads) == places(folder, probe)


@pytest.mark.parametrize("source", ["all", "shard"])
def test_between_evaluations_ranks_read_what_they_train_on_and_their_probes(
    source: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        f"--model SmallCNN --model.in_channels 3 --data ImageNet --data.path {folder} --data.batch_size 4 "
        f"--data.crop 32 --data.resize 36 --budget.steps 9 --method LGRAWA --method.period 3 "
        f"--method.probe_from {source}"
    )
    config = parse(words.split())
    config.check(3)
    here, honest = threading.local(), imagenet.PackedImages.start

    def start(images: Any, index: Tensor, *more: Any) -> Any:
        here.read |= places(folder, index)
        return honest(images, index, *more)

    monkeypatch.setattr(imagenet.PackedImages, "start", start)

    def body(comm: Communicator) -> tuple[set[tuple[str, int]], int]:
        here.read = set()
        worker = Worker(config, comm)
        here.read.clear()  # rank 0 has tried model and data out
        for _ in range(9):
            worker.step()
        return here.read, sum(s.completed for s in worker.run.synchronizers)

    for rank, (read, rounds) in enumerate(simulate(3, body)):
        sampler = config.data.sampler(rank, 3, config.run.seed)
        probes = [sampler.probe_indices(n, 1, source).flatten() for n in range(rounds + AHEAD)]  # type: ignore[arg-type]
        steps = [sampler.indices(n) for n in range(9 + AHEAD)]
        assert rounds == 3 and read == places(folder, torch.cat(steps + probes))


@pytest.mark.parametrize("damage", ["no image", "another image"])
def test_a_damaged_image_is_named(damage: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    row = np.load(copy / "train.npy")[3]
    file = copy / f"train-{row['shard']:05}.tar"
    content = bytearray(file.read_bytes())
    if damage == "no image":
        content[int(row["offset"]) : int(row["offset"]) + 8] = bytes(8)
    else:  # which decoders take
        content[int(row["offset"]) + int(row["length"]) * 3 // 4] ^= 1
    file.write_bytes(content)
    train = data(copy).load().train
    train.batch(torch.arange(3))
    with pytest.raises(
        RuntimeError, match=rf"{file.name}, the image at {row['offset']}, cannot be decoded .*verify.py"
    ):
        train.batch(torch.arange(8))


def framed(content: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header promises another size."""
    changed = bytearray(content)
    at = max(content.rfind(frame, 0, content.index(b"\xff\xda")) for frame in (b"\xff\xc0", b"\xff\xc2"))
    changed[at + 5 : at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(changed)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(300)}, {"comment": b"\xff\xc0"}]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_size_of_a_jpeg_is_known_from_its_header(mode: str, options: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (31, 257)).save(buffer, "JPEG", **options)
    content = buffer.getvalue()
    assert imagenet.jpeg_size(content) == (257, 31)
    padded = content[:2] + b"\xff\xff" + content[2:]  # markers may have any number of these before them
    assert imagenet.jpeg_size(padded) == (257, 31)
    assert imagenet.decoder()(padded).shape == (257, 31, 3)
    assert imagenet.jpeg_size(framed(content, 65000, 9)) == (9, 65000)
    for length in (0, 1, 2, 3, 20):
        assert imagenet.jpeg_size(content[:length]) == (0, 0)
    assert imagenet.jpeg_size(b"\xff\xd8" + b"\xff\xe0\0\0" * 99) == (0, 0)


def test_an_image_of_too_many_pixels_is_named_before_it_is_decoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training, too: one line, and status 2."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    row = np.load(copy / "val.npy")[3]
    file, start, end = copy / f"val-{row['shard']:05}.tar", int(row["offset"]), int(row["offset"] + row["length"])
    content = file.read_bytes()
    file.write_bytes(content[:start] + framed(content[start:end], 65000, 65000) + content[end:])
    where = f"{file}, the image at {start}, cannot be decoded (65000 x 65000 pixels are more than 67,108,864): "
    with pytest.raises(Damaged) as error:
        data(copy).load().test.batch(torch.arange(4))
    assert str(error.value).startswith(where)

    def end_here(_: object, status: int = 1) -> None:
        raise SystemExit(status)

    own.plain_process(monkeypatch)
    monkeypatch.setattr("hpc_grawa.comm.single.SingleCommunicator.abort", end_here)  # else it would end the tests
    words = ("--method=LGRAWA", "--model=SmallCNN", "--model.in_channels=3", "--data=ImageNet", f"--data.path={copy}")
    words += (
        "--data.crop=32",
        "--data.resize=32",
        "--data.batch_size=8",
        "--budget.steps=2",
        f"--run.dir={tmp_path}/runs",
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *words])
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("\n") == 1
    assert errors.startswith(f"hpc-grawa train: error: rank 0: {where}")


class Largest(TorchDispatchMode):
    """The largest tensor that is made within the block."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize(("height", "width"), [(1, 60000), (60000, 1), (2, 65000)])
def test_of_an_image_that_is_too_thin_to_be_resized_the_middle_is_seen(height: int, width: int) -> None:
    """Whose sides are dark, and whose middle, as long as it is high 40 times over, is bright."""
    long, short = max(height, width), min(height, width)
    line = np.zeros(long, np.uint8)
    line[long // 2 - 20 * short : long // 2 + 20 * short] = 200
    image = np.broadcast_to(line if width == long else line[:, None], (height, width))
    with Largest() as largest:
        seen = View(crop=128, resize=256).center(np.stack([image] * 3, 2))
    assert seen.shape == (128, 128, 3) and (seen == 200).all()
    assert largest.numbers <= 3 * imagenet.MOST_PIXELS


# Settings


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"crop": 300}, ("data.crop", "300", "256")),
        ({"resize": 10_000}, ("data.resize", "10000", "8192")),
        ({"smallest": 0.0}, ("data.smallest", "0.0")),
        ({"workers": 0}, ("data.workers", "0", "processors")),
        ({"workers": 10**6}, ("data.workers", "1000000", "processors")),
        ({"batch_size": 61}, ("data.batch_size", "61", "60")),
        ({"validation": 60}, ("data.validation", "60", "59")),
        ({"path": "/nowhere"}, ("data.path", "/nowhere", "data_prep/imagenet.py")),
    ],
)
def test_impossible_values_are_found_before_anything_is_loaded(
    folder: Path, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as raised:
        data(folder, **fields).check(world_size=1)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("damage", ["unfinished", "foreign", "json", "short", "missing", "index", "rows"])
def test_a_wrong_folder_is_an_error_that_names_key_value_and_command(damage: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    if damage == "unfinished":
        (copy / "meta.json").unlink()
    if damage == "foreign":
        (copy / "meta.json").write_text('{"name": "CIFAR-10", "counts": {"train": 5, "test": 5}}')
    if damage == "json":
        (copy / "meta.json").write_text("[1, ")
    if damage == "short":
        os.truncate(copy / "val-00000.tar", 1000)
    if damage == "missing":
        (copy / "train-00000.tar").unlink()
    if damage == "index":
        size = meta["bytes"]["train.npy"]
        (copy / "train.npy").write_bytes(b"x" * size)
    if damage == "rows":
        meta["counts"]["train"] += 1
        (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ConfigError) as raised:
        data(copy).load()
    message = str(raised.value)
    assert "data.path" in message and str(copy) in message and "data_prep/imagenet.py" in message
    assert "\n" not in message


INDEX = {
    "offset": (2**40, 2**64 - 1, 2**63),
    "length": (0, 2**31, 2**32 - 1),
    "shard": (99, 2**32 - 1),
    "label": (2, 2**32 - 1),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in INDEX for value in INDEX[field]])
def test_an_index_that_names_what_is_not_there_is_an_error_that_names_file_and_image(
    field: str, value: int, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    rows = np.load(copy / "train.npy")
    rows[field][5] = value
    np.save(copy / "train.npy", rows)
    with pytest.raises(ConfigError, match=r"data.path is '.*\(train.npy says of image 5 what cannot be: .*\)") as error:
        data(copy).load()
    assert str(value) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "part", "value"),
    [
        ("shards", "train", 10**9),
        ("shards", "train", 0),
        ("shards", "val", "1"),
        ("shards", "val", 1.0),
        ("counts", "train", -1),
        ("counts", "train", "60"),
        ("counts", "val", 0),
        ("counts", "val", [10]),
        ("classes", None, 2),
        ("classes", None, [1, 2]),
        ("bytes", None, []),
        ("bytes", "train-00001.tar", None),
        ("rows", None, 10**12),
    ],
)
def test_impossible_facts_are_an_error_of_one_line_and_cost_nothing(
    key: str, part: str | None, value: Any, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    if key == "rows":  # the index, and what says how long it is, promise more images than there are
        meta["counts"]["train"] = value
        (copy / "train.npy").write_bytes(promising((copy / "train.npy").read_bytes(), value))
    elif part is None:
        meta[key] = value
    else:
        meta[key][part] = value
    (copy / "meta.json").write_text(json.dumps(meta))
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"data.path is ") as error:
            data(copy).load()
        assert "\n" not in str(error.value) and tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# Staging


def near(folder: Path, stage: Path, world: int, lines: list[str] | None = None, **settings: Any) -> list[Any]:
    """The training examples of each rank of one node, once they are staged."""
    images = data(folder, stage=str(stage), **settings)

    def body(comm: Communicator) -> Any:
        say = (lambda _: None) if lines is None else lines.append
        return images.near(images.load(), comm, 36, say).train

    return simulate(world, body)


def test_staged_examples_are_the_same_and_read_from_the_stage_alone(
    folder: Path, tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    images, stage = data(folder, batch_size=4), tmp_path / "stage"
    plain = images.load().train
    samplers = [images.sampler(rank, 3, 36) for rank in range(3)]
    trains = near(folder, stage, 3, batch_size=4)
    (copy,) = stage.iterdir()
    assert len(reads) == 60  # each image was copied once for the node
    for sampler, train in zip(samplers, trains, strict=True):
        for n in range(6):
            expected = plain.batch(sampler.indices(n), sampler.generator(n))
            reads.clear()
            torch.testing.assert_close(train.batch(sampler.indices(n), sampler.generator(n)), expected, rtol=0, atol=0)
            assert len(reads) == 4 and all(file.startswith(str(copy)) for file, _ in reads)


def test_only_what_the_nodes_ranks_train_on_is_copied(folder: Path, tmp_path: Path) -> None:
    images = data(folder, split="fraction", fraction=0.25, validation=10, stage=str(tmp_path))
    plain = replace(images, stage=None).load().train
    trains = simulate(2, lambda comm: images.near(images.load(), comm, 36, lambda _: None).train)
    union = torch.unique(torch.cat([images.sampler(rank, 2, 36).shard for rank in range(2)]))
    assert len(union) < len(plain)
    sizes = sum(file.stat().st_size for file in tmp_path.rglob("*.images"))
    assert sizes == int(plain.rows["length"][union.numpy()].sum())
    everything = torch.arange(len(plain))  # what was not copied is read where it was
    torch.testing.assert_close(trains[0].batch(everything), plain.batch(everything), rtol=0, atol=0)


def test_staging_goes_on_where_it_stopped_and_copies_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, int]]
) -> None:
    honest, left = Path.rename, 2

    def rename(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return honest(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            near(folder, tmp_path, 1)
    complete = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.images")}
    assert len(complete) == 2
    reads.clear()
    lines: list[str] = []
    (train,) = near(folder, tmp_path, 1, lines)
    assert 0 < len(reads) < 60 and "GB to copy" in lines[1]
    assert complete.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.items()
    assert not list(tmp_path.rglob("*.part"))
    reads.clear()
    del lines[:]
    near(folder, tmp_path, 1, lines)
    assert not reads and "already holds" in lines[0] and "0.00 GB to copy" in lines[1]
    everything = torch.arange(60)
    torch.testing.assert_close(train.batch(everything), data(folder).load().train.batch(everything), rtol=0, atol=0)


def test_what_another_job_on_this_host_is_writing_is_left_to_it(folder: Path, tmp_path: Path) -> None:
    """Two jobs that stage the same data at once; what one left that was killed is removed."""
    near(folder, tmp_path, 1)
    first, *_ = sorted(tmp_path.rglob("*.images"))
    content = first.read_bytes()
    first.unlink()
    killed = subprocess.Popen(["true"])
    killed.wait()
    writers = {"at work": f"0123abcd.{os.getppid()}", "killed": f"0123abcd.{killed.pid}", "older": "0123abcd"}
    halves = {who: first.with_name(f"{first.name}.{by}.{platform.node()}.part") for who, by in writers.items()}
    for half in halves.values():
        half.write_bytes(b"half")
    near(folder, tmp_path, 1)
    assert list(tmp_path.rglob("*.part")) == [halves["at work"]]
    halves["at work"].write_bytes(content)
    halves["at work"].rename(first)
    lines: list[str] = []
    near(folder, tmp_path, 1, lines)
    assert "0.00 GB to copy" in lines[1]


@pytest.mark.parametrize("damage", ["bit", "short", "reversed"])
def test_a_damaged_copy_is_not_used_again(
    damage: str, folder: Path, tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    near(folder, tmp_path, 1)
    first, second, *others = sorted(tmp_path.rglob("*.images"))
    before = {path: path.read_bytes() for path in (first, second, *others)}
    stamps = {path: path.stat().st_mtime_ns for path in others}
    if damage == "bit":
        first.write_bytes(before[first][:-1] + bytes([before[first][-1] ^ 1]))
    if damage == "short":
        first.write_bytes(before[first][:-1])
    if damage == "reversed":
        first.write_bytes(before[first][::-1])
    reads.clear()
    (train,) = near(folder, tmp_path, 1)
    assert {file for file, _ in reads} == {str(folder / f"{first.stem}.tar")}
    assert {path: path.read_bytes() for path in before} == before
    assert {path: path.stat().st_mtime_ns for path in others} == stamps
    everything = torch.arange(60)
    torch.testing.assert_close(train.batch(everything), data(folder).load().train.batch(everything), rtol=0, atol=0)


def test_each_node_copies_what_its_own_ranks_train_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, int]]
) -> None:
    here = threading.local()  # a simulated rank is a thread
    monkeypatch.setattr("hpc_grawa.comm.base.host_identity", lambda: here.name)

    def body(comm: Communicator) -> tuple[str, Any]:
        here.name = "ab"[comm.rank % 2]  # dealt round, as with srun -m cyclic
        images = data(folder, batch_size=4, stage=str(tmp_path / here.name))
        train = images.near(images.load(), comm, 36, lambda _: None).train
        return here.name, train

    found = simulate(4, body)
    images = data(folder, batch_size=4)
    plain, samplers = images.load().train, [images.sampler(rank, 4, 36) for rank in range(4)]
    copied = set(reads)
    assert len(reads) == len(copied) == 60  # both nodes together, once each
    for node, ranks in (("a", (0, 2)), ("b", (1, 3))):
        union = torch.cat([samplers[rank].shard for rank in ranks])
        sizes = sum(file.stat().st_size for file in (tmp_path / node).rglob("*.images"))
        assert sizes == int(plain.rows["length"][union.numpy()].sum())
        assert places(folder, union) <= copied
    for sampler, (node, train) in zip(samplers, found, strict=True):
        expected = plain.batch(sampler.shard)
        reads.clear()
        torch.testing.assert_close(train.batch(sampler.shard), expected, rtol=0, atol=0)
        assert all(file.startswith(str(tmp_path / node)) for file, _ in reads)


def test_staging_is_over_before_the_clock_starts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)
    honest, late = imagenet.staged, 0.0

    def slow(*arguments: Any) -> Any:
        nonlocal late
        late += 10_000
        return honest(*arguments)

    monkeypatch.setattr(imagenet, "staged", slow)
    monkeypatch.setattr(
        "hpc_grawa.training.budget.time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late)
    )
    words = (
        f"train --model SmallCNN --model.in_channels 3 --data ImageNet --data.path {folder} --data.batch_size 8 "
        f"--data.crop 32 --data.resize 36 --data.stage {tmp_path / 'stage'} --budget.steps 2 --method.period 2 "
        f"--eval.bn_batches 2 --eval.every 99 --run.dir {tmp_path} --run.name run --log.tensorboard false"
    )
    cli.main(words.split())
    assert late == 10_000
    assert 0 < json.loads((tmp_path / "run" / "summary.json").read_text())["training_seconds"] < 10_000


def test_staging_says_the_same_on_all_ranks_where_it_cannot_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    usage = shutil.disk_usage(tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=10**6)
    assert usage.free > full.free

    def problem(stage: Path, folder: Path) -> str:
        images = data(folder, stage=str(stage))

        def body(comm: Communicator) -> str:
            with pytest.raises(ConfigError) as raised:
                images.near(images.load(), comm, 36, lambda _: None)
            return str(raised.value)

        first, second = simulate(2, body)
        assert first == second
        return first

    assert f"data.stage is {tmp_path / 'file'}" in problem(tmp_path / "file", folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        assert "must have 0.07 GB free, has 0.00" in problem(tmp_path / "stage", folder)
        assert not list(tmp_path.rglob("*.images"))
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = bytearray((copy / "train-00001.tar").read_bytes())
    content[2000] ^= 1
    (copy / "train-00001.tar").write_bytes(content)
    assert "train-00001.tar is damaged at" in problem(tmp_path / "stage", copy)


# Models and metric


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name", "parameters", "tensors"),
    [
        (ResNet50, "resnet50", 25_557_032, 161),
        (ResNet152, "resnet152", 60_192_808, 467),
        (ViTB16, "vit_b_16", 86_567_656, 152),
    ],
)
def test_models_are_torchvisions(model: type[nn.Module], name: str, parameters: int, tensors: int) -> None:
    ours = model()
    sizes = [parameter.numel() for parameter in ours.parameters()]
    assert (sum(sizes), len(sizes)) == (parameters, tensors)
    theirs = getattr(torchvision.models, name)()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_resnet50_is_torchvisions() -> None:
    test_models_are_torchvisions(ResNet50, "resnet50", 25_557_032, 161)


def test_top_k_beside_the_accuracy() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(200, 12), torch.randint(0, 12, (200,))
    metric = TopAccuracy()
    order = outputs.argsort(1, descending=True)
    ranks = (order == targets[:, None]).float().argmax(1)
    found = Evaluator(F.cross_entropy, metric, batch_size=33).evaluate(own_identity(), TensorExamples(outputs, targets))
    assert list(found) == ["loss", "accuracy", "top5_accuracy"]
    assert found["accuracy"] == pytest.approx((ranks == 0).double().mean().item(), abs=1e-12)
    assert found["top5_accuracy"] == pytest.approx((ranks < 5).double().mean().item(), abs=1e-12)
    few = TopAccuracy(k=99)
    assert few.values(few.sums(outputs, targets))["top99_accuracy"] == 1
    with pytest.raises(ConfigError, match=r"metric\.k is 0"):
        TopAccuracy(k=0)


def own_identity() -> nn.Module:
    """Gives its inputs back; has a parameter, as an evaluation wants to know its device."""
    model = nn.Linear(12, 12, bias=False)
    nn.init.eye_(model.weight)
    return model


def test_a_run_reports_top_1_and_top_5_and_smooths_labels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.plain_process(monkeypatch)
    words = (
        f"train --model SmallCNN --model.in_channels 3 --data ImageNet --data.path {folder} --data.batch_size 8 "
        f"--data.crop 32 --data.resize 36 --data.stage {tmp_path / 'stage'} --metric TopAccuracy --metric.k 2 "
        f"--loss.label_smoothing 0.1 --budget.steps 6 --method.period 3 --eval.bn_batches 2 --eval.every 3 "
        f"--eval.unit steps --run.dir {tmp_path} --run.name run --log.tensorboard false"
    )
    cli.main(words.split())
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metric"] == "accuracy" and summary["center_test_top2_accuracy"] == 1.0
    assert len(summary["local_test_top2_accuracy"]) == 1
    assert "top2_accuracy 1.0000" in said and "60 images of this node's ranks" in said
    assert list((tmp_path / "stage").rglob("*.images"))
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(e["top2_accuracy"] == 1 and "accuracy" in e for e in events if e["event"] == "evaluate")

    cli.main(["table", str(tmp_path / "run")])
    assert "top2 accuracy, center, test" in capsys.readouterr().out
    file = tmp_path / "run" / "config.yaml"
    settings = file.read_text()
    assert settings.count("workers: null") == 1
    file.write_text(settings.replace("workers: null", "workers: 4096"))  # trained where there were so many processors
    cli.main(["evaluate", str(tmp_path / "run")])
    assert f"top2_accuracy {1:.4f}" in capsys.readouterr().out
    file.write_text(settings)
    # The loss that is reported is the one that was trained on, with smoothed labels.
    config = parse(["--config", str(tmp_path / "run" / "config.yaml")])
    model = config.build_model()
    model.load_state_dict(torch.load(tmp_path / "run" / "center.pt", weights_only=True))
    inputs, targets = config.data.load().test.batch(torch.arange(10))
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(inputs), targets, label_smoothing=0.1)
    assert summary["center_test_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_same_training_whatever_the_workers_and_wherever_the_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.plain_process(monkeypatch)
    centers = []
    for number, more in enumerate((["--data.workers=1"], [f"--data.stage={tmp_path / 'stage'}"])):
        words = (
            f"train --model SmallCNN --model.in_channels 3 --data ImageNet --data.path {folder} --data.batch_size 8 "
            f"--data.crop 32 --data.resize 36 --budget.steps 5 --method.period 2 --eval.bn_batches 2 --eval.every 99 "
            f"--run.dir {tmp_path} --run.name {number} --log.tensorboard false"
        )
        cli.main([*words.split(), *more])
        centers.append(torch.load(tmp_path / str(number) / "center.pt", weights_only=True))
    torch.testing.assert_close(centers[0], centers[1], rtol=0, atol=0)


@pytest.mark.slow
def test_no_run_folder_is_made_where_staging_fails(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    words = (
        f"train --model SmallCNN --model.in_channels 3 --data ImageNet --data.path {folder} --data.batch_size 8 "
        f"--data.stage {tmp_path / 'file'} --budget.steps 5 --run.dir {tmp_path / 'runs'}"
    )
    done = launch(*words.split(), ranks=2)
    assert done.status == 2 and f"error: data.stage is {tmp_path / 'file'}" in done.said
    assert "Traceback" not in done.said
    assert not list((tmp_path / "runs").glob("*"))


def test_no_message_waits_for_as_long_as_a_copy_takes(on_ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_WORD_EVERY", 0.02)

    def body(comm: Communicator) -> tuple[list[str], int]:
        def work() -> str:
            time.sleep(0.1 * (comm.rank == 0))
            return f"rank {comm.rank}"

        comm.meter = Meter()
        told = staging._told_by_all(comm, work)
        return told, comm.meter.calls["setup"]

    for told, calls in on_ranks(body):
        assert told == [f"rank {rank}" for rank in range(on_ranks.size)]
        assert calls >= 2 * 3
