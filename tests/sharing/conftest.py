"""A hub that takes and gives datasets, over real HTTP from this process, and a record to share."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from delta_suite.records.arrays import ArrayFile
from delta_suite.records.cache import Cache
from delta_suite.records.store import save
from delta_suite.records.view import RecordView

from tests.records.random_streams import ordinary_record

Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of six layers, with its arrays, in a results folder of its own. Tests leave it as it is."""
    root = tmp_path_factory.mktemp("shared")
    record, content = ordinary_record()
    return save(root / "results", RecordView(record, ArrayFile(root, content=content)), Cache(root / "cache"))[0]


@dataclass
class DatasetHub:
    """A simulated hub: what https://huggingface.co/docs/hub/api and Git LFS say of datasets, as far as it is asked."""

    url: str = ""
    branches: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Repository -> branch -> path -> content."""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Commit -> path -> content."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files, by SHA-256."""
    asked: list[str] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)
    """Answers to give instead, by a pattern of method and path."""

    def files(self, repo: str = "ada/results", branch: str = "main") -> dict[str, bytes]:
        return self.branches[repo][branch]

    def publish(self, files: dict[str, bytes], repo: str = "ada/results") -> None:
        """Put files into a dataset, whatever they are."""
        self.branches.setdefault(repo, {"main": {}})["main"] |= files

    def head(self, repo: str, branch: str) -> str:
        """Return the commit of a branch, which is made of its content."""
        files = self.branches[repo][branch]
        listed = "".join(f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{repo} {listed}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        return commit

    # --- answers

    def answer(self, method: str, target: str, body: bytes) -> Answer:
        path = unquote(urlsplit(target).path)
        self.asked.append(f"{method} {path}")
        for pattern, given in self.answers.items():
            if re.search(pattern, f"{method} {path}"):
                return given
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.branches.setdefault(repo, {"main": {".gitattributes": b"*.safetensors filter=lfs"}})
            return self._json({"url": f"{self.url}/datasets/{repo}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if found := re.fullmatch(r"/storage/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.stored[found[1]] = body
            return 200, {}, b""
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path):
            return self._resolve(*found.groups())
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/(.+))?", path)
        assert found is not None, path
        repo, kind, rest = found.groups()
        if repo not in self.branches:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if kind == "preupload":
            return self._preupload(json.loads(body), repo)
        if kind == "commit":
            return self._commit(repo, rest, body, create_pr="create_pr=1" in target)
        if kind == "tree":
            return self._tree(*rest.partition("/")[::2])
        branch = rest or "main"
        if branch not in self.branches[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        siblings = [{"rfilename": name} for name in self.files(repo, branch)]
        return self._json({"id": repo, "sha": self.head(repo, branch), "siblings": siblings, "tags": []})

    @staticmethod
    def _json(content: Any, status: int = 200) -> Answer:
        return status, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def _tree(self, commit: str, folder: str) -> Answer:
        listed = [self._entry(name, data) for name, data in self.commits[commit].items() if name.startswith(folder)]
        return self._json(listed) if listed else (404, {"X-Error-Code": "EntryNotFound"}, b"{}")

    @staticmethod
    def _entry(name: str, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": oid}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _preupload(self, asked: dict[str, Any], repo: str) -> Answer:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in asked["files"]
        ]
        return self._json({"files": modes})

    def _batch(self, asked: dict[str, Any]) -> Answer:
        assert asked["operation"] == "upload"
        objects = []
        for item in asked["objects"]:
            known = item["oid"] in self.stored
            actions = {} if known else {"actions": {"upload": {"href": f"{self.url}/storage/{item['oid']}"}}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, branch: str, body: bytes, *, create_pr: bool) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit") not in (None, self.head(repo, branch)):
            return self._json({"error": "A commit has happened since"}, 412)
        if create_pr:
            branches = self.branches[repo]
            branches[f"refs/pr/{len(branches)}"] = dict(branches[branch])
            branch = list(branches)[-1]
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            content = self.stored[value["oid"]] if large else base64.b64decode(value["content"])
            self.branches[repo][branch][value["path"]] = content
        place, commit = f"{self.url}/datasets/{repo}", self.head(repo, branch)
        pull_request = f"{place}/discussions/{branch.rpartition('/')[2]}" if create_pr else None
        return self._json(
            {"commitUrl": f"{place}/commit/{commit}", "commitOid": commit, "pullRequestUrl": pull_request}
        )

    def _resolve(self, repo: str, commit: str, name: str) -> Answer:
        data = self.commits[commit][name]
        entry = self._entry(name, data)
        etag = entry.get("lfs", entry)["oid"]
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, data


class QuietServer(ThreadingHTTPServer):
    """A server that says nothing of clients that hang up, as they do at a fault: tests read what stands on stderr."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    """A running hub, which huggingface_hub is configured to use, without Xet and without waiting between attempts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    simulated = DatasetHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, content = simulated.answer(self.command, self.path, body)
            if status == 0:  # the connection breaks
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    server = QuietServer(("127.0.0.1", 0), Handler)
    simulated.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", simulated.url)
    template = simulated.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    yield simulated
    server.shutdown()
    server.server_close()
