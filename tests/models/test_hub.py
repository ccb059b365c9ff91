"""Downloads with the real client of the hub from a server in this process, and every way in which they fail."""

import json
import socket
import time
from pathlib import Path

import pytest
from delta_suite.errors import ModelUnavailableError
from delta_suite.models.fingerprint import fingerprint
from delta_suite.models.sources import availability, locate
from delta_suite.models.sources import hub as hub_module
from delta_suite.models.spec import ModelSpec

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


def test_needed_files_are_downloaded_once_and_no_others(published: Hub, checkpoint: Path) -> None:
    assert availability(SPEC) == (False, "not downloaded")
    assert not published.asked
    files = locate(SPEC)
    assert {path.name for path in files.directory.iterdir()} == {
        *("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json")
    }
    assert files.revision == published.commit("acme/tiny")
    assert fingerprint(files) == fingerprint(locate(ModelSpec(name="x", path=checkpoint)))
    published.asked.clear()
    assert locate(SPEC) == files
    assert availability(SPEC)[0]
    assert published.asked == []


def test_all_files_that_a_tokenizer_reads_are_downloaded(published: Hub, checkpoint: Path) -> None:
    for name in ("source.spm", "bpe.codes", "chat_template.jinja", "additional_chat_templates/tools.jinja"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(name)
        published.repositories["acme/tiny"][name] = name.encode()
    files = locate(SPEC)
    assert (files.directory / "additional_chat_templates" / "tools.jinja").is_file()
    assert fingerprint(files) == fingerprint(locate(ModelSpec(name="x", path=checkpoint)))


def test_code_of_the_model_is_downloaded_only_if_trusted(published: Hub) -> None:
    trusted = SPEC.model_copy(update={"trust_remote_code": True})
    assert "modeling_tiny.py" in {path.name for path in locate(trusted).directory.iterdir()}


def test_shards_are_downloaded_with_their_index(published: Hub) -> None:
    repository = published.repositories["acme/tiny"]
    repository["model-00001-of-00001.safetensors"] = repository.pop("model.safetensors")
    names = {"weight": "model-00001-of-00001.safetensors"}
    repository["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": names}).encode()
    assert [path.name for path in locate(SPEC).weights] == ["model-00001-of-00001.safetensors"]
    assert not (locate(SPEC).directory / "consolidated.safetensors").exists()


def test_missing_files_of_a_snapshot_are_downloaded(published: Hub) -> None:
    files = locate(SPEC)
    files.weights[0].unlink()
    assert not availability(SPEC)[0]
    assert locate(SPEC) == files


def test_a_pickle_is_never_downloaded_unasked(published: Hub) -> None:
    del published.repositories["acme/tiny"]["model.safetensors"]
    del published.repositories["acme/tiny"]["consolidated.safetensors"]
    message = problem(SPEC)
    assert "acme/tiny at main has its weights as pickles alone (pytorch_model.bin)" in message
    assert "allow_pickle = true" in message
    assert not any("resolve" in path for path in published.asked)
    assert locate(SPEC.model_copy(update={"allow_pickle": True})).weights[0].read_bytes() == b"a pickle"


def test_a_gguf_file_is_downloaded_alone(published: Hub) -> None:
    published.repositories["acme/tiny"]["quants/m.gguf"] = b"GGUF" + bytes([3] + [0] * 19) + bytes(32)
    files = locate(SPEC.model_copy(update={"gguf": "quants/m.gguf"}))
    assert [path.name for path in files.directory.iterdir()] == ["quants"]
    assert files.revision == published.commit("acme/tiny")
    message = problem(SPEC.model_copy(update={"gguf": "n.gguf"}))
    assert "has no file n.gguf.\n  GGUF files there: quants/m.gguf" in message


@pytest.mark.parametrize(
    ("lacks", "adds", "expected"),
    [
        (("config.json",), {}, "it has no config.json"),
        (("model.safetensors", "pytorch_model.bin"), {"m.gguf": b""}, "name one under `gguf` in an entry"),
        (("model.safetensors", "pytorch_model.bin"), {"adapter_config.json": b""}, "merge it into its base model"),
    ],
)
def test_a_repository_without_a_loadable_model(
    published: Hub, lacks: tuple[str, ...], adds: dict[str, bytes], expected: str
) -> None:
    files = published.repositories["acme/tiny"]
    for name in (*lacks, "consolidated.safetensors"):
        del files[name]
    files |= adds
    assert expected in problem(SPEC)


def test_a_gated_repository(published: Hub) -> None:
    published.gated.add("acme/tiny")
    message = problem(SPEC)
    assert "access to acme/tiny is restricted" in message
    assert f"Accept the licence at {published.url}/acme/tiny, then log in with `hf auth login`" in message


def test_no_such_repository(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = problem(SPEC)
    assert "the hub has no model acme/tiny, or it is private" in message
    assert f"Check the id at {hub.url}/acme/tiny" in message
    assert "directory was meant" not in message
    (tmp_path / "acme").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "(If a directory was meant: acme/ is here, but has no tiny.)" in problem(SPEC)


def test_no_such_revision(published: Hub) -> None:
    message = problem(SPEC.at("step2"))
    assert "the repository acme/tiny has no revision 'step2'" in message
    assert "such as main or one of step1" in message


def test_a_hub_that_answers_with_an_error(hub: Hub) -> None:
    hub.failing.add("acme/tiny")
    message = problem(SPEC)
    assert f"acme/tiny at main is not in the Hugging Face cache ({hub.cache}), and {hub.url} answered" in message
    assert "500" in message


def test_a_missing_network_is_noticed_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    message = problem(SPEC)
    assert time.monotonic() - started < 5
    assert f"not in the Hugging Face cache ({hub.cache}), and http://127.0.0.1:9 cannot be reached" in message
    assert "run `hf download acme/tiny` where the hub can be reached" in message


def test_a_hub_that_does_not_answer_times_out(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub_module, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "cannot be reached" in problem(SPEC)
        assert time.monotonic() - started < 5


def test_offline_mode(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = problem(SPEC.at("step1"))
    assert "acme/tiny at step1 is not in the Hugging Face cache" in message
    assert "HF_HUB_OFFLINE forbids" in message
    assert "Unset HF_HUB_OFFLINE, or run `hf download acme/tiny --revision step1`" in message
    assert hub.asked == []


def test_an_incomplete_snapshot_and_no_network(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the missing file besides the network: the repository may lack it, too."""
    from huggingface_hub import constants

    (locate(SPEC).directory / "tokenizer.json").unlink()
    (locate(SPEC).directory / "tokenizer_config.json").unlink()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = problem(SPEC)
    assert "has no tokenizer" in message
    assert "and http://127.0.0.1:9 cannot be reached" in message


def test_too_little_space_is_noticed_before_the_download(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    message = problem(SPEC)
    assert f"no space for the download in {published.cache}: it needs 0.0 GB more, and 0.0 GB are free" in message
    assert "set HF_HOME" in message
    assert not any("resolve" in path for path in published.asked)


def test_a_disk_that_fills_up_during_the_download(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "the disk is full" in problem(SPEC)
