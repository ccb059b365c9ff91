"""Options, hypotheses, baselines, the cache, interrupted runs."""

from __future__ import annotations

import hashlib
import json
import os
import struct

import inputs
from bench import (
    Bench,
    Run,
    Wrong,
    accepted,
    case,
    clean,
    equal,
    homeless,
    killing,
    litter,
    refused,
    two_days_ago,
    whole,
)
from records import CLAIM, claims, project, relative

# --- options ----------------------------------------------------------------------------------------------------------


@case("compare-unknown-variant", "unknown option value", "refused, naming it")
def _(bench: Bench) -> str:
    path = relative(bench, project(bench))
    return refused(bench.suite("compare", path, path, "--variant", "rawish"), "rawish")


@case("model-name-with-escapes", "terminal injection", "refused, no raw control characters")
def _(bench: Bench) -> str:
    run = bench.pytest("--model=\x1b[31mtiny\x1b]0;own\x07")
    refused(run)
    return clean(run)


@case("cache-path-too-long", "environment", "refused, naming DELTA_SUITE_CACHE; or compared")
def _(bench: Bench) -> str:
    path = relative(bench, project(bench))
    run = bench.suite("compare", path, path, env={"DELTA_SUITE_CACHE": f"{bench.folder}/{'x' * 300}"})
    return "compared" if whole(run).code == 0 else refused(run, ("DELTA_SUITE_CACHE", "cache"))


@case("doctor-without-a-home", "environment", "works, or refused, naming DELTA_SUITE_CACHE or HOME")
def _(bench: Bench) -> str:
    run = bench.suite("doctor", env=homeless(bench))
    return "works" if whole(run).code == 0 else refused(run, ("DELTA_SUITE_CACHE", "HOME"))


@case("models-toml-nested", "traceback", "refused, naming models.toml")
def _(bench: Bench) -> str:
    (bench.folder / "models.toml").write_text(f"[models.tiny]\nx = {'[' * 20000}{']' * 20000}\n")
    return refused(bench.measure("tiny"), "models.toml")


# --- hypotheses -------------------------------------------------------------------------------------------------------


@case("times-1e308", "hypothesis", "judged, or refused, naming times or plus")
def _(bench: Bench) -> str:
    path = project(bench)
    claims(bench, CLAIM + 'metric = "top1_energy"\nscope = "C"\nop = ">="\n'
           'than = { scope = "E", times = 1e308, plus = 1e308 }\n')  # fmt: skip
    return judged(bench, bench.suite("judge", relative(bench, path)), "times", "plus")


@case("each-than-random", "hypothesis", "judged, or refused, naming random")
def _(bench: Bench) -> str:
    path = project(bench)
    claims(bench, CLAIM + 'metric = "effective_rank"\nscope = "A"\nover = "each"\nmostly = 0.5\nop = ">="\n'
           'than = { null = "random" }\n')  # fmt: skip
    return judged(bench, bench.suite("judge", "--explain", relative(bench, path)), "random")


def judged(bench: Bench, run: Run, *words: str) -> str:
    """A table of verdicts (exit 1 where a claim is refuted), or a refusal that names the key."""
    whole(run)
    if run.says("PASS", "FAIL", "INCONCLUSIVE", "NOT MEASURED"):
        return "judged"
    return refused(run, words)


@case("fifo-among-the-hypotheses", "FIFO", "refused, naming pipe.toml; or judged without it")
def _(bench: Bench) -> str:
    path = project(bench)
    os.mkfifo(bench.folder / "hypotheses" / "pipe.toml")
    run = bench.suite("judge", relative(bench, path), limit=20)
    if not whole(run).says("pipe.toml"):
        raise Wrong(f"not a word of pipe.toml: {run.brief()}")
    return "named"


# --- the cache --------------------------------------------------------------------------------------------------------


@case("memo-nested", "damaged cache", "measured and equal")
def _(bench: Bench) -> str:
    folder = bench.folder / "model"
    model = inputs.llama(folder, vocab_size=200_000)  # 51 MB: hashes of files from 32 MiB on are kept
    accepted(bench.measure(folder))
    memo = bench.cache / "fingerprints"
    for path in folder.resolve().iterdir():
        (memo / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json").write_text("[" * 10**6)
    return equal(bench, bench.measure(folder), inputs.right(model, folder, bench.shared))


# --- baselines --------------------------------------------------------------------------------------------------------


def watched(bench: Bench, model: str, *options: str, **how: object) -> Run:
    """pytest --baseline on a model that has been measured before."""
    return bench.pytest(
        f"--model={bench.shared / model}",
        f"--calibration={bench.shared / 'docs.jsonl'}",
        f"--baseline={bench.folder / 'own.json'}",
        *options,
        claims=bench.folder / "hypotheses",
        **how,
    )


@case("accept-one-figure-by-k", "baseline of a selection", "only what is selected is overwritten, or refused")
def _(bench: Bench) -> str:
    project(bench, cache=True)
    accepted(watched(bench, "base", "--baseline-update"))
    before = json.loads((bench.folder / "own.json").read_text())["record"]["layers"]
    watched(bench, "other", "--baseline-update=all", "--baseline-reason=this alone", "-k", "C/intra_cosine")
    return kept(bench, before)


def kept(bench: Bench, before: list) -> str:
    """The figures of layers, which nobody selected, are those of before."""
    now = json.loads((bench.folder / "own.json").read_text())["record"]["layers"]
    for layer in range(8):
        a, b = (side[layer]["metrics"]["raw"]["effective_rank"] for side in (before, now))
        if a["value"] != b["value"]:
            raise Wrong("figures that were not selected are overwritten")
    if whole(watched(bench, "other", "-m", "baseline")).code == 0:
        raise Wrong("another model passes against it")
    return "the others are kept"


@case("baseline-directions-bf16", "traceback", "refused, naming own.safetensors; or compared")
def _(bench: Bench) -> str:
    project(bench, cache=True)
    accepted(watched(bench, "base", "--baseline-update"))
    path = bench.folder / "own.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + length].replace(b'"F16"', b'"BF16"')
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    inputs.edit(bench.folder / "own.json", directions_sha256=None)
    run = watched(bench, "base", "-m", "baseline")
    return "compared" if whole(run).code == 0 else refused(run, "own.safetensors")


@case("baseline-update-killed", "interrupted write", "the next runs work, with the old or the new baseline")
def _(bench: Bench) -> str:
    project(bench, cache=True)
    accepted(watched(bench, "base", "--baseline-update"))
    update = ("--baseline-update=all", "--baseline-reason=meant")
    for at in (1, 2):
        whole_or_killed(watched(bench, "other", *update, env=killing(bench, bench.folder, "os.rename", at, "own")))
        run = watched(bench, "other", "-m", "baseline")
        if whole(run).code not in (0, 1) or run.says("is not what was written", "cannot be read"):
            raise Wrong(f"killed before rename {at}; then {run.brief()}")
    accepted(watched(bench, "other", *update))
    return "works"


def whole_or_killed(run: Run) -> Run:
    return run if run.code == -9 and not run.late else whole(run)


# --- what an interrupted run leaves -----------------------------------------------------------------------------------


@case("leaderboard-killed", "litter", "two days later the next run leaves no temporary file")
def _(bench: Bench) -> str:
    project(bench)
    run = bench.suite("leaderboard", env=killing(bench, bench.folder, "os.rename", 3))
    if run.code != -9:
        whole(run)
    two_days_ago(bench.results)
    accepted(bench.suite("leaderboard"))
    left = litter(bench.results)
    if left:
        raise Wrong(f"{len(left)} left, such as {left[0]}")
    return "nothing left"
