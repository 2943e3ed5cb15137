"""Every piece that an exercise hands to a cluster really runs in it, and gives the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanopd_lab import LLM, Cluster, ClusterConfig, SamplingParams, lab
from nanopd_lab.cluster.config import ClusterParts
from nanopd_lab.cluster.worker import WorkerCore
from nanopd_lab.lab import Session, Status
from nanopd_lab.transfer.packing import pack_blocks
from tests.lab.wrong_versions import RIGHT, WRONG

PIECES = [exercise.name for exercise in lab.all_exercises() if exercise.cluster_plug]
PROMPTS = [list(range(start, start + length)) for start, length in ((2, 42), (50, 3), (60, 16), (80, 30))]
PARAMS = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
ENGINE = {"block_size": 4, "max_num_batched_tokens": 16}


def tokens(parts: ClusterParts | None = None) -> list[list[int]]:
    """Answers of a prefill and a decode worker, each prompt in chunks of 16 tokens at most."""
    config = ClusterConfig(
        "random:tiny", policy="1p1d", launcher="inline", engine=ENGINE, parts=parts or ClusterParts()
    )
    with Cluster(config) as cluster:
        outputs = cluster.generate(PROMPTS, PARAMS, use_tqdm=False)
        cluster.check_integrity()
    assert all(output.paths[0].transferred_tokens == len(output.prompt_token_ids) for output in outputs)
    assert [problem for output in outputs for problem in output.paths[0].problems()] == []
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    llm = LLM("random:tiny", device="cpu", **ENGINE)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def test_these_are_the_pieces() -> None:
    assert len(PIECES) == 4
    assert all(lab.find(name).notebook == "06" for name in PIECES)


@pytest.mark.parametrize(("name", "impl"), [(name, impl) for name in PIECES for impl in RIGHT[name]])
def test_a_piece_runs_in_the_cluster(name: str, impl: Any, expected: list[list[int]], tmp_path: Path) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return impl(*args)

    session = Session(mode="learner", folder=tmp_path)
    session.exercise(name, impl)
    with pytest.warns(UserWarning, match="so the cluster gets the package's own"):
        assert session.cluster_parts() == ClusterParts()
    report = session.check(name)
    assert report.status is Status.PASS
    assert "lab.cluster_parts() carries yours into the cluster." in str(report)
    session._attempts[name].impl = counted
    assert tokens(session.cluster_parts()) == expected
    assert len(calls) >= len(PROMPTS)


def test_all_pieces_together_are_kept_and_come_back(expected: list[list[int]], tmp_path: Path) -> None:
    session = Session(mode="learner", folder=tmp_path / "kept")
    for name in PIECES:
        session.exercise(name, RIGHT[name][0])
        session.check(name)
    assert tokens(session.cluster_parts()) == expected
    session.save()
    again = Session(mode="learner", folder=tmp_path / "kept")
    assert again.load() == "\n".join(f"PASS  {name}" for name in sorted(PIECES))
    parts = again.cluster_parts()
    assert ClusterParts() not in (parts, session.cluster_parts())
    assert tokens(parts) == expected
    assert Session(mode="reference").cluster_parts() == ClusterParts()


def test_a_wrong_piece_would_really_have_broken_the_cluster(expected: list[list[int]]) -> None:
    backwards = next(i for i, _ in WRONG["transfer.pack_blocks"] if i.__name__ == "pack_off_by_one")
    assert tokens(ClusterParts(pack=backwards)) != expected


def test_pieces_are_for_one_process_and_for_the_transport_that_uses_them() -> None:
    mine = type("Mine", (WorkerCore,), {})
    with pytest.raises(ValueError, match='code cannot be sent to another process; set launcher="inline"'):
        ClusterConfig("random:tiny", parts=ClusterParts(worker=mine))
    parts = ClusterParts(pack=lambda pool, blocks: pack_blocks(pool, blocks))
    with pytest.raises(ValueError, match="parts exchange pack, which only transport 'inproc' uses"):
        ClusterConfig("random:tiny", launcher="inline", transport="shm", parts=parts)
    ClusterConfig("random:tiny", parts=ClusterParts())
