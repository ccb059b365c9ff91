"""Kill -9 at many points of measuring, updating a baseline, publishing and pytest -n 2: rewrites TABLE.md.

At each point a run is killed, the files are read, and the run is done again. It must succeed and leave nothing behind.

    python -m tests.crash [--points 200] [--only NAME] [--without NAME] [--out TABLE.md]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.crash.killing import kill_before, kill_inside_a_write, on_changes
from tests.crash.scenarios import SCENARIOS, Scenario, litter, prepare

ROOT = Path(__file__).parents[2]
INSIDE = "inside a write"

SIZES = (1, 1000, 30_000)
"""Bytes after which a process is killed inside a write."""


@dataclass(frozen=True)
class Point:
    """Where a run is killed."""

    kind: str
    """`before a change`, `inside a write`, or `after some time`."""
    arrange: Callable[[Path], None] = lambda project: None
    """Function that is called in the process before the run."""
    seconds: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    """Of a run with processes of its own."""


def main() -> int:
    """Try all points, and write the table; 1 where anything did not hold."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--points", type=int, default=200)
    options.add_argument("--only", default="", help="a part of the name of the scenarios to try")
    options.add_argument("--without", help="a part of the name of scenarios to leave out")
    options.add_argument("--out", type=Path, help="the table; default: stdout")
    given = options.parse_args()
    chosen = [scenario for scenario in SCENARIOS if given.only in scenario.name]
    if given.without:
        chosen = [scenario for scenario in chosen if given.without not in scenario.name]
    root = Path(tempfile.mkdtemp(prefix="crash-"))
    try:
        _import_everything()
        prepared = prepare(root, _must_succeed)
        lines, wrong, total = [], [], 0
        for scenario in chosen:
            ends, problems = _try(scenario, prepared, root, max(1, round(scenario.share * given.points)))
            lines.append(_line(scenario.name, ends, len(problems)))
            total += sum(ends.values())
            print(lines[-1], flush=True)
            wrong += [f"{scenario.name}: {problem}" for problem in problems]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print("\n".join(wrong))
    if given.out is not None and not wrong:
        given.out.write_text(_table(lines, total))
    return 1 if wrong else 0


def _try(scenario: Scenario, prepared: Path, root: Path, count: int) -> tuple[Counter[str], list[str]]:
    """Try points of one scenario until so many runs were killed; return how many were, by kind, and what was wrong."""
    ends: Counter[str] = Counter()
    problems = []
    for number, point in enumerate(_points(scenario, prepared, root, count)):
        project = root / f"project-{number}"
        scenario.start(prepared, project)
        code = _run(project, scenario.words, point, processes=scenario.processes)
        killed = code in (-signal.SIGKILL, -signal.SIGXFSZ)
        killed |= "worker" in point.environment.values() and " crashed" in _output(project)  # and was replaced
        if killed:
            ends[point.kind] += 1
            problem = _problem(scenario, project)
            if problem:
                problems.append(f"{point.kind} {number}: {problem}")
        shutil.rmtree(project)
        if sum(ends.values()) >= count:
            break
    return ends, problems


def _problem(scenario: Scenario, project: Path) -> str | None:
    """Return what does not hold after a run was killed, or None."""
    try:
        _in_child(partial(scenario.check, project))
        code = _run(project, scenario.words, Point(""), processes=scenario.processes)
        if code != 0:
            return f"the next run ended with {code}: {_output(project)[-1500:]}"
        _in_child(partial(scenario.check, project))
    except AssertionError as error:
        return f"{error}: {_output(project)[-1500:]}"
    return f"left {', '.join(left)}" if (left := litter(project)) else None


# --- points ----------------------------------------------------------------------------------------------------


