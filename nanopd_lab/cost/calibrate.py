"""From a profile to a cost model: fit, check on steps that were held out, derive nanoPD's numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanopd_lab.cost.derived import derive
from nanopd_lab.cost.files import CostModel, check_schema, read_json
from nanopd_lab.cost.fitting import (
    FitError,
    Solve,
    StepSample,
    errors,
    fit_iteration,
    fit_terms,
    held_out_error,
    launch_overhead,
)
from nanopd_lab.cost.grid import KINDS, Point
from nanopd_lab.cost.iteration import CapturedSizes, IterationModel, StepFeatures
from nanopd_lab.cost.roofline import ChunkShape, ModelDims
from nanopd_lab.cost.transfer_time import TransferModel, TransferSample
from nanopd_lab.resources import data_dir

PROFILE_SCHEMA = "nanopd-lab/profile/1"
TRANSFER_SCHEMA = "nanopd-lab/transfer/1"
MIN_ROUNDS = 3


@dataclass(frozen=True)
class CostParts:
    """What a cost model is made with; a notebook puts a learner's own in.

    features:       of a step's chunks
    fit:            see `fit_terms`
    held_out_error: see there
    """

    features: Callable[[Seq[ChunkShape]], StepFeatures] = StepFeatures.of
    fit: Solve = fit_terms
    held_out_error: Callable[[IterationModel, Seq[StepSample], Seq[StepSample]], FitError] = held_out_error


def recorded_profile(device: str, cuda_graphs: bool = True) -> dict[str, Any] | None:
    """The newest profile in `data/recorded` with `device` in its name, with CUDA graphs or not; None: there is none."""
    found = [read_json(path) for path in sorted((data_dir() / "recorded").glob(f"profile-*{device}*.json"))]
    found = [record for record in found if record["settings"].get("cuda_graphs", True) == cuda_graphs]
    return max(found, key=lambda record: str(record["provenance"]["date"]), default=None)


def timed_points(profile: Mapping[str, Any]) -> list[tuple[Point, float]]:
    """The steps and their seconds: medians of at least three visits.

    Raises:
        ValueError: another schema, or a profile that is not complete.
    """
    check_schema(profile, PROFILE_SCHEMA, "the profile", "profile again (nanopd-lab profile)")
    found = []
    for row in profile["points"]:
        if len(row["seconds"]) < MIN_ROUNDS:
            raise ValueError(
                f"the profile is not complete: a {row['kind']} step has {len(row['seconds'])} of {MIN_ROUNDS} visits; "
                "run nanopd-lab profile with the same settings and file to continue it"
            )
        found.append((Point.from_record(row), statistics.median(row["seconds"])))
    return found


def samples_of(
    profile: Mapping[str, Any], features: Callable[[Seq[ChunkShape]], StepFeatures] = StepFeatures.of
) -> dict[str, list[StepSample]]:
    """The timed steps of each kind, by their features.

    Raises:
        ValueError: see `timed_points`.
    """
    found: dict[str, list[StepSample]] = {kind: [] for kind in KINDS}
    for point, seconds in timed_points(profile):
        found[point.kind].append(StepSample(features(point.chunks), seconds))
    return found


def engine_samples(record: Mapping[str, Any], mode: str) -> list[StepSample]:
    """Decode steps and prompts of one mode of a record of `nanopd-lab bench-engine`.

    Raises:
        ValueError: a mode that the record lacks.
    """
    if mode not in record["modes"]:
        raise ValueError(f"the record has no mode {mode!r}; it has {', '.join(record['modes'])}")
    found = []
    for name, value in record["modes"][mode].items():
        what, _, size = name.partition("_")
        if what in ("decode", "ttft") and size.isdecimal():
            one = ChunkShape(1, record["context"]) if what == "decode" else ChunkShape(int(size))
            count = int(size) if what == "decode" else 1
            found.append(StepSample(StepFeatures.of([one] * count), value / 1e3))
    return found


def fit_profile(
    profile: Mapping[str, Any],
    link: TransferModel | None = None,
    link_source: Any = None,
    parts: CostParts | None = None,
) -> CostModel:
    """Fit all prefill and decode steps and every other mixed one; the mixed ones left out are the check.

    On a CPU host and device are one, and no launch overhead is looked for. `link_source` says where the link is from.

    Raises:
        ValueError: see `samples_of`; or fewer than four mixed steps.
    """
    own = parts or CostParts()
    samples = samples_of(profile, own.features)
    mixed = samples["mixed"]
    if len(mixed) < 4:
        raise ValueError(
            f"the profile has {len(mixed)} mixed steps; at least 4 are needed to fit and to check"
        )
    used = [*samples["prefill"], *samples["decode"], *mixed[::2]]
    dims = ModelDims(**profile["dims"])
    on_cpu = profile["settings"]["device"] == "cpu"
    model = fit_iteration(
        used,
        vocab_share=dims.vocab_weights / dims.token_weights,
        host_s=0.0 if on_cpu else None,
        solve=own.fit,
        captured=captured_of(profile),
    )
    kinds = {"fitted": used, "prefill": samples["prefill"], "decode": samples["decode"]}
    found = {name: errors(model, part) for name, part in kinds.items() if part}
    found["held_out"] = own.held_out_error(model, mixed, used)
    provenance = profile["provenance"]
    machine = provenance["machine"]
    threads = profile["settings"]["threads"]
    device = f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}" if on_cpu else machine["gpus"][0]
    return CostModel(
        f"{dims.name} in {profile['settings']['dtype']}",
        device,
        model,
        link,
        {"profile": provenance, **({"transfer": link_source} if link_source else {})},
        {
            "errors": {name: asdict(error) for name, error in found.items()},
            "dims": asdict(dims),
            "block_size": profile["block_size"],
            "block_bytes": profile["block_bytes"],
            "ahead": profile.get("ahead", False),
        },
    )


def captured_of(profile: Mapping[str, Any]) -> CapturedSizes:
    """What the engine's CUDA graphs padded steps to."""
    return CapturedSizes(**{name: tuple(sizes) for name, sizes in profile.get("captured", {}).items()})


