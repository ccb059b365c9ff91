"""Models over several processes, through the distributed loading of transformers: FSDP2 and tensor parallel."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from delta_suite.errors import DeviceError, OptionError
from delta_suite.models.device import SHARDED, hardware
from delta_suite.models.files import ModelFiles
from delta_suite.models.model_config import quantisation_method, read_config, transformers_release
from delta_suite.models.spec import ModelSpec
from delta_suite.process_group import FSDP, MODES, START, TP, Team, joined, launched, refuse_processes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@contextmanager
def processes_of(device: str) -> Iterator[Team]:
    """Join the processes that were started for this device; yield the one process there is for any other device.

    Raises OptionError where the device needs more processes, or fewer, than were started, and DeviceError where a host
    has more of them than GPUs.
    """
    if device not in MODES:
        refuse_processes(f"--device {device}")
        yield Team()
        return
    launch = launched()
    if launch is None or launch.size < 2:
        raise OptionError(f"--device {device} needs several processes: {START.format(device)}.")
    gpus = len(hardware().gpus)
    if gpus and gpus < launch.local_size:
        raise DeviceError(
            f"--device {device}: {launch.local_size} processes were started on a host with {gpus} GPU(s), and each "
            f"needs its own. Start {gpus} with --nproc-per-node."
        )
    with joined(device, f"cuda:{launch.local_rank}" if gpus else "cpu") as team:
        yield team


def require_parallel(spec: ModelSpec, files: ModelFiles, team: Team) -> None:
    """Raise DeviceError where a model cannot be loaded by several processes, before anything is loaded."""
    config = read_config(spec, files)
    elsewhere = f"Use --device {SHARDED} in one process."
    if _distributed_config() is None:
        raise DeviceError(
            f"--device {team.mode}: {transformers_release()} loads no models over several processes. {elsewhere}"
        )
    what = None
    if spec.random_weights:
        what = "controls (random weights) are drawn in one process"
    elif files.gguf is not None:
        what = "GGUF files are unpacked by one process"
    elif quantisation_method(config, spec) is not None:
        what = "quantised weights are loaded by one process"
    elif getattr(config, "is_encoder_decoder", False):
        what = "encoder-decoders are measured in one process"
    if what is not None:
        raise DeviceError(f"{spec.name}: --device {team.mode}: {what}.\n  {elsewhere}")
    if team.mode == TP:
        _require_heads(spec, config, team.size)
    else:
        _require_plan(spec, files)


def _require_plan(spec: ModelSpec, files: ModelFiles) -> None:
    """Raise DeviceError where transformers' FSDP plan names no blocks: each process would hold the whole model."""
    from delta_suite.models.blocks import find_decoder
    from delta_suite.models.loading import SkeletonError, skeleton

    try:
        model, _ = skeleton(spec, files)
    except SkeletonError:  # loading it says why
        return
    path = find_decoder(model, spec.layers_path).path
    if f"{path}.*" not in (getattr(model, "_fsdp_plan", None) or {}):
        raise DeviceError(
            f"{spec.name}: --device {FSDP}: transformers has no FSDP plan for the blocks of {type(model).__name__} "
            f"({path}).\n  Use --device {SHARDED} in one process."
        )


def _require_heads(spec: ModelSpec, config: PreTrainedConfig, size: int) -> None:
    """Raise DeviceError where the heads of a model cannot be dealt evenly: it would fail in the middle of a pass."""
    text = config.get_text_config(decoder=True)
    if not getattr(text, "base_model_tp_plan", None):
        raise DeviceError(
            f"{spec.name}: --device {TP}: transformers has no tensor-parallel plan for {config.model_type}.\n"
            f"  Use --device {FSDP}, or --device {SHARDED} in one process."
        )
    kinds = {"attention heads": "num_attention_heads", "key/value heads": "num_key_value_heads"}
    for kind, key in kinds.items():
        heads = getattr(text, key, None)
        if isinstance(heads, int) and heads % size:
            every = [_heads(text, other) for other in kinds.values()]
            fitting = [str(n) for n in range(2, heads + 1) if not any(other % n for other in every)]
            use = f"Start {' or '.join(fitting)} processes, or use" if fitting else "Use"
            raise DeviceError(
                f"{spec.name}: --device {TP}: {heads} {kind} cannot be dealt to {size} processes.\n"
                f"  {use} --device {FSDP}."
            )


def _heads(config: Any, key: str) -> int:
    heads = getattr(config, key, None)
    return heads if isinstance(heads, int) else 0


def loading_options(team: Team) -> dict[str, Any]:
    """Return the options of `from_pretrained` that spread a model over the processes."""
    distributed_config = _distributed_config()
    assert distributed_config is not None
    return {"distributed_config": distributed_config(**{f"{team.mode}_size": team.size})}


def _distributed_config() -> Any:
    """Return the class of transformers that describes a model over several processes; None where it has none."""
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError:
        return None
    return DistributedConfig if "fsdp_size" in inspect.signature(DistributedConfig).parameters else None


def start(model: Any, team: Team) -> None:
    """Run a model once as a whole, on one token, after which its decoder can be called alone.

    FSDP2 decides at the first call what belongs together: that of the decoder alone would leave the rest out.
    """
    import torch

    if team.mode == FSDP:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=team.device), use_cache=False)


def class_name(model: Any) -> str:
    """Return the name of a model's class; FSDP2 makes a class of its own from it."""
    return next(kind.__name__ for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
