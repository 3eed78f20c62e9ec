"""What a rank says about itself: norms of gradients, their momentum, what is none or round-off; the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from torch import Tensor, nn

from hpc_grawa import LGRAWA, LocalLGRAWA, Method, ParameterVector, simulate
from hpc_grawa.averaging.scores import (
    Equal,
    GradientNorm,
    Momentum,
    Roundoff,
    RunningGradientNorm,
    TrainingLoss,
    roundoff_bound,
)
from hpc_grawa.averaging.synchronizer import Round
from hpc_grawa.comm import Communicator
from hpc_grawa.models import ResNet20


def score_of(reduction: Any, scales: list[float], momentum: float, layers: Any = "tensor") -> GradientNorm:
    """A score whose t-th probe has the gradient scale_t · (3, 4 | 12, 84)."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)])
    vector = ParameterVector(model)
    coming = iter(scales)

    def probe() -> Tensor:
        scale = next(coming)
        a, b = model
        return scale * (3 * a[0] + 4 * a[1] + 12 * b[0] + 84 * b[1])

    return GradientNorm(vector, vector.layers(layers), probe, reduction, momentum)


@pytest.mark.parametrize(
    ("reduction", "layers", "norms"),
    [
        ("vector", "tensor", [math.hypot(3, 4, 12, 84)]),
        ("sum", "tensor", [5 + math.hypot(12, 84)]),
        ("layers", "tensor", [5, math.hypot(12, 84)]),
        ("layers", [["1"], ["0"]], [math.hypot(12, 84), 5]),
        ("layers", "module", [math.hypot(3, 4, 12, 84)]),
        ("vector", "module", [math.hypot(3, 4, 12, 84)]),
        ("sum", [["*"]], [math.hypot(3, 4, 12, 84)]),
    ],
)
def test_reductions(reduction: str, layers: Any, norms: list[float]) -> None:
    score = score_of(reduction, [2.0], 0.5, layers)
    assert score.size == len(norms)
    taken = score.take()
    assert taken.dtype == torch.float64
    assert taken.tolist() == pytest.approx([2 * norm for norm in norms], rel=1e-14)


def test_t9_constant_scores_stay_constant_and_no_momentum_is_the_raw_score() -> None:
    constant = score_of("layers", [2.0] * 20, 0.9**8)
    for _ in range(20):
        assert constant.take().tolist() == pytest.approx([10, 2 * math.hypot(12, 84)], rel=1e-13)
    raw = score_of("layers", [2.0, 5.0, 0.0], 0.0)
    for scale in (2.0, 5.0, 0.0):
        assert raw.take().tolist() == pytest.approx([scale * 5, scale * math.hypot(12, 84)], rel=1e-14)


def test_three_scores_have_the_published_weights() -> None:
    for place, weight in enumerate((0.1147, 0.2664, 0.6189)):
        score = score_of("vector", [float(t == place) for t in range(3)], 0.9**8)
        last = [score.take().item() for _ in range(3)][-1]
        assert last / math.hypot(3, 4, 12, 84) == pytest.approx(weight, abs=5e-5)


def test_momentum_follows_the_oracle_through_scores_that_are_not_finite_and_a_reset() -> None:
    scales = [1.0, math.nan, 3.0, math.inf, 2.0, 0.5, 7.0]
    score, oracle = score_of("layers", scales, 0.6), ref.ScoreMomentum(0.6)
    for number, scale in enumerate(scales):
        if number == 5:
            score.reset()
            oracle.reset(0)
        expected = oracle.update(np.array([[5 * scale, math.hypot(12, 84) * scale]]))[0]
        taken = score.take()
        assert math.isfinite(scale) == bool(taken.isfinite().all())
        if math.isfinite(scale):
            np.testing.assert_allclose(taken, expected, rtol=1e-13)


def test_a_momentum_goes_on_from_a_state_of_another_precision_which_stays_as_it_was() -> None:
    """As where a GPU's single precision goes on on a CPU."""
    coming = [torch.rand(5, dtype=torch.float64) for _ in range(4)]
    whole, begun, resumed = Momentum(0.7), Momentum(0.7), Momentum(0.7)
    for s in coming:
        whole.update(s)
    for s in coming[:2]:
        begun.update(s)
    state = {name: tensor.float() for name, tensor in begun.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    resumed.load_state_dict(state)
    for s in coming[2:]:
        resumed.update(s)
    assert whole.value is not None and resumed.value is not None
    torch.testing.assert_close(resumed.value, whole.value, rtol=1e-6, atol=0)
    assert all(torch.equal(state[name], kept[name]) for name in state)


def test_one_layer_that_is_not_finite_leaves_the_others_momentum_alone() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)])
    vector = ParameterVector(model)
    coming = iter([(1.0, 1.0), (3.0, math.inf), (5.0, 3.0)])

    def probe() -> Tensor:
        first, second = next(coming)
        return first * model[0] + second * model[1]

    score, oracle = GradientNorm(vector, vector.layers(), probe, "layers", 0.5), ref.ScoreMomentum(0.5)
    for raw in ([1.0, 1.0], [3.0, math.nan], [5.0, 3.0]):  # +∞ would say that there is no gradient
        np.testing.assert_allclose(score.take(), oracle.update(np.array([raw]))[0], rtol=1e-13)


