"""Every setting of engine, cluster and Ray is of the type that is written, or refused by name when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanopd_lab import LLM, ClusterConfig, EngineConfig
from nanopd_lab.cluster.actions import Limits
from nanopd_lab.cluster.lease import LeaseTerms
from nanopd_lab.cluster.ray_options import RayOptions
from nanopd_lab.settings import check_fields

ODD: tuple[Any, ...] = (
    5,
    1.5,
    "x",
    b"x",
    True,
    object(),
    {1: 2},
    ["x"],
    [1],
    [1.5],
    (b"x",),
    {"x"},
    None,
    print,
)
FITTING = {
    "int": (5,),
    "float": (5, 1.5),
    "str": ("x",),
    "bool": (True,),
    "tuple[str, ...]": (["x"],),
    "tuple[int, ...]": ([1],),
    "str | Policy": ("x",),
    "Mapping[str, Any]": (),
    "Mapping[str, float]": (),
    "Limits": (),
    "LeaseTerms": (),
    "RayOptions": (),
    "ClusterParts": (),
    "EngineParts": (),
}


def wrong(kind: type, name: str) -> list[Any]:
    """Values of another type than a field has, by its annotation as a reader reads it."""
    (annotation,) = (str(each.type) for each in fields(kind) if each.name == name)
    plain = annotation.removesuffix(" | None")
    fitting = [*map(repr, FITTING[plain]), *(["None"] if plain != annotation else [])]
    return [value for value in ODD if repr(value) not in fitting]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, each.name)
        for kind in (EngineConfig, ClusterConfig, RayOptions)
        for each in fields(kind)
        # Whatever has a name as text may be an engine's device; whether there is such a one is asked when it is needed.
        if (kind, each.name) != (EngineConfig, "device")
    ],
)
def test_other_types_are_refused_by_name(kind: type, name: str) -> None:
    model = {} if kind is RayOptions else {"model": "random:tiny"}
    for value in wrong(kind, name):
        with pytest.raises(ValueError, match=rf"\b{name} "):
            kind(**{**model, name: value})


@pytest.mark.parametrize("name", [each.name for each in fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, "x", float("nan"), b""])
def test_limits_are_positive_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}; it must be"):
        Limits(**{name: value})


def test_terms_of_a_lease_are_numbers() -> None:
    with pytest.raises(ValueError, match="a lease of 'x'"):
        LeaseTerms("x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"block_size": 1.5}}, r"block_size is 1\.5; it must be an integer"),
        ({"devices": "cpu"}, "devices is 'cpu'; it must be a tuple of strings or None"),
        ({"goodput": "ttft:500"}, "goodput is 'ttft:500'; it must be a tuple of strings"),
        ({"start_timeout_s": 0}, "start_timeout_s is 0; it must be positive"),
        ({"max_restarts": -1}, "max_restarts is -1; it must be at least 0"),
        ({"policy": 5}, 'policy is 5; give a name, as "1p1d"'),
    ],
)
def test_what_is_refused_is_named_with_its_limit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterConfig("random:tiny", **changes)


def test_a_policys_class_is_no_policy() -> None:
    class Mine:
        name = "mine"

        def choose(self, job: Any, workers: Any, now: float) -> None:
            return None

    with pytest.raises(ValueError, match=r"policy is the class Mine; make one: policy=Mine\(\)"):
        ClusterConfig("random:tiny", policy=Mine)  # type: ignore[arg-type]
    ClusterConfig("random:tiny", policy=Mine())


def test_what_means_the_same_becomes_pythons_own() -> None:
    config = ClusterConfig(
        Path("random:tiny"),  # type: ignore[arg-type]
        workers=np.int64(2),  # type: ignore[arg-type]
        devices=[torch.device("cpu"), "cpu"],  # type: ignore[arg-type]
        request_timeout_s=np.float32(2.5),  # type: ignore[arg-type]
        share_devices=np.bool_(True),  # type: ignore[arg-type]
        engine={"dtype": torch.bfloat16, "block_size": np.int32(8)},
    )
    engine = config.engine_config("cpu")
    assert (config.model, config.workers, config.devices) == ("random:tiny", 2, ("cpu", "cpu"))
    assert (type(config.workers), config.request_timeout_s, config.share_devices) == (int, 2.5, True)
    assert (engine.dtype, engine.block_size, type(engine.block_size)) == ("bfloat16", 8, int)
    assert EngineConfig("random:tiny", device=torch.device("cpu")).device == "cpu"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model is 5; it must be a string"):
        LLM(5)  # type: ignore[arg-type]


def test_fields_of_other_kinds_are_left_alone() -> None:
    @dataclass(frozen=True)
    class Own:
        name: str
        anything: object = None

    given = object()
    own = Own("x", given)
    check_fields(own)
    assert own.anything is given
