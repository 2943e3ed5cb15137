"""A plan for people, as tables and a sentence, and for programs, as a record."""

from __future__ import annotations

import math
from typing import Any

from nanopd_lab.bench.planning import Plan, Simulated
from nanopd_lab.provenance import provenance
from nanopd_lab.router.layouts import Forecast

SCHEMA = "nanopd-lab/plan/1"
SHOWN = 8  # layouts in the table


def forecast_table(plan: Plan) -> str:
    """The layouts by formula, best first."""
    times, workload = plan.planner.times, plan.workload
    question = "highest rate" if plan.rate is None else f"{plan.rate:.4g} requests/s"
    lines = [
        f"modelled: {plan.gpus} GPUs of {plan.machine.name}, {plan.machine.model}; {workload.name}: prompts of "
        f"{times.mean_prompt:.0f}, outputs of {times.mean_gaps + 1:.0f} tokens on average; {plan.slo} ms for "
        f"{plan.share:.0%}; {question}",
        f"{'by formula':12}{'requests/s':>11}{'in time':>9}{'goodput':>9}{'TTFT ms':>9}{'TPOT ms':>9}{'prefill':>9}"
        f"{'batch':>7}  limit",
    ]
    for each in plan.forecasts[:SHOWN]:
        lines.append(
            f"{each.layout!s:12}{each.rate:11.2f}{each.attainment:9.1%}{each.goodput:9.2f}{_ms(each.ttft_s)}"
            f"{_ms(each.tpot_s)}{min(each.prefill_load, 9.99):9.0%}{_number(each.batch)}  {each.limit}"
        )
    if plan.gpus > SHOWN:
        lines.append(f"and {plan.gpus - SHOWN} more layouts, none better")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:9.1f}" if seconds < math.inf else f"{'–':>9}"


def _number(batch: float) -> str:
    return f"{batch:7.0f}" if batch < math.inf else f"{'–':>7}"


def simulated_table(plan: Plan) -> str:
    """What the simulations said, best first."""
    head = f"{'simulated':12}{'requests/s':>11}{'in time':>9}{'goodput':>9}{'TTFT ms':>9}{'TPOT ms':>9}{'a GPU':>9}"
    rows = [
        f"{each.policy:12}{each.rate:11.2f}{each.attainment:9.1%}{each.goodput:9.2f}{each.ttft_ms:9.1f}"
        f"{each.tpot_ms:9.1f}{each.goodput / plan.gpus:9.2f}"
        for each in ranked(plan)
    ]
    return "\n".join([head, *rows])


def simulated_line(found: Simulated) -> str:
    """One of them, as it comes."""
    return f"simulated {found.policy}: {found.rate:.4g} requests/s, {found.attainment:.1%} in time"


def ranked(plan: Plan) -> list[Simulated]:
    """The simulations, best first."""
    found = plan.simulated.values()
    return sorted(
        found,
        key=lambda each: (
            -(each.rate if plan.rate is None else each.attainment),
            -each.attainment,
            each.policy,
        ),
    )


def advice(plan: Plan) -> str:
    """What to take, what it is better than, and what decides."""
    lines = [_choice(plan)]
    best = plan.forecast_of(plan.best)
    if best is not None:
        lines.append(f"It is {_limit(plan, best)}.")
    if (mixed := plan.forecast_of("collocated")) is not None and mixed is not best:
        lines.append(f"Mixed workers: {_limit(plan, mixed)}.")
    elif best is not None and best.layout.mixed:
        other = next((each for each in plan.forecasts if not each.layout.mixed), None)
        if other is not None:
            lines.append(f"The best without mixed workers, {other.layout}: {_limit(plan, other)}.")
    return " ".join(lines)


def _choice(plan: Plan) -> str:
    if plan.rate is not None:
        return _choice_at(plan, plan.rate)
    if plan.simulated:
        first, *rest = [(each.policy, each.rate) for each in ranked(plan)]
    else:
        first, *rest = [(each.layout.policy, each.rate) for each in plan.forecasts]
    if not first[1]:
        return (
            f"No layout: single requests can be served within {plan.slo} ms, but not {plan.share:.0%} of them at any "
            "rate; promise a little more time."
        )
    means = "simulated" if plan.simulated else "by formula"
    tokens = first[1] * (plan.planner.times.mean_gaps + 1) / plan.gpus
    text = (
        f"Take {first[0]}: {first[1]:.4g} requests/s {means}, {first[1] / plan.gpus:.3g} a GPU ({tokens:,.0f} output "
        f"tokens/s a GPU), with {plan.share:.0%} within {plan.slo} ms"
    )
    if rest and rest[0][1]:
        more = f"{first[1] / rest[0][1] - 1:.0%}"
        text += (
            f"; as many as {rest[0][0]}"
            if more == "0%"
            else f"; {more} more than {rest[0][0]}, the next best"
        )
    return text + "."


