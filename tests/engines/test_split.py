"""One calibration over several workers: the same bits for any number of them, whatever was lost, as in one piece."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.capture import plan
from delta_suite.engine import choice
from delta_suite.engine.work import work_list
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Outcome, Settings, measure_all
from delta_suite.records.cache import Cache
from delta_suite.split import measure_split

from tests.engines.conftest import Project, differences, figures
from tests.engines.here import Here, OneIsKilled

UNITS = 12
"""The number of units of work: one for each document of `core`, as each has a domain of its own."""

PARTS = frozenset({"spectra", "boundaries", "law"})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Return a function that gives settings with results and a cache of their own, by name."""

    def of(name: str, *, split: bool = True) -> Settings:
        return Settings(
            documents=UNITS,
            device="cpu",
            parts=PARTS,
            results=tmp_path / name,
            cache=Cache(tmp_path / f"{name}-cache"),
            split_calibration=split,
        )

    return of


def measured(workers: Any, settings: Settings, model: Path) -> Outcome:
    """Measure a model on workers."""
    work = work_list([ModelSpec(name="model", path=model)], [settings.calibration])
    ((_, outcome),) = measure_split(workers, work, settings)
    assert isinstance(outcome, Outcome), outcome
    return outcome


def test_any_number_of_workers_gives_the_same_bits(
    checkpoints: Path, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    model = checkpoints / "step-1"
    one = measured(Here(1), settings("one"), model)
    measured(Here(3), settings("three"), model)  # the sums arrive in another order; test_ray_cluster.py has three, too
    two = measured(OneIsKilled(2, str(tmp_path / "mark")), settings("two"), model)
    assert "model: measured after 1 worker was lost" in two.notes
    assert not differences(figures(tmp_path / "one"), figures(tmp_path / "two"))
    assert not differences(figures(tmp_path / "one"), figures(tmp_path / "three"))
    assert "law.transfer" in one.view.content()  # the law was fitted
    assert one.view.record.provenance.settings["work_units"] == UNITS
    assert not (tmp_path / "one-cache" / "sums").exists() or not list((tmp_path / "one-cache" / "sums").iterdir())


def test_sums_that_are_gone_or_damaged_are_formed_again(
    checkpoints: Path, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    def interrupt(name: str, number: int) -> None:
        if (name, number) == ("sum_unit", 5):
            raise KeyboardInterrupt

    model = checkpoints / "step-1"
    with pytest.raises(KeyboardInterrupt):
        measured(Here(1, interrupt), settings("again"), model)
    (folder,) = (tmp_path / "again-cache" / "sums").iterdir()
    first, second, *others = sorted(folder.iterdir())
    assert len(others) == 3
    shutil.rmtree(first)
    (second / "layer-0001.safetensors").write_bytes(b"damaged")
    again = Here(1)
    measured(again, settings("again"), model)
    assert again.ran.count("sum_unit") == UNITS - 3
    measured(Here(1), settings("one"), model)
    assert not differences(figures(tmp_path / "one"), figures(tmp_path / "again"))


@pytest.mark.parametrize(
    ("batch", "values", "bounds"),
    [
        # Other documents in a batch move states in the seventh digit, which bounds multiply by the number of groups.
        (None, 1e-6, 1e-4),
        # One sequence a batch: the states are the same, and only sums are formed in another order.
        (1, 1e-8, 1e-8),
    ],
)
def test_a_split_calibration_gives_the_figures_of_a_whole_one(
    batch: int | None,
    values: float,
    bounds: float,
    checkpoints: Path,
    settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if batch is not None:
        monkeypatch.setitem(plan.TOKENS_PER_BATCH, "cpu", batch)
    model = checkpoints / "step-2"
    measured(Here(1), settings("split"), model)
    work = work_list([ModelSpec(name="model", path=model)], [settings("whole").calibration])
    ((_, outcome),) = measure_all(work, settings("whole", split=False))
    assert isinstance(outcome, Outcome), outcome
    split, whole = (figures(tmp_path / name)["model"] for name in ("split", "whole"))
    for part in ("layers", "scopes"):
        here, there = numbers(split[part]), numbers(whole[part])
        assert here.keys() == there.keys()
        for place, value in there.items():
            replicated = "/interval/" in place or place.endswith("/corrected")
            apart = abs(here[place] - value) / max(1.0, abs(value))
            assert apart < (bounds if replicated else values), (place, value, here[place])
    for part in ("model", "calibration", "resampling", "phases", "parts", "variants"):
        assert split[part] == whole[part]
    counts = ("position_zero", "large_norm", "ratio")
    assert [split["sinks"][name] for name in counts] == [whole["sinks"][name] for name in counts]


def numbers(part: Any, place: str = "") -> dict[str, float]:
    """Return every number of a part of a record, by its place."""
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    out = {name: value for key, item in items for name, value in numbers(item, f"{place}/{key}").items()}
    return {place: float(part)} if isinstance(part, int | float) and not isinstance(part, bool) else out


def test_an_error_is_told_once_and_ends_its_model_alone(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Here(2)
    monkeypatch.setattr(choice, "chosen_workers", lambda *_, **__: workers)
    from safetensors.torch import load_file, save_file

    weights = project.path / "run" / "step-1" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.2.mlp.down_proj.weight"][:] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    parts = "--parts=spectra,boundaries,damage"
    words = ("run/step-[12]", "--device=cpu", f"--documents={UNITS}", parts, "--split-calibration")
    ended = project.suite("measure", *words)
    assert ended.code == 1
    told = ended.err.splitlines()
    assert told[0].endswith("not measured with --split-calibration, whose workers bring sums of updates: damage.")
    assert ended.err.count("run--step-1 cannot be measured: the residual stream is not finite") == 1
    assert workers.ran.count("sum_unit") == 2 + UNITS  # of the first model only those that were under way
    assert "record: results/runs/run--step-2/" in ended.out
    again = project.suite("measure", *words[1:], "run/step-2")
    assert "(from the cache)" in again.out
    forecast = project.suite("measure", *words[1:], "run/step-2", "--dry-run")
    assert "nothing: every part is in the cache" in forecast.out
    whole = project.suite("measure", *words[1:-2], "run/step-2", "--dry-run")
    assert "nothing of it is in the cache" in whole.out  # a measurement in one piece is another one


def test_a_part_is_added_to_what_the_cache_holds(
    checkpoints: Path, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    model, workers = checkpoints / "step-1", Here(1)

    def parts(*names: str) -> tuple[str, ...]:
        """Measure these parts, and return those of the record."""
        return measured(workers, replace(settings("parts"), parts=frozenset(names)), model).view.record.parts

    assert parts("spectra") == ("spectra",)
    assert parts("spectra", "boundaries") == ("spectra", "boundaries")  # from what the record holds
    assert workers.ran.count("sum_unit") == UNITS
    assert set(parts("spectra", "law")) == {"spectra", "boundaries", "law"}  # from sums that were not kept
    assert workers.ran.count("sum_unit") == 2 * UNITS
    assert set(parts(*PARTS)) == set(PARTS)
    assert workers.ran.count("sum_unit") == 2 * UNITS
