"""The battery: every method of `table`, on every backend, follows the oracle; and the identities between methods."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import DEVICES, Ranks
from table import METHODS, PERIOD, Row, having, is_, kinds, paced, plain
from torch import nn
from worlds import NET, Trace, assert_follows, batch, nesterov, replay, run_method, starts, twin

from hpc_grawa import (
    DPPF,
    EASGD,
    GRAWA,
    LGRAWA,
    LSGD,
    MGRAWA,
    DataParallel,
    DiLoCo,
    LocalLGRAWA,
    LocalSGD,
    Method,
    ParameterVector,
    Parle,
    Run,
    SlowMo,
    simulate,
)
from hpc_grawa.comm import Communicator
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError, LostView, NonFinite
from hpc_grawa.methods import AveragingMethod

STEPS = 14  # rounds after 4, 8 and 12 steps, and a last one after 2 more
#: One row of each weight rule.
RULES = [plain(tag)[0] for tag in ("norms", "leader", "uniform")]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def decaying(step: int) -> float:
    return 0.2 if step < 6 else 0.05


def follow(
    on_ranks: Ranks, row: Row, steps: int = STEPS, dtype: torch.dtype = torch.float64, **options: Any
) -> list[Trace]:
    """Run a row on every rank, compare with its oracle, and return what the ranks saw."""
    traces = on_ranks(lambda comm: run_method(comm, row.ours, steps=steps, dtype=dtype, **options))
    averages = "averages" in row.tags
    if averages:
        options["local_momentum"] = row.ours.local_momentum
    for ours in ("parts", "device"):
        options.pop(ours, None)
    expected = replay(row.oracle, on_ranks.size, steps, getattr(row.ours, "period", 1), **options)
    assert len(expected.rounds) == (-(-steps // PERIOD) if averages else 0)
    assert_follows(traces, expected, TOLERANCE[dtype])
    return traces


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METHODS)
def test_follows_the_oracle(on_ranks: Ranks, name: str, device: str) -> None:
    follow(on_ranks, METHODS[name], optimizer=nesterov, lr=decaying, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", kinds())
def test_follows_the_oracle_in_single_precision(on_ranks: Ranks, name: str, device: str) -> None:
    follow(on_ranks, METHODS[name], optimizer=nesterov, lr=decaying, device=device, dtype=torch.float32)


@pytest.mark.parametrize("name", METHODS)
def test_follows_the_oracle_from_independent_starts_without_momentum(on_several_ranks: Ranks, name: str) -> None:
    follow(on_several_ranks, METHODS[name], steps=6, independent=True)


@pytest.mark.parametrize("name", [RULES[0], *kinds("shares")])
def test_smoke(on_ranks: Ranks, name: str) -> None:
    follow(on_ranks, METHODS[name], optimizer=nesterov)


def with_momentum(name: str, policy: Any) -> Row:
    row = METHODS[name]
    return row._replace(ours=replace(row.ours, local_momentum=policy))


@pytest.mark.parametrize("policy", ["reset", "average"])
@pytest.mark.parametrize("name", RULES)
def test_local_momentum_at_a_round(on_ranks: Ranks, name: str, policy: Any) -> None:
    follow(on_ranks, with_momentum(name, policy), optimizer=nesterov)


@pytest.mark.parametrize("name", ["LGRAWA", "DataParallel"])
def test_a_gradient_accumulated_over_parts_is_that_of_the_batch(on_ranks: Ranks, name: str) -> None:
    follow(on_ranks, METHODS[name], parts=3, optimizer=nesterov)


def test_a_run_shorter_than_its_period_has_one_round(on_ranks: Ranks) -> None:
    traces = follow(on_ranks, METHODS["LGRAWA"], steps=2)
    assert [round_.period for round_ in traces[0].rounds] == [2]


def test_a_run_that_ends_with_a_round_has_no_second(on_ranks: Ranks) -> None:
    traces = follow(on_ranks, METHODS["LGRAWA"], steps=8)
    assert [round_.step for round_ in traces[0].rounds] == [4, 8]


def test_rounds_say_what_happened(on_ranks: Ranks) -> None:
    ours = METHODS[plain("leader")[0]].ours
    traces = on_ranks(lambda comm: run_method(comm, ours, steps=STEPS, lr=decaying))
    for round_, first in zip(traces[-1].rounds, traces[0].rounds, strict=True):
        assert (round_.number, round_.step, round_.period) == (first.number, first.step, first.period)
        assert round_.leader == int(round_.weights.flatten().argmax()) and torch.equal(round_.weights, first.weights)
    assert [(r.number, r.step, r.period, r.lr) for r in traces[0].rounds] == [
        (1, 4, 4, 0.2),
        (2, 8, 4, 0.05),
        (3, 12, 4, 0.05),
        (4, 14, 2, 0.05),
    ]


# ---------------------------------------------------------------------------------------------------------
# Identities and limits.
# ---------------------------------------------------------------------------------------------------------


def same(on_ranks: Ranks, *methods: Method, tolerance: float = 1e-12, **options: Any) -> None:
    """Methods that are one: parameters after every step are equal; bit for bit where the tolerance is 0."""

    def body(comm: Communicator) -> list[ref.Array]:
        return [np.array(run_method(comm, m, steps=STEPS, **options).parameters) for m in methods]

    for first, *others in on_ranks(body):
        for other in others:
            if tolerance:
                np.testing.assert_allclose(other, first, rtol=tolerance, atol=tolerance)
            else:
                assert (other == first).all()


@pytest.mark.parametrize("policy", ["keep", "average"])
def test_local_sgd_of_period_one_is_data_parallel_without_momentum(on_ranks: Ranks, policy: Any) -> None:
    def decay() -> ref.SGD:
        return ref.SGD(weight_decay=0.1)

    same(on_ranks, DataParallel(), LocalSGD(period=1, local_momentum=policy), optimizer=decay)


@pytest.mark.parametrize("with_nesterov", [False, True])
def test_local_sgd_of_period_one_is_data_parallel_with_momentum(on_ranks: Ranks, with_nesterov: bool) -> None:
    """x̄ and the mean momentum obey the same recursion whether each rank keeps its own momentum or all have the mean."""

    def momentum() -> ref.SGD:
        return ref.SGD(momentum=0.9, nesterov=with_nesterov, weight_decay=1e-2)

    keep, average = LocalSGD(period=1), LocalSGD(period=1, local_momentum="average")
    same(on_ranks, DataParallel(), keep, average, optimizer=momentum, lr=decaying)


def test_t8_one_layer_makes_the_three_one(on_ranks: Ranks) -> None:
    options: dict[str, Any] = {"period": PERIOD, "pull": 0.3, "prox": 0.1}
    one = [["*"]]
    same(on_ranks, GRAWA(**options), MGRAWA(**options, layers=one), LGRAWA(**options, layers=one), optimizer=nesterov)


def test_equal_scores_and_full_pull_are_local_sgd(on_ranks: Ranks) -> None:
    equal: dict[str, Any] = {"period": PERIOD, "pull": 1.0, "prox": 0.0, "power": 0.0}  # s⁰ is the same for all
    same(on_ranks, LocalSGD(period=PERIOD), GRAWA(**equal), MGRAWA(**equal), LGRAWA(**equal), optimizer=nesterov)


def test_local_sgd_is_where_moves_to_the_mean_are_whole_and_have_no_momentum(on_ranks: Ranks) -> None:
    limits = (
        SlowMo(slow_lr=1.0, slow_momentum=0.0),
        DiLoCo(outer_lr=1.0, outer_momentum=0.0),
        DPPF(pull=1.0, push=0.0),
    )
    methods = [replace(method, period=PERIOD) for method in limits]
    same(on_ranks, LocalSGD(period=PERIOD), *methods, optimizer=nesterov, lr=decaying)


def test_slowmo_at_learning_rate_zero_makes_rounds_of_local_sgd(on_ranks: Ranks) -> None:
    follow(on_ranks, METHODS["SlowMo"], lr=lambda step: 0.1 if step < 6 else 0.0, independent=True)


def test_dppf_settles_where_pull_and_push_are_even() -> None:
    """Two ranks, whose pushes are opposite: their distance to the mean becomes λ/α, and the mean stays where it was."""
    method, steps = DPPF(period=1, pull=0.5, push=0.3), 60
    traces = simulate(2, lambda comm: run_method(comm, method, steps=steps, lr=0.0, independent=True))
    first, second = (trace.parameters[-1] for trace in traces)
    assert np.linalg.norm(first - second) / 2 == pytest.approx(0.3 / 0.5, rel=1e-12)
    np.testing.assert_allclose((first + second) / 2, starts(2).mean(0), rtol=1e-12, atol=1e-12)


def test_dppf_leaves_ranks_that_are_alike_where_they_are() -> None:
    """Their mean is rounded, which is no direction to be pushed in."""
    for trace in simulate(3, lambda comm: run_method(comm, DPPF(period=1, pull=0.5, push=0.3), steps=3, lr=0.0)):
        np.testing.assert_allclose(trace.parameters[-1], starts(1)[0], rtol=1e-14)


def test_parle_of_one_step_without_a_slow_mean_pulls_to_the_mean_by_a_fixed_share(on_ranks: Ranks) -> None:
    """L = 1 and d = 0: x_m is what uniform averaging with pull t = γ/(ρ + γ) makes of the first step."""
    t = 0.75
    parle = Parle(period=1, decay=0.0, gamma=3.0, gamma_floor=3.0, rho=1.0, rho_floor=1.0, scoping=1.0)

    def body(comm: Communicator) -> tuple[list[float], list[float]]:
        model = twin(starts(1)[0])
        vector = ParameterVector(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = parle.build(comm, vector, optimizer)
        inputs, targets = map(torch.as_tensor, batch(comm.rank, 0))
        run.after_step(optimizer.step(run.closure(lambda: nn.functional.cross_entropy(model(inputs), targets))))
        return run.local.tolist(), run.center.tolist()

    pulled = on_ranks(lambda comm: run_method(comm, GRAWA(period=1, pull=t, power=0.0, prox=0.0), steps=1))
    for (local, center), trace in zip(on_ranks(body), pulled, strict=True):
        np.testing.assert_allclose(local, trace.parameters[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(center, trace.center, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("words", [(), (None,), {"closure": None}])
def test_parle_pulls_in_an_own_loop_however_it_steps(words: Any) -> None:
    """A gradient made by ``backward`` is completed by ``step``, one made by a closure of one's own cannot be."""
    inputs, targets = map(torch.as_tensor, batch(0, 0))
    found = []
    for own in (False, True):
        model = twin(starts(1)[0])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        parle = Parle(period=100, gamma=0.5, gamma_floor=0.5, scoping=1.0)
        run = parle.build(SingleCommunicator(), ParameterVector(model), optimizer)

        def loss(model: nn.Module = model) -> torch.Tensor:
            return nn.functional.cross_entropy(model(inputs), targets)

        for _ in range(3):
            if own:
                optimizer.zero_grad()
                loss().backward()
                optimizer.step(**words) if isinstance(words, dict) else optimizer.step(*words)
            else:
                optimizer.step(run.closure(loss))
            run.after_step()
        found.append(run.vector.data)
        optimizer.step(loss)
        with pytest.raises(RuntimeError, match=r"lacked Parle's pull to x: .* must be made by run.closure\(loss\)"):
            run.after_step()
    assert torch.equal(*found)


