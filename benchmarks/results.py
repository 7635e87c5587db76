"""What a run found, and its JSON. Numbers in it are measured, or absent with a reason."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.conditions import ROOT, Conditions
from benchmarks.floor import MachineLimits
from benchmarks.stats import median

SCHEMA = 1
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One quantity of one side, measured one or more times.

    Attributes:
        side: "ours", "ours, sharing off", or a peer.
        metric: for example "throughput".
        x: what was varied, where something was: the number of adapters, or of virtual tokens.
        values: one per repeat, in the order of measuring.
        floor_share: of what the machine's limits allow, at the median.
    """

    case: str
    side: str
    metric: str
    unit: str
    values: list[float]
    x: float | None = None
    floor_share: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """Of all values."""
        return median(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the final table: ours beside a peer or a limit, and the goal.

    Attributes:
        ours, peer_value: medians in `unit`; None where not measured.
        compared: what the goal speaks of (a ratio, or our value itself); None where not measured.
        must, stretch: goals for `compared`; None where nothing is demanded.
        at_most: the goals are upper limits.
        floor_share: of what the machine's limits allow, ours.
        note: why something was not measured, or what favours a side.
    """

    case: str
    what: str
    unit: str
    ours: float | None
    peer: str = ""
    peer_value: float | None = None
    compared: float | None = None
    must: float | None = None
    stretch: float | None = None
    at_most: bool = False
    floor_share: float | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether `must` is met; None where nothing was demanded or measured."""
        if self.must is None or self.compared is None:
            return None
        return self.compared <= self.must if self.at_most else self.compared >= self.must


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A comparison of outputs. `share` is of equal ids; `is_required` where every id must be equal."""

    case: str
    what: str
    share: float
    is_required: bool


@dataclass(slots=True, kw_only=True)
class Results:
    """All of one run.

    Attributes:
        size: "full", "quick" or "tiny".
        num_repeats: how often each side was timed.
        limits: measured before the cases, and after them.
        versions: of each side's packages, as its own process reported them.
        unmeasured: side or case to the reason why it is missing.
    """

    size: str
    num_repeats: int
    conditions: Conditions
    limits: list[MachineLimits] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    unmeasured: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    def default_path(self) -> Path:
        """Where a run of this time, commit and size is kept."""
        started = self.conditions.started.replace(":", "").partition("+")[0]
        commit = self.conditions.commit[:7] or "nogit"
        return RESULTS / f"{started}-{commit}-{self.size}.json"


def read_results(path: Path) -> Results:
    """Results that `write` wrote; ValueError for another schema."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if data.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} is not of schema {SCHEMA}")
    return Results(
        **data
        | {
            "conditions": Conditions(**data["conditions"]),
            "limits": [MachineLimits(**entry) for entry in data["limits"]],
            "measurements": [Measurement(**entry) for entry in data["measurements"]],
            "checks": [Check(**entry) for entry in data["checks"]],
            "rows": [Row(**entry) for entry in data["rows"]],
        }
    )
