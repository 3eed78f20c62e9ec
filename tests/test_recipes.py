"""The packaged settings, and what each method has of its own in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_config import cifar

from hpc_grawa.parsing import parse

#: What a setting's recipes said when there was one for each method.
SAID = {
    "cifar10_resnet20": """
schedule: {class_path: Step, init_args: {milestones: [500], gamma: 0.1, unit: seconds}}
model: ResNet20
data: {class_path: CIFAR, init_args: {batch_size: 128}}
precision: bf16
budget: {seconds: 900}
eval: {unit: seconds, every: 60}
""",
    "cifar100_resnet56": """
schedule: {class_path: Step, init_args: {milestones: [60, 120, 160], gamma: 0.2, unit: epochs}}
model: ResNet56
data: {class_path: CIFAR, init_args: {batch_size: 128}}
precision: bf16
budget: {epochs: 200}
eval: {unit: epochs, every: 5}
""",
    "imagenet_resnet50": """
schedule: {class_path: Step, init_args: {milestones: [30, 60], gamma: 0.1, unit: epochs}}
model: ResNet50
data: {class_path: ImageNet, init_args: {batch_size: 32}}
metric: TopAccuracy
precision: bf16
budget: {epochs: 90}
eval: {batch_size: 125}
""",
}
SGD = "optimizer: {class_path: SGD, init_args: {lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 0.0001}}"
#: What they said of each method: its settings on CIFAR, those on ImageNet, and how data are split.
METHODS = {
    "LGRAWA": ("{period: 32, pull: 0.5, prox: 0.01}", "{period: 32, pull: 0.5, prox: 0.01}", "disjoint"),
    "MGRAWA": ("{period: 32, pull: 0.5, prox: 0.01}", "{period: 32, pull: 0.5, prox: 0.01}", "disjoint"),
    "EASGD": ("{period: 8, pull: 0.43}", "{period: 16, pull: 0.43}", "disjoint"),
    "LSGD": (
        "{period: 8, pull: 0.1, prox: 0.1}",
        "{period: 16, group_period: 4, pull: 0.1, prox: 0.1}",
        "disjoint",
    ),
    "LocalSGD": ("{period: 8}", "{period: 16}", "reshuffled"),
    "DataParallel": ("{}", "{}", "reshuffled"),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data for each setting: black pictures, and an ImageNet without any."""
    folder = tmp_path_factory.mktemp("data")
    imagenet = folder / "imagenet"
    imagenet.mkdir()
    files = {f"{part}-00000.tar": 1 for part in ("train", "val")}
    for name in files:
        (imagenet / name).write_bytes(b" ")
    sizes = {"counts": {"train": 1_281_167, "val": 50_000}, "shards": {"train": 1, "val": 1}, "bytes": files}
    (imagenet / "meta.json").write_text(json.dumps({**sizes, "classes": ["a"] * 1000}))
    return {
        "cifar10_resnet20": cifar(folder / "ten", 10, train=1000),
        "cifar100_resnet56": cifar(folder / "hundred", 100, train=1000),
        "imagenet_resnet50": imagenet,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", SAID)
def test_a_method_in_a_setting_is_configured_as_it_always_was(
    setting: str, method: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    """Defaults of methods that move, or a line that is lost, would be another experiment."""
    on_cifar, on_imagenet, split = METHODS[method]
    own = on_imagenet if setting.startswith("imagenet") else on_cifar
    said = f"{SAID[setting]}{SGD}\nmethod: {{class_path: {method}, init_args: {own}}}\n"
    (tmp_path / "then.yaml").write_text(said)
    data = f"--data.path={paths[setting]}"
    then = parse([f"--config={tmp_path / 'then.yaml'}", data, f"--data.split={split}"]).text
    assert parse([f"--config={setting}_{method.lower()}", data]).text == then
