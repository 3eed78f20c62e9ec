"""Models: the sizes of the published ones, and what their blocks compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpc_grawa.data import Digits
from hpc_grawa.models import ResNet20, ResNet56, SmallCNN
from hpc_grawa.models.resnet_cifar import _Block


@pytest.mark.parametrize(("model", "parameters", "tensors"), [(ResNet20, 269_722, 59), (ResNet56, 853_018, 167)])
def test_resnets_have_the_published_size(model: type[nn.Module], parameters: int, tensors: int) -> None:
    sizes = [parameter.numel() for parameter in model().parameters()]
    assert (sum(sizes), len(sizes)) == (parameters, tensors)
    hundred = sum(parameter.numel() for parameter in model(num_classes=100).parameters())
    assert hundred - parameters == 90 * 65


@pytest.mark.parametrize("side", [8, 28, 32])
@pytest.mark.parametrize("model", [ResNet20, SmallCNN])
@pytest.mark.parametrize(("channels", "classes"), [(3, 10), (1, 7)])
def test_models_take_any_size_and_both_layouts(model: type[nn.Module], side: int, channels: int, classes: int) -> None:
    torch.manual_seed(0)
    network = model(in_channels=channels, num_classes=classes).double()
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


def test_convolutions_start_as_he_et_al() -> None:
    torch.manual_seed(0)
    for convolution in ResNet20().modules():
        if isinstance(convolution, nn.Conv2d):
            expected = (2 / (9 * convolution.out_channels)) ** 0.5
            assert convolution.weight.std().item() == pytest.approx(expected, rel=0.15)


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
