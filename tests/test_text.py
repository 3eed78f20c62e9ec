"""Windows of a prepared text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ilsvrc import script

from hpc_grawa.data import Text
from hpc_grawa.data.text import Windows
from hpc_grawa.errors import ConfigError

CONTENT = "".join(f"Zeile {n}: grüße, {n * n} Ω\n" for n in range(400))
TOKENS = ("bytes", "characters")


def prepared(place: Path, tokens: str, times: int = 1) -> Path:
    """A small text, so many times over, as the script leaves it."""
    (place / "text").write_text(CONTENT * times, encoding="utf-8")
    words = ["--files", str(place / "text"), "--out", str(place / "out"), "--tokens", tokens]
    assert script("text").main(words) == 0
    return place / "out"


@pytest.fixture(scope="module", params=TOKENS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp(request.param), request.param)


def test_windows_lie_side_by_side_and_targets_are_the_next_tokens(folder: Path) -> None:
    data, facts = Text(path=str(folder), context=7), json.loads((folder / "meta.json").read_text())
    data.check(world_size=2)
    train, test = data.load().train, data.load().test
    for examples, part in ((train, "train"), (test, "test")):
        stream = np.load(folder / f"{part}.npy").astype(np.int64)
        count = (len(stream) - 1) // 7
        assert len(examples) == count and len(stream) - 1 - 7 * count < 7
        inputs, targets = examples.batch(torch.arange(count))
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (count, 7)
        assert np.array_equal(inputs.flatten(), stream[: 7 * count])
        assert np.array_equal(targets.flatten(), stream[1 : 7 * count + 1])  # each token is guessed once
    assert data.train_size() == data.size() == len(train)
    assert data.model_arguments() == {"vocabulary": facts["vocabulary_size"], "context": 7}


def test_training_windows_are_shifted_by_the_draws_of_their_batch() -> None:
    tokens = np.arange(100, dtype=np.uint8)
    index, whole = torch.arange(9).repeat(200), Windows(tokens, 10, shift=True)
    inputs, targets = whole.batch(index, torch.Generator().manual_seed(3))
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(10)) and torch.equal(targets, inputs + 1)
    shift = (inputs[:, 0] - 10 * index).view(200, 9)
    assert all(shift[:, i].unique().tolist() == list(range(10)) for i in range(8))
    assert shift[:, 8].unique().tolist() == list(range(10)) and targets.max() == 99  # the stream's end
    again, _ = whole.batch(index, torch.Generator().manual_seed(3))
    assert torch.equal(again, inputs)
    for examples, generator in ((whole, None), (Windows(tokens, 10), torch.Generator())):
        assert torch.equal(examples.batch(index, generator)[0][:, 0], 10 * index)
    short, _ = Windows(tokens[:15], 10, shift=True).batch(torch.zeros(99).long(), torch.Generator())
    assert short[:, 0].unique().tolist() == list(range(5))


def test_validation_windows_are_evenly_spaced_and_no_training_windows(folder: Path) -> None:
    data = Text(path=str(folder), context=7, validation=5, batch_size=4)
    data.check(world_size=2)
    loaded = data.load()
    assert loaded.validation is not None
    assert (len(loaded.train), len(loaded.validation)) == (data.train_size(), 5)
    stream = np.load(folder / "validation.npy")
    windows = (len(stream) - 1) // 7
    starts = [7 * (i * windows // 5) for i in range(5)]
    inputs, _ = loaded.validation.batch(torch.arange(5), torch.Generator())
    assert np.array_equal(inputs, [stream[start : start + 7] for start in starts])
    assert data.sampler(0, 2, 36).size == data.train_size()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"context": 0}, ("data.context is 0", "at least 1 token")),
        ({"context": 5000}, ("data.context is 5000", "part has")),
        ({"context": 8, "validation": 500}, ("data.validation is 500", "the windows of the validation part")),
        ({"context": 8, "validation": -1}, ("data.validation is -1",)),
        ({"context": 8, "batch_size": 9999}, ("data.batch_size is 9999",)),
        ({"context": 8, "fraction": 0.5}, ("data.fraction is 0.5",)),
    ],
)
def test_impossible_values_are_found_before_anything_is_loaded(
    folder: Path, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as raised:
        Text(path=str(folder), **fields).check(world_size=2)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("damage", ["absent", "foreign", "json", "missing", "short", "dtype", "size", "tokens", "part"])
def test_a_wrong_folder_is_an_error_that_names_key_value_and_command(folder: Path, damage: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    meta, train = copy / "meta.json", copy / "train.npy"
    facts = json.loads(meta.read_text())
    if damage == "absent":
        shutil.rmtree(copy)
    elif damage == "foreign":
        meta.write_text('{"name": "CIFAR-10"}')
    elif damage == "json":
        meta.write_text("[1, ")
    elif damage == "missing":
        train.unlink()
    elif damage == "short":
        train.write_bytes(train.read_bytes()[:-1])
    elif damage == "dtype":
        np.save(train, np.load(train).astype(np.int64))
    elif damage == "size":
        meta.write_text(json.dumps(facts | {"vocabulary_size": 7}))
    elif damage == "tokens":
        meta.write_text(json.dumps(facts | {"vocabulary_size": 3, "vocabulary": [1, 2, 3]}))
    else:
        del facts["counts"]["validation"]
        meta.write_text(json.dumps(facts))
    data = Text(path=str(copy))
    for attempt in (data.load, data.size, data.model_arguments, data.metric_arguments, lambda: data.check(2)):
        with pytest.raises(ConfigError) as raised:
            attempt()
        message = str(raised.value)
        assert "data.path" in message and str(copy) in message and "data_prep/text.py" in message
        assert "\n" not in message
