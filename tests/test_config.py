"""The configuration: what it takes, what it remembers, and what it says about what cannot be."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import own
import pytest
import torch
from table import plain
from torch import Tensor, nn

from hpc_grawa import EASGD, LGRAWA, cli
from hpc_grawa.cli.parsing import parse
from hpc_grawa.errors import ConfigError
from hpc_grawa.optim import SGD, AdamW
from hpc_grawa.schedules import Cosine, Step
from hpc_grawa.training.config import CLASS_SECTIONS, GROUPS, OF_A_STEP, Config
from hpc_grawa.training.resume import check_unchanged

DIGITS = ("--config", "digits", "--budget.seconds", "null", "--budget.steps", "4")
OWN = tuple(word for section, path in own.ALL.items() for word in (f"--{section}", path))


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Writes a configuration file and says where."""

    def write(text: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text)
        return str(path)

    return write


RECIPES_LISTED = "cifar100_wrn28x10, cifar10_pyramidnet110, cifar10_resnet20, cifar10_vgg16, demo, digits"
IMPOSSIBLE = {
    # what is given: key, value and what is allowed, as the message names them
    "--method.perod 3": ("method.perod is no setting", "did you mean method.period", "pull"),
    "--budget.stepz 3": ("budget.stepz is no setting", "did you mean budget.steps", "seconds, epochs, steps"),
    "--bugdet.steps 3": ("bugdet.steps is no setting", "did you mean budget.steps", "budget, eval"),
    "--nosuch 3": (
        "nosuch is no setting",
        "method, optimizer, schedule, model, data, loss, metric, budget, eval, save, log",
    ),
    "--meth EASGD": ("meth is no setting", "did you mean method"),
    "--model.wdth 3": ("model.wdth is no setting", "in_channels, num_classes, width"),
    "stray": ("stray", "--key value"),
    "--method NoSuch": (
        "method is NoSuch",
        ", ".join(sorted(plain())),
        "import path",
    ),
    "--optimizer Adam": ("optimizer is Adam", "ASAM, AdamW, EntropySGD", "import path"),
    "--schedule NoSuch": ("schedule is NoSuch", "Constant, Cosine, Linear, Step", "import path"),
    "--model NoSuch": (
        "model is NoSuch",
        "ResNet152, ResNet18, ResNet20, ResNet50, ResNet56, SmallCNN, VGG16, ViTB16",
        "import path",
    ),
    "--data NoSuch": ("data is NoSuch", "CIFAR, Datasets, Digits", "import path"),
    "--metric NoSuch": ("metric is NoSuch", "Accuracy", "import path"),
    "--loss NoSuch": ("loss is NoSuch", "CrossEntropyLoss", "import path"),
    "--model no.such.Net": ("model is no.such.Net", "No module named 'no'"),
    "--method Method": ("method is Method", ", ".join(sorted(plain()))),
    "--method hpc_grawa.methods.averaging.AveragingMethod": (
        "AveragingMethod: must be a class derived from Method, and not",
    ),
    "--method torch.nn.Linear": ("method is torch.nn.Linear", "derived from Method"),
    "--method.period 0": ("method.period is 0", "at least 1"),
    "--method.period 2.5": ("method.period is 2.5", "whole number"),
    "--method.period two": ("method.period is two", "whole number"),
    "--method.pull 1.1": ("method.pull is 1.1", "[0, 1]"),
    "--method.pull -0.1": ("method.pull is -0.1", "[0, 1]"),
    "--method.pull .nan": ("method.pull is nan", "[0, 1]"),
    "--method.pull nan": ("method.pull is nan", "a number"),
    "--method.prox 2": ("method.prox is 2", "[0, 1]"),
    "--method.score_momentum 1": ("method.score_momentum is 1", "[0, 1)"),
    "--method.probe_batches 45": ("method.probe_batches is 45", "at most 44"),
    "--method.probe_batches 23 --method.probe_from shard": ("method.probe_batches is 23", "at most 22"),
    "--method.layers foo": ("method.layers is foo", "tensor, module", "a list"),
    "--optimizer.lr -1": ("optimizer.lr is -1", "0 or more"),
    "--optimizer.lr": ("optimizer.lr is missing after --optimizer.lr", "--optimizer.lr VALUE"),
    "--optimizer.lr --run.seed 3": ("optimizer.lr is missing after --optimizer.lr",),
    "--optimizer.lr null": ("optimizer.lr is null", "must be a number"),
    "--optimizer.lr .inf": ("optimizer.lr is inf", "0 or more"),
    "--optimizer.momentum 1": ("optimizer.momentum is 1", "[0, 1)"),
    "--optimizer.momentum 0": ("optimizer.nesterov is True", "false without momentum"),
    "--optimizer.weight_decay -1": ("optimizer.weight_decay is -1", "0 or more"),
    "--optimizer.clip_norm 0": ("optimizer.clip_norm is 0", "positive, or null"),
    "--optimizer.accumulate 5": ("optimizer.accumulate is 5", "divide data.batch_size, which is 32"),
    "--optimizer.accumulate 0": ("optimizer.accumulate is 0", "at least 1"),
    "--clip_norm 0": ("error: clip_norm is 0", "positive, or null"),
    "--clip_norm .nan": ("error: clip_norm is nan", "positive, or null"),
    "--accumulate 5": ("error: accumulate is 5", "divide data.batch_size, which is 32"),
    "--accumulate 0": ("error: accumulate is 0", "at least 1"),
    "--accumulate null": ("accumulate is null", "a whole number"),
    "--optimizer torch.optim.NoSuch": ("optimizer is torch.optim.NoSuch", "no attribute 'NoSuch'"),
    "--optimizer torch.nn.Linear": ("optimizer is torch.nn.Linear", "LocalOptimizer or torch.optim.Optimizer"),
    "--optimizer torch.optim.RAdam --optimizer.bates 1": (
        "optimizer.bates is no setting",
        "did you mean optimizer.betas",
        "lr, betas, eps, weight_decay",
    ),
    "--optimizer torch.optim.RAdam --optimizer.params 1": (
        "optimizer.params is no setting",
        "must be one of lr, betas",
    ),
    "--optimizer torch.optim.RAdam --optimizer.lr much": ("optimizer.lr is much", "must be a number\n"),
    "--optimizer torch.optim.RAdam --optimizer.lr -1": ("optimizer.lr is -1", "0 or more"),
    "--optimizer torch.optim.RAdam --optimizer.lr null": ("optimizer.lr is null", "must be a number\n"),
    "--optimizer torch.optim.RAdam --optimizer.betas [0,1]": ("optimizer is RAdam", "beta parameter at index 1"),
    "--optimizer torch.optim.SparseAdam": ("optimizer is SparseAdam", "must take dense gradients"),
    "--optimizer test_optimizers.Own": ("optimizer.lr is None", "must be a number of 0 or more"),
    "--optimizer test_optimizers.Rateless": ("optimizer is Rateless", "must take lr"),
    "--optimizer.groups 3": ("optimizer.groups is 3", "a list or null"),
    "--optimizer.groups [{weight_decay:0}]": ("optimizer.groups is", "must have match"),
    "--optimizer AdamW --optimizer.beta1 1": ("optimizer.beta1 is 1", "[0, 1)"),
    "--schedule.warmup -1": ("schedule.warmup is -1", "0 or more"),
    "--data.batch_size 719": ("data.batch_size is 719", "at most 718", "1437 examples, 2 ranks"),
    "--data.batch_size 0": ("data.batch_size is 0", "1 or more"),
    "--data.batch_size many": ("data.batch_size is many", "whole number"),
    "--data.batch_size null": ("data.batch_size is null", "must be a whole number"),
    "--data.split null": ("data.split is null", "must be one of disjoint, reshuffled"),
    "--data.validation 1437": ("data.validation is 1437", "0 to 1436"),
    "--data.split some": ("data.split is some", "disjoint, reshuffled, full, fraction"),
    "--data.fraction 0": ("data.fraction is 0", "(0, 1]"),
    "--data CIFAR": ("data.path is missing", "CIFAR"),
    "--data CIFAR --data.path /no/such": ("data.path is '/no/such'", "data_prep/cifar.py"),
    "--data Datasets": ("data.train, data.test are missing: Datasets needs them",),
    "--data Datasets --data.train datasets --data.test own.Line": ("data.train is datasets", "import path of a class"),
    "--data.nosuch.deep 3": ("data.nosuch is no setting", "batch_size"),
    "--schedule Step --schedule.milestones [a]": ("schedule.milestones is [a]", "a list of numbers"),
    "--optimizer torch.optim.RAdam --optimizer.betas [1]": ("optimizer.betas is [1]", "a list of 2"),
    "--loss.weight 3": ("loss.weight is 3: must be null\n",),
    "--log.tensorboard maybe": ("log.tensorboard is maybe", "true or false"),
    "--budget 5": ("budget is 5", "key: value"),
    "--budget.steps null": ("budget is empty", "budget.seconds, budget.epochs or budget.steps"),
    "--budget.steps 0": ("budget.steps is 0", "positive"),
    "--budget.seconds -2": ("budget.seconds is -2", "positive"),
    "--budget.seconds .nan": ("budget.seconds is nan", "positive"),
    "--budget.epochs .inf": ("budget.epochs is inf", "positive"),
    "--eval.every 0": ("eval.every is 0", "positive"),
    "--eval.unit days": ("eval.unit is days", "steps, epochs, seconds"),
    "--eval.bn_batches 0": ("eval.bn_batches is 0", "at least 1"),
    "--eval.train_examples 0": ("eval.train_examples is 0", "at least 1"),
    "--log.every 0": ("log.every is 0", "at least 1"),
    "--run.name a/b": ("run.name is a/b", "without a path"),
    "--run.name ..": ("run.name is ..", "name of a folder"),
    "--run.seed -3": ("run.seed is -3", "0 or more"),
    "--run.start together": ("run.start is together", "common, independent"),
    "--run.start independent --method DataParallel": ("run.start is independent", "common where gradients are shared"),
    "--run.start independent --method OneBitSGD": ("run.start is independent", "common where gradients are shared"),
    "--run.start independent --method LocalSGD --method.period SWAP --method.period.switch 2 "
    "--method.sharing DataParallel": ("run.start is independent", "common where gradients are shared"),
    "--run.control_every 0": ("run.control_every is 0", "at least 1"),
    "--comm_timeout 0": ("comm_timeout is 0.0", "positive"),
    "--precision fp16": ("precision is fp16", "fp32, bf16", "loss scaling"),
    "--backend nccl": ("backend is nccl", "sees no GPU"),
    "--backend single": ("backend is single", "must be another"),
    "--config nosuch": ("config is nosuch", RECIPES_LISTED),
    "--config /no/such.yaml": (
        "config is /no/such.yaml",
        RECIPES_LISTED,
    ),
    "--config": ("config is missing", RECIPES_LISTED),
    f"--config {'a' * 300}": ("config is aaa", "cannot be read (File name too long)"),
    "--config /proc/self/mem": ("config is /proc/self/mem: cannot be read",),
    "--init_args 3": ("init_args is no setting", "method, optimizer"),
    "--optimizer.groups+ [{match:x": ("optimizer.groups+ is [{match:x: must be YAML",),
    "--world_size 2": ("world_size is 2", "--dry_run"),
}


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_what_cannot_be_is_one_line_on_rank_0_and_silence_elsewhere(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for size in ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.setenv(size, "2")
    for rank, status in ((0, 2), (1, 0)):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
        with pytest.raises(SystemExit) as end:
            cli.main(["train", *DIGITS, "--run.dir", str(tmp_path), *words.split()])
        printed = capsys.readouterr()
        assert (end.value.code, printed.out) == (status, "")
        if rank:
            assert printed.err == ""
        else:
            assert printed.err.startswith("hpc-grawa train: error: ")
            assert printed.err.count("\n") == 1
            for part in IMPOSSIBLE[words]:
                assert part in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *DIGITS, "--run.dir", "/dev/null/runs"])
    error = capsys.readouterr().err
    assert error == "hpc-grawa train: error: run.dir is /dev/null/runs: no folder can be made there (Not a directory)\n"


