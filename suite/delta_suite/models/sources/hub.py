"""Models of the Hugging Face hub: the local cache first, then one short attempt at the network.

A model that is cached is taken as it lies there: no request is made, so a run has the same weights tomorrow.
`hf download org/name` fetches what the branch has become.
"""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from delta_suite.errors import IncompleteError, UnavailableError
from delta_suite.models.registry import ModelSpec

TIMEOUT = 5.0
"""Seconds that the hub has to answer the first request, so that no network shows soon."""

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
"""What the tokenizers of transformers read (their VOCAB_FILES_NAMES), with `*.tiktoken`."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name is part of a tokenizer."""
    return name in TOKENIZER_FILES or name.endswith(".tiktoken")


def cached(spec: ModelSpec) -> Path | None:
    """The snapshot of the model in the local cache, complete or not; None where nothing of it is there."""
    from huggingface_hub import try_to_load_from_cache

    name = spec.gguf or "config.json"
    found = try_to_load_from_cache(_id(spec), name, revision=_revision(spec))
    # The third answer, a marker object, says that the repository is known to lack the file.
    return Path(found).parents[name.count("/")] if isinstance(found, str) else None


def not_cached(spec: ModelSpec) -> UnavailableError:
    """The error of a model that is not in the cache while nothing may be downloaded."""
    return IncompleteError(
        spec.name,
        f"{_id(spec)} at {_revision(spec)} is not in the Hugging Face cache ({_cache()})",
        f"It is downloaded when it is measured, or now by `{command(spec)}`.",
    )


