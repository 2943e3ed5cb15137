"""Devices and fitted models by name: the files in `data/hardware`.

A device file holds figures of a GPU, each with its source: what the vendor says, and what was measured where somebody
did. A model file (`CostModel`) holds the coefficients of one model on one device.

    load_hardware("h100").prior(dims)         # an iteration model that needs no profile
    load_model("a100-opt-13b-distserve")      # a published fit
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopd_lab.cost import files
from nanopd_lab.cost.files import CostModel, check_schema, read_json
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.roofline import ModelDims
from nanopd_lab.resources import data_dir

SCHEMA = "nanopd-lab/hardware/1"


@dataclass(frozen=True)
class Figure:
    """A number with its source; `measured` or what the vendor (or who is named) says."""

    value: float
    source: str
    measured: bool = False


@dataclass(frozen=True)
class Hardware:
    """One GPU. `bandwidth`, `peak` and `link` are the measured figures where there are any.

    bandwidth: bytes a second, read from its memory
    peak:      FLOPs a second of dense bf16 matrix products
    link:      bytes a second to another GPU, one way
    memory:    bytes
    launch:    seconds of host time for a step launched operator by operator, Qwen3-8B's; None: not measured
    """

    name: str
    device: str
    bandwidth: Figure
    peak: Figure
    link: Figure
    memory: Figure
    launch: Figure | None = None

    def launch_overhead_s(self, cuda_graphs: bool) -> float:
        """Host time of a step. With CUDA graphs the host runs ahead of the device, and none is left.

        Raises:
            ValueError: none was measured for this device without graphs.
        """
        if cuda_graphs:
            return 0.0
        if self.launch is None:
            raise ValueError(
                f"{self.name}: nobody measured its launch overhead without CUDA graphs; take graphs, or profile it"
            )
        return self.launch.value

    def prior(self, dims: ModelDims, cuda_graphs: bool = True) -> IterationModel:
        """The roofline as an iteration model.

        Raises:
            ValueError: see `launch_overhead_s`.
        """
        return IterationModel.from_roofline(
            dims, self.bandwidth.value, self.peak.value, self.launch_overhead_s(cuda_graphs)
        )


def hardware_names() -> list[str]:
    """Devices that `load_hardware` knows."""
    return _names(SCHEMA)


def model_names() -> list[str]:
    """Fitted models that `load_model` knows."""
    return _names(files.SCHEMA)


def load_hardware(name: str) -> Hardware:
    """A device by name, or from a file (a path that ends in .json).

    Raises:
        ValueError: an unknown name (the known ones are listed), or a file that cannot be used.
    """
    path = _find(name, hardware_names(), "hardware")
    record = read_json(path)
    check_schema(record, SCHEMA, path.name, "write it anew after one in data/hardware")
    try:
        launch = record.get("launch_overhead_s")
        return Hardware(
            path.stem,
            str(record["device"]),
            _figure(record["memory_bandwidth_bytes_per_s"]),
            _figure(record["bf16_dense_flops_per_s"]),
            _figure(record["link_bytes_per_s"]),
            _figure(record["memory_bytes"]),
            None if launch is None else _figure(launch),
        )
    except KeyError as error:
        raise ValueError(f"{path.name}: {error.args[0]!r} is missing") from None


def load_model(name: str) -> CostModel:
    """A fitted model by name, or from a file (a path that ends in .json).

    Raises:
        ValueError: an unknown name (the known ones are listed), or a file that cannot be used.
    """
    return CostModel.load(_find(name, model_names(), "cost model"))


def _folder() -> Path:
    return data_dir() / "hardware"


def _names(schema: str) -> list[str]:
    # By family: a file of another version must be found, so that its version can be named.
    family = schema.rsplit("/", 1)[0] + "/"
    return [
        p.stem for p in sorted(_folder().glob("*.json")) if str(read_json(p).get("schema")).startswith(family)
    ]


def _find(name: str, known: list[str], what: str) -> Path:
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name}; {what} files by name: {', '.join(known)}")
        return Path(name)
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(known)}, or name a .json file")
    return _folder() / f"{name}.json"


def _figure(entry: dict[str, Any]) -> Figure:
    """The measured figure of an entry, else the vendor's."""
    for kind in ("measured", "datasheet"):
        if kind in entry:
            value = entry[kind]["value"]
            if not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"a figure is {value!r}; it must be a positive number")
            return Figure(float(value), str(entry[kind]["source"]), kind == "measured")
    raise ValueError(f"a figure needs a 'measured' or a 'datasheet' entry, got {sorted(entry)}")
