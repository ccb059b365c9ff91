"""A results folder of records that were measured, and then changed in one respect each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from delta_suite.claims.loader import load_hypotheses
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure
from delta_suite.publish.board import Board, build
from delta_suite.publish.entries import Entry
from delta_suite.records import store
from delta_suite.records.arrays import pack, unpack
from delta_suite.records.cache import Cache

from tests.publish.browser import CHROMIUM

HYPOTHESES = Path(__file__).parents[2] / "hypotheses"
CREATED = "2026-11-24T10:00:00Z"

Change = Callable[[dict[str, Any]], object]


Arrays = dict[str, np.ndarray]


class Measured(NamedTuple):
    """A record as JSON, and its arrays."""

    record: dict[str, Any]
    arrays: Arrays


@pytest.fixture(scope="package", autouse=True)
def open_door() -> Iterator[None]:
    """Let records pass that were changed in one respect; what the door refuses is tested in tests/records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "problems", lambda *_: [])
        patch.setattr(store, "place_problems", lambda *_: [])
        yield


@pytest.fixture(scope="session")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A record of a tiny Llama of 12 layers, as JSON, and its arrays."""
    root = tmp_path_factory.mktemp("measured")
    settings = Settings(calibration="seed", results=root, device="cpu", cache=Cache(root / "cache"))
    path = measure(ModelSpec(name="tiny", path=tiny), settings).path
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    record["provenance"]["created"] = CREATED
    return Measured(record, unpack(path.with_suffix(".safetensors").read_bytes(), path))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-site")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@dataclass(frozen=True)
class Place:
    """A folder with hypotheses/ and results/, as a repository has them."""

    root: Path
    measured: Measured

    @property
    def results(self) -> Path:
        return self.root / "results"

    def add(
        self,
        model: str = "tiny",
        file: str = "20261124T100000Z-00000000",
        change: Change = lambda record: 0,
        arrays: Callable[[Arrays], object] | None = lambda arrays: 0,
    ) -> Path:
        """Write a record of this model and its arrays, each changed in place; None for a record without arrays."""
        record, content = deepcopy(self.measured)
        record["model"]["name"] = model
        path = self.results / "runs" / model.replace("/", "--") / f"{file}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".safetensors")
        if arrays is not None:
            arrays(content)
            beside.write_bytes(pack(content))
        record["arrays"] = {"file": beside.name, "sha256": sha256(pack(content)).hexdigest()}
        change(record)
        path.write_text(json.dumps(record), "utf-8")
        return path

    def board(self, repository: str | None = None, **options: Any) -> Board:
        return build(self.results, load_hypotheses([self.root / "hypotheses"]), repository, **options)


@pytest.fixture
def place(measured: Measured, tmp_path: Path) -> Place:
    return make_place(tmp_path / "repository", measured)


def make_place(root: Path, measured: Measured) -> Place:
    shutil.copytree(HYPOTHESES, root / "hypotheses")
    return Place(root, measured)


# --- changes ---------------------------------------------------------------------------------------------------


def with_calibration(name: str, sha256: str) -> Change:
    return lambda record: record["calibration"].update(name=name, sha256=sha256)


def with_source(source: str) -> Change:
    return lambda record: record["model"].update(source=source)


def created(moment: str) -> Change:
    return lambda record: record["provenance"].update(created=moment)


def with_intervals(record: dict[str, Any]) -> None:
    """A tenth to each side of every layer metric, and around a corrected value a little above."""
    for layer in record["layers"]:
        for metrics in layer["metrics"].values():
            for estimate in metrics.values():
                if estimate.get("value") is not None:
                    value = estimate["value"]
                    spread = 0.1 * abs(value)
                    estimate.update(corrected=value + spread / 2, interval=[value - spread / 2, value + 1.5 * spread])


def checkpoint(step: int) -> Change:
    """Of the run `big`, with the step in its numbers so that the lines of a plot are known."""

    def change(record: dict[str, Any]) -> None:
        record["model"].update(name=f"big--checkpoint-{step}", source=f"directory:big/checkpoint-{step}")
        for scope in record["scopes"].values():
            for metrics in scope["metrics"].values():
                if metrics["intra_cosine"].get("value") is not None:
                    value = 1 / (1 + step)
                    metrics["intra_cosine"].update(value=value, interval=[0.8 * value, 1.1 * value])

    return change


def trained(step: int) -> Change:
    """Make a record a checkpoint with intervals."""
    return lambda record: (with_intervals(record), checkpoint(step)(record))


def turned(board: Board) -> Board:
    """The same board, where the first claim is supported before any training and refuted afterwards."""

    def turn(entry: Entry) -> Entry:
        verdict = "PASS" if entry.model.endswith("-0") else "FAIL"
        return replace(entry, rows=(replace(entry.rows[0], verdict=verdict), *entry.rows[1:]))

    groups = tuple(replace(group, entries=tuple(map(turn, group.entries))) for group in board.groups)
    return replace(board, groups=groups)


def with_boundaries(record: dict[str, Any]) -> None:
    """Boundaries that a record of one document has as well, but elsewhere."""
    metrics = {name: {"value": 0.021} for name in ("boundary_p", "boundary_cost_rank", "boundary_agreement")}
    boundary = {"detected": [3, 9], "declared": [2, 6, 9], "recurrence": [0.93, 0.71], "metrics": metrics}
    record["boundaries"] = {"raw": boundary}


def with_transfer(arrays: Arrays) -> None:
    """The matrix that the law's fit adds to the arrays."""
    index = np.arange(12)
    apart = np.abs(np.subtract.outer(index, index))
    arrays["law.transfer"] = np.where(apart == 0, 0.9, 0.3 - apart / 10).astype(np.float32)
