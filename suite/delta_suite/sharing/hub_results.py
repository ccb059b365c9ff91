"""Records on the Hugging Face hub: a dataset whose `runs/` is that of a results folder.

Neither way overwrites anything: what is there with another content is named, and stays. A pull puts nothing in place
that `verify` refuses.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from delta_suite.errors import OptionError, RecordError, SuiteError, first_line
from delta_suite.models.sources.hub import HUB_ID, TIMEOUT
from delta_suite.paths import path_error, shorten
from delta_suite.progress import Progress, no_progress
from delta_suite.reading import ARRAYS_LIMIT, TEXT_LIMIT, UnreadableFileError, read_bytes
from delta_suite.records.cache import Cache
from delta_suite.records.store import RUNS, exclusive, folder_name, load
from delta_suite.sharing.shareable import content_of, shareable
from delta_suite.writing import temporary_folder, unwritable, write_together

KIND = "dataset"
"""The kind of repository that results lie in."""

FILES_PER_COMMIT = 100
"""Most files of one commit: the text of records travels inside it."""

CARD = "README.md"

CARD_TEXT = """---
viewer: false
tags:
- delta-suite
---

Records of delta-suite: what was measured of the depth structure of language models. `delta-suite pull --repo {repo}`
verifies them and puts them into `results/`; `delta-suite leaderboard` builds tables of them. Verifying proves that the
numbers of a record follow from each other, not who measured them.
"""
"""The page of a new dataset."""


class HubResultsError(SuiteError):
    """Error for a dataset of results that cannot be read or written."""


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push."""

    url: str | None
    """The commit, or the pull request; None where there was nothing to add."""
    added: tuple[str, ...]
    """The files that were added, by their path in the dataset."""
    known: int
    """The number of files that were there already."""


@dataclass
class Pulled:
    """The outcome of a pull."""

    written: list[Path] = field(default_factory=list)
    """The records that were put into their places."""
    known: int = 0
    """The number of records that were there already."""
    refused: list[str] = field(default_factory=list)
    """Why a record was left out, one line each."""


@dataclass(frozen=True)
class _Remote:
    """A file of a dataset."""

    path: str
    size: int
    sha256: str | None
    """SHA-256, of a file in large file storage."""
    blob: str
    """SHA-1 of the git blob, of any other file."""

    def is_of(self, content: bytes) -> bool:
        """Return True if the file has this content."""
        if self.sha256 is not None:
            return hashlib.sha256(content).hexdigest() == self.sha256
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.blob


# --- push ------------------------------------------------------------------------------------------------------


