"""The mean gradient of all ranks, uncompressed."""

from __future__ import annotations

from ..comm import Work
from .codec import Bucket, Codec


class Mean(Codec):
    """g ← (1/W) Σ_m g_m by one allreduce."""

    sums = True

    def launch(self, bucket: Bucket) -> Work:
        return bucket.comm.allreduce(bucket.message, "gradient", bucket.numbers[0])

    def land(self, bucket: Bucket, work: Work) -> None:
        work.wait()
        bucket.gradient.mul_(1 / bucket.comm.size)
