"""What an engine can be told, checked before anything is loaded or allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanopd_lab.engine.block_manager import BlockManager
from nanopd_lab.engine.policies import ChunkPolicy, VictimPolicy, choose_victim, plan_chunks
from nanopd_lab.kv.allocator import Allocator, BlockAllocator
from nanopd_lab.settings import check_fields

if TYPE_CHECKING:
    import torch

    from nanopd_lab.attention.base import AttentionBackend

COMPILATIONS = ("off", "default", "tuned")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineParts:
    """The exchangeable parts of an engine; each default is the package's own.

    allocator:     called with (num_blocks, enable_prefix_caching), returns an `Allocator`
    block_manager: called with (allocator, block_size), returns a `BlockManager`
    attention:     an `AttentionBackend`, or None to choose by name and device
    chunk_policy:  how a step's tokens are divided among prompts
    victim_policy: which sequence is preempted when blocks run out
    """

    allocator: Callable[[int, bool], Allocator] = BlockAllocator
    block_manager: Callable[[Allocator, int], BlockManager] = BlockManager
    attention: AttentionBackend | None = None
    chunk_policy: ChunkPolicy = plan_chunks
    victim_policy: VictimPolicy = choose_victim


@dataclass(frozen=True)
class EngineConfig:
    """All settings of one engine. Names follow vLLM's engine arguments where it has them.

    model:                   "smollm2", a folder, a GGUF file, a hub id, or "random:<shape>"
    dtype:                   of weights and KV: "float32", "bfloat16", "float16" (GPU), "auto"
    block_size:              tokens a KV block
    max_num_batched_tokens:  tokens a step may hold; longer prompts are prefilled in chunks
    max_num_seqs:            sequences that may run at once
    max_model_len:           longest prompt + output; None: what model and pool allow
    kv_cache_memory_bytes:   size of the KV pool; None: 1 GiB on a CPU; on a GPU what `gpu_memory_utilization`
                             leaves beside weights and a step, measured
    gpu_memory_utilization:  share of the GPU's memory that weights, a step and the pool may take together
    enable_prefix_caching:   re-use the KV of prompts that start alike
    seed:                    of random weights and of requests that bring no seed
    device:                  "auto", "cpu", "cuda", "cuda:1"
    attention_backend:       "auto", "reference", "online", "torch", "cpu", "cuda"
    optimise:                swap modules for faster ones with the same meaning (`model.inference`)
    compilation:             "off", "default", "tuned" (`model.compilation`)
    cuda_graphs:             on a GPU with the CUDA kernels, capture steps as graphs (`model.graphs`)
    cuda_graph_sizes:        numbers of sequences to capture decode steps for; None: up to max_num_seqs
    async_scheduling:        plan the next step while one runs; None: on a GPU

    Raises:
        ValueError: a setting is of another type, or out of range.
    """

    model: str
    dtype: str = "float32"
    block_size: int = 16
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_model_len: int | None = None
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    seed: int = 0
    device: str = "auto"
    attention_backend: str = "auto"
    optimise: bool = True
    gpu_memory_utilization: float = 0.9
    compilation: str = "off"
    cuda_graphs: bool = True
    cuda_graph_sizes: tuple[int, ...] | None = None
    async_scheduling: bool | None = None
    parts: EngineParts = field(default_factory=EngineParts)

    def __post_init__(self) -> None:
        # torch.float32 and torch.device("cpu") have names as well.
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        object.__setattr__(self, "device", str(self.device))
        check_fields(self)
        if not isinstance(self.parts, EngineParts):
            raise ValueError(f"parts is {self.parts!r}; give EngineParts(...)")
        for name in (
            "block_size",
            "max_num_batched_tokens",
            "max_num_seqs",
            "max_model_len",
            "kv_cache_memory_bytes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}; it must be an integer that fits in 64 bits")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.compilation not in COMPILATIONS:
            raise ValueError(f"compilation is {self.compilation!r}; choose one of {', '.join(COMPILATIONS)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must lie in (0, 1]"
            )
        if self.cuda_graph_sizes is not None and not all(size >= 1 for size in self.cuda_graph_sizes):
            raise ValueError(f"cuda_graph_sizes is {self.cuda_graph_sizes}; sizes are at least 1")
        if not self.model:
            raise ValueError('model is empty; name one, for example "smollm2"')

    def resolve_device(self) -> torch.device:
        """The device meant by `device`.

        Raises:
            ValueError: the device does not exist here.
        """
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device is {self.device!r}; use auto, cpu, cuda or cuda:<number>") from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; use auto, cpu, cuda or cuda:<number>")
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ValueError(
                f"device is {self.device!r}, but this machine has {count} CUDA device(s); use device='cpu'"
            )
        return device

    def resolve_dtype(self, device: torch.device) -> torch.dtype:
        """The type meant by `dtype`: "auto" is bfloat16 on a GPU and float32 on a CPU."""
        import torch

        name = self.dtype
        if name == "auto":
            name = "bfloat16" if device.type == "cuda" else "float32"
        if name == "float16" and device.type == "cpu":
            raise ValueError(
                "dtype is 'float16' on a CPU, where it is slow and inexact; use 'float32' or 'bfloat16'"
            )
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
