"""The families that most models belong to, each through the real capture: states, certificate, padding.

The whole list is `python -m tests.conformance`, with the outcome in TABLE.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from delta_suite.errors import CaptureError, CertificateError
from delta_suite.models.blocks import find_decoder

from tests.conformance.build import HIDDEN, Architecture, architectures, build
from tests.conformance.check import TOLERANCE, captured, difference, documents, examine

FAMILIES = {
    "llama": "norm",
    "mistral": "norm",
    "qwen2": "norm",
    "qwen3": "norm",
    "gemma": "norm",  # scales its embeddings
    "gemma3_text": "norm",
    "gpt2": "ln_f",  # learned positions
    "gpt_neox": "final_layer_norm",  # attention and feed-forward in parallel
    "gptj": "ln_f",
    "phi": "final_layernorm",
    "phi3": "norm",
    "opt": "final_layer_norm",
    "bloom": "ln_f",  # norms its embeddings, alibi
    "falcon": "ln_f",
    "mpt": "norm_f",
    "olmo2": "norm",  # norms after attention and feed-forward
    "stablelm": "norm",
    "granite": "norm",
    "cohere": "norm",
    "mixtral": "norm",  # experts
    "deepseek_v3": "norm",
    "mamba": "norm_f",
    "mamba2": "norm_f",
    "falcon_h1": "final_layernorm",  # attention and state space in one block
    "jamba": "final_layernorm",
    "zamba": "final_layernorm",  # blocks share a module
    "recurrent_gemma": "final_norm",
    "xlstm": "out_norm",
    "rwkv": "ln_out",  # halves its stream every second block
    "bert": "none",
    "t5:AutoModelForSeq2SeqLM": "final_layer_norm",
    "bart:AutoModelForSeq2SeqLM": "none",
    "llava:AutoModelForImageTextToText": "norm",
    "qwen2_vl:AutoModelForImageTextToText": "norm",
    "mllama:AutoModelForImageTextToText": "norm",  # blocks that text does not reach
    "prophetnet": "none",  # the stream of the ids is followed by others that predict ahead
    "prophetnet:AutoModelForSeq2SeqLM": "none",
    "xlm": "none",  # a block is an attention, a norm, a feed-forward and a norm, each in a list of its kind
    "xlnet": "none",  # (time, batch, hidden), and no padded batch where it reads in one direction
    "fsmt:AutoModelForSeq2SeqLM": "decoder.output_projection",  # (time, batch, hidden), and masks from outside
    "blip:AutoModelForImageTextToText": "none",  # its text stack is a decoder only when it is called as one
}
"""Modules after the last block, by type (and auto class)."""


def architecture(name: str) -> Architecture:
    model_type, _, mapping = name.partition(":")
    wanted = (model_type, mapping or "AutoModelForCausalLM")
    matches = [entry for entry in architectures() if (entry.model_type, entry.mapping) == wanted]
    if not matches:
        pytest.skip(f"transformers {transformers.__version__} does not know {name}")
    return matches[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_the_models_own_and_padding_cannot_leak(name: str) -> None:
    verdict = examine(architecture(name))
    assert (verdict.outcome, verdict.norm) == ("supported", FAMILIES[name]), verdict.reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "mixtral", "falcon_h1", "rwkv", "t5:AutoModelForSeq2SeqLM"])
def test_states_are_the_same_on_a_gpu(name: str) -> None:
    model = build(architecture(name))
    on_cpu, _ = captured(model)
    on_gpu, certificate = captured(model.to("cuda"), device=torch.device("cuda"))
    assert difference([state.cpu() for state in on_gpu.states], on_cpu.states) < TOLERANCE
    assert certificate.final_norm == (FAMILIES[name],)


REFUSED = {
    "deepseek_v4": "DeepseekV4DecoderLayer): its input has shape (3, 19, 4, 64), where a residual stream is "
    "(batch, time, hidden) = (3, 19, 64)",
    "gemma3n_text": "has shape (4, 3, 19, 64)",
    "qwen4_exp_text": "has shape (3, 19, 256)",
    "cpmant": "causality fails",  # behind its prompt a text is read in both directions
    "reformer": "has shape (3, 20, 64)",
    "hrm_text": "of its module lists L_module.layers, H_module.layers fit equally",
    "inkling2_text": "no module leads from the output of block 3 to the model's last_hidden_state",
    "paligemma:AutoModelForImageTextToText": "causality fails",
    "idefics:AutoModelForImageTextToText": "does not run on token ids alone: ValueError: Exactly 1 of pixel_values",
    "pix2struct:AutoModelForImageTextToText": "reads flattened_patches, not text",
}
"""Part of the error that the user sees, by type (and auto class)."""


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str) -> None:
    model = build(architecture(name))
    with pytest.raises((CaptureError, CertificateError)) as caught:
        captured(model)
    assert REFUSED[name] in str(caught.value)


def test_an_encoder_is_refused_as_it_sees_what_follows() -> None:
    model = build(architecture("bert"), is_decoder=False)
    with pytest.raises(CertificateError, match=r"causality fails: the first tokens of a sequence, run alone") as caught:
        captured(model)
    assert "delta-suite measures causal decoders" in str(caught.value)


def test_a_certificate_says_what_it_checked() -> None:
    _, certificate = captured(build(architecture("gpt2")))
    assert [identity.name for identity in certificate.identities] == [
        "fire_count",
        "shapes",
        "continuity",
        "telescoping",
        "final_norm",
        "causality",
    ]
    assert all(identity.error <= identity.tolerance for identity in certificate.identities)
    assert certificate.identities[4].says.startswith("what follows the last block (ln_f)")


def test_without_a_final_norm_the_certificate_says_so() -> None:
    _, certificate = captured(build(architecture("openai-gpt")))
    assert certificate.final_norm == ()
    final = next(identity for identity in certificate.identities if identity.name == "final_norm")
    assert final.says == "nothing follows the last block: last_hidden_state is the stored h_N itself"


def test_rwkv_is_kept_in_the_units_of_its_embedding() -> None:
    """Halved every second block or never, the stream is the same; the certificate names the factors."""
    rwkv = architecture("rwkv")
    halved, certificate = captured(build(rwkv))
    whole, plain = captured(build(rwkv, rescale_every=0))
    assert difference(halved.states, whole.states) < TOLERANCE
    assert "0.5 before block 2" in certificate.identities[2].says
    assert "factor" not in plain.identities[2].says


def test_a_projection_after_the_last_block_counts_as_what_follows_it() -> None:
    """OPT-350m: no final norm, and the output is narrower than the stream."""
    model = build(architecture("opt"), do_layer_norm_before=False, word_embed_proj_dim=HIDDEN // 2)
    stream, certificate = captured(model)
    assert stream.hidden == HIDDEN
    assert certificate.final_norm == ("project_out",)


def test_a_decoder_reads_the_encoded_document_behind_its_start_token() -> None:
    model = build(architecture("t5:AutoModelForSeq2SeqLM"))
    stream, _ = captured(model)
    ids = torch.cat([torch.cat([torch.tensor([0]), text[:-1]]) for text in documents()])
    torch.testing.assert_close(stream.states[0], model.get_input_embeddings()(ids))


def test_mllama_leaves_out_the_blocks_that_look_at_an_image() -> None:
    decoder = find_decoder(build(architecture("mllama:AutoModelForImageTextToText")))
    assert {place: type(block).__name__ for place, block in decoder.left_out.items()} == {
        1: "MllamaCrossAttentionDecoderLayer"
    }
    assert [type(block).__name__ for block in decoder.blocks] == ["MllamaSelfAttentionDecoderLayer"] * 3


def test_a_layers_path_takes_every_block() -> None:
    model = build(architecture("mllama:AutoModelForImageTextToText"))
    decoder = find_decoder(model, "model.language_model.layers")
    assert len(decoder.blocks) == 4
    with pytest.raises(CertificateError, match=r"block 1 \(MllamaCrossAttentionDecoderLayer\): it is passed over"):
        captured(model, decoder)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("model.layer", "layers_path = 'model.layer' names no module of LlamaForCausalLM; lists of modules it has: "),
        ("model.norm", "names a module of LlamaForCausalLM that is no list of decoder blocks (LlamaRMSNorm)"),
        ("model", "that is no list of decoder blocks (LlamaModel)"),
        (
            "",
            "layers_path = '' names a module of LlamaForCausalLM that is no list of decoder blocks (LlamaForCausalLM)",
        ),
        ("model.layers.0", "that is no list of decoder blocks (LlamaDecoderLayer)"),
    ],
)
def test_a_wrong_layers_path(path: str, text: str) -> None:
    with pytest.raises(CaptureError) as caught:
        find_decoder(build(architecture("llama")), path)
    assert text in str(caught.value)
    assert "model.layers (4)" in str(caught.value)


def test_a_layers_path_to_half_a_decoder_is_caught() -> None:
    model: Any = build(architecture("llama"))
    model.model.first = torch.nn.ModuleList(model.model.layers[:2])
    with pytest.raises(CertificateError, match="final norm fails at h_2: no module leads from the output of block 1"):
        captured(model, find_decoder(model, "model.first"))
