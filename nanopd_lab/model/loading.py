"""From what a user asks for ("smollm2", a folder, a GGUF file, a hub id, "random:qwen3-8b") to a model."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanopd_lab.cache import cache_dir
from nanopd_lab.model.cached_folder import cached_folder
from nanopd_lab.model.checkpoint import empty_model, fill_from_checkpoint
from nanopd_lab.model.embedded import EMBEDDED_NAME, embedded_model
from nanopd_lab.model.gguf_file import convert_gguf
from nanopd_lab.model.shapes import SHAPES, random_model, shape_config
from nanopd_lab.model.support import (
    ModelUnavailableError,
    UnknownModelError,
    check_dtype,
    check_supported,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelGeometry:
    """The numbers of a model that memory, cost and kernels depend on."""

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    num_parameters: int
    weight_bytes: int

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that the K and V of one token take in all layers, at `itemsize` bytes a number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run: eval mode, on its device, without gradients."""

    spec: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None where the model has none (always so for `random:...`): prompts are then token ids."""
    path: Path | None
    """The local folder in Hugging Face's layout; None for `random:...`."""
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    geometry: ModelGeometry


def load_model(
    spec: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    progress: bool = True,
    attn_implementation: str = "nanopd_lab",
) -> LoadedModel:
    """Load the model that `spec` names.

    `spec` is "smollm2" (the embedded model), a local folder in Hugging Face's layout, a GGUF file, a hub id
    "org/name" (where there is a network, or the hub's cache has it), or "random:<shape>" with weights drawn
    from `seed`. `attn_implementation` is a name known to `transformers.AttentionInterface`.

    Raises (all are `ValueError`s): `UnknownModelError`, `ModelUnavailableError`, `UnsupportedModelError`
    before weights are read, `CorruptCheckpointError`, and `ValueError` for a dtype that `device` lacks.
    """
    check_dtype(dtype, device)
    if spec.startswith("random:"):
        config = shape_config(spec.removeprefix("random:"))
        model = random_model(
            config, seed=seed, dtype=dtype, device=device, attn_implementation=attn_implementation
        )
        return _loaded(spec, model, None, None)
    path = resolve_folder(spec, progress=progress)
    config = read_config(path, spec)
    model = empty_model(config, dtype=dtype, device=device, attn_implementation=attn_implementation)
    fill_from_checkpoint(model, path, progress=progress)
    return _loaded(spec, model, load_tokenizer(path), path)


def resolve_folder(spec: str, *, progress: bool = True) -> Path:
    """The local folder in Hugging Face's layout for any `spec` but "random:...", fetched if need be."""
    if spec == EMBEDDED_NAME:
        return embedded_model(progress=progress)
    if not spec.strip():
        raise UnknownModelError(f"unknown model {spec!r}. {_known(spec)}")
    path = Path(spec).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        return _gguf_folder(path.resolve(), progress)
    if spec.endswith(".gguf") or spec.startswith((".", "~")) or path.is_absolute():
        raise UnknownModelError(f"there is no model at {spec}: no such file or folder. {_known(spec)}")
    if _HUB_ID.fullmatch(spec):
        return _hub_folder(spec)
    raise UnknownModelError(f"unknown model {spec!r}. {_known(spec)}")


def read_config(path: Path, spec: str) -> Any:
    """The configuration in folder `path`, refused by name unless this engine implements the model."""
    import transformers

    file = path / "config.json"
    if not file.is_file():
        raise UnknownModelError(
            f"{path} is not a model folder: it has no config.json. Save one there with "
            f"save_pretrained. {_known(spec)}"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnknownModelError(f"{file} is not valid JSON ({error}); fetch the model again") from error
    check_supported(raw, spec)
    config = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    # Once more with the defaults filled in: old files leave out what the architecture implies.
    check_supported(config.to_dict(), spec)
    return config


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in folder `path`, or None if there is none."""
    import transformers

    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)


def geometry_of(model: Any) -> ModelGeometry:
    """The geometry of a Hugging Face model of a supported architecture."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = list(model.parameters())  # tied weights count once
    return ModelGeometry(
        architecture=type(model).__name__,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.nbytes for p in parameters),
    )


def _loaded(spec: str, model: Any, tokenizer: Any, path: Path | None) -> LoadedModel:
    import transformers

    if path is not None and (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(path))
    stops: set[int] = set()
    for source in (model.config, model.generation_config):
        ids = getattr(source, "eos_token_id", None)
        stops.update([ids] if isinstance(ids, int) else ids or ())
    weight = next(model.parameters())
    return LoadedModel(
        spec, model, tokenizer, path, frozenset(stops), weight.device, weight.dtype, geometry_of(model)
    )


def _gguf_folder(file: Path, progress: bool) -> Path:
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise UnknownModelError(
            f"{file} is a file, but not a GGUF file (it begins with {magic!r}). A model is a GGUF file or "
            "a folder with config.json and safetensors files"
        )
    stat = file.stat()
    identity = f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0{1}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = cache_dir("models") / f"gguf-{re.sub(r'[^A-Za-z0-9.-]', '_', file.stem)[:60]}-{key}"
    return cached_folder(
        folder, lambda scratch: convert_gguf(file, scratch, name=file.name, progress=progress)
    )


def _hub_folder(spec: str) -> Path:
    """A hub model's local snapshot: the configuration first, so that what we refuse is not downloaded."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        config = huggingface_hub.hf_hub_download(spec, "config.json")
        check_supported(json.loads(Path(config).read_text(encoding="utf-8")), spec)
        return Path(huggingface_hub.snapshot_download(spec, allow_patterns=list(_HUB_FILES)))
    except errors.GatedRepoError as error:
        raise ModelUnavailableError(
            f"{spec} is gated: accept its terms on its hub page, run `hf auth login`, and try again"
        ) from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise _offline(spec) from error
        raise UnknownModelError(
            f"the hub has no model {spec!r} with a config.json. {_known(spec)}"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise _offline(spec) from error


def _offline(spec: str) -> ModelUnavailableError:
    folder = spec.split("/")[1]
    return ModelUnavailableError(
        f"{spec} looks like a hub id, and the hub cannot be reached (and its cache has no copy). Where "
        f"there is a network, run\n    hf download {spec} --local-dir {folder}\nand pass that folder here; "
        f"or use {EMBEDDED_NAME!r}, which needs no hub"
    )


def _known(spec: str) -> str:
    names = [EMBEDDED_NAME, *(f"random:{shape}" for shape in SHAPES)]
    close = difflib.get_close_matches(spec, [*names, *SHAPES], n=2, cutoff=0.6)
    close = [f"random:{name}" if name in SHAPES else name for name in close]
    hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return (
        f"{hint}Named models are {', '.join(names)}; a local folder, a GGUF file or a hub id (org/name) "
        "also do"
    )
