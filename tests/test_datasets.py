"""Data sets of torch by import path: the same batches whoever makes them, exact resume, and refusals by name."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import torch
from launcher import HOROVOD, launch, launched, ours, start
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from hpc_grawa import cli, random_streams, simulate
from hpc_grawa.cli.compare import Comparison
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.data import Datasets, Splits, in_advance
from hpc_grawa.data.datasets import DatasetExamples
from hpc_grawa.errors import ConfigError, RanksDisagree
from hpc_grawa.runs.record import read_run
from hpc_grawa.training.loop import fit
from hpc_grawa.training.preflight import data_told


class Noisy(Dataset[Any]):
    """y = 2x + 1; x is augmented by every stream of random numbers."""

    def __init__(self, count: int = 64, shift: float = 0.0) -> None:
        self.x = torch.rand(count, 1) + shift  # from the streams in which it is made

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(1) + random.random() + float(np.random.rand())
        return self.x[i] + noise / 10, 2 * self.x[i] + 1


class Slow(Noisy):
    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        Path(f"worker.{os.getpid()}").touch()
        time.sleep(0.02)
        return super().__getitem__(i)


class Deadly(Noisy):
    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == 37:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(9))


class Endless(Dataset[Any]):
    """Has no length."""

    def __getitem__(self, i: int) -> int:
        return i


class Absent(Noisy):
    def __init__(self) -> None:
        raise FileNotFoundError("there is no /data")


def examples() -> list[tuple[Tensor, Tensor]]:
    return [(torch.tensor([i / 21]), torch.tensor([2 * i / 21 + 1])) for i in range(21)]


def nothing() -> list[Any]:
    return []


def dicts(some: list[Any]) -> Any:
    x, y = default_collate(some)
    return {"x": x * random.uniform(0.9, 1.1)}, y


class DictLine(own.Line):
    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch["x"])


def words(*more: str) -> list[str]:
    line = ["--model=test_datasets.DictLine", "--loss=MSELoss", "--metric=own.R2", "--optimizer.lr=0.05"]
    data = ["--data=Datasets", "--data.train=test_datasets.Noisy", "--data.test=test_datasets.examples"]
    run = ["--data.batch_size=8", "--budget.steps=6", "--method=LGRAWA", "--method.period=2", "--log.tensorboard=false"]
    return [*line, *data, "--data.collate=test_datasets.dicts", *run, *more]


def batches(data: Datasets, rank: int = 0) -> list[Any]:
    """Some for training, from two epochs, and some for evaluation."""
    splits, sampler = data.load(), data.sampler(rank, 2, 36)
    wanted = [(sampler.indices(step), sampler.generator(step)) for step in (0, 1, 5)]
    assert splits.validation is not None
    return [
        *in_advance(splits.train, wanted),
        *in_advance(splits.train, [(torch.arange(8), None)]),
        *in_advance(splits.validation, [(torch.arange(9), None)]),
        *in_advance(splits.test, [(torch.arange(21), None)]),
    ]


def datasets(train: Callable[[], Any] = Noisy, **settings: Any) -> Datasets:
    return Datasets(train=train, test=examples, collate=dicts, batch_size=8, validation=9, **settings)


def assert_same(some: list[Any], others: list[Any]) -> None:
    for (inputs, targets), (other_inputs, other_targets) in zip(some, others, strict=True):
        assert torch.equal(inputs["x"], other_inputs["x"]) and torch.equal(targets, other_targets)


def test_batches_are_a_function_of_seed_rank_and_step_alone_and_global_streams_stay() -> None:
    first = batches(datasets())
    torch.manual_seed(5)
    random.seed(6)
    before = random_streams.packed(random_streams.streams())
    assert_same(first, batches(datasets()))
    after = random_streams.packed(random_streams.streams())
    assert torch.equal(before[0], after[0]) and before[2] == after[2] and torch.equal(before[1][1], after[1][1])
    assert not torch.equal(first[0][0]["x"], batches(datasets(), rank=1)[0][0]["x"])


def test_an_evaluated_example_is_the_same_in_any_batch() -> None:
    train = Datasets(train=Noisy, test=examples, batch_size=8).load().train
    whole, (few, _) = train.batch(torch.arange(64))[0], train.batch(torch.tensor([9, 60]))
    assert torch.equal(whole[[9, 60]], few)


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_processes_make_the_batches_that_the_rank_would_make(start_method: str) -> None:
    assert_same(batches(datasets()), batches(datasets(workers=2, start_method=start_method)))


def ragged(some: list[Any]) -> Any:
    return [x for x, _ in some], torch.stack([y for _, y in some])


def test_processes_may_make_batches_of_more_tensors_than_files_may_be_open() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    try:
        train = Datasets(train=Noisy, test=examples, collate=ragged, workers=1, batch_size=8).load().train
        wanted = torch.arange(6 * 40).view(6, 40) % 64
        for index, (inputs, _) in zip(wanted, list(in_advance(train, [(w, None) for w in wanted])), strict=True):
            own_ones, _ = Datasets(train=Noisy, test=examples, collate=ragged, batch_size=8).load().train.batch(index)
            assert all(map(torch.equal, inputs, own_ones))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("method", ["LGRAWA", "DataParallel"])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.plain_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    settings = words(f"--method={method}", "--save.every=3", "--save.unit=steps", "--run.resume=auto")
    settings = [word for word in settings if method == "LGRAWA" or "period" not in word]
    cli.main(["train", *settings, "--run.name=straight"])
    cli.main(["train", *settings, "--run.name=resumed", "--budget.steps=4"])
    Path("runs/resumed/summary.json").unlink()
    cli.main(["train", *settings, "--run.name=resumed", "--allow-change=budget.steps"])
    centers = [torch.load(f"runs/{name}/center.pt", weights_only=True) for name in ("straight", "resumed")]
    assert centers[0].keys() == centers[1].keys()
    assert all(torch.equal(tensor, centers[1][name]) for name, tensor in centers[0].items())


def test_settings_of_a_class_of_data_sets_are_keys_and_the_file_repeats_them() -> None:
    config = parse(words("--data.train.count=40", "--data.train.shift=3"))
    again = parse(words())
    assert (config.data.train_size(), again.data.train_size()) == (40, 64)
    assert min(config.data.load().train.batch(torch.arange(40))[0]["x"]) > 3 * 0.9
    assert re.search(r"class_path: test_datasets.Noisy\n +init_args:\n +count: 40\n +shift: 3.0\n", config.text)


def test_it_trains_on_ranks_with_validation() -> None:
    config = parse(words("--data.validation=10", "--optimizer.accumulate=2"))
    config.check(2)
    summary = simulate(2, lambda comm: fit(config, comm, speaks=False))[0]
    assert summary["steps"] == 6 and summary["best_part"] == "validation"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["--data.train=test_datasets.Stream"],
            r"data.train makes Stream: must be map-style .* an IterableDataset .*",
        ),
        (["--data.train=test_datasets.Endless"], r"data.train: must make a data set that has a length; TypeError: .*"),
        (["--data.train=test_datasets.nothing"], r"data.train makes list: must have at least one example"),
        (["--data.test=test_datasets.nothing"], r"data.test makes list: must have at least one example"),
        (["--data.train=test_datasets.Absent"], r"data.train: .*; FileNotFoundError: there is no /data"),
        (["--data.workers=-1"], r"data.workers is -1: must be 0 or more processes per rank"),
        (["--data.batch_size=65"], r"data.batch_size is 65: must be at most 64, .*"),
    ],
)
def test_what_cannot_serve_is_refused_by_name(settings: list[str], message: str) -> None:
    config = parse(words(*settings))
    with pytest.raises(ConfigError) as error:
        config.check(1)
        config.data.load()
    assert re.fullmatch(message, str(error.value)), error.value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.start_method=fork"], "data.start_method is fork: must be one of forkserver, spawn"),
        (["--data.train=test_datasets.Unknown"], "data.train is .*: module 'test_datasets' has no attribute 'Unknown'"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(words(*settings))
    assert re.fullmatch(f"hpc-grawa train: error: {message}\n", capsys.readouterr().err)


def test_what_cannot_be_pickled_cannot_go_to_processes() -> None:
    data = Datasets(train=lambda: [lambda: None], test=examples, workers=2)
    with pytest.raises(ConfigError, match=r"data.workers is 2: must be 0, or data sets and collate .* unpickle"):
        data.load()


def test_a_process_that_is_killed_is_named() -> None:
    train = Datasets(train=Deadly, test=examples, workers=1).load().train
    with pytest.raises(RuntimeError, match=r"of data\.workers was killed"):
        train.batch(torch.arange(30, 40))
    with pytest.raises(RuntimeError, match=r"of data\.workers was killed"):  # also before the next batch begins
        train.batch(torch.arange(3))


def test_ranks_whose_data_differ_are_told() -> None:
    """As where a folder is listed, or its classes are counted, in an order of each host's own."""
    config = parse(words())

    def told(comm: Communicator, more: int, first: int) -> str:
        found = [(torch.zeros(1), (number + first) % 3) for number in range(40 + more)]
        examples = DatasetExamples(found, default_collate, torch.arange(len(found)))
        return data_told(config, Splits(examples, None, examples), comm)

    assert len(set(simulate(2, lambda comm: told(comm, 0, 0)))) == 1
    assert "targets" in told(SingleCommunicator(), 0, 0)
    for body in (lambda comm: told(comm, comm.rank, 0), lambda comm: told(comm, 0, comm.rank)):
        with pytest.raises(RanksDisagree, match=r"rank 1 has 4[01] training examples.* rank 0 has 40 .* in the same"):
            simulate(2, body)


