"""What can be set, as ``--help`` and ``--SECTION.help`` print it."""

from __future__ import annotations

from argparse import SUPPRESS, Action
from collections.abc import Sequence
from contextlib import suppress

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from ..errors import ConfigError
from ..training.config import CLASS_SECTIONS, GROUPS
from .arguments import PLAIN, add_class, add_other
from .classes import HELD, find_class, imported, known_classes
from .messages import no_setting
from .settings import read_settings, recipes, split_config


def help_text(program: str, arguments: Sequence[str]) -> str:
    """What can be set: in the section that ``--SECTION.help`` names, or in all, and in the classes that are chosen."""
    words, asked = [*arguments], None
    at = next((i for i, word in enumerate(words) if word.partition("=")[0].endswith(".help")), None)
    if at is not None:
        asked, _, path = words.pop(at).removeprefix("--").partition("=")
        if not path and at < len(words) and not words[at].startswith("-"):
            path = words.pop(at)
    chosen: dict[str, str] = {}
    with suppress(ConfigError):  # whoever asks for help may have it wrong
        files, options = split_config([word for word in words if word not in ("-h", "--help", "--print_config")])
        read = read_settings(files)
        chosen = {name: read[name]["class_path"] for name in CLASS_SECTIONS if name in read}
        chosen |= {key.removesuffix(".class_path"): value for key, value in options}
    text = _whole(program, chosen) if asked is None else _section(program, asked.removesuffix(".help"), path, chosen)
    return text.replace("``", "")  # marks of docstrings


def _section(program: str, key: str, path: str, chosen: dict[str, str]) -> str:
    found: object
    if key in CLASS_SECTIONS or key in HELD:
        found = find_class(key, path or chosen.get(key) or {**CLASS_SECTIONS, **HELD}[key][1] or "")
    else:
        found = GROUPS.get(key) or imported(path)[0]
    if not isinstance(found, type):
        raise ConfigError(no_setting(f"{key}.help", [f"{name}.help" for name in (*CLASS_SECTIONS, *GROUPS)]))
    parser = ArgumentParser(prog=program, add_help=False, formatter_class=_Formatter)
    parser.usage = f"%(prog)s [--{key} CLASS] [--{key}.KEY VALUE ...]"
    add_class(parser, found, key)
    return parser.format_help()


def _whole(program: str, chosen: dict[str, str]) -> str:
    parser = ArgumentParser(
        prog=program,
        description="Trains one model per rank with one method. Every option but those named at the end may stand in "
        "a file given by --config.",
        epilog="hpc-grawa train --dry_run [--world_size N] [--ranks_per_host N] only says what would happen. "
        "--trace writes trace.json; --resume_world any resumes with another number of ranks, from the center; "
        "--allow_change KEY (again for each key) resumes with a changed setting. --print_config prints the "
        "configuration as a file; --method.help EASGD lists the settings of a class, as does --data.help and so on.",
        usage="%(prog)s [--config FILE_OR_RECIPE] [--dry_run] [--KEY VALUE ...]",
        formatter_class=_Formatter,
    )
    text = f"A YAML file or a recipe ({', '.join(recipes())})."
    parser.add_argument("--config", default=SUPPRESS, help=text)
    for name, (_, default) in CLASS_SECTIONS.items():
        whose = "yours, or of torch's (torch.optim.RAdam)" if name == "optimizer" else "yours"
        without = f" Default: {default}." if default else ""
        text = f"{', '.join(known_classes(name))}, or the import path of a class of {whose}.{without}"
        parser.add_argument(f"--{name}", default=SUPPRESS, help=text)
        if name in chosen:
            add_class(parser, find_class(name, chosen[name]), f"{name}.init_args")
    for name in (*GROUPS, *PLAIN):
        add_other(parser, name)
    return parser.format_help().replace(".init_args", "")


class _Formatter(DefaultHelpFormatter):
    """jsonargparse's, without what a class could be that a setting holds: torch has hundreds, and of tensors none."""

    def add_argument(self, action: Action) -> None:
        """Leave out what lists the classes that a setting may hold, and files of one section."""
        if not action.dest.endswith(".help") and action.metavar != "CONFIG":
            super().add_argument(action)

    def _expand_help(self, action: Action) -> str:
        text, known, names = super()._expand_help(action).partition(", known subclasses: ")
        ours = known and "hpc_grawa" in names
        return text.replace(" | Tensor", "") + (known + names if ours else ")" if known else "")
