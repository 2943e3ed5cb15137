"""The demo from beginning to end. Ctrl-C at any point after the first requests still ends with a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nanopd_lab.bench.in_service import corrected
from nanopd_lab.bench.parity import warm_up
from nanopd_lab.bench.steps_pace import shows_pace
from nanopd_lab.bench.workload import Workload
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cost.files import CostModel
from nanopd_lab.cost.hardware import load_model, model_names
from nanopd_lab.cost.measure import ProfileJob, measure_cost_model
from nanopd_lab.cost.roofline import ChunkShape
from nanopd_lab.demo.figures import measured_figures, model_figures, regret_figure, save_figures
from nanopd_lab.demo.measure import Progress, Workers, measure, write_json
from nanopd_lab.demo.outcome import Outcome
from nanopd_lab.demo.plan import (
    IN_TIME,
    TPOT_FACTOR,
    TTFT_FACTOR,
    Machine,
    MakeWorkload,
    Unloaded,
    best_split,
    telling_rate,
)
from nanopd_lab.demo.predict import REQUESTS, curve, pays_map, predicted
from nanopd_lab.demo.report import report
from nanopd_lab.demo.strategies import cluster_policy, default_policies
from nanopd_lab.demo.verdict import headline, sentence, unsteady
from nanopd_lab.router import Policy, Slo
from nanopd_lab.sim import SimConfig
from nanopd_lab.viz.serving import words
from nanopd_lab.viz.strategies import disaggregates, look_of

REPORT, SUMMARY, COST_MODEL = "report.html", "demo.json", "cost-model.json"
SAMPLE = 400  # requests whose average lengths are taken
SERVICE_LOAD = 0.75  # of the rate to be measured, at which the cost model is corrected
SERVICE_SHARE, SERVICE_LEAST = 0.2, 4  # requests for that, of those measured; at least
SERVICE_SEED = 1 << 20  # of their tokens; no workload's
Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoConfig:
    """What is asked for; None: derived.

    cluster:     workers, model and engine; its policy is not looked at
    make:        a workload of a rate and a number of requests
    profile:     what to profile; None: take `cost_model`, or the one in `folder` from an earlier run, or a recorded one
    num_prompts: instead of as many as come in `duration_s`
    simulated:   requests of each simulation of other rates and lengths

    Raises:
        ValueError: no workers to split, or a duration or rate that is not positive.
    """

    cluster: ClusterConfig
    make: MakeWorkload
    folder: Path
    profile: ProfileJob | None = None
    cost_model: str | None = None
    duration_s: float = 60.0
    rate: float | None = None
    num_prompts: int | None = None
    policies: Sequence[str] = ()
    slo: Slo = field(default_factory=Slo)
    progress: bool = True
    simulated: int = REQUESTS

    def __post_init__(self) -> None:
        if self.cluster.workers < 2:
            raise ValueError(f"{self.cluster.workers} worker: disaggregation needs two; raise --workers")
        if not self.duration_s > 0:
            raise ValueError(f"duration is {self.duration_s} s; it must be positive")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"request rate is {self.rate}; it must be positive and finite")


def run_demo(
    config: DemoConfig,
    say: Say = print,
    report_to: Progress | None = None,
    first_act: Callable[[Any], None] | None = None,
) -> Outcome:
    """Profile, measure, simulate, draw; writes everything into `config.folder`.

    Args:
        say: is told what happens
        report_to: see `measure`
        first_act: is given the cluster before it serves anything else

    Raises:
        KeyboardInterrupt: before anything was measured.
        ValueError, RuntimeError: likewise; what goes wrong later is in the outcome.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("measured-*.json", "simulated-*.json", REPORT, SUMMARY):
        for old in config.folder.glob(pattern):
            old.unlink()  # none of an earlier run must be taken for one of this
    cost = _cost_model(config, say)
    first = plan(config, _machine(config, cost))
    for policy in first.policies:  # a wrong one is refused before anything starts
        replace(config.cluster, policy=_chosen(config, first, policy))
    say(f"Starting {first.workers} workers")
    with Workers(replace(config.cluster, trace=shows_pace(cost))) as workers:
        if first_act is not None:
            first_act(workers.under("collocated"))
        outcome = first
        if shows_pace(cost):
            cost = _in_service(config, first, workers, say)
            outcome = plan(config, _machine(config, cost))
        for note in outcome.notes:
            say(f"  {note}")
        count = _count(config, outcome.rate)
        workload = config.make(outcome.rate, count)
        say(f"{count} requests for each of {', '.join(look_of(p).label for p in outcome.policies)}")
        try:
            _serve(config, outcome, workers, workload, say, report_to)
        except (KeyboardInterrupt, RuntimeError, ValueError) as error:
            if not outcome.measured:
                raise
            outcome.problem = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    if not outcome.measured:
        raise RuntimeError("nothing was measured")
    say("Simulating the same requests, and others")
    try:
        _simulate(config, _machine(config, cost), outcome, workload)
    except KeyboardInterrupt:  # perhaps the second: what was measured is reported all the same
        outcome.problem = outcome.problem or "interrupted"
    except Exception as error:  # likewise
        outcome.problem = outcome.problem or f"the simulation failed: {type(error).__name__}: {error}"
    write_report(outcome, config.folder)
    say(headline(outcome.comparisons()))
    for comparison in outcome.comparisons():
        say(f"  {sentence(comparison)}")
    if doubt := unsteady(outcome.paces()):
        say(f"  {doubt}")
    return outcome


