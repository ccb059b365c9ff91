"""Small models for tests, and a hub that answers over real HTTP from this process."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest


def write_tokenizer(directory: Path) -> None:
    """Write a word-level tokenizer of a dozen words, in the form that AutoTokenizer reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with the files that save_pretrained writes, though its one tensor is no model; it needs no torch."""
    from safetensors.numpy import save_file

    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    (directory / "generation_config.json").write_text("{}")
    save_file({"weight": np.arange(64, dtype=np.float32)}, directory / "model.safetensors")
    write_tokenizer(directory)
    return directory


@pytest.fixture
def llama(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny random Llama that the test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "llama"))


@dataclass
class Hub:
    """A simulated hub; it has the answers of https://huggingface.co/docs/hub/api that a download needs."""

    cache: Path
    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> file name -> content, all at the revision main."""
    gated: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    """The paths requested so far."""

    def commit(self, repository: str) -> str:
        return hashlib.sha1(repository.encode()).hexdigest()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.split("?", maxsplit=1)[0]
        repository = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if repository in self.failing:
            return 500, {}, b"out of order"
        if repository not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        files, commit = self.repositories[repository], self.commit(repository)
        # /api/models/org/name/<kind>/<revision> and /org/name/resolve/<revision>/<file>
        parts = path.removeprefix("/api/models").strip("/").split("/")
        kind, revision, name = parts[2], parts[3], "/".join(parts[4:])
        if revision not in ("main", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if kind == "revision":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            info = {"id": repository, "modelId": repository, "sha": commit, "private": False, "siblings": siblings}
            return 200, {}, json.dumps({**info, "tags": [], "downloads": 0, "likes": 0}).encode()
        if kind == "tree":
            listed = [self._entry(name, data) for name, data in files.items()]
            return 200, {}, json.dumps(listed).encode()
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        entry = self._entry(name, files[name])
        etag = entry.get("lfs", entry)["oid"]
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[name]

    @staticmethod
    def _entry(name: str, data: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith((".safetensors", ".bin")):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub with an empty cache, which huggingface_hub is configured to use."""
    from huggingface_hub import constants

    simulated = Hub(cache=tmp_path / "hf" / "hub")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            simulated.asked.append(f"{self.command} {self.path}")
            status, headers, body = simulated.answer(self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    simulated.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_HUB_CACHE", str(simulated.cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(simulated.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", simulated.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", simulated.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield simulated
    server.shutdown()
    server.server_close()
