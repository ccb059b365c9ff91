"""What the terminal shows: the grid of verdicts, the tables per model, and the text of a failure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from delta_suite.claims.judge import Judgement, Observation, Verdict, combine_verdicts
from delta_suite.metrics.boundaries import NEAR
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import holm, partial_conjunction
from delta_suite.metrics.registry import METRICS
from delta_suite.records.record import BoundarySearch, JudgedBy, Measurement, StreamRecord

NONE = "-"
"""Shown where a number does not exist."""

FLIPS = " *"
"""Marks a verdict that is another one under another variant."""

VACUOUS = " ~"
"""Marks a supported claim that random weights support, too."""

INTERVALS_UP_TO = 2
"""Models beside each other whose intervals still fit into the grid of verdicts."""

CLAIM_WIDTH = 52
"""Columns that a claim may take before it wraps."""

PHASE_COLUMNS = {
    "intra_cosine": "intra",
    "cross_cosine": "cross",
    "block_effective_rank": "block rank",
    "capture_fraction": "capture",
}

LAYER_COLUMNS = {
    "stream_norm": "||h||",
    "update_norm": "||delta||",
    "relative_step": "step",
    "parallel_fraction": "parallel",
    "gamma": "gamma",
    "effective_rank": "eff. rank",
    "top1_energy": "top-1",
    "spectral_gap": "gap",
    "adjacent_cosine": "|cos| next",
    "block_influence": "influence",
}


@dataclass(frozen=True)
class Row:
    """One verdict as the tables need it; plain values, so that it passes between processes as JSON."""

    hypothesis: str
    expectation: str
    claim: str
    model: str
    verdict: str
    severity: str = "fail"
    observed: float | None = None
    required: float | None = None
    margin: float | None = None
    reason: str | None = None
    where: str = ""
    """file:line of the claim"""
    record: str | None = None
    variants: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    """The verdict and the observed value under every variant."""
    interval: tuple[float, float] | None = None
    """95%, of the observed value."""
    gates: tuple[str, ...] = ()
    """Names of the gates that kept the measurement from deciding."""
    p: float | None = None
    """One-sided p of the claim being false."""
    vacuous: bool = False
    """Supported for the same architecture with random weights, too."""
    detectable: float | None = None
    """The margin that this many documents would show (95% confidence, 80% power)."""
    holds_for: str | None = None
    """The thresholds under which the verdict would be the same."""
    judged_by: tuple[int, str] | None = None
    """Version and SHA-256 of the hypothesis file; None for a plain test."""

    @classmethod
    def of(cls, judgement: Judgement, variants: Mapping[str, Judgement], where: str, record: str | None) -> Row:
        expectation = judgement.expectation
        return cls(
            judgement.hypothesis.id,
            expectation.id,
            expectation.claim(),
            judgement.model,
            judgement.verdict.value,
            expectation.severity,
            judgement.observed,
            judgement.required,
            judgement.margin,
            judgement.reason,
            where,
            record,
            {name: (other.verdict.value, other.observed) for name, other in variants.items()},
            None if expectation.over == "each" else judgement.observation.interval,
            tuple(gate.name for gate in judgement.gates),
            judgement.p,
            judgement.vacuous,
            judgement.detectable,
            judgement.holds_for,
            (judgement.hypothesis.version, judgement.hypothesis.sha256),
        )

    @property
    def flips(self) -> bool:
        """Whether another variant gives another verdict."""
        return any(verdict != self.verdict for verdict, _ in self.variants.values())

    @property
    def place(self) -> tuple[str, int]:
        """File and line of the claim, to sort by."""
        file, _, line = self.where.rpartition(":")
        return file, int(line)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def stamps_of(rows: Iterable[Row]) -> dict[str, JudgedBy]:
    """What a record keeps of the hypothesis files that judged it in these rows, by hypothesis."""
    judged = {row.hypothesis: row.judged_by for row in rows if row.judged_by is not None}
    return {name: JudgedBy(version=version, sha256=sha256) for name, (version, sha256) in judged.items()}


def changed_files(before: Mapping[str, JudgedBy], now: Mapping[str, JudgedBy]) -> dict[str, str]:
    """By hypothesis, how its file has changed since it last judged a record; one that never did is not changed."""
    return {
        name: f"{before[name].text} then, {own.text} now"
        for name, own in now.items()
        if name in before and before[name] != own
    }


def changed_lines(before: Mapping[str, JudgedBy], now: Mapping[str, JudgedBy]) -> list[str]:
    """The same, one line a hypothesis."""
    changed = changed_files(before, now)
    return [f"{name} has changed since this record was last judged: {how}" for name, how in changed.items()]


def number(value: float | None, digits: int = 4) -> str:
    """A number with about `digits` significant figures, never in a form that hides its size."""
    if value is None:
        return NONE
    if value == 0 or 1e-3 <= abs(value) < 10**digits:
        return f"{value:#.{digits}g}".rstrip(".")
    return f"{value:.{digits - 1}g}" if abs(value) < 1e-3 else f"{value:.0f}" if abs(value) < 1e7 else f"{value:.3g}"


def verdict_grid(rows: Sequence[Row]) -> str:
    """Hypotheses and their expectations by models."""
    models = list(dict.fromkeys(row.model for row in rows))
    adjusted = {model: holm_by_hypothesis([row for row in rows if row.model == model]) for model in models}
    lines: list[list[str]] = []
    for hypothesis in dict.fromkeys(row.hypothesis for row in rows):
        own = [row for row in rows if row.hypothesis == hypothesis]
        overall = []
        for model in models:
            counted = [row for row in own if row.model == model and row.severity == "fail"]
            overall.append(_overall(counted, adjusted[model].get(hypothesis)) if counted else NONE)
        lines.append([hypothesis, "", *overall])
        for expectation in dict.fromkeys(row.expectation for row in own):
            with_interval = len(models) <= INTERVALS_UP_TO
            cells = {row.model: _cell(row, with_interval) for row in own if row.expectation == expectation}
            claim = next(row.claim for row in own if row.expectation == expectation)
            lines.append([f". {expectation}", claim, *(cells.get(model, NONE) for model in models)])
    widths = [None, CLAIM_WIDTH, *[None] * len(models)]
    return tabulate(lines, headers=["hypothesis", "claim", *models], disable_numparse=True, maxcolwidths=widths)


def _cell(row: Row, with_interval: bool) -> str:
    word = "WARN" if row.severity == "warn" and row.verdict == Verdict.REFUTED.value else row.verdict
    found = f" {_interval(row.interval)}" if with_interval and row.interval is not None else ""
    return _verdict(word, row.observed) + found + (FLIPS if row.flips else "") + (VACUOUS if row.vacuous else "")


def _interval(interval: tuple[float, float] | None) -> str:
    return NONE if interval is None else f"[{number(interval[0], 3)}, {number(interval[1], 3)}]"


def holm_by_hypothesis(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """By hypothesis, of one model's rows: p that it does not hold, as it is and adjusted for the number of hypotheses.

    All expectations of a hypothesis must hold, so its p is the largest of theirs (an intersection-union test needs no
    correction); across hypotheses it is Holm's. A hypothesis with an expectation that no p can be given for has none.
    """
    ps: dict[str, list[float | None]] = {}
    for row in rows:
        if row.severity == "fail":
            ps.setdefault(row.hypothesis, []).append(None if row.gates else row.p)
    whole = {
        name: max(known) for name, own in ps.items() if len(known := [p for p in own if p is not None]) == len(own)
    }
    return dict(zip(whole, zip(whole.values(), holm(list(whole.values())), strict=True), strict=True))


def _overall(rows: Sequence[Row], p: tuple[float, float] | None) -> str:
    """The verdict on a hypothesis, and p where it is supported."""
    verdict = combine_verdicts(Verdict(row.verdict) for row in rows)
    return verdict.value + (f" (p {p[0]:.2g}, Holm {p[1]:.2g})" if p and verdict is Verdict.SUPPORTED else "")


def in_several_models(rows: Sequence[Row]) -> str:
    """For each hypothesis judged for several models: in how many of them it holds, and with what p."""
    models = list(dict.fromkeys(row.model for row in rows))
    found = {model: holm_by_hypothesis([row for row in rows if row.model == model]) for model in models}
    lines = []
    for hypothesis in dict.fromkeys(row.hypothesis for row in rows):
        ps = [own[hypothesis][0] for own in found.values() if hypothesis in own]
        cells = [
            f"{partial_conjunction(ps, holding):.2g}" if holding <= len(ps) else NONE
            for holding in range(1, len(models) + 1)
        ]
        if ps:
            lines.append([hypothesis, f"{len(ps)} of {len(models)}", *cells])
    headers = ["hypothesis", "models with a p", *(f"p: in {r} or more" for r in range(1, len(models) + 1))]
    return tabulate(lines, headers=headers, disable_numparse=True) if lines else ""


def variant_table(rows: Sequence[Row]) -> str:
    """The verdict of each claim under every variant, for each model."""
    variants = list(dict.fromkeys(name for row in rows for name in row.variants))
    lines = [
        [
            row.model,
            f"{row.hypothesis}/{row.expectation}",
            *(_verdict(*row.variants[name]) if name in row.variants else NONE for name in variants),
            "flips" if row.flips else "",
        ]
        for row in rows
        if row.variants
    ]
    return tabulate(lines, headers=["model", "expectation", *variants, ""], disable_numparse=True)


def _verdict(word: str, observed: float | None) -> str:
    return word if observed is None else f"{word} {number(observed, 3)}"


def phase_table(measurement: Measurement, variant: str = "raw") -> str:
    """N, intra, cross, block rank and capture of each phase."""
    lines = []
    for name, scope in measurement.scopes.items():
        first, last = scope.layers
        values = [_fixed(scope.metrics[variant][metric]) for metric in PHASE_COLUMNS]
        lines.append([name, f"{first}-{last}", str(last - first + 1), *values])
    return tabulate(
        lines,
        headers=["phase", "layers", "N", *PHASE_COLUMNS.values()],
        disable_numparse=True,
        colalign=("left", "right", "right", *["right"] * len(PHASE_COLUMNS)),
    )


def layer_table(measurement: Measurement, variant: str = "raw") -> str:
    """The metrics of each layer that fit a terminal; the record holds all of them."""
    lines = [
        [
            str(layer.layer),
            layer.phase,
            *(number(layer.metrics[variant][metric].value) for metric in LAYER_COLUMNS),
        ]
        for layer in measurement.layers
    ]
    headers = ["layer", "phase", *LAYER_COLUMNS.values()]
    return tabulate(
        lines,
        headers=headers,
        disable_numparse=True,
        colalign=("right", "left", *["right"] * len(LAYER_COLUMNS)),
    )


def boundary_table(measurement: Measurement, variant: str = "raw") -> str:
    """The boundaries found in the layers' similarity beside the declared ones, and what both are worth."""
    own = measurement.boundaries_of(variant)
    p, agreement, rank = (
        own.metrics[name].value for name in ("boundary_p", "boundary_agreement", "boundary_cost_rank")
    )
    if p is None or agreement is None:
        return f"no boundaries: {own.metrics['boundary_p'].reason}"
    phases = {first: f" {name}" for name, (first, _) in measurement.phases.items()}
    returned = dict(zip(own.found, own.returns or (), strict=False))
    missed = [first for first in own.declared if all(abs(first - found) > NEAR for found in own.found)]
    lines = []
    for first in sorted({*own.found, *missed}):
        near = [other for other in own.declared if abs(other - first) <= NEAR] if first in own.found else [first]
        lines.append(
            [
                str(first) if first in own.found else NONE,
                ", ".join(f"{other}{phases.get(other, '')}" for other in near) or NONE,
                f"{returned[first]:.0%}" if first in returned else NONE,
            ]
        )
    summary = [["met", f"{agreement:.0%} of the declared within {NEAR} layer"], ["p", f"{p:.3f} against smooth drift"]]
    if own.search is not None:
        summary += _search_lines(own.search, rank)
    found = tabulate(lines, headers=["found at", "declared at", "returns"], disable_numparse=True)
    return f"{found}\n\n{tabulate(summary, tablefmt='plain', disable_numparse=True)}"


