"""`push` and `pull` with the real client of the hub, from and to a server in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from delta_suite.cli import app
from delta_suite.records.store import examine
from delta_suite.sharing import hub_results
from typer.testing import CliRunner, Result

from tests.sharing.conftest import DatasetHub

REPO = "ada/results"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def push(record: Path, *options: str) -> Result:
    return run("push", "--repo", REPO, record, *options)


def pull(results: Path, *options: str) -> Result:
    return run("pull", "--repo", REPO, "--results-dir", results, *options)


def names_of(record: Path) -> list[str]:
    """Return the paths of a record's two files in a dataset, the arrays first."""
    return [f"runs/{record.parent.name}/{record.with_suffix(suffix).name}" for suffix in (".safetensors", ".json")]


@pytest.fixture
def published(hub: DatasetHub, record: Path) -> DatasetHub:
    files = [record.with_suffix(".safetensors").read_bytes(), record.read_bytes()]
    hub.publish(dict(zip(names_of(record), files, strict=True)))
    return hub


def leftovers(results: Path) -> list[str]:
    return [path.name for path in results.rglob(".*")] if results.exists() else []


# --- push ------------------------------------------------------------------------------------------------------


def test_a_push_makes_the_dataset_and_a_pull_brings_the_same_bytes_back(
    hub: DatasetHub, record: Path, tmp_path: Path
) -> None:
    result = push(record)
    assert result.exit_code == 0, result.output
    assert "files: 2 pushed, 0 there already" in result.output
    assert f"commit: {hub.url}/datasets/{REPO}/commit/" in result.output
    assert set(names_of(record)) | {"README.md", ".gitattributes"} == set(hub.files())
    assert "pull --repo ada/results" in hub.files()["README.md"].decode()
    result = pull(tmp_path / "results")
    assert result.exit_code == 0, result.output
    arrived = tmp_path / "results" / names_of(record)[1]
    assert f"pulled: {arrived}" in result.output
    assert arrived.read_bytes() == record.read_bytes()
    assert examine(arrived).problems == []
    assert leftovers(tmp_path / "results") == []


def test_what_is_there_is_not_pushed_again(hub: DatasetHub, record: Path) -> None:
    push(record)
    hub.asked.clear()
    result = push(record)
    assert "files: 0 pushed, 2 there already" in result.output
    assert not any("POST" in asked for asked in hub.asked)


def test_a_push_never_overwrites(published: DatasetHub, record: Path) -> None:
    name = names_of(record)[1]
    published.publish({name: b"{}"})
    result = push(record)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"delta-suite: nothing was pushed: {REPO} has {name} with another content. Nothing there is ever overwritten."
    ]
    assert published.files()[name] == b"{}"


def test_a_record_that_contradicts_itself_is_not_pushed(hub: DatasetHub, record: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(record.parent, tmp_path / record.parent.name)
    content = json.loads(record.read_text())
    content["layers"][0]["metrics"]["raw"]["gamma"]["value"] *= 2
    (folder / record.name).write_text(json.dumps(content))
    result = push(folder / record.name)
    assert result.exit_code == 1
    assert "contradicts itself" in result.stderr
    assert hub.asked == []


def test_a_pull_request_leaves_main_as_it_is(hub: DatasetHub, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_results, "FILES_PER_COMMIT", 1)
    hub.publish({"README.md": b"ours"})
    result = push(record, "--create-pr")
    assert result.exit_code == 0, result.output
    assert f"pull request: {hub.url}/datasets/{REPO}/discussions/1" in result.output
    assert set(hub.files()) == {"README.md"}
    assert set(hub.files(branch="refs/pr/1")) == {"README.md", *names_of(record)}


def test_a_pull_request_needs_a_dataset(hub: DatasetHub, record: Path) -> None:
    result = push(record, "--create-pr")
    assert result.exit_code == 1
    assert f"nothing was pushed: the hub shows no dataset {REPO} to this login" in result.stderr
    assert hub.branches == {}


# --- pull ------------------------------------------------------------------------------------------------------


def test_what_is_here_is_not_pulled_again(published: DatasetHub, record: Path, tmp_path: Path) -> None:
    pull(tmp_path)
    published.asked.clear()
    result = pull(tmp_path)
    assert result.exit_code == 0
    assert "records: 0 pulled, 1 here already, 0 left out" in result.output
    assert not any("resolve" in asked for asked in published.asked)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_pull_never_overwrites(published: DatasetHub, record: Path, tmp_path: Path, suffix: str) -> None:
    place = tmp_path / names_of(record)[1]
    place.parent.mkdir(parents=True)
    mine = place.with_suffix(suffix)
    mine.write_bytes(b"mine")
    result = pull(tmp_path)
    assert result.exit_code == 1
    assert f"left out: {place} is here with another content, and stays" in result.stderr
    assert [path.read_bytes() for path in place.parent.iterdir()] == [b"mine"]


def spoiled(content: dict) -> None:  # type: ignore[type-arg]
    content["layers"][0]["metrics"]["raw"]["gamma"]["value"] *= 2


def of_another_model(content: dict) -> None:  # type: ignore[type-arg]
    content["model"]["name"] = "another"


@pytest.mark.parametrize("change", [spoiled, of_another_model, lambda content: content.pop("layers")])
def test_nothing_is_put_in_place_that_verify_refuses(
    published: DatasetHub,
    record: Path,
    tmp_path: Path,
    change: Callable[[dict], object],  # type: ignore[type-arg]
) -> None:
    content = json.loads(record.read_text())
    change(content)
    published.publish({names_of(record)[1]: json.dumps(content).encode()})
    result = pull(tmp_path)
    assert result.exit_code == 1
    assert f"left out: {names_of(record)[1]}" in result.stderr
    assert "records: 0 pulled, 0 here already, 1 left out" in result.output
    assert not (tmp_path / "runs").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "runs/../../evil.json",
        "runs/.git/config.json",
        "runs/a/b/c.json",
        "runs/a\\b/c.json",
        "runs/a/.hidden.json",
        "runs//a.json",
        "runs/a/\x1b[31m.json",
        "runs/a/script.py",
        "README.md",
    ],
)
def test_other_files_of_a_dataset_are_left_alone(hub: DatasetHub, tmp_path: Path, name: str) -> None:
    hub.publish({name: b"{}"})
    result = pull(tmp_path / "results")
    assert result.exit_code == 0, result.output
    assert "records: 0 pulled" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_too_large_is_refused_before_it_is_downloaded(
    published: DatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_results, "ARRAYS_LIMIT", 10)
    result = pull(tmp_path)
    assert result.exit_code == 1
    assert "is larger than any record that is read" in result.stderr
    assert not any("resolve" in asked for asked in published.asked)


