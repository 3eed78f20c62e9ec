"""Models: the sizes of the published ones, and what their blocks compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpc_grawa.data import Digits
from hpc_grawa.models import (
    VGG16,
    AllCNN,
    DenseNet121,
    PyramidNet110,
    ResNet18,
    ResNet20,
    ResNet50,
    ResNet56,
    ResNet152,
    SmallCNN,
    ViTB16,
    WRN28x10,
)
from hpc_grawa.models.pyramidnet import _Block as PyramidBlock
from hpc_grawa.models.resnet_cifar import _Block

#: Parameters, tensors, and parameters of one more class.
PUBLISHED: list[tuple[Callable[..., nn.Module], int, int, int]] = [
    (ResNet20, 269_722, 59, 65),
    (ResNet56, 853_018, 167, 65),
    (VGG16, 15_253_578, 58, 513),
    (PyramidNet110, 28_485_477, 439, 287),
    (DenseNet121, 6_956_298, 362, 1025),
    (WRN28x10, 36_479_194, 80, 641),
    (AllCNN, 1_369_738, 18, 193),
    (ResNet18, 11_173_962, 62, 513),
    (partial(ResNet18, stages=3), 2_777_674, 47, 257),
    (partial(ResNet18, stages=2), 676_682, 32, 129),
    (partial(ResNet18, stages=1), 150_474, 17, 65),
    (ResNet50, 25_557_032, 161, 2049),
    (ResNet152, 60_192_808, 467, 2049),
    (ViTB16, 86_567_656, 152, 769),
]


def name_of(value: object) -> str:
    made = value.func if isinstance(value, partial) else value
    given = value.keywords.values() if isinstance(value, partial) else ()
    return "-".join(str(part) for part in (getattr(made, "__name__", made), *given))


def sizes(model: Callable[..., nn.Module], **arguments: int) -> list[int]:
    with torch.device("meta"):
        return [parameter.numel() for parameter in model(**arguments).parameters()]


@pytest.mark.parametrize(("model", "parameters", "tensors", "per_class"), PUBLISHED, ids=name_of)
def test_models_have_the_published_size(
    model: Callable[..., nn.Module], parameters: int, tensors: int, per_class: int
) -> None:
    found = sizes(model)
    assert (sum(found), len(found)) == (parameters, tensors)
    classes = 1000 if parameters in (25_557_032, 60_192_808, 86_567_656) else 10
    assert sum(sizes(model, num_classes=classes + 1)) - parameters == per_class


@pytest.mark.parametrize(
    ("model", "side"),
    [
        *((model, side) for model in (ResNet20, SmallCNN) for side in (8, 28, 32)),
        *(
            (model, side)
            for model in (partial(PyramidNet110, alpha=54), partial(WRN28x10, widen=1))
            for side in (8, 28)
        ),
        *(
            (model, side)
            for model in (partial(DenseNet121, growth=2), AllCNN, partial(ResNet18, stages=2))
            for side in (9,)
        ),
        *((partial(VGG16, dropout=0), side) for side in (28, 32)),
    ],
    ids=name_of,
)
@pytest.mark.parametrize(("channels", "classes"), [(3, 10), (1, 7)])
def test_models_take_any_size_and_both_layouts(
    model: Callable[..., nn.Module], side: int, channels: int, classes: int
) -> None:
    torch.manual_seed(0)
    network = model(in_channels=channels, num_classes=classes).double()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images, labels = torch.randn(4, channels, side, side, dtype=torch.float64), torch.arange(4)
    logits, gradients = [], []
    for layout in (torch.contiguous_format, torch.channels_last):
        network.zero_grad()
        logits.append(network(images.contiguous(memory_format=layout)))
        F.cross_entropy(logits[-1], labels).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert logits[0].shape == (4, classes)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0])


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (16, 32)])
def test_the_shortcut_is_option_a(inputs: int, outputs: int) -> None:
    stride = outputs // inputs
    block = _Block(inputs, outputs, stride)
    nn.init.zeros_(block.bn2.weight)  # the residual branch is silent
    images = torch.randn(2, inputs, 8, 8).contiguous(memory_format=torch.channels_last)
    output = block(images)
    assert torch.equal(output[:, :inputs], images[:, :, ::stride, ::stride].relu())
    assert torch.equal(output[:, inputs:], torch.zeros(2, outputs - inputs, 8 // stride, 8 // stride))
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_pyramid_grows_by_zeros_beside_the_mean_of_pixels(stride: int) -> None:
    block = PyramidBlock(16, 21, stride)
    nn.init.zeros_(block.bn3.weight)  # the residual branch is silent
    images = torch.randn(2, 16, 9, 9)
    output = block(images)
    assert torch.equal(output[:, :16], F.avg_pool2d(images, stride, ceil_mode=True))
    assert torch.equal(output[:, 16:], torch.zeros_like(output[:, 16:])) and output.shape[1] == 21


@pytest.mark.parametrize(
    "model", [ResNet20, partial(WRN28x10, widen=2), partial(PyramidNet110, alpha=54), ResNet18], ids=name_of
)
def test_convolutions_start_as_he_et_al(model: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    for convolution in model().modules():
        if isinstance(convolution, nn.Conv2d):
            expected = (2 / (convolution.kernel_size[0] ** 2 * convolution.out_channels)) ** 0.5
            assert convolution.weight.std().item() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("model", [partial(DenseNet121, growth=8), AllCNN], ids=name_of)
def test_convolutions_start_as_he_et_al_by_their_inputs(model: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    for convolution in model().modules():
        if isinstance(convolution, nn.Conv2d):
            expected = (2 / convolution.weight[0].numel()) ** 0.5
            assert convolution.weight.std().item() == pytest.approx(expected, rel=0.15)


def test_vgg_starts_as_glorot_and_bengio() -> None:
    torch.manual_seed(0)
    for module in VGG16().modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            ends = (module.weight.shape[0] + module.weight.shape[1]) * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx((2 / ends) ** 0.5, rel=0.1)
            assert module.bias is not None and not module.bias.any()


def test_the_small_network_learns_digits() -> None:
    torch.manual_seed(36)
    data = Digits()
    splits, sampler, network = data.load(), data.sampler(0, 1, seed=36), SmallCNN()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for step in range(6 * sampler.steps_per_epoch):
        inputs, labels = splits.train.batch(sampler.indices(step), sampler.generator(step))
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    network.eval()
    inputs, labels = splits.test.batch(torch.arange(len(splits.test)))
    with torch.no_grad():
        accuracy = (network(inputs).argmax(1) == labels).double().mean().item()
    assert accuracy > 0.97
