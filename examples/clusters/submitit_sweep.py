"""Measure the checkpoints of a run as a Slurm array, from Python: pip install submitit.

    python examples/clusters/submitit_sweep.py 'runs/big/checkpoint-*' --jobs 8 --partition gpu

When all are done, `delta-suite judge results` gives the verdicts. `--local` runs the jobs on this machine, to try it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import submitit


def measure(words: Sequence[str], shard: str) -> int:
    """Run one share of the list, and return its exit code."""
    command = [sys.executable, "-m", "delta_suite", "measure", *words, "--shard", shard]
    return subprocess.run(command, check=False).returncode


def main(words: Sequence[str] | None = None) -> None:
    """Submit one job a shard, wait for all, and say which of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="as `delta-suite measure` takes them, in quotes")
    parser.add_argument("--calibration", default="core", help="as in delta-suite")
    parser.add_argument("--jobs", type=int, default=4, help="number of shards")
    parser.add_argument("--partition", help="of Slurm")
    parser.add_argument("--local", action="store_true", help="without Slurm")
    given = parser.parse_args(words)

    executor = submitit.AutoExecutor(folder="delta-suite-jobs", cluster="local" if given.local else None)
    executor.update_parameters(timeout_min=240, cpus_per_task=8)
    if given.partition:
        executor.update_parameters(slurm_partition=given.partition)
    controls = [f"{model}@random-weights" for model in given.models]
    arguments = [*given.models, *controls, "--calibration", given.calibration]
    shards = [f"{index}/{given.jobs}" for index in range(given.jobs)]
    jobs = executor.map_array(measure, [arguments] * given.jobs, shards)
    failed = [shard for shard, job in zip(shards, jobs, strict=True) if job.result() != 0]
    print(f"failed: {', '.join(failed)}; their logs are in delta-suite-jobs/" if failed else "all shards are measured")


if __name__ == "__main__":
    main()
