"""The demo from the command line: files, report and exit status; interrupted and broken runs keep what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nanopd_lab.bench.load import Progress
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.bench.steps_pace import Pace
from nanopd_lab.cli import main
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cost.files import CostModel
from nanopd_lab.demo.cli import demo_config
from nanopd_lab.demo.measure import Workers, measure
from nanopd_lab.demo.outcome import Outcome
from nanopd_lab.demo.session import DemoConfig, run_demo
from nanopd_lab.router import Slo
from nanopd_lab.viz.serving_explorer import slo_explorer
from tests.demo.test_plan import cost_model, make

CONFIG = ClusterConfig(
    "random:tiny", workers=2, launcher="inline", devices=("cpu", "cpu"),
    engine={"max_num_batched_tokens": 64, "kv_cache_memory_bytes": 1 << 22, "enable_prefix_caching": False},
)  # fmt: skip


class Page(HTMLParser):
    """Ids, and everything that a browser would have to fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.asked: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag not in ("script", "link", "iframe")
        if "id" in values:
            self.ids.append(str(values["id"]))
        self.asked += [str(values[n]) for n in ("src", "href", "xlink:href") if n in values]
        if tag not in ("meta", "br", "img", "path", "use", "image", "rect", "clippath"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def demo(folder: Path, report_to: Any = None, policies: tuple[str, ...] = ("collocated", "1p1d")) -> Outcome:
    folder.mkdir(exist_ok=True)
    cost_model().save(folder / "given.json")
    config = DemoConfig(
        CONFIG, make, folder, cost_model=str(folder / "given.json"), rate=12.0, num_prompts=12, policies=policies,
        slo=Slo(0.4, 0.05), progress=False, simulated=30,
    )  # fmt: skip
    return run_demo(config, lambda line: None, report_to)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("demo") / "out"
    outcome = demo(found)
    assert not outcome.partial
    return found


def test_everything_is_written(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"report.html", "demo.json", "cost-model.json", "figures", "measured-collocated.json"} <= names
    assert {"measured-1p1d.json", "simulated-1p1d.json", "simulated-collocated.json"} <= names
    summary = json.loads((folder / "demo.json").read_text())
    assert summary["partial"] is False
    assert [row["policy"] for row in summary["measured"]] == ["collocated", "1p1d"]
    for row in summary["measured"]:
        result = json.loads((folder / f"measured-{row['policy']}.json").read_text())
        assert row["attainment"][0] == pytest.approx(result["pd"]["slo"]["attainment"])
        assert result["completed"] == row["completed"] == 12
        assert result["pd"]["pace"] == summary["paces"][row["policy"]]
        assert min(result["pd"]["pace"].values()) > 0
    assert len(list((folder / "figures").glob("*.png"))) >= 11


def test_the_cost_model_is_corrected_in_service_before_anything_is_measured(folder: Path) -> None:
    given, kept = (CostModel.load(folder / f"{name}.json") for name in ("given", "cost-model"))
    found = kept.fit["in_service"]
    assert found["policies"] == ["collocated", "1p1d"]
    assert found["num_prompts"] == 4, "few, and other ones"
    assert kept.iteration == Pace(found["reading"], found["computing"]).of(given.iteration)
    summary = json.loads((folder / "demo.json").read_text())
    assert summary["cost_model"] == json.loads((folder / "cost-model.json").read_text())


def test_all_strategies_get_the_same_requests_and_the_same_workers(folder: Path) -> None:
    first, second = (
        RequestTable.of(json.loads((folder / f"measured-{name}.json").read_text()))
        for name in ("collocated", "1p1d")
    )
    assert (first.scheduled == second.scheduled).all()
    assert (first.prompt_tokens == second.prompt_tokens).all()
    assert first.workers == second.workers == 2
    assert all("->" not in route or route.split("->")[0] == route.split("->")[1] for route in first.routes)


def test_the_page_stands_alone_and_says_where_numbers_are_from(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.open == []
    assert all(each.startswith(("#", "data:image/png;base64,")) for each in page.asked)
    targets = {each[1:] for each in page.asked if each.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)\)", text)
    )
    assert targets <= set(page.ids)
    assert not re.findall(r"https?://(?!www\.w3\.org)", text)
    assert "prefers-color-scheme: dark" in text
    for words in (
        "measured here",
        "modelled",
        "collocated",
        "disaggregated 1P1D",
        "95 % interval",
        "seed 3",
        "±10 %",
    ):
        assert words in text, words
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL).replace("nanopd", "")


