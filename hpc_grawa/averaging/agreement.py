"""Before the first message whose length depends on the model: do all ranks have the same one?"""

from __future__ import annotations

import hashlib
from itertools import zip_longest

import torch

from ..comm import Communicator
from ..errors import RanksDisagree


def agree(comm: Communicator, description: list[str]) -> None:
    """Compare one fixed-size hash of ``description`` on all ranks.

    Args:
        comm: the ranks.
        description: lines that must be equal on all ranks; exchanged only if their hashes differ.

    Raises:
        RanksDisagree: on all ranks, naming the first rank that differs from rank 0 and the first difference.
    """
    text = "\n".join(description)
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digests = comm.allgather(digest, "setup").wait()
    if bool((digests == digests[0]).all()):
        return
    texts = [message.decode().split("\n") for message in comm.gather_bytes(text.encode())]
    rank = next(m for m, lines in enumerate(texts) if lines != texts[0])
    ours, theirs = next((a, b) for a, b in zip_longest(texts[0], texts[rank], fillvalue="nothing") if a != b)
    raise RanksDisagree(f"rank {rank} differs from rank 0 before training: rank {rank} has {theirs}, rank 0 has {ours}")
