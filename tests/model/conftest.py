"""Models for these tests: the embedded one, and toy ones written to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanopd_lab.model.loading import LoadedModel, load_model

CPU = torch.device("cpu")


def load(spec: str, dtype: torch.dtype = torch.float32, **options: object) -> LoadedModel:
    """`load_model` with Hugging Face's own attention: these tests are about weights, not pages."""
    options.setdefault("progress", False)
    return load_model(spec, dtype=dtype, device=CPU, attn_implementation="sdpa", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    return load("smollm2")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    root = tmp_path / "cache"
    monkeypatch.setenv("NANOPD_LAB_CACHE", str(root))
    return root


@pytest.fixture
def save_shape(tmp_path: Path) -> Callable[..., Path]:
    """Write `random:<shape>` as Hugging Face would, with extra fields of config.json."""

    def save(shape: str, **config_fields: object) -> Path:
        import json

        folder = tmp_path / shape
        load(f"random:{shape}", seed=5).model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config.update(config_fields)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return save
