"""delta-suite: pytest specs for the depth structure of language models."""

__version__ = "0.1.0"
