"""What every case uses: the product's commands, run in a folder of their own, and the checks of what came of them."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
GIB = 1 << 30
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
CRASHES = ("Traceback (most recent call last)", "INTERNALERROR", "fault of ours", "Fatal Python error", "panicked at")


class Wrong(Exception):
    """The product did something else than it must."""


@dataclass(frozen=True)
class Run:
    """One command that has ended, or was ended at its limit."""

    code: int
    out: str
    err: str
    late: bool
    seconds: float

    @property
    def text(self) -> str:
        return f"{self.out}\n{self.err}"

    @property
    def words(self) -> str:
        """The output as one line, so that wrapped lines are found."""
        return re.sub(r"\s+", " ", self.text)

    def says(self, *words: str) -> bool:
        return any(word.lower() in self.words.lower() for word in words)

    def brief(self) -> str:
        lines = [line.strip() for line in self.text.splitlines() if line.strip() and "Loading weights" not in line]
        told = [line for line in lines if re.match(r"delta-suite:|ERROR|E  |\w*Error", line)]
        last = (told or lines or ["no output"])[-1]
        return f"exit {self.code}: {ascii(last)[1:-1][:150]}"


@dataclass
class Case:
    name: str
    kind: str
    must: str
    run: Callable[[Bench], str | None]


CASES: list[Case] = []


def case(name: str, kind: str, must: str) -> Callable[[Callable[[Bench], str | None]], Callable[[Bench], str | None]]:
    """Register a case. The function raises Wrong, or returns a few words about what happened."""

    def register(run: Callable[[Bench], str | None]) -> Callable[[Bench], str | None]:
        CASES.append(Case(name, kind, must, run))
        return run

    return register


@dataclass
class Bench:
    """The folder of one case, and the commands in it."""

    folder: Path
    root: Path
    shared: Path
    limit: float
    started: float = field(default_factory=time.monotonic)

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def environment(self, extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
        taken = {"PYTEST_ADDOPTS", "PYTHONPATH", "PYTHONSTARTUP", "XDG_CACHE_HOME", "PYTHONWARNINGS"}
        own = {key: value for key, value in os.environ.items() if key not in taken}
        own |= {
            "DELTA_SUITE_CACHE": str(self.cache),
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
            "COLUMNS": "300",
            "TMPDIR": str(self.folder / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        }
        for key, value in (extra or {}).items():
            if value is None:
                own.pop(key, None)
            else:
                own[key] = value
        return own

    def run(
        self,
        *argv: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str | None] | None = None,
        limit: float | None = None,
        memory: float | None = None,
    ) -> Run:
        """memory: GiB of address space that the command may have."""
        (self.folder / "tmp").mkdir(exist_ok=True)
        left = self.limit - (time.monotonic() - self.started)
        if left <= 0.5:
            raise Wrong(f"not done within {self.limit:.0f} s")
        allowed = min(left, limit or left)

        def within() -> None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_AS, (int(memory * GIB), int(memory * GIB)))

        start = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in argv],
            cwd=cwd or self.folder,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=within,
        )
        late = False
        try:
            out, err = process.communicate(timeout=allowed)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        decoded = (out.decode("utf-8", "backslashreplace"), err.decode("utf-8", "backslashreplace"))
        return Run(process.returncode, *decoded, late, time.monotonic() - start)

    def suite(self, *argv: str | Path, **how: object) -> Run:
        return self.run(BIN / "delta-suite", *argv, **how)  # type: ignore[arg-type]

    def pytest(self, *argv: str | Path, claims: Path | None = None, **how: object) -> Run:
        """In the checkout's root, on its hypotheses/ or on those of the case."""
        named = [claims or self.root / "hypotheses", f"--results-dir={self.results}", "-q", "--no-control"]
        off = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
        return self.run(BIN / "pytest", *named, *off, *argv, **{"cwd": self.root, **how})  # type: ignore[arg-type]

    def measure(self, *models: str | Path, text: Path | None = None, **how: object) -> Run:
        options = how.pop("options", ())
        chosen = text or self.shared / "text.txt"
        return self.suite("measure", *models, "--calibration", chosen, "--results-dir", self.results, *options, **how)  # type: ignore[arg-type]

    def records(self) -> list[Path]:
        return sorted(self.results.glob("runs/*/*.json"), key=lambda path: path.stat().st_mtime_ns)

    def figures(self, path: Path | None = None) -> dict[str, list[float | None]]:
        """effective_rank and gamma of each layer, as the newest record (or this one) has them."""
        found = path or (self.records() or [None])[-1]
        if found is None:
            raise Wrong("no record was written")
        record = json.loads(found.read_text("utf-8"))
        rows = [layer["metrics"]["raw"] for layer in record["layers"]]
        return {name: [row[name].get("value") for row in rows] for name in ("effective_rank", "gamma")}