def links_of(profile: Mapping[str, Any]) -> dict[str, TransferModel]:
    """The link of each transport in a profile, fastest first; of all pairs of devices together."""
    samples: dict[str, list[TransferSample]] = {}
    for row in profile.get("transfers", ()):
        seconds = statistics.median(row["seconds"])
        samples.setdefault(row["transport"], []).append(TransferSample(row["blocks"], row["bytes"], seconds))
    links = {name: TransferModel.fit(each) for name, each in samples.items()}
    return dict(sorted(links.items(), key=lambda item: -item[1].bytes_per_s))


def own_link(profile: Mapping[str, Any], transport: str | None = None) -> TransferModel | None:
    """The link of a profile's own pulls: of `transport`, or of the one that workers of their own would choose.

    Raises:
        ValueError: the profile lacks this transport.
    """
    links = links_of(profile)
    if transport is None:
        return next((links[name] for name in ("p2p", "pinned", "shm", "inproc") if name in links), None)
    if transport not in links:
        raise ValueError(f"the profile has no pulls by {transport!r}; it has {', '.join(links) or 'none'}")
    return links[transport]


def with_launched(cost: CostModel, launched: Mapping[str, Any]) -> CostModel:
    """Note in `fit` what the host takes for a step without CUDA graphs.

    Args:
        launched: a profile of the same model and device with `--enforce-eager`; device times stay those of `cost`
    """
    found = samples_of(launched)
    samples = [sample for each in found.values() for sample in each]
    model = launch_overhead(cost.iteration, samples)
    note = {
        "host_s": model.host_s,
        "errors": asdict(errors(model, samples)),
        "profile": launched["provenance"],
    }
    return replace(cost, fit={**cost.fit, "launched": note})


def fit_link(record: Mapping[str, Any], transport: str) -> TransferModel:
    """The link of a transport, from a record of `nanopd-lab transfer bench`: its pulls one at a time.

    Raises:
        ValueError: another schema, or a transport that the record lacks.
    """
    check_schema(
        record, TRANSFER_SCHEMA, "the transfer record", "measure it again (nanopd-lab transfer bench)"
    )
    block = record["shape"]["block_bytes"]
    rows = [r for r in record["rows"] if r["in_flight"] == 1]
    names = sorted({r["transport"] for r in rows})
    if transport not in names:
        raise ValueError(f"the transfer record has no {transport!r}; it has {', '.join(names)}")
    processes = max(r["processes"] for r in rows if r["transport"] == transport)
    return TransferModel.fit(
        [
            TransferSample(r["blocks"], r["blocks"] * block, r["median_ms"] / 1e3)
            for r in rows
            if r["transport"] == transport and r["processes"] == processes
        ]
    )


