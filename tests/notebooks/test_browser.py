"""A notebook in a real JupyterLab in a real browser: it runs clean, and its sliders move its figures.

Needs Debian's `chromium` (and `fonts-dejavu-core`). Without it the tests are skipped, in CI (CI=true) they
fail. Screenshots in the light and the dark theme stay in `.screenshots/`, to be looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.notebooks.test_hygiene import NOTEBOOKS, read

if os.environ.get("CI") == "true":
    import playwright.sync_api as sync_api
else:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the dev extra")

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / ".screenshots"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run", "--force-color-profile=srgb"]
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "apputils-extension/sessionDialogs": {"skipKernelRestartDialog": True},
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
WAIT_MS = 240_000
READY = """path => { const p = window.jupyterapp?.shell.currentWidget;
    return p?.context?.path === path && p.sessionContext?.session?.kernel?.status === 'idle' }"""
COCKPIT = (
    "from nanopd_lab import Cluster, ClusterConfig",
    "from nanopd_lab.router import Slo",
    "from nanopd_lab.viz.cluster_cockpit import ClusterCockpit",
    "",
    'engine = {"kv_cache_memory_bytes": 1 << 20}',
    'config = ClusterConfig("random:tiny", policy="1p1d", launcher="inline", devices=("cpu",) * 2, engine=engine)',
    "cluster = Cluster(config)",
    'cockpit = ClusterCockpit(cluster, Slo(1.0, 0.5), rate=8.0, policies=("collocated",), window_s=2.0)',
    "cockpit",
)
ASK = (
    "cluster.check_integrity()",
    'print("whole", cockpit.phase.value, cockpit.load.rate, cockpit.load.error)',
    "if cockpit.watch.value:",
    "    display(cockpit.replay())",
)
RUN_CELL = "() => window.jupyterapp.commands.execute('notebook:run-cell')"
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:restart-run-all')"
THEME = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
BYTES = "async i => [...new Uint8Array(await (await fetch(i.src)).arrayBuffer())]"


@pytest.fixture(scope="module")
def chromium() -> str:
    if not CHROMIUM:
        reason = "no Chromium on this machine: apt-get install chromium fonts-dejavu-core"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return CHROMIUM


@pytest.fixture(scope="module")
def server(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(address, token) of a JupyterLab with settings of its own, on copies of the notebooks."""
    tmp = tmp_path_factory.mktemp("jupyter")
    root = tmp / "root"
    root.mkdir()
    for notebook in NOTEBOOKS:
        shutil.copy(notebook, root)
    (root / "cockpit.ipynb").write_text(notebook_of(COCKPIT, ASK))
    for name, value in SETTINGS.items():
        path = tmp / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    token = secrets.token_hex(16)
    environment = {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(tmp / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(tmp / "config"),
        "JUPYTER_DATA_DIR": str(tmp / "data"),
        "JUPYTER_RUNTIME_DIR": str(tmp / "run"),
        "IPYTHONDIR": str(tmp / "ipython"),
        "JUPYTER_TOKEN": token,
        "PYTHONPATH": str(ROOT),
        "NANOPD_LAB_FOLDER": str(tmp / "kept"),
        # The browser wants a core too; waiting threads of torch would starve it.
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MPLBACKEND", None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}"]
    command += ["--LabApp.extension_manager=readonly", "--expose-app-in-browser"]
    if hasattr(os, "getuid") and os.getuid() == 0:
        command.append("--allow-root")
    address, log = f"http://127.0.0.1:{port}", tmp / "jupyter.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, cwd=root, stdout=out, stderr=out)
    try:
        _wait_for(address, process, log)
        yield address, token
    finally:
        process.terminate()  # its kernels end with it
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def notebook_of(*cells: tuple[str, ...]) -> str:
    """A file with these code cells."""
    each = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    found = [{**each, "id": f"cell-{n}", "source": "\n".join(cell)} for n, cell in enumerate(cells)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"cells": found, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address + "/api", timeout=2).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail("JupyterLab did not start:\n" + log.read_text())


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def page(request: pytest.FixtureRequest, server: tuple[str, str], browser: Any) -> Iterator[Any]:
    """The notebook, opened and run from top to bottom."""
    path: Path = request.param
    address, token = server
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{address}/doc/tree/{path.name}?reset&token={token}")
    page.wait_for_function(READY, arg=path.name)
    assert page.evaluate(RUN_ALL) is True  # resolves when every cell has run
    page.notebook = path
    yield page
    page.close()


def pixels(image: Any) -> str:
    """Hash of the PNG behind a blob URL: of the picture itself, not of the page."""
    image.evaluate("i => i.decode()")
    return hashlib.sha256(bytes(image.evaluate(BYTES))).hexdigest()


def test_runs_clean(page: Any) -> None:
    cells = [cell for cell in read(page.notebook)["cells"] if cell["cell_type"] == "code"]
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").all_inner_texts()
    assert prompts == [f"[{number}]:" for number in range(1, len(cells) + 1)]
    assert page.locator('.jp-OutputArea [data-mime-type="application/vnd.jupyter.error"]').count() == 0
    complaints = page.locator('.jp-OutputArea [data-mime-type="application/vnd.jupyter.stderr"]')
    # Progress bars are written to stderr too, when loading is slow.
    assert [text for text in complaints.all_inner_texts() if "%|" not in text] == []


def test_a_slider_changes_the_picture(page: Any) -> None:
    explorer = page.locator(".widget-vbox:has(> .widget-image)").first
    handle = explorer.locator(".widget-slider .noUi-handle").first
    image = explorer.locator(".widget-image").first
    seen = [pixels(image)]
    for key in ("ArrowRight", "ArrowRight", "End", "Home"):
        source = image.get_attribute("src")
        handle.focus()
        page.keyboard.press(key)
        sync_api.expect(image).not_to_have_attribute("src", source, timeout=WAIT_MS)  # a new blob URL
        seen.append(pixels(image))
    assert len(set(seen)) == 5, seen
    assert page.locator(".plot-error").first.inner_text().strip() == ""


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_it_looks_the_same_in_both_themes(page: Any, theme: str) -> None:
    page.evaluate(THEME, f"JupyterLab {theme}")
    page.wait_for_function("f => document.body.dataset.jpThemeLight === f", arg=str(theme == "Light").lower())
    page.wait_for_function("document.fonts.status === 'loaded'")
    SCREENSHOTS.mkdir(exist_ok=True)
    image = page.locator(".widget-image").first
    image.scroll_into_view_if_needed()
    assert image.bounding_box()["width"] >= 600
    # The whole notebook: a window as tall as it is.
    panel = page.locator(".jp-WindowedPanel-outer").first
    height = panel.evaluate("e => e.scrollHeight")
    page.set_viewport_size({"width": 1200, "height": min(height + 200, 16_000)})
    panel.evaluate("e => e.scrollTo(0, 0)")
    file = SCREENSHOTS / f"{page.notebook.stem}-{theme.lower()}.png"
    page.screenshot(path=file, animations="disabled")
    page.set_viewport_size({"width": 1200, "height": 1000})
    assert file.stat().st_size > 50_000


def test_a_cockpit_is_started_steered_stopped_and_replayed(server: tuple[str, str], browser: Any) -> None:
    address, token = server
    page = browser.new_page(viewport={"width": 1200, "height": 1100})
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{address}/doc/tree/cockpit.ipynb?reset&token={token}")
    page.wait_for_function(READY, arg="cockpit.ipynb")
    assert page.evaluate(RUN_ALL) is True
    start, stop = (page.locator(".widget-button", has_text=name) for name in ("Start", "Stop"))
    shown = page.locator(".cockpit-page")
    sync_api.expect(stop).to_be_disabled()
    start.click()
    sync_api.expect(shown).to_contain_text("ended, by route: w0→w1", timeout=WAIT_MS)
    sync_api.expect(start).to_be_disabled()
    text = shown.inner_text()
    page.wait_for_function("text => document.querySelector('.cockpit-page').innerText !== text", arg=text)
    handle = page.locator(".widget-slider .noUi-handle").first
    handle.focus()
    page.keyboard.press("End")
    sync_api.expect(handle).to_have_attribute("aria-valuenow", "32.0")
    line = shown.locator("polyline").first.get_attribute("points")
    sync_api.expect(shown.locator("polyline").first).not_to_have_attribute("points", line, timeout=WAIT_MS)
    SCREENSHOTS.mkdir(exist_ok=True)
    for theme in ("Light", "Dark"):
        page.evaluate(THEME, f"JupyterLab {theme}")
        page.wait_for_function(
            "f => document.body.dataset.jpThemeLight === f", arg=str(theme == "Light").lower()
        )
        page.screenshot(path=SCREENSHOTS / f"cockpit-{theme.lower()}.png", animations="disabled")
    stop.click()
    sync_api.expect(start).to_be_enabled(timeout=WAIT_MS)
    sync_api.expect(shown).to_contain_text(" 0 running ")
    page.locator(".jp-Notebook .jp-CodeCell").last.locator(".cm-content").click()
    assert page.evaluate(RUN_CELL) is True
    sync_api.expect(page.locator(".jp-OutputArea").last).to_contain_text(
        "whole idle 32.0 None", timeout=WAIT_MS
    )
    image = page.locator(".widget-image").first
    source, handle = image.get_attribute("src"), page.locator(".widget-slider .noUi-handle").last
    handle.focus()
    page.keyboard.press("Home")
    sync_api.expect(image).not_to_have_attribute("src", source, timeout=WAIT_MS)
    assert {each.strip() for each in page.locator(".plot-error").all_inner_texts()} == {""}
    assert page.locator('.jp-OutputArea [data-mime-type="application/vnd.jupyter.error"]').count() == 0
    image.scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / "cockpit-replay.png", animations="disabled")
    page.close()
