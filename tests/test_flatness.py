"""Flatness: Hessians that are known, estimators within their errors, and the same on any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Ranks
from launcher import launch
from torch import Tensor, nn

from hpc_grawa.comm import Communicator
from hpc_grawa.errors import ConfigError, NonFinite, RanksDisagree
from hpc_grawa.flatness import (
    Lanczos,
    Objective,
    Plane,
    density,
    keskar_sharpness,
    line,
    lpf,
    sam_sharpness,
    trace_and_square,
    valley_width,
)
from hpc_grawa.flatness.measure import Settings, Subject, measure
from hpc_grawa.models import GPT, SmallCNN


class Pairs:
    """Examples that are tensors."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, index: Tensor, generator: object = None) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Quadratic(nn.Module):
    """½θᵀAθ - bᵀθ, whatever the input is."""

    def __init__(self, a: Tensor, b: Tensor, at: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.theta = nn.Parameter(at.clone())

    def forward(self, x: Tensor) -> Tensor:
        value = 0.5 * self.theta @ self.a @ self.theta - self.b @ self.theta
        return value.expand(len(x), 1)


class Plain(nn.Module):
    """The mean of the outputs."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return output.mean()


def quadratic(comm: Communicator | None = None, size: int = 12) -> tuple[Objective, Tensor, Tensor]:
    root = drawn(size, size)
    a, b = root @ root.T / size, drawn(size, seed=1)
    model = Quadratic(a, b, drawn(size, seed=2))
    return Objective(model, Plain(), Pairs(drawn(11, 1), drawn(11, 1)), comm, batch_size=3), a, b


def columns(objective: Objective) -> Tensor:
    return torch.stack([objective.product(e) for e in torch.eye(len(objective.vector), dtype=torch.float64)], 1)


# ---------------------------------------------------------------------------------------------------------
# f, ∇f and H·v.
# ---------------------------------------------------------------------------------------------------------


def test_a_quadratic(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        objective, a, b = quadratic(comm)
        theta = objective.vector.data
        value, gradient = objective.gradient()
        assert value == pytest.approx(float(0.5 * theta @ a @ theta - b @ theta), rel=1e-12)
        assert objective.value() == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(gradient, a @ theta - b, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(columns(objective), a, rtol=1e-10, atol=1e-12)

    on_ranks(body)


def test_least_squares_and_softmax(on_ranks: Ranks) -> None:
    """H = 2 XᵀX/m; and Σ_i (diag(p_i) - p_i p_iᵀ) ⊗ x_i x_iᵀ / m."""
    m, d, k = 13, 4, 3

    def body(comm: Communicator) -> None:
        x = drawn(m, d)
        squares = Objective(
            nn.Linear(d, 1, bias=False).double(), nn.MSELoss(), Pairs(x, drawn(m, 1)), comm, batch_size=2
        )
        torch.testing.assert_close(columns(squares), 2 * x.T @ x / m, rtol=1e-10, atol=1e-12)
        model = nn.Linear(d, k, bias=False).double()
        model.weight.data.copy_(drawn(k, d, seed=3))
        labels = torch.arange(m) % k
        softmax = Objective(model, nn.CrossEntropyLoss(), Pairs(x, labels), comm, batch_size=2)
        p = F.softmax(x @ model.weight.detach().T, 1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        expected = torch.einsum("mab,mi,mj->aibj", inner, x, x).reshape(k * d, k * d) / m
        torch.testing.assert_close(columns(softmax), expected, rtol=1e-8, atol=1e-10)

    on_ranks(body)


def network(comm: Communicator | None, statistics: Any = "model", count: int = 17) -> Objective:
    torch.manual_seed(0)
    model = SmallCNN(width=2).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # else a channel without input sits at ReLU's kink
    return Objective(
        model,
        nn.CrossEntropyLoss(),
        Pairs(drawn(count, 1, 8, 8), torch.arange(count) % 10),
        comm,
        batch_size=4,
        statistics=statistics,
    )


def test_measures_of_a_network_are_the_same_on_any_number_of_ranks(on_ranks: Ranks) -> None:
    def measures(comm: Communicator | None) -> list[float]:
        objective = network(comm)
        size = len(objective.vector)
        v = drawn(size, seed=5)
        value, gradient = objective.gradient()
        lanczos = Lanczos(size, 0, comm, torch.float64)
        for _ in range(6):
            lanczos.advance(objective.product)
        trace, square = trace_and_square(objective.product, objective.vector.data, 3, seed=0)
        return [
            *(value, float(gradient.norm()), float(v @ objective.product(v)), *lanczos.ritz()[0], *lanczos.ritz()[1]),
            *(trace.value, trace.error, square.value, square.error),
            *(sam_sharpness(objective), sam_sharpness(objective, adaptive=True), lpf(objective, 0.01, 4).value),
            measure(Subject(objective), Settings(measures=("entropy",)))["entropy"],
        ]

    alone = measures(None)
    for found in on_ranks(measures):
        np.testing.assert_allclose(found, alone, rtol=1e-6, atol=1e-9)


def test_a_product_is_the_slope_of_the_gradient_and_leaves_nothing_behind() -> None:
    objective = network(None)
    before = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    v, h = drawn(len(objective.vector), seed=5), 1e-7  # no kink of ReLU so near
    at = objective.vector.data.clone()
    slope = (objective.gradient(at + h * v)[1] - objective.gradient(at - h * v)[1]) / (2 * h)
    torch.testing.assert_close(objective.product(v), slope, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.model.state_dict().items())
    assert all(p.grad is None for p in objective.model.parameters()) and objective.model.training


def test_batch_statistics_are_those_of_training() -> None:
    objective = network(None, "batch", count=4)
    expected = F.cross_entropy(objective.model(objective._data.inputs), torch.arange(4)).item()  # type: ignore[attr-defined]
    assert objective.value() == pytest.approx(expected, rel=1e-10)
    assert network(None, count=4).value() != pytest.approx(expected, rel=1e-3)


def test_attention_has_a_hessian() -> None:
    torch.manual_seed(0)
    model = GPT(vocabulary=7, context=5, depth=1, width=8, heads=2).double()
    tokens = torch.arange(30).reshape(6, 5) % 7
    objective = Objective(model, nn.CrossEntropyLoss(), Pairs(tokens, (tokens + 1) % 7))
    v, h, at = drawn(len(objective.vector)), 1e-5, objective.vector.data.clone()
    slope = (objective.gradient(at + h * v)[1] - objective.gradient(at - h * v)[1]) / (2 * h)
    torch.testing.assert_close(objective.product(v), slope, rtol=1e-4, atol=1e-5)


class Once(torch.autograd.Function):
    """A square that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Stubborn(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(super().forward(x))  # type: ignore[no-any-return, no-untyped-call]


def test_what_has_no_hessian_is_named() -> None:
    objective = Objective(Stubborn(2, 1).double(), nn.MSELoss(), Pairs(drawn(3, 2), drawn(3, 1)))
    with pytest.raises(ConfigError, match="cannot be differentiated twice, so it has no Hessian to measure"):
        objective.product(torch.ones(3))
    with pytest.raises(ConfigError, match="examples is 0: must be at least 1"):
        Objective(nn.Linear(2, 1), nn.MSELoss(), Pairs(drawn(3, 2), drawn(3, 1)), limit=0)


# ---------------------------------------------------------------------------------------------------------
# Spectra.
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[1.0, 2, 3, 4, 5], [-3.0, -3, 0, 0, 2, 2, 2, 7]])
def test_all_steps_give_all_distinct_eigenvalues_and_the_starts_share_of_each(
    values: list[float], on_ranks: Ranks
) -> None:
    def body(comm: Communicator) -> None:
        size = len(values)
        q = torch.linalg.qr(drawn(size, size)).Q
        a = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
        lanczos = Lanczos(size, 4, comm, torch.float64)
        start = lanczos._next.clone()
        while not lanczos.complete:
            lanczos.advance(lambda v: a @ v)
            for value, residual in zip(lanczos.ritz()[0], lanczos.residuals(), strict=True):
                assert min(abs(value - exact) for exact in values) <= residual + 1e-9
        assert lanczos.residuals().max() < 1e-9
        found, weights = lanczos.ritz()
        distinct = sorted(set(values))
        np.testing.assert_allclose(found, distinct, atol=1e-9)
        parts = (q.T @ start).square().tolist()
        shares = [sum(part for part, value in zip(parts, values, strict=True) if value == v) for v in distinct]
        np.testing.assert_allclose(weights, shares, atol=1e-9)

    on_ranks(body)