def _search_lines(search: BoundarySearch, rank: float | None) -> list[list[str]]:
    chosen = search.chosen
    return [
        [
            "by chance",
            f"{search.chance_agreement:.0%} would be met; of {search.draws} draws, p is never below "
            f"{1 / (search.draws + 1):.3f}",
        ],
        [
            "cost",
            f"declared {search.declared_cost:.3f}, found {search.found_cost:.3f}, one segment {search.total_cost:.3f}",
        ],
        [
            "cost rank",
            f"{'not among' if rank is None else f'{number(rank)} of'} {search.orders} orders of the declared lengths, "
            f"{number(search.cost_rank_any_lengths)} of {search.others} ways to cut as often",
        ],
        [
            "by penalty",
            "too few layers"
            if chosen is None
            else f"{len(chosen) + 1} segments{', from ' if chosen else ''}{', '.join(map(str, chosen))}",
        ],
    ]


def model_line(measurement: Measurement) -> str:
    """One line on what was measured and how long it took."""
    model, calibration, provenance = measurement.model, measurement.calibration, measurement.provenance
    seconds, stream = sum(provenance.seconds.values()), provenance.stream
    # Said where it explains a long run, or why something is absent; a page of the leaderboard always says it.
    place = "" if stream is None or stream.usual else f" (stream {stream_text(stream, provenance.device)})"
    return (
        f"{model.name}: {model.architecture}, {model.layers} layers x {model.hidden}; calibration {calibration.name}, "
        f"{'1 document (so no interval)' if calibration.documents == 1 else f'{calibration.documents} documents'}, "
        f"{calibration.tokens} tokens; "
        f"{provenance.dtype} on {provenance.device}{place}; measured {provenance.created} in {seconds:.1f} s"
    )


