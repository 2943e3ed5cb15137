"""Every piece that an exercise hands to the engine really runs in it, and gives the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanopd_lab import LLM, SamplingParams, lab
from nanopd_lab.attention.capture import CaptureBackend
from nanopd_lab.attention.online import OnlineBackend
from nanopd_lab.attention.torch_backend import TorchBackend
from nanopd_lab.engine.config import EngineParts
from nanopd_lab.kv import BlockAllocator
from nanopd_lab.lab import Session, Status
from nanopd_lab.lab.pieces import with_piece
from tests.lab.wrong_versions import RIGHT, WRONG

PIECES = [e.name for e in lab.all_exercises() if e.notebook in ("02", "03") and e.plug]
PREFIX = list(range(2, 42))
PROMPTS = [[*PREFIX, 50, 51], [9, 8, 7], [*PREFIX, 60], list(range(100, 130)), [*PREFIX, 50, 51]]
PARAMS = [SamplingParams(temperature=0, max_tokens=9, ignore_eos=True) for _ in PROMPTS]
PARAMS[1] = SamplingParams(temperature=0.7, seed=3, n=3, max_tokens=12, ignore_eos=True)


def tokens(parts: EngineParts) -> tuple[list[list[list[int]]], LLM]:
    """Answers from a pool so small that sequences wait, are preempted, share, copy and evict; twice."""
    llm = LLM("random:tiny", device="cpu", block_size=4, max_num_batched_tokens=24, parts=parts)
    pool = llm.engine.cache.shape.block_bytes * 30
    llm = LLM(
        "random:tiny",
        device="cpu",
        block_size=4,
        max_num_batched_tokens=24,
        kv_cache_memory_bytes=pool,
        parts=parts,
    )
    found = []
    for _ in range(2):
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        found += [[sample.token_ids for sample in output.outputs] for output in outputs]
    llm.engine.check_integrity()
    return found, llm


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    found, llm = tokens(EngineParts())
    blocks = llm.stats().blocks
    assert (
        min(blocks.copies_total, blocks.evictions_total, blocks.prefix_hits_total, llm.stats().preemptions)
        > 0
    )
    return found


@pytest.mark.parametrize(("name", "impl"), [(name, impl) for name in PIECES for impl in RIGHT[name][:2]])
def test_a_piece_runs_in_the_engine(
    name: str, impl: Any, expected: list[list[list[int]]], tmp_path: Path
) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return impl(*args)

    session = Session(mode="learner", folder=tmp_path)
    session.exercise(name, impl)
    assert session.check(name).status is Status.PASS
    session._attempts[name].impl = counted
    assert tokens(session.parts())[0] == expected
    assert len(calls) >= 2


def test_all_pieces_together(expected: list[list[list[int]]], tmp_path: Path) -> None:
    session = Session(mode="learner", folder=tmp_path)
    for name in PIECES:
        session.exercise(name, RIGHT[name][0])
        session.check(name)
    found, llm = tokens(session.parts())
    assert found == expected
    assert isinstance(llm.engine.scheduler.allocator, BlockAllocator)
    assert llm.engine.scheduler.allocator.fork.__func__ is RIGHT["kv.fork"][0]  # type: ignore[attr-defined]
    assert llm.engine.scheduler.blocks.grow_table is RIGHT["kv.append"][0]
    assert llm.engine.runner.backend.attend_pages is RIGHT["attention.attend_pages"][0]  # type: ignore[attr-defined]


def test_a_wrong_piece_would_really_have_broken_the_engine(expected: list[list[list[int]]]) -> None:
    unscaled = next(impl for impl, _ in WRONG["attention.attend_pages"] if impl.__name__ == "attend_no_scale")
    assert tokens(EngineParts(attention=OnlineBackend(unscaled)))[0] != expected


def test_a_piece_does_not_change_the_package() -> None:
    before = dict(vars(BlockAllocator))
    mine = with_piece(with_piece(BlockAllocator, "fork", len), "match", max)
    assert (mine.fork, mine.match, mine.__name__) == (len, max, "BlockAllocator")
    assert dict(vars(BlockAllocator)) == before


def test_pieces_are_kept_and_come_back(tmp_path: Path) -> None:
    session = Session(mode="learner", folder=tmp_path / "kept")
    for name in ("kv.allocate", "kv.append", "attention.add_page"):
        session.exercise(name, RIGHT[name][1])
        session.check(name)
    session.save()
    again = Session(mode="learner", folder=tmp_path / "kept")
    assert again.load() == "PASS  attention.add_page\nPASS  kv.allocate\nPASS  kv.append"


def test_what_is_captured_is_what_was_attended_to() -> None:
    camera = CaptureBackend(TorchBackend())
    llm = LLM("random:tiny", device="cpu", block_size=4, parts=EngineParts(attention=camera))
    llm.generate([PROMPTS[0]], PARAMS[0], use_tqdm=False)
    assert len(camera.layers) == llm.engine.cache.shape.num_layers
    # The last of 9 tokens was never fed in again.
    assert {layer.context_len for layer in camera.layers} == {len(PROMPTS[0]) + 8}
    assert {len(layer.query) for layer in camera.layers} == {1}
    for layer in camera.layers:
        assert layer.kv_layer.shape[0] == -(-layer.context_len // 4)
        assert layer.kv_layer.flatten()[: 4 * 8].isfinite().all()
