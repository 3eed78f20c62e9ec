"""Runs from their configuration to their summary, on simulated ranks with the digits."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import reference as ref
import table
import torch
from table import is_
from torch import Tensor, nn

from hpc_grawa import cli, simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.trace import Kind, Trace
from hpc_grawa.errors import NonFinite
from hpc_grawa.runs.log import Log
from hpc_grawa.training.config import Config
from hpc_grawa.training.ending import Ending
from hpc_grawa.training.evaluate import Evaluator
from hpc_grawa.training.loop import fit
from hpc_grawa.training.worker import Worker

P, LAYERS, CONTROL = 15_418, 11, 10  # SmallCNN's parameters and tensors; numbers in a control word


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


def digits(*words: str, method: str = "LGRAWA", steps: int = 10) -> Config:
    budget = ["--budget.seconds=null", f"--budget.steps={steps}"]
    config = parse(["--config=digits", *table.as_words(method), *budget, *words])
    config.check(4)
    return config


def run(config: Config, folder: Path, world: int = 3) -> list[dict[str, Any]]:
    """The summaries of all ranks; the run's files are in `folder`."""
    folder.mkdir(exist_ok=True)
    return simulate(
        world, lambda comm: fit(config, comm, new_folder=None if comm.rank else lambda: folder, speaks=False)
    )


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def center(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "center.pt", weights_only=True)
    return found


@pytest.fixture(scope="module", params=[name for name in table.kinds() if name in table.plain()])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Path, dict[str, Any]]:
    """A run of each kind of method on three ranks: 30 steps, the last 2 of which are a shortened round."""
    config = digits(
        "--eval.unit=steps", "--eval.every=10", "--log.every=5", "--run.seed=36", method=request.param, steps=30
    )
    folder = tmp_path_factory.mktemp("runs") / f"{request.param}-36"
    summaries = run(config, folder)
    written = json.loads((folder / "summary.json").read_text())
    assert summaries[0] == written
    return config, folder, written


def test_the_loss_falls(finished: tuple[Config, Path, dict[str, Any]]) -> None:
    _, folder, summary = finished
    losses = [event["loss"] for event in events(folder, "train")]
    assert [event["step"] for event in events(folder, "train")] == [5, 10, 15, 20, 25, 30]
    assert losses[0] > 1.5 > 0.8 > losses[-1]
    assert summary["center_train_loss"] < 1
    assert summary["center_test_accuracy"] > 0.6


def test_the_summary_has_every_key(finished: tuple[Config, Path, dict[str, Any]]) -> None:
    config, folder, summary = finished
    expected = {
        **{"method": type(config.method).__name__, "backend": "simulated", "world_size": 3, "seed": 36, "steps": 30},
        **{"rounds": 8 if is_(summary["method"], "averages") else 0, "epochs": 2.0, "healed": 0, "parameters": P},
        **{"state": "finished", "name": folder.name, "metric": "accuracy", "higher_is_better": True},
    }
    assert {key: summary[key] for key in expected} == expected
    for key in ("center_test", "mean_test", "center_train", "mean_train", "best_center", "final_center"):
        accuracy, examples = summary[f"{key}_accuracy"], 1437 if "train" in key else 360
        assert 0 <= accuracy <= 1
        assert accuracy * examples == pytest.approx(round(accuracy * examples))  # each example counted once
    assert len(summary["local_test_accuracy"]) == 3 and all(0 <= a <= 1 for a in summary["local_test_accuracy"])
    for key in ("center_test", "mean_test", "center_train", "mean_train"):
        assert 0 < summary[f"{key}_loss"] < math.inf
    assert len(summary["local_test_loss"]) == 3
    parts = [summary[f"{part}_seconds"] for part in ("compute", "loading", "communication", "waiting")]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(summary["training_seconds"])
    assert summary["examples_per_second"] == pytest.approx(30 * 3 * 32 / summary["training_seconds"])
    assert summary["gap"] == summary["center_train_accuracy"] - summary["center_test_accuracy"]
    assert summary["final_center_accuracy"] == summary["center_test_accuracy"]
    curve = {event["step"]: event["accuracy"] for event in events(folder, "evaluate")}
    assert list(curve) == [0, 10, 20, 30]
    assert summary["best_center_accuracy"] == max(curve.values()) == curve[summary["best_step"]]
    assert curve[30] == summary["center_test_accuracy"]
    assert summary["best_part"] == "test"
    assert (summary["consensus_distance"] > 1e-3) == (not is_(summary["method"], "equal"))
    assert summary["versions"].keys() >= {"python", "torch", "numpy", "hpc-grawa"}
    assert summary["commit"] is None or len(summary["commit"].rstrip("+")) == 40


