"""Loading a model from its `ModelFiles`. Only local files are read; torch and transformers are imported when used."""

from __future__ import annotations

import atexit
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import DeviceError, SuiteError, UnavailableError, brief
from delta_suite.models.completeness import check_complete, unread_names
from delta_suite.models.config_errors import unknown_word
from delta_suite.models.control import initialise
from delta_suite.models.device import SHARDED, hardware
from delta_suite.models.files import ModelFiles
from delta_suite.models.gguf_check import check_gguf, gguf_read_once, names_read
from delta_suite.models.model_config import auto_class, newer_transformers, quantisation_method, read_config
from delta_suite.models.parallel import loading_options, start
from delta_suite.models.spec import ModelSpec
from delta_suite.models.tokenizer import load_tokenizer
from delta_suite.models.undisturbed import errors_only, replaced
from delta_suite.models.weights import stored_tensors
from delta_suite.process_group import MODES, current
from delta_suite.reading import read_json
from delta_suite.writing import sweep, temporary_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class SkeletonError(SuiteError):
    """Error for an architecture that cannot be built without its weights, which says nothing about building it with."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for a forward pass: in evaluation mode, without gradients, on its device."""

    model: PreTrainedModel
    """The model itself."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    devices: tuple[str, ...]
    """Devices that compute; the first takes the token ids."""
    dtype: str
    """Dtype of the parameters, such as "float32"."""
    attention: str
    """Attention kernel that runs, such as "sdpa"; it need not be the one asked for."""
    seconds: float
    """Duration of the whole load, tokenizer included."""
    release: Callable[[], None] | None = None
    """Gives the memory of the weights back, whoever still holds the model; None where it is the caller's."""
    zero_weights: tuple[str, ...] = ()
    """Names of weight matrices of files that are zero, in whole or in many rows."""


def load(spec: ModelSpec, files: ModelFiles, *, device: str = "cpu", dtype: str = "auto") -> LoadedModel:
    """Load model and tokenizer onto a device.

    device: "cpu", "mps", "cuda", "cuda:1", "sharded", "fsdp" or "tp", as `resolve_device` returns it.
    dtype: one of `DTYPES`; "auto" means that of the entry, and if that is "auto" too, the checkpoint's. A control has
        the weights that `control.initialise` draws; for it "auto" is the dtype that the config names.

    Raises:
        ModelUnavailableError: transformers does not know the model; it has no causal text decoder; it needs remote
            code that is not trusted, or a package for quantised weights that is not installed; or the weights do not
            fit the architecture.
        DeviceError: memory runs out, or the GPU fails.
    """
    from delta_suite.models.zeros import zero_weights

    started = time.perf_counter()
    sweep(Path(tempfile.gettempdir()))  # offloaded weights of a killed run can be hundreds of gigabytes
    with gguf_read_once(files):
        model, tokenizer = _loaded(spec, files, device, dtype)
    model.eval().requires_grad_(False)
    if device in MODES:
        start(model, current())
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        devices=_devices(model, device),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(model.config._attn_implementation),
        seconds=time.perf_counter() - started,
        release=None if device in MODES else partial(release_weights, model),
        zero_weights=() if spec.random_weights else zero_weights(model),
    )


def release_weights(model: Any) -> None:
    """Give the memory of a model's weights back, whoever still holds the model. It cannot run afterwards."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        with suppress(RuntimeError, TypeError):  # quantised tensors of some libraries are no plain memory: they stay
            tensor.data = tensor.data.new_empty(0)
    torch.cuda.empty_cache()  # does nothing before CUDA is started


def _loaded(spec: ModelSpec, files: ModelFiles, device: str, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return model and tokenizer, as `load` does."""
    config = read_config(spec, files)
    builder = auto_class(config, spec)
    quantised = quantisation_method(config, spec)
    wanted = spec.dtype if dtype == "auto" else dtype
    if quantised == "fp8" and wanted == "float32" and not spec.random_weights:
        raise UnavailableError(
            spec.name,
            "its weights are quantised (fp8), and the kernels for them compute in bfloat16, not in float32",
            "Leave --dtype (or `dtype` of its entry) out, or pass the unquantised model.",
        )
    tokenizer = load_tokenizer(spec, files)
    if spec.random_weights:
        _check_memory(spec, files, wanted, device)
    with _explained(spec, files, device, quantised), _weights_alone(), unread_names() as unread, names_read() as read:
        model, report = _build(spec, files, builder, config, device=device, dtype=wanted)
    check_complete(spec, files, model, report, unread)
    if files.gguf is not None:
        check_gguf(spec, files, model, read, unread)
    return model, tokenizer


