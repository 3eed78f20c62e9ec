"""Methods that share compressed gradients: identities, what they keep, what they take over from the optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from table import METHODS, having, plain
from test_aggregation import begin, step
from test_data_parallel import branches, loss_of
from timm.optim import Lars
from torch import Tensor, nn, optim
from worlds import NET, assert_follows, batch, nesterov, replay, run_method, starts, twin

from hpc_grawa import (
    DataParallel,
    DeepGradientCompression,
    DistributedOptimizer,
    LocalSGD,
    OneBitSGD,
    ParameterVector,
    PowerSGD,
    simulate,
)
from hpc_grawa.aggregation.signs import bits_of_bytes, packed
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError, NonFinite
from hpc_grawa.methods import SharingMethod
from hpc_grawa.periods import PostLocal
from hpc_grawa.schedules import RunFacts

STEPS = 8
#: Full precision, from the first step on, without momentum of its own.
PLAIN = {"clip_norm": None, "warmup_steps": 0, "momentum_correction": False}


def ours(name: str, **settings: Any) -> SharingMethod:
    """The row's method with these settings, as far as it has them."""
    method = METHODS[name].ours
    assert isinstance(method, SharingMethod)
    return replace(method, **{f.name: settings[f.name] for f in fields(method) if f.name in settings})


# ---------------------------------------------------------------------------------------------------------
# Identities.
# ---------------------------------------------------------------------------------------------------------


def same(on_ranks: Ranks, one: SharingMethod, other: SharingMethod, **options: Any) -> None:
    def body(comm: Communicator) -> list[Any]:
        return [np.array(run_method(comm, m, steps=STEPS, **options).parameters) for m in (one, other)]

    for first, second in on_ranks(body):
        np.testing.assert_allclose(first, second, rtol=1e-12, atol=1e-12)


def test_power_sgd_at_full_rank_is_data_parallel(on_ranks: Ranks) -> None:
    full = PowerSGD(rank=100, min_compression=0.0, warmup_steps=0, bucket_mb=1e-4)
    same(on_ranks, full, DataParallel(), optimizer=nesterov)


@pytest.mark.parametrize("shape", [(5, 2), (2, 5), (3, 3)], ids=str)
def test_power_sgd_at_full_rank_is_data_parallel_whatever_the_gradients_before(
    on_ranks: Ranks, shape: tuple[int, int]
) -> None:
    """Also after a first one of zero, by which Q became zero."""

    def train(comm: Communicator, method: SharingMethod) -> list[Tensor]:
        p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        vector, sgd, found = ParameterVector(nn.ParameterList([p])), optim.SGD([p], 0.1), []
        run = method.build(comm, vector, sgd)
        for number, rank in enumerate((0, 3, 0, 1, 3)):
            drawn = torch.Generator().manual_seed(10 * comm.rank + number)
            left, right = (torch.randn(n, rank, generator=drawn, dtype=torch.float64) for n in shape)
            run.after_step(sgd.step(run.closure(lambda g=left @ right.T: (g * p).sum())))
            found.append(vector.data.clone())
        return found

    full = PowerSGD(rank=100, min_compression=0.0, warmup_steps=0)
    for ours_, theirs in on_ranks(lambda comm: [train(comm, method) for method in (full, DataParallel())]):
        torch.testing.assert_close(ours_, theirs, rtol=1e-12, atol=1e-12)


def test_deep_gradient_compression_that_sends_all_unmasked_is_data_parallel(on_ranks: Ranks) -> None:
    """With Nesterov's momentum and weight decay, which it has taken over."""
    all_ = DeepGradientCompression(ratio=1.0, warmup_epochs=0, masking=False, bucket_mb=1e-4)
    same(on_ranks, all_, DataParallel(), optimizer=nesterov)


