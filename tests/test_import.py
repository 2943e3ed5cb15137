"""Importing the package is cheap and needs nothing optional."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nanopd_lab


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_nothing_heavy_before_first_use() -> None:
    heavy = ("torch", "transformers", "numpy", "scipy", "matplotlib", "ipywidgets", "cuda", "ray")
    out = run(f"import sys, nanopd_lab; print([m for m in {heavy!r} if m in sys.modules])")
    assert out.strip() == "[]"


def test_core_kv_and_scheduler_need_no_torch() -> None:
    out = run(
        "import sys, nanopd_lab.core, nanopd_lab.kv, nanopd_lab.engine.scheduler;"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert out.strip() == "False False"


def test_works_without_the_optional_packages() -> None:
    """With ipywidgets, matplotlib, cuda-core and ray made impossible to import."""
    out = run(
        "import sys\n"
        "for name in ('ipywidgets', 'matplotlib', 'cuda', 'cuda.core', 'ray', 'jupyterlab'):\n"
        "    sys.modules[name] = None\n"
        "from nanopd_lab import LLM, SamplingParams\n"
        "llm = LLM('random:tiny', device='cpu')\n"
        "print(len(llm.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))"
    )
    assert out.strip() == "3"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        nanopd_lab.nothing  # noqa: B018
    assert "LLM" in dir(nanopd_lab)
