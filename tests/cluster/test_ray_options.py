"""What launcher "ray" is told is checked before anything is started."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

from nanopd_lab import Cluster, ClusterConfig
from nanopd_lab.cluster.ray_options import LEAST_CPUS, RayOptions, bundles_for, device_of
from nanopd_lab.cluster.starter import WorkerStartError
from nanopd_lab.router import Role

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
EACH = {"CPU": 2.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"address": "ray://head:10001"}, "a Ray client's"),
        ({"address": "head"}, 'give "HOST:PORT"'),
        ({"address": "head:99999"}, 'give "HOST:PORT"'),
        ({"placement": "beside"}, "choose one of pack, spread, together, apart"),
        ({"num_cpus": -1.0}, "num_cpus is -1.0"),
        ({"num_gpus": 2.0}, "num_gpus is 2.0"),
        ({"resources": {"fast": 0.0}}, "fast is 0.0"),
        ({"resources": {"GPU": 1.0}}, "set num_cpus and num_gpus"),
        ({"port": 70_000}, "port is 70000"),
        ({"place_timeout_s": 0.0}, "must be positive"),
        ({"address": "auto", "temp_dir": "/tmp/x"}, "ray start --temp-dir"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        RayOptions(**options)  # type: ignore[arg-type]


def test_flags_say_the_same() -> None:
    from nanopd_lab.bench.serving_cli import add_engine_options, cluster_config

    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    parser.set_defaults(cost_model=None, goodput=[])
    plain = cluster_config(parser.parse_args([]), "1p1d")
    assert (plain.launcher, plain.ray) == ("process", RayOptions())
    words = shlex.split(
        "--launcher ray --ray-address 10.0.0.1:6379 --ray-nodes 10.0.0.1 10.0.0.2 --ray-num-cpus 4 --ray-num-gpus 0.5 "
        "--ray-resources accelerator_type:H100=1 --ray-host 10.0.0.9 --ray-port 7000 --ray-namespace us "
        "--ray-timeout-sec 5"
    )
    config = cluster_config(parser.parse_args(words), "1p1d")
    assert config.ray == RayOptions(
        address="10.0.0.1:6379", namespace="us", nodes=("10.0.0.1", "10.0.0.2"), num_cpus=4.0, num_gpus=0.5,
        resources={"accelerator_type:H100": 1.0}, host="10.0.0.9", port=7000, place_timeout_s=5.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="NAME=AMOUNT"):
        cluster_config(parser.parse_args(["--launcher", "ray", "--ray-resources", "fast"]), "1p1d")
    with pytest.raises(ValueError, match="--launcher ray"):
        cluster_config(parser.parse_args(["--ray-placement", "spread"]), "1p1d")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"launcher": "process", "ray": RayOptions(placement="spread")}, 'set launcher="ray"'),
        ({"launcher": "ray", "devices": ("cuda:0", "cuda:1")}, "Ray gives out the GPUs"),
        ({"launcher": "ray", "devices": ("cpu", "cuda")}, "all on GPUs"),
        ({"launcher": "ray", "devices": ("cpu",) * 2, "ray": RayOptions(num_gpus=0.5)}, "takes 0.5 GPU"),
        (
            {"launcher": "ray", "policy": "collocated", "ray": RayOptions(placement="apart")},
            "prefill from decode",
        ),
        ({"launcher": "ray", "share_devices": True}, "num_gpus below 1"),
        ({"launcher": "ray", "ray": RayOptions(nodes=("10.0.0.1",))}, "1 nodes for 2 workers"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        ClusterConfig("random:tiny", **settings)  # type: ignore[arg-type]


def test_a_ray_that_does_not_answer_is_named_at_once() -> None:
    pytest.importorskip("ray", reason="launcher 'ray' needs the extra dist")
    config = ClusterConfig("random:tiny", launcher="ray", ray=RayOptions(address="127.0.0.1:1"))
    with pytest.raises(WorkerStartError, match=r"no Ray answers at 127\.0\.0\.1:1 .*ray start --head"):
        Cluster(config)


def test_each_worker_has_a_bundle_of_its_own_unless_they_belong_together() -> None:
    for placement in ("pack", "spread"):
        bundles = bundles_for(RayOptions(placement=placement), (P, D, D), EACH)
        assert bundles.bundles == (EACH,) * 3
        assert bundles.strategy == placement.upper()
        assert bundles.of_worker == (0, 1, 2)
    together = bundles_for(RayOptions(placement="together"), (P, D, D), EACH)
    assert together.bundles == ({"CPU": 6.0, "GPU": 3.0},)
    assert together.of_worker == (0, 0, 0)


def test_apart_parts_prefill_from_decode() -> None:
    apart = bundles_for(RayOptions(placement="apart"), (P, D, D), EACH)
    assert apart.bundles == ({"CPU": 2.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 2.0})
    assert apart.strategy == "STRICT_SPREAD"
    assert apart.of_worker == (0, 1, 1)
    for roles in ((M, M), (P, P), (P, M)):
        with pytest.raises(ValueError, match="apart"):
            bundles_for(RayOptions(placement="apart"), roles, EACH)


def test_named_nodes_are_asked_for() -> None:
    bundles = bundles_for(RayOptions(nodes=("10.0.0.1", "10.0.0.2")), (P, D), EACH)
    assert bundles.bundles[1] == {**EACH, "node:10.0.0.2": LEAST_CPUS}
    with pytest.raises(ValueError, match="2 nodes for 3 workers"):
        bundles_for(RayOptions(nodes=("10.0.0.1", "10.0.0.2")), (P, D, D), EACH)


@pytest.mark.parametrize(
    ("gpus", "visible", "device"),
    [
        ([], None, "cpu"),
        (["1"], None, "cuda:1"),
        (["3"], "2,3", "cuda:1"),  # the node was started with these two
        (["GPU-b"], "GPU-a,GPU-b", "cuda:1"),
    ],
)
def test_a_worker_that_sees_all_gpus_finds_its_own(gpus: list[str], visible: str | None, device: str) -> None:
    assert device_of(gpus, visible) == device
