"""What the tokenizer did is in the record, in the key, and in what is shown: BOS, the chat template, repeated texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from delta_suite.cli import app
from typer.testing import CliRunner

from tests.made_tokenizers import CHAT, every_byte, saved
from tests.tiny import make_tiny

CLAIM = """
schema = 1
id = "claims"
title = "One claim"
version = 1
rationale = "fails, so that the command is shown"

[[expect]]
id = "fails"
metric = "top1_energy"
scope = "layers:0-1"
op = "<="
threshold = 0.001
origin = "never true"
"""


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, whose tokenizer adds BOS and EOS, and has a chat template."""
    folder = make_tiny(tmp_path_factory.mktemp("models") / "chat", layers=2, hidden=16)
    config = json.loads((folder / "config.json").read_text())
    saved(folder, every_byte(), bos_token="<s>", eos_token="<|end|>", chat_template=CHAT)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Five documents, of which two repeat another."""
    path = tmp_path / "texts.jsonl"
    rows = ["one two three", "four five", "one  two three", "six seven", "four five "]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def measured(model: Path, texts: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Return the record of a measurement, and what the command printed."""
    command = ["measure", model, "--calibration", texts, "--device=cpu", "--parts=spectra", *options]
    result = CliRunner().invoke(app, [*map(str, command), f"--results-dir={texts.parent / 'results'}"])
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(Path(result.output.rpartition("record: ")[2].strip()).read_text())
    return record, " ".join(result.output.split())  # lines are wrapped


def test_bos_template_and_repetitions_are_in_the_record_and_in_the_key(chat_model: Path, texts: Path) -> None:
    plain, said = measured(chat_model, texts)
    assert "3 documents (2 more were repetitions, and left out), " in said
    assert plain["calibration"] | {"sha256": ""} == {
        **{"name": "texts.jsonl", "sha256": "", "documents": 3, "duplicates": 2, "tokens": 37, "dropped": 0},
        **{"unknown_tokens": 0, "begins_with": [["<s>", 1]], "ends_with": [["<|end|>", 0]], "chat_template": False},
    }
    chat, said = measured(chat_model, texts, "--chat-template")
    assert "in the model's chat template" in said
    assert "(from the cache)" not in said
    assert chat["calibration"]["begins_with"] == [["<s>", 1], ["<|user|>", 2]]
    assert chat["calibration"]["chat_template"] is True
    assert chat["calibration"]["sha256"] == plain["calibration"]["sha256"]
    assert chat["provenance"]["cache_key"] != plain["provenance"]["cache_key"]
    assert "(from the cache)" in measured(chat_model, texts, "--chat-template")[1]


def test_with_and_without_a_chat_template_are_kept_apart(chat_model: Path, texts: Path) -> None:
    for options in ((), ("--chat-template",)):
        measured(chat_model, texts, *options)
    records = sorted((texts.parent / "results" / "runs").glob("*/*.json"))
    shown = CliRunner().invoke(app, ["compare", *map(str, records)]).output
    assert "careful: the documents begin with <s> " in shown
    board = CliRunner().invoke(app, ["leaderboard", f"--results-dir={texts.parent / 'results'}"])
    assert board.exit_code == 0, board.output
    groups = json.loads((texts.parent / "results" / "leaderboard.json").read_text())["groups"]
    assert sorted(group["settings"]["chat_template"] for group in groups) == [False, True]
    pages = "".join(page.read_text() for page in (texts.parent / "results").rglob("*.html"))
    assert "&lt;s&gt; (1) before each document, &lt;|end|&gt; (0) after it" in pages


def test_pytest_takes_the_option_and_repeats_it(
    pytester: pytest.Pytester, chat_model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (pytester.path / "hypotheses").mkdir()
    (pytester.path / "hypotheses" / "claims.toml").write_text(CLAIM)
    options = (f"--model={chat_model}", "--device=cpu", f"--calibration={texts}", "--no-control", "--strict-verdicts")
    result = pytester.runpytest_inprocess("hypotheses/", "--chat-template", *options)
    result.stdout.fnmatch_lines(["*texts.jsonl, in the chat template, device: cpu*"])
    result.stdout.fnmatch_lines(["*reproduce  pytest *--chat-template*"])


@pytest.mark.parametrize("documents", ["0", "-3", "1" + 30 * "0"])
def test_pytest_refuses_an_absurd_number_of_documents_before_its_header(
    pytester: pytest.Pytester, documents: str
) -> None:
    (pytester.path / "hypotheses").mkdir()
    (pytester.path / "hypotheses" / "claims.toml").write_text(CLAIM)
    result = pytester.runpytest_inprocess("hypotheses/", "--model=any", f"--documents={documents}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--documents is out of bounds: a calibration has 1 to" in result.stderr.str()
    assert "INTERNALERROR" not in result.stdout.str()
