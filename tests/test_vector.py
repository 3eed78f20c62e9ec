"""One flat tensor of which a model's parameters are views: what is in it, what stays out, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpc_grawa import ParameterVector
from hpc_grawa.errors import ConfigError, LostView


class Net(nn.Module):
    """A convolution, BatchNorm (with its integer buffer), and a head that shares a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))  # held directly by the module that is no leaf
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
        self.head = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.body(x).mean((2, 3)) * self.scale
        return self.tied(torch.tanh(self.head(pooled)))


NAMES = ("scale", "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "tied.bias")
SIZES = (1, 54, 3, 3, 3, 9, 3)
INPUT = torch.linspace(-1, 1, 4 * 2 * 5 * 5).reshape(4, 2, 5, 5)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_parameters_become_views_and_keep_their_values() -> None:
    model, twin = net(), net()
    parameters = list(model.parameters())
    vector = ParameterVector(model)
    assert (vector.names, vector.sizes, len(vector)) == (NAMES, SIZES, sum(SIZES))
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))  # optimizers hold on to them
    assert torch.equal(vector.data, torch.cat([p.detach().flatten() for p in twin.parameters()]))
    assert torch.equal(model(INPUT), twin(INPUT))
    vector.data.zero_()
    assert all(not p.any() for p in parameters)
    with torch.no_grad():
        model.head.weight.fill_(7)
    assert (vector.data == 7).sum() == 9
    vector.check()


def test_a_tied_weight_is_in_it_once_and_stays_tied() -> None:
    model = net()
    vector = ParameterVector(model)
    assert model.tied.weight is model.head.weight
    assert vector.names.count("head.weight") == 1 and "tied.weight" not in vector.names


SHARED: dict[str, Callable[[Net], object]] = {
    "the same": lambda model: setattr(model.tied, "weight", nn.Parameter(model.head.weight)),
    "the same .data": lambda model: setattr(model.tied.weight, "data", model.head.weight.data),
    "a part": lambda model: setattr(model.tied.weight, "data", model.head.weight.data[1:]),
}


@pytest.mark.parametrize("share", SHARED)
def test_two_parameters_in_the_same_memory_are_named(share: str) -> None:
    """As views of the vector they would be two, where in a script of one process they are one."""
    model = net()
    model.tied.weight = nn.Parameter(torch.zeros(3, 3))
    SHARED[share](model)
    with pytest.raises(ConfigError, match=r"'head\.weight' and 'tied\.weight' lie in the same memory .* tie them"):
        ParameterVector(model)


def test_parameters_beside_each_other_in_the_same_storage_are_allowed() -> None:
    """As cuDNN lays those of an LSTM; without memory on the device "meta"; a number that stands for several; none."""
    flat = torch.arange(12.0)
    parts = flat[:6].view(2, 3).t(), flat[6:], flat[6:6], flat[5].clone().expand(2)
    vector = ParameterVector(nn.ParameterList([nn.Parameter(part) for part in parts]))
    assert torch.equal(vector.data, torch.cat([flat, flat[[5, 5]]]))
    vector.check()
    assert len(ParameterVector(nn.Linear(2, 3).to("meta"))) == 9


def test_frozen_parameters_and_buffers_stay_outside() -> None:
    model = net()
    model.body[0].requires_grad_(False)
    outside = {name: t.detach().clone() for name, t in (*model.body[0].named_parameters(), *model.named_buffers())}
    vector = ParameterVector(model)
    assert vector.names == (NAMES[0], *NAMES[3:])
    vector.data.fill_(3)
    for name, t in (*model.body[0].named_parameters(), *model.named_buffers()):
        assert torch.equal(t, outside[name])
    assert model.body[1].num_batches_tracked.dtype == torch.int64
    vector.check()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_views_keep_the_memory_format(memory_format: torch.memory_format) -> None:
    model = net().to(memory_format=memory_format)
    vector = ParameterVector(model)
    weight = model.body[0].weight
    assert weight.is_contiguous(memory_format=memory_format)
    assert torch.equal(weight, net().body[0].weight)
    in_memory = weight.detach().permute(0, 2, 3, 1) if memory_format == torch.channels_last else weight.detach()
    assert torch.equal(vector.data[1:55], in_memory.flatten())
    assert vector.views(vector.data.clone())[1].stride() == weight.stride()


def test_views_of_a_part_of_a_larger_tensor_lie_in_that_part() -> None:
    vector = ParameterVector(net())
    larger = torch.zeros(5 + len(vector))
    for value, view in enumerate(vector.views(larger[5:]), start=1):
        view.fill_(value)
    assert torch.equal(larger, torch.cat([torch.full((n,), float(v)) for v, n in enumerate((5, *SIZES))]))


