"""The packaged settings, and what each method has of its own in them."""

from __future__ import annotations

import gc
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import yaml
from ilsvrc import folders, jpeg, script
from own import plain_process
from table import plain
from test_config import cifar
from test_text import prepared

from hpc_grawa import simulate
from hpc_grawa.cli.compare import Comparison
from hpc_grawa.cli.parsing import parse
from hpc_grawa.cli.settings import PAPERS, RECIPES, papers, recipes
from hpc_grawa.comm.single import SingleCommunicator
from hpc_grawa.data import Digits
from hpc_grawa.errors import ConfigError
from hpc_grawa.methods import EASGD, LGRAWA, LSGD, DataParallel, LocalSGD
from hpc_grawa.optim import SAM, SGD, AdamW
from hpc_grawa.periods import QSR
from hpc_grawa.schedules import Cosine, RunFacts, Step
from hpc_grawa.training.config import Config
from hpc_grawa.training.loop import fit
from hpc_grawa.training.worker import Worker

#: What a setting's recipes said when there was one for each method.
SAID = {
    "cifar10_resnet20": """
schedule: {class_path: Step, init_args: {milestones: [500], gamma: 0.1, unit: seconds}}
model: ResNet20
data: {class_path: CIFAR, init_args: {batch_size: 128, crop: 28}}
precision: bf16
budget: {seconds: 900}
eval: {unit: seconds, every: 60}
""",
    "cifar100_wrn28x10": """
schedule: {class_path: Step, init_args: {milestones: [60, 120, 160], gamma: 0.2, unit: epochs}}
model: WRN28x10
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
PLAIN = "optimizer: {class_path: SGD, init_args: {lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 0.0001}}"
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


#: The rows of each comparison.
ROWS = {
    "demo": "LGRAWA MGRAWA EASGD LSGD LocalSGD DataParallel LGRAWA EASGD LocalSGD DataParallel",
    "results_cifar10": "LGRAWA MGRAWA LocalLGRAWA EASGD LSGD LocalSGD QSR PostLocal SWAP SlowMo DiLoCo Parle DPPF"
    " DataParallel SAM LPFSGD PowerSGD DeepGradientCompression OneBitSGD EFSign",
    "results_gpt": "DiLoCo QSR LGRAWA LocalSGD DataParallel PowerSGD",
    "ablations_grawa": "LGRAWA Modules Squared Forgetful OwnShard MGRAWA GRAWA LocalLGRAWA LocalMGRAWA",
    "ablations_dgc": "DataParallel DeepGradientCompression Unmasked Uncorrected Unwarmed",
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
    ten, text = cifar(folder / "ten", 10, train=1000), prepared(folder, "bytes", times=80)
    hundred = cifar(folder / "hundred", 100, train=1000)
    return {
        **dict.fromkeys(("cifar10_resnet20", "results_cifar10", "ablations_grawa", "ablations_dgc"), ten),
        **dict.fromkeys(("gpt_text", "results_gpt"), text),
        **dict.fromkeys(("cifar10_vgg16", "cifar10_pyramidnet110"), ten),
        **dict.fromkeys(("cifar100_wrn28x10", "cifar100_densenet121", "cifar100_pyramidnet110"), hundred),
        **dict.fromkeys(("imagenet_resnet50", "imagenet_resnet152", "imagenet_vitb16"), imagenet),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", SAID)
def test_a_method_in_a_setting_is_configured_as_it_always_was(
    setting: str, method: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    """Defaults of methods that move, or a line that is lost, would be another experiment."""
    on_cifar, on_imagenet, split = METHODS[method]
    own = on_imagenet if setting.startswith("imagenet") else on_cifar
    said = f"{SAID[setting]}{PLAIN}\nmethod: {{class_path: {method}, init_args: {own}}}\n"
    (tmp_path / "then.yaml").write_text(said)
    data = f"--data.path={paths[setting]}"
    then = parse([f"--config={tmp_path / 'then.yaml'}", data, f"--data.split={split}"]).text
    assert parse([f"--config={setting}_{method.lower()}", data]).text == then
    config = parse([f"--config={setting}", f"--method={method}", data])
    config.check(4)
    assert config.text == then


#: Of settings: milestones, factor and unit of the drops, batch of a rank, and the budget, as published where it is.
DROPS = {
    "cifar10_vgg16": ([1200], 0.1, "seconds", 128, {"seconds": 1800}),
    "cifar10_pyramidnet110": ([150, 225], 0.1, "epochs", 128, {"epochs": 300}),
    "cifar100_pyramidnet110": ([150, 225], 0.1, "epochs", 128, {"epochs": 300}),
    "cifar100_densenet121": ([200], 0.1, "epochs", 128, {"epochs": 300}),
    "cifar100_wrn28x10": ([60, 120, 160], 0.2, "epochs", 128, {"epochs": 200}),
    "imagenet_resnet50": ([30, 60], 0.1, "epochs", 32, {"epochs": 90}),
}
#: Of QSR's: the optimizer's peak rate and weight decay, warm-up, epochs, alpha, batch of a rank.
OF_QSR = {
    "imagenet_resnet152": ("SGD", 0.8, 1e-4, 5 * 313, 200, 0.2, 256),
    "imagenet_vitb16": ("AdamW", 0.008, 0.1, 10_000, 300, 0.0175, 256),
}


@pytest.mark.parametrize("name", DROPS)
def test_a_setting_has_its_published_values(name: str, paths: dict[str, Path]) -> None:
    milestones, gamma, unit, batch, budget = DROPS[name]
    config = parse([f"--config={name}", f"--data.path={paths[name]}"])
    assert config.schedule == Step(milestones=milestones, gamma=gamma, unit=unit)  # type: ignore[arg-type]
    assert (config.data.batch_size, config.optimizer.lr, config.optimizer.weight_decay) == (batch, 0.1, 1e-4)
    assert {key: getattr(config.budget, key) for key in budget} == budget


@pytest.mark.parametrize("name", OF_QSR)
def test_a_setting_of_qsr_has_its_published_values(name: str, paths: dict[str, Path]) -> None:
    config = parse([f"--config={name}", "--method=LocalSGD", f"--data.path={paths[name]}"])
    optimizer, schedule = config.optimizer, config.schedule
    found = (type(optimizer).__name__, optimizer.lr, optimizer.weight_decay, schedule.warmup, config.budget.epochs)
    assert (*found, config.method.period.alpha, config.data.batch_size) == OF_QSR[name]
    assert isinstance(schedule, Cosine) and config.method.period.base == 4


def test_grids_of_the_papers_are_the_published_ones() -> None:
    grids = yaml.safe_load((PAPERS / "grawa.yaml").read_text())["compare"]["grids"]
    grawa = {"method.period": [16, 32], "method.pull": [0.3, 0.5, 0.7], "method.prox": [0.01, 0.05]}
    of_gradients = {"data.batch_size": [32, 64, 128]}
    assert grids == {
        "EASGD": {"method.period": [4, 8, 16], "method.pull": [0.1, 0.3, 0.43]},
        "LSGD": {"method.period": [4, 8, 16], "method.pull": [0.01, 0.1], "method.prox": [0.01, 0.1]},
        "MGRAWA": grawa,
        "LGRAWA": grawa,
        "DataParallel": {"optimizer.lr": [0.01, 0.1], **of_gradients},
        "SAM": {"optimizer": ["SAM"], "optimizer.base.lr": [0.01, 0.1], **of_gradients},
    }


@pytest.mark.parametrize("setting", ["imagenet_resnet152", "imagenet_vitb16"])
@pytest.mark.parametrize("schedule", ["Cosine", "Linear", "Step"])
def test_the_settings_of_qsr_have_its_three_schedules(setting: str, schedule: str, paths: dict[str, Path]) -> None:
    """As their recipes say to ask for them; rounds grow from 4 steps to longer ones."""
    told = (RECIPES / f"{setting}.yaml").read_text()
    words = [f"--config={setting}", "--method=LocalSGD", f"--data.path={paths[setting]}"]
    if schedule != "Cosine":
        (line,) = re.findall(rf"`--schedule {schedule} [^`]*`", told)
        words += shlex.split(line.strip("`"))
    config = parse(words)
    config.check(16)
    assert type(config.schedule).__name__ == schedule
    total, peak = 313 * int(config.budget.epochs or 0), config.optimizer.lr
    facts = RunFacts(total_steps=total, steps_per_epoch=313, peak_lr=peak, warmup_steps=config.schedule.warmup)
    lengths = []
    for share in (0, 0.95):
        facts.step, facts.progress = round(share * total), share
        facts.lr = peak * config.schedule(facts)
        lengths.append(config.method.period(facts))
    assert lengths[0] == 4 < lengths[1]


def test_every_recipe_says_its_goal_and_is_valid(paths: dict[str, Path]) -> None:
    assert set(recipes()) == {*SAID, *ROWS, *paths, "digits"} | {"demo"}
    for name in recipes():
        text = (RECIPES / f"{name}.yaml").read_text()
        assert "# Goal: " in text
        if name.startswith(("cifar", "imagenet")):  # for GPUs
            cost = text.partition("# Cost: ")[2].replace("\n# ", " ")
            assert re.search(r"\d+ (GPUs|nodes)", cost) and "`sbatch " in cost and "slurm/compare.sh" in cost
            assert re.search(r"hours?\b|minutes", cost) and re.search(r"\d+ runs, [\d to]+ hours", cost)
        if name not in {*SAID, *ROWS}:
            for method in METHODS:
                data = [f"--data.path={paths[name]}"] if name in paths else []
                parse([f"--config={name}", f"--method={method}", *data]).check(4)


def _experiment(config: Config) -> str:
    """What tells it from others, but for its name."""
    return config.text.replace(f"name: {config.run.name}\n", "")


#: Papers, settings, seeds where not the paper's, and how many runs they make for each seed.
ROWS_OF_PAPERS = [
    ("grawa", "cifar10_resnet20", "36", 9 + 12 + 2 * 12 + 2 * 6),
    pytest.param("grawa", "imagenet_vitb16", None, 9 + 12 + 2 * 12 + 2 * 6, marks=pytest.mark.slow),
    ("qsr", "cifar10_resnet20", None, 6),
    ("qsr", "imagenet_resnet50", "36", 6),
    ("qsr", "imagenet_vitb16", None, 6),
]


@pytest.mark.parametrize(("paper", "name", "seeds", "runs"), ROWS_OF_PAPERS)
def test_a_paper_makes_a_row_of_any_setting(
    paper: str, name: str, seeds: str | None, runs: int, paths: dict[str, Path]
) -> None:
    """Its methods, seeds, and of each method the settings that it was chosen from."""
    words = [f"--config={PAPERS / paper}.yaml", f"--config={name}", f"--data.path={paths[name]}"]
    planned = Comparison.read(None, seeds, None, None, words, "hpc-grawa compare").plan
    assert set(papers()) == {"grawa", "qsr"}
    expected = {36} if seeds else {36, 720, 1042}
    assert len(planned) == runs * len(expected) and {config.run.seed for _, config in planned} == expected
    assert len({_experiment(config) for _, config in planned}) == len(planned)
    if paper == "qsr":
        periods = {config.run.name.partition("-")[0]: getattr(config.method, "period", None) for _, config in planned}
        assert [periods[f"Constant{tau}"] for tau in (4, 8)] == [4, 8]
        rules = [periods[name] for name in ("Linear", "QSR", "Cubic")]
        alpha = {"imagenet_vitb16": 0.0175}.get(name, rules[0].alpha)
        assert [(type(rule).__name__, rule.base, rule.alpha, rule.power) for rule in rules] == [
            ("QSR", 4, alpha, power) for power in (1, 2, 3)
        ]
        # A grid of one's own varies what else there is.
        varied = Comparison.read(None, "36", None, "optimizer.lr=.05", words, "hpc-grawa compare").plan
        kept = {config.run.name.partition("-")[0]: getattr(config.method, "period", None) for _, config in varied}
        assert kept == periods
        with pytest.raises(ConfigError, match=r"must not hold method\.period, which makes Constant4 what it is: 4"):
            Comparison.read(None, "36", None, "method.period=4,8", words, "hpc-grawa compare")
    planned[0].config.check(4)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_a_comparison_can_be_trained(name: str, paths: dict[str, Path]) -> None:
    """Each is another experiment, is checked, and builds its model, method and optimizer on its data."""
    data = [f"--data.path={paths[name]}"] if name in paths else []
    compared = Comparison.read(None, None, None, None, [f"--config={name}", *data], "hpc-grawa compare").plan
    configs = [config for _, config in compared]
    assert " ".join(str(config.run.name).partition("-")[0] for config in configs) == ROWS[name]
    assert {config.run.seed for config in configs} == {36}
    assert len({f"{c.method} {c.optimizer} {c.network}" for c in configs}) == len(configs)
    for config in configs:
        config.check(4)
        Worker(config, SingleCommunicator()).run.close()


def test_the_commands_of_the_results_can_be_given(paths: dict[str, Path]) -> None:
    """Each plans a comparison, here of one seed and without its file's grid; that its rows train is tested beside."""
    root = Path(__file__).parents[1]
    text = (root / "benchmarks/RESULTS.md").read_text().replace("\\\n", " ")
    for file in sorted((root / "benchmarks/studies").glob("*.yaml")):
        head = re.sub(r"^# ?", "", file.read_text().partition("\nmodel:")[0], flags=re.M).replace("\\\n", " ")
        assert f"--config benchmarks/studies/{file.name}" in head
        text += f"\n{head}"
    for variable, value in (("$((8192 / b))", "64"), ("$((4 * b))", "512"), ("$b", "128"), ("$n", "4")):
        text = text.replace(variable, value)
    given = re.findall(r"^ *(?:mpirun -np \S+ )?hpc-grawa compare (.*)$", text, re.M)
    commands = [shlex.split(line) for line in given]
    assert len(commands) > 10
    for words in commands:
        name, path = (words.index(option) + 1 for option in ("--config", "--data.path"))
        if (root / words[name]).exists():  # a study, whose data are named like those of a recipe
            words[path] = str(paths["gpt_text" if words[path] == "data/text" else "results_cifar10"])
            words[name] = str(root / words[name])
        else:
            words[path] = str(paths[words[name]])
        own: dict[str, str] = {}  # of the comparison, not of its runs
        for option in ("--methods", "--seeds", "--target", "--grid"):
            if option in words:
                at = words.index(option)
                own[option] = words[at + 1]
                del words[at : at + 2]
        target = float(own["--target"]) if "--target" in own else None
        grid = own.get("--grid", "")
        assert Comparison.read(own.get("--methods"), "1", target, grid, words, "hpc-grawa compare").plan


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed ImageNet of 6 classes, 3 small pictures each, 1 for validation."""
    folder = tmp_path_factory.mktemp("pictures")
    images = {f"n{c:08}": {f"{n}.JPEG": jpeg(40, 40, seed=10 * c + n) for n in range(3)} for c in range(6)}
    few = {name: {"0.JPEG": pictures["0.JPEG"]} for name, pictures in images.items()}
    options = folders(folder / "in", {"train": images, "val": few})
    assert script("imagenet").main([*options, "--out", str(folder / "packed")]) == 0
    return folder / "packed"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(recipes()) - set(ROWS)))
def test_every_setting_trains(
    name: str, paths: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of two ranks, a round among them, and the evaluation at the end."""
    plain_process(monkeypatch)
    words = [
        f"--config={name}",
        "--budget.seconds=null",
        "--budget.epochs=null",
        "--budget.steps=3",
        "--method.period=2",
    ]
    words += [
        "--data.batch_size=2",
        "--eval.unit=epochs",
        "--eval.every=99",
        "--eval.bn_batches=1",
        "--eval.batch_size=5",
    ]
    words += [
        "--eval.train_examples=5",
        f"--run.dir={tmp_path}",
        "--run.name=a",
        "--log.tensorboard=false",
        "--save.ranks=false",
    ]
    if name in paths:
        words += [f"--data.path={pictures if name.startswith('imagenet') else paths[name]}"]
    config = parse(words)
    config.check(2)
    place = tmp_path / "a"
    place.mkdir()
    (summary, _) = simulate(
        2, lambda comm: fit(config, comm, new_folder=None if comm.rank else lambda: place, speaks=False)
    )
    assert (summary["state"], summary["steps"], summary["rounds"]) == ("finished", 3, 2)
    assert math.isfinite(summary["center_test_loss"])
    gc.collect()  # gigabytes


#: Runs of each study's comparison.
STUDIES = {
    "flatness": 18,
    "gap": 162,
    "large_batch": 14,
    "measures": 128,
    "parle": 12,
    "qsr": 27,
    "qsr_text": 18,
    "scalability": 6,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_can_be_trained(name: str, paths: dict[str, Path], tmp_path: Path) -> None:
    """All its runs are different experiments, and are checked; one of each method is built; two ranks begin one."""
    folder = Path(__file__).parents[1] / "benchmarks/studies"
    assert {file.stem for file in folder.glob("*.yaml")} == set(STUDIES)
    data = paths["gpt_text"] if name.endswith("_text") else cifar(tmp_path / "data", 10, train=5000)
    words = [f"--config={folder / name}.yaml", f"--data.path={data}", f"--run.name={name}"]
    plan = [config for _, config in Comparison.read(None, None, None, None, words, "hpc-grawa compare").plan]
    assert len(plan) == STUDIES[name] == len({_experiment(config) for config in plan})
    for config in plan:
        config.check(1)
    for config in {config.method_name: config for config in plan}.values():
        Worker(config, SingleCommunicator()).run.close()
    words += ["--budget.epochs=null", "--budget.steps=2", "--eval.bn_batches=1", "--eval.train_examples=10"]
    first = Comparison.read(None, None, None, None, words, "hpc-grawa compare").plan[0].config
    (summary, _) = simulate(2, lambda comm: fit(first, comm, speaks=False))
    assert (summary["state"], summary["steps"]) == ("finished", 2)


SETTING = """
model: SmallCNN
data: {class_path: Digits, init_args: {batch_size: 8}}
optimizer: {class_path: SGD, init_args: {lr: 0.5}}
budget: {steps: 7}
methods:
  EASGD: {method.period: 3, method.pull: 0.2, data.split: full, budget: {steps: 9}}
  hpc_grawa.methods.LSGD: {method.group_period: 4, optimizer: AdamW, run.seed: 5}
  LocalSGD:
"""


@pytest.fixture
def setting(tmp_path: Path) -> str:
    (tmp_path / "setting.yaml").write_text(SETTING)
    return f"--config={tmp_path / 'setting.yaml'}"


def test_lines_of_the_method_that_runs_are_taken_and_no_others(setting: str, tmp_path: Path) -> None:
    easgd = parse([setting, "--method=hpc_grawa.methods.EASGD"])
    assert easgd.method == EASGD(period=3, pull=0.2)
    assert easgd.data == Digits(batch_size=8, split="full") and easgd.budget.steps == 9
    assert easgd.optimizer == SGD(lr=0.5)
    lsgd = parse([setting, "--method=LSGD"])
    assert lsgd.method == LSGD(group_period=4) and lsgd.optimizer == AdamW() and lsgd.run.seed == 5
    for words, method in (([], LGRAWA()), (["--method=LocalSGD"], LocalSGD())):
        plain = parse([setting, *words])
        assert (plain.method, plain.data, plain.optimizer) == (method, Digits(batch_size=8), SGD(lr=0.5))
        assert (plain.budget.steps, plain.run.seed) == (7, 0)
    for config in (easgd, lsgd):
        (tmp_path / "saved.yaml").write_text(config.text)
        assert "methods:" not in config.text and parse([f"--config={tmp_path / 'saved.yaml'}"]).text == config.text


def test_lines_of_a_method_give_way_to_later_files_and_options(setting: str, tmp_path: Path) -> None:
    def then(said: str, *words: str) -> Config:
        (tmp_path / "more.yaml").write_text(said)
        return parse([setting, f"--config={tmp_path / 'more.yaml'}", *words])

    options = parse([setting, "--method=EASGD", "--method.period=5", "--data.split=disjoint", "--budget.steps=2"])
    assert (options.method, options.data.split, options.budget.steps) == (EASGD(period=5, pull=0.2), "disjoint", 2)
    assert then("budget: {steps: 2}", "--method=EASGD").budget.steps == 2
    # A later file names the method, and another: its settings, and nothing of the one before.
    named = then("method: {class_path: EASGD, init_args: {pull: 0.9}}")
    assert (named.method, named.data.split) == (EASGD(period=3, pull=0.9), "full")
    other = then("method: {class_path: EASGD, init_args: {pull: 0.9}}", "--method=LGRAWA")
    assert (other.method, other.data.split, other.budget.steps) == (LGRAWA(), "disjoint", 7)
    # Another class for a section forgets what was said of the one before.
    assert then("data: own.Numbers", "--method=EASGD").data.split == "disjoint"
    again = then("methods: {EASGD: {method: {pull: 0.4}, data.split: reshuffled}}", "--method=EASGD")
    assert (again.method, again.data.split) == (EASGD(period=3, pull=0.4), "reshuffled")


@pytest.mark.parametrize(
    "lines", ["optimizer: AdamW, optimizer.beta1: 0.5", "optimizer.beta1: 0.5, optimizer.class_path: AdamW"]
)
def test_a_method_may_have_an_optimizer_of_its_own(lines: str, setting: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"methods: {{EASGD: {{{lines}, optimizer.clip_norm: 2}}}}")
    config = parse([setting, f"--config={tmp_path / 'own.yaml'}", "--method=EASGD"])
    assert (config.optimizer, config.clip_norm) == (AdamW(beta1=0.5), 2.0)


def test_a_recipe_and_another_method_leave_nothing_of_the_first(paths: dict[str, Path]) -> None:
    data = f"--data.path={paths['imagenet_resnet50']}"
    config = parse(["--config=imagenet_resnet50_localsgd", "--method=LSGD", data])
    assert config.method == LSGD(period=16, group_period=4) and config.data.split == "disjoint"


def test_a_comparison_takes_the_lines_of_each_method(setting: str, tmp_path: Path) -> None:
    (tmp_path / "said.yaml").write_text("compare: {methods: {LSGD: {method.pull: 0.3}, EASGD: {method.pull: 0.4}}}")
    words = [setting, f"--config={tmp_path / 'said.yaml'}", "--method.prox=0"]
    compared = Comparison.read("LSGD,LGRAWA", None, None, None, words, "hpc-grawa compare").plan
    assert [config.method for _, config in compared] == [LSGD(pull=0.3, prox=0, group_period=4), LGRAWA(prox=0)]
    named = Comparison.read(None, None, None, None, words[:-1], "hpc-grawa compare").plan
    assert [config.method for _, config in named] == [LSGD(pull=0.3, group_period=4), EASGD(period=3, pull=0.4)]


VARIANTS = """
model: SmallCNN
data: Digits
budget: {steps: 3}
methods:
  LocalSGD: {method.period: 4, data.split: reshuffled}
  QSR: {method: LocalSGD, method.period: {class_path: QSR, init_args: {alpha: 0.1}}}
  Sharp: {method: DataParallel, method.wire: bf16, optimizer: SAM, optimizer.rho: 0.2, optimizer.base: AdamW}
compare: {methods: [QSR, LocalSGD, Sharp], seeds: [7]}
"""


def test_a_variant_is_a_class_with_settings_of_its_own_under_a_name(tmp_path: Path) -> None:
    """It has what is said of its class, then what is said of it; options win, also over what a later file says."""
    (tmp_path / "variants.yaml").write_text(VARIANTS)
    file = f"--config={tmp_path / 'variants.yaml'}"
    qsr, sharp = parse([file, "--method=QSR"]), parse([file, "--method=Sharp"])
    assert (qsr.method, qsr.data.split) == (LocalSGD(period=QSR(alpha=0.1)), "reshuffled")
    assert (sharp.method, sharp.data.split) == (DataParallel(wire="bf16"), "disjoint")
    assert sharp.optimizer == SAM(base=AdamW(), rho=0.2)
    plain = parse([file, "--method=LocalSGD"])
    assert (plain.method, plain.optimizer) == (LocalSGD(period=4), SGD())
    assert [config.method_name for config in (qsr, sharp, plain)] == ["QSR", "Sharp", "LocalSGD"]
    assert parse([file, "--method=QSR", "--method.period=9"]).method == LocalSGD(period=9)
    (tmp_path / "named.yaml").write_text("method: {class_path: QSR, init_args: {buffers: local}}")
    named = parse([file, f"--config={tmp_path / 'named.yaml'}"])
    assert named.method == LocalSGD(period=QSR(alpha=0.1), buffers="local") and named.data.split == "reshuffled"
    (tmp_path / "saved.yaml").write_text(qsr.text)
    assert parse([f"--config={tmp_path / 'saved.yaml'}"]).text == qsr.text
    (tmp_path / "again.yaml").write_text(
        "methods: {QSR: {method: LocalSGD, method.period.alpha: 0.2, data.split: full}}"
    )
    again = parse([file, f"--config={tmp_path / 'again.yaml'}", "--method=QSR"])
    assert (again.method, again.data.split) == (LocalSGD(period=QSR(alpha=0.2)), "full")


def test_variants_are_rows_of_a_comparison(tmp_path: Path) -> None:
    """Named as they are; what is run can be run alone; a grid reaches those whose class has the setting."""
    (tmp_path / "variants.yaml").write_text(VARIANTS)
    words = [f"--config={tmp_path / 'variants.yaml'}"]
    compared = Comparison.read(None, None, None, "method.local_momentum=keep,reset", words, "hpc-grawa compare").plan
    momenta = [f"local_momentum{value}" for value in ("keep", "reset")]
    names = [*(f"{name}-{value}-7" for name in ("QSR", "LocalSGD") for value in momenta), "Sharp-7"]
    assert [config.run.name for _, config in compared] == names
    assert compared[1].config.method == LocalSGD(period=QSR(alpha=0.1), local_momentum="reset")
    for alone, config in compared:
        assert parse(alone).text == config.text


def test_a_comparison_that_says_nothing_of_a_method_leaves_its_lines(tmp_path: Path) -> None:
    said = "methods: {LSGD: {method.pull: 0.3}, EASGD: {method.pull: 0.2}}"
    (tmp_path / "said.yaml").write_text(f"{said}\ncompare: {{methods: {{LSGD: , EASGD: {{method.period: 5}}}}}}")
    words = [f"--config={tmp_path / 'said.yaml'}", "--model=SmallCNN", "--data=Digits", "--budget.steps=1"]
    compared = Comparison.read(None, None, None, None, words, "hpc-grawa compare").plan
    assert [config.method for _, config in compared] == [LSGD(pull=0.3), EASGD(period=5)]


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ("methods: [EASGD]", ("methods is ['EASGD'] in ", "EASGD: {method.period: 16}")),
        ("methods: {EASGD: 16}", ("methods is {'EASGD': 16} in ", "EASGD: {method.period: 16}")),
        ("methods: {EASDG: {method.period: 16}}", ("method is EASDG", ", ".join(sorted(plain())))),
        ("methods: {EASGD: {method.perod: 16}}", ("method.perod is no setting", "did you mean method.period")),
        ("methods: {EASGD: {period: 16}}", ("period is no setting", "method, optimizer")),
        ("methods: {EASGD: {method: 16}}", ("method is 16", "must be a class")),
        ("methods: {Mine: {method: 16}}", ("method is 16", "must be a class")),
        ("methods: {Mine: {method: EASDG}}", ("method is EASDG", ", ".join(sorted(plain())))),
        (
            "methods: {EASGD: {data.split: full}}",
            ("data is missing before data.split in methods", "named in that file"),
        ),
        ("budget: {steps: 1}\nmethods: {EASGD: {budget: 3}}", ("budget is 3", "key: value")),
        ("methods: {EASGD: {method: LSGD}}", ("method is LSGD in methods: must be EASGD there",)),
        ("method: EASGD\nmethods: {EASGD: {optimizer.init_args.lr: x}}", ("optimizer.lr is x: must be a number",)),
    ],
)
def test_what_cannot_be_said_of_a_method(
    said: str, parts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "said.yaml").write_text(said)
    words = ("--method=EASGD", "--model=SmallCNN", "--data=Digits", "--budget.steps=1")
    with pytest.raises(SystemExit, match="2"):
        parse([f"--config={tmp_path / 'said.yaml'}", *words])
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    for part in parts:
        assert part in printed.err