def test_parle_draws_all_of_an_embedding_whose_gradient_is_sparse() -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(4, 2, sparse=sparse)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = Parle(period=2, scoping=1.0).build(SingleCommunicator(), ParameterVector(model), optimizer)
        for word in (0, 1, 3, 1):
            run.after_step(optimizer.step(run.closure(lambda m=model, w=word: m(torch.tensor([w])).square().sum())))
        found.append(run.vector.data)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def test_t4_no_pull_is_training_alone(on_ranks: Ranks) -> None:
    """λ = 0 and no proximity: bit for bit what a rank does without the others."""
    for name in plain("pulls"):

        def body(comm: Communicator, name: str = name) -> list[ref.Array]:
            methods = [paced(name, period, pull=0.0, prox=0.0) for period in (PERIOD, STEPS + 1)]
            return [np.array(run_method(comm, m, steps=STEPS).parameters) for m in methods]

        for together, apart in on_ranks(body):
            assert (together == apart).all()


@pytest.mark.parametrize("name", [name for name in kinds("averages") if is_(name, "pulls") or is_(name, "equal")])
def test_t4_full_pull_is_consensus(on_ranks: Ranks, name: str) -> None:
    method = paced(name, 7, **({"pull": 1.0} if is_(name, "pulls") else {}))
    traces = on_ranks(lambda comm: run_method(comm, method, steps=STEPS))
    for trace in traces:
        for step in (7, 14):
            assert (trace.parameters[step - 1] == traces[0].parameters[step - 1]).all()
        assert trace.center is not None and (trace.center == trace.parameters[-1]).all()
    if len(traces) > 1:
        assert not (traces[0].parameters[7] == traces[1].parameters[7]).all()


