"""`python -m delta_suite` is `delta-suite`, also where the package is on the path and not installed."""

from delta_suite.cli import app

app(prog_name="delta-suite")
