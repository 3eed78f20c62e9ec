"""jsonargparse's messages, each a tree of causes, as one line: key, value, and what is allowed."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module


def one_line(message: str, keys: Sequence[str], classes: Callable[[str], Iterable[str]]) -> str:
    """Say in one line what is wrong.

    Args:
        message: of jsonargparse.
        keys: all dotted keys outside of classes (``budget.seconds``), and the sections that hold a class (``method``).
        classes: says which classes of a key need no import path.
    """
    path: list[str] = []
    owner = value = ""
    got = abstract = False
    notes: list[str] = []
    skipped = r"Subclass types expect|a class path \(|a dict with"
    if "<class 'torch.Tensor'>" in message:  # torch's lr: float | Tensor
        skipped += "|.*import path|.*subclass of Tensor"
    # The arguments of an optimizer of torch's.
    message = message.replace("optimizer.init_args", "optimizer")
    for line in filter(None, (line.strip().removeprefix("- ") for line in message.splitlines())):
        if found := re.fullmatch(r'Parser key "(.+)":', line):
            path.append(found[1])
        elif found := re.fullmatch(r"Problem with given class_path '(.+)':", line):
            owner = value = found[1]
            notes.clear()  # of a key that a class was given to, what else it may be
        elif found := re.fullmatch(r"Option '(.+?)(?:\.(?:class_path|init_args)(?:\..+)?)?' is not accepted", line):
            fields = [".".join([*path, key]) for key in _fields(owner)]
            return _unknown(".".join([*path, found[1]]), fields if path else keys)
        elif found := re.fullmatch(r"Group '(.+)' does not accept option '(.+)'", line):
            return _unknown(f"{found[1]}.{found[2]}", keys)
        elif found := re.match(r"unrecognized arguments: (--)?([^\s=]+)", line):
            return _unknown(found[2], keys) if found[1] else f"{found[2]} belongs to no option: options are --key value"
        elif found := re.fullmatch(r"the following arguments are required: (.+)", line):
            who = owner.rpartition(".")[2] or "the optimizer"
            return f"{'.'.join([*path, found[1]])} is missing: {who} needs it"
        elif re.match(skipped, line):
            continue
        elif found := re.fullmatch(r"Not a valid subclass of (.+)", line):
            notes.append(f"must be a class derived from {found[1]}")
        elif found := re.fullmatch(
            r"(?:Expected a dot import path string|Unexpected import path format):(?: (.+))?", line
        ):
            names = "".join(f"{name}, " for name in classes(path[-1])).removesuffix(", ")
            names = f"{names} or " if names else ""
            value = found[1] or ""
            notes.append(f"must be {names}the import path of a class (package.module.Class)")
        elif found := re.fullmatch(r"Import path(?: (.+))? does not correspond to a subclass of (.+)", line):
            value = found[1] or value
            torchs = " or torch.optim.Optimizer, and not abstract" if path == ["optimizer"] else ""
            notes.append(f"must be a class derived from {found[2]}{torchs}")
        elif re.fullmatch(r"Expected an instantiatable class, but (.+ )?is abstract", line):
            abstract = True
            notes.append("must be a class (class_path: CLASS with init_args: {its settings})")
        elif found := re.fullmatch(r"Expected an? (.+?)(?:\. Got value: (.*))?", line):
            value, got = found[2] or value, bool(found[2])
            notes.append(must_be(found[1]))
        elif abstract and (found := re.fullmatch(r"Given value: NestedArg\(key='(.+)', val=(.*)\)", line)):
            key = ".".join(path)
            return f"{key}.{found[1]} is {found[2]}: must come with a class, --{key} {' or '.join(classes(path[-1]))}"
        elif found := re.fullmatch(r"Given value:(?: NestedArg\(key='.+', val='?(.*?)'?\)| (.*))?", line):
            value = value if got else found[1] or found[2] or ""
        elif not re.match(r"Does not validate|Subtypes:|Errors:|Given value type:", line):
            notes.append(re.sub("^(Type .* expects a function or a callable class: )?", "", line))
    text = " or ".join(dict.fromkeys(notes)).replace(" or must be", " or")
    if (path, value) == (["precision"], "fp16"):
        text += " (fp16 needs loss scaling: each rank's scale would be another and enter the weights)"
    if not path:
        return text
    return f"{'.'.join(path)} is {value}: {text}" if value else f"{'.'.join(path)}: {text}"


def _unknown(key: str, keys: Sequence[str]) -> str:
    """A key that does not exist: the one that was meant, and its neighbours."""
    section = (key.rpartition(".")[0] or key) + "."
    near = difflib.get_close_matches(key, keys, 1)
    neighbours = [k.removeprefix(section) for k in keys if k.startswith(section)]
    allowed = neighbours or list(dict.fromkeys(k.partition(".")[0] for k in keys))
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{key} is no setting: {hint}must be one of {', '.join(allowed)}"


def must_be(kind: str) -> str:
    """``must be ...`` from the name of a type."""
    if found := re.fullmatch(r"typing\.Literal\[(.+)\]", kind):
        return "must be one of " + found[1].replace("'", "")
    if " | " in kind:
        return " or ".join(must_be(f"<class '{part}'>") for part in kind.split(" | ")).replace(" or must be", " or")
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
    if found := re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", kind):
        return "must be " + {"NoneType": "null", "dict": "key: value pairs", **names}.get(found[1], f"a {found[1]}")
    return f"must be {kind}"


def _fields(class_path: str) -> list[str]:
    """What a class's constructor takes."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