def test_sliders_take_what_the_demo_has_written(folder: Path) -> None:
    tables = [RequestTable.of(json.loads(path.read_text())) for path in folder.glob("measured-*.json")]
    explorer = slo_explorer(tables)
    assert explorer.error.value == ""


@contextmanager
def stop_at_second(policy: str) -> Iterator[Any]:
    def told(progress: Progress) -> None:
        if policy == "1p1d" and progress.completed >= 3:
            raise KeyboardInterrupt

    yield told


def test_an_interrupt_keeps_what_was_measured_and_says_partial(tmp_path: Path) -> None:
    outcome = demo(tmp_path / "out", stop_at_second, ("collocated", "1p1d", "least-loaded"))
    assert outcome.partial
    assert outcome.problem == "interrupted"
    assert [result["partial"] for result in outcome.measured] == [False, True]
    half = json.loads((tmp_path / "out" / "measured-1p1d.json").read_text())
    counts = half["pd"]["requests"]
    assert counts["completed"] >= 3
    assert sum(counts[name] for name in ("completed", "failed", "refused", "unfinished", "unsent")) == 12
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Partial" in text
    assert "least-loaded: not measured" in text
    assert "disaggregated 1P1D: partly measured" in text
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["partial"] is True


def test_an_interrupt_before_anything_was_measured_leaves_no_report(tmp_path: Path) -> None:
    @contextmanager
    def at_once(policy: str) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "out", at_once)
    assert not (tmp_path / "out" / "report.html").exists()


def test_the_same_workers_serve_all_and_a_broken_cluster_is_started_again() -> None:
    with Workers(CONFIG) as workers:
        first = workers.under("collocated")
        assert workers.under("1p1d") is first
        assert workers.starts == 1
        first.submit([1, 2, 3])  # and nobody waits for it
        assert workers.under("collocated") is not first
        assert workers.starts == 2


def test_a_run_whose_steps_nobody_tells_is_kept(tmp_path: Path) -> None:
    """A worker that does not answer in time is left out of `Cluster.steps`; here none records any."""
    with Workers(CONFIG) as workers:
        chosen = {"collocated": lambda: "collocated"}
        (result,) = measure(workers, chosen, cost_model(), make(12.0, 4), Slo(0.4, 0.05), tmp_path)
    assert result["completed"] == 4
    assert "pace" not in result["pd"]
    assert (tmp_path / "measured-collocated.json").exists()


def test_from_the_command_line_with_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--dataset-name", "random", "--random-input-len", "30", "--random-output-len", "6"]
    where = [
        "--model",
        "random:tiny",
        "--device",
        "cpu",
        "--workers",
        "2",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(["demo", *where, *sizes, "--duration", "2", "--request-rate", "6", "--disable-tqdm"]) == 0
    out = capsys.readouterr().out
    for words in (
        "Timing steps",
        "what steps take in service",
        "objectives: TTFT",
        "12 requests for each",
        "Serving: collocated",
        "Report: ",
    ):
        assert words in out
    assert "profile" in json.loads((tmp_path / "out" / "cost-model.json").read_text())["source"]
    summary = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert summary["profiled"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "1"], "disaggregation needs two"),
        (["--workers", "4096"], "lower --workers"),
        (["--duration", "0", "--workers", "2", "--share-devices"], "duration is 0"),
        (["--cost-model", "x.json", "--workers", "2", "--share-devices"], "--skip-profile"),
        (["--policies", "9p9d", "--workers", "2", "--share-devices", "--skip-profile"], "needs 9 + 9"),
        (
            ["--skip-profile", "--model", "random:qwen3-0.6b", "--workers", "2", "--share-devices"],
            "no cost model",
        ),
        (["--dataset-name", "azure", "--workers", "2", "--share-devices"], "--dataset-path"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [] if "--model" in arguments else ["--model", "random:tiny"]
    if "--policies" in arguments:
        cost_model().save(tmp_path / "cost-model.json")
    assert main(["demo", *where, "--device", "cpu", "--output-dir", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_defaults_take_every_core_and_never_more() -> None:
    import os

    from nanopd_lab.cli import build_parser

    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        pytest.skip("one core: the demo needs two")
    config = demo_config(build_parser().parse_args(["demo", "--device", "cpu"]))
    workers, threads = config.cluster.workers, config.cluster.worker_threads()
    assert workers * threads <= cores
    assert config.profile is not None
    assert config.profile.processes * config.profile.threads <= cores