def _points(scenario: Scenario, prepared: Path, root: Path, count: int) -> Iterator[Point]:
    """Yield points to kill a scenario's run at: spread over its changes, inside writes, and over its time."""
    if scenario.processes:
        yield from _points_of_processes(count)
        return
    project = root / "counted"
    scenario.start(prepared, project)
    started, note = time.monotonic(), root / "changes"
    code = _run(project, scenario.words, Point("", partial(_count, note=note)))
    assert code == 0, _output(project)
    seconds, changes = time.monotonic() - started, len(note.read_text())
    shutil.rmtree(project)
    sizes = SIZES[: count // 8]
    for size in sizes:
        yield Point(INSIDE, lambda _, size=size: kill_inside_a_write(size))
    steps = min(changes, count - len(sizes))
    for index in range(steps):
        step = 1 + index * (changes - 1) // max(1, steps - 1)
        yield Point("before a change", lambda project, step=step: kill_before(step, str(project)))
    for index in range(2 * count):
        yield Point("after some time", seconds=seconds * ((index * 0.618034) % 1.0))


def _points_of_processes(count: int) -> Iterator[Point]:
    """Yield points of a run with processes of its own: changes of the controller and of its workers, and times."""
    for step in range(1, count // 3 + 1):
        for who in ("controller", "worker"):
            yield Point("before a change", environment={"CRASH_STEP": str(step), "CRASH_WHO": who})
    for index in range(2 * count):
        yield Point("after some time", seconds=0.5 + 6 * ((index * 0.618034) % 1.0))


def _count(project: Path, note: Path) -> None:
    """Write a character for each change below the project."""
    descriptor = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    on_changes(str(project), lambda _: os.write(descriptor, b"."))


# --- processes -------------------------------------------------------------------------------------------------


def _run(project: Path, words: tuple[str, ...], point: Point, *, processes: bool = False) -> int:
    """Run a command in a project, killed at a point; return its exit code, or the signal's number below 0."""
    started = _started if processes else _forked
    child = started(project, words, point)
    if point.seconds is not None:
        time.sleep(point.seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _environment(project: Path) -> dict[str, str]:
    (project / "temporary").mkdir(exist_ok=True)
    return {
        "DELTA_SUITE_CACHE": str(project / "cache"),
        "TMPDIR": str(project / "temporary"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


def _forked(project: Path, words: tuple[str, ...], point: Point) -> int:
    """Run a command in a copy of this process, which has everything imported: that takes seconds otherwise."""
    environment = _environment(project)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        _redirect(Path(os.devnull) if point.kind == INSIDE else _output_file(project))  # it would end at the output
        os.environ |= environment
        tempfile.tempdir = None
        os.chdir(project)
        point.arrange(project)
        code = _command(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(words: tuple[str, ...]) -> int:
    if words[0] == "pytest":
        import pytest

        return int(pytest.main([*_plugin(), *words[1:]]))
    from delta_suite.cli import app

    try:
        app(list(words[1:]))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _started(project: Path, words: tuple[str, ...], point: Point) -> int:
    """Run a command in a new process, in a session of its own."""
    site = f"{ROOT / 'tests' / 'crash' / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    crash = {"CRASH_BELOW": str(project), "CRASH_ROOT": str(ROOT), "PYTHONPATH": site} | point.environment
    with _output_file(project).open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *words[:1], *_plugin(), *words[1:]],
            cwd=project,
            env=os.environ | _environment(project) | crash,
            stdout=output,
            stderr=output,
            start_new_session=True,
        ).pid


def _plugin() -> list[str]:
    plugins = {entry.value for entry in importlib.metadata.entry_points(group="pytest11")}
    return [] if "delta_suite.pytest_plugin.plugin" in plugins else ["-p", "delta_suite.pytest_plugin.plugin"]


def _in_child(check: Callable[[], object]) -> None:
    """Call a function in a copy of this process. Raises AssertionError with what it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            check()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}"[:2000].encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as said:
        text = said.read()
    assert not text, text


def _redirect(output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _output_file(project: Path) -> Path:
    return project.parent / f"{project.name}.txt"


def _output(project: Path) -> str:
    return _output_file(project).read_text(errors="replace")


def _must_succeed(project: Path, words: tuple[str, ...]) -> None:
    code = _run(project, words, Point(""))
    assert code == 0, f"{' '.join(words)} ended with {code}: {_output(project)}"


# --- the table -------------------------------------------------------------------------------------------------

KINDS = ("before a change", INSIDE, "after some time")


def _line(name: str, ends: Counter[str], wrong: int) -> str:
    counts = " | ".join(str(ends[kind]) for kind in KINDS)
    return f"| {name} | {counts} | {sum(ends.values())} | {wrong} |"


def _table(lines: list[str], total: int) -> str:
    head = f"| run | killed {' | killed '.join(KINDS)} | together | wrong |"
    return f"""# Runs that were killed

Written by `make crash`, which killed {total} runs with SIGKILL (inside a write: with SIGXFSZ) at chosen points. After
each the files are read, which must be those of before or those of after; the run is then done again, must succeed, and
may leave no temporary file. A change is a file that is opened to write, made, moved or removed. Wrong is any of these.

{head}
|{" --- |" * (len(KINDS) + 3)}
{chr(10).join(lines)}
"""


def _import_everything() -> None:
    import pytest  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from delta_suite import api  # noqa: F401
    from delta_suite.capture import residual  # noqa: F401
    from delta_suite.cli import measuring  # noqa: F401
    from delta_suite.models import loading  # noqa: F401
    from delta_suite.publish import leaderboard  # noqa: F401
    from delta_suite.reduction import law_fit  # noqa: F401
    from tqdm import tqdm

    torch.set_num_threads(1)
    # Its own lock is one of all processes, and a process that was killed does not give it back.
    tqdm.set_lock(threading.RLock())


if __name__ == "__main__":
    sys.exit(main())