@pytest.mark.parametrize("nesterov", [False, True])
def test_deep_gradient_compression_that_sends_all_trains_matrices_without_momentum(
    on_ranks: Ranks, nesterov: bool
) -> None:
    """And vectors, of which nothing is late, with it. Nesterov's is 1 + μ times a step."""

    def train(comm: Communicator, method: SharingMethod, momentum: float, lr: float) -> Tensor:
        model = twin(starts(comm.size)[0])
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "momentum": momentum, "lr": lr},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.1},
        ]
        sgd = optim.SGD(groups, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
        run = method.build(comm, ParameterVector(model), sgd)
        number = 0
        closure: Any = run.closure(lambda: loss_on(model, comm.rank, number))
        for number in range(STEPS):  # noqa: B007
            run.after_step(sgd.step(closure))
        return run.vector.data.clone()

    def body(comm: Communicator) -> list[Tensor]:
        all_ = DeepGradientCompression(ratio=1.0, warmup_epochs=0)
        return [train(comm, all_, 0.9, 0.1), train(comm, DataParallel(), 0.0, 0.19 if nesterov else 0.1)]

    for ours_, theirs in on_ranks(body):
        torch.testing.assert_close(ours_, theirs, rtol=1e-12, atol=1e-12)


def loss_on(model: nn.Module, rank: int, number: int) -> Tensor:
    inputs, targets = (torch.as_tensor(part) for part in batch(rank, number))
    return nn.functional.cross_entropy(model(inputs), targets)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", [name for name in plain("keeps")])
def test_what_was_sent_and_what_is_kept_is_every_gradient(on_ranks: Ranks, name: str, parts: int) -> None:
    """In the mean, and so on one rank by itself; some tensors are unused on some ranks, or now and then."""

    def body(comm: Communicator) -> list[Tensor]:
        model = branches()
        run, optimizer = begin(comm, ours(name, **PLAIN), model)
        own, landed = torch.zeros_like(run.vector.data), torch.zeros_like(run.vector.data)
        for number in range(STEPS):
            order = ("abcd", "b", "ad", "cb")[(number + comm.rank) % 4]
            for part in range(parts):
                loss = loss_of(model, comm.rank, number, part, order)
                gradients = torch.autograd.grad(loss, run.vector.parameters, allow_unused=True)
                for total, gradient in zip(run.vector.views(own), gradients, strict=True):
                    total += 0 if gradient is None else gradient
            step(run, optimizer, number, order, parts)
            landed += run.aggregator.grad
        [kept] = [value for key, value in run.state_dict()["aggregator"].items() if key in ("residual", "v")]
        assert kept.any()
        return [own, kept.clone(), landed]

    owns, kepts, landed = zip(*on_ranks(body), strict=True)
    assert all(torch.equal(landed[0], other) for other in landed)
    mean = torch.stack(owns).mean(0)
    torch.testing.assert_close(landed[0] + torch.stack(kepts).mean(0), mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*plain("keeps"), "DataParallel in bf16", "DataParallel in fp16"])
def test_the_size_of_buckets_makes_no_difference(on_ranks: Ranks, name: str) -> None:
    same(on_ranks, ours(name), ours(name, bucket_mb=25.0), optimizer=nesterov)


@pytest.mark.parametrize("name", plain("keeps"))
def test_the_memory_format_makes_no_difference(name: str) -> None:
    """A convolution's matrix has the same rows, and a row the same entries."""

    def body(comm: Communicator, layout: torch.memory_format) -> list[Tensor]:
        torch.manual_seed(0)
        model = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)).double().to(memory_format=layout)
        )
        vector = ParameterVector(model)
        sgd = optim.SGD(vector.parameters, 0.1, momentum=0.9, weight_decay=1e-2)
        run = ours(name, bucket_mb=25.0, warmup_steps=0, rank=1).build(comm, vector, sgd)
        number = 0
        closure: Any = run.closure(lambda: model(images(comm.rank, number, layout)).square().mean())
        for number in range(4):  # noqa: B007
            run.after_step(sgd.step(closure))
        kept = [v for v in run.state_dict()["aggregator"].values() if isinstance(v, Tensor)]
        return [p.detach().contiguous() for whole in (vector.data, *kept) for p in vector.views(whole)]

    plainly, last = (simulate(2, lambda c, x=x: body(c, x)) for x in (torch.contiguous_format, torch.channels_last))
    for one, other in zip(plainly, last, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def images(rank: int, number: int, layout: torch.memory_format) -> Tensor:
    x = np.random.default_rng((rank, number)).standard_normal((2, 3, 8, 8))
    return torch.from_numpy(x).to(memory_format=layout)


@pytest.mark.parametrize("name", plain("keeps"))
def test_bfloat16_parameters_are_shared_in_fp32_and_stay_alike(name: str) -> None:
    def body(comm: Communicator) -> Tensor:
        model = twin(starts(comm.size)[comm.rank]).bfloat16()
        run, optimizer = begin(comm, ours(name, warmup_steps=0), model)
        assert all(v.dtype == torch.float32 for v in run.state_dict()["aggregator"].values() if isinstance(v, Tensor))
        number = 0
        inputs = [torch.as_tensor(batch(comm.rank, n)[0]).bfloat16() for n in range(4)]
        closure: Any = run.closure(lambda: model(inputs[number]).square().sum())
        for number in range(4):  # noqa: B007
            run.after_step(optimizer.step(closure))
        return run.vector.data.clone()

    first, *others = simulate(3, body)
    assert first.dtype == torch.bfloat16 and first.isfinite().all() and all(torch.equal(first, x) for x in others)


@pytest.mark.parametrize("bucket_mb", [1e-9, 25.0])
@pytest.mark.parametrize("name", [*plain("shares"), "DataParallel in bf16"])
def test_tensors_without_entries_and_without_dimensions_are_shared(name: str, bucket_mb: float) -> None:
    def body(comm: Communicator) -> list[Tensor]:
        shapes = [(0, 3), (2, 0, 3), (), (3, 2), (0,), (1,)]
        model = nn.ParameterList(nn.Parameter(torch.ones(shape)) for shape in shapes)
        run, optimizer = begin(comm, ours(name, bucket_mb=bucket_mb, ratio=1.0), model)
        closure: Any = run.closure(lambda: sum(p.sum() for p in model) * (comm.rank + 1))
        for _ in range(2):
            run.after_step(optimizer.step(closure))
        return [run.vector.data.clone(), run.aggregator.grad.clone()]

    for parameters, gradient in simulate(2, body):
        assert (parameters < 1).all() and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 64, 1001])
