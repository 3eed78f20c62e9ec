"""A language model: what it computes, what it is judged by, and that it learns a text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import torch
import torch.nn.functional as F
from test_resume import Cut, cut_at
from test_text import TOKENS, prepared
from torch import nn

from hpc_grawa import simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.data import Text
from hpc_grawa.errors import ConfigError
from hpc_grawa.metrics import BitsPerByte, Perplexity, TopAccuracy
from hpc_grawa.models import GPT
from hpc_grawa.models.gpt import _rotated, _rotations
from hpc_grawa.training.evaluate import Evaluator
from hpc_grawa.training.loop import fit


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


@pytest.fixture(scope="module", params=TOKENS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp(request.param), request.param)


# ---------------------------------------------------------------------------------------------------------
# The model.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_no_place_sees_a_later_one_and_every_earlier_one_is_seen(positions: Any) -> None:
    torch.manual_seed(0)
    model = GPT(11, context=8, depth=2, width=16, heads=2, positions=positions).double()
    tokens = torch.randint(11, (2, 8))
    logits = model(tokens)
    assert logits.shape == (2, 11, 8)
    for place in range(8):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 11
        changed = (model(other) - logits).abs().amax(1) > 1e-12
        assert not changed[:, :place].any() and changed[:, place:].all()
    assert torch.allclose(model(tokens[:, :5]), logits[..., :5], rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"sequences of 9 tokens: model\.context allows 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_rotary_attention_knows_how_far_apart_tokens_are_and_not_where() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 8).double(), torch.randn(2, 8).double()
    cos, sin = _rotations(20, 8, q.device)

    def score(i: int, j: int) -> torch.Tensor:
        return (_rotated(q, (cos[i], sin[i])) * _rotated(k, (cos[j], sin[j]))).sum(-1)

    torch.testing.assert_close(score(9, 4), score(15, 10), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(score(9, 4), score(9, 5), atol=1e-3)
    torch.testing.assert_close(score(7, 7), (q * k).sum(-1), rtol=1e-5, atol=1e-5)


def test_rotations_keep_the_precision_of_a_double_model() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _rotated(x, _rotations(3, 8, x.device)), x)
    assert _rotated(x.bfloat16(), _rotations(3, 8, x.device)).dtype == torch.bfloat16


def test_the_model_is_initialised_as_gpt2_and_shares_one_matrix() -> None:
    torch.manual_seed(0)
    model = GPT(256, context=64, depth=3, width=64, heads=4, positions="learned")
    named = dict(model.named_parameters())
    assert len(named) == 2 + 3 * 12 + 2  # no matrix of the output's own
    assert sum(p.numel() for p in named.values()) == 256 * 64 + 64 * 64 + 3 * (12 * 64**2 + 13 * 64) + 2 * 64
    for name, p in model.state_dict().items():
        if p.dim() == 2:
            std = 0.01 if name.startswith("place") else 0.02
            std /= math.sqrt(6) if name.endswith(("out.weight", "down.weight")) else 1
            assert float(p.std()) == pytest.approx(std, rel=0.05) and abs(float(p.mean())) < 0.1 * std
        else:
            assert p.unique().tolist() == ([0.0] if name.endswith("bias") else [1.0])
    loss = F.cross_entropy(model(torch.randint(256, (4, 64))), torch.randint(256, (4, 64)))
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)
    assert "place.weight" not in dict(GPT().named_parameters())


def test_dropout_is_of_training_alone() -> None:
    model, tokens = GPT(11, context=8, depth=1, width=16, heads=2, dropout=0.5), torch.randint(11, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"width": 10, "heads": 4, "positions": "learned"},
            r"model\.width is 10: must be a multiple of 4, for 4 heads",
        ),
        ({"width": 12, "heads": 4}, r"model\.width is 12: must be a multiple of 8, .* of pairs"),
        ({"depth": 0}, r"model\.depth is 0"),
        ({"dropout": 1.0}, r"model\.dropout is 1"),
    ],
)
def test_impossible_models_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT(**settings)


# ---------------------------------------------------------------------------------------------------------
# Metrics.
# ---------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """The same logits after every token that is the same."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.logits = nn.Embedding(vocabulary, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.logits(tokens).transpose(1, 2)
        return logits


@pytest.mark.parametrize("world", [1, 3])
def test_bits_per_byte_are_those_of_the_text(folder: Path, world: int) -> None:
    """Against sums over the text itself: total surprise in bits over its bytes, however ranks share the windows."""
    torch.manual_seed(0)
    data = Text(path=str(folder), context=7)
    vocabulary = data.model_arguments()["vocabulary"]
    model, test = Table(vocabulary), data.load().test  # type: ignore[arg-type]
    stream = np.load(folder / "test.npy").astype(np.int64)
    used = stream[: 7 * len(test) + 1]
    with torch.no_grad():
        table = torch.log_softmax(model.logits.weight.double(), -1).numpy()
    nats = -table[used[:-1], used[1:]].sum()
    characters = json.loads((folder / "meta.json").read_text())["vocabulary"]
    length = len(used) - 1 if characters is None else len("".join(characters[t] for t in used[1:]).encode())
    assert (length > len(used) - 1) == (characters is not None)
    evaluator = Evaluator(nn.CrossEntropyLoss(), BitsPerByte(**data.metric_arguments()), batch_size=4)  # type: ignore[arg-type]
    for found in simulate(world, lambda comm: evaluator.evaluate(model, test, comm)):
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / length, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(nats / (len(used) - 1)), rel=1e-6)
        assert found["loss"] == pytest.approx(nats / (len(used) - 1), rel=1e-6)