def test_of_targets_that_are_drawn_anew_at_each_reading_only_the_sizes_are_compared() -> None:
    """And examples of different sizes are read one by one."""
    config = parse(words("--data.batch_size=1"))

    class Drawing(list[Any]):
        def __getitem__(self, number: Any) -> Any:
            return torch.zeros(1), torch.from_numpy(np.random.default_rng().integers(0, 1000, 1 + number))

    def told(comm: Communicator) -> str:
        examples = DatasetExamples(Drawing(range(40)), default_collate, torch.arange(40))
        return data_told(config, Splits(examples, None, examples), comm)

    assert simulate(2, told) == ["40 training examples, 40 for testing"] * 2


def test_a_run_that_goes_on_with_other_data_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own.plain_process(monkeypatch)
    train = ["train", *words("--save.unit=steps", "--save.every=4"), f"--run.dir={tmp_path}", "--run.name=a"]
    train += ["--run.resume=auto"]
    cli.main(train)
    config = read_run(tmp_path / "a").config
    (tmp_path / "a/summary.json").unlink()
    monkeypatch.setattr(sys.modules[__name__], "examples", lambda: Noisy(20))
    cli.main(train)
    assert re.search(
        r"changed    data\.content from 64 training examples, 21 for testing, targets (\w+) to 64 .* 20 .* \1\n",
        capsys.readouterr().out,
    )
    assert read_run(tmp_path / "a").config == config  # else a comparison would refuse it


