"""Loading a model from its `ModelFiles`. Only local files are read; torch and transformers are imported when used."""

from __future__ import annotations

import atexit
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from delta_suite.command_line import DTYPES
from delta_suite.errors import DeviceError, SuiteError, UnavailableError
from delta_suite.models.control import initialise
from delta_suite.models.device import SHARDED
from delta_suite.models.files import ModelFiles
from delta_suite.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_UNREADABLE = (OSError, ValueError, ImportError, KeyError, IndexError, TypeError, AttributeError)
"""Errors that transformers raises for files it cannot make sense of."""


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


def load_tokenizer(spec: ModelSpec, files: ModelFiles) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; one in a GGUF file is rebuilt, which takes seconds.

    Raises:
        ModelUnavailableError: transformers cannot build it from the files.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            files.directory, gguf_file=files.gguf, local_files_only=True, trust_remote_code=spec.trust_remote_code
        )
    except Exception as error:
        # The tokenizers library raises a bare Exception for a damaged file; any other type not listed above is a bug.
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):
            raise
        raise UnavailableError(
            spec.name,
            f"its tokenizer cannot be built from {files.directory} ({_brief(error)})",
            "Save the one it was trained with there: tokenizer.save_pretrained(DIRECTORY)."
            if files.gguf is None
            else _newer_transformers(),
        ) from error
    return tokenizer


def load(
    spec: ModelSpec,
    files: ModelFiles,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    attention: str | None = None,
) -> LoadedModel:
    """Load model and tokenizer onto a device.

    device: "cpu", "mps", "cuda", "cuda:1" or "sharded", as `resolve_device` returns it.
    dtype: one of `DTYPES`; "auto" means that of the entry, and if that is "auto" too, the checkpoint's. A control has
        the weights that `control.initialise` draws; for it "auto" is the dtype that the config names.
    attention: the kernel, such as "eager" or "sdpa"; None leaves the choice to transformers.

    Raises:
        SuiteError: the dtype is unknown.
        ModelUnavailableError: transformers does not know the model; it has no causal text decoder; it needs remote
            code that is not trusted, or a package for quantised weights that is not installed; or the weights do not
            fit the architecture.
        DeviceError: memory runs out, or the GPU fails.
    """
    if dtype not in DTYPES:
        raise SuiteError(f"dtype {dtype!r} is unknown: it is {', '.join(DTYPES)}.")
    started = time.perf_counter()
    config = _config(spec, files)
    auto_class = _auto_class(config, spec)
    quantised = _quantisation(config, spec)
    tokenizer = load_tokenizer(spec, files)
    with _explained(spec, files, device, quantised):
        model, report = _build(spec, files, auto_class, config, device=device, dtype=dtype, attention=attention)
    _check_complete(spec, files, model, report)
    model.eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        devices=_devices(model, device),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(model.config._attn_implementation),
        seconds=time.perf_counter() - started,
    )


def skeleton(spec: ModelSpec, files: ModelFiles, dtype: str = "auto") -> tuple[Any, str | None]:
    """Return the model of the config without its weights, and how these are quantised, if they are.

    It is on torch's meta device and takes no memory. dtype: as for `load`; "auto" is here what the config names.

    Raises:
        ModelUnavailableError: the model cannot be loaded, as far as its config shows.
        SkeletonError: transformers builds the architecture with its weights alone.
    """
    import torch

    config = _config(spec, files)
    auto_class = _auto_class(config, spec)
    quantised = _quantisation(config, spec)
    dtype = spec.dtype if dtype == "auto" else dtype
    chosen = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    code = {"trust_remote_code": True} if spec.trust_remote_code else {}
    try:
        with _errors_only(), torch.device("meta"):
            return auto_class.from_config(config, dtype=chosen, **code), quantised
    except Exception as error:  # code of an architecture that nobody wrote for this device
        raise SkeletonError(_brief(error)) from error


