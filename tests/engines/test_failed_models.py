"""A model that could not be measured keeps no memory, although its error is kept."""

import gc
import traceback
import weakref
from pathlib import Path
from typing import Any

import pytest
from delta_suite.engine.work import Item
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import chosen_settings, measure_all
from delta_suite.reduction.passes import Passes


@pytest.mark.parametrize("chained", [False, True])
def test_the_error_of_a_failed_model_holds_no_weights(
    chained: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []

    def fail(self: Passes, *_: Any, **__: Any) -> None:
        model = self.capture.model
        models.append(weakref.ref(model))
        try:
            raise MemoryError("there is no room")
        except MemoryError as error:
            raise RuntimeError("it failed") from (error if chained else None)

    monkeypatch.setattr(Passes, "run", fail)
    settings = chosen_settings(device="cpu", documents=2, results=tmp_path)
    ((_, error),) = measure_all([Item(ModelSpec(name="tiny", path=tiny), "core")], settings)
    gc.collect()
    assert isinstance(error, RuntimeError)
    assert traceback.extract_tb(error.__traceback__)[-1].name == "fail"  # the place is still told
    assert models[0]() is None