def test_eight_signs_are_a_byte(n: int) -> None:
    bits = torch.from_numpy(np.random.default_rng(n).random(n) < 0.5)
    bytes_ = packed(bits)
    assert bytes_.dtype == torch.uint8
    assert torch.equal(bits_of_bytes(torch.zeros(1))[bytes_.int()].flatten()[:n], bits.float())
    assert bytes_.numpy().tobytes() == np.packbits(bits.numpy(), bitorder="little").tobytes()


# ---------------------------------------------------------------------------------------------------------
# Numbers that are not finite, or nothing at all.
# ---------------------------------------------------------------------------------------------------------


def with_one(value: float) -> Callable[[int, int], tuple[Any, ...]]:
    """Batches of which one rank's is broken at one step."""

    def broken(rank: int, number: int) -> tuple[Any, ...]:
        inputs, targets = batch(rank, number)
        return (inputs * value if (rank, number) == (0, 4) else inputs), targets

    return broken


@pytest.mark.parametrize("name", plain("keeps"))
def test_a_gradient_that_is_not_finite_on_one_rank_is_an_error_on_all(on_ranks: Ranks, name: str) -> None:
    def body(comm: Communicator) -> str:
        with pytest.raises(NonFinite, match=r"method\.on_nonfinite: skip") as error:
            run_method(comm, ours(name), steps=STEPS, batch=with_one(math.nan))
        return str(error.value)

    assert len(set(on_ranks(body))) == 1


@pytest.mark.parametrize("name", having("keeps"))
def test_a_gradient_that_is_not_finite_can_be_skipped(on_ranks: Ranks, name: str) -> None:
    """What was kept is forgotten with it."""
    row, options = METHODS[name], {"optimizer": nesterov, "batch": with_one(math.nan)}
    oracle = copy.deepcopy(row.oracle)
    oracle.on_nonfinite = "skip"  # type: ignore[attr-defined]
    traces = on_ranks(lambda comm: run_method(comm, ours(name, on_nonfinite="skip"), steps=STEPS, **options))
    assert_follows(traces, replay(oracle, on_ranks.size, STEPS, 1, **options), 1e-12)
    assert (traces[0].parameters[4] == traces[0].parameters[3]).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e5])
@pytest.mark.parametrize("name", [*plain("shares"), "DataParallel in bf16", "DataParallel in fp16"])
def test_one_entry_that_is_not_finite_makes_the_shared_gradient_so(name: str, value: float) -> None:
    """Wherever it is; 1e5 is finite but in fp16."""

    def body(comm: Communicator) -> list[bool]:
        finite = []
        for place in range(0, NET.size, 5):
            model = twin(NET.initial(0)).float()
            run, optimizer = begin(comm, ours(name, on_nonfinite="skip", warmup_steps=0), model)
            own = torch.full((NET.size,), 0.1)
            own[place] = value if comm.rank == comm.size - 1 else 0.1
            run.aggregator.zero_grad(optimizer)
            run.aggregator.start()
            (nn.utils.parameters_to_vector(model.parameters()) * own).sum().backward()
            run.aggregator.finish()
            finite.append(all(p.grad is not None for p in model.parameters()))
            run.close()
        return finite

    expected = value == 1e5 and "fp16" not in name
    assert all(finite == expected for rank in simulate(2, body) for finite in rank)


