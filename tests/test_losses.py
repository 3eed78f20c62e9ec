"""An evaluated loss is that of all examples as one batch, however they are divided among batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Ranks
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_grawa import losses
from hpc_grawa.data import TensorExamples
from hpc_grawa.metrics import Metric
from hpc_grawa.training.evaluate import Evaluator

N, C = 23, 5
GENERATOR = torch.Generator().manual_seed(0)
CLASSES = torch.randint(C, (N,), generator=GENERATOR)
TOKENS = torch.randint(C, (N, 4), generator=GENERATOR)
TOKENS[3:9] = 0  # whole batches of padding
NUMBERS = torch.randn(N, C, generator=GENERATOR)
SHARES = NUMBERS.softmax(-1)
SIGNS = CLASSES % 2 * 2 - 1
WEIGHTS = torch.linspace(0.2, 3, C)


class Count(Metric):
    name = "count"

    def sums(self, output: Any, target: Any) -> Tensor:
        return torch.tensor([float(len(target))])

    def value(self, sums: Tensor) -> float:
        return float(sums[0])


class Wrapped(nn.Module):
    """The mean over tokens: one of torch's losses, called by a class of one's own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(**settings)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        result: Tensor = self.loss(output.view(-1, C), target.flatten())
        return result


class Masked(nn.Module):
    """A mean that only its own sums can tell."""

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        mask = target != 0
        return torch.stack(((F.cross_entropy(output.mT, target, reduction="none") * mask).sum(), mask.sum()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        numerator, denominator = self.sums(output, target)
        return numerator / denominator


class Total(nn.Module):
    """A sum that says so."""

    reduction = "sum"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().sum()


def two_heads(output: Tensor, target: Tensor) -> Tensor:
    first = F.cross_entropy(output, target, ignore_index=0)
    return first + 0.4 * F.cross_entropy(2 * output, target, ignore_index=0) + 0.01


def poisson(output: Tensor, target: Tensor) -> Tensor:
    return F.poisson_nll_loss(output, target, reduction="mean")


LOSSES: dict[str, tuple[Callable[[Any, Any], Tensor], Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(), CLASSES),
    "one class ignored": (nn.CrossEntropyLoss(ignore_index=0), CLASSES),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), CLASSES),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), CLASSES),
    "all three": (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1, ignore_index=2), CLASSES),
    "summed": (nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum", ignore_index=2), CLASSES),
    "unreduced": (nn.CrossEntropyLoss(reduction="none"), CLASSES),
    "targets with probabilities": (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), SHARES),
    "in the old way": (lambda o, t: F.cross_entropy(o, t, size_average=False), CLASSES),
    "as a function": (F.cross_entropy, CLASSES),
    "negative log-likelihood": (lambda o, t: F.nll_loss(o.log_softmax(-1), t, WEIGHTS, ignore_index=1), CLASSES),
    "mean over tokens": (lambda o, t: F.cross_entropy(o.view(-1, C), t.flatten(), ignore_index=0), TOKENS),
    "mean over tokens, wrapped": (Wrapped(ignore_index=0, label_smoothing=0.1), TOKENS),
    "tokens as dimensions": (lambda o, t: F.cross_entropy(o.mT, t, weight=WEIGHTS, ignore_index=0), TOKENS),
    "own sums": (Masked(), TOKENS),
    "own total": (Total(), NUMBERS),
    "two means with one denominator": (two_heads, CLASSES),
    "own mean over examples": (lambda o, t: (o - t).abs().pow(3).mean(), NUMBERS),
    "squares": (nn.MSELoss(), NUMBERS),
    "squares, summed": (nn.MSELoss(reduction="sum"), NUMBERS),
    "absolute": (nn.L1Loss(), NUMBERS),
    "Huber": (nn.HuberLoss(), NUMBERS),
    "smooth L1": (nn.SmoothL1Loss(beta=0.3), NUMBERS),
    "binary": (lambda o, t: F.binary_cross_entropy(o.sigmoid(), t, WEIGHTS), SHARES),
    "binary of logits": (nn.BCEWithLogitsLoss(weight=WEIGHTS, pos_weight=WEIGHTS.flip(0)), SHARES),
    "divergence": (lambda o, t: F.kl_div(o.log_softmax(-1), t, reduction="batchmean"), SHARES),
    "divergence by element": (nn.KLDivLoss(reduction="mean"), SHARES),
    "Gaussian": (lambda o, t: F.gaussian_nll_loss(o, t, o.square() + 0.1), NUMBERS),
    "Poisson": (poisson, SHARES),
    "several labels": (nn.MultiLabelSoftMarginLoss(weight=WEIGHTS), (NUMBERS > 0).float()),
    "margins": (nn.MultiMarginLoss(weight=WEIGHTS), CLASSES),
    "soft margins": (nn.SoftMarginLoss(), NUMBERS.sign()),
    "embeddings": (lambda o, t: F.cosine_embedding_loss(o, o.flip(1), t, margin=0.1), SIGNS),
    "weighted squares": (lambda o, t: F.mse_loss(o, t, weight=t.abs()), NUMBERS),
}


