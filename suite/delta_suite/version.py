"""The version of delta-suite."""

__version__ = "0.2.0.dev0"