@pytest.mark.parametrize("name", plain("keeps"))
def test_gradients_of_zero_share_as_zero_and_what_comes_after_is_shared(name: str) -> None:
    """Also where a matrix has lost its rank."""

    def body(comm: Communicator) -> Tensor:
        run, optimizer = begin(comm, ours(name, **PLAIN, rank=100, ratio=1.0), branches())
        for factor in (0.0, 0.0, 1.0):
            run.vector.data.copy_(start(run.vector))
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0
            step(run, optimizer, 1, "abcd", factor=factor)
            if not factor:
                assert not run.aggregator.grad.any()
        assert run.aggregator.grad.isfinite().all()
        return run.aggregator.grad.clone()

    def start(vector: ParameterVector) -> Tensor:
        return nn.utils.parameters_to_vector([p for p in branches().parameters() if p.requires_grad]).detach()

    first, *others = simulate(3, body)
    assert first.any() and all(torch.equal(first, other) for other in others)


# ---------------------------------------------------------------------------------------------------------
# What a run goes on with.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("name", having("keeps"))
def test_a_resumed_run_is_the_same_bit_for_bit(name: str, optimizer_first: bool) -> None:
    """Whichever state is loaded first, and with buckets of another size."""

    def body(comm: Communicator) -> bool:
        def train(run: Any, sgd: optim.Optimizer, numbers: range) -> None:
            for number in numbers:
                closure: Any = run.closure(lambda n=number: loss_on(run.vector.model, comm.rank, n))
                run.after_step(sgd.step(closure))

        def built(method: SharingMethod) -> Any:
            model = twin(starts(comm.size)[0])
            sgd = optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
            return method.build(comm, ParameterVector(model), sgd), sgd

        run, sgd = built(ours(name))
        train(run, sgd, range(4))
        states = copy.deepcopy((run.vector.model.state_dict(), sgd.state_dict(), run.state_dict()))
        train(run, sgd, range(4, STEPS))
        expected, kept = run.vector.data.clone(), run.state_dict()["aggregator"]
        run.close()
        run, sgd = built(ours(name, bucket_mb=25.0))
        run.vector.model.load_state_dict(states[0])
        for part, state in ((sgd, states[1]), (run, states[2]))[:: 1 if optimizer_first else -1]:
            part.load_state_dict(state)
        train(run, sgd, range(4, STEPS))
        again = run.state_dict()["aggregator"]
        assert kept.keys() == again.keys()
        assert all(torch.equal(kept[key], again[key]) for key in kept if isinstance(kept[key], Tensor))
        return torch.equal(run.vector.data, expected)

    assert all(simulate(3, body))


@pytest.mark.parametrize("name", plain("keeps"))
def test_another_world_goes_on_without_what_ranks_have_kept(name: str) -> None:
    def first(comm: Communicator) -> Any:
        run, optimizer = begin(comm, ours(name), branches())
        for number in range(3):
            step(run, optimizer, number, "abcd")
        return copy.deepcopy(run.state_dict())

    state = simulate(2, first)[0]

    def then(comm: Communicator) -> Tensor:
        run, optimizer = begin(comm, ours(name), branches())
        run.start_from(state)
        assert run.facts.step == 3
        assert not any(v.any() for v in run.state_dict()["aggregator"].values() if isinstance(v, Tensor))
        step(run, optimizer, 3, "abcd")
        return run.vector.data.clone()

    results = simulate(3, then)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("name", plain("shares"))
def test_gradients_are_shared_so_before_ranks_average(on_ranks: Ranks, name: str) -> None:
    """From the switch on the optimizer has its own momentum and weight decay."""
    switch, options = 5, {"optimizer": nesterov}
    method = LocalSGD(period=PostLocal(switch, steps=4), sharing=ours(name))
    traces = on_ranks(lambda comm: run_method(comm, method, steps=14, **options))
    expected = replay(
        METHODS["LocalSGD"].oracle, on_ranks.size, 14, 4, shared=switch, first=METHODS[name].oracle, **options
    )
    assert_follows(traces, expected, 1e-12)