def inputs(target: Tensor) -> Tensor:
    shape = (*target.shape, C) if target is TOKENS else (N, C)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:size_average and reduce", "ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_all_examples_as_one_batch(on_ranks: Ranks, name: str) -> None:
    loss, target = LOSSES[name]
    x = inputs(target)
    examples, model = TensorExamples(x, target), nn.Linear(C, C)
    nn.init.eye_(model.weight), nn.init.zeros_(model.bias)
    expected = float(loss(x, target).mean())

    def evaluated(size: int) -> list[float]:
        evaluator = Evaluator(loss, Count(), batch_size=size)
        return on_ranks(lambda comm: evaluator.evaluate(model, examples, comm)["loss"])

    for size in (3, 500):
        assert evaluated(size) == pytest.approx([expected] * on_ranks.size, rel=2e-6)


def test_batches_without_a_target_that_counts_do_not_count(on_ranks: Ranks) -> None:
    """Where no target at all counts there is no mean."""
    x, targets = inputs(CLASSES), torch.where(torch.arange(N) < 20, -100, CLASSES)
    evaluator = Evaluator(nn.CrossEntropyLoss(), Count(), batch_size=2)
    model = nn.Identity()
    model.scale = nn.Linear(1, 1)
    found = [
        on_ranks(lambda comm, t=t: evaluator.evaluate(model, TensorExamples(x, t), comm)["loss"])
        for t in (targets, torch.full((N,), -100))
    ]
    assert found[0] == pytest.approx([float(F.cross_entropy(x[20:], CLASSES[20:]))] * on_ranks.size)
    assert all(math.isnan(value) for value in found[1])


def test_a_limit_and_bf16_take_the_same_sums() -> None:
    x, loss = inputs(CLASSES), nn.CrossEntropyLoss(ignore_index=0, weight=WEIGHTS)
    model, examples = nn.Linear(C, C), TensorExamples(x, CLASSES)
    chosen = torch.arange(9) * N // 9
    few = [Evaluator(loss, Count(), "bf16", size).evaluate(model, examples, limit=9)["loss"] for size in (2, 9)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = loss(model(x[chosen]).float(), CLASSES[chosen])
    assert few == pytest.approx([float(expected)] * 2, rel=1e-2) and few[0] == pytest.approx(few[1], rel=1e-3)


def test_lengths_of_sequences_are_divided_by_before_the_mean() -> None:
    """CTC, whose target is a pair here."""
    torch.manual_seed(0)
    outputs = torch.randn(6, 12, C).log_softmax(-1)
    labels, lengths = torch.randint(1, C, (6, 3)), torch.tensor([1, 2, 3, 3, 1, 2])

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return F.ctc_loss(output.transpose(0, 1), target[0], torch.full((len(output),), 12), target[1])

    parts = [slice(0, 1), slice(1, 6)]
    sums = sum(losses.sums(loss, outputs[p], (labels[p], lengths[p]), len(lengths[p]), 6) for p in parts)
    assert float(sums[0] / sums[1]) == pytest.approx(float(loss(outputs, (labels, lengths))), rel=1e-6)


@pytest.mark.filterwarnings("error")
def test_the_sums_of_a_compiled_loss_are_seen() -> None:
    x, loss = inputs(CLASSES), torch.compile(Wrapped(ignore_index=0), backend="eager")
    expected = float(loss(x, CLASSES))
    with torch.no_grad():
        found = sum(losses.sums(loss, x[i : i + 5], CLASSES[i : i + 5], len(x[i : i + 5]), N) for i in range(0, N, 5))
    assert float(found[0] / found[1]) == pytest.approx(expected, rel=1e-6)