def push(
    repo: str,
    records: Sequence[Path],
    *,
    create_pr: bool = False,
    private: bool = False,
    bars: bool = False,
) -> Pushed:
    """Add records and their arrays to a dataset of the hub, in the layout of a results folder.

    A dataset that does not exist is made, unless a pull request is asked for. Of a large number of files each hundred
    is one commit. bars: show those of the hub's client.

    Raises:
        OptionError: the repository is no ORG/NAME.
        RecordError: a record is refused by `verify`, or its arrays are not beside it; nothing is pushed.
        HubResultsError: the hub cannot be reached or refuses, or has another file of the same name.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    files = dict(pair for path in records for pair in _files_of(path))
    api = HfApi()
    with _explained(repo, "pushed"):
        try:
            info = api.dataset_info(repo, timeout=TIMEOUT)
        except RepositoryNotFoundError:
            if create_pr:
                raise
            api.create_repo(repo, repo_type=KIND, private=private, exist_ok=True)
            info = api.dataset_info(repo, timeout=TIMEOUT)
        remote = _remote_files(api, repo, info.sha)
    other = sorted(name for name, path in files.items() if name in remote and not remote[name].is_of(content_of(path)))
    if other:
        raise HubResultsError(
            f"nothing was pushed: {repo} has {', '.join(map(shorten, other[:3]))} with another content"
            f"{f', and {len(other) - 3} more' if len(other) > 3 else ''}. Nothing there is ever overwritten."
        )
    missing = {name: path for name, path in files.items() if name not in remote}
    content: dict[str, Any] = {name: str(path) for name, path in missing.items()}
    if missing and not create_pr and CARD not in {sibling.rfilename for sibling in info.siblings or ()}:
        content[CARD] = CARD_TEXT.format(repo=repo).encode()
    url, parent, revision = None, info.sha, None
    names = list(content)
    for start in range(0, len(names), FILES_PER_COMMIT):
        chosen = names[start : start + FILES_PER_COMMIT]
        before = f" but the first {start} files" if start else ""
        with _explained(repo, f"pushed{before}"), nullcontext() if bars else _without_bars():
            commit = api.create_commit(
                repo,
                [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content[name]) for name in chosen],
                commit_message=f"Add {len(chosen)} files of delta-suite records",
                repo_type=KIND,
                revision=revision,
                parent_commit=parent,
                create_pr=create_pr and revision is None,
            )
        revision = revision or commit.pr_revision
        url, parent = url or commit.pr_url or commit.commit_url, commit.oid
    return Pushed(url, tuple(missing), len(files) - len(missing))


def _files_of(path: Path) -> list[tuple[str, Path]]:
    """Return the two files of a record, arrays first, by their path in a dataset. Raises RecordError."""
    record, arrays = shareable(path)
    folder = PurePosixPath(RUNS, folder_name(record.model.name))
    return [(str(folder / file.name), file) for file in (arrays, path)]


# --- pull ------------------------------------------------------------------------------------------------------


def pull(
    repo: str,
    results: Path,
    cache: Cache,
    *,
    revision: str | None = None,
    progress: Progress = no_progress,
) -> Pulled:
    """Bring the records of a dataset into a results folder: each verified, none over a different one that is here.

    A record is downloaded into a temporary folder, verified there, and only then put into its place.

    Raises:
        OptionError: the repository is no ORG/NAME.
        RecordError: the results folder cannot be written.
        HubResultsError: the hub cannot be reached or refuses; records that were complete before are kept.
    """
    from huggingface_hub import HfApi, hf_hub_download

    api, pulled = HfApi(), Pulled()
    with _explained(repo, "pulled"):
        info = api.dataset_info(repo, revision=revision, timeout=TIMEOUT)
        remote = _remote_files(api, repo, info.sha)
    wanted = {name: chosen for name in sorted(remote) if (chosen := _pulled_files(name, remote, results, pulled))}
    if not wanted:
        return pulled
    total = sum(file.size for files in wanted.values() for file in files)
    try:
        results.mkdir(parents=True, exist_ok=True)
        shown = progress(f"{repo}: pull", total, "B")
        with temporary_folder(results) as folder, _without_bars(), shown as bar:
            for name, files in wanted.items():
                for file in files:
                    with _explained(repo, f"pulled but {len(pulled.written)} records"):
                        hf_hub_download(repo, file.path, repo_type=KIND, revision=info.sha, local_dir=folder)
                    bar.update(file.size)
                _put(folder, results / name, files, results, cache, pulled)
    except OSError as error:
        raise unwritable(results, error) from None
    return pulled


def _pulled_files(name: str, remote: Mapping[str, _Remote], results: Path, pulled: Pulled) -> list[_Remote]:
    """Return the files of a record that is to be downloaded, arrays first; none of what is no record, here, or refused.

    Names become paths, so that only plain ones count: `runs/<model>/<file>.json`, of printable signs.
    """
    path = PurePosixPath(name)
    plain = all(part.isprintable() and "\\" not in part and not part.startswith(".") for part in path.parts)
    if path.suffix != ".json" or len(path.parts) != 3 or not plain or str(path) != name:
        return []
    arrays = remote.get(str(path.with_suffix(".safetensors")))
    files = [remote[name]] if arrays is None else [arrays, remote[name]]
    here = [_is_here(results / file.path, file) for file in files]
    if False in here:
        pulled.refused.append(
            f"{results / name} is here with another content, and stays. To have both, pull with another --results-dir."
        )
        return []
    if all(here):
        pulled.known += 1
        return []
    if any(file.size > (TEXT_LIMIT if file.path == name else ARRAYS_LIMIT) for file in files):
        pulled.refused.append(f"{name} of the dataset is larger than any record that is read.")
        return []
    return files


def _is_here(path: Path, file: _Remote) -> bool | None:
    """Return True if a file of the dataset is here, False if another one is in its place, None if there is none."""
    if path_error(path) is not None:
        return None
    try:
        return file.is_of(read_bytes(path, max(file.size, 1)))
    except UnreadableFileError:
        return False


def _put(folder: Path, place: Path, files: Sequence[_Remote], results: Path, cache: Cache, pulled: Pulled) -> None:
    """Verify a downloaded record, and put it and its arrays into their places; else say why not."""
    record = folder / files[-1].path
    try:
        content = [(results / file.path, content_of(folder / file.path)) for file in files]
        if not all(file.is_of(packed) for file, (_, packed) in zip(files, content, strict=True)):
            raise RecordError(f"{files[-1].path} did not arrive as the dataset has it. Pull again.")
        load(record)
    except RecordError as error:
        pulled.refused.append(str(error).replace(f"{folder}/", ""))
        return
    with exclusive(place, cache):
        if any(_is_here(path, file) is False for (path, _), file in zip(content, files, strict=True)):
            pulled.refused.append(f"{place} was written meanwhile, and stays.")
            return
        write_together(content)
    pulled.written.append(place)


# --- the hub ---------------------------------------------------------------------------------------------------


def require_repository(repo: str) -> None:
    """Raise OptionError for a repository that is not of the form ORG/NAME."""
    if not HUB_ID.fullmatch(repo) or "--" in repo or ".." in repo:
        raise OptionError(f"--repo {shorten(ascii(repo))} is no dataset of the hub: write ORG/NAME.")


def _remote_files(api: Any, repo: str, revision: str | None) -> dict[str, _Remote]:
    """Return the files of a dataset below `runs/`, by path."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    files = {}
    try:
        for item in api.list_repo_tree(repo, RUNS, recursive=True, revision=revision, repo_type=KIND):
            if isinstance(item, RepoFile):
                sha256 = None if item.lfs is None else item.lfs.sha256
                files[item.path] = _Remote(item.path, item.size, sha256, item.blob_id)
    except EntryNotFoundError:
        return {}  # a dataset without records
    return files