def _check_memory(spec: ModelSpec, files: ModelFiles, dtype: str, device: str) -> None:
    """Refuse a control that the device cannot hold, before memory is asked for: no file bounds its size."""
    try:
        model, _ = skeleton(spec, files, dtype)
        needed = float(model.get_memory_footprint())
    except SkeletonError as error:
        if "overflow" not in str(error):  # of the number of bytes of a tensor, in torch
            return
        needed = math.inf
    memory, place = _memory_of(device)
    if memory and needed > memory * 1e9:
        size = f"{needed / 1e9:,.0f} GB" if needed < math.inf else "more bytes than there are numbers for"
        raise DeviceError(
            f"{spec.name}: a model of the sizes in its config takes {size}, and there are {memory:.0f} GB {place}.\n"
            "  Check the sizes in the config, or run it on a larger machine, or with --dtype bfloat16."
        )


def _memory_of(device: str) -> tuple[float, str]:
    """Return the memory of a device, in units of 10^9 bytes, and its place in words; 0 where it is not known."""
    here = hardware()
    kind, _, number = device.partition(":")
    gpus = [gpu.memory_gb for gpu in here.gpus]
    if kind == "cuda":
        return sum(gpus[int(number or 0) :][:1]), f"on {device}"
    if kind == SHARDED and gpus and here.memory_gb:
        return here.memory_gb + sum(gpus), "here, those of GPUs included"
    return here.memory_gb, "here"


def skeleton(spec: ModelSpec, files: ModelFiles, dtype: str = "auto") -> tuple[Any, str | None]:
    """Return the model of the config without its weights, and how these are quantised, if they are.

    It is on torch's meta device and takes no memory. dtype: as for `load`; "auto" is here what the config names.

    Raises:
        ModelUnavailableError: the model cannot be loaded, as far as its config shows.
        SkeletonError: transformers builds the architecture with its weights alone.
    """
    import torch

    config = read_config(spec, files)
    builder = auto_class(config, spec)
    quantised = quantisation_method(config, spec)
    dtype = spec.dtype if dtype == "auto" else dtype
    chosen = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    code = {"trust_remote_code": True} if spec.trust_remote_code else {}
    try:
        with errors_only(), torch.device("meta"):
            return builder.from_config(config, dtype=chosen, **code), quantised
    except Exception as error:  # code of an architecture that nobody wrote for this device
        if (told := _unknown(spec, files, error)) is not None:
            raise told from error
        raise SkeletonError(brief(error)) from error


def _unknown(spec: ModelSpec, files: ModelFiles, error: Exception) -> UnavailableError | None:
    """Return the error for a word of config.json that transformers does not know; None for any other error."""
    if files.gguf is not None:
        return None
    where = files.directory / "config.json"
    return unknown_word(spec, where, read_json(where), error)