# --- checks -----------------------------------------------------------------------------------------------------------


def whole(run: Run) -> Run:
    """The command ended by itself and did not crash."""
    if run.late:
        raise Wrong(f"did not end within {run.seconds:.0f} s")
    if run.code < 0:
        raise Wrong(f"died of signal {-run.code}")
    for crash in CRASHES:
        if crash in run.text:
            raise Wrong(f"{'traceback' if crash.startswith('Trace') else crash}: {run.brief()}")
    return run


def accepted(run: Run) -> Run:
    if whole(run).code != 0:
        raise Wrong(f"refused: {run.brief()}")
    return run


def refused(run: Run, *words: str | tuple[str, ...]) -> str:
    """Refused in words of its own. Of a tuple of words, one is enough."""
    if whole(run).code == 0:
        raise Wrong(f"accepted: {run.brief()}")
    for word in words:
        if not run.says(*([word] if isinstance(word, str) else word)):
            raise Wrong(
                f"refused, but not a word of {word if isinstance(word, str) else ' or '.join(word)}: {run.brief()}"
            )
    return "refused"


def off(figures: Mapping[str, Sequence[float | None]], right: Mapping[str, Sequence[float]]) -> float:
    """The largest relative difference. A missing figure is infinitely far off."""
    worst = 0.0
    for name, own in right.items():
        theirs = figures[name]
        if len(theirs) != len(own):
            raise Wrong(f"{len(theirs)} layers, not {len(own)}")
        for a, b in zip(theirs, own, strict=True):
            worst = max(worst, abs(a - b) / abs(b) if a is not None else float("inf"))
    return worst


def equal(bench: Bench, run: Run, right: Mapping[str, Sequence[float]], path: Path | None = None) -> str:
    """Measured, and every layer's figures are those of the independent computation."""
    accepted(run)
    far = off(bench.figures(path), right)
    if far > 1e-6:
        raise Wrong(f"measured{' (from the cache)' if 'from the cache' in run.text else ''}, off by {far:.2g}")
    return f"equal to {far:.0e}"


def equal_or_refused(
    bench: Bench, run: Run, right: Mapping[str, Sequence[float]], *words: str | tuple[str, ...]
) -> str:
    """Either is right: the figures of the whole model, or a refusal that says why."""
    return equal(bench, run, right) if whole(run).code == 0 else refused(run, *words)


def clean(*runs: Run) -> str:
    """Nothing reached the terminal that it would act on."""
    for run in runs:
        whole(run)
        found = CONTROL.search(run.text)
        if found:
            raise Wrong(f"raw {found.group()!a} in the output")
    return "no control characters"


def tree(folder: Path, *, but: Sequence[str] = ()) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not any(part in but for part in path.parts)}


def litter(*folders: Path) -> list[str]:
    """Files that an interrupted write left: hidden ones, and random letters behind a name's suffix."""
    left = []
    for folder in folders:
        for path in folder.rglob("*"):
            odd = re.search(r"\.(json|md|csv|html|js|css|txt|safetensors|svg)[._]?[a-z0-9_]{6,}$", path.name)
            if (path.name.startswith((".", "tmp")) or odd) and not path.name.endswith((".lock", ".gitignore")):
                left.append(str(path.relative_to(folder)))
    return left


