"""Local optimizers by import path, and groups of parameters: what they make is what torch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own import Plain, plain_process
from torch import Tensor, nn, optim

from hpc_grawa import ParameterVector, cli, simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError
from hpc_grawa.optim import SGD, AdamW, LocalOptimizer, build
from hpc_grawa.schedules import RunFacts
from hpc_grawa.training.worker import Worker

STEPS = 6
SHORT = (
    "--config=digits",
    "--schedule=Cosine",
    "--schedule.warmup=2",
    "--budget.seconds=null",
    f"--budget.steps={STEPS}",
)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_process(monkeypatch)


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 12, bias), nn.Linear(12, 10, bias)
        self.norm = nn.LayerNorm(12) if bias else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(torch.tanh(self.first(x.flatten(1)))))
        return y


class Own(optim.Optimizer):
    """x ← x - lr (g + weight_decay x), of arguments without types."""

    def __init__(self, parameters, lr, weight_decay=0.1, **more):  # type: ignore[no-untyped-def]
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, **more})

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad + group["weight_decay"] * p))
        return loss


class Rateless(optim.SGD):
    def __init__(self, parameters: Any, momentum: float = 0.9) -> None:
        super().__init__(parameters, 0.1, momentum)


class Needing(optim.SGD):
    """Needs an argument without a type, and does not take every value; its own groups are others than a run's."""

    def __init__(self, parameters, k, lr=0.1, weight_decay=0, groups=(), typed: int = 1):  # type: ignore[no-untyped-def]
        if k < 2:
            raise AssertionError("k is small")
        super().__init__(parameters, lr, weight_decay=weight_decay)


class Typed(optim.SGD):
    def __init__(self, parameters: Any, lr: float, k: int) -> None:
        super().__init__(parameters, lr)


class Stepless(optim.Optimizer):
    pass


def assert_trains_as(make: Callable[[nn.Module], optim.Optimizer], *words: str) -> None:
    """A run on one rank makes, bit for bit, what an optimizer makes in a loop of its own under the same schedule."""
    config = parse([*SHORT, f"--model={__name__}.Net", "--method=LocalSGD", "--method.period=100", *words])
    config.check(1)
    worker = Worker(config, SingleCommunicator())
    twin = config.build_model()
    twin.load_state_dict(worker.model.state_dict())
    theirs = make(twin)
    peaks = [group["lr"] for group in theirs.param_groups]
    assert worker.facts.lr == worker.facts.peak_lr == worker.optimizer.param_groups[0]["lr"]
    batch: Any = None

    def closure() -> Tensor:
        theirs.zero_grad()
        loss: Tensor = config.loss(twin(batch[0]), batch[1])
        loss.backward()
        return loss

    start = worker.vector.data.clone()
    for step in range(STEPS):
        batch = worker.splits.train.batch(worker.sampler.indices(step), worker.sampler.generator(step))
        factor = config.schedule(worker.facts)
        for group, peak in zip(theirs.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        worker.step()
        theirs.step(closure)  # type: ignore[arg-type]
    assert not torch.equal(worker.vector.data, start)
    for ours, p in zip(worker.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, p)


OF_TORCH: dict[str, dict[str, Any]] = {
    "RAdam": {"lr": 0.01},
    "NAdam": {"betas": (0.8, 0.99)},
    "Adam": {"amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"foreach": False},
    "Adamax": {},
    "Adagrad": {"lr_decay": 0.1},
    "Adadelta": {"rho": 0.5},
    "Adafactor": {},
    "ASGD": {"lr": 0.1},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Rprop": {"etas": (0.4, 1.3)},
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1},
    "LBFGS": {"lr": 0.5, "max_iter": 3, "line_search_fn": "strong_wolfe"},
}


@pytest.mark.parametrize("name", [name for name in OF_TORCH if hasattr(optim, name)])
def test_an_optimizer_of_torch_by_import_path_is_torchs(name: str) -> None:
    words = [f"--optimizer.{key}={list(v) if isinstance(v, tuple) else v}" for key, v in OF_TORCH[name].items()]
    found = getattr(optim, name)
    assert_trains_as(lambda twin: found(twin.parameters(), **OF_TORCH[name]), f"--optimizer=torch.optim.{name}", *words)


def test_an_own_optimizer_by_import_path() -> None:
    words = f"--optimizer={__name__}.Own", "--optimizer.lr=0.3"
    assert_trains_as(lambda twin: Own(twin.parameters(), 0.3), *words)


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="torch 2.9 brought it")
def test_muon_trains_matrices_and_nothing_else() -> None:
    words = "--optimizer=torch.optim.Muon", "--optimizer.lr=0.1"
    assert_trains_as(lambda twin: optim.Muon(twin.parameters(), lr=0.1), *words, "--model.bias=false")
    with pytest.raises(ConfigError, match=r"optimizer is Muon: .* 2D parameters"):
        Worker(parse([*SHORT, f"--model={__name__}.Net", *words]), SingleCommunicator())


