"""The runs that are killed: what each starts from, and what must hold of the files at any moment of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from delta_suite.claims.loader import load_hypotheses
from delta_suite.publish.board import build
from delta_suite.publish.leaderboard import files
from delta_suite.records.cache import Cache
from delta_suite.records.store import load, stamps
from delta_suite.regression.baseline import load_baseline
from delta_suite.writing import PREFIX

from tests.tiny import make_tiny
from tests.tiny_claims import NO_FAILURE

MEASURE = ("delta-suite", "measure", "--calibration=docs.jsonl", "--device=cpu")
PYTEST = ("pytest", "hypotheses", "-q", "-p", "no:cacheprovider", "--calibration=docs.jsonl", "--device=cpu")
UPDATE = (*PYTEST, "--baseline=own.json")


@dataclass(frozen=True)
class Scenario:
    """A run that is killed, and then done again."""

    name: str
    share: float
    """Share of all points."""
    words: tuple[str, ...]
    start: Callable[[Path, Path], None]
    """Function that makes the project of the run from the folder of what was prepared."""
    check: Callable[[Path], object]
    """Function that raises where the files are neither those of before the run nor those of after it."""
    processes: bool = False
    """True if the run starts processes of its own, so that it cannot be forked."""


def prepare(root: Path, run: Callable[[Path, tuple[str, ...]], None]) -> Path:
    """Make two tiny models, measure both, write a baseline and a leaderboard of the first, and return their project."""
    project = root / "prepared"
    make_tiny(project / "model", layers=4, hidden=32, seed=0)
    make_tiny(project / "other", layers=4, hidden=32, seed=1)
    prompts = [f"{word} is one of the words that a model of any size has read often." for word in WORDS]
    lines = [json.dumps({"id": f"d{index}", "text": text}) for index, text in enumerate(prompts)]
    (project / "docs.jsonl").write_text("\n".join(lines))
    (project / "hypotheses").mkdir()
    (project / "hypotheses" / "claims.toml").write_text(NO_FAILURE)
    run(project, (*MEASURE, "./model"))
    run(project, ("delta-suite", "leaderboard"))
    run(project, (*UPDATE, "--model=./model", "--baseline-update"))
    run(project, (*MEASURE, "./other", "--results-dir=later"))
    return project


WORDS = ("Tide", "Granite", "Harvest", "Lantern", "Market", "Orbit", "Quarry", "Silence", "Timber", "Violin")


def _without(*names: str) -> Callable[[Path, Path], None]:
    def start(prepared: Path, project: Path) -> None:
        shutil.copytree(prepared, project, ignore=lambda folder, _: names if Path(folder) == prepared else ())

    return start


def _with_a_later_record(prepared: Path, project: Path) -> None:
    _without()(prepared, project)
    shutil.copytree(project / "later" / "runs", project / "results" / "runs", dirs_exist_ok=True)


def records_are_whole(project: Path) -> None:
    """Read every record with its arrays, and what judged it."""
    for path in sorted((project / "results" / "runs").glob("*/*.json")):
        _ = load(path).content()
        stamps(path)


def entry_is_there(project: Path) -> None:
    """Read every entry of the cache."""
    records_are_whole(project)
    cache = Cache(project / "cache")
    keys = {folder.name.partition("-")[0] for folder in (cache.root / "measurements").iterdir()}
    entries = [cache.get(key) for key in keys if not key.startswith(".")]
    assert len(entries) >= 2, "an entry is lost"
    assert None not in entries, "an entry is half there"


def baseline_is_whole(project: Path) -> None:
    """Read the baseline with its arrays and directions, which are of one model."""
    file = load_baseline(project / "own.json")
    assert file.content.model.name in ("model", "other")
    assert file.directions, "the directions are lost"


def pages_are_old_or_new(project: Path) -> None:
    """Compare each published file with what it was, and with what the records make of it."""
    os.chdir(project)
    board = build(Path("results"), load_hypotheses([Path("hypotheses")]))
    for name, new in files(board):
        path, before = project / "results" / name, project.parent / "prepared" / "results" / name
        now = path.read_bytes() if path.exists() else None
        assert now in (new, before.read_bytes() if before.exists() else None), f"{name} is neither old nor new"


def litter(project: Path) -> list[str]:
    """Return what a run left that it should have taken away: temporary folders, and parts under staged names."""
    left = {path for path in project.rglob("*.safetensors") if len(path.name.split(".")[-2]) == 16}
    entries = list((project / "cache" / "measurements").iterdir())
    left |= {entry for entry in entries for other in entries if entry.name.startswith(f"{other.name}-")}
    return sorted(str(path.relative_to(project)) for path in left | set(project.rglob(f"{PREFIX}*")))


SCENARIOS = (
    Scenario(
        "measure a model", 0.2, (*MEASURE, "./model"), _without("cache", "results", "own.json"), records_are_whole
    ),
    Scenario("measure anew, --fresh", 0.15, (*MEASURE, "./other", "--fresh"), _without("results"), entry_is_there),
    Scenario("measure, from the cache", 0.1, (*MEASURE, "./other"), _without("results"), entry_is_there),
    Scenario(
        "update a baseline",
        0.2,
        (*UPDATE, "--model=./other", "--baseline-update=all", "--baseline-reason=meant"),
        _without(),
        baseline_is_whole,
    ),
    Scenario("leaderboard", 0.2, ("delta-suite", "leaderboard"), _with_a_later_record, pages_are_old_or_new),
    Scenario(
        "pytest -n 2",
        0.15,
        (*PYTEST, "-n", "2", "--model=./model", "--model=./other"),
        _without("results"),
        entry_is_there,
        processes=True,
    ),
)
