"""The local optimizers of papers: against the oracle, their limits, their replicas, and what they train with."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from conftest import Ranks
from own import plain_process
from table import METHODS
from torch import Tensor, nn, optim
from worlds import NET, assert_follows, replay, run_method

import hpc_grawa.optim.timm_optimizers as timm_optimizers
from hpc_grawa import DataParallel, DistributedOptimizer, LocalSGD, ParameterVector, Parle, Run, cli, simulate
from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError
from hpc_grawa.methods.run import learning_rate
from hpc_grawa.optim import (
    ASAM,
    LAMB,
    LARS,
    LPFSGD,
    SAM,
    SGD,
    AdamW,
    EntropySGD,
    Lion,
    LocalOptimizer,
    Muon,
    build,
)
from hpc_grawa.runs.log import Log
from hpc_grawa.schedules import RunFacts
from hpc_grawa.training.examiner import Examiner
from hpc_grawa.training.progress import greet
from hpc_grawa.training.worker import Worker

STEPS = 10
WEIGHTS = [NET.layers["tensor"][0], NET.layers["tensor"][2]]
FILTERS = [*((3 * i, 3) for i in range(4)), (12, 4), *((16 + 4 * i, 4) for i in range(3)), (28, 3)]
MOMENTUM = SGD(momentum=0.9, nesterov=True, weight_decay=1e-2)


def momentum() -> ref.SGD:
    return ref.SGD(momentum=0.9, nesterov=True, weight_decay=1e-2)


def normals(rank: int) -> Callable[[], ref.Array]:
    """What a rank's stream gives for each tensor in turn."""
    generator = torch.Generator().manual_seed(rank)
    shapes = (4, 3), (4,), (3, 4), (3,)

    def normal() -> ref.Array:
        drawn = [torch.randn(shape, dtype=torch.float64, generator=generator).flatten() for shape in shapes]
        array: ref.Array = torch.cat(drawn).numpy()
        return array

    return normal


def smoothed(base: Callable[[], ref.Optimizer], **settings: Any) -> Callable[[], ref.Optimizer]:
    ranks = itertools.count()
    return lambda: ref.LPFSGD(base(), FILTERS, normals(next(ranks)), STEPS, **settings)


#: Ours, and what makes the oracle's.
PAIRS: dict[str, tuple[LocalOptimizer, Callable[[], Callable[[], ref.Optimizer]]]] = {
    "SAM": (SAM(base=MOMENTUM, rho=0.3), lambda: lambda: ref.SAM(momentum(), 0.3)),
    "ASAM": (ASAM(base=MOMENTUM, rho=0.7), lambda: lambda: ref.SAM(momentum(), 0.7, WEIGHTS)),
    "LPFSGD": (LPFSGD(base=MOMENTUM, parts=4, sigma=0.1), lambda: smoothed(momentum, parts=4, sigma=0.1)),
    "LARS": (LARS(trust=0.3, weight_decay=0.1), lambda: lambda: ref.LARS(WEIGHTS, trust=0.3, weight_decay=0.1)),
    "LAMB": (LAMB(weight_decay=0.3), lambda: lambda: ref.LAMB(WEIGHTS, weight_decay=0.3)),
    "Lion": (Lion(), lambda: ref.Lion),
    "AdamW": (AdamW(weight_decay=0.0), lambda: lambda: ref.LAMB((), eps=1e-8)),
}
ENTROPY = EntropySGD(period=3, scope=0.4, growth=0.2, thermal=0.0, weight_decay=1e-2)


def eight(rank: int, step: int) -> tuple[Any, ...]:
    return NET.random_batch(8, 1, rank, step)


@pytest.mark.parametrize("row", ["LocalSGD", "Parle", "DataParallel"])
@pytest.mark.parametrize("name", PAIRS)
def test_optimizers_follow_the_oracle(name: str, row: str, on_ranks: Ranks) -> None:
    settings, oracle = PAIRS[name]
    ours, theirs, _ = METHODS[row]
    traces = on_ranks(lambda comm: run_method(comm, ours, steps=STEPS, settings=settings, batch=eight))
    assert_follows(traces, replay(theirs, on_ranks.size, STEPS, optimizer=oracle(), batch=eight), 1e-12)