def stream_text(stream: StreamRecord, device: str) -> str:
    """Where the stream was kept, and in how many shards."""
    place = {"device": f"in the memory of {device}", "host": "in host memory", "disk": "on disk"}
    shards = f", {stream.shards} shards, the largest" if stream.shards > 1 else ","
    return f"{place[stream.storage]}{shards} {stream.largest_bytes / 1e9:.3g} GB"


def failure_table(rows: Iterable[Row]) -> str:
    """Refuted expectations, furthest outside the claim first, by margin relative to what was required."""
    failed = sorted((row for row in rows if row.verdict == Verdict.REFUTED.value), key=relative_margin)
    lines = [
        [
            row.model,
            f"{row.hypothesis}/{row.expectation}",
            row.claim,
            number(row.observed) + ("" if row.interval is None else f" {_interval(row.interval)}"),
            margin_text(row),
            row.where,
        ]
        for row in failed
    ]
    return tabulate(
        lines,
        headers=["model", "expectation", "claim", "observed", "margin", "stated at"],
        disable_numparse=True,
    )


def relative_margin(row: Row) -> float:
    """The margin over what was required; 0 where there is none."""
    if row.margin is None or row.required is None:
        return 0.0
    return row.margin / max(abs(row.required), 1e-12)


def margin_text(row: Row) -> str:
    """The margin, and relative to what was required where that is not near 0."""
    if row.margin is None:
        return NONE
    relative = relative_margin(row)
    return f"{row.margin:+.4f}" + (f" ({relative:+.0%})" if abs(relative) < 10 else "")