IMPOSSIBLE_FILES = {
    "nosuch: 3": ("nosuch is no setting", "method, optimizer"),
    "budget: {stepz: 3}": ("budget.stepz is no setting", "did you mean budget.steps", "seconds, epochs, steps"),
    "budget: 5": ("budget is 5", "key: value"),
    "budget: {steps: five}": ("budget.steps is five", "whole number", "null"),
    "method: {class_path: LGRAWA, init_args: {perod: 3}}": ("method.perod is no setting", "method.period"),
    "method: {class_path: LGRAWA, init_args: {period: two}}": ("method.period is two", "whole number"),
    "method: {class_path: LGRAWA, init_args: {pull: .nan}}": ("method.pull is nan", "[0, 1]"),
    "method: {period: 3}": ("method is {'period': 3}", "class_path: CLASS", "init_args"),
    "method: {class_path: LGRAWA, period: 3}": ("'period': 3", "class_path: CLASS", "init_args"),
    "method: 3": ("method is 3", "must be a class"),
    "method: NoSuch": ("method is NoSuch", "LGRAWA"),
    "just a sentence": ("config is", "sections (key: value)"),
    "optimizer: {class_path: torch.optim.RAdam, init_args: {bates: 1}}": ("optimizer.bates is no setting", "betas"),
    "optimizer: {class_path: torch.optim.RAdam, init_args: {eps: low}}": ("optimizer.eps is low", "must be a number"),
    "model: [3": ("config is", "must be YAML"),
    "optimizer: {class_path: SGD, init_args: 3}": ("optimizer.init_args is 3", "must hold settings"),
    "optimizer: {class_path: torch.optim.Adam, init_args: [clip_norm]}": ("optimizer.init_args is ['cl", "key: value"),
    "optimizer: {class_path: SGD, init_args: {clip_norm: 1}}\nclip_norm: 2": (
        "clip_norm is 2 and optimizer.clip_norm is 1",
        "must be given once, as clip_norm",
    ),
    "optimizer: {class_path: torch.optim.Adam, init_args: {betas: null}}": ("optimizer.betas is null", "a list of 2"),
    "model: {class_path: torch.nn.Linear, init_args: {in_features: 3}}": (
        "model.out_features is missing: Linear needs",
    ),
    "3: 4": ("3 is no setting", "method, optimizer"),
    "accumulate: null\nlog: {every: 1}": ("accumulate is null", "must have a value, or be left out"),
    "comm_timeout: null\nlog: {every: 1}": ("comm_timeout is null", "must have a value"),
    "init_args.init_args: 3": ("init_args.init_args is no setting",),
    "method.period: 4\nmethod.period+: 3": ("method.period is [4, 3]", "whole number"),
    "methods: {LGRAWA: {method.period: QSR, method.period.init_args: 3}}": (
        "method.period.init_args is 3: must hold settings",
    ),
    f"model: {{class_path: {__name__}.Holding, init_args: {{act: {{class_path: torch.nn.ReLU, init_args: 3}}}}}}": (
        "model.act.init_args is 3: must hold settings",
    ),
}


