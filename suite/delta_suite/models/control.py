"""The control of a model: its architecture and tokenizer with freshly initialised weights.

A value that random weights have, too, tells of the architecture and not of what was learnt. A control is measured like
any model; `ModelSpec.control` returns it, `--model NAME@random-weights` asks for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from delta_suite.models.device import SHARDED
from delta_suite.models.files import INDEX, PICKLES, ModelFiles
from delta_suite.models.gguf_header import gguf_architecture
from delta_suite.models.spec import CONTROL_DRAW, CONTROL_SEED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from delta_suite.models.drawing import Drawing

VOLATILE = ("_name_or_path", "name_or_path", "transformers_version")
"""Keys of config.json that tell who saved it, and nothing about the model."""


def control_fingerprint(files: ModelFiles) -> str:
    """Return the SHA-256, in hex, over what decides a control: config, tokenizer, trusted code and seed, not weights.

    So all checkpoints of one architecture share one control. A config counts by its content, without the path and the
    version it was saved by. For a GGUF file it is the part of the header that tells architecture, tokenizer, and the
    names and shapes of the tensors, so quantisations of one model share a control as well.
    """
    total = hashlib.sha256(f"random weights, {CONTROL_DRAW}\n".encode())
    if files.gguf is not None:
        for part in gguf_architecture(files.directory / files.gguf):
            total.update(len(part).to_bytes(8, "big") + part)
    for path in sorted(files.others):
        if path.name in (INDEX, *PICKLES):  # they list the weights
            continue
        content = path.read_bytes()
        if path.name == "config.json":
            config = {key: value for key, value in json.loads(content).items() if key not in VOLATILE}
            content = json.dumps(config, sort_keys=True).encode()
        total.update(f"{files.relative(path)}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


def initialise(
    auto_class: Any, config: PreTrainedConfig, *, device: str, dtype: Any, offload_folder: str | None, **options: Any
) -> PreTrainedModel:
    """Return the model of a config as transformers initialises it for training (`_init_weights` of its class), seed 0.

    The numbers are those of `drawing.Drawing`: the same in every process, and on every device and number of devices but
    for the last bit of a float32 in millions; those of another dtype are the float32 ones, rounded. They are drawn on
    the device itself, so the host needs memory for one tensor at most, beside those that stay on it. Other releases of
    torch or transformers may draw others (both are in the cache key). A config read from GGUF has no
    `initializer_range`: the default of its class is used. The caller's random state does not change.

    dtype: a torch dtype; None means that of the config, or float32 if it names none.
    offload_folder: folder for weights that fit into no memory, for the device "sharded".
    """
    import torch

    from delta_suite.models.drawing import Drawing

    with torch.random.fork_rng(devices=[]), Drawing(CONTROL_SEED) as drawing:
        torch.manual_seed(CONTROL_SEED)
        model: Any = auto_class.from_config(
            config, dtype=dtype or getattr(config, "dtype", None) or torch.float32, **options
        )
        placed: PreTrainedModel = _dispatched(model, drawing, offload_folder) if device == SHARDED else model.to(device)
    return placed


def _dispatched(model: Any, drawing: Drawing, offload_folder: str | None) -> Any:
    """Return a model on all GPUs and, where they cannot hold it, host memory and disk, as accelerate places it."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or ())  # block classes, which stay on one device
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    on_disk = [name for name, place in places.items() if place == "disk"]  # accelerate reads these without torch
    drawing.write(tensor for name in on_disk for tensor in _tensors_at(model, name))
    return dispatch_model(model, places, offload_dir=offload_folder)


def _tensors_at(model: Any, name: str) -> Iterator[Any]:
    """Yield the tensors of a module, or the parameter or buffer, at a name."""
    for key, tensor in model.state_dict(keep_vars=True).items():
        if name in ("", key) or key.startswith(f"{name}."):
            yield tensor