def _fixed(estimate: Estimate) -> str:
    return NONE if estimate.value is None else f"{estimate.value:.4f}"


def explanation(judgement: Judgement, variants: Mapping[str, Judgement], where: str, reproduce: str) -> str:
    """Why an expectation has the verdict it has, and the command that shows it again."""
    expectation, observation = judgement.expectation, judgement.observation
    outcome = {
        Verdict.SUPPORTED: "supported",
        Verdict.REFUTED: "refuted",
        Verdict.INCONCLUSIVE: "inconclusive",
        Verdict.NOT_MEASURED: "not measured",
    }[judgement.verdict]
    lines = [
        f"{judgement.hypothesis.id}/{expectation.id} is {outcome} for {judgement.model}",
        f"  claim      {expectation.claim()}",
    ]
    if expectation.over == "each" and judgement.observed is not None:
        lines.append(
            f"  observed   {judgement.observed:.0%} of the layers hold, {expectation.mostly:.0%} required "
            f"(margin {judgement.margin:+.2f})"
        )
    elif judgement.observed is not None and judgement.margin is not None:
        lines.append(
            f"  observed   {number(judgement.observed)}, required {expectation.op} {judgement.required:.6g} "
            f"(margin {judgement.margin:+.4f})"
        )
        if observation.interval is not None:
            lines.append(f"  interval   95% {_interval(observation.interval)}, over documents{_distance(judgement)}")
            lines.append(f"  as it is   {number(observation.value)} of these documents, its bias included")
        if judgement.p is not None:
            lines.append(f"  p          {judgement.p:.2g} that the claim is false (one-sided)")
        if judgement.holds_for is not None:
            lines.append(f"  same for   any threshold {judgement.holds_for}")
        if judgement.verdict is Verdict.INCONCLUSIVE and judgement.detectable is not None:
            lines.append(f"  detectable a margin of {judgement.detectable:.3g} (95% confidence, 80% power)")
    if judgement.reference is not None and judgement.reference.value is not None:
        other = judgement.reference
        lines.append(f"  other side {other.metric} over {_scope(other)} = {number(other.value)}")
    if judgement.reason:
        lines.append(f"  reason     {judgement.reason}")
    if judgement.vacuous:
        lines.append("  vacuous    the same architecture with random weights supports this claim, too")
    lines.append(f"  over       {_scope(observation)}, variant {observation.variant}")
    lines += _per_layer(observation, expectation.op)
    others = [f"{name} {_verdict(other.verdict.value, other.observed)}" for name, other in variants.items()]
    lines.append(f"  variants   {', '.join(others)}")
    lines += [f"  threshold  {expectation.origin}", f"  stated at  {where}", f"  reproduce  {reproduce}"]
    return "\n".join(lines)


