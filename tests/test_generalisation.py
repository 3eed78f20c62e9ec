"""Generalisation measures: by hand, in closed form, and against SciPy."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from test_flatness import Pairs, Stubborn, drawn
from torch import Tensor, nn

from hpc_grawa import simulate
from hpc_grawa.comm import Communicator
from hpc_grawa.errors import ConfigError
from hpc_grawa.generalisation import conditional_information, fold, granulated, measures, psi, tau
from hpc_grawa.generalisation.noise import aware_bound, bounds, largest
from hpc_grawa.generalisation.norms import kernel_norm, layers, of_products, operator_norm, path_norm, square
from hpc_grawa.models import GPT, VGG16, AllCNN, DenseNet121, PyramidNet110, ResNet18, ResNet20, SmallCNN, WRN28x10

# ---------------------------------------------------------------------------------------------------------
# Rankings.
# ---------------------------------------------------------------------------------------------------------


def test_tau_is_scipys_where_there_are_no_ties() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        measure, gap = generator.normal(size=(2, 30))
        assert tau(measure, gap).value == pytest.approx(kendalltau(measure, gap).statistic)
    assert (tau([1, 1, 2], [1, 2, 3]).ties, tau([1, 1, 2], [1, 2, 3]).value) == (1, 2 / 3)
    assert math.isnan(tau([1], [1]).value)
    assert (tau([math.inf, math.inf, 1], [2, 3, 1]).ties, tau([math.inf, math.inf, 1], [2, 3, 1]).value) == (1, 2 / 3)


def test_psi_by_hand() -> None:
    """2 x 3 runs; along lr each column has one pair, along depth each row three.

    depth:        1  2  3
    lr 1   μ      1  2  3     gap  1  3  2
    lr 2   μ      4  3  6     gap  2  1  5
    """
    axes = {"lr": [1, 1, 1, 2, 2, 2], "depth": [1, 2, 3, 1, 2, 3]}
    along = granulated([1, 2, 3, 4, 3, 6], [1, 3, 2, 2, 1, 5], axes)
    # lr: columns (1→4, 1→2) +, (2→3, 3→1) -, (3→6, 2→5) +.  depth: (+, +, -)/3, (+, +, +)/3.
    assert along == {"lr": pytest.approx(1 / 3), "depth": pytest.approx((1 / 3 + 1) / 2)}
    assert psi(along) == pytest.approx(0.5)
    # Each run once more, by another seed: pairs of seeds differ in no axis.
    twice = {axis: [*values, *values] for axis, values in axes.items()}
    again = granulated([1, 2, 3, 4, 3, 6, 9, 9, 9, 9, 9, 9], [1, 3, 2, 2, 1, 5, 0, 0, 0, 0, 0, 0], twice)

    # A cell of lr has (1, 4), (1, 9), (9, 4), (9, 9): products +, -, ... by hand below.
    def along_lr(a: int, b: int, x: int, y: int) -> float:
        pairs = ((a, x, b, y), (a, x, 9, 0), (9, 0, b, y), (9, 0, 9, 0))
        return sum(int(np.sign(p - r) * np.sign(q - s)) for p, q, r, s in pairs) / 4

    assert again["lr"] == pytest.approx(np.mean([along_lr(1, 4, 1, 2), along_lr(2, 3, 3, 1), along_lr(3, 6, 2, 5)]))
    assert granulated([1, 2], [1, 2], {"lr": [1, 1]})["lr"] is math.nan


def test_what_is_no_axis_is_fixed_too_in_runs_that_both_have_it() -> None:
    """Of 2 x 2 runs with μ = 10 depth + lr and gap = 10 depth - lr, τ along lr is -1, be depth an axis or not."""
    lr, depth = [1, 2, 1, 2], [1, 1, 2, 2]
    measure = [10 * d + x for x, d in zip(lr, depth, strict=True)]
    gap = [10 * d - x for x, d in zip(lr, depth, strict=True)]
    assert granulated(measure, gap, {"lr": lr, "depth": depth})["lr"] == -1
    assert granulated(measure, gap, {"lr": lr}, {"depth": depth}) == {"lr": -1}
    periods = [8, 16, None, None]  # which the second of two methods does not have
    methods = ["a", "a", "b", "b"]
    assert granulated(measure, gap, {"method": methods}, {"method.period": periods}) == {"method": 1}
    # Along lr runs of two periods are not compared; each is with those of none, and these with each other.
    pairs = [(0, 3), (2, 1), (2, 3)]
    expected = sum(int(np.sign((measure[a] - measure[b]) * (gap[a] - gap[b]))) for a, b in pairs) / 3
    assert granulated(measure, gap, {"lr": lr}, {"method.period": periods}) == {"lr": pytest.approx(expected)}


def test_conditional_information_by_definition() -> None:
    """min over S of I(V_μ; V_gap | U_S) / H(V_gap | U_S), from counts over ordered pairs of 8 runs."""
    axes = {"a": [0, 0, 0, 0, 1, 1, 1, 1], "b": [0, 1, 0, 1, 0, 1, 0, 1]}
    measure, gap = [0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 1, 2, 7, 4, 6, 5]

    def told(*chosen: str) -> float:
        pairs = []
        for i, j in itertools.permutations(range(8), 2):
            one, other = (tuple(axes[c][run] for c in chosen) for run in (i, j))
            if one == other:
                pairs.append((one, measure[i] > measure[j], gap[i] > gap[j]))

        def entropy(*parts: int) -> float:
            shares = np.array(list(Counter(tuple(pair[part] for part in parts) for pair in pairs).values())) / len(
                pairs
            )
            return float(-(shares * np.log2(shares)).sum())

        information = entropy(0, 1) + entropy(0, 2) - entropy(0) - entropy(0, 1, 2)
        return information / (entropy(0, 2) - entropy(0))

    expected = min(told(), told("a"), told("b"))
    assert conditional_information(measure, gap, {**axes, "c": [0, 0, 1, 1, 0, 0, 1, 1]}) == pytest.approx(
        min(expected, told("a", "b"))
    )
    assert conditional_information(measure, measure, axes) == 1.0
    assert conditional_information(measure, [-m for m in measure], axes) == 1.0  # it tells as much


def test_what_a_measure_does_not_tell() -> None:
    """It says nothing where it ties, and nothing is asked of it in pairs that differ in no axis, as those of seeds."""
    axes = {"width": [1, 1, 2, 2], "lr": [1, 2, 1, 2]}
    assert conditional_information([1, 1, 1, 1], [1, 2, 3, 4], axes) == 0.0
    assert conditional_information([1, 1, 2, 2], [1, 2, 3, 4], axes) == 0.0  # given the width
    assert conditional_information([1, 1, 2, 2], [1, 2, 3, 4], axes, most=0) == pytest.approx(4 / 6)
    seeds = {axis: [*values, *values] for axis, values in axes.items()}
    measure = [1, 2, 3, 4, 1.2, 2.2, 3.2, 4.2]
    gap = [10, 20, 30, 40, 9, 19, 29, 39]  # a second seed turns both round
    assert conditional_information(measure, gap, seeds) == 1.0
    assert math.isnan(conditional_information([1, 2], [1, 2], {"lr": [1, 1]}))


# ---------------------------------------------------------------------------------------------------------
# Folding.
# ---------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, *shape: int) -> nn.Module:
    """With statistics and scales that are not those of the start."""
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        (SmallCNN(in_channels=3), 0),
        (ResNet20(), 0),
        (ResNet18(stages=2), 0),
        (AllCNN(), 0),
        (VGG16(), 0),
        # Kept is the first norm of each block, whose input the shortcut sees too, and the last, which follows a sum.
        (WRN28x10(widen=1), 13),
        (PyramidNet110(alpha=54), 55),
        (DenseNet121(growth=2), 62),
    ],
    ids=lambda value: type(value).__name__,
)
def test_folding_leaves_outputs_as_they_were(model: nn.Module, kept: int) -> None:
    model, x = trained(model), drawn(2, 3, 16, 16)
    found = fold(model)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), model(x), rtol=1e-9, atol=1e-9)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert (len(found.kept), len(found.folded)) == (kept, len(norms) - kept)


class Twice(nn.Module):
    """A layer whose output is used beside its norm, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.b, self.norm_b = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        z = self.norm_b(self.b(y))
        return self.norm_a(y) + y + self.b(z)  # type: ignore[no-any-return]


