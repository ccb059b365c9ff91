"""Downloads, through the real client of the hub, from a server in this process; and every way in which they fail."""

import json
import socket
import time
from pathlib import Path

import pytest
from delta_suite.errors import ModelUnavailableError
from delta_suite.models.files import availability, fingerprint, locate
from delta_suite.models.registry import ModelSpec
from delta_suite.models.sources import hub as hub_module

from tests.models.conftest import Hub

SPEC = ModelSpec(name="tiny", hub="acme/tiny", checkpoints=("step1",))


@pytest.fixture
def published(hub: Hub, checkpoint: Path) -> Hub:
    """The checkpoint at acme/tiny, among files that no measurement needs."""
    hub.repositories["acme/tiny"] = {path.name: path.read_bytes() for path in checkpoint.iterdir()} | {
        "README.md": b"# tiny",
        "pytorch_model.bin": b"a pickle",
        "consolidated.safetensors": b"another layout",
        "onnx/model.safetensors": b"another format",
        "modeling_tiny.py": b"raise SystemExit",
    }
    return hub


def problem(spec: ModelSpec) -> str:
    with pytest.raises(ModelUnavailableError) as caught:
        locate(spec)
    return str(caught.value)


def test_what_is_needed_is_downloaded_once_and_nothing_else(published: Hub, checkpoint: Path) -> None:
    assert availability(SPEC) == (False, "not downloaded: hf download acme/tiny")
    assert not published.asked
    found = locate(SPEC)
    assert {path.name for path in found.directory.iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"
    }  # fmt: skip
    assert found.revision == published.commit("acme/tiny")
    assert fingerprint(found) == fingerprint(locate(ModelSpec(name="x", path=checkpoint)))
    published.asked.clear()
    assert locate(SPEC) == found
    assert availability(SPEC)[0]
    assert published.asked == []


def test_the_models_code_comes_only_where_it_is_trusted(published: Hub) -> None:
    trusted = SPEC.model_copy(update={"trust_remote_code": True})
    assert "modeling_tiny.py" in {path.name for path in locate(trusted).directory.iterdir()}


def test_shards_come_with_their_index(published: Hub) -> None:
    files = published.repositories["acme/tiny"]
    files["model-00001-of-00001.safetensors"] = files.pop("model.safetensors")
    names = {"weight": "model-00001-of-00001.safetensors"}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": names}).encode()
    assert [path.name for path in locate(SPEC).weights] == ["model-00001-of-00001.safetensors"]
    assert not (locate(SPEC).directory / "consolidated.safetensors").exists()


def test_what_an_incomplete_snapshot_lacks_is_fetched(published: Hub) -> None:
    found = locate(SPEC)
    found.weights[0].unlink()
    assert not availability(SPEC)[0]
    assert locate(SPEC) == found


def test_a_pickle_is_never_downloaded_unasked(published: Hub) -> None:
    del published.repositories["acme/tiny"]["model.safetensors"]
    del published.repositories["acme/tiny"]["consolidated.safetensors"]
    told = problem(SPEC)
    assert "acme/tiny at main has its weights as pickles alone (pytorch_model.bin)" in told
    assert "allow_pickle = true" in told
    assert not any("resolve" in path for path in published.asked)
    assert locate(SPEC.model_copy(update={"allow_pickle": True})).weights[0].read_bytes() == b"a pickle"


def test_a_gguf_file_comes_alone(published: Hub) -> None:
    published.repositories["acme/tiny"]["quants/m.gguf"] = b"GGUF" + bytes([3] + [0] * 19) + bytes(32)
    found = locate(SPEC.model_copy(update={"gguf": "quants/m.gguf"}))
    assert [path.name for path in found.directory.iterdir()] == ["quants"]
    assert found.revision == published.commit("acme/tiny")
    told = problem(SPEC.model_copy(update={"gguf": "n.gguf"}))
    assert "has no file n.gguf.\n  GGUF files there: quants/m.gguf" in told


@pytest.mark.parametrize(
    ("lacks", "adds", "telling"),
    [
        (("config.json",), {}, "it has no config.json"),
        (("model.safetensors", "pytorch_model.bin"), {"m.gguf": b""}, "name one under `gguf` in an entry"),
        (("model.safetensors", "pytorch_model.bin"), {"adapter_config.json": b""}, "merge it into its base model"),
    ],
)
def test_a_repository_of_another_kind(
    published: Hub, lacks: tuple[str, ...], adds: dict[str, bytes], telling: str
) -> None:
    files = published.repositories["acme/tiny"]
    for name in (*lacks, "consolidated.safetensors"):
        del files[name]
    files |= adds
    assert telling in problem(SPEC)


def test_gated(published: Hub) -> None:
    published.gated.add("acme/tiny")
    told = problem(SPEC)
    assert "access to acme/tiny is restricted" in told
    assert f"Accept the licence at {published.url}/acme/tiny, then log in with `hf auth login`" in told


def test_no_such_repository(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = problem(SPEC)
    assert "the hub has no model acme/tiny, or it is private" in told
    assert f"Check the id at {hub.url}/acme/tiny" in told
    assert "directory was meant" not in told
    (tmp_path / "acme").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "(If a directory was meant: acme/ is here, but has no tiny.)" in problem(SPEC)


def test_no_such_revision(published: Hub) -> None:
    told = problem(SPEC.at("step2"))
    assert "the repository acme/tiny has no revision 'step2'" in told
    assert "such as main or one of step1" in told


def test_a_hub_that_is_out_of_order(hub: Hub) -> None:
    hub.failing.add("acme/tiny")
    told = problem(SPEC)
    assert f"acme/tiny at main is not in the Hugging Face cache ({hub.cache}), and {hub.url} answered" in told
    assert "500" in told


def test_no_network_shows_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    told = problem(SPEC)
    assert time.monotonic() - started < 5
    assert f"not in the Hugging Face cache ({hub.cache}), and http://127.0.0.1:9 cannot be reached" in told
    assert "run `hf download acme/tiny` where the hub can be reached" in told


def test_a_hub_that_does_not_answer_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub_module, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "cannot be reached" in problem(SPEC)
        assert time.monotonic() - started < 5


def test_offline_by_choice(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = problem(SPEC.at("step1"))
    assert "acme/tiny at step1 is not in the Hugging Face cache" in told
    assert "HF_HUB_OFFLINE forbids" in told
    assert "Unset HF_HUB_OFFLINE, or run `hf download acme/tiny --revision step1`" in told
    assert hub.asked == []


def test_an_incomplete_snapshot_and_no_network(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lacks is told beside why it could not be fetched: it may be the model's own fault."""
    from huggingface_hub import constants

    (locate(SPEC).directory / "tokenizer.json").unlink()
    (locate(SPEC).directory / "tokenizer_config.json").unlink()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    told = problem(SPEC)
    assert "has no tokenizer" in told
    assert "and http://127.0.0.1:9 cannot be reached" in told


def test_too_little_space_is_told_before_the_download(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    told = problem(SPEC)
    assert f"no space for the download in {published.cache}: it needs 0.0 GB more, and 0.0 GB are free" in told
    assert "set HF_HOME" in told
    assert not any("resolve" in path for path in published.asked)


def test_a_disk_that_fills_up_meanwhile(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "the disk is full" in problem(SPEC)
