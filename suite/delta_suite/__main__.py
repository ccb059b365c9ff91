"""The program `delta-suite`, also as `python -m delta_suite` where the package is on the path and not installed."""

from delta_suite.interruption import end_when_interrupted


def main() -> None:
    """Run a command. The commands are imported only here, as an interruption can come while they are."""
    end_when_interrupted()
    from delta_suite.cli import app

    app(prog_name="delta-suite")


if __name__ == "__main__":
    main()