class Hidden(SmallCNN):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


def test_what_is_not_the_only_consumer_stays_and_what_cannot_be_followed_is_named() -> None:
    model, x = trained(Twice()), drawn(4, 3)
    found = fold(model)
    assert (found.kept, found.folded) == (["norm_a", "norm_b"], [])
    torch.testing.assert_close(found.model(x), model(x))
    with pytest.raises(ConfigError, match=r"BatchNorm of Hidden cannot be folded, as torch\.fx cannot follow"):
        fold(Hidden())


class Called(nn.Sequential):
    """With its input by name, and, if asked, its first weight once more."""

    def __init__(self, *modules: nn.Module, again: bool = False) -> None:
        super().__init__(*modules)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        y = self[1](input=self[0](input=x))
        return y + F.linear(x, self[0].weight) if self.again else y


class Aliased(nn.Module):
    """One that knows its layers by two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.features = nn.Sequential(self.layer, self.norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)  # type: ignore[no-any-return]


class Own(nn.Linear):
    """One's own, that computes as torch's."""


class Standardised(nn.Conv1d):
    """One's own, that computes its weight first."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2), keepdim=True), bias)


@pytest.mark.parametrize(
    ("model", "shape", "folded"),
    [
        (nn.Sequential(Standardised(5, 3, 2), nn.BatchNorm1d(3)), (4, 5, 4), False),
        (Aliased(), (4, 3), True),
        (nn.Sequential(Own(3, 3), nn.BatchNorm1d(3)), (4, 3), True),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), (4, 3), True),
        (Called(nn.Linear(3, 3), nn.BatchNorm1d(3)), (4, 3), True),
        (Called(nn.Linear(3, 3), nn.BatchNorm1d(3), again=True), (4, 3), False),
        (nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), (4, 3, 5), False),  # normalises the second dimension
        (nn.Sequential(nn.Conv1d(5, 3, 2), nn.BatchNorm1d(3)), (4, 5, 4), True),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)), (4, 3), False),
    ],
)
def test_folding_stays_away_from_what_it_would_change(model: nn.Module, shape: tuple[int, ...], folded: bool) -> None:
    model = model.double()
    model(drawn(*shape))  # for statistics
    model.eval()
    x = drawn(*shape, seed=1)
    found = fold(model, x)
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-9, atol=1e-9)
    assert bool(found.folded) == folded