@pytest.mark.parametrize(
    "name", [name for name in having("averages") if not (is_(name, "centered") or is_(name, "forced"))]
)
def test_t2_a_world_of_one_trains_as_if_alone(name: str) -> None:
    """Bit for bit, but for the proximity pull to a center that is its own past."""
    ours = METHODS[name].ours
    method = replace(ours, **{prox: 0.0 for prox in ("prox", "group_prox") if hasattr(ours, prox)})
    alone = run_method(SingleCommunicator(), LocalSGD(period=STEPS + 1), steps=STEPS, optimizer=nesterov)
    for run in (lambda f: [f(SingleCommunicator())], lambda f: simulate(1, f)):
        [trace] = run(lambda comm: run_method(comm, method, steps=STEPS, optimizer=nesterov))
        assert (np.array(trace.parameters) == np.array(alone.parameters)).all()


def test_t11_easgd_rests_where_ranks_and_center_agree(on_ranks: Ranks) -> None:
    """Without steps (η = 0) a common start is a fixed point: of the ranks bit for bit, of the center to rounding."""
    traces = on_ranks(lambda comm: run_method(comm, EASGD(period=1), steps=5, lr=0.0))
    for trace in traces:
        np.testing.assert_allclose(trace.parameters[-1], NET.initial(0), rtol=1e-15, atol=1e-16)
        np.testing.assert_allclose(trace.center, NET.initial(0), rtol=1e-15, atol=1e-16)


