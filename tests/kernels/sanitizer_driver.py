"""Every kernel once, on small odd shapes: run under compute-sanitizer (memcheck, racecheck, initcheck).

compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python
tests/kernels/sanitizer_driver.py
"""

from __future__ import annotations

import torch

from nanopd_lab.kernels import ops, reference
from nanopd_lab.kernels.decode_launches import RUNGS
from nanopd_lab.kernels.problems import make_problem

CASES = [
    (torch.bfloat16, 128, 16, 4, 2, [1, 700, 0, 33]),
    (torch.float16, 64, 8, 3, 3, [129, 5]),
    (torch.float16, 256, 32, 8, 1, [300, 31]),
    (torch.float32, 128, 16, 2, 1, [200, 9]),
]


def main() -> None:
    for dtype, head_dim, block_size, group, kv_heads, contexts in CASES:
        problem = make_problem(dtype, head_dim, block_size, group, kv_heads, contexts, device="cuda")
        workspace = ops.make_workspace(problem.shape, "cuda")
        args = (problem.query, problem.kv_layer, problem.block_tables, problem.context_lens)
        twin = make_problem(
            dtype, head_dim, block_size, group, kv_heads, contexts
        )  # the oracle runs on the CPU
        wanted = reference.attend(
            twin.query, twin.kv_layer, twin.block_tables, twin.context_lens, twin.query_start, twin.scale
        )
        for rung in RUNGS:
            if rung == "mma" and dtype == torch.float32:
                continue
            out = ops.paged_decode(*args, workspace, problem.scale, rung)
            assert reference.relative_error(out.cpu(), wanted) <= reference.TOLERANCES[dtype], (rung, dtype)
        if dtype != torch.float32:
            lens = [max(1, c // 2) for c in contexts if c]
            batch = make_problem(
                dtype, head_dim, block_size, group, kv_heads, [c for c in contexts if c], lens, 1, "cuda"
            )
            ops.paged_prefill(
                batch.query,
                batch.kv_layer,
                batch.block_tables,
                batch.context_lens,
                batch.query_start,
                workspace,
                batch.scale,
            )
        key = torch.randn(9, kv_heads, head_dim, device="cuda").to(dtype)
        ops.kv_store(key, key, problem.kv_layer, torch.arange(9, device="cuda"))
        ids = torch.tensor([2, 0], device="cuda")
        ops.scatter_blocks(problem.kv_cache, ids, ops.gather_blocks(problem.kv_cache, ids))
        ops.copy_blocks(problem.kv_cache, ids[:1], ids[1:])
        ops.pull_blocks(problem.kv_cache.clone(), ids, problem.kv_cache, ids.flip(0))
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
