"""Shards: disjoint, together the whole, and the same verdicts once their records lie in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml
from delta_suite.engine.work import Shard, work_list
from delta_suite.errors import OptionError
from delta_suite.models.spec import ModelSpec
from delta_suite.records.store import record_paths

from tests.engines.conftest import ROOT, Project, differences, figures, grid

EXAMPLES = ROOT / "examples" / "clusters"

SHORT = ("--calibration=texts.jsonl", "--device=cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_are_disjoint_and_together_the_whole(count: int) -> None:
    specs = [ModelSpec(name=f"m{number}", hub=f"org/m{number}") for number in range(5)]
    work = work_list(specs, ["core", "seed"], controls=True)
    assert len(work) == len({item.key for item in work}) == 20
    shares = [Shard(index, count).of(work) for index in range(count)]
    dealt = [item for share in shares for item in share]
    assert sorted(item.key for item in dealt) == sorted(item.key for item in work)
    for position, item in enumerate(work):
        assert item in shares[position % count]


def test_a_model_that_is_named_twice_is_one_item() -> None:
    spec = ModelSpec(name="m", hub="org/m")
    names = [item.spec.name for item in work_list([spec, spec.control(), spec], ["core"], controls=True)]
    assert names == ["m", "m@random-weights"]


@pytest.mark.parametrize("text", ["", "1", "3/3", "-1/2", "0/0", "1/2/3", "a/b", "9" * 400 + "/2"])
def test_what_names_no_shard_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"names no shard: it is i/n, with i from 0 to n - 1"):
        Shard.parse(text)


def test_shards_of_pytest_measure_everything_once_and_judge_gives_the_verdicts(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ("hypotheses", "--model=run/step-[12]", *SHORT)
    project.pytest(*sweep, "--results-dir=whole")
    told = []
    for index in range(3):  # as on three machines, each with a cache of its own
        monkeypatch.setenv("DELTA_SUITE_CACHE", str(project.path / f"cache-{index}"))
        ended = project.pytest(*sweep, f"--results-dir=part-{index}", f"--shard={index}/3")
        assert ended.code in (0, 1), ended.out
        told.append(ended.out)
        shutil.copytree(project.path / f"part-{index}", project.path / "merged", dirs_exist_ok=True)
    # The list is step 1, its control, step 2, its control.
    names = [f"run--step-{step}{control}" for step in (1, 2) for control in ("", "@random-weights")]
    measured = [{path.parent.name for path in record_paths(project.path / f"part-{index}")} for index in range(3)]
    assert measured == [{names[0], names[3]}, {names[1]}, {names[2]}]
    assert f"shard 0/3: 2 of 4 measurements: {names[0]}, {names[3]}" in told[0]
    assert f"{names[0]}: claims that are compared with {names[1]}, and the marks" in told[0]
    assert "delta-suite judge part-0 gives every verdict" in told[0]
    assert not grid(told[1])  # a control alone: nothing to judge
    assert not differences(figures(project.path / "merged"), figures(project.path / "whole"))
    judged = [project.suite("judge", name).out for name in ("merged", "whole")]
    assert grid(judged[0]) == grid(judged[1])
    assert ". holds" in "".join(grid(judged[0]))
    assert "vacuous" in judged[0]


def test_a_shard_without_items_is_no_failure(project: Project) -> None:
    ended = project.pytest("hypotheses", "--model=run/step-1", "--shard=5/6", *SHORT)
    assert ended.code == 0
    assert "shard 5/6: 0 of 2 measurements" in ended.out
    measured = project.suite("measure", "run/step-1", "--shard=5/6", *SHORT)
    assert measured.code == 0
    assert "shard 5/6: 0 of 1 measurements" in measured.err


def test_all_models_divides_the_whole_file_wherever_it_runs(project: Project) -> None:
    """Another machine may have other weights, and must divide the list as this one does."""
    entries = "".join(f"[models.m{step}]\npath = 'run/step-{step}'\n" for step in (1, 2, 3))
    (project.path / "models.toml").write_text(entries)
    shutil.rmtree(project.path / "run" / "step-1")
    words = ["hypotheses", "--all-models", "--no-control", "--collect-only", "-q", *SHORT]
    last, first = project.pytest(*words, "--shard=2/3"), project.pytest(*words, "--shard=0/3")
    assert "[m3]" in last.out
    assert "[m2]" not in last.out
    assert first.code == 5  # its model is not here


@pytest.mark.parametrize("option", ["--baseline", "--baseline-update"])
def test_shards_have_no_baselines(project: Project, option: str) -> None:
    ended = project.pytest("hypotheses", "--model=run/step-1", "--shard=0/2", option, *SHORT)
    assert ended.code == 4
    assert "--shard does not go with baselines" in ended.err


KILLED = """
import os, sys
import delta_suite.pipeline as pipeline
measure, calls = pipeline.measure, []
def killed_at_the_second(*arguments, **options):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), 9)
    return measure(*arguments, **options)