def plan(config: DemoConfig, machine: Machine) -> Outcome:
    """Rate, objectives and strategies, derived where they are not given."""
    notes = []
    sample = config.make(config.rate or 1.0, SAMPLE)
    unloaded = Unloaded.of(machine, sample)
    slo = config.slo
    if not slo.given:
        slo = unloaded.objectives()
        notes.append(
            f"objectives: {words(slo)}. An idle worker would take {1e3 * unloaded.ttft_s:,.0f} and "
            f"{1e3 * unloaded.tpot_s:,.0f} ms for the average request ({unloaded.prompt_tokens} + "
            f"{unloaded.output_tokens} tokens, modelled); promised are {TTFT_FACTOR:g} and {TPOT_FACTOR:g} times that"
        )
    rate = config.rate
    half = config.cluster.workers // 2
    known = [each for each in config.policies if each == "collocated" or disaggregates(each)]
    tried = known or ["collocated", f"{half}p{config.cluster.workers - half}d"]
    if rate is None:
        rate = telling_rate(machine, tried, config.make, slo)
        names = " and ".join(look_of(each).label for each in tried)
        notes.append(
            f"request rate: {rate:g} a second, at which the best of {names} "
            f"would serve {IN_TIME:.0%} of the requests in time (modelled): enough load for the choice to matter"
        )
    policies = tuple(config.policies)
    if not policies:
        split = best_split(machine, config.make, rate, slo)
        policies = default_policies(split)
        if config.cluster.workers > 2:
            notes.append(
                f"{look_of(split).label}: of all splits the one with most requests in time (modelled)"
            )
    return Outcome(
        config.cluster.model, config.cluster.workers, policies, machine.cost, slo, rate, unloaded, notes,
        config.profile is not None,
    )  # fmt: skip


def write_report(outcome: Outcome, folder: Path) -> None:
    """`report.html`, `demo.json`, `figures/` and the simulated requests."""
    measured, modelled = list(measured_figures(outcome)), [*model_figures(outcome), *regret_figure()]
    (folder / REPORT).write_text(report(outcome, measured, modelled), encoding="utf-8")
    write_json(folder / SUMMARY, outcome.as_json())
    for result in outcome.simulated:
        write_json(folder / f"simulated-{result['pd']['policy']}.json", result)
    save_figures([*measured, *modelled], folder / "figures")


