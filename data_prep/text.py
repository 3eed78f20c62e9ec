#!/usr/bin/env python3
"""Turn text files into the plain arrays of tokens that hpc_grawa trains language models on.

    python data_prep/text.py --files shakespeare.txt --out data/text
    python data_prep/text.py --out data/text --files $(dirname $(python -c "import os; print(os.__file__)"))/*.py

The files are read in the order given, one after the other with nothing in between, as cat would. A token is a byte
(--tokens bytes: of any file, a vocabulary of 256) or a character (--tokens characters: of UTF-8, those that occur). The
stream is cut into three parts: its end to test on, what is before that to validate on, the rest to train on. DIR holds

    train.npy  validation.npy  test.npy   uint8 [T], or uint16 where there are more than 256 characters
    meta.json                             unit, counts, dtype, vocabulary, sources and arrays with their SHA-256

DIR appears complete or not at all, and is never overwritten. Of the library of Python 3.11.7 you should see

    tokens       bytes, 162 of 256 occur, uint8
    entropy      4.54 bits per byte, which a model reaches that knows how often each token occurs and nothing else
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cifar import Refused, publish
from numpy.typing import NDArray
from verify import line_of

PARTS = ("train", "validation", "test")
#: Unicode has no more.
_CODE_POINTS = 0x110000


def read(files: Sequence[Path]) -> list[bytes]:
    """The files' content; Refused for a folder."""
    for path in files:
        if path.is_dir():
            raise Refused(f"{path}: is a folder; name the files in it ({path}/*)")
    return [path.read_bytes() for path in files]


def as_bytes(contents: Sequence[bytes]) -> tuple[NDArray[Any], None]:
    """Each byte a token; its vocabulary goes without saying."""
    return np.frombuffer(b"".join(contents), np.uint8), None


def as_characters(contents: Sequence[bytes], files: Sequence[Path]) -> tuple[NDArray[Any], list[str]]:
    """Each character a token, numbered in the order of code points; and the characters that occur."""
    texts = []
    for path, content in zip(files, contents, strict=True):
        try:
            texts.append(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Refused(
                f"{path}: byte {error.start:,} is no UTF-8 ({error.reason}); convert it (iconv -t utf-8), "
                f"or take --tokens bytes"
            ) from None
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    occur = np.flatnonzero(np.bincount(codes, minlength=_CODE_POINTS))
    if len(occur) > 2**16:
        raise Refused(f"{len(occur):,} different characters do not fit into uint16; take --tokens bytes")
    number = np.zeros(_CODE_POINTS, np.uint8 if len(occur) <= 256 else np.uint16)
    number[occur] = np.arange(len(occur))
    return number[codes], [chr(code) for code in occur]


def cut(count: int, validation: float, test: float) -> dict[str, int]:
    """Tokens of each part, each with two at least: one to see and one to guess."""
    for name, share in (("validation", validation), ("test", test)):
        if not 0 < share < 1:
            raise Refused(f"--{name} is {share:g}: must be a share of the tokens, between 0 and 1")
    last = {"validation": int(validation * count), "test": int(test * count)}
    counts = {"train": count - sum(last.values()), **last}
    for name, number in counts.items():
        if number < 2:
            raise Refused(
                f"{count:,} tokens leave {max(number, 0)} for {name} (--validation {validation:g} --test {test:g}); "
                f"must be 2 at least: give more text or other shares"
            )
    return counts


def entropy(tokens: NDArray[Any], token_bytes: Sequence[int]) -> float:
    """Bits per byte of a model that knows how often each token occurs and nothing else."""
    counts = np.bincount(tokens, minlength=len(token_bytes))
    bits = -sum(int(n) * math.log2(n / len(tokens)) for n in counts if n)
    return bits / int(counts @ np.asarray(token_bytes))


def prepare(files: Sequence[Path], out: Path, kind: str, validation: float, test: float) -> None:
    """Read ``files``, write ``out`` and say what was done."""
    contents = read(files)
    total = sum(map(len, contents))
    print(f"reading      {len(files)} {'file' if len(files) == 1 else 'files'}, {total:,} bytes", flush=True)
    tokens, vocabulary = as_bytes(contents) if kind == "bytes" else as_characters(contents, files)
    counts = cut(len(tokens), validation, test)
    token_bytes = [1] * 256 if vocabulary is None else [len(c.encode()) for c in vocabulary]
    written: dict[str, bytes] = {}
    start = 0
    for part in PARTS:
        buffer = io.BytesIO()
        np.save(buffer, tokens[start : start + counts[part]])
        written[f"{part}.npy"] = buffer.getvalue()
        start += counts[part]
    facts = {
        "unit": kind,
        "counts": counts,
        "dtype": tokens.dtype.name,
        "vocabulary_size": len(token_bytes),
        "vocabulary": vocabulary,
        "sources": [
            {"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for path, content in zip(files, contents, strict=True)
        ],
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in written.items()},
    }
    # File names may hold bytes that are no text; json escapes them.
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items())
    written["meta.json"] = f"{{\n{lines}\n}}\n".encode()
    print(f"tokens       {kind}, {len(np.unique(tokens))} of {len(token_bytes)} occur, {tokens.dtype}")
    for part in PARTS:
        print(f"{part:12} {counts[part]:,} tokens")
    print(
        f"entropy      {entropy(tokens, token_bytes):.2f} bits per byte, which a model reaches that knows how often "
        f"each token occurs and nothing else"
    )
    if publish(written, out):
        print(f"wrote        {out} ({sum(map(len, written.values())) / 1e6:.1f} MB)")
    else:
        print(f"unchanged    {out} already holds exactly this")
    print(f"use it with  --data Text --data.path {out}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit status 0, or 2 after one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a screen may not know the letters of a folder's name
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True, nargs="+", metavar="FILE", help="texts, in this order")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to be made")
    parser.add_argument("--tokens", choices=("bytes", "characters"), default="bytes", help="what a token is (bytes)")
    parser.add_argument("--validation", type=float, default=0.05, help="share of the tokens to validate on (0.05)")
    parser.add_argument("--test", type=float, default=0.05, help="share of the tokens to test on (0.05)")
    options = parser.parse_args(arguments)
    try:
        prepare(options.files, options.out.resolve(), options.tokens, options.validation, options.test)
    except Refused as refused:
        reason = line_of(refused)
    except OSError as error:
        where = error.filename2 or error.filename or options.out
        reason = f"{where}: {error.strerror or line_of(error)}; check the path, its permissions and the free space"
    else:
        return 0
    print(f"text.py: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