def _build(
    spec: ModelSpec,
    files: ModelFiles,
    auto_class: Any,
    config: PreTrainedConfig,
    *,
    device: str,
    dtype: str,
    attention: str | None,
) -> tuple[Any, dict[str, Any]]:
    """Return the model, and the report of transformers on tensors that did not fit; a control has none."""
    import torch

    dtype = spec.dtype if dtype == "auto" else dtype
    torch_dtype = None if dtype == "auto" else getattr(torch, dtype)
    kernel: dict[str, Any] = {"attn_implementation": attention} if attention is not None else {}
    # Weights that fit neither GPUs nor host memory are read from disk layer by layer.
    offload_folder = _offload_folder() if device == SHARDED else None
    if spec.random_weights:
        code = {"trust_remote_code": True} if spec.trust_remote_code else {}
        model: Any = initialise(
            auto_class, config, device=device, dtype=torch_dtype, offload_folder=offload_folder, **kernel, **code
        )
        return model, {}
    # _check_complete reports tensors of another shape, together with those that are missing.
    options: dict[str, Any] = {"ignore_mismatched_sizes": True, **kernel}
    if device == SHARDED:
        options |= {"device_map": "auto", "offload_folder": offload_folder}
    elif device != "cpu":
        # Straight onto the device: through host memory a model of 60 GB would need it twice.
        options["device_map"] = {"": "cuda:0" if device == "cuda" else device}
    if files.gguf is not None:
        options |= {"gguf_file": files.gguf, **_plain_weights()}
    elif not spec.allow_pickle:
        options["use_safetensors"] = True
    with _errors_only():
        model, report = auto_class.from_pretrained(
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
    from safetensors import SafetensorError

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DeviceError(
            f"{spec.name}: the memory of {device} ran out while it was loaded ({_brief(error)}).\n"
            "  Use a larger device, --dtype bfloat16, or a smaller model."
        ) from error
    except (*_UNREADABLE, RuntimeError, SafetensorError) as error:
        if device.startswith("cuda") and "CUDA" in str(error):
            raise DeviceError(
                f"{spec.name}: {device} failed while the model was loaded ({_brief(error)}).\n"
                "  Is the GPU free and working (nvidia-smi), and is this torch built for it? --device cpu does without."
            ) from error
        if quantised:
            raise UnavailableError(
                spec.name,
                f"its weights are quantised ({quantised}), and transformers could not load them here ({_brief(error)})",
                "Install the package that is named, on a device that it supports, or pass the unquantised model.",
            ) from error
        raise UnavailableError(
            spec.name,
            f"transformers could not load it from {files.directory} ({_brief(error)})",
            f"Check that the weights belong to the config and are complete. {_newer_transformers()}",
        ) from error


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence the warnings of transformers; its table of tensors that do not fit would stand above our message."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _devices(model: PreTrainedModel, device: str) -> tuple[str, ...]:
    """Return the devices on which blocks run; those offloaded to host or disk run on the first GPU."""
    if device != SHARDED:
        return ("cuda:0" if device == "cuda" else device,)
    placed: dict[str, Any] = getattr(model, "hf_device_map", {})
    gpus = sorted({int(place) for place in placed.values() if isinstance(place, int)})
    return tuple(f"cuda:{gpu}" for gpu in gpus) or ("cpu",)


def _offload_folder() -> str:
    """Return a new folder for offloaded weights, which is removed when the process ends."""
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="delta-suite-offload-")
    atexit.register(folder.cleanup)
    return folder.name


def _config(spec: ModelSpec, files: ModelFiles) -> PreTrainedConfig:
    """Return the model's config, which must be of a type that transformers knows."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if files.gguf is None:
        _check_model_type(spec, json.loads((files.directory / "config.json").read_text(encoding="utf-8")))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            files.directory,
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
            **({"gguf_file": files.gguf} if files.gguf is not None else {}),
        )
    except (*_UNREADABLE, StrictDataclassError) as error:
        raise UnavailableError(
            spec.name,
            f"{_transformers()} cannot read the config of {files.directory / (files.gguf or 'config.json')} "
            f"({_brief(error)})",
            f"Check that the file is whole. {_newer_transformers()}",
        ) from error
    return config


def _check_model_type(spec: ModelSpec, config: dict[str, Any]) -> None:
    """Refuse a type of model that transformers does not know; its message for it has many lines."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind in CONFIG_MAPPING or (spec.trust_remote_code and "auto_map" in config):
        return
    described = f"the config of {spec.name} " + (f"says model_type {kind!r}" if kind else "has no model_type")
    if "auto_map" in config:
        raise UnavailableError(
            spec.name,
            f"{described}, whose code is not in transformers but comes with the model",
            "Read that code, and if you trust it set trust_remote_code = true in an entry of models.toml.",
        )
    unknown = f"{described}, which {_transformers()} does not know" if kind else described
    raise UnavailableError(spec.name, unknown, _newer_transformers() if kind else "Save it with save_pretrained.")


AUTO_CLASSES = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),  # sound and video, too; not in 5.0
)
"""Auto classes that build a model with a text decoder, and the mapping of configs each knows, in order of choice."""


