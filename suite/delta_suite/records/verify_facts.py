"""Check what a record says beside its figures: versions, parts, counts, certificate, calibration and date."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

from delta_suite.capture.calibration import CORE_BYTES, CORES, load_calibration
from delta_suite.capture.tolerances import EPSILON, OPTIONAL, SINGLE_EPSILON, WRITES, tolerances
from delta_suite.capture.units import DOCUMENT_GROUPS, DOMAIN_GROUPS
from delta_suite.metrics.definition import PART_OF, Metric
from delta_suite.metrics.registry import METRICS, OF_LOSSES
from delta_suite.metrics.state import OF_VARIANT
from delta_suite.models.phases import declared_problems, phase_of
from delta_suite.provenance import UTC_FORMAT
from delta_suite.records.assemble import LAW_METRICS, LAW_VARIANT
from delta_suite.records.problem import WRITTEN, Problem, quoted
from delta_suite.records.record import SCHEMA, Record
from delta_suite.records.submitter import submitter_problem
from delta_suite.reduction.variants import VARIANTS, WRITE_VARIANTS, Variant, has_averages

LARGEST_COUNT = 2**63
"""Upper bound of every count and size of a record."""

MOST_LAYERS = 1024
"""Most layers of a model whose record is read; the deepest decoders have some 130, and matrices of pairs grow with the
square."""

MOST_GROUPS = DOMAIN_GROUPS
"""Most groups of units; each has matrices of its own."""

EARLIER_CORE_TOKENS = 128
"""Tokens of each document of the set that was called `core` until it was written anew, cut at bytes."""

EARLIER_CORE = "239458170252a71265a7d10d2abe2d64ed3f32df3e8d48d84e118bdd85880009"
"""SHA-256 of that set. Its records stay readable; by their hash they are those of another calibration."""

AHEAD = timedelta(days=1)
"""How far in the future a record may have been made: clocks differ, and so do time zones that were taken for UTC."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def version_problems(record: Record) -> Iterator[Problem]:
    """Yield figures of a newer version than this one knows, in which case nothing else is checked.

    Metrics and variants that this version does not have may be older or newer; nothing reads them.
    """
    versions = [("metric", name, version) for name, version in record.provenance.metric_versions.items()]
    versions += [("variant", name, version) for name, version in record.variants.items()]
    for kind, name, version in versions:
        known: Mapping[str, Metric | Variant] = METRICS if kind == "metric" else VARIANTS
        if name in known and not 1 <= version <= known[name].version:
            yield Problem(
                f"{kind} {name}",
                f"it has version {quoted(version)}, and this delta-suite knows 1 to {known[name].version}: "
                f"if the record is newer, update delta-suite",
            )


def fact_problems(record: Record, *, merged: bool = False) -> Iterator[Problem]:
    """Yield where counts, certificate, calibration, phases and provenance contradict each other.

    merged: true for a baseline that was added to, which may hold phases of two maps.
    """
    yield from _count_problems(record)
    if not merged:
        yield from _phase_map_problems(record)
    yield from _certificate_problems(record)
    yield from _calibration_problems(record)
    yield from _provenance_problems(record)
    who = record.submitter
    if who is not None and (problem := submitter_problem(who.handle, who.hardware, who.note)):
        yield Problem("submitter", problem)


# --- completeness ----------------------------------------------------------------------------------------------