def _choice_at(plan: Plan, rate: float) -> str:
    if plan.simulated:
        best = ranked(plan)[0]
        name, attainment, means = best.policy, best.attainment, "simulated"
    else:
        name, attainment, means = plan.best, plan.forecasts[0].attainment, "by formula"
    text = f"{attainment:.1%} of {rate:.4g} requests/s within {plan.slo} ms, {means}"
    if attainment >= plan.share:
        forecast = plan.forecast_of(name)
        room = plan.planner.capacity(forecast.layout).rate if forecast else 0.0
        return f"Take {name}: {text}" + (f"; it would do for {room:.4g}." if room else ".")
    needed = plan.gpus_needed()
    enough = (
        f"by formula {needed.layout.workers} GPUs would do ({needed.layout})"
        if needed
        else "no number of GPUs up to eight times as many does"
    )
    return f"{plan.gpus} GPUs are too few: at best, with {name}, {text}; {enough}."


def _limit(plan: Plan, forecast: Forecast) -> str:
    """Which term decides, in words."""
    where = "all workers" if forecast.layout.mixed else "prefill workers"
    busy = f"prompts take {min(forecast.prefill_load, 1.0):.0%} of the time of {where}"
    if forecast.limit == "link":
        return f"limited by the link, whose cards are busy {min(forecast.link_load, 1.0):.0%} of the time"
    if forecast.limit == "TTFT":
        return f"limited by TTFT, as {busy}"
    if forecast.limit == "KV room":
        return (
            f"limited by room: {plan.planner.times.places:.0f} sequences a worker find places and KV blocks"
        )
    batch = (
        "more than a worker can decode" if forecast.batch == math.inf else f"a batch of {forecast.batch:.0f}"
    )
    if not forecast.layout.mixed:
        return f"limited by {forecast.limit}, with {batch} on each decode worker"
    return f"limited by {forecast.limit}, as {busy}, and each is waited for by {batch}"


def plan_record(plan: Plan) -> dict[str, Any]:
    """JSON-ready; times in ms, infinite ones null."""
    times, config = plan.planner.times, plan.machine.config
    return {
        "schema": SCHEMA,
        "provenance": provenance(measured=False),
        "backend": "nanopd-lab plan (modelled)",
        "model_id": plan.machine.model,
        "hardware": plan.machine.name,
        "gpus": plan.gpus,
        "goodput_slo": str(plan.slo),
        "attainment_target": plan.share,
        "request_rate": plan.rate,
        "workload": {
            "dataset_name": plan.workload.name,
            "seed": plan.workload.seed,
            "mean_prompt_tokens": times.mean_prompt,
            "mean_output_tokens": times.mean_gaps + 1,
            **({"source": dict(plan.workload.source)} if plan.workload.source else {}),
        },
        "worker": {
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_num_seqs": config.max_num_seqs,
            "num_blocks": config.num_blocks,
            "block_bytes": config.block_bytes,
            "link_bytes_per_s": _finite(config.link.bytes_per_s),
        },
        "by_formula": [_forecast_record(each) for each in plan.forecasts],
        "simulated": [each._asdict() for each in ranked(plan)],
        "recommended": plan.best,
        "advice": advice(plan),
    }


def _forecast_record(each: Forecast) -> dict[str, Any]:
    return {
        "policy": each.layout.policy,
        "workers": each.layout.workers,
        "rate": each.rate,
        "attainment": each.attainment,
        "goodput": each.goodput,
        "ttft_ms": _finite(1e3 * each.ttft_s),
        "tpot_ms": _finite(1e3 * each.tpot_s),
        "prefill_load": _finite(each.prefill_load),
        "batch": _finite(each.batch),
        "link_load": _finite(each.link_load),
        "limit": each.limit,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