def test_where_nothing_entered_a_momentum_is_infinite_if_nothing_else_came() -> None:
    """No gradient on any step is +∞; a gradient that was no number makes NaN; any finite one is what counts."""
    momentum, oracle = Momentum(0.7), ref.ScoreMomentum(0.7)
    for row in ([math.inf, math.nan, math.inf, 2.0], [math.inf, math.inf, 3.0, math.inf]):
        momentum.update(torch.tensor(row, dtype=torch.float64))
        last = oracle.update(np.array([row]))[0]
        resumed = Momentum(0.7)
        resumed.load_state_dict(momentum.state_dict())
        momentum = resumed
    assert momentum.value is not None
    np.testing.assert_allclose(momentum.value, [math.inf, math.nan, last[2], 2.0], rtol=1e-14)


# ---------------------------------------------------------------------------------------------------------
# Layers without a gradient, and those whose gradient is round-off.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["vector", "sum", "layers"])
def test_a_layer_without_a_gradient_adds_nothing_to_the_others(reduction: Any) -> None:
    """And a rank without any is one that has no gradient."""
    model = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)])
    vector = ParameterVector(model)
    given: list[int] = [0, 1]
    outside = torch.zeros((), requires_grad=True)

    def probe() -> Tensor:
        return outside + sum((4.0**i * model[i].sum() for i in given), start=torch.zeros(()))

    score = GradientNorm(vector, vector.layers(), probe, reduction, momentum=0.0)
    norms = [2**0.5, 4 * 2**0.5]
    expected = {"vector": [math.hypot(*norms)], "sum": [sum(norms)], "layers": [*norms, math.inf]}[reduction]
    assert score.take().tolist() == pytest.approx(expected, rel=1e-14)
    given.clear()
    assert score.take().tolist() == [math.inf] * len(expected)


@pytest.mark.parametrize("reduction", ["vector", "sum", "layers"])
def test_zeros_that_no_backward_pass_has_made_are_no_gradient(reduction: Any) -> None:
    """As a rank has that makes a step after zero_grad(set_to_none=False) alone."""
    model = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)])
    vector = ParameterVector(model)
    score = RunningGradientNorm(vector, vector.layers(), reduction)

    def taken() -> list[float]:
        score.observe(None)
        return score.take().abs().tolist()

    def zeros() -> None:
        for p in model:
            p.grad = torch.zeros_like(p)

    zeros()
    assert taken() == [math.inf] * score.size
    model[1].grad.fill_(3.0)
    assert taken() == pytest.approx([math.inf, 18**0.5][-score.size :])
    zeros()
    (0 * (model[0].sum() + model[1].sum())).backward()
    assert taken() == [0.0] * score.size


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float64, 8 * 2**-52),
        (torch.float32, 8 * 2**-23),
        (torch.bfloat16, 2**-7 / 10),
        (torch.float16, 2**-10 / 10),
    ],
    ids=str,
)
def test_a_norm_of_few_roundings_of_the_whole_gradient_is_marked(dtype: torch.dtype, bound: float) -> None:
    roundoff = Roundoff(ParameterVector(nn.Linear(2, 2).to(dtype)))
    norms = torch.tensor([3.0, 4.0, 4.9 * bound, 5.1 * bound, 0.0, math.inf, math.nan], dtype=torch.float64)
    marked = roundoff.mark(norms)
    np.testing.assert_array_equal(marked.abs(), norms)
    assert marked.signbit().tolist()[:6] == [False, False, True, False, True, False]