def test_metrics_of_tokens_fall_and_take_no_other_shapes() -> None:
    for metric in (Perplexity(), BitsPerByte()):
        assert not metric.higher_is_better
        for output, target in ((torch.zeros(2, 3, 5), torch.zeros(2, 3).long()), (torch.zeros(2, 5), torch.zeros(2))):
            with pytest.raises(ValueError, match="class numbers"):
                metric.sums(output, target)
    assert Perplexity().value(torch.tensor([1e9, 1.0])) < math.inf  # a model that has diverged


def test_targets_that_are_ignored_count_in_no_metric() -> None:
    """As in the loss: they are as if they were not there."""
    output, target = torch.randn(2, 4, 3), torch.tensor([[0, 1, 2], [3, -100, -100]])
    kept = output.movedim(1, -1)[target != -100], target[target != -100]
    bits = BitsPerByte(token_bytes=[1, 2, 3, 4])
    assert bits.values(bits.sums(output, target)) == pytest.approx(bits.values(bits.sums(*kept)))
    loss = nn.CrossEntropyLoss()(output, target)
    assert Perplexity().value(Perplexity().sums(output, target)) == pytest.approx(float(loss.exp()))
    best = TopAccuracy(k=2)
    assert best.values(best.sums(output.movedim(1, -1), target)) == best.values(best.sums(*kept))


# ---------------------------------------------------------------------------------------------------------
# Training.
# ---------------------------------------------------------------------------------------------------------

SMALL = (
    *("--model.depth=1", "--model.width=32", "--model.heads=2", "--data.context=16", "--data.validation=8"),
    *("--budget.seconds=null", "--budget.steps=24", "--eval.unit=steps", "--eval.every=12", "--optimizer.lr=0.01"),
    *("--eval.train_examples=50", "--eval.bn_batches=1"),
)


@pytest.mark.parametrize("method", ["LGRAWA", "LocalSGD", "DiLoCo", "DataParallel"])
def test_methods_learn_a_text(folder: Path, method: str, tmp_path: Path) -> None:
    period = ["--method.period=8"] if method in ("LGRAWA", "DiLoCo") else []
    made = parse(["--config=gpt_text", f"--method={method}", *period, f"--data.path={folder}", *SMALL])
    made.check(2)
    assert "token_bytes" not in made.text and "vocabulary" not in made.text  # it fits other texts, too

    def body(comm: Communicator) -> dict[str, Any]:
        return fit(made, comm, new_folder=None if comm.rank else lambda: tmp_path, speaks=False)

    summary = simulate(2, body)[0]
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [event for event in events if event["event"] == "evaluate"]
    assert {event["part"] for event in evaluations} == {"validation"}
    curve = [event["bits_per_byte"] for event in evaluations]
    assert curve[-1] < 0.75 * curve[0]
    assert summary["best_center_bits_per_byte"] == min(curve) and summary["higher_is_better"] is False
    nats = summary["center_test_loss"]
    assert summary["center_test_perplexity"] == pytest.approx(math.exp(nats), rel=1e-6)
    ratio = summary["center_test_bits_per_byte"] / (nats / math.log(2))
    in_bytes = made.data.metric_arguments() == {"token_bytes": None}
    assert ratio == pytest.approx(1, rel=1e-6) if in_bytes else ratio < 0.99


def test_a_run_on_text_that_was_cut_off_equals_the_uninterrupted_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shifts of windows and dropout go on where they were; in bf16, and in parts of a batch, too."""
    words = ("--model.dropout=0.1", "--precision=bf16", "--accumulate=2", "--save.unit=steps", "--save.every=5")
    made = parse(["--config=gpt_text", "--method.period=4", f"--data.path={folder}", *SMALL, *words])

    def run(place: Path) -> None:
        place.mkdir(exist_ok=True)
        simulate(2, lambda comm: fit(made, comm, new_folder=None if comm.rank else lambda: place, speaks=False))

    run(tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_at(17, patched)
        with pytest.raises(Cut):
            run(tmp_path / "cut")
    run(tmp_path / "cut")
    cut, whole = (torch.load(tmp_path / name / "center.pt", weights_only=True) for name in ("cut", "whole"))
    assert all(torch.equal(cut[key], whole[key]) for key in whole)


def test_what_the_data_settle_may_be_given(folder: Path) -> None:
    words = ["--config=gpt_text", f"--data.path={folder}"]
    assert parse([*words, "--model.context=512"]).build_model().context == 512
    given = parse([*words, "--metric=BitsPerByte", "--metric.token_bytes=[2, 2]"])
    assert given.metric._token_bytes.tolist() == [2, 2]  # type: ignore[attr-defined]
    assert parse([*words, "--metric=Perplexity"]).metric.name == "perplexity"
