"""Does the built wheel work where nothing else of this project is?

    python -m tests.wheel_check WHEEL EMPTY_FOLDER

Makes an environment holding the wheel and *only* the distributions that it declares, with what those
require (as links into this environment: torch is not copied). A missing dependency, or a file that only the
checkout has, fails here. `tests/test_packaging.py` looks at the imports that this run does not reach.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
    import json, sys
    import nanopd_lab
    heavy = sorted({"torch", "transformers", "ipywidgets", "matplotlib", "cuda"} & sys.modules.keys())
    from nanopd_lab import LLM, SamplingParams
    from nanopd_lab.resources import cuda_dir, data_dir
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    outputs = LLM("random:tiny").generate([[1, 2, 3], list(range(40))], params)
    print(json.dumps({
        "home": nanopd_lab.__file__,
        "heavy": heavy,
        "cuda": str(cuda_dir()),
        "data": str(data_dir()),
        "tokens": [output.outputs[0].token_ids for output in outputs],
    }))
"""


def required(wheel: Path) -> list[metadata.Distribution]:
    """The installed distributions that the wheel's metadata ask for, and theirs, without extras of ours."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    todo = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    wanted = [(requirement, "") for requirement in todo]
    while wanted:
        requirement, extra = wanted.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.setdefault(name, metadata.distribution(name))
        for asked in ("", *requirement.extras):
            if (name, asked) not in seen:
                seen.add((name, asked))
                wanted += [(Requirement(text), asked) for text in found[name].requires or ()]
    return list(found.values())


def link_into(site: Path, distribution: metadata.Distribution) -> None:
    """Link the top-level entries of an installed distribution into `site`."""
    for top in sorted({file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}):
        source = Path(str(distribution.locate_file(top)))
        if source.exists() and not (site / top).exists():
            (site / top).symlink_to(source)


def check_contents(wheel: Path) -> None:
    """Every tracked file of the package, cuda/ and data/ is in the wheel, unchanged."""
    listed = subprocess.run(
        ["git", "ls-files", "nanopd_lab", "cuda", "data"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:  # an unpacked sdist
        tracked = [
            str(path.relative_to(ROOT))
            for folder in ("nanopd_lab", "cuda", "data")
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
    else:
        tracked = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert len(tracked) > 10, tracked
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        for name in tracked:
            folder, _, rest = name.partition("/")
            packed = name if folder == "nanopd_lab" else f"nanopd_lab/_{folder}/{rest}"
            assert packed in inside, f"{name} is not in the wheel"
            assert archive.read(packed) == (ROOT / name).read_bytes(), f"{name} differs in the wheel"
    print(f"{len(tracked)} files of the checkout are in the wheel")


def main(wheel: Path, folder: Path) -> None:
    """Build the environment in `folder` and run the smoke test there."""
    check_contents(wheel)
    environment = folder / "env"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = next((environment / "lib").glob("python3*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    distributions = required(wheel)
    for distribution in distributions:
        link_into(site, distribution)
    print(f"an environment of the wheel and the {len(distributions)} distributions that it needs")

    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environ["OMP_NUM_THREADS"] = "1"

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    report = json.loads(run(str(python), "-c", textwrap.dedent(SMOKE)).splitlines()[-1])
    for key in ("home", "cuda", "data"):
        assert Path(report[key]).is_relative_to(site), f"{key} is {report[key]}, not in the wheel"
    assert report["heavy"] == [], f"import nanopd_lab loads {report['heavy']}"
    assert [len(tokens) for tokens in report["tokens"]] == [5, 5], report
    print(f"generated {report['tokens']} on random:tiny, from the wheel's own files")
    command = environment / "bin" / "nanopd-lab"
    version = metadata.version("nanopd-lab")
    assert run(str(command), "--version").split() == ["nanopd-lab", version]
    info = run(str(command), "info")
    assert version in info, info
    assert metadata.version("torch") in info, info
    print(f"nanopd-lab --version and info answer ({version})")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