# ---------------------------------------------------------------------------------------------------------
# Momentum that is taken over.
# ---------------------------------------------------------------------------------------------------------


def settings(optimizer: optim.Optimizer) -> list[tuple[float, float]]:
    return [(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups]


def test_momentum_and_weight_decay_are_given_back_when_sharing_ends() -> None:
    model = branches()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[:2], "momentum": 0.5}, {"params": trained[2:], "weight_decay": 0.25}]
    sgd = optim.SGD(groups, 0.1, momentum=0.9, weight_decay=0.125)
    own = settings(sgd)
    run = DeepGradientCompression(warmup_epochs=0).build(SingleCommunicator(), ParameterVector(model), sgd)
    assert settings(sgd) == [(0, 0)] * 2
    step(run, sgd, 0, "abcd")
    run.finish()
    assert settings(sgd) == own == [(0.5, 0.125), (0.9, 0.25)]
    sgd.param_groups[0]["momentum"] = 0.0
    run.close()
    assert settings(sgd)[0] == (0, 0.125)


@pytest.mark.parametrize("loaded", ["before it is built", "after"])
def test_weight_decay_that_is_configured_otherwise_when_a_run_goes_on_is_so(loaded: str) -> None:
    """Also as 0; of an optimizer that was loaded first nothing is known but what the checkpoint says."""

    def built(decay: float) -> tuple[Any, optim.SGD]:
        vector = ParameterVector(branches())
        sgd = optim.SGD(vector.parameters, 0.1, momentum=0.9, weight_decay=decay)
        if loaded == "before it is built" and saved:
            sgd.load_state_dict(saved["optimizer"])
        return DeepGradientCompression(warmup_epochs=0).build(SingleCommunicator(), vector, sgd), sgd

    saved: dict[str, Any] = {}
    run, sgd = built(0.125)
    step(run, sgd, 0, "abcd")
    saved |= {"run": run.state_dict(), "optimizer": sgd.state_dict()}
    for decay in (0.125, 0.25, 0.0):
        run, sgd = built(decay)
        run.load_state_dict(saved["run"])
        step(run, sgd, 1, "abcd")
        run.finish()
        assert settings(sgd) == [(0.9, 0.125 if loaded == "before it is built" else decay)]


def test_a_schedule_of_momentum_is_followed(on_ranks: Ranks) -> None:
    """What a scheduler sets in the optimizer is taken as well."""

    def train(comm: Communicator, method: SharingMethod) -> Tensor:
        model = twin(starts(comm.size)[0])
        sgd = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        schedule = optim.lr_scheduler.CyclicLR(sgd, 0.05, 0.2, step_size_up=3)
        optimizer = DistributedOptimizer(sgd, model, method, comm=comm)
        for number in range(STEPS):
            optimizer.zero_grad()
            loss_on(model, comm.rank, number).backward()
            optimizer.step()
            schedule.step()
        optimizer.run.finish()
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    def body(comm: Communicator) -> list[Tensor]:
        all_ = DeepGradientCompression(ratio=1.0, warmup_epochs=0, masking=False)
        return [train(comm, all_), train(comm, DataParallel())]

    for ours_, theirs in on_ranks(body):
        torch.testing.assert_close(ours_, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: optim.AdamW(p), "the optimizer is a AdamW: .*take SGD, method.momentum_correction: false, or Power"),
        (lambda p: optim.RMSprop(p, momentum=0.9), "the optimizer is a RMSprop"),
        (lambda p: Lars(p, momentum=0.9), "the optimizer is a Lars: .*takes over the momentum of SGD, "),
        (lambda p: optim.SGD(p, 0.1, momentum=0.9, dampening=0.1), "the optimizer has dampening or maximize"),
        (lambda p: optim.SGD(p, 0.1, maximize=True), "the optimizer has dampening or maximize"),
    ],
)
def test_momentum_that_cannot_be_taken_over_is_refused(make: Any, message: str) -> None:
    vector = ParameterVector(branches())
    optimizer = make(vector.parameters)
    before = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ConfigError, match=message):
        DeepGradientCompression(warmup_epochs=0).build(SingleCommunicator(), vector, optimizer)
    assert optimizer.param_groups[0].keys() == before[0].keys()
    run = DeepGradientCompression(warmup_epochs=0, momentum_correction=False).build(
        SingleCommunicator(), vector, optimizer
    )
    step(run, optimizer, 0, "abcd")