def two_days_ago(*folders: Path) -> None:
    """As if the interrupted run had been the day before yesterday."""
    then = time.time() - 2 * 86400
    for folder in folders:
        for path in folder.rglob("*"):
            os.utime(path, (then, then), follow_symlinks=False)


HOOK = """
import os, sys
_below, _event, _at, _part = (os.environ[f"KILL_{name}"] for name in ("BELOW", "EVENT", "AT", "PART"))
_seen = 0
def _hook(event, args):
    global _seen
    if event == _event:  # of a rename the second path, too: the first may be a temporary name
        paths = [os.path.abspath(os.fsdecode(arg)) for arg in args[:2] if isinstance(arg, (str, bytes, os.PathLike))]
        if any(path.startswith(_below) and _part in os.path.basename(path) for path in paths):
            _seen += 1
            if _seen == int(_at):
                os.kill(os.getpid(), 9)
sys.addaudithook(_hook)
"""


def killing(bench: Bench, below: Path, event: str, at: int, part: str = "") -> dict[str, str | None]:
    """An environment in which the command dies, as if by kill -9, before its at-th event of this sort below a folder."""
    folder = bench.folder / "hook"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOOK)
    return {
        "PYTHONPATH": str(folder),
        "KILL_BELOW": str(below.resolve()),
        "KILL_EVENT": event,
        "KILL_AT": str(at),
        "KILL_PART": part,
    }


def homeless(bench: Bench) -> dict[str, str | None]:
    """An environment as of a container's user that has no home folder and no entry among the users."""
    folder = bench.folder / "hook"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import pwd\ndef _none(*_):\n    raise KeyError('no such user')\npwd.getpwuid = pwd.getpwnam = _none\n"
    )
    gone = ("HOME", "USER", "LOGNAME", "DELTA_SUITE_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    return {"PYTHONPATH": str(folder), **dict.fromkeys(gone)}


# --- the run ----------------------------------------------------------------------------------------------------------


def chosen(only: Sequence[str]) -> Iterator[Case]:
    for one in CASES:
        if not only or any(word in one.name for word in only):
            yield one


def main(argv: Sequence[str], prepare: Callable[[Path, Bench], None]) -> int:
    import argparse
    import tempfile

    parser = argparse.ArgumentParser(description="Run the cases against the delta-suite beside this Python.")
    parser.add_argument("--only", action="append", default=[], help="cases whose name holds this (may be repeated)")
    parser.add_argument("--list", action="store_true", help="list the cases and end")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the checkout (default: here)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a case may take")
    options = parser.parse_args(argv)
    names = [one.name for one in CASES]
    assert len(set(names)) == len(names), "two cases of one name"
    if options.list:
        for one in chosen(options.only):
            print(f"{one.name:40} {one.kind:28} {one.must}")
        return 0
    for name in ("delta-suite", "pytest"):
        if not (BIN / name).exists():
            print(f"{BIN / name} is not there: run this with the Python of the environment that has delta-suite")
            return 2
    root = options.root.resolve()
    before = tree(root, but=(".git", ".venv"))
    wrong = total = 0
    with tempfile.TemporaryDirectory(prefix="cases-") as made:
        shared = Path(made) / "shared"
        shared.mkdir()
        prepare(shared, Bench(shared, root, shared, 300))
        print(f"{'case':40} {'kind':28} {'result':6} must: what happened", flush=True)
        for one in chosen(options.only):
            folder = Path(made) / "case"
            folder.mkdir()
            bench = Bench(folder, root, shared, options.limit)
            try:
                happened, good = one.run(bench) or "as it must", True
            except Wrong as error:
                happened, good = str(error), False
            except Exception as error:  # the case itself broke: never a success
                happened, good = f"the case broke: {type(error).__name__}: {error}", False
            total, wrong = total + 1, wrong + (not good)
            told = CONTROL.sub("?", happened.replace("\n", " "))
            print(f"{one.name:40} {one.kind:28} {'ok' if good else 'FAIL':6} {one.must}: {told}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    left = sorted(tree(root, but=(".git", ".venv")) - before)
    if left:
        print(f"left behind in {root}: {', '.join(left[:8])}")
    print(f"{total - wrong} of {total} right")
    return 1 if wrong else 0
