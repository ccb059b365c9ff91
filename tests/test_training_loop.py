"""Measuring while a model is trained: training stays as it was, trackers get the numbers, a flip warns or stops."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import delta_suite as ds
import numpy as np
import pytest
import torch
from delta_suite.claims.gates import MIN_DOCUMENTS
from delta_suite.errors import BaselineError, CalibrationError, HypothesisFileError, OptionError, RecordError
from delta_suite.regression.update import update_baseline
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from tests import apart

EXAMPLE = Path(__file__).parents[1] / "examples" / "training_loop.py"

CLAIMS = """
schema = 1
id = "writes"
title = "The blocks write something"
version = 1
rationale = "Claims that hold of every model, or of none."

[[expect]]
id = "all-write"
metric = "update_norm"
scope = "model"
op = ">"
threshold = 0.0
rationale = "Every block adds something."
origin = "Of the tests."

[[expect]]
id = "a-huge-rank"
metric = "effective_rank"
scope = "model"
op = ">"
threshold = 20.0
rationale = "Far more than random weights have."
origin = "Of the tests."
"""

TEXTS = [f"{topic} holds {index} facts." for index, topic in enumerate(sorted(topics)[:MIN_DOCUMENTS])]
"""As many as a claim needs to be decided."""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example script, as a module."""
    spec = importlib.util.spec_from_file_location("training_loop_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(example: ModuleType) -> Any:
    return example.trained_tokenizer(TEXTS)


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    path = tmp_path / "writes.toml"
    path.write_text(CLAIMS)
    return path


def model_with_dropout() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "n_positions": 256, "n_embd": 32, "n_layer": 4, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2))


def trainer(
    folder: Path, tokenizer: Any, *callbacks: TrainerCallback, steps: int = 4, save: str = "no", **options: Any
) -> Trainer:
    draws = torch.Generator().manual_seed(1)
    rows = [torch.randint(512, (16,), generator=draws) for _ in range(40)]
    model = options.pop("model", None) or model_with_dropout()
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=2,
        save_strategy=save,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def everything(trained: Any) -> dict[str, Any]:
    """What a training leaves behind: weights, the state of the optimiser, and random states."""
    moments = trained.optimizer.state_dict()["state"]
    return {
        **trained.model.state_dict(),
        **{f"{index}/{name}": value for index, state in moments.items() for name, value in state.items()},
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
        "python": torch.tensor(random.getstate()[1]),
    }


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- the Trainer ---------------------------------------------------------------------------------------------------


def test_training_is_the_same_to_the_bit(tmp_path: Path, tokenizer: Any, claims: Path) -> None:
    """Weights, optimiser, random states and losses, with dropout and a shuffled order of the data."""
    plain = trainer(tmp_path, tokenizer)
    plain.train()
    expected = copy.deepcopy(everything(plain))
    watched = trainer(tmp_path, tokenizer, ds.DeltaCallback(every=3, hypotheses=claims, texts=TEXTS))
    watched.train()
    assert_equal(everything(watched), expected)
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (plain, watched)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert watched.model.training
    assert sum("delta/flips" in entry for entry in watched.state.log_history) == 1