def test_a_tensor_that_no_rank_uses_does_not_decay(on_ranks: Ranks) -> None:
    """Nor gets a gradient; one that some rank uses does."""

    def body(comm: Communicator) -> list[bool]:
        run, optimizer = begin(comm, DeepGradientCompression(warmup_epochs=0, ratio=0.5), branches())
        before = run.vector.data.clone()
        for number in range(3):
            step(run, optimizer, number, "a" if comm.rank else "ab")
        moved = [bool((x != y).any()) for x, y in zip(*map(run.vector.views, (run.vector.data, before)), strict=True)]
        assert moved == [p.grad is not None for p in run.vector.parameters]
        return moved

    assert on_ranks(body) == [[True, True, True, False, False, False]] * on_ranks.size


def test_gradients_are_shared_once_a_step() -> None:
    model = branches()
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    method = DeepGradientCompression(warmup_epochs=0)
    optimizer = DistributedOptimizer(optimizer, model, method, comm=SingleCommunicator())
    loss_of(model, 0, 0, 0, "abcd").backward()
    with pytest.raises(RuntimeError, match=r"shared in this step already.*backward_passes_per_step"):
        loss_of(model, 0, 1, 0, "abcd").backward()


# ---------------------------------------------------------------------------------------------------------
# Settings.
# ---------------------------------------------------------------------------------------------------------


def test_the_share_that_is_sent_falls_over_the_first_epochs() -> None:
    method, facts = DeepGradientCompression(), RunFacts(steps_per_epoch=10)

    def at(**now: Any) -> float:
        return round(method.ratio_at(replace(facts, **now)), 3)

    assert [at(step=n) for n in (0, 9, 10, 20, 30, 40, 500)] == [0.251, 0.251, 0.063, 0.016, 0.004, 0.001, 0.001]
    without = {"steps_per_epoch": None, "total_steps": 1000}
    assert [at(step=n, **without) for n in (0, 9, 10, 40, 900)] == [0.251, 0.251, 0.063, 0.001, 0.001]
    long = replace(method, warmup_epochs=60)
    ratios = [long.ratio_at(RunFacts(step=n, total_steps=100)) for n in range(60)]  # of floats 29/100 would be in 28
    assert ratios == [0.001 ** ((n + 1) / 60) for n in range(60)]
    assert replace(method, warmup_epochs=0).ratio_at(facts) == 0.001
    with pytest.raises(ConfigError, match=r"method.warmup_epochs is 5: must be 0, or .*steps_per_epoch=\.\.\."):
        begin(SingleCommunicator(), method, branches())


def test_small_matrices_are_not_compressed() -> None:
    """Where 2r(n + m) < nm at the default."""

    def sent(n: int, m: int) -> int:
        model = nn.Linear(m, n, bias=False)
        vector = ParameterVector(model)
        comm = SingleCommunicator()
        sgd = optim.SGD(vector.parameters, 0.1)
        run = PowerSGD(warmup_steps=1, rank=1).build(comm, vector, sgd)
        closure = run.closure(lambda: model(torch.ones(1, m)).sum())
        before = 0
        for _ in range(2):
            before = comm.meter.payload_bytes["gradient"]
            run.after_step(sgd.step(closure))
        return (comm.meter.payload_bytes["gradient"] - before) // 4 - 2

    assert [sent(4, 4), sent(6, 3), sent(5, 4), sent(4, 100), sent(8, 8)] == [16, 18, 9, 104, 16]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerSGD(rank=0), "method.rank is 0: must be at least 1"),
        (lambda: PowerSGD(min_compression=-1.0), "method.min_compression is -1.0"),
        (lambda: PowerSGD(warmup_steps=-1), "method.warmup_steps is -1"),
        (lambda: OneBitSGD(bucket_mb=0.0), "method.bucket_mb is 0.0"),
        (lambda: DeepGradientCompression(ratio=0.0), r"method.ratio is 0.0: must be in \(0, 1\]"),
        (lambda: DeepGradientCompression(warmup_epochs=-1), "method.warmup_epochs is -1"),
        (lambda: DeepGradientCompression(clip_norm=0.0), "method.clip_norm is 0.0: must be positive, or null"),
    ],
)
def test_impossible_values_are_refused(make: Callable[[], SharingMethod], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