def _build(
    spec: ModelSpec,
    files: ModelFiles,
    builder: Any,
    config: PreTrainedConfig,
    *,
    device: str,
    dtype: str,
) -> tuple[Any, dict[str, Any]]:
    """Return the model, and the report of transformers on tensors that did not fit; a control has none."""
    import torch

    torch_dtype = None if dtype == "auto" else getattr(torch, dtype)
    if torch_dtype is None and _too_wide_or_narrow(config, files):
        torch_dtype = torch.float32
    # Weights that fit neither GPUs nor host memory are read from disk layer by layer.
    offload_folder = _offload_folder() if device == SHARDED else None
    if spec.random_weights:
        code = {"trust_remote_code": True} if spec.trust_remote_code else {}
        model: Any = initialise(
            builder, config, device=device, dtype=torch_dtype, offload_folder=offload_folder, **code
        )
        return model, {}
    # check_complete reports tensors of another shape, together with those that are missing.
    options: dict[str, Any] = {"ignore_mismatched_sizes": True}
    if device == SHARDED:
        options |= {"device_map": "auto", "offload_folder": offload_folder}
    elif device in MODES:
        options |= loading_options(current())
    elif device != "cpu":
        # Straight onto the device: through host memory a model of 60 GB would need it twice.
        options["device_map"] = {"": "cuda:0" if device == "cuda" else device}
    if files.gguf is not None:
        options |= {"gguf_file": files.gguf, **_plain_weights()}
    elif not spec.allow_pickle:
        options["use_safetensors"] = True
    with errors_only():
        model, report = builder.from_pretrained(
            files.directory,
            config=config,
            dtype=torch_dtype or "auto",
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    return model, report


@contextmanager
def _explained(spec: ModelSpec, files: ModelFiles, device: str, quantised: str | None) -> Iterator[None]:
    """Turn errors of other libraries during the load into ours, which say what to do.

    quantised: the method by which the weights are quantised, if they are.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DeviceError(
            f"{spec.name}: the memory of {device} ran out while it was loaded ({brief(error)}).\n"
            "  Use a larger device, --dtype bfloat16, or a smaller model."
        ) from error
    except Exception as error:  # the code of other libraries, run on files that may hold anything
        if (told := _unknown(spec, files, error)) is not None:
            raise told from error
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise DeviceError(
                f"{spec.name}: the memory of {device} does not hold it as its config describes it ({brief(error)}).\n"
                "  Check the sizes in the config, or use a larger device, or a smaller model."
            ) from error
        if device.startswith("cuda") and "CUDA" in str(error):
            raise DeviceError(
                f"{spec.name}: {device} failed while the model was loaded ({brief(error)}).\n"
                "  Is the GPU free and working (nvidia-smi), and is this torch built for it? --device cpu does without."
            ) from error
        if quantised:
            raise UnavailableError(
                spec.name,
                f"its weights are quantised ({quantised}), and transformers could not load them here ({brief(error)})",
                "Install the package that is named, on a device that it supports, or pass the unquantised model.",
            ) from error
        raise UnavailableError(
            spec.name,
            f"transformers could not load it from {files.directory} ({brief(error)})",
            f"Check that the weights belong to the config and are complete. {newer_transformers()}",
        ) from error


def _too_wide_or_narrow(config: PreTrainedConfig, files: ModelFiles) -> bool:
    """Return True if config or weights name float64, or float8 without a quantisation that unpacks it.

    The capture computes in float32 at most.
    """
    import torch

    if config.dtype is not None:
        return bool(config.dtype == torch.float64)
    if getattr(config, "quantization_config", None) is not None:
        return False
    return any(tensor.dtype.startswith(("F64", "F8")) for tensor in stored_tensors(files.weights).values())


@contextmanager
def _weights_alone() -> Iterator[None]:
    """Keep transformers from what it does by itself where a package is installed.

    With `kernels` some architectures fetch compiled code from the hub and run it; with `peft` an adapter that lies
    beside the weights is loaded into them.
    """
    from transformers.integrations import hub_kernels, peft
    from transformers.models.auto import auto_factory

    switches = [
        (hub_kernels, "_kernels_enabled", False),
        (peft, "is_peft_available", lambda: False),
        (auto_factory, "is_peft_available", lambda: False),
    ]
    with replaced(switches):
        yield


def _devices(model: PreTrainedModel, device: str) -> tuple[str, ...]:
    """Return the devices on which blocks run; those offloaded to host or disk run on the first GPU."""
    if device in MODES:
        return (current().device,)
    if device != SHARDED:
        return ("cuda:0" if device == "cuda" else device,)
    placed: dict[str, Any] = getattr(model, "hf_device_map", {})
    gpus = sorted({int(place) for place in placed.values() if isinstance(place, int)})
    return tuple(f"cuda:{gpu}" for gpu in gpus) or ("cpu",)


def _offload_folder() -> str:
    """Return a new folder for offloaded weights, which is removed when the process ends."""
    files = ExitStack()
    atexit.register(files.close)
    return str(files.enter_context(temporary_folder(Path(tempfile.gettempdir()))))


def _plain_weights() -> dict[str, Any]:
    """Return options that unpack GGUF weights at load, whichever kernels are installed.

    Newer releases of transformers keep some architectures packed, and fetch kernels from the hub to compute on them.
    """
    import transformers

    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}