# ---------------------------------------------------------------------------------------------------------
# Norms and bounds.
# ---------------------------------------------------------------------------------------------------------


def test_the_operator_norm_is_that_of_the_matrix_that_a_convolution_is() -> None:
    for stride, padding in ((1, 1), (2, 0)):
        layer = nn.Conv2d(2, 3, 3, stride, padding, bias=False).double()
        x = drawn(1, 2, 5, 5)
        (found,) = layers(layer, x)
        columns = [layer(e.reshape(1, 2, 5, 5)).flatten().detach() for e in torch.eye(50, dtype=torch.float64)]
        exact = float(torch.linalg.matrix_norm(torch.stack(columns, 1), 2))
        assert operator_norm(found, 1e-10, 5000) == pytest.approx(exact, rel=1e-6)
        assert kernel_norm(found.weight) == pytest.approx(
            float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))
        )


def test_norms_of_two_layers() -> None:
    found = of_products([4.0, 9.0], [8.0, 27.0], margin=0.5)
    assert found["product"] == pytest.approx(math.log(36))
    assert found["product_over_margin"] == pytest.approx(math.log(36 / 0.25))
    assert found["ratio"] == pytest.approx(math.log(36 / 0.25 * 5))
    assert found["ratios"] == 5
    assert found["mean"] == pytest.approx(2 * 6)
    assert found["mean_over_margin"] == pytest.approx(2 * 6 / 0.5)
    assert of_products([4.0], [4.0], margin=-1)["product_over_margin"] == math.inf
    assert all(map(math.isnan, of_products([4.0, 0.0], [4.0, 1.0], margin=1).values()))  # a layer that died


