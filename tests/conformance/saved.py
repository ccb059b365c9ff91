"""`python -m tests.conformance.saved`: every architecture saved and loaded whole, and refused with a tensor off or on.

Each tiny model is saved as a user would, and must be accepted. Without its embedding, and with a tensor in a block that
nothing reads, it must be refused by that tensor's name. Prints what else happened, and the counts.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from delta_suite.errors import CaptureError, SuiteError
from delta_suite.models import loading
from delta_suite.models.blocks import find_decoder
from delta_suite.models.files import ModelFiles
from delta_suite.models.spec import ModelSpec
from safetensors.torch import load_file, save_file

from tests.conformance.build import Architecture, architectures, build


def outcome(folder: Path) -> str:
    """Return "accepted", or the message of the refusal."""
    spec = ModelSpec(name="x", path=folder)
    files = ModelFiles(folder, None, (folder / "model.safetensors",), ())
    try:
        loading.load(spec, files)
    except SuiteError as error:
        return str(error)
    return "accepted"


def embedding_name(model: Any, tensors: dict[str, torch.Tensor]) -> str | None:
    """Return the name in the file of the input embedding, found by its numbers."""
    try:
        weight = model.get_input_embeddings().weight
    except NotImplementedError:
        return None
    names = [name for name, tensor in tensors.items() if tensor.shape == weight.shape and torch.equal(tensor, weight)]
    return names[0] if len(names) == 1 else None


def examine(architecture: Architecture, folder: Path) -> list[tuple[str, str]]:
    """Return the trials of one architecture, each with what was wrong, or "" if all was right."""
    try:
        model = build(architecture)
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        assert (folder / "config.json").is_file()
    except Exception as error:
        return [("not built or not saved", f"{type(error).__name__}: {error}"[:120])]
    whole = outcome(folder)
    if "is not a causal language model" in whole or "an encoder" in whole:
        return [("not measured", "")]
    trials = [("whole", "" if whole == "accepted" else whole)]
    if whole != "accepted":
        return trials
    if (name := embedding_name(model, tensors)) is not None:
        save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
        told = outcome(folder)
        trials.append(("without embedding", "" if "such as" in told and "lacks" in told else told))
    try:
        block = f"{find_decoder(model).path}.1."  # older checkpoints of multimodal models have other names before it
        inner = f".{block.split('.')[-3]}.1."
    except CaptureError:
        return trials
    text = [k for k in tensors if k.startswith(block) or ("language_model" in k and inner in k)]
    if inside := [k for k in text if k.endswith(".weight")]:
        extra = inside[-1] + "_scale"
        save_file({**tensors, extra: torch.rand(3)}, folder / "model.safetensors", {"format": "pt"})
        told = outcome(folder)
        trials.append(("one more", "" if "weight_scale" in told else f"{extra}: {told}"))
    return trials


def main(only: Iterable[str]) -> int:
    """Examine all types, or those named. Return 1 if a trial went wrong."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    loading.load_tokenizer = lambda spec, files: None  # type: ignore[assignment, return-value]
    chosen, started = set(only), time.perf_counter()
    count: Counter[str] = Counter()
    for architecture in architectures():
        if chosen and architecture.model_type not in chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for trial, wrong in examine(architecture, Path(folder)):
                count[f"{trial}: {'wrong' if wrong else 'right'}"] += 1
                if wrong:
                    print(f"{architecture.model_type} ({architecture.class_name}), {trial}: {wrong}", flush=True)
    print(
        f"{dict(sorted(count.items()))}; transformers {transformers.__version__}, {time.perf_counter() - started:.0f} s"
    )
    return int(any(key.endswith("wrong") and not key.startswith("not built") for key in count))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