def missing_problems(record: Record) -> Iterator[Problem]:
    """Yield the figures that a layer, a phase or the boundaries lack, and those that no metric version belongs to.

    Expected are the metrics of the record's parts that its `metric_versions` list; a record of schema 2 has them in
    every layer and phase of the variant `raw`, and the same ones in every layer and phase of another variant.
    """
    versions = record.provenance.metric_versions
    known = [METRICS[name] for name in versions if name in METRICS]
    foreign = set(versions) - set(METRICS)
    layer_names = {
        metric.name for metric in known if metric.scope in {"layer", "pair"} and metric.takes not in OF_LOSSES
    }
    phase_names = {metric.name for metric in known if metric.takes == "directions" and metric.scope != "layer"}
    boundary_names = {metric.name for metric in known if metric.takes == "boundaries"}
    law_names = set(versions) & set(LAW_METRICS)
    averages = {metric.name for metric in known if metric.takes == "tokens"}
    stream_names = {metric.name for metric in known if metric.takes == "stream"}
    old = record.schema_version != SCHEMA
    for variant in record.variants:
        if variant not in VARIANTS:
            continue
        of_stream = set(OF_VARIANT.get(variant, ())) if "stream" in record.parts else set()
        expected = layer_names - (set() if has_averages(VARIANTS[variant]) else averages)
        expected -= stream_names - of_stream
        allowed = layer_names - (stream_names - of_stream) | foreign
        if old and variant != "raw":
            expected = set(record.layers[0].metrics[variant])
        for layer in record.layers:
            place = f"layer {layer.layer}, {variant}"
            yield from _differing(place, layer.metrics[variant], expected, allowed)
        for phase, scope in record.scopes.items():
            expected, allowed = phase_names, phase_names | foreign
            if variant == LAW_VARIANT and record.law is not None and scope.layers in record.law.phases.values():
                allowed = allowed | law_names
                # A record under another phase map keeps the law of phases that both have, where it went there at once.
                expected = phase_names | (law_names if record.law.phases == record.phases else set())
            if old:
                first = next(iter(record.scopes.values())).metrics[variant]
                expected, allowed = (set(first) - law_names if variant != "raw" else expected), allowed | law_names
            yield from _differing(f"phase {phase}, {variant}", scope.metrics[variant], expected, allowed)
    for variant, boundary in record.boundaries.items():
        yield from _differing(
            f"boundaries, {quoted(variant)}", boundary.metrics, boundary_names, boundary_names | foreign
        )
    of_blocks = set(record.variants) - set(WRITE_VARIANTS)
    if "boundaries" in record.parts and set(record.boundaries) != of_blocks:
        yield Problem("boundaries", f"they stand in {sorted(record.boundaries)}, of {sorted(of_blocks)}")
    if "boundaries" not in record.parts and record.boundaries:
        yield Problem("boundaries", "they are there, and no part of the record")
    if ("law" in record.parts) != (record.law is not None):
        yield Problem("law", "it is a part of the record and not there, or there and no part of it")
    written = set(record.variants) & set(WRITE_VARIANTS)
    if written != (set(WRITE_VARIANTS) if "writes" in record.parts and record.not_apart is None else set()):
        whether = "a part" if "writes" in record.parts else "no part"
        yield Problem("writes", f"they are {whether} of the record, and stand in {sorted(written)}")
    if written and WRITES not in record.certificate.identities:
        yield Problem(f"certificate, {WRITES}", "the identity is missing")
    if "spectra" not in record.parts:
        yield Problem("parts", "spectra, which every record has, are not among them")
    if not old and not {name for name in METRICS if PART_OF[METRICS[name].takes] == "spectra"} & set(versions):
        yield Problem("metric_versions", "no metric of spectra is listed")


