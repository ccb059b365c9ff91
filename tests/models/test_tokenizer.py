"""Tokenizers as they are loaded: steady, uncut, and each failure named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from delta_suite.capture.calibration import load_calibration
from delta_suite.errors import ModelUnavailableError
from delta_suite.models.files import ModelFiles
from delta_suite.models.spec import ModelSpec
from delta_suite.models.tokenizer import (
    deleted_share,
    encode,
    load_tokenizer,
    lost_share,
    special_ids,
    unknown_ids,
)
from tokenizers import Regex, normalizers, pre_tokenizers

from tests.made_tokenizers import (
    CHAT,
    configured,
    every_byte,
    letters,
    merged_letters,
    saved,
    word_pieces,
    words,
)

RANDOM = """
import random
from transformers import PreTrainedTokenizer

class Processor:
    _enable_sampling = True

    def encode(self, text):
        return [random.choice([1, 2]) if self._enable_sampling else 1 for _ in text]

class Sampling(PreTrainedTokenizer):
    def __init__(self, **options):
        self.sp_model = Processor()
        super().__init__(**options)

    vocab_size = 3

    def get_vocab(self):
        return {"a": 1, "b": 2}

    def _tokenize(self, text):
        return ["?ab"[number] for number in self.sp_model.encode(text)]

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, number):
        return "?ab"[number]
