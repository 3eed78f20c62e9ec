"""What a rank says about itself: norms of a gradient whose probe leaves no trace (T12), their momentum, the loss."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_grawa import ParameterVector
from hpc_grawa.scores import Equal, GradientNorm, Momentum, TrainingLoss, probe_gradient


class Everything(nn.Module):
    """BatchNorm, dropout, attention, a tied weight, a frozen layer and random numbers of every stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.first = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        h = F.dropout(self.frozen(self.first(self.norm(x))), 0.5, self.training)[None]
        h = self.attention(h, h, h)[0][0]
        return self.last(torch.tanh(h)) + noise


def everything() -> Everything:
    torch.manual_seed(0)
    return Everything()


INPUT = torch.linspace(-2, 2, 24).reshape(6, 4)


def state_of_the_world(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    return [
        [p.detach().clone() for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [(name, b.clone()) for name, b in model.named_buffers()],
        [(name, id(p), p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        [(name, id(b)) for name, b in model.named_buffers()],
        [module.training for module in model.modules()],
        [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
        (torch.is_grad_enabled(), torch.get_default_dtype()),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_t12_probing_leaves_everything_bit_identical(grad_enabled: bool) -> None:
    model = everything()
    vector = ParameterVector(model)
    optimizer = torch.optim.SGD(vector.parameters, 0.1, momentum=0.9)
    model(INPUT).square().mean().backward()
    optimizer.step()
    model.first.bias.grad = None
    model.attention.eval()  # a mode of its own
    fired: list[str] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda grad, name=name: fired.append(name))
            p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    score = GradientNorm(vector, vector.layers(), lambda: model(INPUT).square().mean(), "layers")
    before = state_of_the_world(model, optimizer)
    with torch.set_grad_enabled(grad_enabled):
        norms = score.take()
        after = state_of_the_world(model, optimizer)
        before[-1] = after[-1]
        assert torch.is_grad_enabled() == grad_enabled
    assert norms.shape == (len(vector.names),) and (norms[:-1] > 0).any()
    assert norms[vector.names.index("unused")] == 0
    assert fired == []
    assert same(before, after)
    vector.check()


def test_a_probe_that_raises_leaves_no_trace_either() -> None:
    model = everything()
    vector = ParameterVector(model)
    optimizer = torch.optim.SGD(vector.parameters, 0.1)

    def probe() -> Tensor:
        model(INPUT)
        raise ZeroDivisionError

    before = state_of_the_world(model, optimizer)
    with pytest.raises(ZeroDivisionError):
        probe_gradient(vector, probe)
    assert same(before, state_of_the_world(model, optimizer))


def test_a_probe_may_be_a_module_that_holds_the_model() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(3, 1)

        def forward(self) -> Tensor:
            return self.model(torch.ones(2, 3)).square().mean()

    whole = Square()
    for model in (whole, whole.model):
        vector = ParameterVector(model)
        gradient = probe_gradient(vector, whole)
        vector.check()
        whole.zero_grad()
        whole().backward()
        assert same(list(gradient), [p.grad for p in vector.parameters])


def test_the_probes_gradient_is_that_of_backward() -> None:
    model = everything().eval()
    vector = ParameterVector(model)

    def probe() -> Tensor:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return model(INPUT).square().mean()

    gradients = probe_gradient(vector, probe)
    probe().backward()
    for name, p, gradient in zip(vector.names, vector.parameters, gradients, strict=True):
        assert (gradient is None) == (p.grad is None), name
        assert gradient is None or torch.equal(gradient, p.grad), name


def test_batch_statistics_are_those_of_the_probe() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    vector = ParameterVector(model)
    weights = torch.linspace(1, 2, 6)[:, None]
    gradients = probe_gradient(vector, lambda: (weights * model(100 * INPUT)).sum())
    shifted = probe_gradient(vector, lambda: (weights * model(100 * INPUT + 7)).sum())
    for a, b in zip(gradients, shifted, strict=True):  # normalised by the batch, a shift of it cancels
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert model[0].num_batches_tracked == 0


class Functional(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class Attention(nn.Module):
    def __init__(self, dropout: float, need_weights: bool = True) -> None:
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(4, 2, dropout=dropout), need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, None], x[:, None], x[:, None], need_weights=self.need_weights)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: str, dropout: float, packed: bool = False) -> None:
        super().__init__()
        self.rnn: nn.RNNBase = getattr(nn, kind)(4, 3, num_layers=2, dropout=dropout)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return self.rnn(nn.utils.rnn.pack_sequence([x, x[:2]]))[0].data
        return self.rnn(x)[0]


def attend(rate: float, positional: bool) -> Callable[[Tensor], Tensor]:
    if positional:
        return lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None], None, rate, False, scale=0.7)
    return lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None], dropout_p=rate, scale=0.7)


WITH_DROPOUT: dict[str, Callable[[float], nn.Module]] = {
    "Dropout": lambda rate: nn.Sequential(nn.Linear(4, 4), nn.Dropout(rate)),
    "Dropout in place": lambda rate: nn.Sequential(nn.Linear(4, 4), nn.Dropout(rate, inplace=True)),
    "Dropout1d": lambda rate: nn.Sequential(nn.Linear(4, 4), nn.Dropout1d(rate)),
    "AlphaDropout": lambda rate: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(rate)),
    "FeatureAlphaDropout": lambda rate: nn.Sequential(nn.Linear(4, 4), nn.FeatureAlphaDropout(rate)),
    "F.dropout": lambda rate: Functional(lambda h: F.dropout(h, rate)),
    "F.dropout in eval mode": lambda rate: Functional(lambda h: F.dropout(input=h, p=rate, training=True)).eval(),
    "F.dropout2d": lambda rate: Functional(lambda h: F.dropout2d(h[None, :, :, None], rate)),
    "torch.dropout": lambda rate: Functional(lambda h: torch.dropout(h, rate, True)),
    "torch.alpha_dropout": lambda rate: Functional(lambda h: torch.alpha_dropout(h, rate, True)),
    "MultiheadAttention": lambda rate: Attention(rate),
    "MultiheadAttention without weights": lambda rate: Attention(rate, need_weights=False),
    "TransformerEncoderLayer": lambda rate: nn.TransformerEncoderLayer(4, 2, 8, rate),
    "attention, positional": lambda rate: Functional(attend(rate, positional=True)),
    "attention, by keyword": lambda rate: Functional(attend(rate, positional=False)),
    "LSTM": lambda rate: Recurrent("LSTM", rate),
    "GRU": lambda rate: Recurrent("GRU", rate),
    "RNN": lambda rate: Recurrent("RNN", rate),
    "packed LSTM": lambda rate: Recurrent("LSTM", rate, packed=True),
}


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_dropout_is_off_however_it_is_written(kind: str) -> None:
    """A probe of the model with dropout ½ has the gradient of the same model without."""
    gradients = []
    for rate in (0.5, 0.0):
        torch.manual_seed(0)
        model = WITH_DROPOUT[kind](rate)
        vector = ParameterVector(model)
        gradients.append(probe_gradient(vector, lambda model=model: model(INPUT).exp().sum()))
        if rate:  # and outside the probe it is on
            assert len({tuple(model(INPUT).flatten().tolist()) for _ in range(20)}) > 1
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------
# Norms and their momentum.
# ---------------------------------------------------------------------------------------------------------


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
    for raw in ([1.0, 1.0], [3.0, math.inf], [5.0, 3.0]):
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