@contextmanager
def _without_bars() -> Iterator[None]:
    """Silence the bars of the hub's client, one for each file."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            enable_progress_bars()


@contextmanager
def _explained(repo: str, done: str) -> Iterator[None]:
    """Turn the errors of the hub's client into one that says what was wrong, and what to do.

    Its warnings, one for each attempt, are silenced. done: what was not done, as in "nothing was pushed".
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import logging as client_logging

    verbosity = client_logging.get_verbosity()
    client_logging.set_verbosity(logging.ERROR)
    # The hub client has changed its HTTP library twice; its error derives from the base error of each.
    transport: tuple[Any, ...] = errors.HfHubHTTPError.__bases__
    nothing = f"nothing was {done}"
    link = f"{constants.ENDPOINT}/datasets/{repo}"
    try:
        yield
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        why = "HF_HUB_OFFLINE forbids asking the hub" if constants.HF_HUB_OFFLINE else first_line(error)
        raise HubResultsError(f"{nothing}: {why}. Try again where there is a network.") from error
    except errors.RevisionNotFoundError as error:
        raise HubResultsError(f"{nothing}: {repo} has no such revision. {link} lists branches and commits.") from error
    except (errors.GatedRepoError, errors.HFValidationError) as error:
        raise HubResultsError(f"{nothing}: {first_line(error)}. Look at {link}.") from error
    except errors.RepositoryNotFoundError as error:
        raise HubResultsError(
            f"{nothing}: the hub shows no dataset {repo} to this login (or to none). Check the name at {link}, "
            f"or log in: `hf auth login`."
        ) from error
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, *transport) as error:
        raise HubResultsError(f"{nothing}: {_reason(error, repo)}") from error
    finally:
        client_logging.set_verbosity(verbosity)


def _reason(error: BaseException, repo: str) -> str:
    """Return what the hub answered, or why it did not, and what to do."""
    from huggingface_hub import constants

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"the hub refuses {repo} to this login (or to none). Log in with `hf auth login`; to add records to a "
            f"dataset of somebody else, use --create-pr."
        )
    if status in (409, 412):
        return f"{repo} has changed in between. Run the command again."
    if status is not None:
        return f"{constants.ENDPOINT} answered with an error ({first_line(cause)}). Try again later."
    if isinstance(cause, OSError) and (cause.filename is not None or cause.errno == errno.ENOSPC):
        return f"{cause.filename or 'the disk'}: {cause.strerror}."
    if isinstance(error, ValueError | LookupError | TypeError | AttributeError):
        return f"{constants.ENDPOINT} does not answer as a hub does ({type(error).__name__}: {first_line(error)})."
    return f"{constants.ENDPOINT} cannot be reached ({type(cause).__name__}: {first_line(cause)}). Try again later."