class Tracker(TrainerCallback):
    """Stands where a tracker of `report_to` stands: before the user's callbacks."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logged.append((state.global_step, dict(logs)))


def test_trackers_get_the_numbers(
    tmp_path: Path, tokenizer: Any, claims: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker()
    callback = ds.DeltaCallback(every=4, hypotheses=claims, texts=TEXTS, metrics=["effective_rank"])
    trainer(tmp_path, tokenizer, tracker, callback).train()
    numbers = {step: logs for step, logs in tracker.logged if "delta/flips" in logs}
    assert sorted(numbers) == [4]
    assert [step for step, logs in tracker.logged if "loss" in logs] == [2, 4]  # of the same step, too
    assert {"delta/C/effective_rank", "delta/margin/writes/all-write", "delta/training_steps"} <= numbers[4].keys()
    assert numbers[4]["delta/verdict/writes/all-write"] == 1.0
    assert numbers[4]["delta/verdict/writes/a-huge-rank"] == -1.0
    assert all(isinstance(number, float) for number in numbers[4].values())
    assert "delta-suite at step 4: 1 PASS, 1 FAIL. Measuring took " in (shown := capsys.readouterr().err)
    assert " training steps (" in shown
    assert "% at every=4)" in shown


def test_it_measures_at_each_save_and_keeps_records(tmp_path: Path, tokenizer: Any, claims: Path) -> None:
    callback = ds.DeltaCallback(
        every="save", hypotheses=claims, texts=TEXTS, name="small", results=tmp_path / "results"
    )
    trainer(tmp_path, tokenizer, callback, save="steps", steps=2).train()
    names = [measurement.name for measurement in ds.load_results(tmp_path / "results")]
    assert names == ["small@step2"]
    assert ds.load_results(tmp_path / "results")[0].record.model.series == ("small@step*", 2)


@pytest.fixture(scope="module")
def baseline_files(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with the claims, and the baseline of the untrained model, which a monitor wrote."""
    folder = tmp_path_factory.mktemp("baseline")
    (folder / "writes.toml").write_text(CLAIMS)
    path = folder / "baseline.json"
    monitor = ds.DeltaMonitor(
        tokenizer=tokenizer,
        hypotheses=folder / "writes.toml",
        texts=TEXTS,
        baseline=path,
        baseline_update=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTA_SUITE_CACHE", str(folder / "cache"))
        reading = monitor.measure(model_with_dropout(), 0)
    assert reading is not None
    assert reading.flips == reading.drifted == ()
    return folder


@pytest.fixture
def baseline(baseline_files: Path, tmp_path: Path) -> Path:
    """A copy of the baseline, to edit."""
    for path in baseline_files.glob("baseline*"):
        shutil.copy(path, tmp_path)
    return tmp_path / "baseline.json"


def flipped(path: Path, **keys: Any) -> Path:
    """A baseline in which a claim was refuted, which is supported now."""
    content = json.loads(path.read_text("utf-8"))
    content["verdicts"]["writes/all-write"]["verdict"] = "FAIL"
    path.write_text(json.dumps(content | keys), "utf-8")
    return path


def test_a_flip_warns_and_training_goes_on(tmp_path: Path, tokenizer: Any, claims: Path, baseline: Path) -> None:
    flipped(baseline)
    callback = ds.DeltaCallback(every=3, hypotheses=claims, texts=TEXTS, baseline=baseline)
    run = trainer(tmp_path, tokenizer, callback)
    with pytest.warns(UserWarning, match=r"at step 3: writes/all-write: FAIL -> PASS\."):
        run.train()
    assert run.state.global_step == 4
    last = [entry for entry in run.state.log_history if "delta/flips" in entry][-1]
    assert last["delta/flips"] == 1
    assert last["delta/drifted"] > 0  # it has learnt


@pytest.mark.filterwarnings("ignore:delta-suite at step")
def test_a_flip_stops_and_what_was_trained_is_saved(
    tmp_path: Path, tokenizer: Any, claims: Path, baseline: Path
) -> None:
    flipped(baseline)
    callback = ds.DeltaCallback(every=1, hypotheses=claims, texts=TEXTS, baseline=baseline, on_flip="stop")
    run = trainer(tmp_path, tokenizer, callback, save="epoch")
    run.train()
    assert run.state.global_step == 1
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").exists()


def test_an_expected_flip_is_none(tmp_path: Path, tokenizer: Any, claims: Path, baseline: Path) -> None:
    xfail = {"verdict/writes/*": "the claim was wrong", "layers/*": "it learns"}
    flipped(baseline, xfail=xfail)
    monitor = ds.DeltaMonitor(tokenizer=tokenizer, hypotheses=claims, texts=TEXTS, baseline=baseline)
    reading = monitor.measure(model_with_dropout(), 1)
    assert reading is not None
    assert reading.flips == ()


def test_a_baseline_of_other_texts_is_told_and_the_numbers_stay(
    tmp_path: Path, tokenizer: Any, claims: Path, baseline: Path
) -> None:
    monitor = ds.DeltaMonitor(tokenizer=tokenizer, hypotheses=claims, texts=TEXTS[1:], baseline=baseline)
    with pytest.warns(UserWarning, match=r"cannot be compared with: the calibration is another"):
        reading = monitor.measure(model_with_dropout(), 1)
    assert reading is not None
    assert "delta/margin/writes/all-write" in reading.scalars
    assert "delta/drifted" not in reading.scalars


def test_a_baseline_of_the_saved_checkpoint_is_met_in_memory(tmp_path: Path, tokenizer: Any, claims: Path) -> None:
    model = model_with_dropout()
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    saved = ds.measure(tmp_path / "checkpoint", texts=TEXTS, parts="spectra", device="cpu")
    update_baseline(tmp_path / "saved.json", saved.view, {})
    monitor = ds.DeltaMonitor(tokenizer=tokenizer, hypotheses=claims, texts=TEXTS, baseline=tmp_path / "saved.json")
    reading = monitor.measure(model, 1)
    assert reading is not None
    assert reading.scalars["delta/drifted"] == 0
    assert reading.measurement.record.layers == saved.record.layers


# --- what fails ----------------------------------------------------------------------------------------------------


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("the device is on fire")


def test_a_measurement_that_fails_warns_and_training_goes_on(
    tmp_path: Path, tokenizer: Any, claims: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer(tmp_path, tokenizer)
    plain.train()
    expected = copy.deepcopy(everything(plain))
    monkeypatch.setattr("delta_suite.reduction.passes.Passes.run", fail)
    run = trainer(tmp_path, tokenizer, ds.DeltaCallback(every=2, hypotheses=claims, texts=TEXTS))
    with pytest.warns(
        UserWarning, match=r"at step \d: .*the device is on fire[^\n]*\n(.*\n)?  Training goes on\."
    ) as told:
        run.train()
    assert [str(each.message).partition(":")[0] for each in told] == ["delta-suite at step 2", "delta-suite at step 4"]
    assert run.state.global_step == 4
    assert_equal(everything(run), expected)


def test_it_raises_where_that_is_wanted(
    tmp_path: Path, tokenizer: Any, claims: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delta_suite.reduction.passes.Passes.run", fail)
    callback = ds.DeltaCallback(every=2, hypotheses=claims, texts=TEXTS, on_error="raise")
    with pytest.raises(RuntimeError, match="the device is on fire"):
        trainer(tmp_path, tokenizer, callback).train()


def test_without_a_tokenizer_the_trainer_is_not_made(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(OptionError, match=r"DeltaCallback has no tokenizer: pass tokenizer=\.\.\., or pro"):
        trainer(tmp_path, None, ds.DeltaCallback(texts=TEXTS))
    assert trainer(tmp_path, None, ds.DeltaCallback(texts=TEXTS, tokenizer=tokenizer))


def test_a_callback_that_is_added_later_is_asked_at_the_start(tmp_path: Path) -> None:
    run = trainer(tmp_path, None)
    run.add_callback(ds.DeltaCallback(texts=TEXTS))
    with pytest.raises(OptionError, match="has no tokenizer"):
        run.train()


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_a_sharded_trainer_is_refused(
    tmp_path: Path, tokenizer: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer says of itself that it shards; FSDP itself wants a GPU."""
    create = Trainer.create_accelerator_and_postprocess

    def sharding(self: Trainer) -> None:
        create(self)
        setattr(self, f"is_{kind}_enabled", True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharding)
    with pytest.raises(OptionError, match=r"sharded by (FSDP|DeepSpeed)\. Leave it out, and measure the saved check"):
        trainer(tmp_path, tokenizer, ds.DeltaCallback(texts=TEXTS))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"every": 0}, OptionError, 'every=0: give a number of steps from 1, or "save"'),
        ({"every": "epoch"}, OptionError, "every='epoch'"),
        ({"on_flip": "explode"}, OptionError, "on_flip='explode': use 'warn' or 'stop'"),
        ({"on_flip": "stop"}, OptionError, 'on_flip="stop" needs a baseline'),
        ({"on_error": "ignore"}, OptionError, "on_error='ignore'"),
        ({"metrics": ["effective_rnak"]}, OptionError, "metrics: 'effective_rnak' is unknown"),
        ({"variant": "sinkfree"}, OptionError, "variant 'sinkfree' is unknown"),
        ({"texts": []}, CalibrationError, "texts holds no text"),
        ({"texts": ["a text"], "calibration": "seed"}, OptionError, "only one can be measured on"),
        ({"baseline": "no-such.json"}, BaselineError, "no baseline no-such.json. Write it from a checkpoint"),
        ({"hypotheses": "no-such.toml"}, HypothesisFileError, "no-such.toml"),
        ({"results": "/dev/null/results"}, RecordError, "/dev/null/results/runs cannot be written: Not a directory"),
        (
            {"baseline": "/dev/null/run.json", "baseline_update": True},
            RecordError,
            "/dev/null cannot be written: Not a directory",
        ),
    ],
)
def test_options_are_checked_before_training(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        ds.DeltaMonitor(**options)
    assert says in str(raised.value)


# --- a loop of one's own -------------------------------------------------------------------------------------------


def loop(monitor: Callable[[Any, int], Any] | None) -> tuple[Any, list[Any]]:
    """Train by hand, and call the monitor while gradients are held."""
    random.seed(0)
    np.random.seed(0)
    model = model_with_dropout()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    readings = []
    for step in range(1, 5):
        batch = torch.randint(512, (4, 16))
        model(input_ids=batch, labels=batch).loss.backward()
        if monitor is not None:
            readings.append(monitor(model, step))
        optimizer.step()
        optimizer.zero_grad()
    return type("Trained", (), {"model": model, "optimizer": optimizer}), readings


def test_a_loop_by_hand_is_the_same_to_the_bit(tokenizer: Any, claims: Path, own_cache: Path) -> None:
    expected = copy.deepcopy(everything(loop(None)[0]))
    trained, readings = loop(ds.DeltaMonitor(tokenizer=tokenizer, every=3, hypotheses=claims, texts=TEXTS))
    assert_equal(everything(trained), expected)
    assert [reading and reading.step for reading in readings] == [None, None, 3, None]
    assert readings[2].steps > 0
    assert readings[2].measurement.layers("effective_rank")
    assert not readings[2].stops
    assert list(own_cache.iterdir()) == []  # the directions of a model that never comes again are large


def test_without_a_baseline_a_flip_is_against_the_measurement_before(tokenizer: Any, claims: Path) -> None:
    model = model_with_dropout()
    norm = ds.measure(model, tokenizer=tokenizer, texts=TEXTS, parts="spectra").value("update_norm")
    claims.write_text(CLAIMS.replace("threshold = 0.0", f"threshold = {2 * norm}"))
    monitor = ds.DeltaMonitor(tokenizer=tokenizer, hypotheses=claims, texts=TEXTS)
    assert monitor.measure(model, 1).flips == ()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    with pytest.warns(UserWarning, match="writes/all-write: FAIL -> PASS"):
        assert monitor.measure(model, 2).flips == ("writes/all-write: FAIL -> PASS",)


def test_another_kind_of_model_is_refused_at_the_first_step(tokenizer: Any) -> None:
    monitor = ds.DeltaMonitor(tokenizer=tokenizer, every=100, texts=TEXTS)
    with pytest.raises(ds.SuiteError, match="is no transformers model"):
        monitor(torch.nn.Linear(2, 2), 1)


# --- several processes ---------------------------------------------------------------------------------------------


def trained_in_three_ways(folder: Path, rank: int) -> None:
    """Train in one of several processes: without the callback, with it, and until it stops; keep what came of each."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def trained(**options: Any) -> dict[str, Any]:
        callback = ds.DeltaCallback(hypotheses=folder / "writes.toml", texts=TEXTS, **options)
        run = trainer(folder, tokenizer, *([callback] if options else []), steps=3, ddp_backend="gloo")
        run.train()
        measured = sum("delta/flips" in entry for entry in run.state.log_history)
        return {"step": run.state.global_step, "measured": measured, "weights": run.model.state_dict()}

    runs = {
        "plain": trained(),
        "watched": trained(every=2),
        "stopped": trained(every=1, baseline=folder / "baseline.json", on_flip="stop"),
    }
    torch.save(runs, folder / f"{rank}.pt")


def test_of_two_processes_one_measures_and_both_stop(
    tmp_path: Path, tokenizer: Any, claims: Path, baseline: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flipped(baseline)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        apart.start(trained_in_three_ways, tmp_path, rank, RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank in range(2)
    ]
    ended = [process.ended(600) for process in processes]
    assert [each.code for each in ended] == [0, 0], ended
    runs = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for run in runs:
        assert_equal(run["watched"]["weights"], run["plain"]["weights"])
        assert {name: each["step"] for name, each in run.items()} == {"plain": 3, "watched": 3, "stopped": 1}
    assert [run["watched"]["measured"] for run in runs] == [1, 0]


# --- the example ---------------------------------------------------------------------------------------------------


def test_the_example_runs(
    example: ModuleType,
    tmp_path: Path,
    claims: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = ["--layers=6", "--hidden=16", "--batch=2", "--steps=4", "--every=2", "--documents=6"]
    places = [f"--output={tmp_path}/run", f"--baseline={tmp_path}/b.json", f"--hypotheses={claims}"]
    chapters = example.language_reference()
    monkeypatch.setattr(example, "language_reference", lambda: chapters[:10])
    run = example.main([*size, *places])
    assert run.state.global_step == 4
    assert (tmp_path / "b.json").exists()
    assert "step 4: delta/C/effective_rank" in capsys.readouterr().out