@pytest.mark.parametrize("policy", ["keep", "reset", "average"])
@pytest.mark.parametrize("name", ["LAMB", "AdamW"])
def test_moments_are_corrected_by_a_count_of_their_own_steps(name: str, policy: Any, on_several_ranks: Ranks) -> None:
    """Anew on a rank that is healed, or that of all where it takes over their mean; and at rounds that reset them."""
    settings, oracle = PAIRS[name]
    ours = LocalSGD(period=4, local_momentum=policy)
    broken: dict[str, Any] = {"poison": lambda *at: at == (1, 3), "batch": eight}
    traces = on_several_ranks(lambda comm: run_method(comm, ours, steps=STEPS, settings=settings, **broken))
    options: dict[str, Any] = {"optimizer": oracle(), "local_momentum": policy, **broken}
    assert_follows(traces, replay(ref.LocalSGD(), on_several_ranks.size, STEPS, **options), 1e-12)


def test_entropy_sgd_follows_the_oracle(on_ranks: Ranks) -> None:
    """y, which is trained; x is z of every third step."""
    traces = on_ranks(lambda comm: run_method(comm, DataParallel(), steps=STEPS, settings=ENTROPY))
    theirs: list[ref.EntropySGD] = []

    def oracle() -> ref.EntropySGD:
        theirs.append(ref.EntropySGD(weight_decay=1e-2, period=3, scope=0.4, growth=0.2))
        return theirs[-1]

    assert_follows(traces, replay(ref.DataParallel(), on_ranks.size, STEPS, optimizer=oracle), 1e-12)
    kept = [torch.from_numpy(t) for t in traces[0].momenta]  # of each parameter x, z and momentum
    for i, key in enumerate(("x", "z", "u")):
        flat = torch.cat([t.flatten() for t in kept[i::3]])
        torch.testing.assert_close(flat, torch.from_numpy(theirs[0].state[key]), rtol=1e-12, atol=1e-12)


#: Parle of one rank, and what it then is.
AS_ENTROPY = Parle(period=3, gamma=4.0, gamma_floor=4.0, scoping=1.0, rho=0.0, rho_floor=0.0)
AS_PARLE = EntropySGD(lr=0.1, weight_decay=1e-2, period=3, scope=1 / 4, growth=0.0, thermal=0.0)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_parle_of_one_rank_is_entropy_sgd_without_noise(clip_norm: float | None) -> None:
    """Also where heads take turns, one without a gradient in each round's step; and clipped is not the pull to x."""
    found = []
    for settings, method in ((SGD(lr=0.1, weight_decay=1e-2), AS_ENTROPY), (AS_PARLE, DataParallel())):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(4, 3).double() for name in ("trunk", "a", "b")})
        x = torch.randn(8, 4).double()
        vector, facts, step = ParameterVector(model), RunFacts(), 0
        optimizer = build(settings, vector, facts)
        run: Run = method.build(SingleCommunicator(), vector, optimizer, facts=facts)

        def loss(model: nn.ModuleDict = model, x: Tensor = x) -> Tensor:
            head = model["b" if step % 3 == 2 else "a"]  # noqa: B023 - rounds are in the steps of b
            return (model["trunk"](x) - head(x).tanh()).square().mean()

        closure: Any = run.closure(loss, clip_norm)
        for step in range(7):  # noqa: B007
            run.after_step(optimizer.step(closure))
        own = vector.data.clone()
        if settings is AS_PARLE:
            optimizer.eval()  # type: ignore[attr-defined]
        found.append(torch.stack((own, run.local)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("around", [SAM(rho=0.5, base=SGD(lr=0.1)), LPFSGD(parts=1, sigma=0.5, base=SGD(lr=0.1))])
def test_parle_pulls_from_where_the_model_is_not_from_where_its_gradient_is_taken(around: LocalOptimizer) -> None:
    """Of a linear loss, whose gradient is the same everywhere."""
    found = []
    for settings in (SGD(lr=0.1), around):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        vector, facts = ParameterVector(model), RunFacts()
        optimizer = build(settings, vector, facts)
        run = AS_ENTROPY.build(SingleCommunicator(), vector, optimizer, facts=facts)
        closure: Any = run.closure(lambda model=model: model(torch.arange(3.0).double()).sum(), clip_norm=1.0)
        for _ in range(5):
            run.after_step(optimizer.step(closure))
        found.append(torch.stack((vector.data, run.local)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def network() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Linear(6, 3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.ReLU(), head)


class Job:
    """One rank's training of ``network``."""

    def __init__(self, comm: Communicator, settings: LocalOptimizer, method: Any, **closure: Any) -> None:
        self.model, self.facts, self.steps = network(), RunFacts(), 0
        self.vector = ParameterVector(self.model)
        self.optimizer = build(settings, self.vector, self.facts)
        self.run: Run = method.build(comm, self.vector, self.optimizer, lambda: self.loss(), facts=self.facts)
        torch.manual_seed(comm.rank)
        self.closure: Any = self.run.closure(self.loss, **closure)

    def loss(self, part: tuple[int, int] = (0, 1)) -> Tensor:
        seed = 100 * self.run.comm.rank + self.steps
        x = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed))
        mine = x.chunk(part[1])[part[0]]
        return nn.functional.cross_entropy(self.model(mine), mine[:, :3].argmax(1))

    def step(self, count: int = 1) -> Tensor:
        for _ in range(count):
            loss = self.optimizer.step(self.closure)
            self.run.after_step(loss)  # type: ignore[arg-type]
            self.steps += 1
        return self.vector.data.clone()


def trained(settings: LocalOptimizer, comm: Communicator | None = None, method: Any = None) -> list[Tensor]:
    job = Job(comm or SingleCommunicator(), settings, method or DataParallel())
    return [job.step(STEPS), *job.model.buffers()]


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        (SAM(rho=0.0), SGD()),
        (ASAM(rho=0.0), SGD()),
        (SAM(base=AdamW(), rho=0.0), AdamW()),
        (LPFSGD(sigma=0.0, parts=1), SGD()),
        (Muon(groups=[{"match": "*", "adamw": True}]), AdamW(weight_decay=0.1, beta2=0.95)),
    ],
)
def test_in_their_limits_they_are_their_base_bit_for_bit(settings: LocalOptimizer, limit: LocalOptimizer) -> None:
    """With BatchNorm, whose statistics are those of one pass, and dropout."""
    for ours, theirs in zip(trained(settings), trained(limit), strict=True):
        assert torch.equal(ours, theirs)