class Unreadable(Exception):
    """Cannot be unpickled."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


class Broken(Noisy):
    def __getitem__(self, number: int) -> Any:
        raise Unreadable("7.png", "not an image")


def unloadable() -> Any:
    raise OSError(24, "Too many open files")


class Unloadable:
    def __reduce__(self) -> Any:
        return unloadable, ()


class Heavy(Noisy):
    def __getitem__(self, number: int) -> Any:
        return Unloadable(), 0


def test_a_batch_that_cannot_be_taken_over_is_told() -> None:
    train = Datasets(train=Heavy, test=examples, collate=list, workers=1).load().train
    with pytest.raises(RuntimeError, match=r"of data\.workers is lost: OSError: \[Errno 24\] Too many open files"):
        train.batch(torch.arange(3))


def test_what_an_example_raises_is_told_whatever_it_is() -> None:
    train = Datasets(train=Broken, test=examples, workers=1).load().train
    with pytest.raises(RuntimeError, match=r"(?s)in __getitem__.*Unreadable: 7\.png: not an image"):
        train.batch(torch.arange(3))


def test_runs_of_a_comparison_share_their_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where these are the same."""
    own.plain_process(monkeypatch)
    of_all = [word for word in words() if not word.startswith("--method")]
    plan = Comparison.read("EASGD,LGRAWA", "1,2", None, "data.batch_size=4,8", of_all, "hpc-grawa compare").plan
    shared: dict[int, set[int]] = {}
    for _, config in plan:
        shared.setdefault(config.data.batch_size, set()).add(id(config.data))
    assert len(plan) == 8 and {size: len(found) for size, found in shared.items()} == {4: 1, 8: 1}


@launched
@pytest.mark.slow
@pytest.mark.parametrize(
    ("start_method", "backend"),
    [
        ("spawn", "mpi"),
        pytest.param("forkserver", "horovod", marks=pytest.mark.skipif(not HOROVOD, reason="Horovod is not built")),
    ],
)
def test_processes_beside_ranks_that_communicate(
    start_method: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of ranks that make their batches themselves, bit for bit."""
    monkeypatch.chdir(tmp_path)
    centers = []
    for workers in (0, 1):
        settings = words(f"--data.start_method={start_method}", f"--data.workers={workers}", f"--backend={backend}")
        status, _, errors = launch("train", *settings, f"--run.name={workers}", ranks=2)
        assert (status, ours(errors)) == (0, []), errors
        centers.append(torch.load(tmp_path / "runs" / str(workers) / "center.pt", weights_only=True))
    assert all(torch.equal(tensor, centers[0][name]) for name, tensor in centers[1].items())


@pytest.mark.slow
def test_processes_do_not_outlive_a_rank_that_is_killed(tmp_path: Path) -> None:
    """Nor do they end before it, at the signals by which it is told to save."""
    code = (
        "import itertools, signal, torch, test_datasets as t\n"
        "from hpc_grawa.data import Datasets, in_advance\n"
        "if __name__ == '__main__':\n"
        "    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT): signal.signal(number, lambda *_: None)\n"
        "    train = Datasets(train=t.Slow, test=t.examples, workers=2).load().train\n"
        "    for _ in in_advance(train, ((torch.arange(8), None) for _ in itertools.count())): pass\n"
    )
    (tmp_path / "rank.py").write_text(code)
    rank = start(program=("rank.py",), cwd=tmp_path, start_new_session=True, stdout=None, stderr=None)

    def workers() -> list[int]:
        return [int(path.suffix[1:]) for path in tmp_path.glob("worker.*")]

    def until(happens: Callable[[], bool]) -> None:
        limit = time.monotonic() + 120
        while not happens():
            assert time.monotonic() < limit
            time.sleep(0.1)

    try:
        until(lambda: len(workers()) == 2)
        pids = workers()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            os.killpg(rank.pid, number)  # as schedulers do, the forkserver included
            time.sleep(0.2)
        for path in tmp_path.glob("worker.*"):
            path.unlink()
        until(lambda: len(workers()) == 2)
        assert sorted(workers()) == sorted(pids)
    finally:
        rank.kill()
        rank.wait()
    until(lambda: not any(_lives(pid) for pid in pids))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
