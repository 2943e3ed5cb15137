"""What every worker on a CPU imports sooner or later, imported once for all: see `starting`."""

from __future__ import annotations

import contextlib
from importlib import import_module

for _module in (
    "nanopd_lab.cluster.build",
    "nanopd_lab.transfer.registry",
    "nanopd_lab.transfer.shm",
    "transformers.models.llama.modeling_llama",
):
    # What is wrong shows again in the worker, which can say so.
    with contextlib.suppress(Exception):
        import_module(_module)
