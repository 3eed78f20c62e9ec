"""Every command on a screen, and in a locale, that knows ASCII only, with names that are not."""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import own
import pytest
from launcher import launch
from PIL import Image

from hpc_grawa import cli
from hpc_grawa.cli.settings import read_settings
from hpc_grawa.report import read_run
from hpc_grawa.runs.reading import load_yaml
from hpc_grawa.screen import as_shown, spell_unknown_characters

DIGITS = ("--config=digits", "--budget.seconds=null", "--eval.train_examples=20")
TRAIN = ("train", *DIGITS, "--budget.steps=3", "--run.seed=5")
SAVE = ("--save.every=2", "--save.unit=steps")
COMPARE = ("compare", *DIGITS, "--budget.steps=2", "--methods=LGRAWA,LocalSGD", "--seeds=1,2")
#: Letters; letters of no font, and what fonts call mathematics; bytes that are no text.
NAME = "läufe実験🎉$x$\udcff"
#: Bytes of such names in a locale that knows no such letters.
IN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


class Screen:
    """What a terminal of one encoding is shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        self._shown = {name: io.BytesIO() for name in ("stdout", "stderr")}
        self._encoding = encoding
        for name, shown in self._shown.items():
            monkeypatch.setattr(sys, name, io.TextIOWrapper(shown, encoding=encoding, write_through=True))

    @property
    def text(self) -> str:
        return "".join(shown.getvalue().decode(self._encoding) for shown in self._shown.values())


@pytest.fixture(autouse=True)
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own.plain_process(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a folder with a finished run of the same name, in the present one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        own.plain_process(monkeypatch)
        monkeypatch.chdir(tmp_path_factory.mktemp("place"))
        cli.main([*TRAIN, *SAVE, "--run.dir", NAME, "--run.name", NAME])
        yield NAME


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize(
    ("command", "shows"),
    [
        ("methods", "x_m <- x_mean = (1/W) sum_j x_j"),
        ("--help", "compare"),
        ("train --help", "--budget.seconds"),
        ("train --method.help hpc_grawa.LGRAWA", "period"),
        ("train @TRAIN --dry_run --run.dir {0}", "per rank x 1 ranks"),
        ("train @TRAIN --print_config --run.dir {0}", "seed: 5"),
        ("train @TRAIN --run.dir {0} --run.name new{0}", "finished"),
        ("train @TRAIN @SAVE --run.dir {0} --run.name {0} --run.resume auto", "is finished"),
        ("train --config {0}/{0}/config.yaml --run.name again{0}", "finished"),
        ("table {0} --csv {0}.csv --figure {0}.png", "| LGRAWA"),
        ("table {0}/{0} --csv {0}.csv --figure {0}.svg", "| LGRAWA"),
        ("status {0}/{0}", "finished"),
        ("evaluate {0}/{0}", "test accuracy"),
        ("@COMPARE --run.dir {0} --run.name c{0}", "figure.png"),
        ("toy --steps 8 --methods GRAWA --figure {0}.png", "figure"),
    ],
)
def test_every_command_speaks_ascii(place: str, command: str, shows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, "ascii")
    words: list[str] = []
    for word in command.split():
        words += {"@TRAIN": TRAIN[1:], "@SAVE": SAVE, "@COMPARE": COMPARE}.get(word, (word.format(place),))
    try:
        cli.main(words)
    except SystemExit as end:
        assert not end.code, screen.text
    assert shows in screen.text and screen.text.isascii()


@pytest.mark.parametrize(
    "command", ["table {0}/none", "status {0}/none", "evaluate {0}/none", "{0}", "toy --figure {0}"]
)
def test_errors_speak_ascii(place: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, "ascii")
    with pytest.raises(SystemExit, match="2"):
        cli.main([word.format(place) for word in command.split()])
    assert screen.text.startswith("hpc-grawa") and screen.text.count("\n") == 1
    assert ascii(place)[1:-1] in screen.text


def test_what_a_screen_knows_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, shown in (
        ("utf-8", "x̄ ± 2 ‖g‖₂ ä \\udcff"),
        ("latin-1", "x_mean ± 2 ||g||_2 ä \\udcff"),
        ("ascii", "x_mean +- 2 ||g||_2 \\xe4 \\udcff"),
    ):
        screen = Screen(monkeypatch, encoding)
        spell_unknown_characters()
        print(text := "x̄ ± 2 ‖g‖₂ ä \udcff")
        assert screen.text == f"{shown}\n" == f"{as_shown(text)}\n"


def on_terminal(width: int, **environment: str) -> list[str]:
    """The lines that a command shows on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    words = [sys.executable, "-m", "hpc_grawa", "methods"]
    own = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # pytest-xdist sets it
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=theirs, env={**own, **environment})
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # which is how a terminal says that nobody writes to it any more
        while block := os.read(ours, 65536):
            shown += block
    os.close(ours)
    assert child.wait() == 0
    return shown.decode().splitlines()