def _auto_class(config: PreTrainedConfig, spec: ModelSpec) -> Any:
    """Return the auto class that builds the model.

    Raises:
        UnavailableError: the model has no causal text decoder.
    """
    import transformers

    kind = f"the config of {spec.name} says model_type {config.model_type!r}"
    do = (
        "delta-suite measures causal language models: decoders, encoder-decoders, and the text decoders of multimodal "
        "models. Choose one of those."
    )
    architectures = config.architectures or []
    fitting: dict[str, tuple[str, ...]] = {}
    for name, mapping in AUTO_CLASSES:
        known = getattr(transformers, mapping, {})
        if type(config) in known:
            classes = known[type(config)]
            fitting[name] = tuple(kind.__name__ for kind in (classes if isinstance(classes, tuple) else (classes,)))
    named = [name for name, classes in fitting.items() if set(classes) & set(architectures)]
    if getattr(config, "is_encoder_decoder", False) and "AutoModelForSeq2SeqLM" in fitting and not named:
        named = ["AutoModelForSeq2SeqLM"]
    chosen = next(iter(named or fitting), None)
    if chosen is None:
        if spec.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            return transformers.AutoModelForCausalLM
        raise UnavailableError(spec.name, f"{kind}, which is not a causal language model", do)
    # BERT and its relatives can be built as decoders; a checkpoint trained with bidirectional attention must not be.
    bidirectional = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not (
        getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    )
    if bidirectional and architectures and not named:
        raise UnavailableError(spec.name, f"{kind} and {architectures[0]}, an encoder", do)
    return getattr(transformers, chosen)


def _quantisation(config: PreTrainedConfig, spec: ModelSpec) -> str | None:
    """Return the method by which the config says the weights are quantised, such as "gptq"; None if it names none.

    Raises:
        UnavailableError: transformers does not know the method. It would warn, and take the packed numbers for the
            weights themselves.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    quantisation: Any = getattr(config, "quantization_config", None)
    if quantisation is None:
        return None
    is_dict = isinstance(quantisation, dict)
    method = quantisation.get("quant_method") if is_dict else getattr(quantisation, "quant_method", None)
    named = str(getattr(method, "value", method) or "in a way that the config does not name")
    try:
        known = not is_dict or AutoHfQuantizer.supports_quant_method(quantisation)  # type: ignore[no-untyped-call]
    except ValueError:  # no method is named
        known = False
    if not known:
        raise UnavailableError(
            spec.name,
            f"its weights are quantised ({named}), in a way that {_transformers()} does not know",
            f"Pass the unquantised model. {_newer_transformers()}",
        )
    return named


def _plain_weights() -> dict[str, Any]:
    """Return options that unpack GGUF weights at load, whichever kernels are installed.

    Newer releases of transformers keep some architectures packed, and fetch kernels from the hub to compute on them.
    """
    import transformers

    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def _check_complete(spec: ModelSpec, files: ModelFiles, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse a model with random numbers in place of weights, or without layers; transformers only prints a warning.

    The output head may be missing: a checkpoint of the bare decoder has none, and the residual stream ends before it.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head_ids = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    optional = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in head_ids}
    missing = sorted(set(report.get("missing_keys", ())) - optional)
    mismatched = sorted(_shapes(key) for key in report.get("mismatched_keys", ()))
    if wrong := missing or mismatched:
        raise UnavailableError(
            spec.name,
            f"{files.directory} lacks {len(wrong)} of the tensors that {type(model).__name__} is made of"
            f"{'' if missing else ' (or has them in another shape)'}, such as {wrong[0]}",
            "They would be random numbers. Check that the weights belong to the config and were saved completely.",
        )
    known = {_any_layer(name) for name in model.state_dict()}
    unused = sorted(name for name in report.get("unexpected_keys", ()) if _any_layer(name) in known)
    if unused:
        raise UnavailableError(
            spec.name,
            f"{files.directory} has {len(unused)} tensors of layers that its config leaves out, such as {unused[0]}",
            "A part of the model would be measured as if it were all. Correct the number of layers in config.json.",
        )


def _shapes(key: Any) -> str:
    """Return a tensor of another shape for a message: its name, and both shapes if transformers reports them."""
    if not isinstance(key, tuple):
        return str(key)
    name, *shapes = key
    return f"{name}: {' there, '.join(str(tuple(shape)) for shape in shapes)} by the config" if shapes else str(name)


def _any_layer(name: str) -> str:
    """Return the name of a tensor with a star in place of each number."""
    return re.sub(r"\b\d+\b", "*", name)


def _brief(error: BaseException) -> str:
    """Return the type and the first line of another library's error, and the second line if the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text[:300].removesuffix('.')}"


def _transformers() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def _newer_transformers() -> str:
    return f"A newer transformers than {_transformers().split()[1]} may know it: pip install --upgrade transformers."