def _differing(where: str, metrics: Mapping[str, object], expected: set[str], allowed: set[str]) -> Iterator[Problem]:
    missing, more = sorted(expected - metrics.keys()), sorted(metrics.keys() - allowed)
    if missing:
        yield Problem(where, f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if more:
        yield Problem(
            where, f"{_listed(more)} {'has' if len(more) == 1 else 'have'} no metric version, or no place here"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(name if name in METRICS else quoted(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- counts ----------------------------------------------------------------------------------------------------


def _count_problems(record: Record) -> Iterator[Problem]:
    model, texts, sinks, units = record.model, record.calibration, record.sinks, record.resampling
    counts = {
        "model.layers": (model.layers, 1, MOST_LAYERS),
        "model.hidden": (model.hidden, 1, LARGEST_COUNT),
        "calibration.documents": (texts.documents, 1, LARGEST_COUNT),
        "calibration.tokens": (texts.tokens, 2, LARGEST_COUNT),
        "calibration.dropped": (texts.dropped, 0, texts.documents),
        "calibration.first": (texts.first, texts.documents, LARGEST_COUNT),
        "calibration.bytes_per_document": (texts.bytes_per_document, 1, LARGEST_COUNT),
        "calibration.tokens_per_document": (texts.tokens_per_document, 1, LARGEST_COUNT),
        "calibration.unknown_tokens": (texts.unknown_tokens, 0, 1),
        "calibration.duplicates": (texts.duplicates, 0, LARGEST_COUNT),
        "sinks.position_zero": (sinks.position_zero, 0, texts.tokens),
        "sinks.large_norm": (sinks.large_norm, 0, texts.tokens - max(0, sinks.position_zero)),
        "sinks.ratio": (sinks.ratio, 1, LARGEST_COUNT),
        "resampling.units": (units.units, 1, texts.documents),
        "resampling.groups": (units.groups, 1, min(MOST_GROUPS, max(1, units.units))),
        "resampling.document_groups": (units.document_groups, 1, min(DOCUMENT_GROUPS, max(1, texts.documents))),
        "calibration.domains": (texts.domains, 1, texts.documents),
        "certificate.blocks": (record.certificate.blocks, model.layers, model.layers),
        "certificate.forward_passes": (record.certificate.forward_passes, 1, LARGEST_COUNT),
        **_setting_counts(record),
    }
    for name, (value, least, most) in counts.items():
        if value is not None and not least <= value <= most:
            yield Problem(name, f"{quoted(value)} is outside {quoted(least)} to {quoted(most)}")
    if units.unit == "document" and units.units != texts.documents:
        yield Problem("resampling.units", f"{units.units} documents, and the calibration has {texts.documents}")
    if units.unit == "domain" and units.units != texts.domains:
        yield Problem("resampling.units", f"{units.units} domains, and the calibration has {quoted(texts.domains)}")
    languages = texts.languages or {}
    if languages and (min(languages.values()) < 1 or sum(languages.values()) != texts.documents):
        yield Problem("calibration.languages", f"{sum(languages.values())} documents, of {texts.documents}")
    if texts.tokens_per_document is not None:
        most = texts.documents * texts.tokens_per_document
        if texts.tokens + texts.dropped > most:
            yield Problem(
                "calibration.tokens",
                f"{texts.tokens} and {texts.dropped} dropped, of {texts.documents} documents of at most "
                f"{texts.tokens_per_document}",
            )
    yield from _sink_problems(record)
    if record.law is not None:
        for name, (first, last) in record.law.phases.items():
            if not 0 <= first <= last < record.model.layers:
                yield Problem("law", f"phase {quoted(name)} is {first} to {last}, of {record.model.layers} layers")


def _setting_counts(record: Record) -> dict[str, tuple[int | float | None, int, int]]:
    """Return the numbers among settings and batches, each with its least and largest value."""
    numbers: dict[str, int | float | None] = {
        f"provenance.settings.{name}": value
        for name, value in record.provenance.settings.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if (stream := record.provenance.stream) is not None:
        numbers["provenance.stream.planned_batch_tokens"] = stream.planned_batch_tokens
        numbers["provenance.stream.batch_tokens"] = stream.batch_tokens
    return {name: (value, 0, LARGEST_COUNT) for name, value in numbers.items()}


def _sink_problems(record: Record) -> Iterator[Problem]:
    sinks = record.sinks
    if len(sinks.largest) > max(0, sinks.position_zero) + max(0, sinks.large_norm):
        yield Problem("sinks.largest", f"{len(sinks.largest)} are listed, and fewer were counted")
    multiples = [multiple for *_, multiple in sinks.largest]
    if multiples != sorted(multiples, reverse=True):
        yield Problem("sinks.largest", "the norms do not descend")
    for document, position, layer, multiple in sinks.largest:
        if not (0 <= document < record.calibration.documents and position >= 0 and 0 <= layer <= record.model.layers):
            yield Problem("sinks.largest", f"document {document}, position {position}, layer {layer} do not exist")
        elif not multiple >= 0 or (position > 0 and multiple < sinks.ratio * (1 - WRITTEN) - 0.001):  # to 3 decimals
            yield Problem("sinks.largest", f"a norm of {quoted(multiple)} medians is none above {quoted(sinks.ratio)}")


def _phase_map_problems(record: Record) -> Iterator[Problem]:
    for problem in declared_problems(record.phases):
        yield Problem("phases", problem if problem.isprintable() else quoted(problem))
    phases = sorted(record.phases.items(), key=lambda item: item[1])
    for layer in record.layers:
        if layer.phase != phase_of(layer.layer, dict(phases)):
            place = phase_of(layer.layer, dict(phases))
            yield Problem(
                f"layer {layer.layer}", f"its phase is {quoted(layer.phase)}, and the phase map says {place!r}"
            )


# --- certificate -----------------------------------------------------------------------------------------------


def _certificate_problems(record: Record) -> Iterator[Problem]:
    epsilon = max(EPSILON.get(record.provenance.dtype, EPSILON["bfloat16"]), SINGLE_EPSILON)
    allowed = tolerances(record.model.layers, epsilon)
    identities = record.certificate.identities
    for name in allowed:
        if name not in identities and name not in OPTIONAL:
            yield Problem(f"certificate, {name}", "the identity is missing")
    for name, identity in identities.items():
        where = f"certificate, {name if name in allowed else quoted(name)}"
        if not 0 <= identity.error <= identity.tolerance:
            yield Problem(
                where,
                f"its error is {quoted(identity.error)}, and {quoted(identity.tolerance)} is tolerated: what was "
                f"measured is not what went through the model",
            )
        most = allowed.get(name, max(allowed.values()))
        if identity.tolerance > most * (1 + WRITTEN):
            yield Problem(where, f"it tolerates {quoted(identity.tolerance)}, more than {quoted(most)}")


# --- calibration and provenance --------------------------------------------------------------------------------


def _calibration_problems(record: Record) -> Iterator[Problem]:
    texts = record.calibration
    # The user's own file may be called as a bundled set is; only the bundled sets have these settings.
    seed = texts.name == "seed" and record.provenance.settings.get("drop_first_token") is True
    core = texts.name in CORES and texts.bytes_per_document == CORE_BYTES
    before = texts.name == "core" and texts.tokens_per_document == EARLIER_CORE_TOKENS and texts.first is None
    if record.schema_version == SCHEMA and (core or before or seed):
        known = (EARLIER_CORE, None) if before else _bundled(texts.name, texts.first if core else None)
        expected, assignment = known
        if texts.sha256 != expected:
            yield Problem(
                "calibration.sha256",
                f"{quoted(texts.sha256[:12])} is not that of {texts.name}, {expected[:12]}: these are other texts",
            )
        elif assignment is not None and record.resampling.assignment not in {None, assignment}:
            yield Problem("resampling.assignment", f"it is not that of the {record.resampling.unit}s of {texts.name}")


@lru_cache
def _bundled(name: str, first: int | None) -> tuple[str, str]:
    """Return the hashes of the texts of a bundled set, and of its units."""
    calibration = load_calibration(name, first if first is None or first > 0 else None)
    return calibration.sha256, calibration.units.sha256


def _provenance_problems(record: Record) -> Iterator[Problem]:
    provenance = record.provenance
    hashes = {
        "calibration.sha256": record.calibration.sha256,
        "model.fingerprint": record.model.fingerprint,
        "provenance.cache_key": provenance.cache_key,
    }
    if record.resampling.assignment is not None:
        hashes["resampling.assignment"] = record.resampling.assignment
    if record.arrays is not None:
        hashes["arrays.sha256"] = record.arrays.sha256
        if Path(record.arrays.file).name != record.arrays.file or record.arrays.file in {"", ".", ".."}:
            yield Problem("arrays.file", f"{quoted(record.arrays.file)} is not the name of a file beside the record")
    for name, digits in hashes.items():
        if not _SHA256.fullmatch(digits):
            yield Problem(name, f"{quoted(digits)} is no SHA-256")
    for where, amounts in (("seconds", provenance.seconds), ("peak_memory_bytes", provenance.peak_memory_bytes)):
        for name, amount in amounts.items():
            if not 0 <= amount < LARGEST_COUNT:
                yield Problem(f"provenance.{where}", f"{quoted(name)} has {quoted(amount)}")
    yield from _setting_problems(record)
    stream = provenance.stream
    if stream is not None and not (1 <= stream.shards < LARGEST_COUNT and 0 <= stream.largest_bytes < LARGEST_COUNT):
        yield Problem("provenance.stream", f"{quoted(stream.shards)} shards of {quoted(stream.largest_bytes)} bytes")
    chosen = provenance.settings.get("variants")
    for name, version in chosen.items() if isinstance(chosen, dict) else ():
        if record.variants.get(name, version) != version:
            yield Problem(
                "provenance.settings.variants", f"{quoted(name)} has version {quoted(version)}, and not above"
            )
    git = provenance.git or {}
    if not isinstance(git.get("commit", ""), str) or not isinstance(git.get("dirty", False), bool):
        yield Problem("provenance.git", f"{quoted(git)} is no commit")
    try:
        created = datetime.strptime(provenance.created, UTC_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        yield Problem("provenance.created", f"{quoted(provenance.created)} is no date like 2026-01-31T12:00:00Z")
        return
    now = datetime.now(UTC)
    if created > now + AHEAD:
        yield Problem("provenance.created", f"{provenance.created} lies in the future: it is {now:{UTC_FORMAT}}")


def _setting_problems(record: Record) -> Iterator[Problem]:
    """Yield where the settings of a measurement are not those that the rest of the record tells of."""
    texts, settings, dtype = record.calibration, record.provenance.settings, record.provenance.dtype
    if dtype not in EPSILON:
        yield Problem("provenance.dtype", f"{quoted(dtype)} is none of {', '.join(EPSILON)}")
    if texts.chat_template is not None and settings.get("chat_template", texts.chat_template) != texts.chat_template:
        chosen = quoted(settings["chat_template"])
        yield Problem("calibration.chat_template", f"it is {texts.chat_template}, and {chosen} among the settings")
    drops = settings.get("drop_first_token")
    if drops is True and (texts.dropped < 1 or record.sinks.position_zero > 0):
        yield Problem("provenance.settings.drop_first_token", "it is True, and first tokens were kept")
    if drops is False and texts.dropped > 0:
        yield Problem("calibration.dropped", f"{texts.dropped} tokens, and by the settings none was dropped")