def test_a_revision_is_pulled(published: DatasetHub, record: Path, tmp_path: Path) -> None:
    published.branches[REPO]["refs/pr/1"] = published.branches[REPO]["main"]
    published.branches[REPO]["main"] = {}
    assert "1 pulled" in pull(tmp_path, "--revision", "refs/pr/1").output
    result = pull(tmp_path, "--revision", "nowhere")
    assert result.exit_code == 1
    assert f"{REPO} has no such revision" in result.stderr


# --- faults ----------------------------------------------------------------------------------------------------

FAULTS = {
    "unauthorised": ((401, {}, b"{}"), "to this login (or to none)"),
    "forbidden": ((403, {}, b"{}"), "to this login (or to none)"),
    "out of order": ((500, {}, b"out of order"), "answered with an error"),
    "unavailable": ((503, {}, b""), "answered with an error"),
    "broken": ((0, {}, b""), "cannot be reached"),
    "not a hub": ((200, {}, b"<html>"), "does not answer as a hub does"),
    "another JSON": ((200, {}, b"[1]"), "does not answer as a hub does"),
}


INFORMATION = "GET /api/datasets/ada/results$"


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        *((INFORMATION, fault) for fault in FAULTS),
        *(("/tree/", fault) for fault in ("broken", "another JSON")),
        *(("/preupload/", fault) for fault in ("forbidden", "another JSON")),
        *(("/batch$", fault) for fault in ("not a hub", "another JSON")),
        *(("/storage/", fault) for fault in ("forbidden", "broken")),
        *(("/commit/", fault) for fault in ("forbidden", "out of order", "another JSON")),
    ],
)
def test_every_fault_of_a_push_is_one_line(hub: DatasetHub, record: Path, step: str, fault: str) -> None:
    hub.publish({"runs/other.txt": b""})
    hub.answers[step], expected = FAULTS[fault]
    result = push(record)
    assert result.exit_code == 1
    line = result.stderr.removesuffix("\n")
    assert "\n" not in line
    assert line.startswith("delta-suite: nothing was pushed: ")
    assert expected in line
    assert set(hub.files()) == {"runs/other.txt"}


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        *((INFORMATION, fault) for fault in ("unauthorised", "another JSON")),
        *(("/tree/", fault) for fault in ("out of order", "another JSON")),
        *(("GET .*safetensors$", fault) for fault in ("broken", "forbidden", "not a hub")),
        *(("HEAD .*json$", fault) for fault in ("unavailable", "not a hub")),
    ],
)
def test_every_fault_of_a_pull_is_one_line_and_leaves_nothing(
    published: DatasetHub, tmp_path: Path, step: str, fault: str
) -> None:
    published.answers[step], _ = FAULTS[fault]
    result = pull(tmp_path)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(("delta-suite: nothing was pulled", "delta-suite: left out: runs/"))
    assert not (tmp_path / "runs").exists()
    assert leftovers(tmp_path) == []


def test_a_dataset_that_changed_in_between(hub: DatasetHub, record: Path) -> None:
    hub.publish({"README.md": b""})
    hub.answers["/commit/"] = 412, {}, b"{}"
    assert f"{REPO} has changed in between. Run the command again." in push(record).stderr


def test_no_network_at_all(hub: DatasetHub, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for result in (push(record), pull(tmp_path)):
        assert result.exit_code == 1
        assert "http://127.0.0.1:9 cannot be reached" in result.stderr


@pytest.mark.parametrize("repo", ["results", "a/b/c", "ada/../x", "", "a b/c", "https://huggingface.co/a/b"])
def test_a_name_that_is_no_dataset(repo: str, record: Path, tmp_path: Path) -> None:
    for result in (run("push", "--repo", repo, record), run("pull", "--repo", repo, "--results-dir", tmp_path)):
        assert result.exit_code == 2
        assert "--repo" in result.stderr