def test_a_spectrum_goes_on_where_it_was_left(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        objective = network(comm)
        whole, cut = (Lanczos(len(objective.vector), 0, comm, torch.float64) for _ in range(2))
        for _ in range(5):
            whole.advance(objective.product)
        for _ in range(2):
            cut.advance(objective.product)
        again = Lanczos(len(objective.vector), 0, comm, torch.float64)
        again.load_state_dict(cut.state_dict())
        for _ in range(3):
            again.advance(objective.product)
        assert np.array_equal(again.ritz()[0], whole.ritz()[0]) and np.array_equal(again.ritz()[1], whole.ritz()[1])

    on_ranks(body)


def test_the_density_is_one_and_lies_where_the_eigenvalues_are() -> None:
    spectra = [(np.array([0.0, 1.0]), np.array([0.75, 0.25]))]
    grid = np.linspace(-1, 2, 3001)
    found = density(spectra, grid, 0.05)
    assert np.trapezoid(found, grid) == pytest.approx(1, abs=1e-9)
    assert found[1000] / found[2000] == pytest.approx(3, rel=1e-6)


def test_trace_and_norm_lie_within_their_errors() -> None:
    """Of 40 independent estimates; the first term of Hutch++ alone is exact where the sketch spans the range."""
    a = quadratic(size=30)[1] + torch.diag(torch.arange(30, dtype=torch.float64))
    found = [trace_and_square(lambda v: a @ v, a[0], 6, seed) for seed in range(40)]
    for column, exact in ((0, a.trace()), (1, a.square().sum())):
        z = [(pair[column].value - float(exact)) / pair[column].error for pair in found]
        assert abs(np.mean(z)) < 4 * np.std(z) / math.sqrt(40) + 0.5 and np.mean(np.abs(z) < 3) >= 0.8
    low = drawn(30, 4)
    trace, _ = trace_and_square(lambda v: low @ (low.T @ v), a[0], 5, seed=0)
    assert trace.value == pytest.approx(float(low.square().sum()), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------
# Neighbours.
# ---------------------------------------------------------------------------------------------------------


def test_sharpness_of_a_quadratic(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        objective, a, b = quadratic(comm)
        theta = objective.vector.data.clone()

        def f(x: Tensor) -> float:
            return float(0.5 * x @ a @ x - b @ x)

        g = a @ theta - b
        assert sam_sharpness(objective, 0.1) == pytest.approx(f(theta + 0.1 * g / g.norm()) - f(theta), rel=1e-9)
        t = theta.abs()
        scaled = theta + 0.1 * t.square() * g / (t * g).norm()
        assert sam_sharpness(objective, 0.1, adaptive=True) == pytest.approx(f(scaled) - f(theta), rel=1e-9)
        exact = f(theta) + 0.5 * 0.3**2 * float(a.trace())
        found = lpf(objective, 0.3, 200)
        assert abs(found.value - exact) < 4 * found.error
        ends = (theta, theta + 1)
        assert line(objective, *ends, at=(0, 0.5, 1)) == pytest.approx([f(theta), f(theta + 0.5), f(theta + 1)])

    on_ranks(body)


def test_the_worst_neighbour_of_a_box(on_ranks: Ranks) -> None:
    """Of a linear function it is a corner."""

    def body(comm: Communicator) -> None:
        size = 6
        b, at = drawn(size, seed=1), drawn(size, seed=2)
        model = Quadratic(torch.zeros(size, size, dtype=torch.float64), b, at)
        objective = Objective(model, Plain(), Pairs(drawn(5, 1), drawn(5, 1)), comm)
        value, epsilon = objective.value(), 1e-3
        rise = float((b.abs() * epsilon * (at.abs() + 1)).sum())
        assert keskar_sharpness(objective, epsilon) == pytest.approx(100 * rise / (1 + value), rel=1e-9)
        assert torch.equal(objective.vector.data, at)

    on_ranks(body)


def test_the_width_of_a_valley(on_ranks: Ranks) -> None:
    """f = 1 + ½a‖x‖²: κ·f(0) is reached at sqrt(2(κ - 1)/a)."""

    def body(comm: Communicator) -> None:
        size = 4
        model = Quadratic(
            0.5 * torch.eye(size, dtype=torch.float64),
            torch.zeros(size, dtype=torch.float64),
            torch.zeros(size, dtype=torch.float64),
        )
        objective = Objective(model, Shifted(), Pairs(drawn(5, 1), drawn(5, 1)), comm)
        ranks = [drawn(size, seed=7), 1e-6 * drawn(size, seed=8), torch.zeros(size, dtype=torch.float64)]
        (wide, cut), (near, ended), none = valley_width(objective, torch.zeros(size, dtype=torch.float64), ranks)
        assert (wide, cut) == (pytest.approx(2.0, rel=2e-3), False)
        assert ended and near == pytest.approx(1000 * float(ranks[1].norm()))
        assert none == (None, False)
        # On the mean: towards the two that are not the center, and at least, as one search ended before.
        for some, width, least in ((ranks, None, (wide + near) / 2), (ranks[::2], wide, wide), (ranks[2:], None, None)):
            found = measure(Subject(objective, some), Settings(measures=("valley",)))
            assert found["valley_width"] == (None if width is None else pytest.approx(width))
            assert found["valley_width_at_least"] == (None if least is None else pytest.approx(least))

    on_ranks(body)


class Barrier(nn.Module):
    """1 + 64 x²(1 - x)², whatever the input is."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return (1 + 64 * self.x.square() * (1 - self.x).square()).expand(len(inputs))


def test_a_valley_ends_at_a_barrier_before_the_rank() -> None:
    """f is 2 where x(1 - x) = 1/8, and 1 again at the rank, x = 1."""
    objective = Objective(Barrier(), Plain(), Pairs(drawn(5, 1), drawn(5, 1)))
    ((width, cut),) = valley_width(objective, torch.zeros(1).double(), [torch.ones(1).double()])
    assert (width, cut) == (pytest.approx((1 - 0.5**0.5) / 2, rel=2e-3), False)


class Forgetful(nn.Linear):
    """With a dropout that knows of no mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5)


def test_dropout_is_off_whatever_applies_it() -> None:
    model, pairs = Forgetful(3, 3).double(), Pairs(drawn(9, 3), torch.arange(9) % 3)
    plain = nn.Linear(3, 3).double()
    plain.load_state_dict(model.state_dict())
    found, expected = (Objective(one, nn.CrossEntropyLoss(), pairs) for one in (model, plain))
    assert found.value() == expected.value()
    v = drawn(12, seed=5)
    assert torch.equal(found.gradient()[1], expected.gradient()[1])
    assert torch.equal(found.product(v), expected.product(v))


def test_entropy_is_that_of_classes() -> None:
    """The second dimension: where positions are, or numbers and no classes, there is none."""
    logits = drawn(4, 3, 5)
    each = torch.distributions.Categorical(logits=logits).entropy().mean()
    flat = nn.Flatten(0, 1)
    kinds = {
        "classes": (logits.mT, torch.zeros(4, 3).long(), nn.CrossEntropyLoss(), float(each)),
        "positions": (logits, torch.zeros(4, 3).long(), lambda out, y: F.cross_entropy(flat(out), flat(y)), None),
        "numbers": (logits[:, :1, 0], torch.zeros(4).long(), lambda out, y: (out[:, 0] - y).square().mean(), None),
    }
    for shown, targets, loss, expected in kinds.values():
        objective = Objective(Through(), loss, Pairs(shown, targets))
        found = measure(Subject(objective), Settings(measures=("entropy",)))
        assert found["entropy"] == (None if expected is None else pytest.approx(expected))


def test_ranks_measure_one_model(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        model = nn.Linear(2, 1).double()
        with torch.no_grad():
            model.weight.fill_(float(comm.rank == comm.size - 1))
            model.bias.zero_()
        if comm.size > 1:
            with pytest.raises(RanksDisagree, match=rf"rank {comm.size - 1} has another model in place than rank 0"):
                Objective(model, nn.MSELoss(), Pairs(drawn(3, 2), drawn(3, 1)), comm)

    on_ranks(body)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_recurrent_network_has_a_hessian() -> None:
    """CuDNN's has neither a backward pass in eval mode nor a second derivative."""
    model = nn.Sequential(nn.LSTM(2, 3, batch_first=True), Last(), nn.Linear(3, 1)).double().cuda()
    objective = Objective(model, nn.MSELoss(), Pairs(drawn(4, 5, 2), drawn(4, 1)))
    u, v = (drawn(len(objective.vector), seed=seed).cuda() for seed in (1, 2))
    assert float(u @ objective.product(v)) == pytest.approx(float(v @ objective.product(u)), rel=1e-9)


def precisions() -> list[Any]:
    """How exactly float32 is computed, as the program has set it."""
    backends: Any = torch.backends
    found = [torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32]
    if hasattr(backends.cudnn, "conv"):
        kinds = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul
        found += [kind.fp32_precision for kind in kinds]
    return [*found, backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic]


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("set_", ["default", "medium"])
def test_float32_is_measured_in_float32(recurrent: bool, set_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in TF32, which cuDNN's convolutions take by default, nor in what else the program lets products take."""
    seen: list[list[Any]] = []

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(precisions())
            return super().forward(x)

    kinds = [nn.LSTM(2, 3, batch_first=True), Last()] if recurrent else [nn.Flatten()]
    model = nn.Sequential(*kinds, Looks(3 if recurrent else 10, 1))
    objective = Objective(model, nn.MSELoss(), Pairs(drawn(4, 5, 2), drawn(4, 1)))
    monkeypatch.setattr("torch.backends.cudnn.benchmark", True)
    matmul = torch.get_float32_matmul_precision()
    try:
        if set_ == "medium":
            torch.set_float32_matmul_precision("medium")
        before = precisions()
        objective.value()
        assert precisions() == before and before[1]
    finally:
        torch.set_float32_matmul_precision(matmul)
    [inside] = seen
    assert inside[:3] == ["highest", False, False] and set(inside[3:-3]) <= {"ieee"}
    assert inside[-3:] == [not recurrent, False, before[-1]]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has one for all")
@pytest.mark.parametrize(
    ("name", "value"), [("cudnn.conv", "ieee"), ("cuda.matmul", "tf32"), ("mkldnn.conv", "bf16"), ("", "tf32")]
)
def test_precisions_set_one_by_one_are_kept(name: str, value: str) -> None:
    """PyTorch then refuses to say what it calls the older ones."""
    where = f"torch.backends.{name}".rstrip(".") + ".fp32_precision"
    program = (
        f"import torch\n{where} = {value!r}\nfrom torch import nn\nfrom hpc_grawa.flatness import Objective\n"
        "from test_flatness import Pairs\n"
        "pairs = Pairs(torch.ones(3, 2), torch.zeros(3, 1))\n"
        f"Objective(nn.Linear(2, 1), nn.MSELoss(), pairs).value()\nprint({where})"
    )
    done = launch(program=("-c", program))
    assert done.output == f"{value}\n", done.errors


class Through(nn.Module):
    """Its inputs, and a parameter that is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.theta


class Last(nn.Module):
    def forward(self, output: tuple[Tensor, Any]) -> Tensor:
        return output[0][:, -1]


def test_without_a_positive_loss_there_is_no_width() -> None:
    """κ·f(center) is no bound where f(center) is 0, negative, or not finite."""
    for value in (0.0, -1.0, math.nan, math.inf):
        objective = Objective(Constant(value), Plain(), Pairs(drawn(5, 1), drawn(5, 1)))
        ((width, cut),) = valley_width(objective, drawn(2), [drawn(2, seed=1)])
        assert math.isnan(width) and not cut


def test_a_loss_that_is_not_finite_has_no_spectrum(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        objective, _, _ = quadratic(comm)
        objective.model.get_buffer("a")[0, 0] = math.nan
        lanczos = Lanczos(12, 0, comm, torch.float64)
        lanczos.advance(lambda v: v)
        with pytest.raises(NonFinite, match="product of step 2 is not finite"):
            lanczos.advance(lambda v: math.nan * v)
        assert lanczos.steps == 1
        found = measure(Subject(objective), Settings(measures=("loss", "spectrum", "sam", "keskar"), steps=3))
        assert found["largest_eigenvalue"] is None and math.isnan(found["epsilon_sharpness"])

    on_ranks(body)


def test_ranks_without_an_example_take_part(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        objective = Objective(network(comm).vector, nn.CrossEntropyLoss(), network(None)._data, comm, limit=2)
        alone = Objective(network(None).model, nn.CrossEntropyLoss(), network(None)._data, limit=2)
        assert objective.value() == pytest.approx(alone.value(), rel=1e-9)
        torch.testing.assert_close(objective.gradient()[1], alone.gradient()[1], rtol=1e-9, atol=1e-12)

    on_ranks(body)


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.theta = value, nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.value + 0 * (x + self.theta.sum())


class Shifted(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return 1 + output.mean()


def test_a_plane_holds_its_three_models(on_ranks: Ranks) -> None:
    def body(comm: Communicator) -> None:
        objective, a, b = quadratic(comm)
        corners: Any = tuple(drawn(12, seed=s) for s in (2, 3, 4))
        plane = Plane(corners)

        def f(x: Tensor) -> float:
            return float(0.5 * x @ a @ x - b @ x)

        places = [plane.place(corner) for corner in corners]
        assert places[0] == (0, 0) and places[1][1] == pytest.approx(0, abs=1e-12)
        for (x, y), corner in zip(places, corners, strict=True):
            torch.testing.assert_close(plane.model(x, y), corner, rtol=1e-12, atol=1e-12)
            assert plane.losses(objective, (x,), (y,))[0, 0] == pytest.approx(f(corner))
        distances = [float((corners[i] - corners[j]).norm()) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert [math.dist(places[i], places[j]) for i, j in ((0, 1), (0, 2), (1, 2))] == pytest.approx(distances)
        # The foot of what lies beside it is nearest.
        beside = drawn(12, seed=5)
        foot, off = plane.model(*plane.place(beside)), plane.model(1, 0) - plane.model(0, 0)
        assert float((beside - foot) @ off) == pytest.approx(0, abs=1e-9)
        assert plane.losses(objective, (0, 1, 2), (0, 1)).shape == (2, 3)
        for third in (corners[0], corners[1], (corners[0] + corners[1]) / 2):
            with pytest.raises(ConfigError, match="lie on one line"):
                Plane((corners[0], corners[1], third))
        with pytest.raises(ConfigError, match="lie on one line"):
            Plane((corners[0], corners[0], corners[1]))

    on_ranks(body)


def test_every_number_of_a_network_is_that_of_its_hessian_gradient_and_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    objective = Objective(model, nn.CrossEntropyLoss(), Pairs(drawn(12, 3), torch.arange(12) % 3), batch_size=5)
    vector, size = objective.vector, len(objective.vector)
    hessian = torch.stack([objective.product(e) for e in torch.eye(size, dtype=torch.float64)])
    values = torch.linalg.eigvalsh(hessian)
    settings = Settings(measures=("loss", "entropy", "spectrum", "trace"), steps=size, samples=size)
    found = measure(Subject(objective), settings)
    assert found["largest_eigenvalue"] == pytest.approx(float(values[-1]), rel=1e-8)
    assert found["smallest_eigenvalue"] == pytest.approx(float(values[0]), rel=1e-8)
    assert found["sum_of_ritz_values"] == pytest.approx(float(values.sum()), rel=1e-6)
    assert found["root_of_squared_ritz_values"] == pytest.approx(float(hessian.norm()), rel=1e-6)
    for name, exact in (("trace", float(values.sum())), ("frobenius_norm", float(hessian.norm()))):
        assert abs(found[name] - exact) <= 4 * found[f"{name}_error"] + 1e-9
    value, gradient = objective.gradient()
    layers = [vector.views(gradient)[i].norm() for i in range(len(vector.parameters))]
    assert (found["loss"], found["gradient_norm"]) == pytest.approx((value, float(gradient.norm())))
    assert found["sum_of_layer_norms"] == pytest.approx(float(sum(layers)))
    shares = torch.cat([output.softmax(1) for output, _, _ in objective.outputs()])
    assert found["entropy"] == pytest.approx(float(-(shares * shares.log()).sum(1).mean()))


def test_products_and_what_is_made_of_them_are_those_of_a_library() -> None:
    from curvlinops import HessianLinearOperator

    objective = network(None, count=12)
    model, data = objective.model.eval(), objective._data
    parts = [data.batch(index) for index in torch.arange(12).split(4)]
    hessian = HessianLinearOperator(model, nn.CrossEntropyLoss(), [p for p in model.parameters()], parts)
    v = drawn(len(objective.vector))
    torch.testing.assert_close(objective.product(v), hessian @ v, rtol=1e-8, atol=1e-10)
    whole = hessian @ torch.eye(len(v), dtype=v.dtype)
    eigenvalues = torch.linalg.eigvalsh((whole + whole.T) / 2)
    lanczos = Lanczos(len(v), 0, dtype=v.dtype)
    for _ in range(60):
        lanczos.advance(objective.product)
    ritz = lanczos.ritz()[0]
    assert (ritz[0], ritz[-1]) == pytest.approx((float(eigenvalues[0]), float(eigenvalues[-1])), rel=1e-6)
    trace, square = trace_and_square(objective.product, objective.vector.data, 30, seed=0)
    assert abs(trace.value - float(whole.trace())) <= 4 * trace.error
    assert abs(square.value - float(whole.square().sum())) <= 4 * square.error