@pytest.mark.slow
def test_lines_fit_the_terminal_but_not_one_that_a_launcher_has_made() -> None:
    assert 40 < max(map(len, on_terminal(60))) <= 60
    assert 80 < max(map(len, on_terminal(60, OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2"))) <= 120


@pytest.mark.parametrize("name", ["läufe", "🎉", "l\udcff\udcfe", '"quoted": \\ {x}', "a\tb"], ids=ascii)
def test_a_name_is_the_same_behind_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line, in what it is printed as, and in the file that holds that."""
    screen = Screen(monkeypatch, "ascii")
    with pytest.raises(SystemExit, match="0"):
        cli.main([*TRAIN, "--run.dir", name, "--print_config"])
    (tmp_path / "config.yaml").write_text(screen.text)
    assert load_yaml(screen.text)["run"]["dir"] == name
    assert read_settings([str(tmp_path / "config.yaml")])["run"]["dir"] == name


_CHAIN = """
import sys
from hpc_grawa import cli

commands, words = [], sys.argv[1:]
while words:
    end = words.index("END")
    commands.append(words[:end])
    words = words[end + 1 :]
for command in commands:
    try:
        cli.main(command)
    except SystemExit as end:
        if end.code:
            sys.exit(f"{command} ended with {end.code!r}")
print("all done")
"""


@pytest.mark.slow
def test_every_command_works_in_a_locale_that_knows_ascii_only(tmp_path: Path) -> None:
    """There Python sees other names than elsewhere, for the same bytes: the folder can be read in any locale."""
    (tmp_path / "told.yaml").write_text("run:\n  dir: läufe\n", encoding="utf-8")
    commands = [
        [*TRAIN, *SAVE, "--run.dir", "läufe", "--run.name", "ü"],
        [*TRAIN, *SAVE, "--config", "told.yaml", "--run.name", "ü", "--run.resume", "auto"],
        [*TRAIN, "--config", "läufe/ü/config.yaml", "--run.name", "ö"],
        ["evaluate", "läufe/ü"],
        ["status", "läufe/ü"],
        ["table", "läufe", "--csv", "ä.csv", "--figure", "ä.png"],
        [*COMPARE, "--run.dir", "läufe", "--run.name", "vergleichä"],
        ["methods"],
        ["toy", "--steps", "8", "--methods", "GRAWA", "--figure", "ö.svg"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _CHAIN, *(word for command in commands for word in [*command, "END"])],
        cwd=tmp_path,
        env={**os.environ, **IN_C},
        capture_output=True,
        timeout=600,
    )
    output = (done.stdout + done.stderr).decode("ascii")
    assert done.returncode == 0 and output.count("all done") == 1, output
    assert "is finished" in output  # under the name that the file gives, too
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"told.yaml", "läufe", "ä.csv", "ä.png", "ö.svg"}
    record = read_run(tmp_path / "läufe" / "ü")
    assert record.config["run.dir"] == "läufe" and record.status["name"] in ("ü", "\udcc3\udcbc")


@pytest.mark.parametrize("environment", [IN_C, {"PYTHONIOENCODING": "ascii"}], ids=["locale", "screen"])
def test_images_are_packed_from_folders_and_classes_of_any_name(tmp_path: Path, environment: dict[str, str]) -> None:
    for part, label in itertools.product(("train", "val"), ("Äpfel", "柿")):
        (folder := tmp_path / "größe" / part / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 16), (90 * number, 30, 60)).save(folder / f"Bild ä{number}.jpg")
    scripts = Path(__file__).parents[1] / "data_prep"
    for script, *words in (
        ("imagenet.py", "--train", "größe/train", "--val", "größe/val", "--out", "größe/gepackt", "--workers", "2"),
        ("verify.py", "größe/gepackt"),
        ("verify.py", "größe/train"),
    ):
        done = subprocess.run(
            [sys.executable, str(scripts / script), *words],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            timeout=300,
        )
        told = (done.stdout + done.stderr).decode("utf-8")
        assert done.returncode == (2 if words == ["größe/train"] else 0) and "Traceback" not in told, told


@pytest.mark.slow
def test_ranks_find_a_folder_that_their_locale_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in IN_C.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    words = [*TRAIN, *SAVE, "--backend", "mpi", "--run.dir", "läufe", "--run.name", "ü"]
    done = launch(*words, ranks=2)
    assert done.status == 0, done.said
    assert {path.name for path in (tmp_path / "läufe/ü/ranks").glob("*.json")} == {"0000.json", "0001.json"}
    assert list((tmp_path / "läufe/ü/checkpoints").glob("*/*1*"))
