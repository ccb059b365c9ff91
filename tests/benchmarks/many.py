"""Many models, claims and entries, made in a moment from one measured model, and what a command on them costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure_view, prepare
from delta_suite.records.cache import Cache

from tests.benchmarks.measuring import Spent
from tests.tiny import make_tiny

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Cost(Spent):
    """What a command took, its processes included."""

    peak: int
    """Most bytes that they held at once, looked at every twentieth of a second."""


def cost_of(command: Sequence[str | Path], folder: Path, codes: Sequence[int] = (0,)) -> Cost:
    """Run a command of this Python in a folder with the cache `folder/cache`; its exit status is one of the codes."""
    before, started = os.times(), time.perf_counter()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=users(folder), stdout=output, stderr=subprocess.STDOUT
        )
        peaks = [0]

        def watch() -> None:
            while process.poll() is None:
                peaks.append(bytes_held(process.pid))
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        watcher.join()
    wall, after = time.perf_counter() - started, os.times()
    assert code in codes, (folder / "output.txt").read_text()[-4000:]
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(wall, cpu, max(peaks))


def bytes_held(process: int) -> int:
    """Return the bytes that a process and its children hold; pages that they share count once for each."""
    total = 0
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                total += 1024 * int(line.split()[1])
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            total += bytes_held(int(child))
    except OSError:
        pass  # it has ended
    return total


def users(folder: Path) -> dict[str, str]:
    """Return the environment of a user: a cache in the folder, no network, and modules that stay compiled."""
    own = {"DELTA_SUITE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | own


def pytest_command(*arguments: str | Path) -> list[str | Path]:
    """Return the words of a pytest run with this suite's plugin, installed or not."""
    from importlib.metadata import entry_points

    plugin = "delta_suite.pytest_plugin.plugin"
    register = [] if any(entry.value == plugin for entry in entry_points(group="pytest11")) else ["-p", plugin]
    return ["-m", "pytest", *register, "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-q", *arguments]


def write_claims(folder: Path, files: int, claims: int = 20) -> Path:
    """Write so many hypothesis files of so many claims that any model can be held to."""
    folder.mkdir(parents=True)
    for number in range(files):
        head = f'schema = 1\nid = "many-{number}"\ntitle = "Many"\nversion = 1\nrationale = "To be many."\n'
        claim = '\n[[expect]]\nid = "claim-{}"\nmetric = "effective_rank"\nscope = "C"\nop = ">="\n'
        claim += 'threshold = {}\norigin = "A benchmark."\n'
        text = head + "".join(claim.format(each, 1 + each / 10) for each in range(claims))
        (folder / f"many-{number:03}.toml").write_text(text)
    return folder


def write_entries(folder: Path, count: int) -> Path:
    """Write a models file with so many entries of the hub, none of which is here."""
    path = folder / "models.toml"
    path.write_text("".join(f'[models."model-{number}"]\nhub = "acme/model-{number}"\n' for number in range(count)))
    return path


def write_models(folder: Path, count: int) -> Path:
    """Write checkpoints that differ in their configs alone, all of them in the cache, and a models file of them.

    One is measured; the entries of the others are its entry under their keys and fingerprints.
    """
    first = make_tiny(folder / "models" / "tiny", layers=6)
    cache = Cache(folder / "cache")
    settings = Settings(device="cpu", calibration="seed", documents=12, cache=cache)
    measure_view(ModelSpec(name="tiny", path=first), settings)
    entry = cache.get(prepare(ModelSpec(name="tiny", path=first), settings).key)
    assert entry is not None
    lines = []
    for number in range(count):
        path = folder / "models" / f"m-{number:04}"
        shutil.copytree(first, path, copy_function=os.link)
        config = json.loads((first / "config.json").read_text())
        (path / "config.json").unlink()
        (path / "config.json").write_text(json.dumps(config | {"number": number}))
        spec = ModelSpec(name=path.name, path=path)
        run = prepare(spec, settings)
        record = entry.record
        model = record.model.model_copy(update={"name": spec.name, "fingerprint": run.subject.fingerprint})
        provenance = record.provenance.model_copy(update={"cache_key": run.key})
        same = type(entry)(
            record.model_copy(update={"model": model, "provenance": provenance}), entry.arrays, entry.directions
        )
        cache.put(run.key, same)
        lines.append(f'[models."{spec.name}"]\npath = "{path}"\n')
    models_file = folder / "models.toml"
    models_file.write_text("".join(lines))
    return models_file
