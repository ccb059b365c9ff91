"""`ModelFiles` -> `LoadedModel`. All is read from local files; torch and transformers are imported on first use."""

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
"""What transformers raises for files that it cannot make sense of."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for a forward pass: in evaluation mode, without gradients, on its device."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    devices: tuple[str, ...]
    """The devices that compute, the one that takes the token ids first."""
    dtype: str
    """The dtype of its parameters, such as "float32"."""
    attention: str
    """The attention kernel that runs, such as "sdpa", which need not be the one asked for."""
    seconds: float
    """Time of the whole load, tokenizer included."""


def load_tokenizer(spec: ModelSpec, files: ModelFiles) -> "PreTrainedTokenizerBase":
    """The model's tokenizer; from a GGUF file it is rebuilt, which takes seconds.

    Raises `ModelUnavailableError` where transformers cannot build it from the files.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            files.directory, gguf_file=files.gguf, local_files_only=True, trust_remote_code=spec.trust_remote_code
        )
    except Exception as error:
        # The tokenizers library tells a damaged file by a bare Exception; what is neither that nor below is a bug.
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
    """Load model and tokenizer onto one device.

    device: "cpu", "mps", "cuda", "cuda:1" or "sharded", as `resolve_device` says.
    dtype: takes precedence over the entry's; "auto" is the entry's, and there the checkpoint's own.
    A control has the weights that `control.initialise` draws; its "auto" is the dtype that the config names.
    attention: the kernel, such as "eager" or "sdpa"; None leaves it to transformers.

    Raises `ModelUnavailableError` where transformers does not know the model, it has no causal text decoder, needs
    remote code that is not trusted or a package for quantised weights that is not installed, or the weights do not fit
    the architecture; `DeviceError` where memory runs out.
    """
    if dtype not in DTYPES:
        raise SuiteError(f"dtype {dtype!r} is unknown: it is {', '.join(DTYPES)}.")
    started = time.perf_counter()
    import torch
    from safetensors import SafetensorError

    config = _config(spec, files)
    auto_class = _auto_class(config, spec)
    quantised = _quantisation(config, spec)
    tokenizer = load_tokenizer(spec, files)
    wanted = spec.dtype if dtype == "auto" else dtype
    torch_dtype = None if wanted == "auto" else getattr(torch, wanted)
    kernel: dict[str, Any] = {"attn_implementation": attention} if attention is not None else {}
    # What fits neither GPUs nor host memory is read from disk layer by layer; the folder goes with the process.
    offload_folder = _offload_folder() if device == SHARDED else None
    # Tensors of another shape are told by _check_complete, as those are that are not there.
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
    model: Any
    report: dict[str, Any] = {}
    try:
        if spec.random_weights:
            code = {"trust_remote_code": True} if spec.trust_remote_code else {}
            model = initialise(
                auto_class, config, device=device, dtype=torch_dtype, offload_folder=offload_folder, **kernel, **code
            )
        else:
            with _errors_alone():
                model, report = auto_class.from_pretrained(
                    files.directory,
                    config=config,
                    dtype=torch_dtype or "auto",
                    local_files_only=True,
                    trust_remote_code=spec.trust_remote_code,
                    output_loading_info=True,
                    **options,
                )
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
            f"Check that the weights belong to the config and are whole. {_newer_transformers()}",
        ) from error
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


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Without transformers' warnings: its table of tensors that do not fit stood above the message that says so."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        theirs.set_verbosity(before)


def _devices(model: "PreTrainedModel", device: str) -> tuple[str, ...]:
    """Where blocks run; what is offloaded to the host or disk runs on the first GPU."""
    if device != SHARDED:
        return ("cuda:0" if device == "cuda" else device,)
    placed: dict[str, Any] = getattr(model, "hf_device_map", {})
    gpus = sorted({int(place) for place in placed.values() if isinstance(place, int)})
    return tuple(f"cuda:{gpu}" for gpu in gpus) or ("cpu",)


def _offload_folder() -> str:
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="delta-suite-offload-")
    atexit.register(folder.cleanup)
    return folder.name