@pytest.mark.parametrize("text", IMPOSSIBLE_FILES)
def test_what_cannot_be_in_a_file(text: str, write: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *DIGITS, "--config", write(text), "--dry_run"])
    printed = capsys.readouterr()
    assert (end.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    for part in IMPOSSIBLE_FILES[text]:
        assert part in printed.err


@pytest.mark.parametrize("missing", ["model", "data", "budget"])
def test_what_has_no_default_must_be_given(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"model": "--model=SmallCNN", "data": "--data=Digits", "budget": "--budget.steps=1"}
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *(word for section, word in given.items() if section != missing), "--dry_run"])
    assert re.fullmatch(rf"hpc-grawa train: error: {missing} is (missing|empty): give .*\n", capsys.readouterr().err)


def test_own_classes_for_every_section_by_import_path() -> None:
    config = parse([*OWN, "--budget.steps=2", "--method.patience=7", "--model.slope=2.5", "--loss.scale=3"])
    config.check(2)
    for section, path in own.ALL.items():
        if section != "model":
            assert type(getattr(config, section)) is getattr(own, path.removeprefix("own."))
    model = config.build_model()
    assert isinstance(model, own.Line) and model.linear.weight.item() == 2.5
    assert (config.method, config.loss.scale) == (own.Alone(patience=7), 3.0)


