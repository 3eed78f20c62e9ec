"""Who says what is wrong with a command before ranks communicate: rank 0, in one line."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..errors import ConfigError, Damaged
from ..launch import own_slot
from ..screen import say


@contextmanager
def named_errors(program: str) -> Iterator[None]:
    """Within the block bad input ends the program: one line and status 2 on rank 0, silence and 0 on the others.

    So does a damaged file. (If they left with an error first, mpirun would kill rank 0 before it has spoken.) What is
    wrong on another host only, a path say, rank 0 cannot know: the first rank there says it, unless the launcher ends
    it before.
    """
    try:
        yield
    except (ConfigError, Damaged) as error:
        slot = own_slot()
        elsewhere = slot.rank > 0 and slot.local_rank == 0 and slot.local_size < slot.size
        if elsewhere:
            time.sleep(5)
        if slot.rank == 0 or elsewhere:
            where = f"on {platform.node()}: " if elsewhere else ""
            line = " ".join(f"{where}{error}".splitlines())
            say(f"{program}: error: {line}", sys.stderr)
            raise SystemExit(2) from None
        raise SystemExit(0) from None


class Parser(argparse.ArgumentParser):
    """argparse's, for the options that a command has of its own."""

    def error(self, message: str) -> NoReturn:
        """Leave the line to ``named_errors``."""
        raise ConfigError(message)
