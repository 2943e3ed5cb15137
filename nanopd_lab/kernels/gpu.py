"""Compile with NVRTC through cuda-core, keep the cubin on disk, launch on torch's current stream.

cuda-core is imported when a kernel is first compiled. The launch itself goes to the driver's cuLaunchKernel
through
ctypes: a few microseconds of host time, and any torch stream or CUDA-graph capture takes part.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from nanopd_lab.kernels.arguments import MAX_SHARED_BYTES, Uninitialised, flat_launch_shape
from nanopd_lab.kernels.cache import cache_dir, key_of, write_atomically
from nanopd_lab.kernels.emulator import includes
from nanopd_lab.kernels.errors import CompilerMissingError, KernelArgumentError, KernelCompileError
from nanopd_lab.kernels.launches import DeviceLimits, Launch
from nanopd_lab.kernels.report import RunResult
from nanopd_lab.resources import cuda_dir

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")  # a: with the instructions that only Hopper has
OPTIONS = ("c++17", "lineinfo")


def _cuda_core() -> Any:
    try:
        import cuda.core as core

        if not hasattr(core, "Program"):  # before cuda-core 1.0
            import cuda.core.experimental as core
    except ImportError as error:
        raise CompilerMissingError(
            "compiling for a GPU needs cuda-core and NVRTC: pip install 'nanopd-lab[gpu]' "
            f"(cuda-core[cu13] or [cu12], to match torch {torch.version.cuda}); {error}"
        ) from error
    return core


@functools.lru_cache(maxsize=1)
def can_compile() -> bool:
    """True if cuda-core is installed."""
    return find_spec("cuda") is not None and find_spec("cuda.core") is not None


@functools.lru_cache(maxsize=1)
def _compiler_key() -> str:
    core = _cuda_core()
    from cuda.bindings import nvrtc

    return f"cuda-core {core.__version__} nvrtc {nvrtc.nvrtcVersion()[1:]}"


def compile_cubin(
    source: str, architecture: str, defines: Mapping[str, object] | None = None, name: str = "kernel.cu"
) -> bytes:
    """Machine code of `source` for e.g. "sm_90"; from the disk cache when it is there. Needs no GPU.

    Raises KernelCompileError with NVRTC's log and the line; CompilerMissingError without cuda-core.
    """
    core = _cuda_core()
    macros = [(key, str(value)) for key, value in sorted((defines or {}).items())]
    key = key_of([source, includes(source), architecture, str(macros), *OPTIONS, _compiler_key()])
    path = cache_dir() / f"{key}.cubin"
    if path.exists():
        return path.read_bytes()
    options = core.ProgramOptions(
        name=name,
        arch=architecture,
        std="c++17",
        lineinfo=True,
        include_path=str(cuda_dir()),
        define_macro=macros or None,
    )
    try:
        code = bytes(core.Program(source, "c++", options).compile("cubin").code)
    except Exception as error:
        if "compilation log" in str(error) or "NVRTC" in str(error):
            raise KernelCompileError(name, source, str(error)) from error
        raise
    write_atomically(path, code)
    return code


def architecture_of(device: torch.device | None = None) -> str:
    """ "sm_90a" for an H100 or H200."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + "a" * ((major, minor) == (9, 0))


@functools.lru_cache(maxsize=16)
def limits_of(index: int) -> DeviceLimits:
    """What launches must know of GPU `index`."""
    p = torch.cuda.get_device_properties(index)
    per_block = int(getattr(p, "shared_memory_per_block_optin", MAX_SHARED_BYTES))
    per_sm = int(getattr(p, "shared_memory_per_multiprocessor", per_block + 1024))
    return DeviceLimits(p.multi_processor_count, per_block, per_sm)


