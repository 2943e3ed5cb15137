"""When pulled blocks arrive: chunks go through two stages, computing and copying, each one at a time.

This is Johnson's two-machine flow shop (S. M. Johnson, "Optimal two- and three-stage production schedules with setup
times included", Naval Research Logistics Quarterly 1, 1954): the last arrival is the largest, over all chunks k, of
computing up to chunk k plus copying from chunk k on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def chunk_arrivals(compute_s: Sequence[float], copy_s: Sequence[float], overlap: bool) -> list[float]:
    """When each chunk's blocks have arrived, in seconds from the start.

    Chunks are computed one after another without a pause, and copied in the same order, one at a time.

    Args:
        compute_s: seconds to compute each chunk
        copy_s: seconds to copy each chunk's blocks, as many
        overlap: a chunk may be copied as soon as it is computed; else all must be computed first
    """
    computed = list(accumulate(compute_s))
    arrivals, link_free = [], 0.0
    for ready, seconds in zip(computed, copy_s, strict=True):
        link_free = max(link_free, ready if overlap else computed[-1]) + seconds
        arrivals.append(link_free)
    return arrivals
