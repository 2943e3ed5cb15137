"""Folders in the user's cache that are complete or absent, whatever is interrupted and whoever else runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import filelock

MANIFEST = "nanopd_lab_manifest.json"


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(scratch)` unless it is there and whole; a damaged one is built again.

    Processes that ask at once wait for the first. What an interrupted build leaves is swept up by the next.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
        if is_whole(folder):
            return folder
        prefix = f".{folder.name}.partial-"
        for leftover in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(folder)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            build(scratch)
            _write_manifest(scratch)
            scratch.replace(folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file is as it was written.

    Size and modification time settle it cheaply; where only the time differs (a copied cache), the content is
    hashed once and the manifest renewed.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        renew = False
        for name, entry in entries.items():
            stat = (folder / name).stat()
            if stat.st_size != entry["size"]:
                return False
            if stat.st_mtime_ns != entry["mtime_ns"]:
                if file_sha256(folder / name) != entry["sha256"]:
                    return False
                renew = True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    if renew and os.access(folder, os.W_OK):
        _write_manifest(folder)
    return bool(entries)


def _write_manifest(folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): {
            "size": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "sha256": file_sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and MANIFEST not in path.name
    }
    handle, name = tempfile.mkstemp(prefix=f".{MANIFEST}.", dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump({"files": files}, stream, indent=1)
    Path(name).replace(folder / MANIFEST)
