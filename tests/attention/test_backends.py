"""Every backend against dense attention in float64, over pages in random order."""

from __future__ import annotations

import pytest
import torch

from nanopd_lab.attention import AttentionMetadata, create_backend
from nanopd_lab.attention.cpu import CpuBackend
from nanopd_lab.cpu import library
from nanopd_lab.kv import blocks_for, slots
from nanopd_lab.kv.cache import KVShape

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (query tokens, context) of each sequence, shortest queries first
BATCHES = {
    "one decode": [(1, 1)],
    "ragged decodes": [(1, 1), (1, 5), (1, 16), (1, 17), (1, 255), (1, 256), (1, 257), (1, 900)],
    "first chunks": [(3, 3), (17, 17), (40, 40)],
    "later chunks": [(2, 9), (7, 300), (8, 8), (9, 64), (33, 290)],
    "mixed step": [(1, 40), (1, 511), (5, 5), (64, 100)],
}


def build(
    batch: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Query, the past in the second of three layers (NaN wherever nobody should look), this step's K and V."""
    generator = torch.Generator().manual_seed(len(batch) * 1000 + heads)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    needed = [blocks_for(context, block_size) for _, context in batch]
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    pool = torch.full((len(order), 3, 2, kv_heads, block_size, dim), float("nan"), dtype=dtype)
    tables, mapping = [], []
    for (length, context), count in zip(batch, needed, strict=True):
        table, order = order[:count], order[count:]
        tables.append(table + [0] * (max(needed) - count))
        mapping += slots(table, context - length, length, block_size)
        for slot in slots(table, 0, context - length, block_size):
            pool[slot // block_size, 1, :, :, slot % block_size] = rand(2, kv_heads, dim)
    lengths = tuple(length for length, _ in batch)
    tokens = sum(lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    metadata = AttentionMetadata(
        slot_mapping=torch.tensor(mapping, device=device),
        query_start=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor([c for _, c in batch], dtype=torch.int32, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        query_lens_host=lengths,
        context_lens_host=tuple(context for _, context in batch),
    )
    fresh = rand(2, tokens, kv_heads, dim).to(device)
    return rand(tokens, heads, dim).to(device), pool.to(device), fresh, metadata


def backends(device: str, shape: KVShape, heads: int) -> list[str]:
    """The generic backends, and the one that `auto` would take."""
    fastest = create_backend("auto", torch.device(device), shape, heads).name
    return sorted({"torch", "online", fastest})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(9, 3, 64, 16), (4, 4, 32, 4), (8, 1, 128, 3), (10, 2, 16, 32), (4, 2, 20, 8), (12, 4, 256, 16)],
)
@pytest.mark.parametrize("name", BATCHES)
def test_matches_float64(
    name: str, heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype, device: str
) -> None:
    batch, scale = BATCHES[name], dim**-0.5
    results = {}
    shape = KVShape(3, kv_heads, dim, block_size, dtype)
    for backend_name in ["reference", *backends(device, shape, heads)]:
        query, pool, fresh, metadata = build(batch, heads, kv_heads, dim, block_size, dtype, device)
        backend = create_backend(backend_name, torch.device(device), shape, heads)
        layer = pool[:, 1]
        backend.store(fresh[0], fresh[1], layer, metadata.slot_mapping)
        results[backend_name] = backend.attend(query, layer, metadata, scale).cpu().double()
        assert torch.isnan(pool[:, [0, 2]]).all(), "another layer was written"
    tolerance = 5e-6 if dtype == torch.float32 else 2e-2
    expected = results.pop("reference")
    assert results
    for backend_name, got in results.items():
        error = (got - expected).abs().max().item()
        assert error < tolerance, f"{backend_name}: {error}"


SMALL = KVShape(2, 3, 16, 4, torch.float32)


@pytest.mark.parametrize("name", backends("cpu", SMALL, 3))
def test_store_takes_strided_rows(name: str) -> None:
    """K and V arrive as views of a fused projection."""
    projected = torch.randn(5, 2, 3, 16)
    key, value = projected[:, 0], projected[:, 1]
    pool = torch.zeros(4, 2, 2, 3, 4, 16)
    mapping = torch.tensor([13, 2, 7, 0, 9])
    create_backend(name, torch.device("cpu"), SMALL, 3).store(key, value, pool[:, 1], mapping)
    for token, slot in enumerate(mapping.tolist()):
        assert torch.equal(pool[slot // 4, 1, 0, :, slot % 4], key[token])
        assert torch.equal(pool[slot // 4, 1, 1, :, slot % 4], value[token])
    assert not pool[:, 0].any()
    assert pool[:, 1].count_nonzero() == 2 * key.numel()


@pytest.mark.skipif(not library.available(), reason="no C++ compiler on this machine")
def test_a_sequence_does_not_depend_on_its_batch() -> None:
    backend = CpuBackend()
    query, pool, fresh, metadata = build(BATCHES["ragged decodes"], 9, 3, 64, 16, torch.float32, "cpu")
    backend.store(fresh[0], fresh[1], pool[:, 1], metadata.slot_mapping)
    together = backend.attend(query, pool[:, 1], metadata, 0.125)
    for index in range(metadata.num_sequences):
        alone = AttentionMetadata(
            slot_mapping=metadata.slot_mapping[index : index + 1],
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=metadata.context_lens[index : index + 1],
            block_tables=metadata.block_tables[index : index + 1],
            query_lens_host=(1,),
            context_lens_host=metadata.context_lens_host[index : index + 1],
        )
        got = backend.attend(query[index : index + 1], pool[:, 1], alone, 0.125)
        assert torch.equal(got[0], together[index])


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("flash", "cpu", "'flash' is unknown; choose one of auto, reference, online, torch, cpu, cuda"),
        ("cpu", "cuda:0", "'cpu' cannot run on cuda:0; use 'torch'"),
        ("cuda", "cpu", "'cuda' cannot run on cpu; use 'torch'"),
    ],
)
def test_what_cannot_work_is_named(name: str, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_backend(name, torch.device(device), SMALL, 3)


def test_the_cuda_kernels_name_a_shape_they_do_not_have() -> None:
    with pytest.raises(
        ValueError, match=r"head_dim=16 is not supported .*64, 128, 256.*use the torch backend"
    ):
        create_backend("cuda", torch.device("cuda"), SMALL, 3)