@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast_the_bound_is_that_of_its_dtype(inside: bool) -> None:
    """Whether the loop turns it on or the model's forward pass; and off again."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.on = nn.Linear(2, 2), False

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.on or torch.is_autocast_enabled("cpu")):
                return self.linear(x)

    model = Net()
    vector = ParameterVector(model)
    for score in (GradientNorm(vector, vector.layers(), lambda: model(torch.ones(1, 2)).sum(), "layers"),
                  RunningGradientNorm(vector, vector.layers(), "layers")):  # fmt: skip
        for on in (False, True, False):
            model.on = on and inside
            with torch.autocast("cpu", torch.bfloat16, enabled=on and not inside):
                model(torch.ones(1, 2)).float().sum().backward()
                score.observe(None)
                if isinstance(score, GradientNorm):
                    score.take()
            assert score._roundoff is not None
            assert score._roundoff.bound == roundoff_bound(torch.bfloat16 if on else torch.float32)


def test_one_layer_in_full_precision_does_not_make_the_others_so() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 99)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.body(x)
            return self.head(x.float())

    model = Net()
    vector = ParameterVector(model)
    score = GradientNorm(vector, vector.layers(), lambda: model(torch.ones(1, 2)).sum(), "layers")
    score.take()
    resumed = GradientNorm(vector, vector.layers(), lambda: torch.zeros(()), "layers")
    resumed.load_state_dict(score.state_dict())
    for one in (score, resumed):
        assert one._roundoff is not None and one._roundoff.bound == roundoff_bound(torch.bfloat16)


def rounds_of(method: Method, model_of: Callable[[], nn.Module], world: int = 3, bf16: bool = False) -> list[Round]:
    """Rounds of ranks whose data are shifted and scaled differently."""

    def body(comm: Communicator) -> list[Round]:
        torch.manual_seed(0)
        model = model_of()
        dtype = next(model.parameters()).dtype
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        data = torch.Generator().manual_seed(comm.rank)

        def loss() -> Tensor:
            x = torch.randn(16, 2, 5, 5, generator=data).to(dtype) * (1 + comm.rank) + comm.rank
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return (model(x) - x.mean((1, 2, 3))[:, None]).square().mean()

        run, rounds = method.build(comm, ParameterVector(model), optimizer, probe=loss), []
        run.synchronizers[0].on_round = rounds.append
        for _ in range(6):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            run.after_step(value.detach())
        return rounds

    return simulate(world, body)[0]


@pytest.mark.parametrize("precision", ["float64", "float32", "bf16 autocast"])
@pytest.mark.parametrize("method", [LGRAWA(period=2), LocalLGRAWA(period=2)], ids=lambda m: type(m).__name__)
def test_a_bias_before_batchnorm_weighs_all_ranks_alike(method: Method, precision: str) -> None:
    """Its gradient is zero but for rounding; the weights of the other layers are what they are without it."""

    def net(bias: bool) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU()), nn.Flatten(), nn.Linear(36, 1)
        )
        for layer in (model[0], model[-1]):
            nn.init.normal_(layer.weight, std=0.1, generator=torch.Generator().manual_seed(2))
        nn.init.zeros_(model[-1].bias)
        return model.to(torch.float64 if precision == "float64" else torch.float32)

    bf16 = precision == "bf16 autocast"
    rounds = rounds_of(method, lambda: net(True), bf16=bf16)
    assert len(rounds) == 3
    assert all((round_.weights[:, 1] == 1 / 3).all() for round_ in rounds)
    assert all((round_.weights[:, [0, 2, 3, 4]].max(0).values > 0.35).all() for round_ in rounds)
    if not bf16:
        for ours, theirs in zip(rounds, rounds_of(method, lambda: net(False)), strict=True):
            tolerance = 1e-9 if precision == "float64" else 1e-3
            torch.testing.assert_close(ours.weights[:, [0, 2, 3, 4, 5]], theirs.weights, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [8, 32])
def test_in_bf16_only_the_biases_before_batchnorm_of_a_resnet_are_roundoff(batch: int) -> None:
    """Its healthy layers have as little as a third of an eps of the whole gradient, the biases a twentieth."""
    torch.manual_seed(0)
    model = ResNet20()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
    vector, x = ParameterVector(model), torch.randn(batch, 3, 32, 32)
    target = torch.randint(10, (batch,))

    def probe() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(model(x), target)

    scores = GradientNorm(vector, vector.layers(), probe, "layers", momentum=0.0).take()
    marked = {name for name, score in zip(vector.names, scores, strict=True) if score.signbit()}
    assert marked == {f"{name}.bias" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert len(marked) == 19 and len(scores) == 59 + 19
    healthy = scores[~scores.signbit()] / scores.square().sum().sqrt()
    assert healthy.min() < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("method", [LGRAWA(period=2), LocalLGRAWA(period=2)], ids=lambda m: type(m).__name__)
def test_a_sparse_embedding_weighs_as_a_dense_one(method: Method) -> None:
    class Words(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.embedding(x.abs().flatten(1).long().clamp(max=8)).mean(1))

    sparse, dense = (rounds_of(method, lambda s=s: Words(s)) for s in (True, False))
    for ours, theirs in zip(sparse, dense, strict=True):
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-5, atol=1e-6)


def test_equal_scores_and_training_loss() -> None:
    assert Equal().take().tolist() == [1.0]
    loss = TrainingLoss()
    assert math.isnan(loss.take())  # it cannot lead
    with pytest.raises(ValueError, match=r"by their training loss: call after_step\(loss\)"):
        loss.observe(None)
    for losses in ([1.0, 2.0, 6.0], [5.0], [math.nan, 1.0]):  # each mean is of its own round
        for value in losses:
            tensor = torch.tensor(value, dtype=torch.float64)
            loss.observe(tensor)
            tensor.fill_(99)  # the loop may reuse it
        np.testing.assert_equal(loss.take().numpy(), [np.mean(losses)])


def test_the_loss_is_added_up_in_float64() -> None:
    loss = TrainingLoss()
    for _ in range(1000):
        loss.observe(torch.tensor(0.1))
    assert loss.take().item() == pytest.approx(float(torch.tensor(0.1)), rel=1e-13)
