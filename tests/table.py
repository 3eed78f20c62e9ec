"""The only list of methods: whatever runs over methods in these tests takes its rows from here.

A new method is tested by one more row of `METHODS`: a method of the package, the oracle's, and tags that say what tests
may ask of it.

    averages    parameters, in rounds
    shares      gradients, at every step
    pools       its rounds may be pooled
    probes      `build` must be given probe=
    loss        `after_step` must be given the loss
    layers      weighs every layer by itself (K = L); the others the whole model (K = 1)
    norms       its weights are those of gradient norms
    leader      all weight is one rank's, whose vector is broadcast
    uniform     all ranks weigh alike
    pulls       a round is x ← x + λ(c - x), and λ its field `pull`
    centered    has a center before the first round
    equal       a run ends with all ranks alike
    keeps       what it does not send of a gradient, and sends it later
    momentum    is its own: the optimizer steps without
    levels      has rounds of groups beside those of all ranks
    outer       a step of its own of the center, of all ranks only: groups take plain means
    forced      local steps feel a force of the method's own, so that a world of one is not as if alone
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any, NamedTuple

import reference as ref

from hpc_grawa import (
    DPPF,
    EASGD,
    GRAWA,
    LGRAWA,
    LSGD,
    MGRAWA,
    DataParallel,
    DeepGradientCompression,
    DiLoCo,
    EFSign,
    LocalLGRAWA,
    LocalMGRAWA,
    LocalSGD,
    Method,
    OneBitSGD,
    Parle,
    PowerSGD,
    SlowMo,
)

PERIOD = 4  # of every row that averages


class Row(NamedTuple):
    ours: Method
    oracle: ref.Method
    tags: frozenset[str]


def _row(ours: Method, oracle: ref.Method, tags: str) -> Row:
    return Row(ours, oracle, frozenset(tags.split()))


#: Rows named as their class is are its plain ones. (`layer 2, layer 1` are those of `worlds.NET`.)
METHODS: dict[str, Row] = {
    "LGRAWA": _row(LGRAWA(period=PERIOD), ref.LGRAWA(), "averages pools probes layers norms pulls"),
    "LGRAWA of modules": _row(
        LGRAWA(period=PERIOD, layers="module", pull=0.7),
        ref.LGRAWA(layer="module", pull=0.7),
        "averages pools probes layers norms pulls",
    ),
    "LGRAWA of groups": _row(
        LGRAWA(period=PERIOD, layers=[["2.*"], ["0.*"]]),
        ref.LGRAWA(layer="layer 2, layer 1"),
        "averages pools probes layers norms pulls",
    ),
    "MGRAWA": _row(
        MGRAWA(period=PERIOD, pull=0.3, prox=0.05),
        ref.MGRAWA(pull=0.3, prox=0.05),
        "averages pools probes norms pulls",
    ),
    "MGRAWA of modules": _row(
        MGRAWA(period=PERIOD, layers="module"), ref.MGRAWA(layer="module"), "averages pools probes norms pulls"
    ),
    "GRAWA": _row(GRAWA(period=PERIOD), ref.GRAWA(), "averages pools probes norms pulls"),
    "GRAWA, q 2, b 0": _row(
        GRAWA(period=PERIOD, pull=0.7, prox=0.5, power=2.0, score_momentum=0.0),
        ref.GRAWA(pull=0.7, prox=0.5, power=2.0, score_momentum=0.0),
        "averages pools probes norms pulls",
    ),
    "LocalLGRAWA": _row(LocalLGRAWA(period=PERIOD), ref.LocalLGRAWA(), "averages pools layers norms pulls"),
    "LocalLGRAWA of modules": _row(
        LocalLGRAWA(period=PERIOD, layers="module", power=2.0, score_momentum=0.5),
        ref.LocalLGRAWA(layer="module", power=2.0, score_momentum=0.5),
        "averages pools layers norms pulls",
    ),
    "LocalMGRAWA": _row(LocalMGRAWA(period=PERIOD, pull=0.3), ref.LocalMGRAWA(pull=0.3), "averages pools norms pulls"),
    "EASGD": _row(EASGD(period=PERIOD), ref.EASGD(), "averages pools uniform centered"),
    "LSGD": _row(
        LSGD(period=PERIOD, pull=0.2, prox=0.4), ref.LSGD(pull=0.2, prox=0.4), "averages pools loss leader pulls"
    ),
    "LSGD of groups": _row(
        LSGD(period=PERIOD, prox=0.4, group_period=2, ranks_per_group=2, group_pull=0.3, group_prox=0.2),
        ref.LSGD(prox=0.4, group_period=2, group=2, group_pull=0.3, group_prox=0.2),
        "averages loss leader pulls levels",
    ),
    "LocalSGD": _row(LocalSGD(period=PERIOD), ref.LocalSGD(), "averages pools uniform equal"),
    "SlowMo": _row(
        SlowMo(period=PERIOD, slow_lr=0.8, slow_momentum=0.5),
        ref.SlowMo(alpha=0.8, beta=0.5),
        "averages pools uniform equal centered outer",
    ),
    "DiLoCo": _row(DiLoCo(period=PERIOD), ref.DiLoCo(), "averages pools uniform equal centered outer"),
    "DPPF": _row(DPPF(period=PERIOD, pull=0.4, push=0.05), ref.DPPF(pull=0.4, push=0.05), "averages pools uniform"),
    "Parle": _row(
        Parle(period=PERIOD, gamma=2.0, gamma_floor=0.5, rho_floor=0.3, scoping=0.5),
        ref.Parle(gamma=2.0, gamma_floor=0.5, rho_floor=0.3, scoping=0.5),
        "averages pools uniform forced",
    ),
    "Parle, previous": _row(
        Parle(period=PERIOD, gamma=0.5, gamma_floor=0.5, scoping=1.0, decay=0.5, reference="previous"),
        ref.Parle(gamma=0.5, gamma_floor=0.5, decay=0.5, previous=True),
        "averages pools uniform forced",
    ),
    "DataParallel": _row(DataParallel(bucket_mb=1e-4), ref.DataParallel(), "shares equal"),
    "DataParallel in bf16": _row(
        DataParallel(bucket_mb=1e-9, wire="bf16"), ref.RoundedDataParallel(to="bfloat16"), "shares equal"
    ),
    "DataParallel in fp16": _row(
        DataParallel(bucket_mb=1e-9, wire="fp16"), ref.RoundedDataParallel(to="float16"), "shares equal"
    ),
    "PowerSGD": _row(
        PowerSGD(bucket_mb=1e-9, min_compression=0.0, warmup_steps=2),
        ref.PowerSGD(min_compression=0.0, warmup=2),
        "shares equal keeps",
    ),
    "OneBitSGD": _row(OneBitSGD(bucket_mb=1e-9), ref.OneBitSGD(), "shares equal keeps"),
    "EFSign": _row(EFSign(bucket_mb=1e-9), ref.EFSign(), "shares equal keeps"),
    "DeepGradientCompression": _row(
        DeepGradientCompression(bucket_mb=1e-9, ratio=0.25, warmup_epochs=0, clip_norm=1.0),
        ref.DeepGradientCompression(clip=1.0),
        "shares equal keeps momentum",
    ),
    "DeepGradientCompression, unmasked": _row(
        DeepGradientCompression(bucket_mb=1e-4, ratio=0.5, warmup_epochs=0, masking=False),
        ref.DeepGradientCompression(ratio=0.5, masking=False),
        "shares equal keeps momentum",
    ),
}


def having(*tags: str) -> list[str]:
    """Rows that have all these tags."""
    return [name for name, row in METHODS.items() if row.tags.issuperset(tags)]


def plain(*tags: str) -> list[str]:
    """Of these, those named as their class is: one row of each method."""
    return [name for name in having(*tags) if name == type(METHODS[name].ours).__name__]


def kinds(*tags: str) -> list[str]:
    """Of these, one of each kind: the first of those whose tags are the same, or differ in `layers` alone."""
    found = {METHODS[name].tags - {"layers"}: name for name in reversed(having(*tags))}
    return [name for name in having(*tags) if name in found.values()]


def is_(name: str, tag: str) -> bool:
    """Whether this row has this tag."""
    return tag in METHODS[name].tags


def paced(name: str, period: int, **settings: Any) -> Method:
    """The row's method with rounds every so many steps, if it has any; those of groups at every step."""
    row = METHODS[name]
    if "averages" in row.tags:
        settings["period"] = period
    if "levels" in row.tags:
        settings["group_period"] = 1
    return replace(row.ours, **settings)


def as_words(name: str) -> list[str]:
    """The row's method on the command line."""
    ours = METHODS[name].ours
    set_ = {f.name: value for f in fields(ours) if (value := getattr(ours, f.name)) != f.default}
    given = [f"--method.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in set_.items()]
    return [f"--method={type(ours).__name__}", *given]
