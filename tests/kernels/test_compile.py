"""Every kernel compiles with NVRTC for every architecture; no GPU needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanopd_lab.kernels import CompilerMissingError, KernelCompileError, check, gpu
from nanopd_lab.resources import cuda_dir

try:
    gpu.compile_cubin('extern "C" __global__ void nothing() {}', "sm_90")
    REASON = ""
except CompilerMissingError as error:
    REASON = str(error)
needs_nvrtc = pytest.mark.skipif(bool(REASON), reason=REASON or "NVRTC is here")


@needs_nvrtc
def test_every_kernel_compiles_for_every_architecture() -> None:
    lines = list(check.check_compiles())
    assert [line.what for line in lines] == [f"compile for {a}" for a in gpu.ARCHITECTURES]
    assert all(line.ok for line in lines), [line.detail for line in lines if not line.ok]


def test_every_kernel_file_is_among_them() -> None:
    compiled = {launch.file for _, launch in check.all_launches()}
    assert compiled == {path.name for path in cuda_dir().glob("*.cu")}


@needs_nvrtc
def test_error_holds_the_log_and_the_line() -> None:
    source = 'extern "C" __global__ void broken(float* x) {\n    x[0] = missing;\n}'
    with pytest.raises(KernelCompileError, match=r"at line 2: `x\[0\] = missing;`") as caught:
        gpu.compile_cubin(source, "sm_90", name="broken.cu")
    assert "missing" in caught.value.log


@needs_nvrtc
def test_cache_knows_source_architecture_and_constants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOPD_LAB_CACHE", str(tmp_path))
    source = 'extern "C" __global__ void k(int* x) { *x = VALUE; }'
    first = gpu.compile_cubin(source, "sm_90", {"VALUE": 1})
    (file,) = (tmp_path / "kernels").iterdir()
    assert gpu.compile_cubin(source, "sm_90", {"VALUE": 1}) == first
    assert list((tmp_path / "kernels").iterdir()) == [file]
    gpu.compile_cubin(source, "sm_90", {"VALUE": 2})
    gpu.compile_cubin(source, "sm_80", {"VALUE": 1})
    gpu.compile_cubin(source + "\n", "sm_90", {"VALUE": 1})
    assert len(list((tmp_path / "kernels").iterdir())) == 4


def test_package_imports_without_cuda() -> None:
    """In a fresh interpreter in which cuda cannot be imported."""
    import subprocess
    import sys

    code = "import sys; sys.modules['cuda'] = None; import nanopd_lab.kernels, nanopd_lab.kernels.ops"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_running_on_a_gpu_without_one_says_so() -> None:
    from nanopd_lab.kernels import KernelArgumentError, run

    with pytest.raises(KernelArgumentError, match="use device='emulator'"):
        run("__global__ void k() {}", "k", 1, 1, [], device="cuda")