def test_t11_easgd_is_the_server_that_sums_elastic_differences(on_ranks: Ranks) -> None:
    """Δ_m = α(x_m - c); x_m ← x_m - Δ_m; c ← c + Σ_m Δ_m with α = β/W, replayed with a server."""
    world, beta = on_ranks.size, 0.6
    traces = on_ranks(lambda comm: run_method(comm, EASGD(period=1, pull=beta), steps=6, lr=0.0, independent=True))
    x = np.array([NET.initial(m) for m in range(world)])
    c = x.mean(0)
    for step in range(6):
        delta = beta / world * (x - c)
        x, c = x - delta, c + delta.sum(0)
        np.testing.assert_allclose([trace.parameters[step] for trace in traces], x, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose([trace.center for trace in traces], [c] * world, rtol=1e-12, atol=1e-13)


def test_t10_the_proximity_pull_moves_by_its_share_of_the_distance(on_ranks: Ranks) -> None:
    """With η = 0 between rounds x moves by exactly (μ/τ)(c - x) at each step, and not before the first round."""
    mu = 0.8
    method = GRAWA(period=PERIOD, pull=0.0, prox=mu)
    traces = on_ranks(lambda comm: run_method(comm, method, steps=7, lr=0.0, independent=True))
    c = np.asarray(traces[0].rounds[0].weights).T @ [NET.initial(m) for m in range(on_ranks.size)]
    for rank, trace in enumerate(traces):
        assert (trace.parameters[3] == NET.initial(rank)).all()
        x = trace.parameters[3]
        for step in (4, 5):
            x = x + mu / PERIOD * (c[0] - x)
            np.testing.assert_allclose(trace.parameters[step], x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", kinds("shares"))
def test_gradient_sharing_keeps_all_ranks_bit_identical(on_ranks: Ranks, name: str) -> None:
    ours = METHODS[name].ours
    for dtype in TOLERANCE:
        traces = on_ranks(lambda comm, d=dtype: run_method(comm, ours, steps=STEPS, optimizer=nesterov, dtype=d))
        for trace in traces:
            assert (np.array(trace.parameters) == np.array(traces[0].parameters)).all()
            assert all((a == b).all() for a, b in zip(trace.momenta, traces[0].momenta, strict=True))


# ---------------------------------------------------------------------------------------------------------
# Numbers that are not finite.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *((name, "keep") for name in plain("averages")),
        *((name, policy) for name in RULES for policy in ("reset", "average")),
    ],
)
def test_a_rank_that_is_not_finite_is_healed(on_several_ranks: Ranks, name: str, policy: Any) -> None:
    """Rank 0 breaks in the last step before a round, the last rank in the first step after one."""
    last = on_several_ranks.size - 1

    def poison(rank: int, step: int) -> bool:
        return (rank, step) in ((0, 3), (last, 8))

    traces = follow(on_several_ranks, with_momentum(name, policy), optimizer=nesterov, poison=poison)
    assert [round_.healed for round_ in traces[0].rounds] == [(0,), (), (last,), ()]
    for trace in traces:
        assert np.isfinite(trace.parameters[-1]).all() and all(np.isfinite(m).all() for m in trace.momenta)