"""


def test_dropout_of_merges_is_switched_off(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, merged_letters(dropout=0.5))
    assert {tuple(encode(tokenizer, "abab" * 9)) for _ in range(9)} == {(4,) * 9}


def test_sampling_of_sentencepiece_is_switched_off(tmp_path: Path) -> None:
    """By the name that SentencePieceProcessor gives it, in a tokenizer of Python."""
    (tmp_path / "sampling.py").write_text(RANDOM)
    tokenizer = configured(
        tmp_path, trusted=True, tokenizer_class="Sampling", auto_map={"AutoTokenizer": ["sampling.Sampling", None]}
    )
    assert encode(tokenizer, "x" * 40) == [1] * 40


def test_a_real_sentencepiece_model_samples_nothing(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "texts.txt").write_text("the tower is located in the capital of the land\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / "m"), vocab_size=24, minloglevel=2
    )
    (tmp_path / "m.model").rename(tmp_path / "spiece.model")
    sampled = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
    tokenizer = configured(tmp_path, tokenizer_class="GPTSw3Tokenizer", sp_model_kwargs=sampled)
    assert len({tuple(encode(tokenizer, "the tower is located in the capital")) for _ in range(9)}) == 1


def test_cutting_and_padding_that_a_file_saves_are_switched_off(tmp_path: Path) -> None:
    content = json.loads(words().to_str())
    content["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        **{"strategy": {"Fixed": 10}, "direction": "Left", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
    }
    assert encode(saved(tmp_path, content), "alpha beta gamma") == [2, 3, 4]


@pytest.mark.parametrize("length", ["long", [1], {}, 0, 1, -1, 1.5, True, None, 10**30])
def test_the_length_that_a_tokenizer_names_decides_nothing(tmp_path: Path, length: Any) -> None:
    assert encode(saved(tmp_path, words(), model_max_length=length), "alpha beta gamma") == [2, 3, 4]


@pytest.mark.parametrize(
    "config",
    [
        {"padding_side": "sideways"},
        {"bos_token": 5},
        {"extra_special_tokens": "x"},
        {"added_tokens_decoder": {"a": {}}},
        {"added_tokens_decoder": {"7": {"content": 5}}},
        {"tokenizer_class": 5},
    ],
)
def test_a_config_of_wrong_types_is_one_error(tmp_path: Path, config: dict[str, Any]) -> None:
    saved(tmp_path, words())
    with pytest.raises(ModelUnavailableError, match="its tokenizer cannot be built from") as caught:
        configured(tmp_path, **{"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("text", "why"), [("{", ": not JSON: Expecting property"), ("[1]", " is not a JSON object")])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, why: str) -> None:
    saved(tmp_path, words())
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelUnavailableError, match=rf"cannot be built from \S+ \({re.escape(name + why)}"):
        load_tokenizer(
            ModelSpec(name="x", path=tmp_path), ModelFiles(tmp_path, None, (), tuple(sorted(tmp_path.iterdir())))
        )


@pytest.mark.parametrize("place", ["vocabulary", "added", "file of its own"])
def test_a_number_that_no_vocabulary_has_is_refused_before_a_table_is_made(tmp_path: Path, place: str) -> None:
    content = json.loads(words().to_str())
    if place == "vocabulary":
        content["model"]["vocab"]["alpha"] = 2**31
    elif place == "added":
        content["added_tokens"] = [{"id": 2**31, "content": "<x>", "special": True}]
    else:
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 2**31}))
    named = "added_tokens" if place == "file of its own" else "tokenizer"
    with pytest.raises(ModelUnavailableError, match=rf"{named}.json numbers a token 2147483648, and the most"):
        saved(tmp_path, content)


def test_a_number_as_long_that_is_no_tokens_is_none(tmp_path: Path) -> None:
    content = json.loads(words().to_str())
    content["model"]["vocab"]["123456789"] = 9
    content["truncation"] = {"max_length": 2**31, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    assert encode(saved(tmp_path, content), "alpha beta gamma") == [2, 3, 4]


def test_a_sentencepiece_model_names_the_packages_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delta_suite.models.tokenizer._installed", lambda module: module == "google.protobuf")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b")
    with pytest.raises(ModelUnavailableError, match=r"tokenizer.model is read by .*: pip install sentencepiece\.$"):
        configured(tmp_path, tokenizer_class="LlamaTokenizer")


@pytest.mark.parametrize(
    ("made", "config", "unknown"),
    [
        (words, {"unk_token": "<unk>"}, {1}),
        (words, {}, {1}),
        (letters, {}, {0}),
        (word_pieces, {"unk_token": "[UNK]"}, {0}),
        (lambda: merged_letters(unk_token="<unk>"), {}, {0}),
        (merged_letters, {"unk_token": "<unk>"}, set()),
        (every_byte, {"unk_token": "<|end|>", "eos_token": "<|end|>"}, set()),
    ],
    ids=["words", "words-unnamed", "unigram", "wordpiece", "bpe", "bpe-without", "bytes"],
)
def test_the_unknown_token_is_the_one_that_text_can_give(
    tmp_path: Path, made: Any, config: dict[str, str], unknown: set[int]
) -> None:
    tokenizer = saved(tmp_path, made(), **config)
    assert unknown_ids(tokenizer) == unknown
    assert unknown <= {*encode(tokenizer, "zork")}


def test_a_tokenizer_of_python_has_the_unknown_token_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("th@@ 9\ne 9\n")
    (tmp_path / "bpe.codes").write_text("t h 9\n")
    tokenizer = configured(tmp_path, tokenizer_class="PhobertTokenizer")
    assert not hasattr(tokenizer, "backend_tokenizer")
    assert unknown_ids(tokenizer) == {tokenizer.unk_token_id}
    assert special_ids(tokenizer) >= {tokenizer.bos_token_id, tokenizer.eos_token_id}


def test_letters_that_are_dropped_without_a_token_are_counted(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, merged_letters())
    assert encode(tokenizer, "ab zz") == [3]
    assert lost_share(tokenizer, ["ab", "zz, xx!"]) == pytest.approx(4 / 6)
    assert lost_share(saved(tmp_path, merged_letters(unk_token="<unk>")), ["zz"]) == 0.0  # there it is a token
    assert lost_share(saved(tmp_path, every_byte()), ["z\u00e4"]) == 0.0


VOWELS = Regex("[aeiou]")


@pytest.mark.parametrize(
    ("normalizer", "splitter", "text", "share"),
    [
        (normalizers.Replace(VOWELS, ""), None, "banana, 12!", 3 / 8),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Replace(VOWELS, "")]), None, "banana", 0.5),
        (None, pre_tokenizers.Split(VOWELS, "removed"), "banana", 0.5),
        (None, pre_tokenizers.CharDelimiterSplit("a"), "banana", 0.5),
        (normalizers.Replace(VOWELS, ""), pre_tokenizers.Split(Regex("n"), "removed"), "banana", 5 / 6),
    ],
)
def test_letters_that_are_deleted_before_tokens_are_cut_are_counted(
    tmp_path: Path, normalizer: Any, splitter: Any, text: str, share: float
) -> None:
    made = every_byte()
    if normalizer is not None:
        made.normalizer = normalizer
    if splitter is not None:
        made.pre_tokenizer = pre_tokenizers.Sequence([splitter, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert deleted_share(saved(tmp_path, made), [text]) == pytest.approx(share)


@pytest.mark.parametrize(
    "normalizer",
    [
        *(normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD(), normalizers.Lowercase()),
        *(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), normalizers.BertNormalizer()),
        *(normalizers.Nmt(), normalizers.Replace(" ", "\u2581"), normalizers.Strip()),
    ],
)
def test_another_form_of_the_same_letters_deletes_none(tmp_path: Path, normalizer: Any) -> None:
    made = every_byte()
    made.normalizer = normalizer
    composed = "\u00c9cole e\u0301te\u0301 \ufb01n stra\u00dfe \u0130zmir 1\u00bd \u2460"
    texts = [composed, "\u1112\u1161\u11ab \ud55c", "\uff8a\uff9e \u304c"]
    core = load_calibration("core").documents
    assert deleted_share(saved(tmp_path, made), [*texts, *core]) == 0.0


def test_a_tokenizer_of_python_shows_no_letters_that_it_deletes() -> None:
    assert deleted_share(object(), ["banana"]) == 0.0


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT, "<s><|user|>ab<|eot|>"),
        ([{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "x"}], "<s><|user|>ab<|eot|>"),
        (CHAT + "{% if add_generation_prompt %}go{% endif %}", "<s><|user|>ab<|eot|>"),
        ("\n  {% if 1 %}{{ strftime_now('%Y') }}{% endif %}" + CHAT, "\n26 Jul 2024<s><|user|>ab<|eot|>"),
        ("\n  {% if 1 %}today{% endif %}" + CHAT, "\ntoday<s><|user|>ab<|eot|>"),
    ],
    ids=["text", "several", "no-answer-asked-for", "date", "no-date"],
)
def test_a_chat_template_is_applied_with_one_bos_and_the_same_date_each_day(
    tmp_path: Path, template: Any, expected: str
) -> None:
    tokenizer = saved(tmp_path, every_byte(), bos_token="<s>", eos_token="<|end|>", chat_template=template)
    ids = encode(tokenizer, "ab", chat_template=True)
    assert ids == encode(tokenizer, expected, special_tokens=False)