def _cost_model(config: DemoConfig, say: Say) -> CostModel:
    kept = config.folder / COST_MODEL
    if config.profile is not None:
        job = config.profile
        say(f"Timing steps of {job.model} on {job.device}, {job.processes} at once")
        cost = measure_cost_model(job, config.folder, config.progress)
    else:
        recorded = f"cpu-{config.cluster.model}-fp32"
        name = config.cost_model or (str(kept) if kept.exists() else recorded)
        if name == recorded and recorded not in model_names():
            raise ValueError(
                f"no cost model of {config.cluster.model} is recorded; leave --skip-profile out, or name one of "
                f"{', '.join(model_names())} or a file with --cost-model"
            )
        say(f"Cost model {name}, from an earlier day")
        cost = load_model(name)
        if name != str(kept):
            cost.save(kept)
    if "block_bytes" not in cost.fit:
        raise ValueError(
            f"the cost model of {cost.model} does not say how large a KV block is; fit one from a profile"
        )
    model, held = cost.iteration, cost.fit["errors"]["held_out"]
    say(
        f"  {cost.model} on {cost.device}: a decode step of 1 takes {1e3 * model.decode_seconds(1, 128):.1f} ms, of 8 "
        f"{1e3 * model.decode_seconds(8, 8 * 128):.1f} ms, a prompt of 128 tokens "
        f"{1e3 * model.seconds([ChunkShape(128)]):.0f} ms; {held['mean']:.0%} off on steps it has not seen"
    )
    return cost


def _machine(config: DemoConfig, cost: CostModel) -> Machine:
    engine = config.cluster.engine_config("cpu")
    memory = engine.kv_cache_memory_bytes
    blocks = memory // int(cost.fit["block_bytes"]) if memory else SimConfig().num_blocks * 4
    settings = SimConfig(
        num_blocks=blocks,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
    )
    return Machine.of(cost, config.cluster.workers, settings)


def _count(config: DemoConfig, rate: float) -> int:
    return config.num_prompts or max(2, round(rate * config.duration_s))


def _chosen(config: DemoConfig, outcome: Outcome, policy: str) -> str | Policy:
    tokens = config.cluster.engine_config("cpu").max_num_batched_tokens
    return cluster_policy(policy, outcome.workers, outcome.cost, outcome.slo, tokens)


def _in_service(config: DemoConfig, first: Outcome, workers: Workers, say: Say) -> CostModel:
    """The cost model, corrected by a few requests at a rate below the one that it would have chosen; kept."""
    rate = SERVICE_LOAD * first.rate
    count = max(SERVICE_LEAST, round(SERVICE_SHARE * _count(config, rate)))
    statics = [each for each in first.policies if each == "collocated" or disaggregates(each)][:2]
    tried = statics or ["collocated"]
    say(
        f"Serving {count} requests at {rate:.2g} a second {', then '.join(look_of(p).label for p in tried)}: what "
        "steps take in service"
    )
    requests = config.make(rate, count).requests
    cluster = workers.under("collocated")
    warm_up(cluster, first.workers)
    cost = corrected(first.cost, cluster, tried, requests, SERVICE_SEED)
    cost.save(config.folder / COST_MODEL)
    found = cost.fit["in_service"]
    say(
        f"  beside the cost model what reads took {found['reading']:.2f} times as long, what computes "
        f"{found['computing']:.2f} times; corrected by that"
    )
    return cost


def _serve(
    config: DemoConfig,
    outcome: Outcome,
    workers: Workers,
    workload: Workload,
    say: Say,
    report_to: Progress | None,
) -> None:
    policies = {policy: partial(_chosen, config, outcome, policy) for policy in outcome.policies}
    for result in measure(workers, policies, outcome.cost, workload, outcome.slo, config.folder, report_to):
        outcome.measured.append(result)
        share = result["pd"]["slo"]["attainment"]
        say(
            f"  {look_of(result['pd']['policy']).label}: {result['completed']} of {result['num_prompts']} requests "
            f"in {result['duration']:.1f} s" + ("" if share is None else f", {share:.0%} in time")
            + (f"; PARTIAL: {result['pd']['interrupted']}" if result["partial"] else "")
        )  # fmt: skip
        if result["partial"]:
            outcome.problem = result["pd"]["interrupted"]


def _simulate(config: DemoConfig, machine: Machine, outcome: Outcome, workload: Workload) -> None:
    for policy in outcome.policies:
        outcome.simulated.append(predicted(machine, policy, workload, outcome.slo))
    outcome.curve += curve(
        machine, outcome.policies, config.make, outcome.rate, outcome.slo, config.simulated
    )
    split = next((policy for policy in outcome.policies if disaggregates(policy)), None)
    if split is not None:
        outcome.pays = pays_map(machine, split, config.make, outcome.rate, outcome.slo, config.simulated)
