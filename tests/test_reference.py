"""What pins the oracle itself: numbers worked out by hand, closed forms, a second writing, torch, differences.

That methods obey the identities of the mathematics is shown of the package (`test_averaging`, `test_scores`,
`test_methods`), which follows the oracle to the last digits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from reference import (
    EASGD,
    GRAWA,
    LGRAWA,
    LSGD,
    MGRAWA,
    SGD,
    Array,
    DataParallel,
    Facts,
    GradientAt,
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
    replay,
    uniform,
)

NET = TwoLayer(d=3, h=4, o=2)
CLOSE = 1e-12
GRADIENT_NORMS: dict[str, type[GRAWA | MGRAWA | LGRAWA]] = {"GRAWA": GRAWA, "MGRAWA": MGRAWA, "LGRAWA": LGRAWA}


def batch(rank: int, step: int) -> tuple[Any, ...]:
    return NET.random_batch(5, 1, rank, step)


def probe(rank: int, round_: int) -> tuple[Any, ...]:
    return NET.random_batch(5, 2, rank, round_)


def nesterov() -> SGD:
    return SGD(momentum=0.9, nesterov=True, weight_decay=1e-2)


def gradient(rank: int, step: int, x: Array) -> Array:
    return NET.loss_and_grad(x, *batch(rank, step))[1]


def run(method: Method, world_size: int = 4, steps: int = 12, period: Any = 4, **more: Any) -> Replay:
    arguments: dict[str, Any] = {"lr": 0.1, "optimizer": nesterov, "probe": probe, "batch": batch} | more
    starts = np.array([NET.initial(seed) for seed in range(world_size)])
    return replay(method, NET, starts, steps=steps, period=period, **arguments)


def assert_close(a: Any, b: Any, tolerance: float = CLOSE) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# -- weight rules, score momentum --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "scores", "expected"),
    [
        (inverse, (1, 1, 1, 10), (10 / 31, 10 / 31, 10 / 31, 1 / 31)),
        (inverse, (1, 1, 1, 0), (0, 0, 0, 1)),
        (inverse, (0, 0, 1, 1), (0.5, 0.5, 0, 0)),
        (inverse, (math.nan, 1, 1, 1), (0, 1 / 3, 1 / 3, 1 / 3)),
        (inverse, (math.inf, 1, 1, math.nan), (0, 0.5, 0.5, 0)),
        (inverse, (math.nan, 0, 0, math.inf), (0, 0.5, 0.5, 0)),
        (inverse, (5e-324, 5e-324, 1, 1), (0.5, 0.5, 0, 0)),
        (lambda scores: inverse(scores, 2.0), (1, 2, 4), (16 / 21, 4 / 21, 1 / 21)),
        (uniform, (math.nan, 7, 1, math.inf), (0, 0.5, 0.5, 0)),
        (argmin, (math.nan, 1, 1, -math.inf), (0, 1, 0, 0)),
        (argmin, (3, 1, 2, 1), (0, 1, 0, 0)),
    ],
)
def test_limits_of_the_rules(rule: Any, scores: tuple[float, ...], expected: tuple[float, ...]) -> None:
    """Of each column by itself."""
    columns = np.array([scores, np.ones(len(scores))], dtype=float).T
    assert_close(rule(columns)[:, 0], expected)
    with pytest.raises(ValueError, match="column 1"):
        rule(columns * [1, math.nan])


def test_effective_weights_of_three_scores() -> None:
    effective = []
    for scores in np.eye(3):
        momentum = ScoreMomentum(0.9**8)
        for s in scores:
            result = momentum.update(np.array([[s]]))
        effective.append(result[0, 0])
    assert_close(effective, [0.1147, 0.2664, 0.6189], 5e-5)


def test_scores_that_are_not_finite_do_not_enter_a_momentum_and_a_reset_forgets_one_rank() -> None:
    momentum = ScoreMomentum(0.5)
    for s in (1.0, math.nan, 3.0, math.inf):
        result = momentum.update(np.array([[s, 2.0], [1.0, 1.0]]))
        assert math.isfinite(result[0, 0]) == math.isfinite(s)
    momentum.reset(1)
    assert_close(momentum.update(np.array([[4.0, 2.0], [4.0, 4.0]])), [[(1 + 2 * 3 + 4 * 4) / 7, 2], [4, 4]])


# -- the problem, the optimizer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "x", "arguments"), [(NET, NET.initial(3), batch(0, 0)), (Vincent(), np.array([0.7, 5.0]), ())]
)
def test_gradients_against_differences(problem: Problem, x: Array, arguments: tuple[Any, ...]) -> None:
    _, gradient = problem.loss_and_grad(x, *arguments)
    for i, e in enumerate(1e-6 * np.eye(len(x))):
        above, below = problem.loss_and_grad(x + e, *arguments)[0], problem.loss_and_grad(x - e, *arguments)[0]
        assert gradient[i] == pytest.approx((above - below) / 2e-6, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"), [(0, False, 0.01), (0.9, False, 0), (0.9, True, 0.01)]
)
def test_network_and_sgd_are_those_of_torch(momentum: float, nesterov: bool, weight_decay: float) -> None:
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
        assert_close(NET.loss_and_grad(x, inputs, targets)[0], loss.item())
        x = ours.step(x, lambda x, share=True, step=step: gradient(0, step, x), 0.1)
        assert_close(x, torch.nn.utils.parameters_to_vector(twin.parameters()).detach().numpy())


class Ascent(SGD):
    """Steps by the gradient at x + g / 2, where g is the rank's own gradient at x."""

    def step(self, x: Array, gradient_at: GradientAt, lr: float) -> Array:
        return x - lr * gradient_at(x + gradient_at(x, share=False) / 2)