def _distance(judgement: Judgement) -> str:
    """The interval of the margin, where the other side has one of its own."""
    if judgement.expectation.than is None or judgement.distance.interval is None:
        return ""
    return f"; of the margin {_interval(judgement.distance.interval)}"


def quantity_lines(observation: Observation, comparison: str) -> list[str]:
    """The same explanation for a plain assert on a number of the `measurement` fixture."""
    return [
        comparison,
        f"{observation.metric} over {_scope(observation)} of {observation.model}, variant {observation.variant}",
        *(line.strip() for line in _per_layer(observation, comparison)),
    ]


def _scope(observation: Observation) -> str:
    if observation.layers is None:
        return observation.scope
    first, last = observation.layers
    return f"{observation.scope} (layers {first}-{last})" if first != last else f"{observation.scope} (layer {first})"


def _per_layer(observation: Observation, op: str) -> list[str]:
    """The layers' values, eight to a line, the worst for the claim marked."""
    values = {layer: value for layer, value in observation.per_layer.items() if value is not None}
    if len(values) < 2:
        return []
    worst = max(values, key=values.__getitem__) if "<" in op else min(values, key=values.__getitem__)
    cells = [f"{layer}: {number(value, 3)}{' <- worst' if layer == worst else ''}" for layer, value in values.items()]
    rows = [cells[start : start + 8] for start in range(0, len(cells), 8)]
    return [f"  {'per layer  ' if index == 0 else '           '}{'  '.join(row)}" for index, row in enumerate(rows)]


def metric_table() -> str:
    """The reference table of every metric."""
    lines = [
        [
            metric.name,
            metric.scope,
            metric.formula,
            metric.unit,
            _range(metric.low, metric.high),
            metric.version,
            metric.source,
        ]
        for metric in METRICS.values()
    ]
    headers = ["metric", "scope", "formula", "unit", "range", "version", "source"]
    widths = [None, None, 44, None, None, None, 36]
    return tabulate(lines, headers=headers, disable_numparse=True, maxcolwidths=widths)


def _range(low: float, high: float) -> str:
    return f"{low:g} .. {'unbounded' if high == float('inf') else f'{high:.4g}'}"