def describe(cost: CostModel, prompt_tokens: int = 512, context: int = 512) -> str:
    """Coefficients, errors and derived numbers, for people."""
    model, dims = cost.iteration, ModelDims(**cost.fit["dims"])
    bandwidth = dims.token_weights * dims.weight_itemsize / model.weight_s if model.weight_s else None
    peak = 2 * dims.token_weights / model.token_s if model.token_s else None
    rows = [
        ("t0", f"{1e3 * model.t0_s:.3f} ms a step"),
        (
            "weights",
            f"{1e3 * model.weight_s:.3f} ms to read"
            + (f" ({bandwidth / 1e9:,.1f} GB/s)" if bandwidth else ""),
        ),
        (
            "products",
            f"{1e6 * model.token_s:.3f} µs a token" + (f" ({peak / 1e9:,.0f} GFLOP/s)" if peak else ""),
        ),
        ("corner", f"sharpness {model.sharpness:g}"),
        ("a1", f"{1e9 * model.pair_s:.3f} ns a (query, key) pair"),
        ("a2", f"{1e6 * model.context_s:.3f} µs a token of context"),
        ("a3", f"{1e6 * model.sequence_s:.1f} µs a sequence"),
        *(
            [("short", f"{1e9 * model.short_pair_s:.3f} ns more a pair of a short chunk")]
            if model.short_pair_s
            else []
        ),
        *(
            [
                (
                    "shared",
                    f"{1e6 * model.shared_context_s:.3f} µs more a token of context of one that is not alone",
                )
            ]
            if model.shared_context_s
            else []
        ),
        *(
            [("rows", f"{1e3 * model.rows_s:.3f} ms more for several rows than for one")]
            if model.rows_s
            else []
        ),
        *([("mixed", f"{1e3 * model.mixed_s:.3f} ms a step with a prompt chunk")] if model.mixed_s else []),
        ("host", f"{1e3 * model.host_s:.3f} ms a step, beside the device"),
    ]
    if (company := cost.company) is not None:
        rows.append((
            "company",
            f"of {company.processes} busy with the same; decode steps take {company.decode_alone:.0%} of these times "
            f"alone and {company.decode_beside_prompts:.0%} beside prompts, prompts {company.prompt_alone:.0%} alone "
            f"and {company.prompt_beside_decodes:.0%} beside decodes",
        ))  # fmt: skip
    if launched := cost.fit.get("launched"):
        rows.append(("host, launched", f"{1e3 * launched['host_s']:.2f} ms a step without CUDA graphs"))
    if cost.transfer:
        link = cost.transfer
        rows.append((
            "transfer",
            f"{1e3 * link.setup_s:.3f} ms + {1e6 * link.block_s:.2f} µs a block, {link.bytes_per_s / 1e9:.2f} GB/s",
        ))  # fmt: skip
    found = derive(
        model,
        prompt_tokens=prompt_tokens,
        context=context,
        link=cost.transfer,
        block_bytes=cost.fit["block_bytes"],
        block_size=cost.fit["block_size"],
    )
    rows += [
        ("α", f"{1e3 * found.alpha_s:.4f} ms a prompt token (prompt of {prompt_tokens})"),
        ("β", f"{1e3 * found.beta_s:.2f} ms a decode step (context {context})"),
        ("threshold", f"{found.threshold:.1f} sequences"),
        ("γ", f"{1e3 * found.gamma_s:.4f} ms a prompt token in a full decode batch"),
    ]
    if found.transfer_rate_s:
        ratio = found.gamma_s / found.transfer_rate_s
        rows.append(
            ("transfer rate", f"{1e6 * found.transfer_rate_s:.3f} µs a token; γ is {ratio:.1f} times it")
        )
    lines = [f"{cost.model} on {cost.device}"]
    lines += [f"  {name:<15}{text}" for name, text in rows]
    for name, each in cost.fit["errors"].items():
        label = "held-out mixed" if name == "held_out" else name
        lines.append(
            f"  error, {label:<15} mean {each['mean']:6.1%}   max {each['maximum']:6.1%}   of {each['count']} steps"
        )
    return "\n".join(lines)