def test_a_gradient_of_zero_makes_no_ascent() -> None:
    p = nn.Parameter(torch.ones(3, 2))
    vector = ParameterVector(nn.ParameterList([p]))
    for settings in (SAM(rho=1.0), ASAM(rho=1.0)):
        optimizer, at = settings.build(vector, RunFacts()), []

        def closure(share: bool = True, part: tuple[int, int] = (0, 1), track: bool = True) -> Tensor:
            at.append(p.detach().clone())  # noqa: B023
            p.grad = torch.zeros_like(p)
            return torch.zeros(())

        optimizer.step(closure)  # type: ignore[arg-type]
        assert len(at) == 2 and torch.equal(*at)


def test_entropy_sgd_draws_one_noise_for_all_ranks() -> None:
    """Of thermal·√(2η)·N(0, 1), another one at each step."""
    p = nn.Parameter(torch.zeros(400, 50))
    optimizer = EntropySGD(lr=0.02, thermal=3.0, scope=0.0).build(ParameterVector(nn.ParameterList([p])), RunFacts())
    seen = []
    for _ in range(2):
        p.grad, before = torch.zeros_like(p), p.detach().clone()
        optimizer.step()
        seen.append(p.detach() - before)
    for noise in seen:
        torch.testing.assert_close(noise.std(), torch.tensor(3 * math.sqrt(0.04)), rtol=0.02, atol=0)
    assert abs(torch.corrcoef(torch.stack([n.flatten() for n in seen]))[0, 1]) < 0.03


SETTINGS: dict[str, LocalOptimizer] = {
    "SAM": SAM(),
    "ASAM": ASAM(rho=0.2),
    "SAM, AdamW": SAM(base=AdamW()),
    "SAM, Muon": SAM(base=Muon()),
    "LPFSGD": LPFSGD(parts=4, sigma=0.01),
    "EntropySGD": EntropySGD(period=3),
    "Muon": Muon(),
    "Lion": Lion(),
    "LARS": LARS(),
    "LAMB": LAMB(),
}


#: Those that step by the momentum of SGD, which a method may take over.
MOMENTA = ("SAM", "ASAM", "LPFSGD")