def test_lbfgs_needs_a_method_that_averages_and_contiguous_parameters() -> None:
    words = [*SHORT, f"--model={__name__}.Net", "--optimizer=torch.optim.LBFGS", "--method=DataParallel"]

    def body(comm: Communicator) -> None:
        Worker(parse(words), comm).step()

    with pytest.raises(ConfigError, match=r"optimizer is LBFGS: .* several times in a step"):
        simulate(2, body)
    with pytest.raises(ConfigError, match=r"optimizer is LBFGS: must train contiguous parameters"):
        Worker(parse([*SHORT, "--optimizer=torch.optim.LBFGS"]), SingleCommunicator())


GROUPS = '[{match: "*.bias | ndim<2", weight_decay: 0}, {match: "last.*", lr_factor: 0.5}]'


def grouped(twin: nn.Module, lr: float) -> list[dict[str, Any]]:
    assert isinstance(twin, Net)
    flat = [p for p in twin.parameters() if p.dim() < 2]
    return [
        {"params": [twin.first.weight]},
        {"params": flat, "weight_decay": 0},
        {"params": [twin.last.weight], "lr": lr * 0.5},
    ]


@pytest.mark.parametrize(
    ("optimizer", "make", "lr"),
    [
        ("SGD", lambda p: optim.SGD(p, 0.1, 0.9, weight_decay=0.3, nesterov=True), 0.1),
        ("AdamW", lambda p: optim.AdamW(p, 0.01, weight_decay=0.3), 0.01),
        ("torch.optim.RAdam", lambda p: optim.RAdam(p, 0.02, weight_decay=0.3), 0.02),
        (f"{__name__}.Own", lambda p: Own(p, 0.2, 0.3), 0.2),
    ],
)
def test_groups_are_torchs_param_groups(optimizer: str, make: Any, lr: float) -> None:
    words = f"--optimizer={optimizer}", f"--optimizer.lr={lr}", "--optimizer.weight_decay=0.3"
    assert_trains_as(lambda twin: make(grouped(twin, lr)), *words, f"--optimizer.groups={GROUPS}")


def made(settings: LocalOptimizer) -> optim.Optimizer:
    torch.manual_seed(0)
    return build(settings, ParameterVector(Net()), RunFacts())