@pytest.mark.parametrize("name", kinds("levels"))
def test_a_rank_is_healed_by_its_group_and_a_group_by_all(on_several_ranks: Ranks, name: str) -> None:
    """Rank 0 breaks before a round of groups; the last group breaks as a whole before one, and waits for all ranks."""
    world = on_several_ranks.size
    last_group = range((world - 1) // 2 * 2, world)

    def poison(rank: int, step: int) -> bool:
        return (rank == 0 and step == 1) or (rank in last_group and step == 9 and world > 2)

    traces = follow(on_several_ranks, METHODS[name], optimizer=nesterov, poison=poison)
    healed = [round_.healed for round_ in traces[0].rounds]
    assert healed == [(), (), tuple(last_group) if world > 2 else (), ()]
    for trace in traces:
        assert np.isfinite(trace.parameters[-1]).all() and all(np.isfinite(m).all() for m in trace.momenta)


def test_groups_are_hosts_by_default(on_several_ranks: Ranks) -> None:
    """All ranks of a test are on one host: its leader is the leader of all, as if one group held them all."""
    hosts = LSGD(period=PERIOD, group_period=2)
    same(on_several_ranks, replace(hosts, ranks_per_group=on_several_ranks.size), hosts, tolerance=0)


def test_two_levels_without_pulls_of_groups_are_one(on_ranks: Ranks) -> None:
    two = LSGD(period=4, group_period=2, ranks_per_group=2, group_pull=0.0, group_prox=0.0)
    same(on_ranks, LSGD(period=4), two, tolerance=0)


@pytest.mark.parametrize("buffers", ["none", "zeros", "zeros and a broken rank"])
@pytest.mark.parametrize("method", [LGRAWA, LocalLGRAWA])
def test_a_layer_is_averaged_over_the_ranks_that_have_a_gradient_for_it(
    on_several_ranks: Ranks, method: type[AveragingMethod], buffers: str
) -> None:
    """Experts, each of which one rank's data reach, and one that none reach; gradients start as None or as zeros."""
    world = on_several_ranks.size

    def body(comm: Communicator) -> tuple[Any, ...]:
        torch.manual_seed(0)
        experts = nn.ModuleList(nn.Linear(3, 1, dtype=torch.float64) for _ in range(world + 1))
        vector, optimizer = ParameterVector(experts), torch.optim.SGD(experts.parameters(), 0.1)

        def loss() -> torch.Tensor:
            return (experts[comm.rank](torch.full((2, 3), comm.rank + 1.0, dtype=torch.float64)) - 1).square().mean()

        run = method(period=3, pull=1.0, prox=0.0).build(comm, vector, optimizer, probe=loss)
        rounds: list[Any] = []
        run.synchronizers[0].on_round = rounds.append
        for p in experts.parameters():
            p.grad = None if buffers == "none" else torch.zeros_like(p)
        for step in range(3):
            optimizer.zero_grad(set_to_none=buffers == "none")
            loss().backward()
            optimizer.step()
            if step == 2 and "broken" in buffers and comm.rank == 0:
                vector.data[0] = math.nan
            own = vector.data.clone()
            run.after_step()
        return own.numpy(), vector.data.numpy(), rounds[0].weights.numpy()

    broken = "broken" in buffers
    ranks = on_several_ranks(body)
    expected = np.zeros((world, 2 * (world + 1)))
    for expert in range(world + 1):
        who = [expert] if expert < world and not (broken and expert == 0) else list(range(broken, world))
        expected[who, 2 * expert : 2 * expert + 2] = 1 / len(who)
    each = np.repeat(np.arange(2 * (world + 1)), [3, 1] * (world + 1))
    center = sum(np.nan_to_num(own) * weights for (own, _, _), weights in zip(ranks, expected[:, each], strict=True))
    for _, parameters, weights in ranks:
        np.testing.assert_array_equal(weights, expected)
        np.testing.assert_allclose(parameters, center, rtol=1e-14)


@pytest.mark.parametrize("name", RULES)
def test_if_no_rank_is_finite_all_say_so(on_ranks: Ranks, name: str) -> None:
    def body(comm: Communicator) -> str:
        with pytest.raises(NonFinite) as error:
            run_method(comm, METHODS[name].ours, steps=STEPS, poison=lambda rank, step: step == 5)
        return str(error.value)

    messages = on_ranks(body)
    assert messages == [messages[0]] * len(messages) and "diverged on all ranks" in messages[0]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_any_number_that_is_not_finite_is_noticed(value: float) -> None:
    def body(comm: Communicator) -> tuple[int, ...]:
        vector = ParameterVector(twin(NET.initial(0)))
        run = LocalSGD(period=1).build(comm, vector, torch.optim.SGD(vector.parameters, 0.1))
        if comm.rank == 1:
            vector.data[:2] = torch.tensor([value, -value])  # their sum is NaN or, for NaN, too
        healed: list[tuple[int, ...]] = []
        run.synchronizers[0].on_round = lambda round_: healed.append(round_.healed)
        run.after_step()
        assert vector.data.isfinite().all() and run.synchronizers[0].healed == 1
        return healed[0]

    assert simulate(3, body) == [(1,)] * 3


def with_nan(rank: int, step: int) -> tuple[Any, ...]:
    inputs, targets = NET.random_batch(5, 1, rank, step)
    return (inputs * math.nan if (rank, step) == (0, 5) else inputs), targets


def test_a_shared_gradient_that_is_not_finite_is_an_error_on_all_ranks(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> str:
        with pytest.raises(NonFinite) as error:
            run_method(comm, DataParallel(bucket_mb=1e-4), steps=STEPS, batch=with_nan)
        return str(error.value)

    messages = on_ranks(body)
    assert messages == [messages[0]] * len(messages) and "method.on_nonfinite: skip" in messages[0]


def test_a_shared_gradient_that_is_not_finite_can_be_skipped(on_ranks: Ranks) -> None:
    ours, oracle = DataParallel(bucket_mb=1e-4, on_nonfinite="skip"), ref.DataParallel(on_nonfinite="skip")
    row = METHODS["DataParallel"]._replace(ours=ours, oracle=oracle)
    traces = follow(on_ranks, row, optimizer=nesterov, batch=with_nan)
    assert (traces[0].parameters[5] == traces[0].parameters[4]).all()


def test_statistics_of_a_healed_rank_start_anew() -> None:
    """NaN never leaves a running mean by itself: reset where they are local, taken over where they are averaged."""

    def body(comm: Communicator) -> list[float]:
        means = []
        for buffers in ("local", "average"):
            model = nn.Sequential(nn.BatchNorm1d(1))
            vector = ParameterVector(model)
            run = LocalSGD(period=1, buffers=buffers).build(comm, vector, torch.optim.SGD(vector.parameters, 0.1))
            mean = model[0].running_mean
            assert isinstance(mean, torch.Tensor)
            mean.fill_(comm.rank + 1.0)
            if comm.rank == 1:
                vector.data.fill_(math.nan)
                mean.fill_(math.nan)
            run.after_step()
            means.append(mean.item())
        return means

    assert simulate(3, body) == [[1.0, 2.0], [0.0, 2.0], [3.0, 2.0]]


# ---------------------------------------------------------------------------------------------------------
# What building asks for, and what a round costs.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LGRAWA(period=0), "method.period is 0: must be at least 1"),
        (lambda: GRAWA(pull=1.5), r"method.pull is 1.5: must be in \[0, 1\]"),
        (lambda: GRAWA(pull=math.nan), "method.pull is nan"),
        (lambda: GRAWA(prox=-0.1), "method.prox is -0.1"),
        (lambda: GRAWA(power=-1.0), "method.power is -1.0"),
        (lambda: GRAWA(score_momentum=1.0), r"method.score_momentum is 1.0: must be in \[0, 1\)"),
        (lambda: GRAWA(probe_batches=0), "method.probe_batches is 0"),
        (lambda: EASGD(pull=2.0), "method.pull is 2.0"),
        (lambda: LSGD(prox=math.inf), "method.prox is inf"),
        (lambda: LSGD(period=8, group_period=3), "method.group_period is 3: must be null, or divide method.period"),
        (lambda: LSGD(ranks_per_group=4), "method.ranks_per_group is 4: must be null without method.group_period"),
        (lambda: LSGD(group_period=4, ranks_per_group=0), "method.ranks_per_group is 0"),
        (lambda: LSGD(group_period=4, rounds="pooled"), "method.rounds is pooled: must be lockstep with method.group"),
        (lambda: LocalLGRAWA(score_momentum=1.0), "method.score_momentum is 1.0"),
        (lambda: DataParallel(bucket_mb=0.0), "method.bucket_mb is 0.0"),
        (lambda: SlowMo(slow_momentum=1.0), r"method.slow_momentum is 1.0: must be in \[0, 1\)"),
        (lambda: SlowMo(slow_lr=-1.0), "method.slow_lr is -1.0"),
        (lambda: DiLoCo(outer_momentum=-0.1), "method.outer_momentum is -0.1"),
        (lambda: DiLoCo(outer_lr=math.nan), "method.outer_lr is nan"),
        (lambda: DPPF(pull=0.5, push=-1.0), "method.push is -1.0"),
        (lambda: Parle(gamma=0.0), "method.gamma is 0.0: must be a positive number"),
        (lambda: Parle(gamma=0.5), "method.gamma is 0.5: must be at least method.gamma_floor, which is 1.0"),
        (lambda: Parle(rho=0.0), "method.rho is 0.0: must be at least method.rho_floor, which is 0.1"),
        (lambda: Parle(scoping=0.0), "method.scoping is 0.0: must be null"),
        (lambda: Parle(decay=1.0), "method.decay is 1.0"),
    ],
)
def test_impossible_values_are_refused(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", plain())
def test_what_a_method_needs_and_is_not_given_is_a_named_error(name: str) -> None:
    def begin(**given: Any) -> Run:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = METHODS[name].ours.build(SingleCommunicator(), ParameterVector(model), optimizer, **given)
        run.closure(lambda: model(torch.ones(1, 2)).mean())()
        return run

    given: dict[str, Any] = {}
    if is_(name, "probes"):
        with pytest.raises(ValueError, match=rf"{name} scores.*probe="):
            begin()
        given["probe"] = lambda: torch.zeros(())
    run = begin(**given)
    assert METHODS[name].ours.needs_loss == is_(name, "loss")
    if is_(name, "loss"):
        with pytest.raises(ValueError, match=r"after_step\(loss\)"):
            run.after_step()
    else:
        run.after_step()


def test_a_loss_in_place_of_a_probe_is_a_named_error() -> None:
    model = nn.Linear(2, 1)
    loss: Any = model(torch.ones(1, 2)).sum()
    with pytest.raises(ConfigError, match=r"probe is a Tensor: must be a function .*probe=loss, not probe=loss\(\)"):
        LGRAWA().build(SingleCommunicator(), ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1), loss)


