"""delta-suite: pytest specs for the depth structure of language models.

    import delta_suite as ds

    m = ds.measure("smollm2-135m-q4", calibration="seed")
    print(m.value("intra_cosine", "C", variant="sink_free"))
    print(m.judge())

Importing this package loads neither torch nor numpy: what it offers is imported when it is first used.
"""

from __future__ import annotations

from delta_suite.version import __version__

TYPE_CHECKING = False  # not from `typing`, whose import takes longer than all that Ctrl-C finds unguarded otherwise
if TYPE_CHECKING:
    from delta_suite.api import Measurement, Results, Verdicts, load, load_results, measure, verify
    from delta_suite.callback import DeltaCallback
    from delta_suite.claims.observe import NotMeasuredError
    from delta_suite.errors import SuiteError
    from delta_suite.monitor import DeltaMonitor, Reading
    from delta_suite.recomputing import Verification

__all__ = [
    "DeltaCallback",
    "DeltaMonitor",
    "Measurement",
    "NotMeasuredError",
    "Reading",
    "Results",
    "SuiteError",
    "Verdicts",
    "Verification",
    "__version__",
    "load",
    "load_results",
    "measure",
    "verify",
]

_HOMES = {
    "DeltaCallback": "callback",
    "DeltaMonitor": "monitor",
    "NotMeasuredError": "claims.observe",
    "Reading": "monitor",
    "SuiteError": "errors",
    "Verification": "recomputing",
}
"""The modules of names that `api` does not define."""


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module 'delta_suite' has no attribute {name!r}")
    return getattr(import_module(f"delta_suite.{_HOMES.get(name, 'api')}"), name)
