"""The control of a model: its architecture and tokenizer with freshly initialised weights.

What a metric says of random weights it says of the architecture, not of what was learnt. A control is measured as any
model is; `ModelSpec.control` names it, `--model NAME@random-weights` asks for it.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from delta_suite.models.device import SHARDED
from delta_suite.models.files import ModelFiles
from delta_suite.models.registry import CONTROL_SEED
from delta_suite.models.sources import hub
from delta_suite.models.weights import gguf_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_VOLATILE = ("_name_or_path", "name_or_path", "transformers_version")
"""Keys of config.json that say who saved it, and nothing of the model."""


def control_fingerprint(files: ModelFiles) -> str:
    """SHA-256, in hex, over what decides a control: config, tokenizer, trusted code and the seed; not the weights.

    So every checkpoint of one architecture shares one control. A config counts by its content, without the path and
    the version that it was saved by. Of a GGUF file it is the part of the header that tells architecture, tokenizer,
    and the names and shapes of the tensors, so quantisations of one model share it as well.
    """
    total = hashlib.sha256(f"random weights, seed {CONTROL_SEED}\n".encode())
    if files.gguf is not None:
        for part in gguf_architecture(files.directory / files.gguf):
            total.update(len(part).to_bytes(8, "big") + part)
        return total.hexdigest()
    for path in sorted(files.others):
        if path.name in (hub.INDEX, *hub.PICKLES):  # they list the weights
            continue
        content = path.read_bytes()
        if path.name == "config.json":
            config = {key: value for key, value in json.loads(content).items() if key not in _VOLATILE}
            content = json.dumps(config, sort_keys=True).encode()
        total.update(f"{path.name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


def initialise(
    auto_class: Any, config: "PreTrainedConfig", *, device: str, dtype: Any, offload_folder: str | None, **options: Any
) -> "PreTrainedModel":
    """The model of a config as transformers initialises it for training (`_init_weights` of its class), seed 0.

    The numbers are drawn on the CPU in `dtype`, so they are the same on every device and in every process; other
    releases of torch or transformers may draw others (both are in the cache key). A config read from GGUF has no
    `initializer_range`: it is then the default of its class. The caller's random state is left as it was.

    dtype: a torch dtype; None is the config's own, and float32 where it says none.
    offload_folder: where weights go that fit no memory, on the device "sharded".
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CONTROL_SEED)
        model: Any = auto_class.from_config(
            config, dtype=dtype or getattr(config, "dtype", None) or torch.float32, **options
        )
    if device != SHARDED:
        placed: PreTrainedModel = model.to(device)
        return placed
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or ())  # block classes, which stay on one device
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    sharded: PreTrainedModel = dispatch_model(model, places, offload_dir=offload_folder)
    return sharded
