"""A module in memory: measured as its checkpoint would be, and left exactly as it was."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path
from typing import Any

import delta_suite as ds
import numpy as np
import pytest
import torch
from delta_suite.errors import OptionError, UnavailableError
from delta_suite.models.memory import ModuleInMemory
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [f"The {who} went to the {where}, and said that all was well." for who in ("cat", "dog") for where in "abcd"]
SPECTRA = {"texts": TEXTS, "parts": "spectra"}


@pytest.fixture(scope="module")
def tokenizer(small: Path) -> Any:
    return AutoTokenizer.from_pretrained(small)


@pytest.fixture
def model(small: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small)


@pytest.fixture(scope="module")
def usual(small: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> ds.Measurement:
    """The measurement of the module as it is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTA_SUITE_CACHE", str(tmp_path_factory.mktemp("usual")))
        return ds.measure(AutoModelForCausalLM.from_pretrained(small), tokenizer=tokenizer, texts=TEXTS)


def as_bytes(tensor: torch.Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().flatten().view(torch.uint8).numpy().tobytes()


def state_of(module: nn.Module) -> list[Any]:
    """Return all that measuring might change of a module: identities, contents, modes, hooks, attributes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [
        [(name, id(tensor), tensor.requires_grad, tensor._version) for name, tensor in tensors],
        [(name, as_bytes(tensor)) for name, tensor in tensors],
        [(name, as_bytes(tensor.grad)) for name, tensor in tensors],
        [(name, part.training, sorted(vars(part))) for name, part in module.named_modules()],
        [(name, list(part._forward_hooks), list(part._forward_pre_hooks)) for name, part in module.named_modules()],
        [(name, len(part._forward_hooks_with_kwargs)) for name, part in module.named_modules()],
    ]


def random_states() -> list[Any]:
    python, (_, keys, *rest), torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return [python, keys.tobytes(), rest, torch_state.tolist()]


# --- what is measured ------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_checkpoint(usual: ds.Measurement, small: Path) -> None:
    stored = ds.measure(small, texts=TEXTS, device="cpu")
    assert usual.record.layers == stored.record.layers
    assert usual.record.scopes == stored.record.scopes
    assert usual.record.boundaries == stored.record.boundaries
    assert usual.record.calibration == stored.record.calibration
    assert usual.record.model.source == "memory"
    assert usual.record.model.revision is None


def test_the_name_is_the_class_and_the_tensors(usual: ds.Measurement, model: Any, tokenizer: Any) -> None:
    assert re.fullmatch(r"LlamaForCausalLM-[0-9a-f]{8}", usual.name)
    assert ModuleInMemory(model, tokenizer).name == usual.name
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert ModuleInMemory(model, tokenizer).name != usual.name


def test_a_record_of_it_can_be_kept_and_read_again(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    phases = {"low": (0, 0), "high": (1, 5)}
    here = ds.measure(model, tokenizer=tokenizer, name="run@step5", phases=phases, **SPECTRA)
    path = here.save(tmp_path / "results")
    again = ds.load(path)
    assert again.name == "run@step5"
    assert dict(again.view.phases) == phases
    assert again.layers("effective_rank") == here.layers("effective_rank")
    assert ds.verify(tmp_path / "results").consistent
    reason = ds.load_results(tmp_path / "results")[0].value("shared_r2", "high").reason
    assert "measure(model, tokenizer=tokenizer, parts='law')" in str(reason)  # no command finds it


# --- how it is left --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_left_exactly_as_it_was(model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    """In training, with gradient checkpointing, frozen weights, gradients, a mixed mode and hooks of the user."""
    model.to(dtype).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].eval()
    seen: list[nn.Module] = []
    model.model.layers[2].register_forward_hook(lambda module, *_: seen.append(module))
    ids = torch.arange(1, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    before, states = state_of(model), random_states()
    settings = vars(tokenizer).keys(), tokenizer.model_max_length, tokenizer.backend_tokenizer.to_str()
    ds.measure(model, tokenizer=tokenizer, **SPECTRA)
    assert seen
    assert state_of(model) == before
    assert random_states() == states
    assert (vars(tokenizer).keys(), tokenizer.model_max_length, tokenizer.backend_tokenizer.to_str()) == settings


def test_training_goes_on_as_it_would_have(small: Path, tokenizer: Any) -> None:
    """Weights are equal to the bit, with dropout drawn from the random state."""

    def trained(*, measured: bool) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(small, attention_dropout=0.2).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for step in range(2):
            ids = torch.randint(0, 300, (2, 12))
            model(input_ids=ids, labels=ids).loss.backward()
            if measured and step == 0:
                ds.measure(model, tokenizer=tokenizer, **SPECTRA)
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    with_it, without = trained(measured=True), trained(measured=False)
    assert all(torch.equal(tensor, without[name]) for name, tensor in with_it.items())


def test_it_is_left_as_it_was_where_measuring_fails(model: Any, tokenizer: Any) -> None:
    model.train()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    before, states = state_of(model), random_states()
    with pytest.raises(ds.SuiteError, match="not finite"):
        ds.measure(model, tokenizer=tokenizer, **SPECTRA)
    assert state_of(model) == before
    assert random_states() == states


def test_what_a_forward_pass_keeps_is_undone(model: Any, tokenizer: Any) -> None:
    """As dynamic rotary frequencies do: a buffer that is replaced, one changed in place, and a new attribute."""
    rope = model.model.rotary_emb
    rope.register_buffer("counted", torch.zeros(2))

    def keeps(module: Any, *_: Any) -> None:
        module.counted += 1
        module.inv_freq = module.inv_freq.clone()
        module.longest = 7

    rope.register_forward_pre_hook(keeps)
    rope.inv_freq = rope.inv_freq.clone()
    before = rope.inv_freq
    ds.measure(model, tokenizer=tokenizer, **SPECTRA)
    assert rope.inv_freq is before
    assert rope.counted.tolist() == [0, 0]
    assert not hasattr(rope, "longest")


def test_weights_that_change_in_place_are_told(model: Any, tokenizer: Any) -> None:

    def rescales(module: Any, _: Any) -> None:
        module.weight.mul_(1)

    model.model.layers[1].input_layernorm.register_forward_pre_hook(rescales)
    with pytest.raises(ds.SuiteError, match=r"changes its weights when it runs \(model.layers.1.input_layernorm"):
        ds.measure(model, tokenizer=tokenizer, **SPECTRA)


def test_figures_do_not_depend_on_what_the_caller_has_set(usual: ds.Measurement, model: Any, tokenizer: Any) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            within = ds.measure(model, tokenizer=tokenizer, **SPECTRA)
            assert torch.empty(1).is_meta
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert within.record.layers == usual.record.layers


# --- the cache -------------------------------------------------------------------------------------------------


def test_the_cache_serves_it(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ds.measure(model, tokenizer=tokenizer, **SPECTRA)
    monkeypatch.setattr(ModuleInMemory, "opened", None)
    again = ds.measure(copy.deepcopy(model).train(), tokenizer=copy.deepcopy(tokenizer), name="other", **SPECTRA)
    assert again.record.layers == first.record.layers
    assert again.name == "other"
    with pytest.raises(TypeError):
        ds.measure(model, tokenizer=tokenizer, texts=TEXTS[:4], parts="spectra")


def scaled(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def retyped(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def configured(model: Any) -> None:
    model.config.rms_norm_eps *= 2


def buffered(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 2


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def patched(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda states: states


@pytest.mark.parametrize("change", [scaled, retyped, configured, buffered, hooked, patched])
def test_what_changes_the_function_changes_the_fingerprint(model: Any, tokenizer: Any, change: Any) -> None:
    before = ModuleInMemory(model, tokenizer).fingerprint
    assert ModuleInMemory(model, tokenizer).fingerprint == before
    change(model)
    assert ModuleInMemory(model, tokenizer).fingerprint != before


def test_another_tokenizer_changes_the_fingerprint(model: Any, tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<new>"})
    assert ModuleInMemory(model, other).fingerprint != ModuleInMemory(model, tokenizer).fingerprint


# --- wrappers --------------------------------------------------------------------------------------------------


def test_a_compiled_module_is_measured_inside(usual: ds.Measurement, model: Any, tokenizer: Any) -> None:
    wrapped = ModuleInMemory(torch.compile(model), tokenizer)
    assert (wrapped.name, wrapped.fingerprint) == (usual.name, usual.record.model.fingerprint)


def test_peft_is_measured_with_its_adapter(usual: ds.Measurement, model: Any, tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False, lora_dropout=0.5)
    )
    before = state_of(wrapped.train())
    adapted = ds.measure(wrapped, tokenizer=tokenizer, **SPECTRA)
    assert state_of(wrapped) == before
    assert adapted.name.startswith("PeftModel")
    assert adapted.layers("effective_rank") != usual.layers("effective_rank")
    with wrapped.disable_adapter():
        disabled = ds.measure(wrapped, tokenizer=tokenizer, **SPECTRA)
    assert disabled.layers("effective_rank") == usual.layers("effective_rank")
    merged = ds.measure(wrapped.merge_and_unload(), tokenizer=tokenizer, **SPECTRA)
    assert merged.value("effective_rank") == pytest.approx(float(adapted.value("effective_rank")), rel=1e-4)


def test_an_adapter_outside_the_layers_is_refused(model: Any, tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnavailableError, match="adds tokens before the text"):
        ds.measure(wrapped, tokenizer=tokenizer, **SPECTRA)


def dynamically_quantised(model: Any, dtype: torch.dtype) -> Any:
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=dtype)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_quantised_module_is_measured(usual: ds.Measurement, model: Any, tokenizer: Any) -> None:
    coarse = ds.measure(dynamically_quantised(model, torch.float16), tokenizer=tokenizer, **SPECTRA)
    assert coarse.layers("effective_rank") != usual.layers("effective_rank")
    assert coarse.value("effective_rank") == pytest.approx(float(usual.value("effective_rank")), rel=0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_module_that_rounds_activations_over_the_batch_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ds.SuiteError, match="causality fails"):
        ds.measure(dynamically_quantised(model, torch.qint8), tokenizer=tokenizer, **SPECTRA)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_equal_integers_of_another_scale_are_another_model(model: Any, tokenizer: Any) -> None:
    coarse = dynamically_quantised(model, torch.qint8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    before, after = (ModuleInMemory(each, tokenizer) for each in (coarse, dynamically_quantised(model, torch.qint8)))
    weights = [each.given.model.layers[0].mlp.up_proj.weight().int_repr() for each in (before, after)]
    assert torch.equal(*weights)
    assert before.name != after.name


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        (lambda model, _: ds.measure(model, **SPECTRA), OptionError, "none is given"),
        (lambda model, _: ds.measure(model, tokenizer=str, **SPECTRA), OptionError, "type is none"),
        (lambda model, it: ds.measure(model, tokenizer=it, device="cuda", **SPECTRA), OptionError, "is on cpu"),
        (lambda model, it: ds.measure(model, tokenizer=it, dtype="float16", **SPECTRA), OptionError, "is float32"),
        (lambda model, it: ds.measure("gpt2", tokenizer=it, **SPECTRA), OptionError, "brings its own"),
        (lambda model, it: ds.measure(42, tokenizer=it, **SPECTRA), OptionError, "int is no model"),
        (lambda model, it: ds.measure(model, tokenizer=it, texts="one"), ds.SuiteError, "one string"),
        (lambda model, it: ds.measure(model, tokenizer=it, texts=[]), ds.SuiteError, "no text"),
        (lambda model, it: ds.measure(model, tokenizer=it, texts=5), ds.SuiteError, "texts is int"),
        (lambda model, it: ds.measure(model, tokenizer=it, texts=["a", 5]), ds.SuiteError, r"texts\[1\] is int"),
        (lambda model, it: ds.measure(model, tokenizer=it, texts=["a"], calibration="core"), OptionError, "only one"),
        (lambda model, it: ds.measure(model, tokenizer=it, texts=TEXTS, parts="walls"), OptionError, "no part 'walls'"),
        (lambda model, it: ds.measure(nn.Linear(2, 2), tokenizer=it, **SPECTRA), UnavailableError, "no transformers"),
        (lambda model, it: ds.measure(model.double(), tokenizer=it, **SPECTRA), UnavailableError, "are torch.float64"),
        (lambda model, it: ds.measure(model.to("meta"), tokenizer=it, **SPECTRA), UnavailableError, "not in memory"),
    ],
)
def test_what_cannot_be_measured_is_told(model: Any, tokenizer: Any, wrong: Any, error: type, told: str) -> None:
    with pytest.raises(error, match=told):
        wrong(model, tokenizer)


def test_rwkv_is_refused(tokenizer: Any) -> None:
    """It divides its weights by powers of two where it runs in evaluation mode."""
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, context_length=64
    )
    with pytest.raises(UnavailableError, match="RWKV changes its weights"):
        ds.measure(RwkvForCausalLM(config), tokenizer=tokenizer, **SPECTRA)