def test_own_classes_lie_in_the_folder_where_the_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lies_here.py").write_text("import own\nclass Net(own.Line):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", *OWN, "--model=lies_here.Net", "--budget.steps=2", "--print_config"])
    assert "class_path: lies_here.Net" in capsys.readouterr().out


def test_an_own_class_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fails_here.py").write_text("raise RuntimeError('on\\npurpose')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *OWN, "--model=fails_here.Net", "--budget.steps=2"])
    assert capsys.readouterr().err == (
        "hpc-grawa train: error: model is fails_here.Net: fails_here cannot be imported (RuntimeError: on purpose)\n"
    )


class Shade(Enum):
    LIGHT = 1
    DARK = 2


class Holding(own.Line):
    """A model whose settings hold what YAML has no word for."""

    def __init__(
        self, act: nn.Module, shade: Shade = Shade.LIGHT, turn: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.act = act


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("", "model.act is missing: Holding needs it"),
        ("--model.act=3", "model.act is 3: must be the import path of a class (package.module.Class)"),
        ("--model.act=own.Numbers", "model.act is own.Numbers: must be a class derived from Module"),
        (
            "--model.act=own.No",
            "model.act is own.No: must be the import path of a class (package.module.Class): module",
        ),
        ("--model.act=torch.nn.Linear", "model.act.in_features, model.act.out_features are missing: Linear needs them"),
        (
            "--model.act=torch.nn.ReLU --model.act.inplce=true",
            "model.act.inplce is no setting of ReLU: did you mean model.act.in",
        ),
        ("--model.act=torch.nn.ReLU --model.act.inplace=3", "model.act.inplace is 3: must be true or false\n"),
        ("--model.act=torch.nn.ReLU --model.shade=RED", "model.shade is RED: must be one of LIGHT, DARK\n"),
        (
            "--model.act=torch.nn.ReLU --model.turn=torch.no",
            "model.turn is torch.no: must be the import path of a class",
        ),
        (
            "--model.act=torch.nn.ReLU --model.turn=own.Numbers",
            "model.turn is own.Numbers: must be a function or a class",
        ),
    ],
)
def test_what_a_setting_cannot_hold(words: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse([*OWN, f"--model={__name__}.Holding", "--budget.steps=2", *words.split()])
    printed = capsys.readouterr().err
    assert printed.startswith(f"hpc-grawa train: error: {error}") and printed.count("\n") == 1


def test_settings_of_what_a_setting_holds(write: Callable[[str], str]) -> None:
    file = write(f"model: {{class_path: {__name__}.Holding, init_args: {{act: torch.nn.LeakyReLU}}}}")
    for words in (
        ["--model.act=torch.nn.LeakyReLU", "--model.act.negative_slope=0.5"],
        ["--model.act={class_path: torch.nn.LeakyReLU, init_args: {negative_slope: .5}}"],
        ["--config", file, "--model.act.negative_slope=.5"],
    ):
        model = parse([*OWN, f"--model={__name__}.Holding", "--budget.steps=2", *words]).build_model()
        assert isinstance(model, Holding) and isinstance(model.act, nn.LeakyReLU) and model.act.negative_slope == 0.5


def test_keys_of_a_file_may_be_dotted(write: Callable[[str], str]) -> None:
    file = write("method.period: 5\noptimizer.init_args.lr: 0.25\nbudget.seconds: null\nbudget.steps: 7\nrun.seed: 3")
    config = parse(["--config=digits", "--config", file, "--run.seed=4"])
    assert (config.method, config.optimizer.lr) == (LGRAWA(period=5), 0.25)
    assert (config.budget.steps, config.budget.seconds, config.run.seed) == (7, None, 4)


def test_groups_of_an_optimizer_may_be_added_to_those_before(write: Callable[[str], str]) -> None:
    file = write("optimizer.groups+: [{match: a, lr_factor: 1}]")
    given = "--optimizer.groups=[{match: c, lr_factor: 3}]"
    for words, matches in (
        ([f"--config={file}", "--optimizer.groups+", "{match: b, lr_factor: 2}"], ["a", "b"]),
        ([given, "--optimizer.groups+", "[{match: b, lr_factor: 2}]"], ["c", "b"]),
    ):
        assert [group["match"] for group in parse([*DIGITS, *words]).optimizer.groups or []] == matches


def test_an_error_of_a_key_carries_it() -> None:
    with pytest.raises(ConfigError) as raised:
        LGRAWA(pull=2)
    assert str(raised.value) == "method.pull is 2: must be in [0, 1]"
    assert (raised.value.what, raised.value.value, raised.value.fix) == ("method.pull", 2, "must be in [0, 1]")


RECIPE = """
method: {class_path: LGRAWA, init_args: {period: 16, pull: 0.3, buffers: local}}
optimizer: {class_path: SGD, init_args: {lr: 0.02, weight_decay: 0.5}}
schedule: {class_path: Step, init_args: {milestones: [2, 4], warmup: 7}}
model: SmallCNN
data: Digits
budget: {steps: 3}
"""


@pytest.mark.parametrize("way", ["command line", "=", "file", "file with settings"])
def test_naming_another_class_forgets_the_settings_of_the_one_before(way: str, write: Callable[[str], str]) -> None:
    words = {
        "command line": ["--method", "EASGD", "--optimizer", "AdamW", "--schedule", "Cosine"],
        "=": ["--method=EASGD", "--optimizer=hpc_grawa.optim.AdamW", "--schedule.class_path=Cosine"],
        "file": ["--config", write("method: EASGD\noptimizer: AdamW\nschedule: Cosine")],
        "file with settings": [
            *("--config", write("method: {class_path: EASGD, init_args: {}}")),
            *("--config", write("{optimizer: {class_path: AdamW}, schedule: {class_path: Cosine, init_args: {}}}")),
        ],
    }[way]
    config = parse(["--config", write(RECIPE), *words])
    assert (config.method, config.optimizer, config.schedule) == (EASGD(), AdamW(), Cosine())
    config = parse(["--config", write(RECIPE), *words, "--method.period=5", "--optimizer.lr=1"])
    assert (config.method, config.optimizer) == (EASGD(period=5), AdamW(lr=1))


@pytest.mark.parametrize("way", ["command line", "import path", "file", "file with settings"])
def test_naming_the_same_class_keeps_its_settings(way: str, write: Callable[[str], str]) -> None:
    words = {
        "command line": ["--method", "LGRAWA", "--method.pull", "0.9"],
        "import path": ["--method=hpc_grawa.methods.LGRAWA", "--method.pull=0.9"],
        "file": ["--config", write("method: LGRAWA"), "--method.pull=0.9"],
        "file with settings": ["--config", write("method: {class_path: LGRAWA, init_args: {pull: 0.9}}")],
    }[way]
    config = parse(["--config", write(RECIPE), *words])
    assert config.method == LGRAWA(period=16, pull=0.9, buffers="local")
    assert config.optimizer == SGD(lr=0.02, weight_decay=0.5)
    assert config.schedule == Step(milestones=[2, 4], warmup=7)


def test_an_own_class_is_not_taken_for_one_of_the_same_name(write: Callable[[str], str]) -> None:
    assert type(parse(["--config", write(RECIPE), "--method", "own.LGRAWA"]).method) is own.LGRAWA


def test_later_options_win_over_files_and_earlier_ones(write: Callable[[str], str]) -> None:
    first, second = write("run: {seed: 1, dir: here}\nlog: {every: 7}"), write("run: {seed: 2}")
    config = parse([*DIGITS, "--run.seed=9", "--config", first, "--config", second])
    assert (config.run.seed, config.run.dir, config.log.every) == (9, "here", 7)
    config = parse([*DIGITS, "--config", second, "--config", first, "--log.every=8", "--log.every=9"])
    assert (config.run.seed, config.run.dir, config.log.every) == (1, "here", 9)


def test_numbers_in_files_need_no_point(write: Callable[[str], str]) -> None:
    file = write("optimizer: {class_path: SGD, init_args: {lr: 1e-3, weight_decay: 0}}\nrun: {name: 2024-05-01}")
    config = parse([*DIGITS, "--config", file])
    assert (config.optimizer, config.run.name) == (SGD(lr=1e-3, weight_decay=0.0), "2024-05-01")


OLD = "optimizer: {class_path: SGD, init_args: {lr: 0.02, clip_norm: 2.0, accumulate: 4}}"


@pytest.mark.parametrize("way", ["file", "command line", "files", "class in braces"])
def test_settings_of_a_step_that_were_the_optimizers_are_understood(way: str, write: Callable[[str], str]) -> None:
    words = {
        "file": ["--config", write(OLD)],
        "command line": ["--optimizer.lr=0.02", "--optimizer.clip_norm", "2", "--optimizer.init_args.accumulate=4"],
        "files": [
            "--config",
            write("clip_norm: 3\naccumulate: 2"),
            "--config",
            write(OLD),
            "--config=" + write("accumulate: 4"),
        ],
        "class in braces": ["--optimizer", "{class_path: SGD, init_args: {lr: 0.02, clip_norm: 2, accumulate: 4}}"],
    }[way]
    config = parse([*DIGITS, *words])
    assert (config.clip_norm, config.accumulate) == (2.0, 4)
    assert isinstance(config.optimizer, SGD) and config.optimizer.lr == 0.02
    assert (config.text.count("clip_norm"), config.text.count("accumulate")) == (1, 1)


@pytest.mark.parametrize("name", ["SGD", "torch.optim.Adam"])
def test_a_class_whose_settings_are_left_empty_keeps_its_defaults(name: str, write: Callable[[str], str]) -> None:
    config = parse([*DIGITS, "--config", write(f"optimizer: {{class_path: {name}, init_args: }}")])
    assert config.text == parse([*DIGITS, f"--optimizer={name}"]).text


@dataclass(kw_only=True)
class OwnClipping(SGD):
    clip_norm: float = 3.0


def test_a_setting_that_an_own_optimizer_has_stays_its_own() -> None:
    config = parse([*DIGITS, f"--optimizer={__name__}.OwnClipping", "--optimizer.clip_norm=5", "--clip_norm=7"])
    assert (config.optimizer, config.clip_norm) == (OwnClipping(clip_norm=5.0), 7.0)


def test_a_setting_that_an_own_optimizer_has_may_change_where_it_is_allowed(tmp_path: Path) -> None:
    then, now = (
        parse([*DIGITS, f"--optimizer={__name__}.OwnClipping", f"--optimizer.clip_norm={norm}"]).text for norm in (5, 6)
    )
    (tmp_path / "config.yaml").write_text(then)
    with pytest.raises(ConfigError, match=r"optimizer.clip_norm is 6.0: .*--allow-change optimizer.clip_norm"):
        check_unchanged(tmp_path, now)
    check_unchanged(tmp_path, now, ["optimizer.clip_norm"])


def everything(config: Config) -> dict[str, Any]:
    parts = {
        name: getattr(config, name)
        for name in (*CLASS_SECTIONS, *GROUPS, *OF_A_STEP, "precision", "backend", "device", "comm_timeout")
        if name != "model"
    }
    modules = {"model": config.build_model(), "loss": config.loss, "metric": type(config.metric)}
    return parts | {name: str(module) for name, module in modules.items()}


@pytest.mark.parametrize(
    "words",
    [
        DIGITS,
        (*DIGITS, "--method=MGRAWA", '--method.layers=[["features.*"], ["head.*"]]', "--method.local_momentum=reset"),
        (*DIGITS, "--schedule=Step", "--schedule.milestones=[1, 2.5]", "--schedule.unit=seconds", "--optimizer=AdamW"),
        (*DIGITS, "--model.width=4", "--model.num_classes=12", "--loss.label_smoothing=0.1", "--optimizer.clip_norm=2"),
        (
            *DIGITS,
            "--optimizer=torch.optim.RAdam",
            "--optimizer.lr=.01",
            "--optimizer.betas=[.8, .9]",
            '--optimizer.groups=[{match: "*.bias|ndim<2", weight_decay: 0}]',
        ),
        (*DIGITS, "--optimizer=test_optimizers.Own", "--optimizer.lr=1"),
        (*DIGITS, "--precision=bf16", "--backend=mpi", "--eval.every=2", "--eval.unit=steps", "--run.name=x"),
        (*DIGITS, "--device=cpu", "--comm_timeout=.inf"),
        (*OWN, "--budget.epochs=1.5", "--model.slope=.inf", "--schedule.warmup=3", "--optimizer.note=null"),
    ],
    ids=lambda words: " ".join(words[-2:]),
)
def test_print_config_fed_back_gives_the_same_configuration(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *words, "--print_config"])
    printed = capsys.readouterr()
    assert (end.value.code, printed.err) == (0, "")
    config = parse(words)
    assert printed.out == config.text
    (tmp_path / "printed.yaml").write_text(printed.out)
    assert everything(parse(["--config", str(tmp_path / "printed.yaml")])) == everything(config)