@pytest.mark.parametrize("method", [LocalSGD(period=2), DataParallel()], ids=str)
def test_a_lost_view_is_an_error_before_it_matters(on_ranks: Ranks, method: Method) -> None:
    """At the next round on all ranks, or where gradient sharing is asked for its center."""

    def body(comm: Communicator) -> None:
        model = nn.Linear(2, 1)
        vector = ParameterVector(model)
        run = method.build(comm, vector, torch.optim.SGD(vector.parameters, 0.1))
        if run.synchronizers:
            run.after_step()
        model.double()
        with pytest.raises(LostView, match="'weight' no longer lives"):
            run.after_step() if run.synchronizers else run.center

    on_ranks(body)


@pytest.mark.parametrize("method", [LocalSGD(period=2), DataParallel()], ids=str)
def test_a_view_that_the_first_pass_loses_is_an_error_at_once(method: Method) -> None:
    """As ``flatten_parameters`` of a recurrent network does in its forward pass on a GPU."""
    model = nn.Linear(2, 1)
    vector = ParameterVector(model)
    run = method.build(SingleCommunicator(), vector, torch.optim.SGD(vector.parameters, 0.1))
    model.weight.data = model.weight.data.clone()
    with pytest.raises(LostView, match="'weight' no longer lives"):
        run.after_step()