def test_the_path_norm_sums_over_paths() -> None:
    """Σ over paths of the product of squared weights, whatever the signs."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    a, b = (model[i].weight.detach() for i in (0, 2))  # type: ignore[union-attr]
    expected = float((b.square() @ a.square()).sum())
    assert path_norm(model, (3,)) == (pytest.approx(expected, rel=1e-12), True)
    model[1] = nn.Tanh()
    assert not path_norm(model, (3,))[1]


def test_the_largest_disturbance() -> None:
    for exact in (1e-5, 0.01, 0.3, 40.0):
        found = largest(lambda size, exact=exact: size / exact, bound=1.0, tolerance=1e-3)  # type: ignore[misc]
        assert found.size <= exact <= found.size * (1 + 2e-3) and found.tolerance <= 1e-3
    assert largest(lambda size: 1.0, 0.1).size == 0 and largest(lambda size: 0.0, 0.1).size == math.inf


def test_bounds_are_their_formulas() -> None:
    assert bounds(0.5, 3.0, 100, 4.0) == pytest.approx(3 / (4 * 0.25) + math.log(200) + 10)
    w, start = drawn(5), drawn(5, seed=1)
    norm, size, added = float((w - start).square().sum()), 0.3, 1.0
    each = [
        0.25 * math.log((1e-6 + (size**2 + added) * norm / 5) / (1e-6 + size**2 * float(a - b) ** 2))
        for a, b in zip(w, start, strict=True)
    ]
    assert aware_bound(size, w, start, norm, 50, added) == pytest.approx(sum(each) + math.log(50 / size) + 10)
    for size, limit in ((0.0, math.inf), (math.inf, -math.inf), (math.nan, math.nan)):
        for found in (bounds(size, 1.0, 1, 1.0), aware_bound(size, w, start, norm, 50, added)):
            assert found == pytest.approx(limit, nan_ok=True)


def test_every_measure_of_a_linear_network_in_closed_form() -> None:
    """Two linear layers on two classes, whose margin is uᵀx with u = (b_1 - b_0) A."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    start = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    a, b = (model[i].weight.detach() for i in (0, 1))  # type: ignore[union-attr]
    x = drawn(40, 3)
    logits = x @ (b @ a).T
    y = logits.argmax(1)
    found = measures(model, start, Pairs(x, y), batch_size=25)
    values = found.values
    margins = (logits[torch.arange(40), y] - logits[torch.arange(40), 1 - y]).sort().values
    margin = float(torch.quantile(margins, 0.1))
    assert values["margin"] == pytest.approx(margin) and values["inverse_margin"] == pytest.approx(margin**-2)
    assert values["cross_entropy"] == pytest.approx(float(F.cross_entropy(logits, y)))
    p = logits.softmax(1)
    assert values["entropy"] == pytest.approx(float(-(p * p.log()).sum(1).mean()))
    two = [float(torch.linalg.matrix_norm(w, 2)) ** 2 for w in (a, b)]
    moved = [w - s.weight.detach() for w, s in zip((a, b), start, strict=True)]  # type: ignore[arg-type, union-attr]
    assert values["spectral_product"] == pytest.approx(math.log(two[0] * two[1]))
    assert values["spectral_init"] == pytest.approx(
        math.log(two[0] * two[1] / margin**2 * sum(square(m) / t for m, t in zip(moved, two, strict=True)))
    )
    assert values["frobenius_distance"] == pytest.approx(sum(map(square, moved)))
    assert values["parameter_norm"] == pytest.approx(square(a) + square(b))
    assert values["path_norm"] == pytest.approx(float((b.square() @ a.square()).sum()))
    assert values["parameters"] == 3 * 5 + 4 * 3
    # ⟨w, ∇ℓ⟩ = 2 ⟨logits, ∂ℓ/∂logits⟩, as logits are of degree 2 in the weights.
    slopes = 2 * (logits * (p - F.one_hot(y, 2))).sum(1)
    assert values["fisher_rao"] == pytest.approx(9 * float(slopes.square().mean()))
    assert not found.left_out and not found.notes
    assert values["spectral_orig"] == pytest.approx(
        math.log(two[0] * two[1] / margin**2 * (square(a) / two[0] + square(b) / two[1]))
    )
    assert values["spectral_product_over_margin"] == pytest.approx(math.log(two[0] * two[1] / margin**2))
    assert values["spectral_mean"] == pytest.approx(2 * math.sqrt(two[0] * two[1]))
    assert values["spectral_mean_over_margin"] == pytest.approx(values["spectral_mean"] / margin)
    assert values["frobenius_over_spectral"] == pytest.approx(square(a) / two[0] + square(b) / two[1])
    assert values["frobenius_mean_over_margin"] == pytest.approx(values["frobenius_mean"] / margin)
    assert values["frobenius_product"] == pytest.approx(math.log(square(a) * square(b)))
    assert values["frobenius_product_over_margin"] == pytest.approx(math.log(square(a) * square(b) / margin**2))
    assert values["frobenius_mean"] == pytest.approx(2 * math.sqrt(square(a) * square(b)))
    assert values["spectral_distance"] == pytest.approx(sum(float(torch.linalg.matrix_norm(m, 2)) ** 2 for m in moved))
    assert values["path_norm_over_margin"] == pytest.approx(values["path_norm"] / margin**2)
    assert values["vc_dimension"] == pytest.approx(2 * math.log2(6 * 2 * 3) ** 3 * (3 * 4 + 4 * 2))
    weights, begun = (torch.cat([m[i].weight.detach().flatten() for i in (0, 1)]) for m in (model, start))
    norm, moved_by = float(weights.square().sum()), float((weights - begun).square().sum())
    sigma, alpha = values["pac_bayes_size"], values["sharpness_size"]
    assert values["pac_bayes_flatness"] == pytest.approx(sigma**-2)
    assert values["sharpness_flatness"] == pytest.approx(alpha**-2)
    for kind, distance in (("orig", norm), ("init", moved_by)):
        assert values[f"pac_bayes_{kind}"] == pytest.approx(distance / (4 * sigma**2) + math.log(40 / sigma) + 10)
        assert values[f"sharpness_{kind}"] == pytest.approx(
            distance * math.log(2 * 20) / (4 * alpha**2) + math.log(40 / alpha) + 10
        )
    for name, added in (("pac_bayes", 1.0), ("sharpness", 4 * math.log(2 * 20 / 0.1))):
        size = values[f"{name}_mag_size"]
        assert values[f"{name}_mag_flatness"] == pytest.approx(size**-2)
        for kind, distance in (("orig", norm), ("init", moved_by)):
            below = 1e-6 + size**2 * (weights - begun).square()
            told = 0.25 * float(((1e-6 + (size**2 + added) * distance / 20) / below).log().sum())
            assert values[f"{name}_mag_{kind}"] == pytest.approx(told + math.log(40 / size) + 10)
    assert set(measures(model, None, Pairs(x, y)).left_out) >= {"spectral_init", "frobenius_distance", "pac_bayes_init"}


