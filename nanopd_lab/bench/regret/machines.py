"""Cost models by name: those that were fitted, and rooflines of Qwen3-8B on the devices of `data/hardware`."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

from nanopd_lab.cost.files import CostModel
from nanopd_lab.cost.hardware import hardware_names, load_hardware, load_model
from nanopd_lab.cost.roofline import ModelDims
from nanopd_lab.cost.transfer_time import TransferModel
from nanopd_lab.model.shape_table import shape_fields

SHAPE, BLOCK_SIZE = "qwen3-8b", 16
MEMORY_SHARE = 0.9  # of a device's, for weights and KV


@lru_cache(maxsize=32)
def machine_cost(name: str) -> CostModel:
    """A fitted model by name or file, or the roofline of a device, with the KV blocks that it has room for.

    Raises:
        ValueError: as of `load_model` and `load_hardware`.
    """
    if name not in hardware_names():
        return load_model(name)
    hardware = load_hardware(name)
    dims = ModelDims.from_config(SimpleNamespace(**shape_fields(SHAPE)), name=SHAPE, weight_itemsize=2)
    block_bytes = BLOCK_SIZE * dims.kv_bytes_per_token
    blocks = int((MEMORY_SHARE * hardware.memory.value - dims.weight_bytes) // block_bytes)
    fit = {"block_bytes": block_bytes, "block_size": BLOCK_SIZE, "ahead": True, "num_blocks": blocks}
    link = TransferModel(bytes_per_s=hardware.link.value)
    return CostModel(SHAPE, hardware.device, hardware.prior(dims), link, fit=fit)
