"""Cost models as JSON files, with the version of their schema and where they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nanopd_lab.cost.company import Company
from nanopd_lab.cost.iteration import COEFFICIENTS, CapturedSizes, IterationModel
from nanopd_lab.cost.transfer_time import TransferModel

SCHEMA = "nanopd-lab/cost-model/1"


@dataclass(frozen=True)
class CostModel:
    """A model on a device: its steps, and the link to the next worker if one is known.

    model, device: for people
    source:        where the coefficients come from: a publication, or the provenance of a profile
    fit:           what the fit said of itself: errors, numbers of steps
    company:       what workers on one host cost one another; None: nothing, as each has a device of its own
    """

    model: str
    device: str
    iteration: IterationModel
    transfer: TransferModel | None = None
    source: Any = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    company: Company | None = None

    def to_record(self) -> dict[str, Any]:
        """JSON-ready; an infinite bandwidth is null."""
        transfer = None
        if self.transfer is not None:
            transfer = asdict(self.transfer)
            if math.isinf(self.transfer.bytes_per_s):
                transfer["bytes_per_s"] = None
        return {
            "schema": SCHEMA,
            "model": self.model,
            "device": self.device,
            "source": self.source,
            "iteration": {
                **{name: getattr(self.iteration, name) for name in COEFFICIENTS},
                "captured": asdict(self.iteration.captured),
            },
            "transfer": transfer,
            "fit": dict(self.fit),
            **({"company": asdict(self.company)} if self.company else {}),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], name: str = "the record") -> CostModel:
        """What `to_record` made.

        Raises:
            ValueError: another schema version, a missing or an unknown field, or a coefficient out of range; the
                message begins with `name`.
        """
        check_schema(record, SCHEMA, name, "fit the profile again (nanopd-lab fit)")
        try:
            steps = dict(record["iteration"])
            captured = CapturedSizes(**{k: tuple(v) for k, v in steps.pop("captured", {}).items()})
            iteration = replace(_build(IterationModel, steps), captured=captured)
            transfer = record.get("transfer")
            if transfer is not None:
                speed = transfer["bytes_per_s"]
                transfer = _build(
                    TransferModel, {**transfer, "bytes_per_s": math.inf if speed is None else speed}
                )
            company = record.get("company")
            return cls(
                str(record["model"]),
                str(record["device"]),
                iteration,
                transfer,
                record.get("source"),
                record.get("fit") or {},
                _build(Company, company) if company is not None else None,
            )
        except KeyError as error:
            raise ValueError(f"{name}: {error.args[0]!r} is missing") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(self.to_record(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Read a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: not JSON; see `from_record`.
        """
        return cls.from_record(read_json(path), path.name)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not an object.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} holds a {type(record).__name__}, not an object")
    return record


def check_schema(record: Mapping[str, Any], wanted: str, name: str, way_out: str) -> None:
    """Refuse another schema or version of it.

    Raises:
        ValueError: names both and the way out.
    """
    if record.get("schema") != wanted:
        raise ValueError(
            f"{name} has schema {record.get('schema')!r}, this version reads {wanted!r}: {way_out}"
        )


def _build(kind: Any, values: Mapping[str, Any]) -> Any:
    known = [f.name for f in fields(kind) if f.init and f.name != "captured"]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"unknown field {unknown[0]!r}; {kind.__name__} has {', '.join(known)}")
    if wrong := [n for n, v in values.items() if isinstance(v, bool) or not isinstance(v, int | float)]:
        raise ValueError(f"{wrong[0]} is {values[wrong[0]]!r}; it must be a number")
    return kind(**values)