def limits_on(device: torch.device) -> DeviceLimits:
    """As `limits_of`, of a tensor's device."""
    return limits_of(torch.cuda.current_device() if device.index is None else device.index)


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel on a device. `owner` keeps its module alive."""

    handle: int
    name: str
    owner: Any
    registers: int
    local_bytes: int


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return library


@functools.lru_cache(maxsize=1024)
def _load(
    source: str, kernel: str, defines: tuple[tuple[str, str], ...], name: str, index: int, shared_bytes: int
) -> LoadedKernel:
    core = _cuda_core()
    from cuda.bindings import driver

    device = core.Device(index)
    device.set_current()
    code = compile_cubin(source, architecture_of(torch.device("cuda", index)), dict(defines), name)
    module = core.ObjectCode.from_cubin(code)
    function = module.get_kernel(kernel)
    # More than the default must be asked for: 48 KB, together with what the kernel itself declares.
    if shared_bytes > 40 * 1024:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(attribute, shared_bytes, function.handle, index)
        if int(error):
            raise KernelArgumentError(
                f"{name}: the device doesn't grant {shared_bytes} bytes of shared memory"
            )
    attributes = function.attributes
    try:
        registers, local = attributes.num_regs, attributes.local_size_bytes
        registers, local = (registers(index), local(index)) if callable(registers) else (registers, local)
    except Exception:  # informative only, and the API has moved between versions
        registers, local = -1, -1
    return LoadedKernel(int(function.handle), kernel, (module, function), registers, local)


def load(launch: Launch, index: int) -> LoadedKernel:
    """The kernel of `launch` on GPU `index`, compiled and loaded once a process."""
    return _load_launch(
        launch.file,
        launch.kernel,
        tuple((k, str(v)) for k, v in launch.defines.items()),
        index,
        launch.shared_bytes,
    )


@functools.lru_cache(maxsize=1024)
def _load_launch(
    file: str, kernel: str, defines: tuple[tuple[str, str], ...], index: int, shared_bytes: int
) -> LoadedKernel:
    return _load((cuda_dir() / file).read_text(), kernel, tuple(sorted(defines)), file, index, shared_bytes)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: which one, and a union of 64 bytes that holds its value."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed
_OVERLAP = (_Attribute * 1)(_Attribute(id=6, pad=0, value=(ctypes.c_int * 16)(1)))


class PreparedLaunch:
    """A launch that can be repeated: what the driver reads is laid out once, and the arguments may change in between.

    args: ctypes values, one a parameter; `enqueue` takes their values of that moment
    """

    def __init__(
        self,
        kernel: LoadedKernel,
        block: Sequence[int],
        shared_bytes: int,
        args: Sequence[Any],
        stream: int,
        overlaps: bool = False,
    ) -> None:
        self._kernel, self._args = kernel, args  # kept: only their addresses are in `_pointers`
        self._pointers = (ctypes.c_void_p * max(1, len(args)))(*(ctypes.addressof(arg) for arg in args))
        self._config = _Config(0, 0, 0, *block, shared_bytes, stream, _OVERLAP, int(overlaps))

    def enqueue(self, grid: Sequence[int]) -> None:
        """Launch. The stream's device must be the current one. Raises RuntimeError when the driver refuses."""
        config = self._config
        config.grid_x, config.grid_y, config.grid_z = grid
        error = _driver().cuLaunchKernelEx(ctypes.byref(config), self._kernel.handle, self._pointers, None)
        if error:
            block = (config.block_x, config.block_y, config.block_z)
            raise RuntimeError(
                f"launch of {self._kernel.name} failed: CUDA error {error} (grid {tuple(grid)}, block {block}, "
                f"{config.shared_bytes} bytes of shared memory)"
            )


def launch_raw(
    kernel: LoadedKernel,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    args: Sequence[Any],
    stream: int,
    overlaps: bool = False,
) -> None:
    """Enqueue once. args: ctypes values, one a parameter. Raises RuntimeError when the driver refuses."""
    PreparedLaunch(kernel, block, shared_bytes, args, stream, overlaps).enqueue(grid)


