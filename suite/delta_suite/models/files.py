"""The files of a model in a directory: which ones are loaded, and whether all are there. Nothing is loaded here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import IncompleteError, UnavailableError
from delta_suite.paths import shorten
from delta_suite.reading import UnreadableFileError, read_bytes, read_json

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec

TOKENIZER_FILES = frozenset(
    {
        *("added_tokens.json", "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json"),
        *("merges.txt", "normalizer.json", "prophetnet.tokenizer", "sentencepiece.bpe.model", "sentencepiece.model"),
        *("source.spm", "special_tokens_map.json", "spiece.model", "spm.model", "spm_char.model", "target.spm"),
        *("target_vocab.json", "tekken.json", "tiktoken.model", "tokenizer.json", "tokenizer.model"),
        *("tokenizer_config.json", "vocab-src.json", "vocab-tgt.json", "vocab.json", "vocab.txt"),
        *("word_pronunciation.json", "word_shape.json"),
    }
)
"""Files that the tokenizers of transformers read: the values of VOCAB_FILES_NAMES of all classes, and those that every
tokenizer reads. A test compares them with the transformers that is installed."""

CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
"""Files with a tokenizer's chat template, and the folder of further ones (`*.jinja`)."""

_VERSIONED = re.compile(r"tokenizer\.model.*|tokenizer\.\d.*\.json")
"""Names of a tokenizer for one of several versions: those of Mistral, and `fast_tokenizer_files` of transformers."""

GENERATION_CONFIG = "generation_config.json"
"""The settings for generating, in which the token may stand that a decoder reads first."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names that save_pretrained gives to whole weights, and to the index of weights in several files."""

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""The two names for pickled weights."""

ADAPTER = "adapter_config.json"
"""File that peft writes beside the weights of an adapter."""

SPLIT_GGUF = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""End of the name of a part of a GGUF file."""

RANK_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Names of what each rank of a distributed run saved; transformers would read them in place of the weights."""

LONGEST_NAME = 200
"""Most bytes of a file's name in an index; file systems take 255."""

CONVERTERS = {
    r"pytorch_model_fsdp.*|.+\.distcp": "FSDP: accelerate merge-weights {0} OUT joins the shards",
    r"global_step\d+|zero_to_fp32\.py|mp_rank_\d+_model_states\.pt": (
        "DeepSpeed: python zero_to_fp32.py {0} OUT --safe_serialization, with the script beside them, joins the shards"
    ),
    RANK_SHARD.pattern: "a distributed run: save_pretrained after gathering the model on one rank joins the shards",
}
"""Names of shards that training writes, and what makes a checkpoint of them."""


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
    """Everything else that decides what is measured, such as config.json and the tokenizer; with a GGUF file a
    tokenizer that lies beside it, which transformers prefers."""
    revision: str | None = None
    """Commit of the hub repository; None for models from elsewhere."""
    notes: tuple[str, ...] = ()
    """Lines for the user about what lies there and is not measured, or not as it asks to be."""

    def relative(self, path: Path) -> str:
        """Return the path of one of the files below the directory, with `/`."""
        return path.relative_to(self.directory).as_posix()


def is_tokenizer_file(name: str) -> bool:
    """Return True if a file of this name is part of a tokenizer.

    Example:
        >>> is_tokenizer_file("vocab.json"), is_tokenizer_file("tokenizer.model.v3"), is_tokenizer_file("config.json")
        (True, True, False)
    """
    return name in TOKENIZER_FILES or name.endswith(".tiktoken") or _VERSIONED.fullmatch(name) is not None


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
        file = _gguf(spec, directory, gguf)
        return ModelFiles(directory, gguf, (file,), _others(spec, directory, None, (file,)), revision)
    config = _config(spec, directory)
    weights = () if spec.random_weights else _weights(spec, directory, config)
    others, notes = _others(spec, directory, config, weights), _notes(spec, directory, config)
    return ModelFiles(directory, None, weights, others, revision, notes)


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