@pytest.mark.parametrize("name", SETTINGS)
def test_replicas_that_share_gradients_stay_alike(name: str, on_several_ranks: Ranks) -> None:
    """Also where they draw noise of their own, and accumulate and clip gradients."""

    def body(comm: Communicator) -> Tensor:
        torch.manual_seed(comm.rank)
        return Job(comm, SETTINGS[name], DataParallel(), clip_norm=0.5, accumulate=2).step(STEPS)

    first, *others = on_several_ranks(body)
    for other in others:
        assert torch.equal(first, other)
    assert torch.isfinite(first).all()


@pytest.mark.parametrize("average", ["keep", "average"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_loaded_state_goes_on_bit_for_bit(name: str, average: str) -> None:
    """Under gradient sharing, and where ranks average with the optimizer's state."""
    method = DataParallel() if name == "EntropySGD" else LocalSGD(period=4, local_momentum=average)  # type: ignore[arg-type]

    def whole(comm: Communicator) -> Tensor:
        return Job(comm, SETTINGS[name], method).step(STEPS)

    def resumed(comm: Communicator) -> Tensor:
        job = Job(comm, SETTINGS[name], method)
        job.step(6)
        state = job.model.state_dict(), job.optimizer.state_dict(), job.run.state_dict(), torch.get_rng_state()
        new = Job(comm, SETTINGS[name], method)
        new.model.load_state_dict(state[0])
        new.optimizer.load_state_dict(state[1])
        new.run.load_state_dict(state[2])
        torch.set_rng_state(state[3])
        new.steps = job.steps
        return new.step(STEPS - 6)

    for ours, theirs in zip(simulate(2, resumed), simulate(2, whole), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("base", [SGD(), AdamW(), Muon(groups=[{"match": "4.*", "adamw": True}])])
def test_the_state_of_a_base_is_averaged(base: LocalOptimizer) -> None:
    """Of each parameter all that its own optimizer keeps."""

    def body(comm: Communicator) -> list[Tensor]:
        job = Job(comm, SAM(base=base), LocalSGD(period=4, local_momentum="average"))
        job.step(4)
        states = [job.optimizer.state[p] for p in job.vector.parameters]
        return [t for state in states for key, t in state.items() if key != "step"]

    for a, b in zip(*simulate(2, body), strict=True):
        assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("settings", [SAM(rho=5.0), ASAM(rho=5.0), LPFSGD(parts=2, sigma=1.0)])
def test_an_autocast_around_the_step_knows_where_the_parameters_are(settings: LocalOptimizer) -> None:
    """It keeps casts of them until its end, whatever moves them meanwhile."""
    losses = []
    for outside in (False, True):
        torch.manual_seed(0)
        model, x = nn.Linear(8, 1), torch.randn(16, 8)
        vector = ParameterVector(model)
        optimizer = build(settings, vector, RunFacts())
        run = DataParallel().build(SingleCommunicator(), vector, optimizer)
        seen: list[float] = []

        def loss(part: tuple[int, int] = (0, 1), model: nn.Module = model, x: Tensor = x) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                found = model(x).float().square().mean()
            seen.append(float(found.detach()))  # noqa: B023 - called in this turn
            return found

        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            run.after_step(optimizer.step(run.closure(loss)))  # type: ignore[arg-type]
        losses.append(seen)
    assert losses[0] == losses[1] and len(set(losses[0])) == 2


def test_the_rate_of_a_run_is_that_of_parameters_in_no_group_wherever_they_stand() -> None:
    vector = ParameterVector(twin_of_layers())
    for settings in (AdamW(), Muon(), LARS(), LAMB()):
        settings = replace(settings, lr=0.01, groups=[{"match": "*.weight", "lr_factor": 0.1}])
        assert learning_rate(build(settings, vector, RunFacts())) == 0.01


def test_decay_that_a_group_asks_for_is_not_taken_from_biases() -> None:
    for settings in (LARS(), LAMB()):
        own = replace(settings, groups=[{"match": "0.bias", "weight_decay": 0.5}])
        groups = build(own, ParameterVector(twin_of_layers()), RunFacts()).param_groups
        decays = [(tuple(p.shape), group["weight_decay"]) for group in groups for p in group["params"] if p.dim() == 1]
        assert sorted(decays) == [((3,), 0.0), ((4,), 0.5)]


def twin_of_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def test_muon_steps_matrices_as_torch_does_and_the_rest_by_adamw() -> None:
    settings = Muon(lr=0.02, groups=[{"match": "4.*", "adamw": True, "lr_factor": 0.1}])
    job = Job(SingleCommunicator(), settings, DataParallel())
    other = Job(SingleCommunicator(), SGD(), DataParallel())
    first, *rest = other.vector.parameters
    last, middle = rest[-2:], rest[:-2]
    matrices = optim.Muon([first], 0.02, 0.1, 0.95, adjust_lr_fn="match_rms_adamw")
    others = optim.AdamW([{"params": middle}, {"params": last, "lr": 0.002}], 0.02, (0.9, 0.95), weight_decay=0.1)
    torch.manual_seed(0)
    job.step(STEPS)
    torch.manual_seed(0)
    for _ in range(STEPS):
        other.closure()
        matrices.step()
        others.step()
        other.run.after_step(torch.zeros(()))
        other.steps += 1
    assert torch.equal(job.vector.data, other.vector.data)


@pytest.mark.parametrize("row", METHODS)
def test_any_optimizer_trains_by_any_method_or_says_why_not(row: str) -> None:
    ours, _, tags = METHODS[row]
    for name, settings in SETTINGS.items():

        def body(comm: Communicator, settings: LocalOptimizer = settings) -> ref.Array:
            trace = run_method(
                comm, ours, steps=5, lr=0.01, settings=settings, batch=eight, facts=RunFacts(steps_per_epoch=5)
            )
            return trace.parameters[-1]

        if name == "EntropySGD" and "averages" in tags:
            with pytest.raises(ConfigError, match=r"EntropySGD, .*; take the method Parle, which is EntropySGD"):
                simulate(2, body)
        elif "momentum" in tags and name not in MOMENTA:
            with pytest.raises(ConfigError, match="takes over the momentum of SGD, which this one has not; take "):
                simulate(2, body)
        else:
            for parameters in simulate(2, body):
                assert torch.isfinite(torch.from_numpy(parameters)).all()


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "LPFSGD"])
def test_a_step_leaves_the_gradient_by_which_methods_score(name: str) -> None:
    vector = ParameterVector(network())
    optimizer = SETTINGS[name].build(vector, RunFacts())
    made: list[Tensor] = []

    def closure(share: bool = True, track: bool = True) -> Tensor:
        made[:] = [torch.ones_like(p) for p in vector.parameters]
        for p, grad in zip(vector.parameters, made, strict=True):
            p.grad = grad.clone()
        return torch.tensor(1.0)

    optimizer.step(closure)  # type: ignore[arg-type]
    for p, grad in zip(vector.parameters, made, strict=True):
        assert p.grad is not None and torch.equal(p.grad, grad)


@pytest.mark.parametrize("base", [LPFSGD(), SAM(), EntropySGD()])
def test_a_base_steps_once_by_the_gradient_that_is_there(base: LocalOptimizer) -> None:
    vector = ParameterVector(network())
    with pytest.raises(ConfigError, match=f"optimizer.base is {base.label}: must step by the gradient that is there"):
        SAM(base=base).build(vector, RunFacts())


def test_what_is_wrong_of_a_base_is_named_after_it() -> None:
    with pytest.raises(
        ConfigError, match=r"optimizer\.base\.groups\.match is nothing: 'nothing' must match a parameter"
    ):
        SAM(base=SGD(groups=[{"match": "nothing"}])).build(ParameterVector(network()), RunFacts())


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_optimizers, "find_spec", lambda name: None)
    for kind in (Lion, LARS, LAMB):
        with pytest.raises(ConfigError, match=rf"{kind.__name__}: needs timm.*pip install 'hpc-grawa\[optim\]'"):
            kind()
    monkeypatch.delattr(optim, "Muon")
    with pytest.raises(ConfigError, match=r"optimizer is Muon: needs torch 2\.9 or later, and this is \d"):
        Muon()