def _config(spec: ModelSpec, files: ModelFiles) -> "PreTrainedConfig":
    """The model's config, after a look of our own: transformers would tell the two cases below in many lines."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    if files.gguf is None:
        written = json.loads((files.directory / "config.json").read_text(encoding="utf-8"))
        kind = written.get("model_type")
        if kind not in CONFIG_MAPPING and not (spec.trust_remote_code and "auto_map" in written):
            described = f"the config of {spec.name} " + (f"says model_type {kind!r}" if kind else "has no model_type")
            if "auto_map" in written:
                raise UnavailableError(
                    spec.name,
                    f"{described}, whose code is not in transformers but comes with the model",
                    "Read that code, and if you trust it set trust_remote_code = true in an entry of models.toml.",
                )
            unknown = f"{described}, which {_transformers()} does not know" if kind else described
            raise UnavailableError(
                spec.name, unknown, _newer_transformers() if kind else "Save it with save_pretrained."
            )
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


AUTO_CLASSES = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),  # sound and video, too; not in 5.0
)
"""What builds a model with a text decoder, and by which mapping it knows the config; the first that fits counts."""


def _auto_class(config: "PreTrainedConfig", spec: ModelSpec) -> Any:
    """The auto class that builds the model. Raises `ModelUnavailableError` where it has no causal text decoder."""
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
            fitting[name] = tuple(own.__name__ for own in (classes if isinstance(classes, tuple) else (classes,)))
    named = [name for name, classes in fitting.items() if set(classes) & set(architectures)]
    if getattr(config, "is_encoder_decoder", False) and "AutoModelForSeq2SeqLM" in fitting and not named:
        named = ["AutoModelForSeq2SeqLM"]
    chosen = next(iter(named or fitting), None)
    if chosen is None:
        if spec.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            return transformers.AutoModelForCausalLM
        raise UnavailableError(spec.name, f"{kind}, which is not a causal language model", do)
    # BERT and its kin can be built as decoders; a checkpoint trained with attention to both sides must not be.
    both_sides = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not (
        getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    )
    if both_sides and architectures and not named:
        raise UnavailableError(spec.name, f"{kind} and {architectures[0]}, an encoder", do)
    return getattr(transformers, chosen)


def _quantisation(config: "PreTrainedConfig", spec: ModelSpec) -> str | None:
    """The method by which the config says the weights are quantised, such as "gptq"; None where it says none.

    Raises `ModelUnavailableError` for a method that transformers does not know: it would warn, and take the packed
    numbers for the weights themselves.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    written: Any = getattr(config, "quantization_config", None)
    if written is None:
        return None
    method = written.get("quant_method") if isinstance(written, dict) else getattr(written, "quant_method", None)
    named = str(getattr(method, "value", method) or "in a way that the config does not name")
    try:
        known = not isinstance(written, dict) or AutoHfQuantizer.supports_quant_method(written)  # type: ignore[no-untyped-call]
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
    """Unpack GGUF weights at load, whichever kernels are installed.

    Newer releases of transformers keep some architectures packed, and fetch kernels from the hub to compute on them.
    """
    import transformers

    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


def _check_complete(spec: ModelSpec, files: ModelFiles, model: "PreTrainedModel", report: dict[str, Any]) -> None:
    """Refuse a model in which transformers left random numbers or left out layers; it only prints a warning.

    The output head may be missing: a checkpoint of the bare decoder has none, and the residual stream ends before it.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    of_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    spared = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in of_head}
    missing = sorted(set(report.get("missing_keys", ())) - spared)
    mismatched = sorted(_shapes(key) for key in report.get("mismatched_keys", ()))
    if wrong := missing or mismatched:
        raise UnavailableError(
            spec.name,
            f"{files.directory} lacks {len(wrong)} of the tensors that {type(model).__name__} is made of"
            f"{'' if missing else ' (or has them in another shape)'}, such as {wrong[0]}",
            "They would be random numbers. Check that the weights belong to the config and were saved as a whole.",
        )
    known = {_any_layer(name) for name in model.state_dict()}
    left_over = sorted(name for name in report.get("unexpected_keys", ()) if _any_layer(name) in known)
    if left_over:
        raise UnavailableError(
            spec.name,
            f"{files.directory} has {len(left_over)} tensors of layers that its config leaves out, "
            f"such as {left_over[0]}",
            "A part of the model would be measured as if it were all. Correct the number of layers in config.json.",
        )


def _shapes(key: Any) -> str:
    """Of a tensor of another shape, as transformers reports it: its name, and where they come with it both shapes."""
    if not isinstance(key, tuple):
        return str(key)
    name, *shapes = key
    return f"{name}: {' there, '.join(str(tuple(shape)) for shape in shapes)} by the config" if shapes else str(name)


def _any_layer(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def _brief(error: BaseException) -> str:
    """The first line with content of an error of another library (and the next, if it announces that), and its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said[:300].removesuffix('.')}"


def _transformers() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def _newer_transformers() -> str:
    return f"A newer transformers than {_transformers().split()[1]} may know it: pip install --upgrade transformers."