def test_noise_on_a_linear_model_in_closed_form() -> None:
    """With one layer of two outputs the error under N(0, s²) is the mean of Φ(-margin / √(Σ x_j²(s_0j² + s_1j²))).

    s is σ, or of noise that knows magnitudes √(σ'²w² + ε²).
    """
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2, bias=False).double(), drawn(200, 3)
    logits = x @ model.weight.detach().T
    y = logits.argmax(1)
    margins = logits[torch.arange(200), y] - logits[torch.arange(200), 1 - y]
    w = model.weight.detach()

    def exact(aware: bool) -> float:
        low, high = 1e-4, 10.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            variance = middle**2 * w.square() + 1e-6 if aware else torch.full_like(w, middle**2)
            error = float(torch.special.ndtr(-margins / (x.square() @ variance.sum(0)).sqrt()).mean())
            low, high = (middle, high) if error <= 0.1 else (low, middle)
        return low

    from hpc_grawa.flatness import Objective
    from hpc_grawa.generalisation.noise import Errors, gaussian, worst

    errors = Objective(model, Errors(), Pairs(x, y))
    for aware in (False, True):
        assert gaussian(errors, 0.1, aware, draws=400).size == pytest.approx(exact(aware), rel=0.15)
    losses = Objective(errors.vector, nn.CrossEntropyLoss(), Pairs(x, y))
    # In a box each margin falls by α ‖x‖₁·2 at most; the ascent cannot do that to all examples at once.
    reach = (logits[torch.arange(200), y] - logits[torch.arange(200), 1 - y]) / (2 * x.abs().sum(1))
    assert worst(losses, 0.1, aware=False).size >= float(reach.sort().values[20]) * 0.9


def test_the_worst_neighbour_of_one_example() -> None:
    """Of a linear model the margin falls by Σ|x_j|(b_0j + b_1j) at most, b = α, or α'|w| + ε."""
    from hpc_grawa.flatness import Objective
    from hpc_grawa.generalisation.noise import worst

    torch.manual_seed(0)
    model, x = nn.Linear(3, 2, bias=False).double(), drawn(1, 3)
    logits = x @ model.weight.detach().T
    y = logits.argmax(1)
    margin, reach = float(logits[0, y[0]] - logits[0, 1 - y[0]]), x.abs()[0]
    exact = margin / (2 * float(reach.sum()))
    by_magnitude = float(reach @ model.weight.detach().abs().sum(0))
    losses = Objective(model, nn.CrossEntropyLoss(), Pairs(x, y))
    assert worst(losses, 0.1, aware=False).size == pytest.approx(exact, rel=0.02)
    found = worst(losses, 0.1, aware=True)
    assert found.size == pytest.approx((margin - 2e-3 * float(reach.sum())) / by_magnitude, rel=0.02)
    with torch.no_grad():
        model.weight *= 1e4  # so sure that the loss is 0 to the last digit
    assert math.isnan(worst(losses, 0.1, aware=False).size)


