"""What a rank says about itself: norms of gradients, their momentum, what is none or round-off; the loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from torch import Tensor, nn

from hpc_grawa import ParameterVector
from hpc_grawa.scores import Equal, GradientNorm, Momentum, TrainingLoss


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