# -- in the training program -------------------------------------------------------------------------------

SHORT = ["--config=digits", "--budget.seconds=null", "--budget.steps=6", "--method=DataParallel"]


MEANT = {
    "EntropySGD": ["--optimizer=EntropySGD", "--optimizer.period=2"],
    "schedule-free SGD": ["--optimizer=schedulefree.SGDScheduleFree", "--optimizer.lr=0.3"],
    "schedule-free AdamW": ["--optimizer=schedulefree.AdamWScheduleFree", "--optimizer.lr=0.01"],
}


@pytest.mark.parametrize("name", MEANT)
def test_evaluated_and_saved_are_the_weights_that_are_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And training goes on where it was, bit for bit; also with another number of ranks."""
    plain_process(monkeypatch)
    config = parse([*SHORT, *MEANT[name]])

    def body(comm: Communicator) -> tuple[dict[str, Any], Tensor, Tensor]:
        worker = Worker(config, comm)
        optimizer: Any = worker.optimizer
        for _ in range(5):
            worker.step()
        trained = worker.vector.data.clone()
        optimizer.eval()
        meant = worker.vector.data.clone()
        optimizer.train()
        worker.vector.data.copy_(trained)
        assert not torch.equal(meant, trained)
        examiner = Examiner(worker)
        with examiner.center():
            assert torch.equal(worker.vector.data, meant)
        assert torch.equal(worker.vector.data, trained)
        saved = examiner.everything()["center_state"]
        for key, p in zip(worker.vector.names, worker.vector.views(meant), strict=True):
            assert torch.equal(saved[key], p)
        assert torch.equal(worker.vector.data, trained)
        return worker.state_dict(), trained, meant

    ranks = simulate(2, body)
    state, trained, meant = ranks[0]
    assert all(torch.equal(trained, other) for _, other, _ in ranks)

    def other_world(comm: Communicator) -> None:
        worker = Worker(config, comm)
        worker.start_from(copy.deepcopy(state))
        assert torch.equal(worker.vector.data, trained)
        with worker.meant():
            torch.testing.assert_close(worker.vector.data, meant)
        worker.step()

    simulate(3, other_world)


@pytest.mark.parametrize(
    ("words", "base"),
    [
        (["--optimizer.base.lr=0.3"], SGD(lr=0.3)),
        (["--optimizer.base=AdamW"], AdamW()),
        (["--optimizer.base={class_path: AdamW, init_args: {eps: 1e-6}}"], AdamW(eps=1e-6)),
    ],
)
def test_a_base_and_its_settings_are_options(words: list[str], base: LocalOptimizer) -> None:
    config = parse([*SHORT, "--optimizer=SAM", *words])
    assert config.optimizer == SAM(base=base)


def test_a_base_may_be_an_optimizer_of_torchs(tmp_path: Path) -> None:
    words = ["--optimizer.base=torch.optim.RAdam", "--optimizer.base.lr=0.02", "--optimizer.base.betas=[.8, .99]"]
    config = parse([*SHORT, "--optimizer=SAM", *words])
    (tmp_path / "config.yaml").write_text(config.text)
    again = parse(["--config", str(tmp_path / "config.yaml"), "--optimizer.base.lr=0.03"])
    assert "class_path: torch.optim.RAdam" in config.text and config.text.replace("lr: 0.02", "lr: 0.03") == again.text
    for made, lr in ((config, 0.02), (again, 0.03)):
        optimizer: Any = build(made.optimizer, ParameterVector(network()), RunFacts())
        assert type(optimizer.base) is optim.RAdam
        assert optimizer.param_groups[0]["lr"] == lr and optimizer.param_groups[0]["betas"] == (0.8, 0.99)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("SAM --optimizer.lr=1", "optimizer.lr is no setting of SAM: did you mean optimizer.base.lr"),
        ("SAM --optimizer.base.lr=-1", "optimizer.base.lr is -1.0: must be a number of 0 or more"),
        ("SAM --optimizer.base=Adam", "optimizer.base is Adam: must be ASAM, AdamW, EntropySGD"),
        (
            "SAM --optimizer.base=torch.optim.RAdam --optimizer.base.betas=3",
            "optimizer.base.betas is 3: must be a list",
        ),
        ("SAM --optimizer.rho=-1", "optimizer.rho is -1.0: must be a number of 0 or more"),
        ("SGD --optimizer.base=SGD", "optimizer.base is no setting"),
        ("LPFSGD --optimizer.parts=3", "optimizer.parts is 3: must divide data.batch_size, which is 32"),
        ("LPFSGD --accumulate=8", "optimizer.parts is 8: must divide data.batch_size / accumulate, which is 4"),
        ("Muon --schedule.scaling=cubic", "schedule.scaling is cubic: must be one of none, linear, sqrt"),
    ],
)
def test_settings_that_cannot_be(words: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *SHORT, "--dry_run", *f"--optimizer={words}".split()])
    assert capsys.readouterr().err.startswith(f"hpc-grawa train: error: {error}")


@pytest.mark.parametrize(("scaling", "peak", "told"), [("linear", 0.4, "x 4 ranks"), ("sqrt", 0.2, "x sqrt(4 ranks)")])
def test_the_learning_rate_is_scaled_with_the_ranks_and_printed(
    scaling: str, peak: float, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run, and before one; with the warm-up, which it needs."""
    plain_process(monkeypatch)
    words = [*SHORT, "--optimizer=SAM", f"--schedule.scaling={scaling}", "--schedule.warmup=4"]

    def body(comm: Communicator) -> list[float]:
        worker = Worker(parse(words), comm)
        rates = []
        for _ in range(5):
            worker.step()
            rates.append(worker.facts.lr)
        assert worker.facts.peak_lr == pytest.approx(peak)
        if comm.rank == 0:
            greet(Log(None, True, False), worker, anew=True)
        return rates

    assert simulate(4, body)[0] == pytest.approx([peak * rise for rise in (0.25, 0.5, 0.75, 1, 1)])
    line = f"; peak lr {peak} = 0.1 {told}; "
    assert f"Constant(warmup=4){line}" in capsys.readouterr().out
    cli.main(["train", *words, "--dry_run", "--world_size=4"])
    assert f"{line}warm-up of 4 steps\n" in capsys.readouterr().out


