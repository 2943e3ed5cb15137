"""The page of a demo: the answer first, then what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from nanopd_lab.bench.bootstrap import Bounds
from nanopd_lab.demo.outcome import Outcome
from nanopd_lab.demo.page import Shown, facts, items, page, shown, table, verdict
from nanopd_lab.demo.predict import PaysMap
from nanopd_lab.demo.verdict import Row, headline, reasons, sentence, unsteady
from nanopd_lab.provenance import provenance
from nanopd_lab.viz.serving import words
from nanopd_lab.viz.strategies import look_of

TERMS = (
    ("Prefill and decode", "A model reads a whole prompt at once (prefill: much arithmetic, then the first token), and "
     "then writes one token after another (decode: each step reads all weights and the KV cache)."),
    ("Collocated", "Every worker does both. A prompt that comes in makes those wait who are being answered."),
    ("Disaggregated, xPyD", "x workers only prefill and y only decode; a request's KV cache moves from one to the "
     "other. Nothing gets in between two tokens, but fewer workers are there for each of the two."),
    ("Adaptive", "Chooses for every request whether it stays or moves, by what it expects of times and queues."),
    ("TTFT, TPOT, E2EL", "Time to first token, time per output token after it, time to the last one. Counted from when "
     "a request was to be sent."),
    ("In time, goodput", "A request is in time if it meets all objectives. Goodput is how many of those are served a "
     "second, here per worker: every strategy has the same workers."),
)  # fmt: skip
HEAD = (
    "strategy",
    "in time",
    "goodput per worker",
    "TTFT p50",
    "TTFT p90",
    "TPOT p50",
    "TPOT p90",
    "output tokens/s",
)


def report(outcome: Outcome, measured: Sequence[Shown], modelled: Sequence[Shown]) -> str:
    """The HTML file."""
    body = [
        "<h1>When does disaggregation pay?</h1>",
        f'<p class="lead">{escape(_lead(outcome))}</p>',
        *_partial(outcome),
        *_unsteady(outcome),
        _answer(outcome),
        "<h2>Strategies on the same workers</h2>",
        "<p>Measured here. Each strategy served the same requests at the same times, one strategy after another. Below "
        "each figure: its 95 % interval, from blocks of requests drawn again; it covers the chance of these requests, "
        "not what the machine does on another day.</p>",
        _strategies(outcome.rows(), "measured"),
    ]
    if why := reasons(outcome.tables(), outcome.slo):
        body += ["<h3>What was gained and what it cost</h3>", items(why)]
    body += ["<h2>What was measured</h2>", *map(shown, measured)] if measured else []
    body += [
        "<h2>What the model says</h2>",
        f"<p>{escape(_model_words(outcome))}</p>",
        _strategies(outcome.rows(simulated=True), "simulated"),
        *map(shown, modelled),
        "<h2>What was run, and on what</h2>",
        facts(_facts(outcome)),
        "<h2>Words</h2>",
        "<dl>" + "".join(f"<dt>{escape(t)}</dt><dd>{escape(d)}</dd>" for t, d in TERMS) + "</dl>",
        "<h2>Again, and further</h2>",
        _further(),
    ]
    return page("nanopd_lab: when does disaggregation pay?", body)


def _lead(outcome: Outcome) -> str:
    return (
        f"{outcome.model} on {outcome.workers} workers ({outcome.cost.device}), {outcome.rate:g} requests a second, "
        f"promised {words(outcome.slo)}."
    )


def _partial(outcome: Outcome) -> list[str]:
    if not outcome.partial:
        return []
    done = {row.policy: row for row in outcome.rows()}
    lines = []
    for policy in outcome.policies:
        row = done.get(policy)
        state = "not measured" if row is None else "partly measured" if row.partial else "measured"
        lines.append(f"{look_of(policy).label}: {state}")
    why = (
        f"The run ended before its time: {outcome.problem}."
        if outcome.problem
        else "Not all of it was measured."
    )
    return [verdict("Partial", [why, "What was measured is kept. " + "; ".join(lines) + "."], warning=True)]


def _unsteady(outcome: Outcome) -> list[str]:
    text = unsteady(outcome.paces())
    return [verdict("Judge with care", [text], warning=True)] if text else []


def _answer(outcome: Outcome) -> str:
    comparisons = outcome.comparisons()
    lines = [sentence(each) for each in comparisons]
    if modelled := outcome.rows(simulated=True):
        shares = "; ".join(f"{look_of(row.policy).label} {_share(row)}" for row in modelled)
        lines.append(f"The simulator says of the same requests: {shares} in time (modelled).")
    if outcome.pays is not None:
        lines += where(outcome.pays)
    return verdict(headline(comparisons), lines)


def where(pays: PaysMap, margin: float = 0.05) -> list[str]:
    """The map in words: where disaggregation gains or loses more than the margin."""
    gains: list[str] = []
    losses: list[str] = []
    for variant, row in zip(pays.variants, pays.gain, strict=True):
        for lines, sign in ((gains, 1), (losses, -1)):
            if rates := [rate for rate, gain in zip(pays.rates, row, strict=True) if sign * gain > margin]:
                lines.append(f"{variant} at {_span(rates)} requests/s")
    found = []
    for lines, what in ((gains, "pay"), (losses, "cost")):
        text = "; ".join(lines) if lines else "nowhere that was tried"
        found.append(f"By the model (modelled, more than {100 * margin:.0f} points) it would {what}: {text}.")
    return found


def _span(rates: Sequence[float]) -> str:
    return f"{rates[0]:.2g}" if len(rates) == 1 else f"{rates[0]:.2g}–{rates[-1]:.2g}"


def _strategies(rows: Sequence[Row], source: str) -> str:
    if not rows:
        return f"<p>No strategy was {source}.</p>"
    lines = []
    for row in rows:
        look = look_of(row.policy)
        state = f"{row.completed} of {row.requests} completed" + (", partial" if row.partial else "")
        lines.append([
            f'<span class="dot" style="background: {look.colour}"></span>{escape(look.label)}<small>{state}</small>',
            _cell(row.attainment, 100, "%", 0), _cell(row.goodput, 1, "/s", 2),
            *(_cell(each, 1, " ms", 0) for each in (row.ttft_p50, row.ttft_p90, row.tpot_p50, row.tpot_p90)),
            f"{row.output_throughput:,.0f}",
        ])  # fmt: skip
    return table(HEAD, lines)


def _cell(bounds: Bounds | None, factor: float, unit: str, digits: int) -> str:
    if bounds is None:
        return "–"
    value, low, high = (f"{factor * each:,.{digits}f}" for each in bounds)
    return f"{value}{unit}<small>{low} to {high}</small>"


def _share(row: Row) -> str:
    return "–" if row.attainment is None else f"{row.attainment.value:.0%}"


def _model_words(outcome: Outcome) -> str:
    held = outcome.cost.fit.get("errors", {}).get("held_out")
    error = f" On steps it had not seen it was {held['mean']:.0%} off on average." if held else ""
    origin = (
        "was fitted to steps timed just before the run"
        if outcome.profiled
        else "is a recorded one, not of this run: it may be of another machine or another day"
    )
    return (
        f"The cost model of one step ({outcome.cost.model} on {outcome.cost.device}) {origin}.{error}"
        f"{_served_before(outcome)} The simulator runs the same controller, scheduler and policies under it, in "
        f"virtual time. Everything below but what is marked as measured is modelled.{_paces(outcome)}"
    )


def _served_before(outcome: Outcome) -> str:
    found = outcome.cost.fit.get("in_service")
    if found is None:
        return ""
    tried = " and ".join(look_of(each).label for each in found["policies"])
    return (
        f" It was then corrected by {found['num_prompts']} other requests, served {tried} at a lower rate before "
        f"anything was measured: in service what reads took {found['reading']:.2f} times as long, what computes "
        f"{found['computing']:.2f} times."
    )


def _paces(outcome: Outcome) -> str:
    if not (paces := outcome.paces()):
        return ""
    each = "; ".join(
        f"{look_of(policy).label} {pace.reading:.2f} and {pace.computing:.2f}"
        for policy, pace in paces.items()
    )
    return (
        " What the machine's speed did meanwhile, as what steps took by what this model says of them, those that read "
        f"and those that compute: {each}."
    )


def _facts(outcome: Outcome) -> list[tuple[str, str]]:
    found = provenance()
    machine = found["machine"]
    rows = [
        ("Model", outcome.model),
        ("Workers", f"{outcome.workers}, the same for every strategy"),
        (
            "Machine",
            f"{machine['cpu']}, {machine['cores']} cores; GPUs: {', '.join(machine['gpus']) or 'none'}",
        ),
    ]
    if outcome.measured:
        first: dict[str, Any] = outcome.measured[0]
        pd = first["pd"]
        rows += [
            (
                "Requests",
                f"{first['num_prompts']}, data set {pd['dataset_name']}, seed {pd['seed']}, Poisson arrivals",
            ),
            ("Request rate", f"{outcome.rate:g} a second"),
            ("Engine", ", ".join(f"{name} = {value}" for name, value in pd["engine"].items())),
            ("Launcher, transport", f"{pd['launcher']}, {pd['transport']}"),
        ]
    rows += [("How it was chosen", each) for each in outcome.notes]
    rows += [
        ("When", found["date"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("Commit", found["commit"] or "not a checkout"),
        ("Command", found["command"]),
    ]
    return rows


def _further() -> str:
    return (
        "<p>The same requests again: the command above, with the same seed. Beside this file lie every request's times "
        "(<code>measured-*.json</code>, <code>simulated-*.json</code>), the profile, the cost model, a summary "
        "(<code>demo.json</code>) and the figures. In a notebook, sliders judge the same requests by other "
        "promises:</p>"
        "<pre>import json, pathlib\nfrom nanopd_lab.bench.request_table import RequestTable\n"
        "from nanopd_lab.viz.serving_explorer import slo_explorer\n"
        "slo_explorer([RequestTable.of(json.loads(path.read_text()))\n"
        "              for path in pathlib.Path('nanopd-demo').glob('measured-*.json')])</pre>"
        "<p>Intervals over seeds, more rates and the highest rate that keeps a promise: <code>nanopd-lab sweep</code>."
        "</p>"
    )