def test_an_optimizer_asks_for_gradients_where_it_likes() -> None:
    """Shared, they are the mean of those that all ranks ask for; the loss of a step is the first."""
    ascents = [gradient(m, 0, NET.initial(0)) for m in range(3)]
    there = [gradient(m, 0, NET.initial(0) + ascents[m] / 2) for m in range(3)]
    together = run(DataParallel(), 3, steps=1, optimizer=Ascent)
    assert_close(together.parameters, [NET.initial(0) - 0.1 * np.mean(there, axis=0)] * 3)
    apart = run(LSGD(), 3, steps=1, period=1, optimizer=Ascent)
    assert_close(apart.rounds[0].before, NET.initial(0) - 0.1 * np.array(there))
    for losses in (together.steps[0].losses, apart.steps[0].losses):
        assert losses.tolist() == [NET.loss_and_grad(NET.initial(0), *batch(m, 0))[0] for m in range(3)]


# -- methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRADIENT_NORMS)
def test_against_a_second_writing(name: str) -> None:
    """Runs on the Vincent function, written down in one piece with arrays; with momentum and proximity."""
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
    method = GRADIENT_NORMS[name](pull=pull, prox=prox, power=2.0, score_momentum=b)
    assert_close(vincent(method, steps=200).parameters, x, 1e-11)


def test_the_probe_is_taken_after_the_proximity_pull() -> None:
    for i, r in enumerate(run(GRAWA(prox=0.3, score_momentum=0.0)).rounds):
        norms = [np.linalg.norm(NET.loss_and_grad(r.before[m], *probe(m, i))[1]) for m in range(4)]
        assert_close(r.scores[:, 0], norms)


def test_easgd_starts_its_center_at_the_start() -> None:
    r, c0 = run(EASGD(pull=0.4), steps=1, period=1).rounds[0], NET.initial(0)
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
        assert_close(r.parameters, 0.9 * r.before + 0.1 * r.center)


def test_data_parallel_has_no_rounds_and_no_step_with_a_mean_gradient_that_is_not_finite() -> None:
    def bad_batch(rank: int, step: int) -> tuple[Any, ...]:
        inputs, targets = batch(rank, step)
        return (inputs * math.nan if (rank, step) == (2, 3) else inputs), targets

    with pytest.raises(FloatingPointError, match="step 3"):
        run(DataParallel(), batch=bad_batch)
    result = run(DataParallel(on_nonfinite="skip"), batch=bad_batch)
    assert np.all(result.steps[3].parameters == result.steps[2].parameters)
    assert np.all(result.parameters == result.parameters[0]) and np.all(np.isfinite(result.parameters))
    assert (result.rounds, result.center) == ([], None)


@pytest.mark.parametrize(("policy", "momentum"), [("keep", 0.9), ("average", 0.9), ("reset", 0.0)])
def test_local_momentum_at_rounds_of_period_one(policy: str, momentum: float) -> None:
    """Kept and averaged ones have the same mean, which is that of DataParallel; reset is no momentum."""
    a = run(LocalSGD(), period=1, optimizer=lambda: SGD(0.9), local_momentum=policy)
    assert_close(a.parameters, run(DataParallel(), optimizer=lambda: SGD(momentum)).parameters)


def test_a_method_may_average_something_else() -> None:
    """Here 2x, which no step moves; a rank where it is not finite is healed, though its x is."""

    class Doubled(Method):
        def start(self, world: World) -> None:
            self.z = 2 * world.x
            self.z[1] = math.nan

        def averaged(self, world: World) -> Array:
            return self.z

        def pull_ranks(self, world: World, average: Array) -> None:
            world.center = average

    result = run(Doubled(), 3, steps=1, independent=True)
    assert result.rounds[0].healed == (1,)
    assert_close(result.center, NET.initial(0) + NET.initial(2))