def test_bytes_are_those_counted_by_hand(finished: tuple[Config, Path, dict[str, Any]]) -> None:
    """2n(W-1)/W for an allreduce, n(W-1) for an allgather, n(W-1)/W for a broadcast, of n bytes on each of W ranks."""
    config, _, summary = finished
    name = summary["method"]
    scores = LAYERS if is_(name, "layers") else 1
    rounds, ranks = 8, 3
    if isinstance(oracle := table.METHODS[name].oracle, ref.DataParallel):  # words at steps 20 and 30
        shapes = [tuple(p.shape) for p in config.build_model().parameters()]
        messages = [m for step in range(30) for m in oracle.messages(shapes, ranks, 4, step)]
        payload = [sum(n for _, n in messages), 2 * 8 * CONTROL]
        sent = sum(ref.bytes_sent(verb, n, ranks) for verb, n in messages) + payload[1] * (ranks - 1)
    else:
        share = 1 if is_(name, "leader") else 2
        payload = [rounds * 4 * P, rounds * 8 * (CONTROL + scores)]
        sent = share * payload[0] * (ranks - 1) / ranks + payload[1] * (ranks - 1)
    assert summary["payload_bytes"] == sum(payload)
    assert summary["bytes_sent"] == pytest.approx(sent, abs=1)


def test_rounds_are_written_with_weights_that_sum_to_1(finished: tuple[Config, Path, dict[str, Any]]) -> None:
    config, folder, summary = finished
    name, rounds = summary["method"], events(folder, "round")
    if not is_(name, "averages"):
        assert rounds == []
        return
    assert [event["step"] for event in rounds] == [4, 8, 12, 16, 20, 24, 28, 30]  # the last is shortened
    assert [event["period"] for event in rounds] == [4] * 7 + [2]
    assert [event["round"] for event in rounds] == list(range(1, 9))
    names = [name for name, _ in nn.Module.named_parameters(config.build_model())]
    assert events(folder, "start")[0]["layers"] == names
    for event in rounds:
        weights = torch.tensor(event["weights"], dtype=torch.float64)
        assert weights.shape == (3, LAYERS if is_(name, "layers") else 1)
        torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1], dtype=torch.float64), rtol=0, atol=2e-6)
        assert event["leader"] == int(weights.mean(1).argmax())
        assert (event["lr"], event["healed"]) == (0.1, [])
        if is_(name, "uniform"):
            assert weights.flatten().tolist() == [0.333333] * 3
        elif is_(name, "leader"):
            assert sorted(weights.flatten().tolist()) == [0, 0, 1]
        else:
            assert len(set(weights.flatten().tolist())) > 1


