"""Token sequences: what of them is not the text, and tokenizers that cannot carry a measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from delta_suite.capture.calibration import Calibration
from delta_suite.capture.tokens import TokenSequences, tokenize
from delta_suite.errors import CalibrationError
from tokenizers import normalizers

from tests.made_tokenizers import CHAT, around, configured, every_byte, merged_letters, saved, words


def sequences(tokenizer: Any, *texts: str, chat_template: bool = False, **limits: Any) -> TokenSequences:
    """Return the sequences of texts, for a model that embeds 1,000 ids."""
    return tokenize(Calibration("mine", texts, **limits), tokenizer, 1000, None, chat_template=chat_template)


class Answers:
    """A tokenizer that gives these answers, one after the other."""

    def __init__(self, *answers: Any) -> None:
        self.answers = [*answers]

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return {"input_ids": answer}


@pytest.mark.parametrize(
    ("answers", "telling"),
    [
        ([[1, 2, 3], [1, 2, 4]], "gives two answers for document 0 of calibration 'mine', and figures must repeat"),
        ([ValueError("Unk token not found\nand more")], "fails on document 0 .*ValueError: Unk token not found"),
        ([[1.5, 2.5]], "fails on document 0 .*TypeError: 'float'"),
        ([[[1, 2]]], "fails on document 0 .*TypeError: 'list'"),
        ([["a", "b"]], "fails on document 0 .*TypeError: 'str'"),
        ([None], "fails on document 0 .*TypeError: 'NoneType'"),
        ([[]], "gives no token for document 0 of calibration 'mine', 'a text'"),
        ([[1, -1]], "gives id -1 in document 0.* embeds only 1000 ids"),
        ([[1, 1000]], "gives id 1000 in document 0.* embeds only 1000 ids"),
    ],
    ids=["random", "error", "numbers", "nested", "words", "nothing", "empty", "negative", "beyond"],
)
def test_a_tokenizer_that_fails_is_named_in_one_line(answers: list[Any], telling: str) -> None:
    with pytest.raises(CalibrationError, match=f"^the (?:model's tokenizer .Answers.|tokenizer) {telling}") as caught:
        sequences(Answers(*answers), "a text")
    assert "\n" not in str(caught.value)


def test_a_panic_of_the_library_is_an_error_like_others(tmp_path: Path) -> None:
    """The pattern backtracks without end, which the library answers with a panic: no Exception in Python."""
    content = json.loads(words().to_str())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    with pytest.raises(CalibrationError, match=r"fails on document 0 .*retry-limit"):
        sequences(saved(tmp_path, content), "a" * 40 + "b")


def test_letters_that_the_tokenizer_deletes_are_told_and_refused_where_they_are_most(tmp_path: Path) -> None:
    made = every_byte()
    made.normalizer = normalizers.Replace("a", "")
    tokenizer = saved(tmp_path, made)
    assert sequences(tokenizer, "abcd", "bcde").unknown == pytest.approx(1 / 8)
    with pytest.raises(CalibrationError, match=r"^60\.0% of the letters and digits of calibration 'mine' are deleted"):
        sequences(tokenizer, "aaabc")


@pytest.mark.parametrize(
    ("texts", "share"),
    [(("alpha beta", "gamma"), 0.0), (("alpha zork", "beta alpha gamma"), 0.2), (("alpha zork",), 0.5)],
)
def test_the_share_of_unknown_tokens(tmp_path: Path, texts: tuple[str, ...], share: float) -> None:
    assert sequences(saved(tmp_path, words()), *texts).unknown == pytest.approx(share)


def test_unknown_tokens_are_counted_among_those_that_enter_the_metrics(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, words())
    assert sequences(tokenizer, "zork alpha beta", drop_first_token=True).unknown == 0.0


def test_a_bos_that_is_the_unknown_token_too_is_not_unknown(tmp_path: Path) -> None:
    made = words(unknown="<s>")
    made.add_special_tokens(["<s>"])
    tokenizer = saved(tmp_path, around(made, "<s> $A", [("<s>", 0)]), bos_token="<s>", unk_token="<s>")
    known = sequences(tokenizer, "alpha beta", "gamma zork")
    assert [ids.tolist() for ids in known.ids] == [[0, 2, 3], [0, 4, 0]]
    assert known.unknown == pytest.approx(1 / 6)
    assert known.begins_with == (("<s>", 0),)


def test_a_text_that_is_mostly_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"^66.7% of the tokens of calibration 'mine' .*<unk>, id 1.*--calibration"
    ):
        sequences(saved(tmp_path, words()), "alpha zork zork")
    with pytest.raises(CalibrationError, match=r"^57.1% of the tokens .* are unknown"):
        sequences(saved(tmp_path, merged_letters()), "ab zork zzzz", "abab")


@pytest.mark.parametrize(
    ("made", "config", "begins", "ends"),
    [
        (every_byte, {"bos_token": "<s>", "eos_token": "<|end|>"}, (("<s>", 1),), (("<|end|>", 0),)),
        (words, {"unk_token": "<unk>", "bos_token": "<s>"}, (), ()),
    ],
    ids=["bytes", "words"],
)
def test_special_tokens_at_either_end_are_named(
    tmp_path: Path, made: Callable[[], Any], config: dict[str, str], begins: Any, ends: Any
) -> None:
    tokenizer = saved(tmp_path, made(), **config)
    named = sequences(tokenizer, "alpha beta", "gamma alpha")
    assert (named.begins_with, named.ends_with) == (begins, ends)
    joined = Calibration("mine", ("alpha beta gamma alpha",), drop_first_token=True)
    cut = tokenize(joined, tokenizer, 1000, context=3)
    assert (cut.begins_with, cut.ends_with) == (begins, ())


def test_a_bos_in_one_text_is_not_that_of_all(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, around(every_byte(), "$A", []), bos_token="<s>")
    assert sequences(tokenizer, "<s>a text", "another").begins_with == ()


def test_a_slow_tokenizer_counts_and_names_the_same(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("th@@ 9\ne 9\n")
    (tmp_path / "bpe.codes").write_text("t h 9\n")
    tokenizer = configured(tmp_path, tokenizer_class="PhobertTokenizer")
    named = sequences(tokenizer, "the", "the e zork the the")
    assert named.begins_with == (("<s>", 0),)
    assert named.ends_with == (("</s>", 2),)
    assert [ids.tolist() for ids in named.ids][1] == [0, 4, 5, 2]
    assert named.unknown > 0


def test_the_chat_template_writes_the_special_tokens(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, every_byte(), bos_token="<s>", eos_token="<|end|>", chat_template=CHAT)
    chat = sequences(tokenizer, "ab", "cd e", chat_template=True)
    assert chat.begins_with == (("<s>", 1), ("<|user|>", 2))
    assert chat.ends_with == (("<|eot|>", 3),)
    assert chat.tokens == len("ab" + "cd e") + 2 * 3
    assert chat.unknown == 0.0


@pytest.mark.parametrize(
    ("template", "telling"),
    [
        (None, "^--chat-template: the model brings no chat template .*without the option"),
        ("{% for %}", "chat template or tokenizer .* fails on document 0 .*TemplateSyntaxError"),
        ("{{ raise_exception('no users') }}", "fails on document 0 .*no users.* without --chat-template"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "fails on document 0 .*Range too big"),
        ("{{ range(1000000)|random }}" + CHAT, "fails on document 0 .*Range too big"),
        ("{{ range(1000)|random }}" + CHAT, "gives two answers for document"),
        ([{"name": "a", "template": CHAT}, {"name": "b", "template": CHAT}], "no default specified"),
        (5, "chat template or tokenizer .* fails on document 0"),
        (
            "{{ bos_token }}hello",
            "2 documents .* run as the same 6 tokens: the chat template does not write their text",
        ),
    ],
)
def test_a_template_that_cannot_be_applied_is_one_error(tmp_path: Path, template: Any, telling: str) -> None:
    tokenizer = saved(tmp_path, every_byte(), bos_token="<s>", chat_template=template)
    with pytest.raises(CalibrationError, match=telling) as caught:
        sequences(tokenizer, "ab", "cd e", chat_template=True)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_to_which_all_texts_are_one_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"2 documents .* same 2 tokens: its tokenizer does not tell them"):
        sequences(Answers([1, 2]), "ab", "cd")