def test_the_common_start_is_all_of_rank_0s_model(on_ranks: Ranks) -> None:
    """Parameters, frozen ones, float, integer and boolean buffers, whatever their memory format."""

    def body(comm: Communicator) -> list[Any]:
        torch.manual_seed(comm.rank)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
        model.to(memory_format=torch.channels_last)
        model[1].requires_grad_(False)
        model[2].running_mean.fill_(comm.rank + 7.0)
        model[2].num_batches_tracked.fill_(comm.rank + 2)
        model.register_buffer("mask", torch.rand(5) < 0.5)
        model.register_buffer("nothing", torch.zeros(0))
        vector = ParameterVector(model)
        LocalSGD().build(comm, vector, torch.optim.SGD(vector.parameters, 0.1))
        vector.check()
        return [t.detach().contiguous().numpy() for t in (*model.parameters(), *model.buffers())]

    results = on_ranks(body)
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3))
    for result in results:
        assert all((ours == first).all() for ours, first in zip(result, results[0], strict=True))
        for ours, p in zip(result, expected.parameters(), strict=False):
            assert (ours == p.detach().numpy()).all()


@pytest.mark.parametrize("method", [LocalSGD(period=1), EASGD(period=1, pull=0.5)], ids=str)
def test_half_precision_parameters_are_averaged_in_fp32(on_ranks: Ranks, method: Method) -> None:
    """Ranks add 1, 2, 3.. units in the last place to a common start; the mean is rounded once."""

    def body(comm: Communicator) -> tuple[Any, ...]:
        model = nn.Linear(7, 1).bfloat16()
        vector = ParameterVector(model)
        run = method.build(comm, vector, torch.optim.SGD(vector.parameters, 0.1))
        vector.data.fill_(1 + (comm.rank + 1) * 2**-7)
        run.after_step()
        return run.center.dtype, vector.data.dtype, run.center[0].item()

    mean = 1 + 2**-7 * (on_ranks.size + 1) / 2
    for center_dtype, dtype, value in on_ranks(body):
        assert (center_dtype, dtype) == (torch.float32, torch.bfloat16)
        assert isinstance(method, EASGD) or value == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("name", [*kinds("averages"), *having("shares")])
