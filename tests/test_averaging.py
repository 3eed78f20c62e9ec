"""Weight rules and the averager: identities T1 to T8 of the specification, on simulated ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

from hpc_grawa import EASGD, LGRAWA, LSGD, LocalLGRAWA, LocalSGD, ParameterVector, Run
from hpc_grawa.averaging import Equal
from hpc_grawa.averaging.averager import Averager, argmin, inverse, pull
from hpc_grawa.averaging.riders import LocalMomentum, RunningStatistics
from hpc_grawa.comm import Communicator, simulate
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.errors import ConfigError, NonFinite
from hpc_grawa.methods import AveragingMethod, Level, Probe
from hpc_grawa.optim.parts import Combined
from hpc_grawa.periods import Period
from hpc_grawa.vector import Layers

RULES = {
    "inverse": inverse,
    "inverse square": lambda s: inverse(s, power=2.0),
    "power 0": lambda s: inverse(s, power=0.0),
    "argmin": argmin,
}
ORACLES = {
    "inverse": ref.inverse,
    "inverse square": lambda s: ref.inverse(s, power=2.0),
    "power 0": lambda s: ref.inverse(s, power=0.0),
    "argmin": ref.argmin,
}
positive = st.floats(1e-30, 1e30)
anything = st.one_of(positive, st.just(0.0), st.just(math.inf), st.just(math.nan))


def tables(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    """Scores [W, K] of which each column has a finite one."""
    shapes = st.tuples(st.integers(1, 6), st.integers(1, 4))
    drawn = shapes.flatmap(lambda shape: arrays.arrays(np.float64, shape, elements=elements))
    return drawn.filter(lambda s: bool(np.isfinite(s).any(0).all())).map(torch.from_numpy)


@pytest.mark.parametrize("rule", RULES)
@given(scores=tables(anything))
def test_t1_weights_are_a_partition_of_one_and_follow_the_oracle(rule: str, scores: Tensor) -> None:
    weights = RULES[rule](scores)
    assert weights.shape == scores.shape and weights.dtype == torch.float64
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(scores.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)
    assert (weights[~scores.isfinite()] == 0).all()
    np.testing.assert_allclose(weights, ORACLES[rule](scores.numpy()), rtol=1e-12, atol=1e-300)


@given(scores=tables(anything), seed=st.integers(0, 99), power=st.sampled_from([0.0, 1.0, 2.0]))
def test_columns_of_roundoff_on_all_ranks_are_uniform(scores: Tensor, seed: int, power: float) -> None:
    """A minus sign says that a norm is round-off; it matters only where all finite ones of a column have it."""
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    weights = inverse(torch.where(noise, -scores.abs(), scores).where(scores.isfinite(), scores), power)
    np.testing.assert_allclose(weights, ref.inverse(scores.numpy(), power, noise.numpy()), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("rule", RULES)
@given(scores=tables(positive), factor=st.floats(1e-20, 1e20), seed=st.integers(0, 99))
def test_t1_weights_ignore_scale_and_follow_permutations(rule: str, scores: Tensor, factor: float, seed: int) -> None:
    weights = RULES[rule](scores)
    if rule != "argmin" or (scores * factor).unique().numel() == scores.unique().numel():  # rounding may make ties
        torch.testing.assert_close(RULES[rule](scores * factor), weights, rtol=1e-9, atol=1e-300)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    if rule != "argmin" or all(column.unique().numel() == len(column) for column in scores.T):  # ties go by rank
        torch.testing.assert_close(RULES[rule](scores[order]), weights[order], rtol=1e-12, atol=0)


@given(world=st.integers(1, 9), score=positive, power=st.floats(0, 3))
def test_t2_equal_scores_give_the_mean(world: int, score: float, power: float) -> None:
    assert (inverse(torch.full((world, 2), score, dtype=torch.float64), power) == 1 / world).all()


@pytest.mark.parametrize(
    ("scores", "weights"),
    [
        ((1, 1, 1, 10), (10 / 31, 10 / 31, 10 / 31, 1 / 31)),
        ((1, 1, 1, 0), (0, 0, 0, 1)),
        ((0, 0, 1, 1), (1 / 2, 1 / 2, 0, 0)),
        ((math.nan, 1, 1, 1), (0, 1 / 3, 1 / 3, 1 / 3)),
        ((math.inf, 1, 3, math.nan), (0, 3 / 4, 1 / 4, 0)),
        ((0, math.nan, math.inf, 5), (1, 0, 0, 0)),
        ((1e-300, 1e300), (1, 0)),
        ((5e-324, 5e-324), (1 / 2, 1 / 2)),
    ],
)
def test_t3_limits_of_the_inverse_rule(scores: tuple[float, ...], weights: tuple[float, ...]) -> None:
    got = inverse(torch.tensor(scores, dtype=torch.float64)[:, None]).flatten()
    torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-12)
    assert scores != (1, 1, 1, 10) or round(got[3].item(), 5) == 0.03226


def test_power_0_weighs_all_finite_ranks_alike_whatever_they_say() -> None:
    scores = torch.tensor([[0.0, math.inf], [1.0, 2.0], [math.nan, 0.0]], dtype=torch.float64)
    assert inverse(scores, power=0.0).tolist() == [[0.5, 0], [0.5, 0.5], [0, 0.5]]


def test_inverse_weighs_each_column_by_itself() -> None:
    scores = torch.tensor([[1.0, 0.0, 2.0], [3.0, 4.0, math.nan]], dtype=torch.float64)
    assert inverse(scores).tolist() == [[0.75, 1.0, 1.0], [0.25, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("scores", "weights"),
    [
        ((math.inf, math.inf, math.inf), (1 / 3, 1 / 3, 1 / 3)),
        ((math.inf, 2, 0), (0, 0, 1)),
        ((math.inf, math.nan, 2), (0, 0, 1)),
        ((-1e-9, -1e-12, -0.0), (1 / 3, 1 / 3, 1 / 3)),
        ((-1e-9, -3e-9, math.inf), (1 / 2, 1 / 2, 0)),
        ((-1.0, -3.0, 1.0), (3 / 7, 1 / 7, 3 / 7)),  # no round-off on the last
        ((-0.0, 1.0, 1.0), (1, 0, 0)),
    ],
)
def test_layers_without_gradients_and_of_roundoff(scores: tuple[float, ...], weights: tuple[float, ...]) -> None:
    got = inverse(torch.tensor(scores, dtype=torch.float64)[:, None]).flatten()
    torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_no_rank_left_is_an_error(rule: str) -> None:
    with pytest.raises(NonFinite, match="no rank has a finite score for layer 0 of 2"):
        RULES[rule](torch.empty(0, 2, dtype=torch.float64))


def test_argmin_gives_ties_to_the_lowest_rank() -> None:
    scores = torch.tensor([[math.nan, 2.0], [1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert argmin(scores).tolist() == [[0, 0], [1, 0], [0, 1]]


@pytest.mark.parametrize("rule", RULES)
def test_no_finite_score_in_a_column_is_an_error(rule: str) -> None:
    scores = torch.tensor([[1.0, math.nan], [math.nan, math.inf]], dtype=torch.float64)
    with pytest.raises(NonFinite, match="no rank has a finite score for layer 1 of 2"):
        RULES[rule](scores)


# ---------------------------------------------------------------------------------------------------------
# The pull.
# ---------------------------------------------------------------------------------------------------------

vectors = arrays.arrays(np.float64, 5, elements=st.floats(-1e6, 1e6)).map(torch.from_numpy)


@given(x=vectors, c=vectors, amount=st.floats(0, 1))
def test_t4_a_pull_shortens_the_distance_to_the_center(x: Tensor, c: Tensor, amount: float) -> None:
    moved = x.clone()
    pull(moved, c, amount)
    torch.testing.assert_close(moved - c, (1 - amount) * (x - c), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_t4_both_ends_of_the_pull_are_exact(dtype: torch.dtype) -> None:
    x = torch.tensor([-0.0, 1.0, 3e38, -1e-30], dtype=dtype)
    c = torch.tensor([1.0, -0.0, -3e38, 0.1], dtype=torch.promote_types(dtype, torch.float32))
    for amount, expected in ((0.0, x.clone()), (1.0, c.to(dtype))):
        moved = x.clone()
        pull(moved, c, amount)
        integers = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(moved.view(integers), expected.view(integers))  # -0 is not 0


def test_t10_a_healed_vector_is_the_center_whatever_it_was() -> None:
    def body(comm: Communicator) -> list[float]:
        vector = vector_of(np.array([math.nan, math.inf, 1, 1, 1, 1]))
        averager = Averager(comm, vector, 0.1)
        averager.center = torch.arange(6.0, dtype=torch.float64)
        averager.heal()
        return vector.data.tolist()

    assert simulate(1, body) == [[0, 1, 2, 3, 4, 5]]


def test_a_pull_of_half_precision_is_computed_in_fp32() -> None:
    x, c = torch.full((3,), 1.0, dtype=torch.bfloat16), torch.full((3,), 1 + 1.4 * 2**-7)
    pull(x, c, 0.5)
    assert x.tolist() == [1 + 2**-7] * 3  # 1 + .7 · 2⁻⁷ rounded once; had the center been rounded first, it would be 1


# ---------------------------------------------------------------------------------------------------------
# The averager on simulated ranks.
# ---------------------------------------------------------------------------------------------------------

SIZES = (3, 1, 2)
LAYERS = Layers(("a", "b", "c"), (0, 1, 2))
SPANS = [(0, 3), (3, 1), (4, 2)]


def vector_of(x: np.ndarray[Any, Any]) -> ParameterVector:
    model = nn.ParameterList([nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in SIZES])
    vector = ParameterVector(model)
    vector.data.copy_(torch.from_numpy(x))
    return vector


def average(x: np.ndarray[Any, Any], weights: Tensor, amount: float) -> tuple[np.ndarray[Any, Any], ...]:
    """Parameters [W, P] after one round with these weights, and each rank's center [W, P]."""
    alive = torch.ones(len(x), dtype=torch.bool)

    def body(comm: Communicator) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        vector = vector_of(x[comm.rank])
        averager = Averager(comm, vector, amount, LAYERS)
        averager.start(vector.data, weights, alive)
        averager.finish(vector.data)
        assert averager.center is not None
        return vector.data.numpy(), averager.center.numpy()

    after, center = zip(*simulate(len(x), body), strict=True)
    return np.array(after), np.array(center)


