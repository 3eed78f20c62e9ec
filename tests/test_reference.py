"""The oracle's own tests: identities and figures of the mathematics, none of them about the package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference as ref
from reference import (
    EASGD,
    GRAWA,
    LGRAWA,
    LSGD,
    METHODS,
    MGRAWA,
    SGD,
    Array,
    DataParallel,
    Facts,
    LocalSGD,
    Method,
    Problem,
    Replay,
    ScoreMomentum,
    TwoLayer,
    Vincent,
    World,
    argmin,
    inverse,
    lerp,
    replay,
    uniform,
    weighted_center,
)

NET = TwoLayer(d=3, h=4, o=2)
CLOSE = 1e-12


def batch(rank: int, step: int) -> tuple[Any, ...]:
    return NET.random_batch(5, 1, rank, step)


def probe(rank: int, round_: int) -> tuple[Any, ...]:
    return NET.random_batch(5, 2, rank, round_)


def nesterov() -> SGD:
    return SGD(momentum=0.9, nesterov=True, weight_decay=1e-2)


def starts(world_size: int) -> Array:
    return np.array([NET.initial(seed) for seed in range(world_size)])


def run(method: Method, world_size: int = 4, steps: int = 12, period: Any = 4, **more: Any) -> Replay:
    arguments: dict[str, Any] = {"lr": 0.1, "optimizer": nesterov, "probe": probe, "batch": batch} | more
    problem = arguments.pop("problem", NET)
    begin = arguments.pop("starts", starts(world_size))
    return replay(method, problem, begin, steps=steps, period=period, **arguments)


def without_prox(name: str) -> Method:
    """The method of this name as it averages by default, without proximity."""
    method = METHODS[name]()
    if method.prox:
        method.prox = 0.0
    return method


def assert_close(a: Any, b: Any, tolerance: float = CLOSE) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def random_scores(world_size: int, columns: int, seed: int) -> Array:
    return np.exp(2 * np.random.default_rng(seed).standard_normal((world_size, columns)))


RULES = [uniform, inverse, lambda scores: inverse(scores, 2.0), argmin]
AVERAGING = [name for name in METHODS if name != "DataParallel"]
PULLING = [name for name in AVERAGING if name != "EASGD"]  # those with x <- lerp(x, c, pull)
GRADIENT_NORMS = ["GRAWA", "MGRAWA", "LGRAWA"]


# -- weight rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(10))
def test_weights_are_a_mean_whatever_the_scale_and_order(rule: Any, seed: int) -> None:
    scores = random_scores(5, 3, seed)
    weights = rule(scores)
    assert np.all(weights >= 0)
    assert_close(weights.sum(axis=0), np.ones(3))
    assert_close(rule(1e3 * scores), weights)
    order = np.random.default_rng(seed).permutation(5)
    assert_close(rule(scores[order]), weights[order])


@pytest.mark.parametrize("rule", [uniform, inverse])
def test_equal_scores_give_the_mean(rule: Any) -> None:
    assert_close(rule(np.full((4, 2), 3.7)), np.full((4, 2), 0.25))


@pytest.mark.parametrize("rule", RULES)
def test_one_rank_has_all_the_weight(rule: Any) -> None:
    assert np.all(rule(np.array([[0.3, 0.0, 1e300]])) == 1.0)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((1, 1, 1, 10), (10 / 31, 10 / 31, 10 / 31, 1 / 31)),
        ((1, 1, 1, 0), (0, 0, 0, 1)),
        ((0, 0, 1, 1), (0.5, 0.5, 0, 0)),
        ((math.nan, 1, 1, 1), (0, 1 / 3, 1 / 3, 1 / 3)),
        ((math.inf, 1, 1, math.nan), (0, 0.5, 0.5, 0)),
        ((math.nan, 0, 0, math.inf), (0, 0.5, 0.5, 0)),
        ((5e-324, 5e-324, 1, 1), (0.5, 0.5, 0, 0)),
    ],
)
def test_limits_of_the_inverse_rule(scores: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert_close(inverse(np.array(scores, dtype=float).reshape(-1, 1))[:, 0], expected)
    assert round(1 / 31, 5) == 0.03226


def test_power_two() -> None:
    assert_close(inverse(np.array([[1.0], [2.0], [4.0]]), 2.0)[:, 0], np.array([16, 4, 1]) / 21)


def test_columns_are_weighted_by_themselves() -> None:
    scores = np.array([[1.0, 0.0], [3.0, math.nan]])
    assert_close(inverse(scores), [[0.75, 1.0], [0.25, 0.0]])


def test_argmin_takes_the_lowest_rank_among_equals_and_no_nan() -> None:
    scores = np.array([[math.nan, 2.0], [1.0, 2.0], [1.0, -math.inf]])
    assert argmin(scores).tolist() == [[0, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("rule", RULES)
def test_a_column_without_a_finite_score_is_an_error(rule: Any) -> None:
    with pytest.raises(ValueError, match="column 1"):
        rule(np.array([[1.0, math.nan], [1.0, math.inf]]))


# -- score momentum ----------------------------------------------------------------------------------------


def test_effective_weights_of_three_scores() -> None:
    effective = []
    for t in range(3):
        momentum = ScoreMomentum(0.9**8)
        for s in np.eye(3)[t]:
            result = momentum.update(np.array([[s]]))
        effective.append(result[0, 0])
    assert_close(effective, [0.1147, 0.2664, 0.6189], 5e-5)
    assert_close(sum(effective), 1.0)


def test_constant_scores_stay_and_without_momentum_all_do() -> None:
    constant, raw = ScoreMomentum(0.9**8), ScoreMomentum(0.0)
    for t in range(6):
        assert_close(constant.update(np.full((2, 2), 7.0)), np.full((2, 2), 7.0))
        scores = random_scores(2, 3, t)
        assert np.all(raw.update(scores) == scores)


def test_scores_that_are_not_finite_do_not_enter() -> None:
    momentum, without = ScoreMomentum(0.5), ScoreMomentum(0.5)
    for s in (1.0, math.nan, 3.0, math.inf, 4.0):
        result = momentum.update(np.array([[s, 2.0]]))
        assert math.isfinite(result[0, 0]) == math.isfinite(s)
        assert_close(result[0, 1], 2.0)
    for s in (1.0, 3.0, 4.0):
        expected = without.update(np.array([[s]]))
    assert_close(result[0, 0], expected[0, 0])


def test_reset_forgets_one_rank() -> None:
    momentum = ScoreMomentum(0.5)
    momentum.update(np.array([[1.0], [1.0]]))
    momentum.reset(0)
    assert_close(momentum.update(np.array([[4.0], [4.0]])), [[4.0], [3.0]])


# -- the problem, the optimizer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "x", "arguments"), [(NET, NET.initial(3), batch(0, 0)), (Vincent(), np.array([0.7, 5.0]), ())]
)
def test_gradients_against_differences(problem: Problem, x: Array, arguments: tuple[Any, ...]) -> None:
    _, gradient = problem.loss_and_grad(x, *arguments)
    for i, e in enumerate(1e-6 * np.eye(len(x))):
        above, below = problem.loss_and_grad(x + e, *arguments)[0], problem.loss_and_grad(x - e, *arguments)[0]
        assert gradient[i] == pytest.approx((above - below) / 2e-6, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", ["tensor", "module"])
def test_layers_cover_the_vector_once(kind: str) -> None:
    covered = [i for offset, size in NET.layers[kind] for i in range(offset, offset + size)]
    assert covered == list(range(NET.size))
    assert len(NET.layers[kind]) == {"tensor": 4, "module": 2}[kind]


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"),
    [(0, False, 0), (0, False, 0.01), (0.9, False, 0), (0.9, True, 0), (0.9, True, 0.01), (0.5, False, 0.1)],
)
def test_network_and_sgd_are_those_of_torch(momentum: float, nesterov: bool, weight_decay: float) -> None:
    torch = pytest.importorskip("torch")
    linear, double = torch.nn.Linear, torch.float64
    twin = torch.nn.Sequential(linear(3, 4, dtype=double), torch.nn.Tanh(), linear(4, 2, dtype=double))
    x = NET.initial(0)
    torch.nn.utils.vector_to_parameters(torch.tensor(x), twin.parameters())
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    ours = SGD(momentum, nesterov, weight_decay)
    for step in range(5):
        inputs, targets = batch(0, step)
        loss = torch.nn.functional.cross_entropy(twin(torch.tensor(inputs)), torch.tensor(targets))
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        our_loss, gradient = NET.loss_and_grad(x, inputs, targets)
        x = ours.step(x, gradient, 0.1)
        assert_close(our_loss, loss.item())
        assert_close(x, torch.nn.utils.parameters_to_vector(twin.parameters()).detach().numpy())


# -- a round -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PULLING)
def test_pull_shrinks_the_distance_and_keeps_the_weighted_mean(name: str) -> None:
    method = METHODS[name]()
    result = run(method)
    spans = NET.layers["tensor"] if name == "LGRAWA" else [(0, NET.size)]
    assert len(result.rounds) == 3
    for r in result.rounds:
        assert_close(r.weights.sum(axis=0), np.ones(len(spans)))
        assert_close(r.center, weighted_center(r.before, r.weights, spans))
        assert_close(r.parameters - r.center, (1 - method.pull) * (r.before - r.center))
        assert_close(weighted_center(r.parameters, r.weights, spans), r.center)


@pytest.mark.parametrize("name", ["GRAWA", "MGRAWA", "LGRAWA", "LSGD"])
def test_pull_zero_is_no_round_and_pull_one_is_consensus(name: str) -> None:
    method = without_prox(name)
    method.pull = 0.0
    assert np.all(run(method).parameters == run(LocalSGD(), period=1000, steps=12).rounds[0].before)
    method.pull = 1.0
    for r in run(method).rounds:
        assert np.all(r.parameters == r.center)


@pytest.mark.parametrize("pull", [0.1, 0.5, 0.9])
def test_lerp(pull: float) -> None:
    x, c = NET.initial(0), NET.initial(1)
    assert_close(lerp(x, c, pull), x + pull * (c - x))
    assert np.all(lerp(x, c, 0.0) == x)
    assert np.all(lerp(x, c, 1.0) == c)


@pytest.mark.parametrize("name", [*PULLING, "DataParallel"])
def test_one_rank_is_plain_sgd(name: str) -> None:
    x, optimizer = NET.initial(0), nesterov()
    for step in range(12):
        x = optimizer.step(x, NET.loss_and_grad(x, *batch(0, step))[1], 0.1)
    assert np.all(run(without_prox(name), world_size=1).parameters == x)


@pytest.mark.parametrize("name", [*PULLING, "DataParallel"])
def test_equal_workers_are_one_worker(name: str) -> None:
    same: dict[str, Any] = {"batch": lambda rank, step: batch(0, step), "probe": lambda rank, round_: probe(0, round_)}
    alone, together = run(without_prox(name), 1, **same), run(without_prox(name), 3, **same)
    for row in together.parameters:
        assert_close(row, alone.parameters[0])


def test_gradient_norms_ordered() -> None:
    whole, summed, layered = (run(METHODS[name](), steps=4).rounds[0].raw_scores for name in GRADIENT_NORMS)
    assert layered.shape == (4, 4)
    assert_close(summed[:, 0], layered.sum(axis=1))
    assert_close(whole[:, 0], np.sqrt((layered**2).sum(axis=1)))
    assert np.all(whole <= summed)
    assert np.all(summed <= math.sqrt(4) * whole)
    modules = run(LGRAWA(layer="module"), steps=4).rounds[0].raw_scores
    assert_close(modules[:, 0], np.sqrt(layered[:, 0] ** 2 + layered[:, 1] ** 2))


def test_one_layer_makes_them_all_one() -> None:
    class OneLayer(TwoLayer):
        def __init__(self) -> None:
            super().__init__(3, 4, 2)
            self.layers = {"tensor": [(0, self.size)], "module": [(0, self.size)]}

    a, b, c = (run(METHODS[name](), problem=OneLayer()).parameters for name in GRADIENT_NORMS)
    assert_close(a, b)
    assert_close(b, c)


def test_the_probe_is_taken_after_the_proximity_pull() -> None:
    result = run(GRAWA(prox=0.3, score_momentum=0.0))
    for i, r in enumerate(result.rounds):
        for m in range(4):
            expected = np.linalg.norm(NET.loss_and_grad(r.before[m], *probe(m, i))[1])
            assert r.scores[m, 0] == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("name", ["GRAWA", "MGRAWA", "LGRAWA", "LSGD"])
def test_proximity_pull(name: str) -> None:
    """At learning rate 0 a step moves x by (prox / H) (c - x) and by nothing else, once there is a center."""
    method = METHODS[name](prox=0.2, pull=0.5)  # type: ignore[call-arg]
    result = run(method, lr=0.0, independent=True, steps=7, period=4)
    x = starts(4)
    for step in range(4):
        before = x if step < 3 else result.rounds[0].before
        assert np.all(before == x)
    x, c = result.rounds[0].parameters, result.rounds[0].center
    for step in range(4, 7):
        x = x + 0.2 / 4 * (c - x)  # also in the last round, which has 3 steps
        if step < 6:
            assert_close(result.steps[step].parameters, x)
    assert_close(result.rounds[1].before, x)


# -- what averaging does to convex functions ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_convex_functions_at_the_center(seed: int) -> None:
    """f(c) <= sum_m beta_m f(x_m), here for f = log sum exp."""
    rng = np.random.default_rng(seed)
    x, weights = 3 * rng.standard_normal((5, 6)), inverse(random_scores(5, 1, seed))
    c = weighted_center(x, weights, [(0, 6)])
    values = np.log(np.exp(x).sum(axis=1))
    assert np.log(np.exp(c).sum()) <= (weights[:, 0] * values).sum() + CLOSE


@pytest.mark.parametrize("seed", range(10))
def test_radial_convex_functions_at_the_center(seed: int) -> None:
    """f(x) = phi(|x|), phi convex and increasing, |gradient| = phi'(|x|): f(c) <= mean_m f(x_m)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5, 6)) * np.exp(rng.standard_normal((5, 1)))
    radius = np.linalg.norm(x, axis=1)
    pairs: list[tuple[Any, Any]] = [
        (lambda r: r**2 / 2, lambda r: r),
        (lambda r: r**4, lambda r: 4 * r**3),
        (lambda r: np.log(np.cosh(r)), np.tanh),
        (lambda r: np.sqrt(1 + r**2), lambda r: r / np.sqrt(1 + r**2)),
    ]
    for phi, derivative in pairs:
        for power in (1.0, 2.0):
            c = weighted_center(x, inverse(derivative(radius).reshape(-1, 1), power), [(0, 6)])
            assert phi(np.linalg.norm(c)) <= phi(radius).mean() + CLOSE