def test_parameters_that_are_not_dense_are_made_so() -> None:
    model = nn.Linear(2, 3)
    model.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4)[:, ::2])
    vector = ParameterVector(model)
    assert model.weight.is_contiguous()
    assert vector.data[:6].tolist() == [0, 2, 4, 6, 8, 10]
    vector.check()


def test_mixed_dtypes_are_an_error_that_lists_both() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"'0\.weight' torch\.float32 on cpu.*'1\.weight' torch\.float64 on cpu"):
        ParameterVector(model)


def test_a_model_without_trainable_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        ParameterVector(net().requires_grad_(False))


def test_complex_parameters_are_an_error() -> None:
    model = nn.Module()
    model.z = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'z' is torch\.complex64"):
        ParameterVector(model)


@pytest.mark.parametrize(("dtype", "exact"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_sums_are_held_in_at_least_fp32(dtype: str, exact: str) -> None:
    assert ParameterVector(net().to(getattr(torch, dtype))).exact_dtype == getattr(torch, exact)


def new_parameter(model: Net) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def new_data(model: Net) -> None:
    model.head.weight.data = model.head.weight.data.clone()


LOST: dict[str, tuple[Callable[[Net], object], str]] = {
    "double": (Net.double, "'scale' no longer lives"),
    "half and back": (lambda model: model.bfloat16().float(), "'scale' no longer lives"),
    "p.data =": (new_data, "'head.weight' no longer lives"),
    "a new parameter": (new_parameter, "'head.weight' no longer lives"),
    "memory format": (lambda model: model.to(memory_format=torch.channels_last), "'body.0.weight' no longer lives"),
    "frozen": (lambda model: model.body[1].requires_grad_(False), "'body.1.weight' was frozen after"),
    "added": (lambda model: model.add_module("more", nn.Linear(1, 1)), "'more.weight' was added or unfrozen after"),
}


@pytest.mark.parametrize("loss", LOST)
def test_a_lost_view_is_an_error_that_names_parameter_and_cause(loss: str) -> None:
    model = net()
    vector = ParameterVector(model)
    lose, message = LOST[loss]
    vector.check()
    lose(model)
    with pytest.raises(LostView, match=message):
        vector.check()


def test_an_unfrozen_parameter_is_an_error() -> None:
    model = net()
    model.head.requires_grad_(False)
    vector = ParameterVector(model)
    vector.check()
    model.head.requires_grad_(True)
    with pytest.raises(LostView, match=r"'head\.weight' was added or unfrozen"):
        vector.check()


def test_what_keeps_the_views_is_allowed() -> None:
    model = net()
    vector = ParameterVector(model)
    model.load_state_dict(net().state_dict())
    nn.init.normal_(model.head.weight)
    model.float().cpu().train().zero_grad(set_to_none=True)
    vector.check()


def test_swapped_gives_back_the_models_own_parameters_bit_for_bit() -> None:
    model = net()
    vector = ParameterVector(model)
    before = vector.data.clone()
    with pytest.raises(ZeroDivisionError), vector.swapped(torch.full_like(before, 5.0)):
        assert all((p == 5).all() for p in model.parameters())
        raise ZeroDivisionError
    assert torch.equal(vector.data, before)


# ---------------------------------------------------------------------------------------------------------
# Layers.
# ---------------------------------------------------------------------------------------------------------

GROUPS = [["head.weight", "tied.*"], ["body.*"], ["scale"]]  # in another order than the tensors
PARTITIONS = {
    "tensor": ("tensor", NAMES, (0, 1, 2, 3, 4, 5, 6)),
    "module": ("module", ("", "body.0", "body.1", "head", "tied"), (0, 1, 1, 2, 2, 3, 4)),
    "groups": (GROUPS, ("head.weight+tied.*", "body.*", "scale"), (2, 1, 1, 1, 1, 0, 0)),
    "permuted": ([[name] for name in reversed(NAMES)], tuple(reversed(NAMES)), (6, 5, 4, 3, 2, 1, 0)),
    "one": ([["*"]], ("*",), (0,) * 7),
}


@pytest.mark.parametrize("partition", PARTITIONS)
def test_layers_norms_and_scale(partition: str) -> None:
    vector = ParameterVector(net().double())
    given, names, index = PARTITIONS[partition]
    layers = vector.layers(given)
    assert (layers.names, layers.index, len(layers)) == (names, index, len(names))
    x = torch.linspace(-1, 2, len(vector), dtype=torch.float64)
    of_layer = np.repeat(index, SIZES)
    expected = [np.linalg.norm(x.numpy()[of_layer == layer]) for layer in range(len(names))]
    np.testing.assert_allclose(layers.norms(vector.views(x)), expected, rtol=1e-14)
    weights = [0.0, 0.25, 1.0, 1.5, 3.0, 7.0, 9.0][: len(names)]
    out = torch.full_like(x, torch.nan)
    assert vector.scale(x, weights, layers, out) is out
    np.testing.assert_array_equal(out, x.numpy() * np.array(weights)[of_layer])


@pytest.mark.parametrize("absent", [{0}, {1, 5}, {4, 5}, {1, 2}, set(range(7)), set()], ids=str)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_tensor_without_a_gradient_counts_as_zero_and_a_layer_without_any_as_infinite(
    partition: str, absent: set[int]
) -> None:
    vector = ParameterVector(net().double())
    given, _, index = PARTITIONS[partition]
    layers = vector.layers(given)
    x = torch.linspace(-1, 2, len(vector), dtype=torch.float64)
    zeroed = [torch.zeros_like(v) if i in absent else v for i, v in enumerate(vector.views(x))]
    none = [all(i in absent for i in range(7) if index[i] == layer) for layer in range(len(layers))]
    expected = torch.where(torch.tensor(none), torch.inf, layers.norms(zeroed))
    assert expected.isfinite().tolist() == [not layer for layer in none]
    for _ in range(2):
        tensors = [None if i in absent else view for i, view in enumerate(vector.views(x))]
        assert torch.equal(layers.norms(tensors).double(), expected)
        # Zeros that no backward pass has made are none, either.
        assert torch.equal(layers.norms(zeroed, set(range(7)) - absent), expected)
        assert layers.norms(zeroed).isfinite().all()  # a gradient that is zero


def test_a_gradient_that_came_without_a_backward_pass_counts() -> None:
    layers = ParameterVector(net().double()).layers()
    gradient = [torch.full((1,), float(i)) for i in range(7)]
    assert layers.norms(gradient, {1, 2}).tolist() == [math.inf, 1, 2, 3, 4, 5, 6]


def test_norms_that_overflow_are_nan() -> None:
    vector = ParameterVector(nn.Linear(1, 2))
    gradient = [torch.full((2, 1), 3e38), torch.tensor([torch.inf, 1.0])]
    for partition in ("tensor", "module"):
        assert vector.layers(partition).norms(gradient).isnan().all()


def test_norms_of_sparse_gradients_are_those_of_dense_ones() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    layers = ParameterVector(embedding).layers()
    embedding(torch.tensor([1, 4, 1, 9, 1])).square().sum().backward()
    sparse = embedding.weight.grad
    assert sparse is not None and sparse.is_sparse
    torch.testing.assert_close(layers.norms([sparse]), sparse.to_dense().norm()[None])
    embedding.zero_grad()
    embedding(torch.empty(0, dtype=torch.int64)).sum().backward()
    assert layers.norms([embedding.weight.grad]).tolist() == [0]


def test_norms_of_half_precision_are_taken_in_fp32() -> None:
    vector = ParameterVector(nn.Linear(1, 100_000, bias=False).bfloat16())
    norms = vector.layers().norms([torch.full((100_000, 1), 1e-3, dtype=torch.bfloat16)])
    assert norms.dtype == torch.float32
    assert norms.item() == pytest.approx(float(torch.tensor(1e-3).bfloat16()) * 100_000**0.5, rel=1e-3)


@pytest.mark.parametrize("weights", [[0.3], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])
def test_scale_into_a_wider_dtype_is_done_there(weights: list[float]) -> None:
    vector = ParameterVector(net().bfloat16())
    out = torch.empty(len(vector), dtype=torch.float32)
    vector.scale(vector.data, weights, vector.layers(), out)
    every = torch.tensor(weights * 7 if len(weights) == 1 else weights)
    assert torch.equal(out, vector.data.float() * every.repeat_interleave(torch.tensor(SIZES)))


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ("tensors", "layers is tensors: must be 'tensor', 'module' or a list of groups"),
        ([["body.*"], ["head.*", "tied.*"]], "'scale' is in no group"),
        ([["*"], ["head.*"]], r"'head\.weight' is in groups \[0, 1\]"),
        ([["*"], ["tail.*"]], r"group \['tail\.\*'\] matches no trainable tensor"),
    ],
)
def test_layers_that_are_no_partition_are_refused(partition: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterVector(net()).layers(partition)