def download(spec: ModelSpec, because: str) -> Path:
    """Download what the model needs, and nothing else, into the Hugging Face cache; its snapshot there.

    because: what lacks in the cache, for the message of an attempt that fails.
    Raises `ModelUnavailableError`: unreachable or offline (within seconds), gated, no such repository or revision,
    no safetensors weights, disk full.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _explained(spec, because):
        info = HfApi().model_info(_id(spec), revision=_revision(spec), files_metadata=True, timeout=TIMEOUT)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    names = _wanted(spec, sizes)
    _check_space(spec, sizes, names, info.sha or _revision(spec))
    # The names go in as patterns, in which [ begins a character class.
    patterns = [name.replace("[", "[[]") for name in names]
    with _explained(spec, because):
        return Path(snapshot_download(_id(spec), revision=_revision(spec), allow_patterns=patterns))


def _wanted(spec: ModelSpec, names: Mapping[str, int]) -> list[str]:
    """The files of the repository that are needed: no other formats, and no pickle that was not asked for."""
    where = f"{_id(spec)} at {_revision(spec)}"
    if spec.gguf is not None:
        if spec.gguf not in names:
            ggufs = ", ".join(name for name in names if name.endswith(".gguf")) or "none"
            raise UnavailableError(
                spec.name,
                f"{where} has no file {spec.gguf}",
                f"GGUF files there: {ggufs}. Correct `gguf` of the entry.",
            )
        return [spec.gguf]
    top = [name for name in names if "/" not in name]
    safetensors = [name for name in top if name.endswith(".safetensors")]
    if spec.random_weights:
        weights = []
    elif SINGLE in top:
        weights = [SINGLE]
    elif safetensors:
        # consolidated.safetensors is the publisher's own layout beside the one of transformers.
        weights = [name for name in safetensors if not name.startswith(("consolidated", "adapter_"))]
        weights += [INDEX] if INDEX in top else []
    else:
        weights = [name for name in top if name.startswith("pytorch_model") and name.endswith((".bin", *PICKLES))]
        if weights and not spec.allow_pickle:
            raise pickle_only(spec, where, weights)
    no_weights = not weights and not spec.random_weights
    if no_weights or "config.json" not in top:
        raise UnavailableError(
            spec.name,
            f"{where} is not a model that transformers can load: it has no "
            + ("safetensors weights" if no_weights else "config.json"),
            _whats_there(top),
        )
    others = [name for name in top if name == "config.json" or is_tokenizer_file(name)]
    code = [name for name in top if name.endswith(".py")] if spec.trust_remote_code else []
    return [*others, *code, *weights]


def _whats_there(names: list[str]) -> str:
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        shown = ", ".join(sorted(ggufs)[:4])
        return f"It has GGUF files: name one under `gguf` in an entry of models.toml ({shown})."
    if "adapter_config.json" in names:
        return "It is an adapter: merge it into its base model and pass the directory."
    return "Choose another repository, or convert it and pass the directory."


def pickle_only(spec: ModelSpec, where: str, weights: list[str]) -> UnavailableError:
    """The error of weights that are there as pickles alone."""
    return UnavailableError(
        spec.name,
        f"{where} has its weights as pickles alone ({weights[0]}), which can run code when they are read",
        "If you trust them, convert them (AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIRECTORY), "
        "the tokenizer likewise) and pass the directory, or set allow_pickle = true in an entry of models.toml.",
    )


def _check_space(spec: ModelSpec, sizes: Mapping[str, int], names: list[str], commit: str) -> None:
    from huggingface_hub import try_to_load_from_cache

    there = _cache()
    while not there.is_dir():
        there = there.parent
    missing = [name for name in names if not isinstance(try_to_load_from_cache(_id(spec), name, revision=commit), str)]
    needed, free = sum(sizes[name] for name in missing), shutil.disk_usage(there).free
    if needed > free:
        raise _disk_full(spec, f"it needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free")


def _disk_full(spec: ModelSpec, why: str) -> UnavailableError:
    return UnavailableError(
        spec.name,
        f"no space for the download in {_cache()}: {why}",
        "Free some (`hf cache ls`, `hf cache rm`), or set HF_HOME to a directory on a larger disk.",
    )


@contextmanager
def _explained(spec: ModelSpec, because: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into our words."""
    from huggingface_hub import constants, errors

    # The hub client has changed its HTTP library twice; its own error derives from the base error of each.
    transport: tuple[Any, ...] = errors.HfHubHTTPError.__bases__
    link = f"{constants.ENDPOINT}/{_id(spec)}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise _gated(spec, link) from error
    except errors.RevisionNotFoundError as error:
        branches = f" or one of {', '.join(spec.checkpoints)}" if spec.checkpoints else ""
        raise UnavailableError(
            spec.name,
            f"the repository {_id(spec)} has no revision {_revision(spec)!r}",
            f"Use a branch, tag or commit that {link} lists, such as main{branches}.",
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UnavailableError(
            spec.name,
            f"the hub has no model {_id(spec)}, or it is private",
            f"Check the id at {link}; for a private one log in: `hf auth login`.{_local_hint(spec)}",
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        offline = constants.HF_HUB_OFFLINE
        reason = (
            "HF_HUB_OFFLINE forbids to ask the hub" if offline else f"the download broke off ({_first_line(error)})"
        )
        way = "Unset HF_HUB_OFFLINE, or r" if offline else "R"
        raise UnavailableError(
            spec.name,
            f"{because}, and {reason}",
            f"{way}un `{command(spec)}` where there is a network.{_local_hint(spec)}",
        ) from error
    except (OSError, RuntimeError, *transport) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise _disk_full(spec, "the disk is full") from error
        if status in (401, 403):
            raise _gated(spec, link) from error
        if status is None:
            reached = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {_first_line(error)})"
        else:
            reached = f"{constants.ENDPOINT} answered with an error ({_first_line(error)})"
        raise UnavailableError(
            spec.name,
            f"{because}, and {reached}",
            f"Try again later, or run `{command(spec)}` where the hub can be reached and bring the cache here "
            f"(HF_HOME), or pass a directory.{_local_hint(spec)}",
        ) from error


def _gated(spec: ModelSpec, link: str) -> UnavailableError:
    return UnavailableError(
        spec.name,
        f"access to {_id(spec)} is restricted, and the hub refuses it to this login (or to none)",
        f"Accept the licence at {link}, then log in with `hf auth login` or set HF_TOKEN.",
    )


def _local_hint(spec: ModelSpec) -> str:
    """A word to who meant a directory: org/name looks like one."""
    parent = Path(_id(spec)).parent
    if parent == Path() or not parent.is_dir():
        return ""
    return f"\n  (If a directory was meant: {parent}/ is here, but has no {Path(_id(spec)).name}.)"


def _id(spec: ModelSpec) -> str:
    assert spec.hub is not None, f"{spec.name} is no model of the hub"
    return spec.hub


def _revision(spec: ModelSpec) -> str:
    return spec.revision or "main"


def command(spec: ModelSpec) -> str:
    """What downloads the model by hand."""
    return f"hf download {_id(spec)}" + (f" --revision {spec.revision}" if spec.revision else "")


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0].removesuffix(".") or type(error).__name__