@pytest.mark.parametrize("seed", range(10))
def test_isotropic_quadratic_and_the_harmonic_mean(seed: int) -> None:
    """f(x) = |x|^2 / 2 has gradient x: at the center it is no larger than the harmonic mean of the ranks'."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5, 6)) * np.exp(rng.standard_normal((5, 1)))
    norms = np.linalg.norm(x, axis=1)
    c = weighted_center(x, inverse(norms.reshape(-1, 1)), [(0, 6)])
    assert np.linalg.norm(c) <= 5 / np.sum(1 / norms) + CLOSE


# -- methods that are the same -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD, lambda: SGD(0.9), nesterov])
@pytest.mark.parametrize("local_momentum", ["keep", "average"])
def test_local_sgd_of_period_one_is_data_parallel(optimizer: Any, local_momentum: str) -> None:
    a = run(LocalSGD(), period=1, optimizer=optimizer, local_momentum=local_momentum)
    b = run(DataParallel(), optimizer=optimizer)
    for mine, theirs in zip(a.steps, b.steps, strict=True):
        assert_close(mine.parameters, theirs.parameters)
        assert np.all(theirs.parameters == theirs.parameters[0])
    assert b.rounds == []
    assert b.center is None


def test_reset_momentum_of_period_one_is_no_momentum() -> None:
    a = run(LocalSGD(), period=1, optimizer=lambda: SGD(0.9), local_momentum="reset")
    assert_close(a.parameters, run(DataParallel(), optimizer=SGD).parameters)


@pytest.mark.parametrize("base", [GRAWA, MGRAWA, LGRAWA])
def test_equal_scores_and_full_pull_are_local_sgd(base: type[Any]) -> None:
    class EqualScores(base):  # type: ignore[misc]
        def norms(self, world: World, gradient: Array) -> list[float]:
            return [2.5 for _ in super().norms(world, gradient)]

    assert_close(run(EqualScores(pull=1.0, prox=0.0)).parameters, run(LocalSGD()).parameters)


def test_easgd_server_form() -> None:
    """The server form sends Delta_m = alpha (x_m - c) and adds all of them up; the replay uses the mean."""
    beta, world_size = 0.43, 4
    result = run(EASGD(pull=beta), world_size, steps=11, period=4, independent=True)
    x = starts(world_size)
    c = x.mean(axis=0)
    optimizers = [nesterov() for _ in range(world_size)]
    for step in range(11):
        for m in range(world_size):
            x[m] = optimizers[m].step(x[m], NET.loss_and_grad(x[m], *batch(m, step))[1], 0.1)
        if step in (3, 7, 10):
            deltas = [beta / world_size * (x[m] - c) for m in range(world_size)]
            for m in range(world_size):
                x[m] = x[m] - deltas[m]
            c = c + sum(deltas)
            assert_close(result.steps[step].parameters, x)
    assert [r.step for r in result.rounds] == [4, 8, 11]
    assert result.center is not None
    assert_close(result.center, c)


def test_easgd_fixed_point() -> None:
    """Where all ranks and the center agree and the gradient is zero, nothing moves."""
    valley = math.exp(math.pi / 20)
    result = replay(EASGD(), Vincent(), np.full((4, 2), valley), lambda m, t: (), steps=20, lr=1e-3, period=4)
    assert_close(result.parameters, np.full((4, 2), valley))
    assert result.center is not None
    assert_close(result.center, np.full(2, valley))


def test_easgd_starts_its_center_at_the_start() -> None:
    result = run(EASGD(pull=0.4), steps=1, period=1)
    r, c0 = result.rounds[0], NET.initial(0)
    assert_close(r.center, 0.6 * c0 + 0.4 * r.before.mean(axis=0))
    assert_close(r.parameters, 0.9 * r.before + 0.1 * c0)


def test_lsgd_follows_the_smallest_mean_loss_of_the_round() -> None:
    result = run(LSGD(pull=0.1, prox=0.1), steps=10, period=4)
    for r, (first, last) in zip(result.rounds, [(0, 4), (4, 8), (8, 10)], strict=True):
        losses = np.mean([result.steps[t].losses for t in range(first, last)], axis=0)
        leader = int(np.argmin(losses))
        assert_close(r.scores[:, 0], losses)
        assert r.weights[:, 0].tolist() == [float(m == leader) for m in range(4)]
        assert np.all(r.center == r.before[leader])
        assert_close(r.parameters[leader], r.before[leader])


def test_losses_are_those_before_the_step() -> None:
    first = run(LSGD(), steps=1, period=1).steps[0]
    for m in range(4):
        assert first.losses[m] == NET.loss_and_grad(NET.initial(0), *batch(m, 0))[0]


def test_a_new_method_is_one_small_class() -> None:
    """SlowMo: u <- slow u + (x_old - mean) / eta;  x <- x_old - alpha eta u. At slow 0, alpha 1 it is LocalSGD."""

    @dataclass
    class SlowMo(Method):
        slow: float
        alpha: float

        def start(self, world: World) -> None:
            self.x_old, self.u = world.x.mean(axis=0), np.zeros(world.x.shape[1])

        def pull_ranks(self, world: World, average: Array) -> None:
            self.u = self.slow * self.u + (self.x_old - average) / world.lr
            self.x_old = world.center = self.x_old - self.alpha * world.lr * self.u
            world.x[:] = self.x_old

    assert_close(run(SlowMo(slow=0.0, alpha=1.0)).parameters, run(LocalSGD()).parameters)
    assert np.abs(run(SlowMo(slow=0.5, alpha=1.0)).parameters - run(LocalSGD()).parameters).max() > 1e-3


def test_a_replay_leaves_the_method_as_it_was() -> None:
    method = LGRAWA()
    assert np.all(run(method).parameters == run(method).parameters)
    assert vars(method) == vars(LGRAWA())


# -- periods and rates -------------------------------------------------------------------------------------


def test_the_last_round_is_shortened() -> None:
    result = run(LGRAWA(), steps=10, period=4)
    assert [r.step for r in result.rounds] == [4, 8, 10]
    assert [r.period for r in result.rounds] == [4, 4, 4]
    assert [r.step for r in run(LocalSGD(), steps=8, period=4).rounds] == [4, 8]
    assert [r.step for r in run(LocalSGD(), steps=3, period=100).rounds] == [3]


def test_a_period_sees_the_facts() -> None:
    seen = []

    def period(facts: Facts) -> int:
        seen.append(facts)
        return 2 if facts.step < 4 else 3

    def lr(step: int) -> float:
        return (0.025, 0.05, 0.1)[step] if step < 3 else 0.01

    result = run(LocalSGD(), steps=10, period=period, lr=lr, warmup_steps=3, steps_per_epoch=7)
    assert [r.step for r in result.rounds] == [2, 4, 7, 10]
    assert seen == [
        (0, lr(0), 0.1, 3, 10, 7),
        (2, lr(2), 0.1, 3, 8, 7),
        (4, 0.01, 0.1, 3, 6, 7),
        (7, 0.01, 0.1, 3, 3, 7),
    ]
    assert [s.lr for s in result.steps] == [lr(t) for t in range(10)]


def test_qsr() -> None:
    def facts(step: int, lr: float, left: int | None = None) -> Facts:
        return Facts(step, lr, peak_lr=0.1, warmup_steps=10, steps_left=left, steps_per_epoch=1)

    period = ref.qsr(base=4, alpha=0.25)
    assert period(facts(20, 0.1)) == 6  # (2.5)^2 = 6.25
    assert period(facts(20, 0.2)) == 4
    assert period(facts(20, 0.05)) == 25
    assert period(facts(3, 0.001)) == 6  # warm-up: as at the peak
    assert period(facts(20, 0.0, left=50)) == 50
    assert period(facts(20, 0.01, left=50)) == 50
    for name in ("LGRAWA", "LSGD", "EASGD"):
        a, b = run(METHODS[name](), period=ref.qsr(4, 0.0), steps=10), run(METHODS[name](), period=4, steps=10)
        assert np.all(a.parameters == b.parameters)


def test_a_period_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="period"):
        run(LocalSGD(), period=0)


# -- ranks that break --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("when", [5, 7])  # amid a round; at the step of the round
def test_a_broken_rank_is_healed(name: str, when: int) -> None:
    result = run(METHODS[name](), poison=lambda rank, step: rank == 1 and step == when)
    assert [r.healed for r in result.rounds] == [(), (1,), ()]
    r = result.rounds[1]
    assert np.all(r.weights[1] == 0)
    assert_close(r.weights.sum(axis=0), np.ones(r.weights.shape[1]))
    assert np.all(r.parameters[1] == r.center)
    assert np.all(np.isfinite(r.center))
    assert np.all(np.isfinite(result.parameters))
    if name in ("EASGD", "LocalSGD"):
        assert_close(r.weights[:, 0], [1 / 3, 0, 1 / 3, 1 / 3])


@pytest.mark.parametrize("name", AVERAGING)
def test_the_others_go_on_as_a_smaller_world(name: str) -> None:
    """Of ranks 0, 1, 2 the last breaks in the first round: the center is that of ranks 0 and 1 alone."""
    method = without_prox(name)
    three = run(method, 3, steps=4, poison=lambda rank, step: rank == 2 and step == 1)
    two = run(method, 2, steps=4)
    assert_close(three.rounds[0].center, two.rounds[0].center)
    assert_close(three.rounds[0].weights[:2], two.rounds[0].weights)


def test_a_healed_rank_starts_anew() -> None:
    result = run(LGRAWA(prox=0.0), poison=lambda rank, step: rank == 1 and step == 7)
    first, _, third = result.rounds
    assert_close(third.scores[1], third.raw_scores[1])
    assert np.all(np.abs(third.scores[0] - third.raw_scores[0]) > 1e-6)
    assert_close(first.scores, first.raw_scores)
    x, optimizer = result.rounds[1].center, nesterov()
    for step in range(8, 12):
        x = optimizer.step(x, NET.loss_and_grad(x, *batch(1, step))[1], 0.1)
    assert_close(third.before[1], x)


def test_an_infinite_parameter_with_a_finite_gradient_counts_as_broken() -> None:
    class Diverging(SGD):
        def step(self, x: Array, gradient: Array, lr: float) -> Array:
            x = super().step(x, gradient, lr)
            if len(made) == 3 and self is made[2]:
                x[NET.h * NET.d] = math.inf  # b1[0]: its tanh is 1, its gradient 0
            return x

    made: list[Diverging] = []

    def make() -> SGD:
        made.append(Diverging())
        return made[-1]

    result = run(LGRAWA(), 3, steps=1, period=1, optimizer=make)
    assert np.all(np.isfinite(result.rounds[0].raw_scores))
    assert result.rounds[0].healed == (2,)
    assert np.all(result.rounds[0].weights[2] == 0)


def test_a_score_that_is_not_finite_has_no_weight_but_its_rank_is_not_healed() -> None:
    def bad_probe(rank: int, round_: int) -> tuple[Any, ...]:
        inputs, targets = probe(rank, round_)
        return (inputs * math.nan if (rank, round_) == (1, 1) else inputs), targets

    result = run(MGRAWA(pull=0.5), probe=bad_probe)
    r = result.rounds[1]
    assert r.healed == ()
    assert r.weights[1, 0] == 0
    assert_close(r.parameters[1], 0.5 * (r.before[1] + r.center))
    first, third = result.rounds[0].raw_scores[1, 0], result.rounds[2].raw_scores[1, 0]
    b = 0.9**8  # the scores of the first and third round, as if there had been two
    assert result.rounds[2].scores[1, 0] == pytest.approx((b * first + third) / (1 + b), rel=CLOSE)


@pytest.mark.parametrize("name", AVERAGING)
def test_no_rank_left_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="no finite score"):
        run(METHODS[name](), poison=lambda rank, step: step == 6)


def test_data_parallel_with_a_gradient_that_is_not_finite() -> None:
    def bad_batch(rank: int, step: int) -> tuple[Any, ...]:
        inputs, targets = batch(rank, step)
        return (inputs * math.nan if (rank, step) == (2, 3) else inputs), targets

    with pytest.raises(FloatingPointError, match="step 3"):
        run(DataParallel(), batch=bad_batch)
    result = run(DataParallel(on_nonfinite="skip"), batch=bad_batch)
    assert np.all(result.steps[3].parameters == result.steps[2].parameters)
    assert np.all(np.isfinite(result.parameters))


def test_local_momentum_policies_differ() -> None:
    kept, reset, averaged = (run(LSGD(), local_momentum=policy).parameters for policy in ("keep", "reset", "average"))
    assert np.abs(kept - reset).max() > 1e-4
    assert np.abs(kept - averaged).max() > 1e-4
    with pytest.raises(ValueError, match="keep, reset or average"):
        run(LSGD(), local_momentum="none")


# -- counting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "expected"), [("allreduce", 1500), ("allgather", 3000), ("alltoall", 750), ("broadcast", 750)]
)
def test_bytes_sent(verb: str, expected: float) -> None:
    assert ref.bytes_sent(verb, 1000, 4) == expected
    assert ref.bytes_sent(verb, 1000, 1) == 0


def test_consensus_distance() -> None:
    assert ref.consensus_distance(np.array([[3.0, 4.0], [-3.0, -4.0]])) == 5
    assert ref.consensus_distance(np.array([[3.0, 4.0]])) == 0


# -- the Vincent function ----------------------------------------------------------------------------------


def vincent(method: Method, steps: int = 4000) -> Replay:
    return replay(
        method, Vincent(), Vincent.corners(), lambda m, t: (), steps=steps, lr=1e-3, period=4,
        probe=lambda m, r: (), independent=True,
    )  # fmt: skip


def vincent_method(name: str, score_momentum: float = 0.0) -> Method:
    if name in GRADIENT_NORMS:
        return METHODS[name](pull=0.5, prox=0.0, power=1.0, score_momentum=score_momentum)  # type: ignore[call-arg]
    return EASGD(pull=0.5) if name == "EASGD" else LSGD(pull=0.5, prox=0.0)


def test_vincent_at_the_start() -> None:
    problem, corners = Vincent(), Vincent.corners()
    values, gradients = zip(*(problem.loss_and_grad(x) for x in corners), strict=True)
    norms = [np.linalg.norm(g) for g in gradients]
    assert [f"{f:.3f}" for f in values] == ["0.963", "0.911", "0.911", "0.860"]
    assert [f"{n:.3g}" for n in norms] == ["7.66", "5.42", "5.42", "0.361"]
    grawa = inverse(np.array(norms).reshape(-1, 1))[:, 0]
    mgrawa = inverse(np.abs(gradients).sum(axis=1, keepdims=True))[:, 0]
    assert [f"{w:.3f}" for w in grawa] == ["0.040", "0.056", "0.056", "0.847"]
    assert [f"{w:.3f}" for w in mgrawa] == ["0.038", "0.073", "0.073", "0.815"]


@pytest.mark.parametrize(
    ("name", "valley", "tolerance"),
    [
        ("GRAWA", 7.706, 0.05),
        ("MGRAWA", 7.706, 0.05),
        ("LGRAWA", 7.706, 0.05),
        ("EASGD", 4.111, 0.001),
        ("LSGD", 0.333, 0.001),
    ],
)
def test_vincent_valleys(name: str, valley: float, tolerance: float) -> None:
    result = vincent(vincent_method(name))
    assert result.center is not None
    assert np.abs(result.center - valley).max() < tolerance
    assert np.abs(result.parameters - valley).max() < tolerance


@pytest.mark.parametrize("name", GRADIENT_NORMS)
def test_vincent_with_score_momentum(name: str) -> None:
    result = vincent(vincent_method(name, score_momentum=0.9**8), steps=8000)
    assert np.abs(result.parameters - 7.706).max() < 0.05
    assert np.abs(result.steps[3999].parameters - 7.706).max() < 0.2  # the same valley already


@pytest.mark.parametrize("name", GRADIENT_NORMS)
def test_against_a_second_writing(name: str) -> None:
    """The Vincent run again, written down in one piece with arrays; here with momentum and proximity."""
    b, prox, pull, eta, tau = 0.4, 0.05, 0.3, 1e-3, 4
    x, c, v = Vincent.corners(), None, 0.0
    for t in range(1, 201):
        x = x + 5e0 * eta * np.cos(10 * np.log(x)) / x
        if c is not None:
            x = x + prox / tau * (c - x)
        if t % tau == 0:
            g = np.abs(5 * np.cos(10 * np.log(x)) / x)
            s = {"GRAWA": np.hypot(*g.T)[:, None], "MGRAWA": g.sum(axis=1)[:, None], "LGRAWA": g}[name]
            v = b * v + (1 - b) * s
            w = (v / (1 - b ** (t // tau))) ** -2.0
            c = (w * x).sum(axis=0) / w.sum(axis=0)
            x = x + pull * (c - x)
    method = METHODS[name](pull=pull, prox=prox, power=2.0, score_momentum=b)  # type: ignore[call-arg]
    assert_close(vincent(method, steps=200).parameters, x, 1e-11)
