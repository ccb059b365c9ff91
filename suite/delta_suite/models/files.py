"""The files of a model in a directory: which ones are loaded, and whether all are there. Nothing is loaded here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import IncompleteError, UnavailableError

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""Files that the tokenizers of transformers read (their VOCAB_FILES_NAMES), besides `*.tiktoken`."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names that save_pretrained gives to whole weights, and to the index of weights in several files."""

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""The two names for pickled weights."""


@dataclass(frozen=True)
class ModelFiles:
    """The files a model is loaded from, checked to be complete."""

    directory: Path
    """Directory that holds all of them."""
    gguf: str | None
    """GGUF file, relative to the directory; it holds weights, config and tokenizer in one."""
    weights: tuple[Path, ...]
    """Weight files; empty for a control, unless its config is inside a GGUF file."""
    others: tuple[Path, ...]
    """config.json, the tokenizer, and the model's code if it is trusted; empty for GGUF."""
    revision: str | None = None
    """Commit of the hub repository; None for models from elsewhere."""


def is_tokenizer_file(name: str) -> bool:
    """Return True if a file of this name is part of a tokenizer.

    Example:
        >>> is_tokenizer_file("vocab.json"), is_tokenizer_file("config.json")
        (True, False)
    """
    return name in TOKENIZER_FILES or name.endswith(".tiktoken")


def model_files(spec: ModelSpec, directory: Path, revision: str | None = None) -> ModelFiles:
    """Return the files in `directory` that the model is loaded from.

    Raises:
        IncompleteError: a file is missing.
        UnavailableError: a file cannot be read, or the directory holds no model that can be loaded.
    """
    gguf = spec.gguf
    if gguf is None and not (directory / "config.json").is_file():
        gguf = _only_gguf(spec, directory)
    if gguf is not None:
        return ModelFiles(directory, gguf, (_gguf(spec, directory, gguf),), (), revision)
    config = _config(spec, directory)
    weights = () if spec.random_weights else _weights(spec, directory, config)
    return ModelFiles(directory, None, weights, _others(spec, directory), revision)


def pickles_only(spec: ModelSpec, where: str, weights: list[str]) -> UnavailableError:
    """Return the error for a model whose weights are only there as pickles.

    where: the directory or repository, for the message.
    """
    return UnavailableError(
        spec.name,
        f"{where} has its weights as pickles alone ({weights[0]}), which can run code when they are read",
        "If you trust them, convert them (AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIRECTORY), "
        "the tokenizer likewise) and pass the directory, or set allow_pickle = true in an entry of models.toml.",
    )


def _gguf(spec: ModelSpec, directory: Path, name: str) -> Path:
    if not (directory / name).is_file():
        ggufs = ", ".join(sorted(path.name for path in directory.glob("*.gguf"))) or "none"
        raise IncompleteError(spec.name, f"{directory} has no file {name}", f"GGUF files there: {ggufs}.")
    return directory / name


def _only_gguf(spec: ModelSpec, directory: Path) -> str:
    """Return the only GGUF file of a directory without config.json."""
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise UnavailableError(
            spec.name,
            f"{directory} has {len(ggufs)} GGUF files and no config.json, so which one is meant is open",
            f"Pass the file: {', '.join(str(directory / name) for name in ggufs[:6])}.",
        )
    do = "Pass a directory written by save_pretrained, or one with a .gguf file."
    if (directory / "adapter_config.json").is_file():
        do = "It holds an adapter: merge it into its base model (merge_and_unload) and pass what that saves."
    elif below := sorted(path.parent.name for path in directory.glob("*/config.json")):
        do = f"Directories below it have one: {', '.join(str(directory / name) for name in below[:6])}."
    raise IncompleteError(spec.name, f"{directory} has no config.json", do)


def _config(spec: ModelSpec, directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnavailableError(spec.name, f"{path} cannot be read ({error})", "Save or download it again.") from error
    if not isinstance(config, dict):
        raise UnavailableError(spec.name, f"{path} is not a JSON object", "Save or download it again.")
    return config


def _weights(spec: ModelSpec, directory: Path, config: dict[str, Any]) -> tuple[Path, ...]:
    """Return the weights that transformers would load from here, in its order of preference."""
    named = config.get("transformers_weights")
    names = [named] if isinstance(named, str) else [SINGLE, INDEX]
    if spec.allow_pickle and not any((directory / name).is_file() for name in names):
        names = list(PICKLES)
    for name in names:
        if (directory / name).is_file():
            return _shards(spec, directory, name) if name.endswith(".index.json") else (directory / name,)
    pickles = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if pickles and not spec.allow_pickle:
        raise pickles_only(spec, str(directory), pickles)
    suffixes = (".safetensors", ".bin", ".pt", ".gguf")
    similar = sorted(path.name for path in directory.iterdir() if path.suffix in suffixes)
    raise IncompleteError(
        spec.name,
        f"{directory} has a config.json but no weights ({' or '.join(names)})",
        f"Similar files there: {', '.join(similar[:6]) or 'none'}. "
        "Pass a directory written by save_pretrained, or a .gguf file.",
    )


def _shards(spec: ModelSpec, directory: Path, index: str) -> tuple[Path, ...]:
    try:
        content = json.loads((directory / index).read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UnavailableError(
            spec.name, f"{directory / index} has no weight_map that can be read ({error!r})", "Copy it again."
        ) from error
    if not isinstance(content.get("metadata"), dict):
        raise UnavailableError(
            spec.name,
            f"{directory / index} has no table `metadata`, which transformers reads",
            'Add "metadata": {} to it, or save the model again: save_pretrained writes it.',
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise IncompleteError(
            spec.name,
            f"{directory} lacks {len(missing)} of the {len(names)} weight files that {index} names: {shown}",
            "Copy or download the rest.",
        )
    return tuple(directory / name for name in names)


def _others(spec: ModelSpec, directory: Path) -> tuple[Path, ...]:
    """Return config.json, the tokenizer's files, the index of the weights, and trusted code."""
    names = {path.name for path in directory.iterdir() if path.is_file()}
    tokenizer = {name for name in names if is_tokenizer_file(name)}
    if not tokenizer - {"special_tokens_map.json", "added_tokens.json"}:
        raise IncompleteError(
            spec.name,
            f"{directory} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json or the like)",
            "Save the one it was trained with beside the weights: tokenizer.save_pretrained(DIRECTORY).",
        )
    needed = tokenizer | {"config.json"} | ({INDEX, *PICKLES[1:]} & names)
    if spec.trust_remote_code:
        needed |= {name for name in names if name.endswith(".py")}
    return tuple(directory / name for name in sorted(needed))
