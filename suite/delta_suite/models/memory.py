"""A model in memory: a torch module with its tokenizer, which is measured where it is and left as it was."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import OptionError, UnavailableError, brief
from delta_suite.models.blocks import Decoder, find_decoder
from delta_suite.models.control import VOLATILE
from delta_suite.models.device import SHARDED
from delta_suite.models.fingerprint import MAX_THREADS
from delta_suite.models.loading import LoadedModel
from delta_suite.models.phases import PhaseMap
from delta_suite.models.spec import MEMORY
from delta_suite.models.subject import Subject
from delta_suite.models.tokenizer import steady
from delta_suite.models.undisturbed import left_as_it_was
from delta_suite.writing import temporary_folder

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HASHED_AT_ONCE = 64 << 20
"""Bytes of a tensor that are brought to the host at a time to be hashed."""

_WITHOUT_EFFECT = {
    *("training", "gradient_checkpointing", "name_or_path"),
    *("_is_full_backward_hook", "_is_hf_initialized", "_is_torch_compile"),
    *("_parameters", "_buffers", "_modules"),
}
"""Attributes of modules that change no figure, as capture runs in evaluation mode and without gradients; or that are
counted with the tensors."""

_LIBRARIES = ("accelerate", "peft", "transformers")
"""Libraries whose hooks change no figure."""


@dataclass(frozen=True)
class ModuleInMemory(Subject):
    """A transformers model in memory, itself or wrapped by torch.compile, data parallelism or PEFT."""

    given: nn.Module
    given_tokenizer: Any
    given_name: str | None = None
    """None for the class and the first 8 hex digits of the SHA-256 of the tensors."""
    declared: PhaseMap | None = None
    path_of_layers: str | None = None

    @property
    def name(self) -> str:
        """Name that was given, or the class and 8 hex digits of its tensors."""
        return self.given_name or f"{self._label}-{self._tensors[:8]}"

    @property
    def source(self) -> str:
        """The word "memory"."""
        return MEMORY

    @property
    def phases(self) -> PhaseMap | None:
        """Phases that were given."""
        return self.declared

    @property
    def layers_path(self) -> str | None:
        """Path of the blocks that was given."""
        return self.path_of_layers

    @property
    def device(self) -> str:
        """Kind of device that it is on; "sharded" where it is on several."""
        kinds = self.devices
        return kinds[0].split(":")[0] if len(kinds) == 1 else SHARDED

    @property
    def dtype(self) -> str:
        """Dtype of its parameters."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def _label(self) -> str:
        return type(_without_wrappers(self.given)).__name__

    @cached_property
    def model(self) -> PreTrainedModel:
        """The transformers model, with the adapters that are in its layers. Raises UnavailableError."""
        from transformers import PreTrainedModel

        module = _without_wrappers(self.given)
        peft = sys.modules.get("peft")  # a wrapped module has imported it
        if peft is not None and isinstance(module, peft.PeftModel):
            if module.active_peft_config.is_prompt_learning:
                raise self._unavailable(
                    f"its adapter ({module.active_peft_config.peft_type.value}) adds tokens before the text, and "
                    "changes no layer",
                    "Measure the model below it, or one with an adapter in its layers, such as LoRA.",
                )
            module = module.get_base_model()
        if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
            raise self._spread("FSDP")
        if not isinstance(module, PreTrainedModel):
            raise self._unavailable(
                f"{self._label} is no transformers model (transformers.PreTrainedModel)",
                "Pass the language model that it holds.",
            )
        self._check(module)
        return module

    def _check(self, model: PreTrainedModel) -> None:
        """Raise UnavailableError for weights that are not all here, or that a forward pass would change."""
        import torch

        distributed = sys.modules.get("torch.distributed.tensor")
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if (distributed is not None and isinstance(tensor, distributed.DTensor)) or hasattr(tensor, "ds_id"):
                raise self._spread(path)
            if tensor.is_meta:
                raise self._unavailable(
                    f"{path} is not in memory (it is on torch's meta device, or offloaded)",
                    "Load all weights, or measure the model by its path.",
                )
        if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise self._unavailable(
                f"its weights are {model.dtype}, and states are measured in float32, bfloat16 or float16",
                "Measure a copy: copy.deepcopy(model).float().",
            )
        if hasattr(getattr(model, "base_model", model), "layers_are_rescaled"):
            raise self._unavailable(
                "RWKV changes its weights in place where it runs in evaluation mode",
                "Save it, and measure it by its path.",
            )

    def _spread(self, where: str) -> UnavailableError:
        do = "Save a checkpoint, and measure that by its path."
        return self._unavailable(f"its weights are spread over processes ({where})", do)

    def _unavailable(self, what: str, do: str) -> UnavailableError:
        return UnavailableError(self.given_name or self._label, what, do)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer that cuts, pads and samples nothing. Raises OptionError."""
        from transformers import PreTrainedTokenizerBase

        if not isinstance(self.given_tokenizer, PreTrainedTokenizerBase):
            what = "none is given" if self.given_tokenizer is None else f"{type(self.given_tokenizer).__name__} is none"
            raise OptionError(
                f"a module in memory is measured with its tokenizer, a transformers one, and {what}: "
                f"measure(model, tokenizer=AutoTokenizer.from_pretrained(...))"
            )
        tokenizer = copy.deepcopy(self.given_tokenizer)
        steady(tokenizer)
        return tokenizer

    @cached_property
    def decoder(self) -> Decoder:
        """The stack that runs. Raises CaptureError."""
        return find_decoder(self.model, self.path_of_layers)

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """Devices of its parts, that of the embeddings first, which takes the token ids."""
        parts = (self.model.get_input_embeddings(), *self.decoder.blocks)
        tensors = (tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))
        return tuple(dict.fromkeys(str(tensor.device) for tensor in tensors))

    @cached_property
    def _tensors(self) -> str:
        """SHA-256 over names and contents of all tensors."""
        held: dict[str, Any] = {**dict(self.model.named_buffers()), **self.model.state_dict()}
        total = hashlib.sha256()
        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, MAX_THREADS)) as executor:
            for path, digest in zip(held, executor.map(self._digest, held.items()), strict=True):
                total.update(f"{path}\0{digest}\n".encode())
        return total.hexdigest()

    def _digest(self, entry: tuple[str, Any]) -> str:
        path, value = entry
        digest = hashlib.sha256()
        try:
            for part in _pieces(value):
                digest.update(part)
        except Exception as error:  # any layout or quantisation of any library
            raise self._unavailable(
                f"its tensor {path} ({type(value).__name__}) cannot be read ({brief(error)})",
                "Measure the unquantised model, or measure it by its path.",
            ) from error
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over tensors and buffers, config, tokenizer, and what else its modules hold.

        No two are equal where a hook or a function that the user put on a module may change what it does.
        """
        config = {key: value for key, value in self.model.config.to_dict().items() if key not in VOLATILE}
        ran = [part for root in _roots(self.decoder) for part in root.modules()]
        facts = {
            "tensors": self._tensors,
            "config": config,
            "attention": str(self.model.config._attn_implementation),
            "modules": [_traits(path, part) for path, part in self.model.named_modules()],
            "tokenizer": _tokenizer_files(self.tokenizer),
            "altered": secrets.token_hex(16) if any(_altered(part) for part in ran) else None,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    @contextmanager
    def opened(self) -> Iterator[LoadedModel]:
        """Put the module into evaluation mode for as long as it is measured."""
        started = time.perf_counter()
        tokenizer, devices = self.tokenizer, self.devices
        with left_as_it_was(self.model):
            yield LoadedModel(
                model=self.model,
                tokenizer=tokenizer,
                devices=devices,
                dtype=self.dtype,
                attention=str(self.model.config._attn_implementation),
                seconds=time.perf_counter() - started,
            )


def module_in_memory(
    module: Any,
    tokenizer: Any,
    *,
    device: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
    phases: PhaseMap | None = None,
    layers_path: str | None = None,
) -> ModuleInMemory:
    """Return a module as a subject; `device` and `dtype` may only say what it has.

    Raises OptionError for what is no torch module, for a device or dtype that is not its own, and without a tokenizer;
    UnavailableError for a module that cannot be measured.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise OptionError(
            f"{type(module).__name__} is no model: give a model's name, path or hub id, or a torch module."
        )
    subject = ModuleInMemory(module, tokenizer, name, phases, layers_path)
    assert subject.tokenizer is not None
    if dtype not in (None, "auto", subject.dtype):
        raise OptionError(f"the module is {subject.dtype}, and is not cast to {dtype}. Leave dtype out, or cast it.")
    if device not in (None, "auto", subject.device, *subject.devices):
        raise OptionError(
            f"the module is on {', '.join(subject.devices)}, and is not moved to {device}. Leave device out."
        )
    return subject


def _without_wrappers(module: Any) -> Any:
    """Return the module inside torch.compile and data parallelism."""
    from torch.nn import DataParallel
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


def _roots(decoder: Decoder) -> list[Any]:
    return [decoder.module, *([] if decoder.encoder is None else [decoder.encoder.module])]


def _altered(part: nn.Module) -> bool:
    """Return True if a hook or a function of the user may change what a module does.

    Those of libraries do not: they move tensors, or ask for gradients.
    """
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    foreign = [hook for hook in hooks if str(getattr(hook, "__module__", "")).partition(".")[0] not in _LIBRARIES]
    return bool(foreign) or ("forward" in vars(part) and not hasattr(part, "_hf_hook"))


def _traits(path: str, part: nn.Module) -> dict[str, Any]:
    """Return what a module is beside its tensors: its class, its code, and plain attributes, such as a LoRA's scale."""
    kind = type(part)
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return {
        "path": path,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "code": None if code is None else [code.co_code.hex(), code.co_names, list(filter(_is_plain, code.co_consts))],
        "attributes": {
            name: value for name, value in vars(part).items() if name not in _WITHOUT_EFFECT and _is_plain(value)
        },
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)


def _pieces(value: Any) -> Iterator[bytes]:
    """Yield the bytes of a tensor, or of what a state dict holds in its place, with dtype and shape before them."""
    import torch

    if isinstance(value, list | tuple):
        for item in value:
            yield from _pieces(item)
    elif not isinstance(value, torch.Tensor):
        yield repr(value).encode()
    elif hasattr(value, "__tensor_flatten__"):  # a subclass made of plain tensors, such as torchao's
        names, context = value.__tensor_flatten__()
        yield f"{type(value).__name__} {value.dtype} {tuple(value.shape)} {context}\n".encode()
        for name in names:
            yield from _pieces(getattr(value, name))
    elif value.is_quantized:
        yield f"{value.dtype} {tuple(value.shape)} {value.qscheme()}\n".encode()
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield f"{value.q_scale()} {value.q_zero_point()}\n".encode()
        else:
            yield from _pieces([value.q_per_channel_scales(), value.q_per_channel_zero_points()])
        yield from _pieces(value.int_repr())
    else:
        yield f"{value.dtype} {tuple(value.shape)}\n".encode()
        yield from _content(value)


def _content(tensor: Tensor) -> Iterator[bytes]:
    import torch

    flat = tensor.detach().reshape(-1)
    step = HASHED_AT_ONCE // flat.element_size()
    for start in range(0, len(flat), step):
        yield flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the SHA-256 of each file that a tokenizer is saved to, without where it came from."""
    with temporary_folder(Path(tempfile.gettempdir())) as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in folder.rglob("*") if path.is_file()]
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    name = "tokenizer_config.json"
    if name in contents:
        kept = {key: value for key, value in json.loads(contents[name]).items() if key not in VOLATILE}
        contents[name] = json.dumps(kept, sort_keys=True).encode()
    return {path: hashlib.sha256(content).hexdigest() for path, content in sorted(contents.items())}
