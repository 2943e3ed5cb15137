"""Models without weights, and filling them from safetensors files with little memory.

Hugging Face's loader maps the files into memory: converting fp32 files to bf16 then peaks at three times
the weights. Here every weight is allocated once, in its final type and place, and filled through one small
buffer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nanopd_lab.model.support import CorruptCheckpointError, ModelUnavailableError

_BUFFER_BYTES = 4 * 2**20
_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a safetensors file."""

    file: Path
    offset: int  # from the beginning of the file
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def copy_to(self, target: torch.Tensor, buffer: torch.Tensor) -> None:
        """Fill `target` (contiguous, any float type, any device) through `buffer` (uint8, on the CPU)."""
        flat = target.view(-1)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            if flat.device.type == "cpu" and flat.dtype == self.dtype:
                self._read_exactly(stream, _bytes_of(flat))  # nothing to convert: no detour
                return
            step = buffer.numel() // self.dtype.itemsize
            for begin in range(0, flat.numel(), step):
                part = buffer[: min(step, flat.numel() - begin) * self.dtype.itemsize]
                self._read_exactly(stream, _bytes_of(part))
                flat[begin : begin + step].copy_(part.view(self.dtype))

    def _read_exactly(self, stream: Any, view: memoryview) -> None:
        while view:  # one read returns at most 2 GiB, and less near a signal
            got = stream.readinto(view)
            if not got:
                raise CorruptCheckpointError(
                    f"{self.file} ends in the middle of a tensor; fetch or copy the file again"
                )
            view = view[got:]


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]


def index_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor in the safetensors file(s) of `folder`; reads only the headers."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    else:
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        reason = f" It has {pickled[0]}, which is a pickle and is never read." if pickled else ""
        raise ModelUnavailableError(
            f"{folder} has no model.safetensors (nor model.safetensors.index.json).{reason} Save the model "
            "with save_pretrained (transformers 4.35 and later write safetensors) and load that folder"
        )
    return {name: tensor for file in files for name, tensor in _read_header(file)}


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    if not file.is_file():
        raise CorruptCheckpointError(f"{file} is missing, though the index names it; fetch the model again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise CorruptCheckpointError(f"{file} is not a safetensors file or is cut short; fetch it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CorruptCheckpointError(
                f"{file} has a damaged safetensors header; fetch it again"
            ) from error
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES:
            continue
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise CorruptCheckpointError(
                f"{file} is cut short: {name} ends at byte {8 + length + end}, the file at {size}; "
                "fetch it again"
            )
        yield (
            name,
            StoredTensor(
                file, 8 + length + begin, end - begin, tuple(entry["shape"]), _DTYPES[entry["dtype"]]
            ),
        )


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Write float32 tensors one after the other, holding one at a time.

    `shapes` names all of them in the order in which `tensors` yields them.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        num_bytes = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for expected, (name, array) in zip(shapes, tensors, strict=True):
            assert (name, array.shape, array.dtype) == (expected, shapes[name], np.float32)
            stream.write(np.ascontiguousarray(array).data)


def empty_model(config: Any, *, dtype: torch.dtype, device: torch.device, attn_implementation: str) -> Any:
    """The model of `config` in eval mode with every weight allocated on `device`, *not* initialised."""
    import transformers

    with torch.device("meta"), _quiet():
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
        )
    placed: dict[int, nn.Parameter] = {}  # keeps tied weights tied
    for module in model.modules():
        for name, meta in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(meta) not in placed:
                data = torch.empty(meta.shape, dtype=dtype, device=device)
                placed[id(meta)] = nn.Parameter(data, requires_grad=False)
            setattr(module, name, placed[id(meta)])
    # Rotary frequencies are buffers computed from the configuration: build those modules anew, in earnest.
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, type(module)(model.config).to(device))
    model.tie_weights()
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"not materialised: {left}"
    return model.eval()


def fill_from_checkpoint(model: Any, folder: Path, *, progress: bool) -> None:
    """Copy the weights of `folder` into `model`, which `empty_model` made.

    Raises `CorruptCheckpointError` naming what is missing, foreign or of another shape, before reading.
    """
    stored = index_checkpoint(folder)
    wanted = dict(model.named_parameters())  # a tied weight appears once, under its first name
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - wanted.keys()
    missing = sorted(wanted.keys() - stored.keys())
    # Old checkpoints carry the rotary frequencies, which are computed.
    foreign = sorted(n for n in stored.keys() - wanted.keys() - tied if not n.endswith("rotary_emb.inv_freq"))
    reshaped = sorted(
        f"{name} {tuple(stored[name].shape)} instead of {tuple(p.shape)}"
        for name, p in wanted.items()
        if name in stored and stored[name].shape != tuple(p.shape)
    )
    for what, names in (("lacks", missing), ("has foreign", foreign), ("has misshapen", reshaped)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CorruptCheckpointError(
                f"the checkpoint in {folder} {what} weights: {', '.join(names[:3])}{more}; its config.json "
                "and its weights do not belong together, or a file is incomplete: fetch the model again"
            )
    buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8)
    total = sum(stored[name].num_bytes for name in wanted)
    with (
        torch.no_grad(),
        tqdm(
            total=total, unit="B", unit_scale=True, desc="Loading weights", delay=5, disable=not progress
        ) as bar,
    ):
        for name, parameter in wanted.items():
            stored[name].copy_to(parameter, buffer)
            bar.update(stored[name].num_bytes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold transformers' advice back: ours names the fix in this package's terms."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
