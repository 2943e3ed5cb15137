"""nanopd_lab: a prefill/decode-disaggregated LLM inference engine, built notebook by notebook.

    from nanopd_lab import LLM, SamplingParams
    llm = LLM("smollm2")
    print(llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].outputs[0].text)

Names are imported on first use: importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanopd_lab.cluster.cluster import Cluster
    from nanopd_lab.cluster.config import ClusterConfig
    from nanopd_lab.cluster.outputs import ClusterOutput
    from nanopd_lab.core import BeamSearchParams, SamplingParams
    from nanopd_lab.engine.config import EngineConfig, EngineParts
    from nanopd_lab.engine.engine import Engine
    from nanopd_lab.engine.llm import LLM
    from nanopd_lab.engine.outputs import CompletionOutput, RequestOutput

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # an application says where messages go

_HOME = {
    "BeamSearchParams": "nanopd_lab.core",
    "Cluster": "nanopd_lab.cluster.cluster",
    "ClusterConfig": "nanopd_lab.cluster.config",
    "ClusterOutput": "nanopd_lab.cluster.outputs",
    "CompletionOutput": "nanopd_lab.engine.outputs",
    "Engine": "nanopd_lab.engine.engine",
    "EngineConfig": "nanopd_lab.engine.config",
    "EngineParts": "nanopd_lab.engine.config",
    "LLM": "nanopd_lab.engine.llm",
    "RequestOutput": "nanopd_lab.engine.outputs",
    "SamplingParams": "nanopd_lab.core",
}

__all__ = [
    "LLM",
    "BeamSearchParams",
    "Cluster",
    "ClusterConfig",
    "ClusterOutput",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "EngineParts",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
