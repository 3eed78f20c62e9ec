"""Evaluation is exact however ranks share the examples, and training notices nothing of it."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import own
import pytest
import torch
from own import network
from table import as_words, kinds
from torch import Tensor, nn

from hpc_grawa import simulate
from hpc_grawa.batchnorm import recalibrate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.data import ArraySplit
from hpc_grawa.metrics import Accuracy
from hpc_grawa.training.config import Config
from hpc_grawa.training.evaluate import BATCH, Evaluator, uniform_mean
from hpc_grawa.training.examiner import Examiner
from hpc_grawa.training.worker import Worker
from hpc_grawa.vector import ParameterVector

WORLDS = (1, 2, 3, 4)


class Images(ArraySplit):
    """Random images and labels; batches in float64, so that sums do not depend on their order."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        images = torch.randint(256, (count, 1, 5, 5), generator=generator, dtype=torch.uint8)
        super().__init__(images, torch.randint(4, (count,), generator=generator), [0.5], [0.25])

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        inputs, labels = super().batch(index, generator)
        return inputs.double(), labels


@pytest.mark.parametrize("count", [1, 2, 3, 37, BATCH + 3])
def test_ranks_together_find_what_one_process_finds(count: int) -> None:
    model, examples = network(), Images(count)
    inputs, labels = examples.batch(torch.arange(count))
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(inputs)
    correct = int((outputs.argmax(1) == labels).sum())
    loss = float(nn.functional.cross_entropy(outputs, labels))
    evaluator = Evaluator(nn.CrossEntropyLoss(), Accuracy())
    alone = evaluator.evaluate(model, examples)
    for found in (
        alone,
        *(f for world in WORLDS for f in simulate(world, lambda comm: evaluator.evaluate(model, examples, comm))),
    ):
        assert found["accuracy"] == correct / count
        assert found["loss"] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_a_metric_of_several_sums(world: int) -> None:
    examples = own.Numbers(tests=11, noise=0.5).load().test
    model = own.Line(slope=1.5)
    x, y = (t.double() for t in examples.batch(torch.arange(11)))
    with torch.no_grad():
        error = y - model(x.float())
    expected = float(1 - error.square().sum() / (y - y.mean()).square().sum())
    evaluator = Evaluator(own.Cubic(), own.R2())
    for found in simulate(world, lambda comm: evaluator.evaluate(model, examples, comm)):
        assert found == pytest.approx({"r2": expected, "loss": float(error.abs().pow(3).mean())}, rel=1e-6)


@pytest.mark.parametrize(
    ("limit", "expected"), [(4, [0, 2, 5, 7]), (10, list(range(10))), (99, list(range(10))), (1, [0])]
)
def test_a_limit_takes_examples_that_are_evenly_spaced(limit: int, expected: list[int]) -> None:
    examples = Images(10)
    seen: list[int] = []
    original = examples.batch
    examples.batch = lambda index, generator=None: seen.extend(index.tolist()) or original(index)  # type: ignore[method-assign, func-returns-value]
    evaluator = Evaluator(nn.CrossEntropyLoss(), Accuracy())
    simulate(3, lambda comm: evaluator.evaluate(network(), examples, comm, limit))
    assert sorted(set(seen)) == expected


def test_no_forward_pass_sees_more_examples_than_it_may() -> None:
    sizes: list[int] = []
    model = network()
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole, parts = (
        Evaluator(nn.CrossEntropyLoss(), Accuracy(), batch_size=n).evaluate(model, Images(10)) for n in (10, 4)
    )
    assert sizes == [10, 4, 4, 2]
    assert parts == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("world", WORLDS)
def test_the_mean_of_all_ranks_and_how_far_they_are_from_it(world: int) -> None:
    starts = np.random.default_rng(0).normal(size=(world, 6))

    def body(comm: Communicator) -> tuple[Tensor, float]:
        model = nn.Linear(5, 1).double()
        vector = ParameterVector(model)
        vector.data.copy_(torch.from_numpy(starts[comm.rank]))
        return uniform_mean(comm, vector.data)

    mean = starts.mean(0)
    distance = np.sqrt(((starts - mean) ** 2).sum(1).mean())
    for found, consensus in simulate(world, body):
        np.testing.assert_allclose(found, mean, rtol=1e-12)
        assert consensus == pytest.approx(distance, rel=1e-12, abs=1e-15)


