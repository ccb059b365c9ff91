"""The random-weights control: its name, its fingerprint, and that its weights are the same in every process."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.errors import DeviceError, ModelUnavailableError, UnknownModelError
from delta_suite.models import loading
from delta_suite.models.control import control_fingerprint
from delta_suite.models.device import Gpu, Hardware
from delta_suite.models.fingerprint import fingerprint
from delta_suite.models.loading import LoadedModel, load
from delta_suite.models.models_file import load_registry
from delta_suite.models.recorded import recorded_model
from delta_suite.models.sources import locate
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure
from delta_suite.records.cache import Cache
from scipy.stats import kstest

from tests import apart
from tests.models.conftest import Hub
from tests.models.test_files import gguf
from tests.tiny import QUICK, make_tiny


def digest(directory: Path) -> str:
    """Return the SHA-256 of the weights of a directory's control."""
    total = hashlib.sha256()
    for name, tensor in sorted(control_of(directory).model.state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def print_digest(directory: Path) -> None:
    """Print it."""
    print(digest(directory))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(**QUICK, results=tmp_path / "results", cache=Cache(tmp_path / "cache"))


def control_of(directory: Path, device: str = "cpu", **options: Any) -> LoadedModel:
    spec = ModelSpec(name="x", path=directory).control()
    return load(spec, locate(spec), device=device, **options)


def test_the_weights_are_drawn_as_those_of_the_class(tiny: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    control = control_of(tiny)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers go on as they would
    config = LlamaConfig.from_pretrained(tiny)
    expected = LlamaForCausalLM(config).state_dict()
    assert expected.keys() == control.model.state_dict().keys()
    for name, tensor in control.model.state_dict().items():
        assert tensor.shape == expected[name].shape, name
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert kstest(tensor.flatten() / config.initializer_range, "norm").pvalue > 1e-4, name
    assert not control.model.training
    assert not any(parameter.requires_grad for parameter in control.model.parameters())
    assert (control.dtype, control.devices) == ("float32", ("cpu",))


def test_a_narrow_control_is_the_float32_rounded(tiny: Path) -> None:
    wide, narrow = (control_of(tiny, dtype=dtype).model.state_dict() for dtype in ("float32", "bfloat16"))
    for name, tensor in narrow.items():
        assert torch.equal(tensor, wide[name].to(torch.bfloat16)), name


def test_tied_weights_stay_tied_and_constants_are_those_of_the_cpu(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = Path(shutil.copytree(tiny, tmp_path / "tied"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = control_of(folder).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    plain = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder))
    buffers, expected = dict(model.named_buffers()), dict(plain.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in buffers.items())


def test_what_an_earlier_version_drew_is_no_control_of_today(tiny: Path) -> None:
    spec = ModelSpec(name="x", path=tiny)
    earlier = f"random-weights, seed 0, as {spec.source}"
    assert spec.control().source != earlier
    with pytest.raises(UnknownModelError, match="an earlier version drew its random weights in another way"):
        recorded_model(load_registry(), earlier, None)


def test_another_process_draws_the_same_weights(tiny: Path) -> None:
    other = apart.run(print_digest, tiny)
    torch.rand(1000)  # whatever was drawn before
    assert other.out.splitlines() == [digest(tiny)], other.err


def test_the_dtype_is_that_asked_for(tiny: Path) -> None:
    assert control_of(tiny, dtype="bfloat16").dtype == "bfloat16"
    config = tiny / "config.json"
    assert json.loads(config.read_text())["dtype"] == "float32"
    assert control_of(tiny).dtype == "float32"


@pytest.mark.parametrize("places", [{}, {"model.embed_tokens": "cpu", "model": "cpu", "lm_head": "disk"}])
def test_a_control_split_over_devices_is_the_same(
    tiny: Path, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if places:
        monkeypatch.setattr("accelerate.infer_auto_device_map", lambda *_, **__: places)
    one, split = (control_of(tiny, device).model for device in ("cpu", "sharded"))
    ids = torch.arange(20)[None]
    there = split(ids.to(split.device)).logits.cpu()
    assert torch.allclose(one(ids).logits, there, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cuda", "sharded"])
def test_a_control_is_the_same_on_gpus(tiny: Path, device: str) -> None:
    one, other = (control_of(tiny, place).model.state_dict() for place in ("cpu", device))
    for name, tensor in one.items():
        assert (tensor - other[name].cpu()).abs().max() <= 1e-6, name


def test_every_source_has_controls(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[models.pythia]\nhub = "acme/pythia"\nphases = { A = [0, 1] }\n')
    registry = load_registry(tmp_path / "models.toml")
    for argument, name, source in [
        ("pythia", "pythia", "hub:acme/pythia"),
        ("pythia@step8", "pythia@step8", "hub:acme/pythia"),
        ("acme/other@step8", "acme--other@step8", "hub:acme/other"),
        (str(tiny), registry.resolve(str(tiny)).name, f"directory:{tiny}"),
    ]:
        spec = registry.resolve(f"{argument}@random-weights")
        assert spec == registry.resolve(argument).control()
        assert spec.name == f"{name}@random-weights"
        assert spec.source == f"random-weights, seed 0, splitmix64, as {source}"
        assert spec.phases == registry.resolve(argument).phases
        assert spec.control() == spec
    with pytest.raises(UnknownModelError, match="pythio"):
        registry.resolve("pythio@random-weights")


def test_checkpoints_of_an_architecture_share_one_measurement(small: Path, tmp_path: Path, settings: Settings) -> None:
    trained = ModelSpec(name="tiny", path=small)
    later = ModelSpec(name="later", path=make_tiny(tmp_path / "later", layers=4, hidden=32, seed=1))
    config = json.loads((tmp_path / "later" / "config.json").read_text())
    written = config | {"_name_or_path": "elsewhere", "transformers_version": "5.0.0"}
    (tmp_path / "later" / "config.json").write_text(json.dumps(written, indent=8))
    assert fingerprint(locate(trained)) != fingerprint(locate(later))

    first = measure(trained.control(), settings)
    second = measure(later.control(), settings)
    assert not first.cached
    assert second.cached
    record = json.loads(second.path.read_text())["model"]
    assert record["name"] == "later@random-weights"
    assert record["source"] == f"random-weights, seed 0, splitmix64, as directory:{tmp_path / 'later'}"
    assert second.view.model.revision is None
    assert record["fingerprint"] == first.view.model.fingerprint
    assert not measure(trained, settings).cached  # the model itself is another measurement

    for change in ({"hidden_size": 24}, {"initializer_range": 0.1}, {"rope_theta": 5.0}):
        (tmp_path / "later" / "config.json").write_text(json.dumps(config | change))
        assert control_fingerprint(locate(later.control())) != record["fingerprint"], change


def test_another_tokenizer_is_another_control(tiny: Path, tmp_path: Path) -> None:
    spec = ModelSpec(name="x", path=Path(shutil.copytree(tiny, tmp_path / "copy"))).control()
    before = control_fingerprint(locate(spec))
    path = tmp_path / "copy" / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert control_fingerprint(locate(spec)) != before


def test_no_weights_are_needed(small: Path, tmp_path: Path, settings: Settings) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    spec = ModelSpec(name="x", path=copy).control()
    assert locate(spec).weights == ()
    assert measure(spec, settings).view.model.layers == 4


def test_no_weights_are_downloaded(hub: Hub, small: Path, settings: Settings) -> None:
    hub.repositories["acme/tiny"] = {path.name: path.read_bytes() for path in small.iterdir()}
    outcome = measure(ModelSpec(name="acme--tiny", hub="acme/tiny").control(), settings)
    assert outcome.view.model.revision is None
    assert outcome.view.model.source == "random-weights, seed 0, splitmix64, as hub:acme/tiny"
    assert not any("safetensors" in request for request in hub.asked)


def test_weights_in_a_gguf_file_do_not_count(tmp_path: Path) -> None:
    def control(tensors: int = 2, change: tuple[bytes, bytes] = (b"", b"")) -> str:
        gguf(tmp_path / "m.gguf", tensors=tensors)
        content = (tmp_path / "m.gguf").read_bytes()
        (tmp_path / "m.gguf").write_bytes(content.replace(*change) if change[0] else content)
        return control_fingerprint(locate(ModelSpec(name="x", path=tmp_path).control()))

    whole = control()
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[:-4] + b"\1\2\3\4")
    assert control_fingerprint(locate(ModelSpec(name="x", path=tmp_path).control())) == whole
    assert control(tensors=3) != whole
    assert control(change=(b"llama", b"gemma")) != whole


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"hidden_size": 1 << 24, "vocab_size": 1 << 24},
            r"takes 2,[0-9,]{7} GB, and there are [0-9]+ GB here",
        ),
        ({"intermediate_size": 1 << 23}, "takes [0-9,]+ GB, and there are [0-9]+ GB here"),
        ({"num_local_experts": 1 << 20}, "num_local_experts = 1048576, in up to 12 layers"),
    ],
)
def test_a_control_that_memory_cannot_hold_is_refused_before_it_is_built(
    tiny: Path, tmp_path: Path, changes: dict[str, int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "absurd")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(loading, "initialise", lambda *_, **__: pytest.fail("memory was asked for"))
    spec = ModelSpec(name="absurd", path=folder).control()
    with pytest.raises((DeviceError, ModelUnavailableError), match=says):
        load(spec, locate(spec))


@pytest.mark.parametrize(
    ("device", "says"),
    [("cuda:1", "4 GB on cuda:1"), ("sharded", "7 GB here, those of GPUs included"), ("cpu", "1 GB here")],
)
def test_the_memory_that_counts_is_that_of_the_device(
    tiny: Path, tmp_path: Path, device: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "large")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 1 << 23}
    (folder / "config.json").write_text(json.dumps(config))
    here = Hardware((Gpu("A", 2.0), Gpu("B", 4.0)), "", mps=False, memory_gb=1.0)
    monkeypatch.setattr(loading, "hardware", lambda: here)
    with pytest.raises(DeviceError, match=f"takes 58 GB, and there are {says}"):
        control_of(folder, device)