def test_the_center_loads_into_a_fresh_model_and_evaluate_prints_its_accuracy(
    finished: tuple[Config, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder, summary = finished
    model = config.build_model()
    model.load_state_dict(center(folder))
    scores = Evaluator(config.loss, config.metric).evaluate(model, config.data.load().test)
    assert scores["accuracy"] == summary["center_test_accuracy"]
    assert scores["loss"] == pytest.approx(summary["center_test_loss"], rel=1e-5)
    cli.main(["evaluate", str(folder), "--backend=single"])
    printed = capsys.readouterr().out
    assert f"test accuracy {summary['center_test_accuracy']:.4f}" in printed


def final_parameters(config: Config, world: int) -> list[Tensor]:
    def body(comm: Communicator) -> Tensor:
        worker = Worker(config, comm)
        while worker.used < 1:
            worker.step()
        worker.run.finish()
        return worker.vector.data

    return simulate(world, body)


@pytest.mark.parametrize("words", [(), ("--optimizer=AdamW",), ("--optimizer.clip_norm=0.5", "--schedule=Cosine")])
def test_data_parallel_leaves_all_ranks_bit_identical(words: tuple[str, ...]) -> None:
    first, *others = final_parameters(digits(*words, method="DataParallel"), 4)
    for other in others:
        assert torch.equal(other, first)


@pytest.mark.parametrize("method", ["LGRAWA", "DataParallel"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(method: str, tmp_path: Path) -> None:
    summaries = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        config = digits(f"--run.seed={seed}", "--eval.train_examples=50", method=method, steps=6)
        summaries[name] = run(config, tmp_path / name, world=2)[0]
    a, b, c = (center(tmp_path / name) for name in "abc")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a["head.weight"], c["head.weight"])
    for key in ("center_test_loss", "mean_train_loss", "local_test_loss", "consensus_distance"):
        assert summaries["a"][key] == summaries["b"][key]


def test_the_file_of_a_run_repeats_it_bit_for_bit(tmp_path: Path) -> None:
    words = ("--schedule=Cosine", "--schedule.warmup=3", "--data.augment=true", "--model.width=8", "--run.seed=5")
    run(digits(*words, "--data.split=reshuffled", method="MGRAWA"), tmp_path / "a", world=2)
    run(parse(["--config", str(tmp_path / "a" / "config.yaml")]), tmp_path / "b", world=2)
    torch.testing.assert_close(center(tmp_path / "a"), center(tmp_path / "b"), rtol=0, atol=0)
    assert (tmp_path / "a" / "config.yaml").read_text() == (tmp_path / "b" / "config.yaml").read_text()


def test_ranks_start_alike_and_independent_ones_do_not() -> None:
    def start(config: Config) -> list[Tensor]:
        return simulate(3, lambda comm: Worker(config, comm).vector.data)

    alike, apart = start(digits()), start(digits("--run.start=independent"))
    assert all(torch.equal(x, alike[0]) for x in alike)
    assert all(not torch.equal(x, y) for i, x in enumerate(apart) for y in apart[:i])


def test_every_rank_has_random_streams_of_its_own_set_by_the_seed() -> None:
    def draws(seed: int) -> list[tuple[float, float, float]]:
        def body(comm: Communicator) -> tuple[float, float, float]:
            Worker(digits(f"--run.seed={seed}"), comm)
            return torch.rand(()).item(), float(np.random.rand()), random.random()

        return simulate(3, body)

    once = draws(1)
    assert draws(1) == once
    for stream in zip(*once, *draws(2), strict=True):
        assert len(set(stream)) == 6


@pytest.mark.parametrize("method", ["LocalSGD", "DataParallel", "LGRAWA"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(method: str) -> None:
    """On a model without BatchNorm, whose statistics are those of the part."""
    words = ("--model=test_train.Perceptron", "--optimizer.clip_norm=1")
    whole = final_parameters(digits(*words, method=method, steps=6), 2)
    for parts in (2, 4, 32):
        for ours, theirs in zip(
            final_parameters(digits(*words, f"--optimizer.accumulate={parts}", method=method, steps=6), 2),
            whole,
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_extra_state_of_a_model_is_in_its_center_and_its_ranks_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What evaluations, probes and the first try have counted is not in it."""
    run(digits("--model=own.Counting", steps=6), tmp_path, world=2)
    for file in ("center.pt", "models/rank-0001.pt"):
        state = torch.load(tmp_path / file, weights_only=True)
        assert state["_extra_state"] == {"steps": 6, "as tensors": [torch.tensor(6)]}
    summary = json.loads((tmp_path / "summary.json").read_text())
    cli.main(["evaluate", str(tmp_path), "--backend=single"])
    loss = float(re.search(r"test loss (\S+),", capsys.readouterr().out)[1])  # type: ignore[index]
    assert loss == pytest.approx(summary["center_test_loss"], abs=1e-4)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def test_a_probe_is_the_mean_of_its_batches_each_in_the_parts_of_a_training_batch() -> None:
    """No forward pass is larger than a part, and a worker that goes on draws the next batches."""
    parts = ("--optimizer.accumulate=4", "--method.probe_batches=3", "--method.score_momentum=0")
    config = digits("--model=test_train.Perceptron", *parts, steps=3 * table.PERIOD)

    def body(comm: Communicator) -> None:
        sizes: list[int] = []
        rounds = 0

        def watched() -> Worker:
            worker = Worker(config, comm)
            worker.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
            score = worker.run.synchronizers[0].score
            take = score.take

            def checked() -> Tensor:
                nonlocal rounds
                scores, made = take(), len(sizes)
                inputs, targets = worker.splits.train.batch(worker.sampler.probe_indices(rounds, 3).flatten())
                loss = config.loss(worker.model(inputs), targets)
                del sizes[made:]
                gradient = torch.autograd.grad(loss, worker.vector.parameters)
                expected = torch.stack([g.norm() for g in gradient]).double()
                torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)
                rounds += 1
                return scores

            score.take = checked  # type: ignore[method-assign]
            return worker

        worker = watched()
        while worker.used < 1:
            if worker.local_steps == 2 * table.PERIOD:
                state = worker.state_dict()
                worker = watched()
                worker.load_state_dict(state)
            worker.step()
        assert rounds == 3
        assert sizes == [8] * (4 * 3 * (table.PERIOD + 3))

    simulate(2, body)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_norm_is_clipped_after_gradients_are_shared(parts: int) -> None:
    """One step of plain SGD is -lr·g·min(1, c/‖g‖) with g the mean gradient of all ranks; computed here by hand."""
    plain = ("--optimizer.momentum=0", "--optimizer.nesterov=false", "--optimizer.weight_decay=0", "--optimizer.lr=1")
    config = digits(
        *("--model=test_train.Perceptron", "--optimizer.clip_norm=0.3", f"--optimizer.accumulate={parts}", *plain),
        *("--run.start=common",),
        method="DataParallel",
        steps=1,
    )

    def body(comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
        worker = Worker(config, comm)
        start = worker.vector.data.clone()
        batch = worker.splits.train.batch(worker.sampler.indices(0))
        gradient = torch.autograd.grad(config.loss(worker.model(batch[0]), batch[1]), [*worker.model.parameters()])
        worker.step()
        return start, worker.vector.data, torch.cat([g.flatten() for g in gradient])

    results = simulate(3, body)
    mean = torch.stack([gradient for _, _, gradient in results]).mean(0)
    assert mean.norm() > 0.3
    for start, end, gradient in results:
        assert not torch.allclose(gradient / gradient.norm(), mean / mean.norm(), atol=1e-3)
        torch.testing.assert_close(end - start, -0.3 * mean / mean.norm(), rtol=1e-4, atol=1e-6)


def test_the_learning_rate_follows_the_schedule_on_all_ranks(tmp_path: Path) -> None:
    words = ("--schedule=Step", "--schedule.milestones=[3, 6]", "--schedule.unit=steps", "--schedule.warmup=2")
    run(digits(*words, "--optimizer.lr=0.5", "--log.every=1", steps=8), tmp_path / "a", world=2)
    rates = [event["lr"] for event in events(tmp_path / "a", "train")]
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.05, 0.05, 0.05, 0.005, 0.005])
    assert [event["lr"] for event in events(tmp_path / "a", "round")] == pytest.approx([0.05, 0.005])


class Slow(Perceptron):
    """Takes 4 ms longer in training."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.004 if self.training else 0)
        return super().forward(x)


@pytest.mark.parametrize("method", ["LGRAWA", "DataParallel"])
def test_a_budget_in_seconds_ends_on_all_ranks_at_the_same_step(method: str, tmp_path: Path) -> None:
    config = digits(
        "--budget.seconds=0.5",
        "--model=test_train.Slow",
        "--run.control_every=5",
        "--eval.every=100",
        method=method,
        steps=10_000,
    )
    summaries = run(config, tmp_path / "a", world=3)
    assert len({summary["steps"] for summary in summaries}) == 1
    assert 0.5 <= summaries[0]["training_seconds"] < 5
    assert summaries[0]["steps"] % (table.PERIOD if is_(method, "averages") else 5) == 0
    assert summaries[0]["steps"] < 10_000


class Examined(Perceptron):
    """Takes 100 ms longer in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0 if self.training else 0.1)
        return super().forward(x)


def test_evaluation_does_not_count_as_training(tmp_path: Path) -> None:
    start = time.perf_counter()
    config = digits("--model=test_train.Examined", "--eval.unit=steps", "--eval.every=2", steps=20)
    summary = run(config, tmp_path / "a", world=1)[0]
    assert summary["training_seconds"] < time.perf_counter() - start - 1.1  # 11 evaluations
    stamps = [event["seconds"] for event in events(tmp_path / "a", "evaluate")]
    assert (
        len(stamps) == 11
        and stamps == sorted(stamps)
        and stamps[-1] == pytest.approx(summary["training_seconds"], abs=0.01)
    )


@pytest.mark.parametrize(
    ("unit", "every", "steps"), [("steps", 4, [0, 4, 8, 12]), ("epochs", 0.5, [0, 6, 12]), ("steps", 5, [0, 5, 10, 12])]
)
def test_the_cadence_of_evaluations(unit: str, every: float, steps: list[int], tmp_path: Path) -> None:
    config = digits(f"--eval.unit={unit}", f"--eval.every={every}", "--model=test_train.Perceptron", steps=12)
    run(config, tmp_path / "a", world=4)  # 12 steps an epoch
    assert [event["step"] for event in events(tmp_path / "a", "evaluate")] == steps


def test_choices_are_made_on_validation_examples_and_results_reported_on_test(tmp_path: Path) -> None:
    config = digits("--data.validation=200", "--eval.unit=steps", "--eval.every=3", steps=9)
    summary = run(config, tmp_path / "a", world=2)[0]
    curve = [event["accuracy"] for event in events(tmp_path / "a", "evaluate")]
    assert {event["part"] for event in events(tmp_path / "a", "evaluate")} == {summary["best_part"]} == {"validation"}
    assert all(accuracy * 200 == pytest.approx(round(accuracy * 200)) for accuracy in curve)
    assert summary["best_center_accuracy"] == max(curve)
    assert summary["center_test_accuracy"] * 360 == pytest.approx(round(summary["center_test_accuracy"] * 360))


def test_own_classes_train_and_a_metric_of_their_own_is_reported(tmp_path: Path) -> None:
    words = [f"--{section}={path}" for section, path in own.ALL.items() if section not in ("method", "data")]
    config = parse(
        [
            *words,
            "--data=own.Numbers",
            "--data.tests=2",
            "--method=LocalSGD",
            "--budget.epochs=150",
            "--optimizer.lr=0.1",
        ]
    )
    config.check(3)  # with fewer test examples than ranks
    summary = run(config, tmp_path / "a", world=3)[0]
    assert (summary["metric"], summary["steps"]) == ("r2", 450)
    assert summary["gap"] == pytest.approx(summary["center_train_r2"] - summary["center_test_r2"])
    assert 0.8 < summary["center_train_r2"] <= 1
    trained = center(tmp_path / "a")
    assert trained["linear.weight"].item() == pytest.approx(2, abs=0.4)
    assert trained["linear.bias"].item() == pytest.approx(1, abs=0.3)


def test_what_waits_for_data_is_told_from_what_computes(tmp_path: Path) -> None:
    """Batches of training and of probes; those of evaluations are no part of training."""
    words = [f"--{section}={path}" for section, path in own.ALL.items() if section not in ("method", "data")]
    words += ["--data=own.LateNumbers", "--method=MGRAWA", "--method.period=4", "--budget.steps=10"]
    config = parse(words)
    config.check(2)
    summary = run(config, tmp_path / "a", world=2)[0]
    batches = 10 + 3
    assert 0.02 * batches <= summary["loading_seconds"] <= summary["training_seconds"] - summary["waiting_seconds"]
    parts = [summary[f"{part}_seconds"] for part in ("compute", "loading", "communication", "waiting")]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(summary["training_seconds"])


@pytest.mark.parametrize("method", ["LGRAWA", "DataParallel"])
def test_bf16_trains_over_fp32_parameters(method: str, tmp_path: Path) -> None:
    summary = run(digits("--precision=bf16", method=method, steps=20), tmp_path / "a", world=2)[0]
    assert summary["center_test_accuracy"] > 0.5
    assert {tensor.dtype for tensor in center(tmp_path / "a").values()} == {torch.float32, torch.int64}


def test_training_that_diverges_everywhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="lower the learning rate"):
        run(digits("--optimizer.lr=1e20", method="DataParallel"), tmp_path / "a", world=2)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["state"] == "diverged" and summary["cause"].startswith("NonFinite: the mean gradient of all ranks")


def test_nothing_is_under_way_once_a_run_has_diverged(tmp_path: Path) -> None:
    """A checkpoint is whole, or not there; the last event is in the file."""
    words = ["--optimizer.lr=1e20", "--save.every=1", "--save.unit=steps", "--log.every=1"]
    with pytest.raises(NonFinite):
        run(digits(*words, method="LGRAWA"), tmp_path / "a", world=2)
    names = [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()]
    assert names and not [name for name in names if name.endswith(".partial")]


def test_a_wish_to_end_is_heard_where_the_run_diverges_before_its_word_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ending, "poll", lambda self: self.heed("SIGUSR2"))
    (one, other) = run(digits("--optimizer.lr=1e20", method="DataParallel"), tmp_path / "a", world=2)
    assert one["state"] == other["state"] == "timed out"
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["state"] == "timed out"


def test_a_world_of_one_trains_with_every_method(tmp_path: Path) -> None:
    for method in table.plain():
        summary = run(digits("--eval.train_examples=50", method=method, steps=6), tmp_path / method, world=1)[0]
        assert (summary["bytes_sent"], summary["steps"], summary["consensus_distance"]) == (0, 6, 0)


# ---------------------------------------------------------------------------------------------------------
# Pooled rounds, traces, events for TensorBoard.
# ---------------------------------------------------------------------------------------------------------


def test_a_pooled_run_of_equal_ranks_is_the_lockstep_run(tmp_path: Path) -> None:
    """Bit for bit, its evaluations and its learning rates too where they change at rounds."""
    words = ("--schedule=Step", "--schedule.unit=steps", "--schedule.milestones=[8]", "--eval.unit=steps")
    found = []
    for rounds in ("lockstep", "pooled"):
        config = digits(*words, "--eval.every=8", f"--method.rounds={rounds}", steps=18)
        summary = run(config, tmp_path / rounds)[0]
        curve = [(e["step"], e["accuracy"]) for e in events(tmp_path / rounds, "evaluate")]
        lines = [(e["step"], e["lr"], e["made"]) for e in events(tmp_path / rounds, "round")]
        losses = [e["loss"] for e in events(tmp_path / rounds, "train")]
        state = {k: t.tolist() for k, t in center(tmp_path / rounds).items()}
        found.append((curve, lines, summary["steps"], summary["rounds"], state, losses))
    assert found[0] == found[1]
    assert [step for step, _ in found[0][0]] == [0, 8, 16, 18]


@pytest.mark.parametrize("what", ["eval", "save"])
def test_a_slow_rank_is_waited_for_in_training_time(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rank 0, whose clock it is, at evaluations and checkpoints between two rounds too."""
    take = Worker.step

    def slower(worker: Worker) -> Tensor | None:
        time.sleep(0.01 * worker.comm.rank)
        return take(worker)

    monkeypatch.setattr(Worker, "step", slower)
    words = (f"--{what}.unit=steps", f"--{what}.every=4", f"--run.control_every={100 if what == 'eval' else 4}")
    (summary, _) = run(digits("--method.period=20", *words, method="LocalSGD", steps=12), tmp_path, world=2)
    # A simulated rank may make its next step before it hands over, in the other one's pause.
    assert summary["training_seconds"] >= summary["waiting_seconds"] >= 8 * 0.01
    assert summary["compute_seconds"] >= 0


@pytest.mark.parametrize("limit", ["--budget.steps=18", "--budget.seconds=0.5"])
def test_a_pooled_run_of_unequal_ranks_ends_on_all(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 takes three times as long per step; steps are still counted for all together."""
    take = Worker.step

    def slower(worker: Worker) -> Tensor | None:
        worker.comm.elapse(3.0 if worker.comm.rank == 0 else 1.0)  # type: ignore[attr-defined]
        return take(worker)

    monkeypatch.setattr(Worker, "step", slower)
    config = digits("--method.rounds=pooled", "--budget.steps=null", limit, "--eval.unit=steps", "--eval.every=6")
    summaries = run(config, tmp_path)
    made = [event["made"] for event in events(tmp_path, "round")]
    steps = summaries[0]["steps"]
    assert {s["steps"] for s in summaries} == {steps}
    assert sum(map(sum, made)) == 3 * steps
    assert all(sum(counts) == 3 * table.PERIOD for counts in made[:-1])
    assert sum(counts[0] for counts in made) < 0.6 * sum(counts[1] for counts in made)
    assert [e["step"] for e in events(tmp_path, "evaluate")][-1] == steps


def test_a_trace_shows_what_every_rank_did(tmp_path: Path) -> None:
    """Every local step, probe, message and wait of a run of 3 ranks, 10 steps and 3 rounds."""
    config = digits("--eval.unit=steps", "--eval.every=100")
    tmp_path.mkdir(exist_ok=True)
    simulate(
        3, lambda comm: fit(config, comm, new_folder=None if comm.rank else lambda: tmp_path, speaks=False, trace=True)
    )
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["args"]["name"] for e in found if e["name"] == "process_name"]
    assert names == ["rank 0", "rank 1", "rank 2"]
    for rank in range(3):
        spans = [e for e in found if e["ph"] == "X" and e["pid"] == rank]
        count = {name: sum(e["name"] == name for e in spans) for name in {e["name"] for e in spans}}
        assert count["compute local step"] == 10
        assert count["load batch"] == 10 + 3
        assert count["compute score"] == count["pack center"] == count["wire center"] == count["wait center"] == 3
        assert count["wait control"] == 3
        assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in spans)
        assert {e["tid"] for e in spans if e["cat"] != "wire"} == {0}
        steps = sorted((e["ts"], e["dur"]) for e in spans if e["cat"] == "compute")
        assert all(a + d <= b + 0.2 for (a, d), (b, _) in itertools.pairwise(steps))  # one after the other


def test_messages_under_way_at_once_have_rows_of_their_own(tmp_path: Path) -> None:
    config = digits("--method.bucket_mb=0.01", method="DataParallel")
    simulate(
        2, lambda comm: fit(config, comm, new_folder=None if comm.rank else lambda: tmp_path, speaks=False, trace=True)
    )
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    wire = sorted(
        (e["tid"], e["ts"], e["dur"]) for e in found if e["ph"] == "X" and e["cat"] == "wire" and e["pid"] == 0
    )
    assert len({row for row, _, _ in wire}) > 1
    for (row, start, length), (next_row, next_start, _) in itertools.pairwise(wire):
        assert row != next_row or start + length <= next_start + 0.2


def test_a_trace_tells_packing_and_unpacking_gradients_from_waiting_for_them(tmp_path: Path) -> None:
    """What is waited for within them is counted once; each bucket leaves by itself, then all send a second message."""
    trace = Trace()
    spans: list[tuple[Kind, int, int]] = [("pack", 0, 4), ("wait", 1, 3), ("unpack", 4, 9), ("wait", 8, 9)]
    for kind, begin, end in [*spans, ("wait", 10, 13)]:
        trace.add(kind, "gradient", begin, end)
    assert [trace.seconds(kind) for kind in ("pack", "wait", "unpack", "load")] == [2, 6, 4, 0]
    config = digits(method="PowerSGD")
    simulate(
        2, lambda comm: fit(config, comm, new_folder=None if comm.rank else lambda: tmp_path, speaks=False, trace=True)
    )
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in found if e["ph"] == "X" and e["pid"] == 0]
    counts = [names.count(name) for name in ("compute local step", "pack gradient", "unpack gradient")]
    assert counts == [10, 10 * (LAYERS + 1), 10]


def test_events_for_tensorboard_hold_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(digits("--log.every=5"), tmp_path)
    read = EventAccumulator(str(tmp_path)).Reload()
    tags = set(read.Tags()["scalars"])
    assert tags >= {
        *("train/loss", "train/lr", "evaluate/test_accuracy", "evaluate/test_loss"),
        *("round/effective_workers", "round/slowest", "round/leader", "round/period"),
    }
    written = [(e["step"], pytest.approx(e["loss"])) for e in events(tmp_path, "train")]
    assert [(s.step, s.value) for s in read.Scalars("train/loss")] == written
    effective = [event["effective_workers"] for event in events(tmp_path, "round")]
    assert all(1 < workers <= 3 for workers in effective)
    run(digits("--log.tensorboard=false"), tmp_path / "without")
    assert not list((tmp_path / "without").glob("events*"))


def test_without_tensorboard_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("hpc_grawa.runs.log.find_spec", lambda name: None)
    Log(tmp_path, speaks=True, tensorboard=True).close()
    assert "TensorBoard, which is not installed: pip install 'hpc-grawa[log]'" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "model"),
    [("LGRAWA", ["--model=ResNet18", "--model.width=8", "--model.stages=1"]), ("DataParallel", ["--model=SmallCNN"])],
)
def test_compiled_steps_are_those_that_are_not(method: str, model: list[str], tmp_path: Path) -> None:
    """To round-off; before the first step nothing of the compiling remains: random streams, buffers, gradients."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (
        run(digits("--optimizer.lr=0.01", f"--compile={word}", *model, method=method), tmp_path / word)[0]
        for word in ("false", "true")
    )
    assert compiled["center_test_loss"] == pytest.approx(plain["center_test_loss"], rel=1e-3)
    for a, b in zip(center(tmp_path / "false").values(), center(tmp_path / "true").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert compiled["bytes_sent"] == plain["bytes_sent"]
    assert counters["stats"]["unique_graphs"] >= 1


@pytest.mark.slow
def test_where_nothing_can_be_compiled_is_said(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "hpc_grawa", "train", "--config=digits", "--compile=true", f"--run.dir={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "compile is true: must be false: SmallCNN cannot be compiled here (" in done.stderr.splitlines()[-1]