class Noisy(nn.Module):
    """Draws from every global stream in its forward pass, beside dropout and BatchNorm."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(in_channels), nn.Dropout(0.2)
        self.head = nn.Linear(64, num_classes)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)  # type: ignore[operator]
        noise = torch.randn(()) + float(np.random.randn()) + random.gauss(0, 1)
        y: Tensor = self.head(self.drop(self.norm(x)).flatten(1)) + 1e-3 * noise * self.training
        return y


def configuration(*words: str) -> Config:
    return parse(
        ["--config=digits", "--model=test_evaluate.Noisy", "--budget.seconds=null", "--budget.steps=9", *words]
    )


def state(worker: Worker) -> list[Any]:
    """All that training goes on from, bit for bit."""
    model, optimizer = worker.model, worker.optimizer
    synchronizers = [vars(s) | {"center": s.averager.center, "score": vars(s.score)} for s in worker.run.synchronizers]
    kept = [
        {key: tensor.clone() for key, tensor in model.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        copy.deepcopy(optimizer.state_dict()),
        [module.training for module in model.modules()],
        [torch.get_rng_state(), np.random.get_state()[1], random.getstate()],
        [(s["position"], s["completed"], None if s["center"] is None else s["center"].clone()) for s in synchronizers],
        [{k: v.clone() for k, v in s["score"].items() if isinstance(v, Tensor)} for s in synchronizers],
        [worker.facts.state_dict() | {"seconds": 0.0}],
    ]
    return kept


@pytest.mark.parametrize(("name", "world"), [*((name, 3) for name in kinds()), ("LGRAWA", 1)])
def test_training_notices_nothing_of_an_evaluation(name: str, world: int) -> None:
    config = configuration(*as_words(name))

    def body(comm: Communicator, evaluating: bool) -> list[Any]:
        worker = Worker(config, comm)
        examiner = Examiner(worker)
        for step in range(9):
            worker.step()
            if evaluating and step in (0, 3, 5):
                before = state(worker)
                with examiner.center():
                    examiner.evaluate(worker.splits.test)
                examiner.everything()
                torch.testing.assert_close(state(worker), before, rtol=0, atol=0, equal_nan=True)
        return state(worker)

    for with_it, without in zip(
        simulate(world, lambda comm: body(comm, True)), simulate(world, lambda comm: body(comm, False)), strict=True
    ):
        torch.testing.assert_close(with_it, without, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("world", [2, 4])
def test_models_in_place_are_those_that_are_named(world: int) -> None:
    """The center with recalibrated statistics, by hand from all ranks' parameters; and the mean."""
    config = parse(
        ["--config=digits", "--method=LocalSGD", "--method.period=3", "--budget.seconds=null", "--budget.steps=5"]
    )

    def body(comm: Communicator) -> tuple[Tensor, Tensor, dict[str, Any]]:
        worker = Worker(config, comm)
        for _ in range(3):
            worker.step()
        center = worker.vector.data.clone()  # LocalSGD has just set every rank to it
        worker.step()
        return center, worker.vector.data.clone(), Examiner(worker).everything()

    results = simulate(world, body)
    mean = torch.stack([own for _, own, _ in results]).double().mean(0)
    spread = torch.stack([own for _, own, _ in results]).double() - mean
    test = config.data.load().test

    def evaluated(parameters: Tensor) -> dict[str, float]:
        def at(comm: Communicator) -> dict[str, float]:
            worker = Worker(config, comm)
            worker.vector.data.copy_(parameters)
            train = worker.splits.train
            batches = (train.batch(worker.sampler.indices(b))[0] for b in range(config.eval.bn_batches))
            recalibrate(worker.model, batches, comm)
            return Evaluator(config.loss, config.metric).evaluate(worker.model, test)

        return simulate(world, at)[0]

    center, averaged = evaluated(results[0][0]), evaluated(mean.float())
    for _, _, found in results:
        assert found["consensus_distance"] == pytest.approx(float(spread.square().sum(1).mean().sqrt()), rel=1e-4)
        assert found["center_test_accuracy"] == center["accuracy"]
        assert found["mean_test_accuracy"] == pytest.approx(averaged["accuracy"], abs=2 / 360)
        assert found["center_test_loss"] == pytest.approx(center["loss"], rel=1e-5)
        assert found["mean_test_loss"] == pytest.approx(averaged["loss"], rel=1e-3)
        assert len(found["local_test_accuracy"]) == world
        assert found["local_test_accuracy"] == results[0][2]["local_test_accuracy"]


@pytest.mark.parametrize("steps", [1, 4])
def test_the_saved_center_is_what_was_evaluated(steps: int) -> None:
    """Statistics included; after 1 step there was no round yet, and the center is the mean."""
    config = parse(["--config=digits", "--method.period=3", "--budget.seconds=null", "--budget.steps=9"])

    def body(comm: Communicator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        worker = Worker(config, comm)
        for _ in range(steps):
            worker.step()
        return Examiner(worker).everything(), worker.model.state_dict()

    (found, own_state), (elsewhere, _) = simulate(2, body)
    saved = found.pop("center_state")
    torch.testing.assert_close(elsewhere.pop("center_state"), saved, rtol=0, atol=0)
    assert elsewhere == found
    model = config.build_model()
    model.load_state_dict(saved)
    test = config.data.load().test
    assert Evaluator(config.loss, config.metric).evaluate(model, test)["accuracy"] == found["center_test_accuracy"]
    assert not torch.equal(saved["features.1.running_mean"], own_state["features.1.running_mean"])
    assert (found["center_test_loss"] == found["mean_test_loss"]) == (steps == 1)