def nested(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a config and of the configs inside it, dotted, with their values.

    Example:
        >>> list(nested({"dtype": "auto", "text_config": {"layers": 2}}))
        [('dtype', 'auto'), ('text_config.layers', 2)]
    """
    for key, value in content.items():
        if isinstance(value, dict):
            yield from nested(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _notes(spec: ModelSpec, directory: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """Return what the user should know of a folder that can be measured."""
    notes = []
    if (directory / ADAPTER).is_file():
        notes.append(
            f"the adapter in {directory} ({ADAPTER}) is not measured, the model beside it is; merge it "
            "(merge_and_unload of peft) and pass what that saves to measure both"
        )
    values = dict(nested(config))
    for name, keys in (("config.json", values), ("tokenizer_config.json", _tokenizer_config(directory))):
        code = sorted({str(value) for key, value in keys.items() if key.startswith("auto_map")})
        elsewhere = [value for value in code if "--" in value]
        if elsewhere and spec.trust_remote_code:
            raise UnavailableError(
                spec.name,
                f"{directory / name} takes code from another repository ({shorten(', '.join(elsewhere))}), which no "
                "fingerprint covers",
                f"Copy its .py files into the folder, and write auto_map in {name} without what stands before `--`.",
            )
        if code and not spec.trust_remote_code:
            notes.append(
                f"{name} names code of its own ({shorten(', '.join(code))}), which is not trusted and does not run; "
                "what transformers has for it does"
            )
    if any(value in ("longrope", "su") for key, value in values.items() if key.endswith(("rope_type", ".type"))):
        first = next(
            (value for key, value in values.items() if key.endswith("original_max_position_embeddings")), "its"
        )
        notes.append(
            f"LongRoPE has other frequencies beyond its original context, so that documents run in pieces of at most "
            f"{first} tokens"
        )
    for key, value in values.items():
        if key.rpartition(".")[2] in ("_attn_implementation", "attn_implementation", "_experts_implementation"):
            if value not in (None, "eager", "sdpa"):
                notes.append(f"config.json asks for {key} = {shorten(str(value))}, which is set aside")
        elif key.rpartition(".")[2] in ("dtype", "torch_dtype") and value in ("float64", "double"):
            notes.append(f"config.json says {key} = {value}; the widest dtype that is measured in is float32")
    return tuple(notes)


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    """Return the values of tokenizer_config.json by their dotted keys; none if it cannot be read."""
    try:
        content = read_json(directory / "tokenizer_config.json")
    except UnreadableFileError:
        return {}
    return dict(nested(content)) if isinstance(content, dict) else {}


def _gguf(spec: ModelSpec, directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        ggufs = ", ".join(sorted(path.name for path in directory.glob("*.gguf"))) or "none"
        raise IncompleteError(spec.name, f"{directory} has no file {name}", f"GGUF files there: {ggufs}.")
    if (part := SPLIT_GGUF.search(name)) and int(part[2]) > 1:
        raise _split(spec, path, int(part[1]), int(part[2]))
    return path


def _split(spec: ModelSpec, path: Path, number: int, count: int) -> UnavailableError:
    """Return the error for a GGUF file that is a part of a model; transformers reads single files."""
    first = SPLIT_GGUF.sub(rf"-00001-of-{count:05}.gguf", path.name)
    whole = SPLIT_GGUF.sub(".gguf", path.name)
    return UnavailableError(
        spec.name,
        f"{path.name} is part {number} of {count} of a split GGUF file",
        f"Join them: llama-gguf-split --merge {path.parent / first} {path.parent / whole}, and pass that file.",
    )


def _only_gguf(spec: ModelSpec, directory: Path) -> str:
    """Return the only GGUF file of a directory without config.json."""
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    if len(ggufs) == 1 or (ggufs and all(SPLIT_GGUF.search(name) for name in ggufs)):
        return ggufs[0]
    if ggufs:
        raise UnavailableError(
            spec.name,
            f"{directory} has {len(ggufs)} GGUF files and no config.json, so which one is meant is open",
            f"Pass the file: {', '.join(str(directory / name) for name in ggufs[:6])}.",
        )
    if os.path.lexists(config := directory / "config.json"):
        raise IncompleteError(
            spec.name, f"{config} is no regular file, or a link that leads nowhere", "Save or download it again."
        )
    do = "Pass a directory written by save_pretrained, or one with a .gguf file."
    if (directory / ADAPTER).is_file():
        do = "It holds an adapter: merge it into its base model (merge_and_unload) and pass what that saves."
    elif shards := _converter(directory):
        do = f"It holds {shards}; pass that."
    elif below := sorted(path.parent.name for path in directory.glob("*/config.json")):
        do = f"Directories below it have one: {', '.join(str(directory / name) for name in below[:6])}."
    raise IncompleteError(spec.name, f"{directory} has no config.json", do)


def _converter(directory: Path) -> str | None:
    """Return which shards of a training run a directory holds, and what joins them; None if it holds none."""
    for name in sorted(path.name for path in directory.iterdir()):
        for pattern, cure in CONVERTERS.items():
            if re.fullmatch(pattern, name):
                return f"{name}, shards of " + cure.format(directory / name if "fsdp" in name else directory)
    return None


def _config(spec: ModelSpec, directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = read_json(path)
    except UnreadableFileError as error:
        raise UnavailableError(spec.name, str(error).removesuffix("."), "Save or download it again.") from error
    if not isinstance(config, dict):
        raise UnavailableError(spec.name, f"{path} is not a JSON object", "Save or download it again.")
    return config


def _weights(spec: ModelSpec, directory: Path, config: dict[str, Any]) -> tuple[Path, ...]:
    """Return the weights that transformers would load from here, in its order of preference."""
    names = [SINGLE, INDEX]
    if (named := config.get("transformers_weights")) is not None:
        if not _is_inside(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise UnavailableError(
                spec.name,
                f"{directory / 'config.json'} says transformers_weights = {shorten(repr(named))}, which is no "
                ".safetensors file in that folder",
                "Remove the key, or name such a file.",
            )
        names = [named]
    present = sorted(path.name for path in directory.iterdir())
    if any(RANK_SHARD.fullmatch(name) for name in present):
        raise UnavailableError(spec.name, f"{directory} holds {_converter(directory)}", "Pass what that saves.")
    if spec.allow_pickle and not any((directory / name).is_file() for name in names):
        names = list(PICKLES)
    for name in names:
        if (directory / name).is_file():
            return _shards(spec, directory, name) if name.endswith(".index.json") else (directory / name,)
    pickles = [name for name in present if re.fullmatch(r"pytorch_model.*\.bin", name)]
    if pickles and not spec.allow_pickle:
        raise pickles_only(spec, str(directory), pickles)
    suffixes = (".safetensors", ".bin", ".pt", ".gguf")
    similar = [name for name in present if name.endswith(suffixes)]
    do = "Pass a directory written by save_pretrained, or a .gguf file."
    if ADAPTER in present:
        do = "It holds an adapter: merge it into its base model (merge_and_unload of peft) and pass what that saves."
    elif shards := _converter(directory):
        do = f"It holds {shards}; pass that."
    raise IncompleteError(
        spec.name,
        f"{directory} has a config.json but no weights ({' or '.join(names)})",
        f"Similar files there: {', '.join(similar[:6]) or 'none'}. {do}",
    )


def _is_inside(name: object) -> bool:
    """Return True for the name of a file that lies in the model's folder, or in one below it."""
    if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) < LONGEST_NAME or "\0" in name:
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _shards(spec: ModelSpec, directory: Path, index: str) -> tuple[Path, ...]:
    path = directory / index
    try:
        content = read_json(path)
        names = sorted(set(content["weight_map"].values()))
    except (UnreadableFileError, KeyError, AttributeError, TypeError) as error:
        why = error.why if isinstance(error, UnreadableFileError) else repr(error)
        raise UnavailableError(
            spec.name, f"{path} has no weight_map that can be read ({why})", "Copy it again."
        ) from error
    suffix = ".bin" if index in PICKLES else ".safetensors"
    if outside := [name for name in names if not _is_inside(name) or not name.endswith(suffix)]:
        raise UnavailableError(
            spec.name,
            f"{path} names {shorten(repr(outside[0]))}, which is no {suffix} file in that folder",
            "Safetensors weights are read from such files alone. Save the model again: save_pretrained writes them.",
        )
    if not isinstance(content.get("metadata"), dict):
        raise UnavailableError(
            spec.name,
            f"{path} has no table `metadata`, which transformers reads",
            'Add "metadata": {} to it, or save the model again: save_pretrained writes it.',
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing or not names:
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise IncompleteError(
            spec.name,
            f"{directory} lacks {len(missing)} of the {len(names)} weight files that {index} names: {shown}",
            "Copy or download the rest.",
        )
    return tuple(directory / name for name in names)


def _others(
    spec: ModelSpec, directory: Path, config: dict[str, Any] | None, weights: tuple[Path, ...]
) -> tuple[Path, ...]:
    """Return config.json, the tokenizer's files, the index of the weights, trusted code, and what these name.

    config: the content of config.json; None for a GGUF file, which needs none of these, and reads what is there but
        config.json and an index.
    """
    names = {path.name for path in directory.iterdir() if path.is_file()}
    tokenizer = {name for name in names if is_tokenizer_file(name)}
    if config is not None and not tokenizer - {"special_tokens_map.json", "added_tokens.json"}:
        raise IncompleteError(
            spec.name,
            f"{directory} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json or the like)",
            "Save the one it was trained with beside the weights: tokenizer.save_pretrained(DIRECTORY).",
        )
    needed = tokenizer | ({"config.json", INDEX, *PICKLES[1:], *CHAT_TEMPLATES} & names)
    if config is None:
        needed -= {"config.json", INDEX, *PICKLES}
    needed |= {name for name in names if spec.trust_remote_code and name.endswith(".py")}
    # Code reads files of any name, and a config can name one for each version of transformers.
    readers = [name for name in needed if name.endswith(".py") or name in ("config.json", "tokenizer_config.json")]
    text = b"".join(read_bytes(directory / name) for name in readers)
    others = names - {SINGLE, *PICKLES, *(path.name for path in weights)}
    needed |= {name for name in others if re.search(rb"[\"']%b[\"']" % re.escape(os.fsencode(name)), text)}
    if GENERATION_CONFIG in names and _says_what_is_read_first(directory / GENERATION_CONFIG, config or {}):
        needed.add(GENERATION_CONFIG)
    return *(directory / name for name in sorted(needed)), *sorted((directory / CHAT_TEMPLATES[-1]).glob("*.jinja"))


def _says_what_is_read_first(generation_config: Path, config: dict[str, Any]) -> bool:
    """Return True if a decoder's first token may stand in the file, as that of an encoder-decoder does."""
    return bool(config.get("is_encoder_decoder")) or b"decoder_start_token_id" in read_bytes(generation_config)