def test_measures_are_those_of_one_process_on_several_ranks() -> None:
    torch.manual_seed(0)
    model, start = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double() for _ in range(2))
    x = drawn(9, 3)
    y = model(x).argmax(1)

    def body(comm: Communicator) -> dict[str, float]:
        return measures(copy.deepcopy(model), copy.deepcopy(start), Pairs(x, y), comm, batch_size=4).values

    (alone,) = simulate(1, body)
    for values in simulate(4, body):
        assert values == {key: pytest.approx(value, rel=1e-6, nan_ok=True) for key, value in alone.items()}


def test_measures_of_a_network_with_batchnorm_are_those_of_its_layers_as_they_act() -> None:
    """γ/√(v + ε) scales the kernel, and no measure sees the BatchNorm."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)]
    model = trained(nn.Sequential(*parts))
    plain = copy.deepcopy(model)
    layer, norm = plain[0], plain[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        layer.weight.mul_(scale[:, None, None, None])
        layer.bias.copy_((layer.bias - norm.running_mean) * scale + norm.bias)
    plain[1] = nn.Identity()
    examples = Pairs(drawn(20, 1, 4, 4, seed=1), torch.arange(20) % 2)
    found, expected = (measures(one, None, examples) for one in (model, plain))
    assert found.notes == expected.notes == [] and found.values.keys() == expected.values.keys()
    assert found.values == {key: pytest.approx(value, rel=1e-6, nan_ok=True) for key, value in expected.values.items()}


def test_a_layer_of_two_names_is_one() -> None:
    model = trained(Aliased())
    plain = nn.Sequential(*copy.deepcopy(model).features)
    examples = Pairs(drawn(12, 3, seed=1), torch.arange(12) % 3)
    found, expected = (measures(one, None, examples).values for one in (model, plain))
    assert found == {key: pytest.approx(value, rel=1e-9, nan_ok=True) for key, value in expected.items()}


def test_what_has_no_forward_derivative_lacks_one_measure() -> None:
    model, examples = Stubborn(3, 2).double(), Pairs(drawn(5, 3), torch.arange(5) % 2)

    def body(comm: Communicator) -> Any:
        return measures(copy.deepcopy(model), None, examples, comm)

    for found in simulate(2, body):
        why = "there is no forward derivative of the network: .*autograd.Function"
        assert re.match(why, found.left_out["fisher_rao"]) and "fisher_rao" not in found.values
        assert math.isfinite(found.values["path_norm"])


class Two(nn.Module):
    """Several heads, tied weights, and more that measures are not defined for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(4, 4), nn.Linear(4, 4)
        if kind == "tied":
            self.b.weight = self.a.weight
        self.norm = nn.LayerNorm(4) if kind == "LayerNorm" else nn.BatchNorm1d(4, track_running_stats=kind != "batch")
        self.attention = nn.MultiheadAttention(4, 1) if kind == "attention" else None

    def forward(self, x: torch.Tensor) -> Any:
        x = self.norm(self.b(torch.relu(self.a(x))))
        if self.attention is not None:
            x = x + self.attention(x, x, x)[0]
        return (x, x) if self.kind == "heads" else x.unsqueeze(1) if self.kind == "positions" else x


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("heads", "one head"),
        ("positions", "one head"),
        ("tied", "its weight twice"),
        ("attention", "weights, 'attention.in_proj_weight', of no convolution or linear layer"),
        ("LayerNorm", "normalises by each input, 'norm'"),
        ("batch", "'norm' has no running statistics"),
    ],
)
def test_what_has_no_measures_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measures(Two(kind).double(), None, Pairs(drawn(8, 4), torch.arange(8) % 4))


def test_a_language_model_is_refused() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    with pytest.raises(ConfigError, match="one head"):
        measures(GPT(vocabulary=16, context=4, depth=1, width=8, heads=1), None, Pairs(tokens, tokens))