def pack(values: Sequence[torch.Tensor | int | float | ctypes._SimpleCData[Any] | None]) -> list[Any]:
    """ctypes values of kernel arguments: tensors and None become pointers, ints 32-bit, floats fp32."""
    packed: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            packed.append(ctypes.c_void_p(value.data_ptr()))
        elif value is None:
            packed.append(ctypes.c_void_p(0))
        elif isinstance(value, float):
            packed.append(ctypes.c_float(value))
        elif isinstance(value, int):
            packed.append(ctypes.c_int(value))
        else:
            packed.append(value)
    return packed


def execute(launch: Launch, args: Sequence[Any], device: torch.device) -> None:
    """Launch on torch's current stream of `device`. Reads no device memory: safe inside a CUDA graph."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    stream = torch.cuda.current_stream(index).cuda_stream
    overlaps = launch.overlaps and _can_overlap(index)
    block = (launch.threads, 1, 1)
    launch_raw(load(launch, index), launch.grid, block, launch.shared_bytes, pack(args), stream, overlaps)


@functools.lru_cache(maxsize=16)
def _can_overlap(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


_SCALARS: dict[str, dict[int, Any]] = {
    "p": {8: ctypes.c_void_p}, "f": {4: ctypes.c_float, 8: ctypes.c_double},
    "i": {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int, 8: ctypes.c_longlong},
}  # fmt: skip


def _parameter_sizes(function: Any, count: int) -> list[int]:
    sizes = [int(info.size) for info in function.arguments_info]
    if len(sizes) != count:
        raise KernelArgumentError(f"the kernel takes {len(sizes)} arguments, {count} were given")
    return sizes


def run(
    source: str,
    kernel: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Any],
    shared_bytes: int,
    defines: Mapping[str, object] | None,
    name: str,
) -> RunResult:
    """One launch of a kernel given as text, for `nanopd_lab.kernels.run`: copies arrays over and back."""
    if not torch.cuda.is_available():
        raise KernelArgumentError("device='cuda' needs a GPU that torch sees; use device='emulator'")
    grid3, block3 = flat_launch_shape(grid, block, shared_bytes)
    index = torch.cuda.current_device()
    torch.zeros(1, device="cuda")  # creates the context
    if 'extern "C"' not in source:
        source = source.replace("__global__", 'extern "C" __global__')
    macros = tuple(sorted((k, str(v)) for k, v in (defines or {}).items()))
    loaded = _load(source, kernel, macros, name, index, shared_bytes)
    sizes = _parameter_sizes(loaded.owner[1], len(args))
    values: list[Any] = []
    arrays: list[tuple[Any, torch.Tensor, Any]] = []
    copies: dict[int, torch.Tensor] = {}
    for arg, size in zip(args, sizes, strict=True):
        if isinstance(arg, Uninitialised):
            arg = np.zeros(arg.shape, arg.dtype)
        if isinstance(arg, np.ndarray | torch.Tensor):
            host = torch.from_numpy(arg) if isinstance(arg, np.ndarray) else arg
            storage = host.untyped_storage()
            if storage.data_ptr() not in copies:
                flat = torch.empty(0, dtype=torch.uint8, device=host.device).set_(storage)
                copies[storage.data_ptr()] = flat.cuda()
            device_copy = copies[storage.data_ptr()]
            values.append(
                ctypes.c_void_p(int(device_copy.data_ptr() + host.storage_offset() * host.element_size()))
            )
            arrays.append((arg, host, device_copy))
        else:
            values.append(_SCALARS["f" if isinstance(arg, float) else "i"][size](arg))
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    launch_raw(loaded, grid3, block3, shared_bytes, values, torch.cuda.current_stream().cuda_stream)
    ended.record()
    deadline = time.monotonic() + 60
    while not ended.query():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{name}: the kernel still runs after 60 s; does a loop or a barrier never end?"
            )
        time.sleep(1e-4)
    for _, host, device_copy in arrays:
        torch.empty(0, dtype=torch.uint8, device=host.device).set_(host.untyped_storage()).copy_(device_copy)
    return RunResult(
        tuple(arg for arg, _, _ in arrays), torch.cuda.get_device_name(index), begun.elapsed_time(ended)
    )
