"""Python imports this at its start where the folder is on PYTHONPATH: kills one process of a run of pytest -n."""

import os
import sys

if step := os.environ.get("CRASH_STEP"):
    sys.path.insert(0, os.environ["CRASH_ROOT"])
    from tests.crash.killing import kill_before

    if ("-c" in sys.orig_argv) == (os.environ["CRASH_WHO"] == "worker"):  # execnet starts workers with python -c
        kill_before(int(step), os.environ["CRASH_BELOW"])