def test_each_parameter_is_in_one_group_the_first_that_it_matches() -> None:
    vector = ParameterVector(Net())
    groups = [{"match": "last.*"}, {"match": "*.bias"}, {"match": "ndim>=2", "momentum": 0.0}]
    optimizer = build(SGD(groups=groups), vector, RunFacts())
    names = {id(p): name for name, p in zip(vector.names, vector.parameters, strict=True)}
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == [
        ["norm.weight"],
        ["last.weight", "last.bias"],
        ["first.bias", "norm.bias"],
        ["first.weight"],
    ]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9, 0.9, 0.0]
    everything = build(SGD(groups=[{"match": "*", "lr_factor": 0.5}]), vector, RunFacts())
    assert [(len(group["params"]), group["lr"]) for group in everything.param_groups] == [(6, 0.05)]


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ([{"match": "*.bias|*.bais"}], r"optimizer.groups.match is \*.bias\|\*.bais: '\*.bais' must match a parameter"),
        ([{"match": "ndim>2"}], r"'ndim>2' must match a parameter of the model, which has first.weight, first.bias"),
        ([{"match": "*"}, {"match": "last.*"}], r"match is last.\*: must match a parameter that is in no group before"),
        (
            [{"match": "*", "weight_dcay": 0}],
            "optimizer.groups.weight_dcay is no setting: must be one of match, lr_fac",
        ),
        ([{"match": "*", "lr": 1}], r"optimizer.groups.lr is no setting: .*lr_factor"),
        ([{"match": "*", "params": []}], "optimizer.groups.params is no setting"),
        ([{"match": "*", "weight_decay": "no"}], "optimizer.groups.weight_decay is no: must be a number of 0 or more"),
        ([{"match": "*", "momentum": "no"}], "optimizer.groups.momentum is no: must be a number"),
        ([{"match": "*", "momentum": -1}], r"optimizer.groups.momentum is -1: Invalid momentum value: -1"),
        ([{"match": "*", "nesterov": "no"}], "optimizer.groups.nesterov is no: must be true or false"),
        ([{"match": "*", "lr_factor": -1}], "optimizer.groups.lr_factor is -1: must be a number of 0 or more"),
        ([{"lr_factor": 1}], "optimizer.groups is .*: must have match"),
    ],
)
def test_groups_that_cannot_be(groups: list[dict[str, Any]], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        made(SGD(groups=groups))


def test_an_own_setting_that_leaves_groups_out_is_told() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.groups is .*: must be null, as Plain.build does not give"):
        made(Plain(groups=[{"match": "first.*"}, {"match": "*"}]))
    made(AdamW(groups=[{"match": "first.*", "betas": [0.5, 0.9]}]))
    for betas in ([0.5, 1], 0.5, [0.5]):
        with pytest.raises(ConfigError, match=r"optimizer\.groups\.betas is \S"):
            made(AdamW(groups=[{"match": "first.*", "betas": betas}]))


def test_a_local_optimizer_sees_names_parameters_and_progress() -> None:
    seen: list[Any] = []

    class Seeing(SGD):
        def build(self, vector: ParameterVector, facts: RunFacts) -> optim.Optimizer:
            seen.extend((vector, facts))
            return super().build(vector, facts)

    config = parse([*SHORT, f"--model={__name__}.Net"])
    config.optimizer = Seeing()
    worker = Worker(config, SingleCommunicator())
    worker.step()
    assert seen == [worker.vector, worker.facts] and seen[1] is worker.run.facts
    assert (seen[1].total_steps, seen[1].step, seen[1].progress) == (STEPS, 1, pytest.approx(1 / STEPS))


@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer.help", "torch.optim.RAdam"],
        ["--optimizer=torch.optim.RAdam", "-h"],
        ["--optimizer.class_path", "torch.optim.RAdam", "-h"],
        ["--config", "digits", "--config", "radam.yaml", "-h"],
        ["--config=radam.yaml", "--optimizer.help"],
    ],
)
def test_help_lists_the_settings_of_an_optimizer_by_import_path(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("radam.yaml").write_text("optimizer: {class_path: torch.optim.RAdam}")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", *words])
    printed = capsys.readouterr().out
    for key in ("lr", "betas", "weight_decay", "groups"):
        assert f"  --optimizer.{key} " in printed
    assert "torch.Tensor" not in printed and "init_args" not in printed
    assert ("--budget.steps" in printed) == ("-h" in words)


def test_naming_another_class_by_import_path_forgets_the_settings_of_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    settings = "{lr: 0.5, eps: 1e-3, groups: [{match: 'last.*', lr_factor: 2}]}"
    file.write_text(f"optimizer: {{class_path: torch.optim.RAdam, init_args: {settings}}}")
    kept = parse([*SHORT, f"--config={file}", "--optimizer=torch.optim.RAdam", "--optimizer.lr=0.25"]).optimizer
    assert repr(kept).startswith("RAdam(lr=0.25, betas=(0.9, 0.999), eps=0.001,") and kept.groups is not None
    for other in ("torch.optim.NAdam", "torch.optim.SGD", "SGD", "AdamW"):
        found = parse([*SHORT, f"--config={file}", f"--optimizer={other}"]).optimizer
        assert (found.label, found.groups) == (other.rpartition(".")[2], None) and found.lr < 0.5
    torchs, ours = (parse([*SHORT, f"--optimizer={path}"]).optimizer for path in ("torch.optim.SGD", "SGD"))
    assert type(ours) is SGD and type(torchs) is not SGD


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (f"{__name__}.Needing", "optimizer.k is missing: Needing needs it"),
        (f"{__name__}.Needing --optimizer.k=1", "optimizer is Needing: AssertionError: k is small"),
        (
            f"{__name__}.Needing --optimizer.k=2 --optimizer.lr=true",
            "optimizer.lr is True: must be a number of 0 or more",
        ),
        (
            f"{__name__}.Needing --optimizer.k=2 --optimizer.weight_decay=much",
            "optimizer.weight_decay is much: must be a number of 0 or more",
        ),
        (f"{__name__}.Needing --optimizer.k=2 --optimizer.groups=3", "optimizer.groups is 3: must be a list or null"),
        (f"{__name__}.Typed --optimizer.lr=1", "optimizer.k is missing: Typed needs it"),
        (
            f"{__name__}.Stepless",
            f"optimizer is {__name__}.Stepless: must be a class derived from LocalOptimizer or torch.optim.Optimizer, "
            f"and not abstract",
        ),
        (
            "torch.optim.Optimizer",
            "optimizer is torch.optim.Optimizer: must be a class derived from LocalOptimizer or torch.optim.Optimizer, "
            "and not abstract",
        ),
        (
            "torch.optim.Adam --optimizer.fused=true --optimizer.foreach=true",
            "optimizer is Adam: RuntimeError: `fused` and `foreach` cannot be `True` together.",
        ),
        (
            "''",
            "optimizer: must be ASAM, AdamW, EntropySGD, LAMB, LARS, LPFSGD, Lion, Muon, SAM, SGD or the import path "
            "of a class (package.module.Class)",
        ),
    ],
)
def test_arguments_that_an_optimizer_does_not_take(words: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *SHORT, "--dry_run", "--optimizer", *(word.strip("'") for word in words.split())])
    assert capsys.readouterr().err == f"hpc-grawa train: error: {error}\n"


def test_groups_of_an_optimizer_by_import_path_are_those_of_a_run() -> None:
    groups = [{"match": "last.*", "lr_factor": 0.5}]
    words = f"--optimizer={__name__}.Needing", "--optimizer.k=2", "--optimizer.groups", str(groups)
    assert parse([*SHORT, *words]).optimizer.groups == groups


@pytest.mark.parametrize("name", ["SGD", "torch.optim.RAdam"])
def test_a_run_says_its_groups_if_it_has_any(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--config=digits", f"--optimizer={name}", "--optimizer.lr=0.01", "--budget.steps=1"]
    words += [f"--run.dir={tmp_path}"]
    said = []
    for more in ([], ["--optimizer.groups=[{match: '*.bias', weight_decay: 0}]"]):
        cli.main(["train", *words, *more, f"--run.name={len(said)}"])
        said.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("optimizer ")))
    assert "groups" not in said[0] and said[1].count("groups") == 1
    assert "groups [{'match': '*.bias', 'weight_decay': 0}]; " in said[1]