pipeline.measure = killed_at_the_second
from delta_suite.__main__ import main
main()
"""


def test_a_killed_shard_is_run_again(project: Project) -> None:
    sweep = ["measure", "run/step-*", "--calibration=texts.jsonl", "--calibration=seed", "--device=cpu"]
    shards = [[*sweep, "--results-dir=parts", f"--shard={index}/2"] for index in (0, 1)]
    ended = project.process(sys.executable, "-c", KILLED, *shards[0])
    assert ended.code == -signal.SIGKILL, ended.err
    (kept,) = record_paths(project.path / "parts")
    again = project.suite(*shards[0])
    assert again.code == 0
    assert again.out.count("(from the cache)") == 1
    assert project.suite(*shards[1]).out.count("(from the cache)") == 0
    whole = project.suite(*sweep, "--results-dir=whole")
    assert whole.out.count("(from the cache)") == len(record_paths(project.path / "parts")) == 6
    assert kept in record_paths(project.path / "parts")


SBATCH = """#!{python}
import os, re, subprocess, sys
words = " ".join(sys.argv[1:-1]) + open(sys.argv[-1]).read()
first, last = re.search(r"--array=(\\d+)-(\\d+)", words).groups()
tasks = range(int(first), int(last) + 1)
for task in tasks:
    job = {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(len(tasks)), "SLURM_CPUS_PER_TASK": "1"}}
    subprocess.run(["bash", sys.argv[-1]], env=os.environ | job, check=True)
print("Submitted batch job 1")
"""


def programs(folder: Path) -> str:
    """Put sbatch, pytest and delta-suite into a folder, and return a PATH with it."""
    folder.mkdir()
    texts = {
        "sbatch": SBATCH.format(python=sys.executable),
        "pytest": f'#!/bin/sh\nexec {sys.executable} -m pytest "$@"\n',
        "delta-suite": f'#!/bin/sh\nexec {sys.executable} -m delta_suite "$@"\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_the_slurm_script_measures_all(project: Project) -> None:
    ended = project.process(
        *("sbatch", "--array=0-1", str(EXAMPLES / "slurm_array.sh")),
        **{"PATH": programs(project.path / "bin"), "MODELS": "run/step-[12]", "CALIBRATION": "texts.jsonl"},
    )
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.endswith("Submitted batch job 1\n")
    assert len(record_paths(project.path / "results")) == 4


def test_the_command_of_the_kubernetes_job_is_the_shard_of_its_pod(project: Project) -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes_job.yaml").read_text("utf-8"))["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completionMode"] == "Indexed"
    shell, flag, command = container["command"]
    assert f'"$JOB_COMPLETION_INDEX/{job["completions"]}"' in command
    (project.path / "checkpoints").symlink_to("run")
    environment = {"PATH": programs(project.path / "bin"), "JOB_COMPLETION_INDEX": "3"}
    ended = project.process(shell, flag, f"{command} --dry-run", **environment)
    assert ended.code == 0, ended.err
    assert "shard 3/4: 1 of 6 measurements: run--step-1@random-weights" in ended.err