def test_without_scaling_nothing_is_multiplied_or_said() -> None:
    schedule = parse(SHORT).schedule
    assert (schedule.scaling, schedule.scale(8), schedule.told(0.1, 8)) == ("none", 1.0, "")


@pytest.mark.parametrize("method", [DataParallel(), LocalSGD(period=2)], ids=["DataParallel", "LocalSGD"])
@pytest.mark.parametrize("settings", [SAM(), LPFSGD()], ids=["SAM", "LPFSGD"])
def test_in_a_horovod_script_they_say_what_to_write_instead(settings: LocalOptimizer, method: Any) -> None:
    model = network()
    optimizer = settings.build(ParameterVector(model), RunFacts())
    optimizer = DistributedOptimizer(optimizer, model, method, comm=SingleCommunicator())
    with pytest.raises(
        ConfigError, match=rf"{settings.label}, which asks its closure for .*{type(method).__name__}\(.*run.closure"
    ):
        optimizer.step(lambda: model(torch.ones(2, 4)).sum())


class OfAScript(optim.Optimizer):
    """SAM as scripts write it: two steps around a second backward pass."""

    def __init__(self, parameters: Any, base: optim.Optimizer, rho: float) -> None:
        super().__init__(parameters, {})
        self.base_optimizer, self.rho, self.kept = base, rho, []

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = self.param_groups[0]["params"]
        self.kept = [p.clone() for p in parameters]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p += self.rho * p.grad / norm
        self.base_optimizer.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, kept in zip(self.param_groups[0]["params"], self.kept, strict=True):
            p.copy_(kept)
        self.base_optimizer.step()


@pytest.mark.parametrize("method", [DataParallel(), LocalSGD(period=2)], ids=["DataParallel", "LocalSGD"])
def test_a_sam_of_a_horovod_script_goes_on_working_around_a_distributed_optimizer(method: Any) -> None:
    """It moves, by both of its steps, and all ranks end alike."""

    def scripts(comm: Communicator) -> Tensor:
        job = Job(comm, SGD(), LocalSGD())
        job.run.close()
        base = DistributedOptimizer(optim.SGD(job.model.parameters(), 0.1, 0.9), job.model, method, comm=comm)
        own = OfAScript(job.model.parameters(), base, 0.05)
        for _ in range(STEPS):
            base.zero_grad()
            for end in (own.first_step, own.second_step):
                job.loss().backward()
                end()
            job.steps += 1
        assert base.run.facts.step == STEPS
        base.run.finish()
        return base.run.center.clone()

    first, *others = simulate(3, scripts)
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, ParameterVector(network()).data)
