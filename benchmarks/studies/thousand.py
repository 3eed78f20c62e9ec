"""A thousand replicas under Parle, each with one image in a hundred; beside SGD with all images.

    python benchmarks/studies/thousand.py

Handwritten digits, a small network, simulated ranks in one process. Parle's replicas take ``--rounds`` rounds of 25
steps with batches of 8 of their own 14 images; SGD makes as many steps with batches of 8 of all 1,437. Shown is the
center, and the mean of the ranks' own models.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import hpc_grawa
from hpc_grawa import methods, simulate
from hpc_grawa.comm import Communicator
from hpc_grawa.data import Digits
from hpc_grawa.evaluate import recalibrate
from hpc_grawa.models import SmallCNN

BATCH, STEPS = 8, 25


def train(replicas: int, share: float, rounds: int, method: methods.Method) -> tuple[float, float, float, float]:
    """Training and test error of the center in per cent; the mean test error of ranks; seconds."""
    splits = Digits().load()
    x, y = splits.train.batch(torch.arange(len(splits.train)))
    a, b = splits.test.batch(torch.arange(len(splits.test)))
    began = time.perf_counter()

    def body(comm: Communicator) -> tuple[float, float, float]:
        torch.manual_seed(0)
        model = SmallCNN(width=4)
        vector = hpc_grawa.ParameterVector(model)
        optimizer = torch.optim.SGD(vector.parameters, 0.1, momentum=0.9, nesterov=True)
        draw = torch.Generator().manual_seed(comm.rank)
        own = torch.randperm(len(y), generator=draw)[: max(BATCH, round(share * len(y)))]

        def loss() -> Tensor:
            some = own[torch.randint(len(own), (BATCH,), generator=draw)]
            return F.cross_entropy(model(x[some]), y[some])

        run = method.build(comm, vector, optimizer, probe=loss)
        closure = run.closure(loss)
        for _ in range(rounds * STEPS):
            run.after_step(optimizer.step(closure))
        run.finish()
        vector.data.copy_(run.local)
        local = error(model, a, b)
        vector.data.copy_(run.center)
        batches = (x[own[torch.randint(len(own), (64,), generator=draw)]] for _ in range(2))
        recalibrate(model, batches, comm)
        return error(model, x, y), error(model, a, b), local

    found = simulate(replicas, body)
    return *found[0][:2], sum(one[2] for one in found) / replicas, time.perf_counter() - began


def error(model: SmallCNN, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        wrong = model(x).argmax(1) != y
    model.train()
    return 100 * float(wrong.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=8)
    words = parser.parse_args()
    torch.set_num_threads(1)
    for title, replicas, share, method in (
        (f"Parle, {words.replicas:,} replicas", words.replicas, words.share, methods.Parle(period=STEPS, scoping=0.7)),
        (f"one replica alone, {words.share:.0%} of the images", 1, words.share, methods.LocalSGD(period=STEPS)),
        ("SGD, all images", 1, 1.0, methods.LocalSGD(period=STEPS)),
    ):
        known, new, local, seconds = train(replicas, share, words.rounds, method)
        print(
            f"{title:42}  train {known:5.2f} %  test {new:5.2f} %  mean of ranks {local:5.2f} %  {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
