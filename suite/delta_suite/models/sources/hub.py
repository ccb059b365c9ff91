"""Models of the Hugging Face hub: the local cache first, then one short attempt to download.

A model that is cached is taken as it is, without a request, so that a run has the same weights tomorrow.
`hf download org/name` fetches what the branch has become.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import IncompleteError, UnavailableError, first_line
from delta_suite.models.files import (
    CHAT_TEMPLATES,
    GENERATION_CONFIG,
    INDEX,
    PICKLES,
    SINGLE,
    ModelFiles,
    is_tokenizer_file,
    pickles_only,
)
from delta_suite.models.sources.base import Source

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec

TIMEOUT = 5.0
"""Seconds the hub has to answer the first request, so that a missing network is noticed soon."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""Form of a hub id that `--model` accepts."""

_HUB_ID_OR_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
"""Form of a hub id in models.toml; the hub has a few models without an organisation, such as "gpt2"."""


class Hub(Source):
    """A repository of the Hugging Face hub, at a revision."""

    key = "hub"
    has_revisions = True

    def provides(self, spec: ModelSpec) -> bool:
        """Return True if the model is on the hub."""
        return spec.hub is not None

    def describe(self, spec: ModelSpec) -> str:
        """Return "hub:" and the id, and the GGUF file if one is named."""
        return f"hub:{spec.hub}" + (f"/{spec.gguf}" if spec.gguf else "")

    def locate(self, spec: ModelSpec, *, download: bool) -> ModelFiles:
        """Return the files in the Hugging Face cache, after downloading what is missing.

        Raises:
            UnavailableError: files are missing and not downloaded, or cannot be, or are damaged.
        """
        snapshot = _cached_snapshot(spec)
        try:
            if snapshot is None:
                raise _not_cached(spec)
            return self.complete_files(spec, snapshot, revision=snapshot.name)
        except IncompleteError as incomplete:
            if not download:
                raise
            snapshot = _download(spec, because=incomplete.what)
            return self.complete_files(spec, snapshot, revision=snapshot.name)

    def availability(self, spec: ModelSpec) -> tuple[bool, str]:
        """Return whether the model is in the cache, and its commit."""
        if _cached_snapshot(spec) is None:
            return False, "not downloaded"
        return super().availability(spec)

    def whereabouts(self, files: ModelFiles) -> str:
        """Return that the model is in the cache, and its commit."""
        return f"in the Hugging Face cache, commit {(files.revision or '')[:12]}"

    def entry_problems(self, entry: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return a problem if the id is not one."""
        hub = entry["hub"]
        if not isinstance(hub, str) or _HUB_ID_OR_NAME.fullmatch(hub):
            return []
        return [("hub", f'{hub!r} is not a hub id: write "org/name", and the revision under `revision`')]

    def repair(self, spec: ModelSpec, path: Path, problem: str) -> str:
        """Return which file to remove, so that it is downloaded again."""
        return f"Remove {path.resolve()}, and it is downloaded anew"


def download_command(spec: ModelSpec) -> str:
    """Return the shell command that downloads the model.

    Example:
        >>> from delta_suite.models.spec import ModelSpec
        >>> download_command(ModelSpec(name="tiny", hub="acme/tiny", revision="step8"))
        'hf download acme/tiny --revision step8'
    """
    return f"hf download {_id(spec)}" + (f" --revision {spec.revision}" if spec.revision else "")


def _cached_snapshot(spec: ModelSpec) -> Path | None:
    """Return the folder of the model in the local cache, complete or not; None if the cache has nothing of it."""
    from huggingface_hub import try_to_load_from_cache

    name = spec.gguf or "config.json"
    path = try_to_load_from_cache(_id(spec), name, revision=_revision(spec))
    # The third possible answer, a marker object, says that the repository is known to lack the file.
    return Path(path).parents[name.count("/")] if isinstance(path, str) else None


def _not_cached(spec: ModelSpec) -> UnavailableError:
    return IncompleteError(
        spec.name,
        f"{_id(spec)} at {_revision(spec)} is not in the Hugging Face cache ({_cache()})",
        f"It is downloaded when it is measured, or now by `{download_command(spec)}`.",
    )


def _download(spec: ModelSpec, because: str) -> Path:
    """Download what the model needs, and nothing else, and return its folder in the Hugging Face cache.

    because: what the cache lacks, for the message if the download fails.

    Raises:
        UnavailableError: the hub is unreachable (noticed within seconds) or offline mode is on; the model is gated;
            repository, revision or safetensors weights do not exist; the disk is full.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _explained(spec, because):
        info = HfApi().model_info(_id(spec), revision=_revision(spec), files_metadata=True, timeout=TIMEOUT)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    names = _needed_files(spec, list(sizes))
    _check_space(spec, sizes, names, info.sha or _revision(spec))
    # The names go in as patterns, in which [ begins a character class.
    patterns = [name.replace("[", "[[]") for name in names]
    with _explained(spec, because):
        return Path(snapshot_download(_id(spec), revision=_revision(spec), allow_patterns=patterns))


def _needed_files(spec: ModelSpec, names: list[str]) -> list[str]:
    """Return the files of the repository that are needed: no other formats, and no pickle that was not asked for."""
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
    weights = [] if spec.random_weights else _weight_files(spec, top, where)
    no_weights = not weights and not spec.random_weights
    if no_weights or "config.json" not in top:
        raise UnavailableError(
            spec.name,
            f"{where} is not a model that transformers can load: it has no "
            + ("safetensors weights" if no_weights else "config.json"),
            _advice(top),
        )
    others = [name for name in top if name in ("config.json", GENERATION_CONFIG) or is_tokenizer_file(name)]
    others += [name for name in names if name.split("/")[0] in CHAT_TEMPLATES]
    code = [name for name in top if name.endswith(".py")] if spec.trust_remote_code else []
    return [*others, *code, *weights]


def _weight_files(spec: ModelSpec, names: list[str], where: str) -> list[str]:
    """Return the weight files among the names at the top of a repository; none if it has none that can be loaded."""
    if SINGLE in names:
        return [SINGLE]
    if safetensors := [name for name in names if name.endswith(".safetensors")]:
        # consolidated.safetensors is the publisher's layout, beside that of transformers.
        shards = [name for name in safetensors if not name.startswith(("consolidated", "adapter_"))]
        return [*shards, INDEX] if INDEX in names else shards
    pickles = [name for name in names if name.startswith("pytorch_model") and name.endswith((".bin", *PICKLES))]
    if pickles and not spec.allow_pickle:
        raise pickles_only(spec, where, pickles)
    return pickles


def _advice(names: list[str]) -> str:
    """Return what to do about a repository with these files, which transformers cannot load."""
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        shown = ", ".join(sorted(ggufs)[:4])
        return f"It has GGUF files: name one under `gguf` in an entry of models.toml ({shown})."
    if "adapter_config.json" in names:
        return "It is an adapter: merge it into its base model and pass the directory."
    return "Choose another repository, or convert it and pass the directory."


def _check_space(spec: ModelSpec, sizes: Mapping[str, int], names: list[str], commit: str) -> None:
    from huggingface_hub import try_to_load_from_cache

    folder = _cache()
    while not folder.is_dir():
        folder = folder.parent
    missing = [name for name in names if not isinstance(try_to_load_from_cache(_id(spec), name, revision=commit), str)]
    needed, free = sum(sizes[name] for name in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise _disk_full(spec, f"it needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free")


@contextmanager
def _explained(spec: ModelSpec, because: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into ours, which say what to do."""
    from huggingface_hub import constants, errors

    # The hub client has changed its HTTP library twice; its error derives from the base error of each.
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
            f"Check the id at {link}; for a private one log in: `hf auth login`.{_directory_hint(spec)}",
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE forbids asking the hub" if offline else f"the download broke off ({first_line(error)})"
        way = "Unset HF_HUB_OFFLINE, or r" if offline else "R"
        raise UnavailableError(
            spec.name,
            f"{because}, and {reason}",
            f"{way}un `{download_command(spec)}` where there is a network.{_directory_hint(spec)}",
        ) from error
    except (OSError, RuntimeError, *transport) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise _disk_full(spec, "the disk is full") from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise _gated(spec, link) from error
        raise _out_of_reach(spec, because, status, error) from error


def _gated(spec: ModelSpec, link: str) -> UnavailableError:
    return UnavailableError(
        spec.name,
        f"access to {_id(spec)} is restricted, and the hub refuses it to this login (or to none)",
        f"Accept the licence at {link}, then log in with `hf auth login` or set HF_TOKEN.",
    )


def _disk_full(spec: ModelSpec, why: str) -> UnavailableError:
    return UnavailableError(
        spec.name,
        f"no space for the download in {_cache()}: {why}",
        "Free some (`hf cache ls`, `hf cache rm`), or set HF_HOME to a directory on a larger disk.",
    )


def _out_of_reach(spec: ModelSpec, because: str, status: int | None, error: BaseException) -> UnavailableError:
    from huggingface_hub import constants

    if status is None:
        reached = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {first_line(error)})"
    else:
        reached = f"{constants.ENDPOINT} answered with an error ({first_line(error)})"
    return UnavailableError(
        spec.name,
        f"{because}, and {reached}",
        f"Try again later, or run `{download_command(spec)}` where the hub can be reached and bring the cache here "
        f"(HF_HOME), or pass a directory.{_directory_hint(spec)}",
    )


def _directory_hint(spec: ModelSpec) -> str:
    """Return a hint for someone who may have meant a directory, as org/name looks like one; "" otherwise."""
    parent = Path(_id(spec)).parent
    if parent == Path() or not parent.is_dir():
        return ""
    return f"\n  (If a directory was meant: {parent}/ is here, but has no {Path(_id(spec)).name}.)"


def _id(spec: ModelSpec) -> str:
    assert spec.hub is not None, f"{spec.name} is not a model of the hub"
    return spec.hub


def _revision(spec: ModelSpec) -> str:
    return spec.revision or "main"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