def test_print_config_is_silent_on_other_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", *DIGITS, "--print_config"])
    assert capsys.readouterr() == ("", "")


def cifar(folder: Path, classes: int, train: int = 200) -> Path:
    """A black data set in the form of the real one."""
    folder.mkdir()
    for part, count in (("train", train), ("test", 20)):
        np.save(folder / f"{part}_images.npy", np.zeros((count, 3, 32, 32), np.uint8))
        np.save(folder / f"{part}_labels.npy", np.zeros(count, np.uint8))
    facts = {
        "name": f"CIFAR-{classes}",
        "counts": {"train": train, "test": 20},
        "classes": [str(c) for c in range(classes)],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    (folder / "meta.json").write_text(json.dumps(facts))
    return folder


def test_the_data_settle_the_models_inputs_and_classes_unless_they_are_given(
    tmp_path: Path, write: Callable[[str], str]
) -> None:
    def ends(config: Config) -> tuple[int, int]:
        shapes = [p.shape for p in config.build_model().parameters()]
        return shapes[0][1], shapes[-1][0]

    other = ["--data=CIFAR", f"--data.path={cifar(tmp_path / 'hundred', 100)}"]
    assert ends(parse(DIGITS)) == (1, 10)
    assert ends(parse(["--config=cifar10_resnet20", *other])) == (3, 100)
    # A digits configuration, written and fed back with other data.
    assert ends(parse(["--config", write(parse(DIGITS).text), *other])) == (3, 100)
    given = parse(["--config=cifar10_resnet20", *other, "--model.num_classes=7"])
    assert ends(given) == ends(parse(["--config", write(given.text)])) == (3, 7)


def test_the_published_settings_are_those_of_the_cifar_recipe(tmp_path: Path) -> None:
    config = parse(["--config=cifar10_resnet20", f"--data.path={cifar(tmp_path / 'ten', 10)}"])
    assert config.method == LGRAWA(period=32, pull=0.5, prox=0.01)
    assert config.optimizer == SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    assert (config.data.batch_size, config.schedule) == (128, Step(milestones=[500], gamma=0.1, unit="seconds"))


def test_the_model_is_initialised_from_the_present_random_stream() -> None:
    config = parse(DIGITS)
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        starts.append(torch.nn.utils.parameters_to_vector(config.build_model().parameters()))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_file_may_name_a_class_by_a_dotted_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("method.class_path: EASGD\nmethod.period.class_path: QSR\nmethod.period.alpha: 3\n")
    assert str(parse(["--config=digits", f"--config={file}"]).method).startswith("EASGD(period=QSR(base=4, alpha=3.0")
    for text in ("method.class_path: 3", 'method: "a\\nb"'):
        file.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            parse(["--config=digits", f"--config={file}"])
        assert capsys.readouterr().err.count("\n") == 1