worlds = st.integers(1, 4).flatmap(
    lambda w: st.tuples(
        arrays.arrays(np.float64, (w, sum(SIZES)), elements=st.floats(-100, 100)),
        arrays.arrays(np.float64, (w, len(SIZES)), elements=st.floats(0.1, 100)),
    )
)


@given(world=worlds, amount=st.floats(0, 1), columns=st.sampled_from([1, len(SIZES)]))
def test_t4_a_round_has_the_weighted_center_and_keeps_it(world: Any, amount: float, columns: int) -> None:
    x, scores = world
    weights = inverse(torch.from_numpy(scores[:, :columns]))
    spans = SPANS if columns > 1 else [(0, sum(SIZES))]
    after, centers = average(x, weights, amount)
    expected = ref.weighted_center(x, weights.numpy(), spans)
    np.testing.assert_allclose(centers, np.broadcast_to(expected, x.shape), rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(after, (1 - amount) * x + amount * expected, rtol=1e-12, atol=1e-11)
    kept = ref.weighted_center(after, weights.numpy(), spans)
    np.testing.assert_allclose(kept, expected, rtol=1e-12, atol=1e-11)


@given(world=worlds)
def test_t2_one_worker_and_equal_workers_stay_bit_for_bit(world: Any) -> None:
    x, scores = world
    weights = inverse(torch.from_numpy(scores))
    after, _ = average(x[:1], torch.ones(1, 3, dtype=torch.float64), 1.0)
    assert (after == x[:1]).all()
    equal = np.repeat(x[:1], len(x), 0)
    after, _ = average(equal, weights, 0.3)
    np.testing.assert_allclose(after, equal, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_one_hot_weights_send_the_leaders_vector_bit_for_bit(weights: tuple[float, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((3, sum(SIZES)))
    leader = weights.index(1.0)
    for columns in (1, 3):
        table = torch.tensor(weights, dtype=torch.float64)[:, None].expand(3, columns).contiguous()
        after, centers = average(x, table, 1.0)
        assert (after == x[leader]).all() and (centers == x[leader]).all()


convex = st.sampled_from(["quadratic", "absolute", "log-cosh", "exponential"])


def convex_function(kind: str, x: np.ndarray[Any, Any]) -> float:
    scale = np.linspace(0.5, 2, x.size)
    functions = {
        "quadratic": lambda: np.sum(scale * x**2),
        "absolute": lambda: np.sum(np.abs(x - 3)),
        "log-cosh": lambda: np.sum(np.logaddexp(x, -x)),
        "exponential": lambda: np.sum(np.exp(x / 50)),
    }
    return float(functions[kind]())


@given(world=worlds, kind=convex)
def test_t5_a_convex_function_is_below_its_weighted_mean_at_the_center(world: Any, kind: str) -> None:
    x, scores = world
    weights = inverse(torch.from_numpy(scores[:, :1]))
    _, centers = average(x, weights, 0.5)
    mean = sum(b * convex_function(kind, row) for b, row in zip(weights.flatten().tolist(), x, strict=True))
    assert convex_function(kind, centers[0]) <= mean * (1 + 1e-12) + 1e-9


@given(world=worlds, power=st.sampled_from([1.0, 1.5, 3.0]), q=st.sampled_from([1.0, 2.0]))
def test_t6_radial_convex_functions_are_below_their_plain_mean(world: Any, power: float, q: float) -> None:
    """f(x) = |x|^p: its gradient norm p |x|^(p-1) grows with f, so flat ranks are low ranks."""
    x, _ = world
    radius = np.linalg.norm(x, axis=1)
    weights = inverse(torch.from_numpy(power * radius ** (power - 1))[:, None], q)
    _, centers = average(x, weights, 0.5)
    assert np.linalg.norm(centers[0]) ** power <= np.mean(radius**power) * (1 + 1e-12) + 1e-9


@given(world=worlds)
def test_t7_isotropic_quadratic_is_at_least_as_flat_as_the_harmonic_mean(world: Any) -> None:
    x, _ = world
    norms = np.linalg.norm(x, axis=1)  # of the gradient of |x|²/2
    _, centers = average(x, inverse(torch.from_numpy(norms)[:, None]), 0.5)
    harmonic = 0.0 if (norms == 0).any() else len(norms) / np.sum(1 / norms)
    assert np.linalg.norm(centers[0]) <= harmonic * (1 + 1e-12) + 1e-9


@given(arrays.arrays(np.float64, 6, elements=st.floats(-1e3, 1e3)))
def test_t8_the_sum_of_layer_norms_is_between_the_norm_and_root_l_times_it(gradient: np.ndarray[Any, Any]) -> None:
    norms = LAYERS.norms(torch.from_numpy(gradient).split(SIZES))
    whole = np.linalg.norm(gradient)
    assert whole * (1 - 1e-12) <= norms.sum().item() <= math.sqrt(len(LAYERS)) * whole * (1 + 1e-12) + 1e-12


# ---------------------------------------------------------------------------------------------------------
# What rides in the same message.
# ---------------------------------------------------------------------------------------------------------


def test_running_statistics_are_pooled() -> None:
    """The mean of means and the variance of all ranks' numbers together; ranks that are not finite do not count."""
    data = [torch.from_numpy(np.random.default_rng(m).standard_normal((50, 3))) * (m + 1) for m in range(3)]
    alive = torch.tensor([True, False, True])

    def body(comm: Communicator) -> tuple[Tensor, Tensor, int]:
        norm = nn.BatchNorm1d(3, dtype=torch.float64)
        assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
        norm.running_mean.copy_(data[comm.rank].mean(0) if alive[comm.rank] else torch.nan)
        norm.running_var.copy_(data[comm.rank].var(0, correction=0) if alive[comm.rank] else torch.nan)
        norm.num_batches_tracked.fill_(comm.rank)
        vector = ParameterVector(norm)
        averager = Averager(comm, vector, 0.5)
        averager.riders = [RunningStatistics(norm)]
        # All weight on rank 2: statistics are averaged uniformly all the same.
        averager.start(vector.data, torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64), alive)
        averager.finish(vector.data)
        return norm.running_mean, norm.running_var, int(norm.num_batches_tracked)

    pooled = torch.cat([data[0], data[2]])
    for rank, (mean, var, batches) in enumerate(simulate(3, body)):
        torch.testing.assert_close(mean, pooled.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(var, pooled.var(0, correction=0), rtol=1e-12, atol=1e-12)
        assert batches == rank  # integers are never averaged


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_momentum_rides_wherever_a_rank_has_it(kind: str) -> None:
    """Rank 0 has used parameter 0 only: the momentum that it lacks counts as zero, in both rounds."""

    def body(comm: Communicator) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        vector = vector_of(np.zeros(6))
        make: Any = {"SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "Adam": torch.optim.Adam}[kind]
        optimizer = make(vector.parameters)
        for i, p in enumerate(vector.parameters):
            p.grad = torch.full_like(p, 1.0 + comm.rank + i) if i == 0 or comm.rank > 0 else None
        optimizer.step()
        before = [{k: t.clone() for k, t in optimizer.state[p].items()} for p in vector.parameters]
        averager = Averager(comm, vector, 0.0)
        averager.riders = [LocalMomentum(vector, optimizer)]
        for number in (1, 2):
            averager.agree(number)
            averager.start(vector.data, torch.full((3, 1), 1 / 3, dtype=torch.float64), torch.ones(3, dtype=torch.bool))
            averager.finish(vector.data)
        return before, [dict(optimizer.state[p]) for p in vector.parameters]

    results = simulate(3, body)
    keys = {"SGD": ["momentum_buffer"], "Adam": ["exp_avg", "exp_avg_sq"]}[kind]
    for key in keys:
        for i in range(len(SIZES)):
            before = [own[i].get(key, torch.zeros(SIZES[i], dtype=torch.float64)) for own, _ in results]
            mean = torch.stack(before).mean(0)
            for rank, (_, after) in enumerate(results):
                if i == 0 or rank > 0:
                    torch.testing.assert_close(after[i][key], mean if i == 0 else mean * 2 / 3, rtol=1e-12, atol=0)
                else:
                    assert key not in after[i]


def momenta_ride(comm: Communicator, make: Callable[..., Any], steps: int, reach: Callable[[int, int], bool]) -> Any:
    """What an optimizer holds; parameter i has in step t the gradient 1 + rank + i, if reach(t, i), then is a round."""
    vector = vector_of(np.zeros(6))
    optimizer = make(*vector.parameters)
    run = LocalSGD(period=1, local_momentum="average").build(comm, vector, optimizer)
    for step in range(steps):
        for i, p in enumerate(vector.parameters):
            p.grad = torch.full_like(p, 1.0 + comm.rank + i) if reach(step, i) else None
        optimizer.step()
        run.after_step()
    return [optimizer.state.get(p, {}) for p in vector.parameters]


def test_momentum_rides_from_the_first_step_that_any_rank_has_not_left_out() -> None:
    """As a loop leaves out that of a loss which is no number: in step 0 all, in step 1 all but rank 0."""

    def body(comm: Communicator) -> list[float]:
        states = momenta_ride(
            comm, lambda *p: torch.optim.SGD(p, 0.1, momentum=0.9), 4, lambda step, i: step > min(comm.rank, 1)
        )
        return [state["momentum_buffer"][0].item() for state in states]

    momenta = np.full((3, 3), np.nan)
    for step in range(4):
        for rank in range(3):
            if step > min(rank, 1):
                momenta[rank] = 0.9 * np.nan_to_num(momenta[rank]) + 1 + rank + np.arange(3)
        momenta = np.where(np.isnan(momenta), np.nan, np.nan_to_num(momenta).mean(0))
    np.testing.assert_allclose(simulate(3, body), momenta, rtol=1e-12)


@pytest.mark.parametrize("lacks", [0, 1])
def test_momenta_of_two_kinds_ride_where_the_data_of_a_rank_reach_one_kind(lacks: int) -> None:
    """Of a parameter that no rank's data have reached yet those of its group, once it has some."""

    def two(a: Tensor, b: Tensor, c: Tensor) -> Combined:
        return Combined("two", [torch.optim.SGD([a], 0.1, momentum=0.9), torch.optim.Adam([b, c], 0.1)])

    def body(comm: Communicator) -> Any:
        return momenta_ride(comm, two, 2, lambda step, i: step == 1 if i == 2 else i != lacks or comm.rank > 0)

    first, second, third = simulate(3, body)
    for i, keys in enumerate((["momentum_buffer"], ["exp_avg", "exp_avg_sq"], ["exp_avg", "exp_avg_sq"])):
        for key in keys:
            assert torch.equal(second[i][key], third[i][key]) and second[i][key].any()
            assert key not in first[i] if i == lacks else torch.equal(first[i][key], second[i][key])


def test_all_ranks_hear_of_a_state_that_one_cannot_average() -> None:
    def body(comm: Communicator) -> None:
        run = own_run(comm, LocalSGD(period=2, local_momentum="average"))
        if comm.rank == 1:
            run.optimizer.state[run.vector.parameters[0]]["codes"] = torch.zeros(3, dtype=torch.uint8)
        with pytest.raises(ConfigError, match=r"average: the optimizer's state 'codes' is of torch\.uint8"):
            steps(run, 2)

    simulate(3, body)


def test_momentum_of_a_sparse_gradient_does_not_ride() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    vector, optimizer = ParameterVector(model), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    with pytest.raises(ConfigError, match=r"local_momentum is average: .* is sparse, .* must be keep or reset"):
        LocalMomentum(vector, optimizer).agree(SingleCommunicator())


# ---------------------------------------------------------------------------------------------------------
# What an averager owns.
# ---------------------------------------------------------------------------------------------------------

MEAN = torch.full((3, 1), 1 / 3, dtype=torch.float64)
ALL = torch.ones(3, dtype=torch.bool)


class Smoothed(Averager):
    """Averages not the parameters y but a vector z that follows them, and stands for a third one, x."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.comm, run.vector, 0.5)
        self.own = {name: run.vector.data.clone() for name in "zx"}

    @property
    def source(self) -> Tensor:
        return self.own["z"]

    @property
    def local(self) -> Tensor:
        return self.own["x"]

    def after_step(self, prox: float) -> None:
        self.source.lerp_(self.vector.data, 0.25)

    def _mix(self, x: Tensor, average: Tensor) -> None:
        super()._mix(x, average)
        self.local.copy_(x)


class Heavy(Averager):
    """Moves a center that all ranks keep with momentum; they become the center."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.comm, run.vector, 1.0)
        self.center = self.kept["center"] = run.vector.data.clone()
        self.kept["u"] = torch.zeros_like(self.center)

    def _mix(self, x: Tensor, average: Tensor) -> None:
        center, u = self.kept["center"], self.kept["u"]
        u.mul_(0.5).add_(center - average)
        center.sub_(u)
        pull(x, center, self.pull)


class Comparing(Averager):
    """Moves by what is new in the center."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.comm, run.vector, 1.0)
        self.keeps_center = True

    def _mix(self, x: Tensor, average: Tensor) -> None:
        if self.center is not None:
            assert not torch.equal(self.center, average)
            x.add_(average - self.center)
        self.center = average


@dataclass(kw_only=True)
class Own(AveragingMethod):
    kind: Any = Smoothed
    period: int | Period = 2
    prox: float = 0.0

    def _level(self, run: Run, comm: Communicator, probe: Probe | None) -> Level:
        return Level(self.kind(run), Equal(), inverse, self.prox)


def own_run(comm: Communicator, method: AveragingMethod) -> Run:
    vector = vector_of(np.arange(6.0))
    return method.build(comm, vector, torch.optim.SGD(vector.parameters, 0.1, momentum=0.9))


def steps(run: Run, count: int, poison: Callable[[int], None] = lambda step: None) -> list[tuple[int, ...]]:
    """Each rank goes its own way; who was healed in each round."""
    healed: list[tuple[int, ...]] = []
    run.synchronizers[-1].on_round = lambda r: healed.append(r.healed)
    for step in range(count):
        for i, p in enumerate(run.vector.parameters):
            p.grad = torch.full_like(p, math.sin(1.0 + i + step + run.comm.rank))
        run.optimizer.step()
        poison(step)
        run.after_step()
    return healed


@pytest.mark.parametrize("keeps", [True, False])
def test_a_center_lasts_until_the_next_one_is_there(keeps: bool) -> None:
    """At the price of a second message, the two of which take turns."""

    def body(comm: Communicator) -> set[int]:
        vector = vector_of(np.full(6, float(comm.rank)))
        averager = Averager(comm, vector, 0.0)
        averager.keeps_center = keeps
        where = set()
        for n in range(1, 5):
            center = averager.center
            vector.data.fill_(n * comm.rank)
            averager.start(vector.data, MEAN, ALL)
            if center is not None and keeps:
                assert (center == n - 1).all() and averager.center is center
            averager.finish(vector.data)
            assert averager.center is not None
            torch.testing.assert_close(averager.center, torch.full_like(vector.data, n))
            where.add(averager.center.data_ptr())
        return where

    assert [len(where) for where in simulate(3, body)] == [2 if keeps else 1] * 3


@pytest.mark.parametrize(
    ("method", "messages"),
    [
        (LGRAWA(prox=0.1), 2),
        (LGRAWA(prox=0.0), 1),
        (LocalSGD(), 1),
        (EASGD(), 1),
        (LSGD(prox=0.1), 2),
        (Own(kind=Comparing), 2),
        (Own(kind=Heavy, prox=0.1), 1),
    ],
    ids=["LGRAWA", "LGRAWA without proximity", "LocalSGD", "EASGD", "LSGD", "one's own", "a center with momentum"],
)
def test_a_second_message_is_there_only_for_a_center_that_is_needed(method: AveragingMethod, messages: int) -> None:
    def body(comm: Communicator) -> int:
        vector = vector_of(np.arange(6.0))
        optimizer = torch.optim.SGD(vector.parameters, 0.1)
        run = replace(method, period=1).build(comm, vector, optimizer, lambda: vector.parameters[0].sum())
        for _ in range(4):
            vector.data.add_(1.0)
            run.after_step(torch.zeros(()))
        return len(run.synchronizers[0].averager._messages)

    assert simulate(2, body) == [messages] * 2


def test_a_round_in_two_halves_is_the_round() -> None:
    """Between them steps may be made, which are pulled to the center that there was."""

    def body(comm: Communicator) -> list[Tensor]:
        found = []
        for halves in (False, True):
            run = own_run(comm, LocalLGRAWA(period=10, pull=0.5, prox=0.3))
            (synchronizer,) = run.synchronizers
            for _ in range(3):
                steps(run, 2)
                if halves:
                    synchronizer.open()
                    before = None if synchronizer.averager.center is None else synchronizer.averager.center.clone()
                    if before is not None:
                        x = run.vector.data.clone()
                        synchronizer.averager.after_step(0.5)
                        torch.testing.assert_close(run.vector.data, (x + before) / 2)
                        run.vector.data.copy_(x)
                    synchronizer.close()
                    synchronizer.close()  # what is closed has no second half
                else:
                    synchronizer.round()
            found.append(run.vector.data.clone())
        return found

    for whole, halves in simulate(3, body):
        assert torch.equal(whole, halves)


@pytest.mark.parametrize("spoilt", ["source", "local", "parameters"])
def test_a_rank_is_healed_whichever_of_its_vectors_is_not_finite(spoilt: str) -> None:
    def body(comm: Communicator) -> list[tuple[int, ...]]:
        run = own_run(comm, Own())
        averager = run.synchronizers[0].averager

        def poison(step: int) -> None:
            if step == 3 and comm.rank == 1:
                {"source": averager.source, "local": averager.local, "parameters": run.vector.data}[spoilt][2] = (
                    math.nan
                )

        healed = steps(run, 4, poison)
        assert run.local is averager.local and averager.finite
        if comm.rank == 1:
            for x in (run.vector.data, averager.source, averager.local):
                assert torch.equal(x, run.center)
        return healed + steps(run, 2)

    assert simulate(3, body) == [[(), (1,), ()]] * 3


@pytest.mark.parametrize("method", [EASGD(period=2), Own(kind=Heavy)], ids=["EASGD", "a center with momentum"])
@pytest.mark.parametrize("strange", [0, 2])
def test_what_all_ranks_keep_is_sent_to_one_that_has_lost_it(method: AveragingMethod, strange: int) -> None:
    def body(comm: Communicator) -> tuple[list[tuple[int, ...]], list[list[float]], int]:
        run = own_run(comm, method)
        averager = run.synchronizers[0].averager

        def poison(step: int) -> None:
            if step == 3 and comm.rank == strange:
                for t in averager.kept.values():
                    t[1] = math.nan

        healed = steps(run, 8, poison)
        assert averager.intact and averager.finite and run.local is run.vector.data
        return healed, [t.tolist() for t in averager.kept.values()], comm.meter.calls["center"]

    results = simulate(3, body)
    assert results == results[:1] * 3
    healed, kept, calls = results[0]
    assert healed == [(), (strange,), (), ()] and calls == 4 + len(kept)


def test_a_state_is_taken_over_in_place_and_a_restart_forgets_it() -> None:
    def body(comm: Communicator) -> None:
        run, other = (own_run(comm, Own(kind=Heavy)) for _ in range(2))
        steps(run, 4)
        state = copy.deepcopy(run.state_dict())
        assert set(state["synchronizers"][0]["averager"]) == {"center", "riding", "u"}
        averager = other.synchronizers[0].averager
        held = averager.center
        assert held is not None
        other.load_state_dict(state)
        assert averager.center is held and torch.equal(held, run.center)
        assert torch.equal(averager.kept["u"], run.synchronizers[0].averager.kept["u"])
        other.vector.data.copy_(run.vector.data)
        for _ in range(2):
            steps(run, 2)
            steps(other, 2)
        other.vector.data.fill_(2.0)
        averager.restart()
        assert averager.center is held and (held == 2).all() and not averager.kept["u"].any()

    simulate(3, body)


def test_vectors_of_a_rank_are_saved_and_begin_at_its_parameters() -> None:
    def body(comm: Communicator) -> None:
        run, other = (own_run(comm, Own()) for _ in range(2))
        steps(run, 3)
        states = copy.deepcopy((run.vector.data, run.state_dict(), run.optimizer.state_dict()))
        other.vector.data.copy_(states[0])
        other.load_state_dict(states[1])
        other.optimizer.load_state_dict(states[2])
        (one,), (two,) = ([s.averager for s in r.synchronizers] for r in (run, other))
        for count in (0, 3):
            for r in (run, other):
                for step in range(count):
                    for p in r.vector.parameters:
                        p.grad = torch.full_like(p, math.sin(1.0 + step + comm.rank))
                    r.optimizer.step()
                    r.after_step()
            assert torch.equal(one.source, two.source) and torch.equal(one.local, two.local)
            assert not torch.equal(one.source, run.vector.data)
        other.start_from(run.state_dict())
        assert all(torch.equal(x, other.vector.data) for x in (two.source, two.local))

    simulate(3, body)