def test_a_replay_leaves_the_method_as_it_was() -> None:
    method = LGRAWA()
    assert np.all(run(method).parameters == run(method).parameters)
    assert vars(method) == vars(LGRAWA())


# -- periods -----------------------------------------------------------------------------------------------


def test_a_period_sees_the_facts_and_the_last_round_is_shortened() -> None:
    seen = []

    def period(facts: Facts) -> int:
        seen.append(facts)
        return 2 if facts.step < 4 else 3

    def lr(step: int) -> float:
        return (0.025, 0.05, 0.1)[step] if step < 3 else 0.01

    result = run(LocalSGD(), steps=9, period=period, lr=lr, warmup_steps=3, steps_per_epoch=7)
    assert [(r.step, r.period) for r in result.rounds] == [(2, 2), (4, 2), (7, 3), (9, 3)]
    assert seen == [
        (0, lr(0), 0.1, 3, 9, 7),
        (2, lr(2), 0.1, 3, 7, 7),
        (4, 0.01, 0.1, 3, 5, 7),
        (7, 0.01, 0.1, 3, 2, 7),
    ]
    assert [s.lr for s in result.steps] == [lr(t) for t in range(9)]
    assert [r.step for r in run(LocalSGD(), steps=8, period=4).rounds] == [4, 8]
    with pytest.raises(ValueError, match="period"):
        run(LocalSGD(), period=0)


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
    assert ref.qsr(4, 0.0)(facts(20, 0.01)) == ref.qsr(4, 0.0)(facts(20, 0.0, left=2)) == 4


# -- ranks that break --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "method", [LGRAWA(prox=0.0), LSGD(prox=0.0), EASGD(), LocalSGD()], ids=lambda m: type(m).__name__
)
def test_the_others_go_on_as_a_smaller_world(method: Method) -> None:
    """Of ranks 0, 1, 2 the last breaks in the first round: it becomes the center, that of ranks 0 and 1 alone."""
    three = run(method, 3, steps=4, poison=lambda rank, step: rank == 2 and step == 1).rounds[0]
    two = run(method, 2, steps=4).rounds[0]
    assert_close(three.center, two.center)
    assert_close(three.weights, [*two.weights, np.zeros(three.weights.shape[1])])
    assert three.healed == (2,) and np.all(three.parameters[2] == three.center)


def test_a_healed_rank_starts_anew() -> None:
    result = run(LGRAWA(prox=0.0), poison=lambda rank, step: rank == 1 and step == 7)
    first, _, third = result.rounds
    assert_close(third.scores[1], third.raw_scores[1])
    assert np.all(np.abs(third.scores[0] - third.raw_scores[0]) > 1e-6)
    assert_close(first.scores, first.raw_scores)
    x, optimizer = result.rounds[1].center, nesterov()
    for step in range(8, 12):
        x = optimizer.step(x, lambda x, share=True, step=step: gradient(1, step, x), 0.1)
    assert_close(third.before[1], x)


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


# -- counting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "expected"),
    [("allreduce", 1500), ("counter", 1500), ("allgather", 3000), ("alltoall", 750), ("broadcast", 750)],
)
def test_bytes_sent(verb: str, expected: float) -> None:
    assert ref.bytes_sent(verb, 1000, 4) == expected
    assert ref.bytes_sent(verb, 1000, 1) == 0


# -- the Vincent function ----------------------------------------------------------------------------------


def vincent(method: Method, steps: int = 4000) -> Replay:
    return replay(
        method, Vincent(), Vincent.corners(), lambda m, t: (), steps=steps, lr=1e-3, period=4,
        probe=lambda m, r: (), independent=True,
    )  # fmt: skip


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
    ("method", "valley", "tolerance"),
    [
        *((kind(prox=0.0, score_momentum=0.0), 7.706, 0.05) for kind in GRADIENT_NORMS.values()),
        (EASGD(pull=0.5), 4.111, 0.001),
        (LSGD(pull=0.5, prox=0.0), 0.333, 0.001),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else "",
)
def test_vincent_valleys(method: Method, valley: float, tolerance: float) -> None:
    result = vincent(method)
    assert result.center is not None
    assert np.abs(result.center - valley).max() < tolerance
    assert np.abs(result.parameters - valley).max() < tolerance


@pytest.mark.parametrize("kind", GRADIENT_NORMS.values())
def test_vincent_with_score_momentum(kind: Any) -> None:
    result = vincent(kind(prox=0.0), steps=8000)
    assert np.abs(result.parameters - 7.706).max() < 0.05
    assert np.abs(result.steps[3999].parameters - 7.706).max() < 0.2  # the same valley already