def test_a_round_is_one_small_gather_and_one_message(on_ranks: Ranks, name: str) -> None:
    """Payload of a round: 10 + K numbers, and P parameters. Gradients: what the oracle says, and one last word."""
    world, ours = on_ranks.size, METHODS[name].ours
    averages, levels = is_(name, "averages"), is_(name, "levels")

    def body(comm: Communicator) -> tuple[dict[str, int], dict[str, int], dict[str, float]]:
        run_method(comm, ours, steps=8)
        return dict(comm.meter.calls), dict(comm.meter.payload_bytes), dict(comm.meter.bytes_sent)

    columns = (4 if is_(name, "layers") else 1) if averages else 0
    big, rounds = ("center", 6 if levels else 2) if averages else ("gradient", 8)  # two of groups for each of all ranks
    words = rounds if averages else 1
    one_rank_s = averages and (is_(name, "leader") or world == 1)
    for calls, payload, sent in on_ranks(body):
        assert calls["control"] == words
        assert payload["control"] == words * 8 * (10 + columns)
        assert calls[big] == rounds if averages else calls[big] > rounds  # in buckets
        messages = [("broadcast" if one_rank_s else "allreduce", rounds * 8 * 31)]
        if isinstance(oracle := METHODS[name].oracle, ref.DataParallel):
            messages = [m for step in range(rounds) for m in oracle.messages(NET.shapes, world, 8, step)]
        assert payload[big] == sum(n for _, n in messages)
        if levels:  # among fewer ranks
            continue
        assert sent[big] == pytest.approx(sum(ref.bytes_sent(verb, n, world) for verb, n in messages))
        assert sent["control"] == pytest.approx(ref.bytes_sent("allgather", payload["control"], world))


@pytest.mark.parametrize(
    ("name", "buffers"), [*((name, "average") for name in plain()), *((name, "local") for name in RULES)]
)
def test_no_allocation_of_size_p_after_the_first_round(name: str, buffers: Any, tmp_path: Path) -> None:
    """No tensor as large as all parameters; a gradient or momentum of one layer may be made."""
    method = METHODS[name].ours
    if is_(name, "averages"):
        momentum = "average" if buffers == "average" else "keep"
        method = replace(method, period=2, buffers=buffers, local_momentum=momentum)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(5)), nn.BatchNorm1d(40))
    vector = ParameterVector(model)
    optimizer = torch.optim.SGD(vector.parameters, 0.1, momentum=0.9)
    inputs = torch.randn(3, 40)
    run = method.build(SingleCommunicator(), vector, optimizer, lambda: model(inputs).square().mean())

    closure = run.closure(lambda: model(inputs).square().mean())

    def step() -> None:
        run.after_step(optimizer.step(closure))

    for _ in range(2):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(4):
            step()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    made = [bytes_ for e in events if e.get("name") == "[memory]" and (bytes_ := e["args"]["Bytes"]) > 0]
    layer = 40 * 40 * 4
    assert len(made) > 20 and max(made) >= layer  # it does measure
    assert max(made) < 2 * layer < 4 * len(vector)
