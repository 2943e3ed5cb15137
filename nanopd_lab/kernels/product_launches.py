"""Launches of matrix products with few rows: y [rows, n] = x [rows, k] times the transpose of W [n, k].

`few_rows` reads W straight into registers, `some_rows` through shared memory; see their files in `cuda/`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import ELEMENTS, DeviceLimits, Launch


@dataclass(frozen=True)
class RowsTuning:
    """Constants of `cuda/few_rows.cu`: warps a block, turns that W and x are asked for ahead, tiles of 16 rows."""

    warps: int
    ahead: int
    x_ahead: int
    row_tiles: int


# By the most rows of x. Measured on an H100 over all products of Qwen3-8B in one graph, ms (cuBLAS, reading at the
# measured bandwidth 5.1): 5.1 (5.8) for 8 rows, 5.3 (5.9) for 16, 5.6 (5.9) for 32, 8.5 (6.0) for 64. Between the other
# kernels of a step 32 rows lose their lead: x no longer stays in the caches.
ROWS_TUNINGS = {
    8: RowsTuning(8, 6, 6, 1),
    16: RowsTuning(8, 4, 4, 1),
    32: RowsTuning(4, 4, 4, 1),
    64: RowsTuning(4, 4, 0, 2),
}
MOST_FEW_ROWS = 16  # the kernel takes 64, but `some_rows` and cuBLAS are faster then
ROWS_TURN = 32


def few_rows_fits(dtype: torch.dtype, rows: int, n: int, k: int) -> bool:
    """True if `few_rows_launch` takes such a product."""
    if dtype not in (torch.float16, torch.bfloat16) or not 1 <= rows <= max(ROWS_TUNINGS):
        return False
    return n % 32 == 0 and k % ROWS_TURN == 0


def few_rows_launch(
    dtype: torch.dtype, rows: int, n: int, k: int, tuning: RowsTuning | None = None
) -> Launch:
    """Launch of y [rows, n] = x [rows, k] times the transpose of W [n, k].

    Raises KernelArgumentError unless `few_rows_fits`.
    """
    if not few_rows_fits(dtype, rows, n, k):
        raise KernelArgumentError(
            f"few_rows takes float16 or bfloat16, 1 to {max(ROWS_TUNINGS)} rows, n and k in multiples of 32; got "
            f"{dtype}, rows={rows}, n={n}, k={k}: use torch.nn.functional.linear"
        )
    columns = next(c for c in ROWS_TUNINGS if rows <= c)
    chosen = tuning or ROWS_TUNINGS[columns]
    defines = {
        "ELEMENT": ELEMENTS[dtype], "COLUMNS": columns, "WARPS": chosen.warps, "AHEAD": chosen.ahead,
        "X_AHEAD": chosen.x_ahead, "ROW_TILES": chosen.row_tiles,
    }  # fmt: skip
    grid = (n // (16 * chosen.row_tiles), 1, 1)
    return Launch("few_rows.cu", "few_rows", grid, 32 * chosen.warps, 0, defines, overlaps=True)


@dataclass(frozen=True)
class TileTuning:
    """Constants of `cuda/some_rows.cu`: rows of W a block, slices in shared memory, blocks that share a tile's k."""

    tile: int
    stages: int
    cluster: int

    def shared_bytes(self, columns: int) -> int:
        """A block's dynamic shared memory."""
        return self.stages * (self.tile + columns) * SOME_ROWS_TURN * 2


SOME_COLUMNS = (32, 48, 64)
MOST_ROWS = SOME_COLUMNS[-1]
SOME_ROWS_TURN = 128
CLUSTERS = (1, 2, 3, 4)


def some_rows_fits(dtype: torch.dtype, rows: int, n: int, k: int) -> bool:
    """True if `some_rows_launch` takes such a product."""
    if dtype not in (torch.float16, torch.bfloat16) or not 1 <= rows <= SOME_COLUMNS[-1]:
        return False
    return n % 16 == 0 and k % SOME_ROWS_TURN == 0


def some_rows_tuning(n: int, limits: DeviceLimits) -> TileTuning:
    """The constants for a product: as few blocks a tile as give some seven in ten multiprocessors work.

    Measured on an H100 over all products of Qwen3-8B in one graph, with a small kernel before each (0.2 ms of it), ms
    (cuBLAS): 5.30 (6.32) for 32 rows, 5.47 (6.45) for 64. Two blocks a multiprocessor of half the stages, and more
    blocks a tile instead: 5.37, 5.66; tiles of 128 rows 5.57, 5.82; warps' products instead of a warpgroup's, at best:
    5.60, 6.17.
    """
    tiles = -(-n // 64)
    cluster = next((c for c in CLUSTERS if 10 * c * tiles >= 7 * limits.multiprocessors), CLUSTERS[-1])
    return TileTuning(64, 6, cluster)


def some_rows_launch(
    dtype: torch.dtype,
    rows: int,
    n: int,
    k: int,
    limits: DeviceLimits | None = None,
    tuning: TileTuning | None = None,
) -> Launch:
    """Launch of y [rows, n] = x [rows, k] times the transpose of W [n, k].

    Raises KernelArgumentError unless `some_rows_fits`.
    """
    if not some_rows_fits(dtype, rows, n, k):
        raise KernelArgumentError(
            f"some_rows takes float16 or bfloat16, 1 to {SOME_COLUMNS[-1]} rows, n in multiples of 16, k of "
            f"{SOME_ROWS_TURN}; got {dtype}, rows={rows}, n={n}, k={k}: use torch.nn.functional.linear"
        )
    columns = next(c for c in SOME_COLUMNS if rows <= c)
    chosen = tuning or some_rows_tuning(n, limits or DeviceLimits())
    defines = {
        "ELEMENT": ELEMENTS[dtype], "COLUMNS": columns, "TILE_N": chosen.tile, "BK": SOME_ROWS_TURN,
        "STAGES": chosen.stages, "CLUSTER": chosen.cluster,
    }  # fmt: skip
    grid = (-(-n // chosen.tile) * chosen.cluster, 1, 1)
    return Launch(
        "some_rows.cu", "some_rows", grid, 128, chosen.shared_bytes(columns), defines, overlaps=True
    )
