"""Measure on several GPUs, and print one JSON: `python tests/gpu/multi_gpu.py`, on a machine with 2 or 4 of them.

A tiny model under `sharded`, `fsdp` and `tp` is held against its record from the CPU. Then a large one, Llama's shape
with random weights in bfloat16, is measured under each; seconds, memory and certificate are told. What there is no time
for is left out by name, so that the whole ends within `--minutes`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODES = ("fsdp", "sharded", "tp")
SHAPES = {  # hidden, intermediate, layers, heads, key/value heads
    "70b": (8192, 28672, 80, 64, 8),
    "32b": (5120, 25600, 64, 40, 8),
    "8b": (4096, 14336, 32, 32, 8),
    "tiny": (64, 128, 4, 8, 4),
}
VOCABULARY = 32_000
PARTS = "spectra,boundaries"
TOLERANCE = {"sharded": 1e-4, "fsdp": 1e-4, "tp": 1e-3}
"""Largest difference from the record of the CPU, in float32 on both, relative to figures above 1."""

LEFT_FOR_ENDING = 10.0
SHORTEST = 45.0
"""Seconds that must be left for a large run to be started."""


@dataclass
class Bench:
    """A folder to work in, and the moment at which everything ends."""

    folder: Path
    until: float
    cache: Path = field(init=False)

    def __post_init__(self) -> None:
        self.cache = self.folder / "cache"

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic() - LEFT_FOR_ENDING

    def measure(self, model: Path, mode: str, gpus: Sequence[int], *options: str) -> dict[str, Any]:
        """Measure a model in processes of their own; return the record, or the message."""
        results = self.folder / "results" / f"{model.name}-{mode}-{len(gpus)}"
        command = [sys.executable, "-m"]
        if mode in ("fsdp", "tp"):
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(len(gpus)), "-m"]
        command += ["delta_suite", "measure", str(model), "--device", mode, "--parts", PARTS, *options]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "suite"), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in gpus),
            "DELTA_SUITE_CACHE": str(self.cache),
            "HF_HUB_OFFLINE": "1",
        }
        started = time.monotonic()
        try:
            done = subprocess.run(
                [*command, "--results-dir", str(results)],
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(1.0, self.left),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            told = error.stderr.decode(errors="replace")[-1500:] if isinstance(error.stderr, bytes) else ""
            return {"message": f"no end after {time.monotonic() - started:.0f} s", "stderr": told}
        seconds = round(time.monotonic() - started, 1)
        paths = sorted(results.glob("runs/*/*.json"))
        if done.returncode or not paths:
            lines = [line for line in done.stderr.splitlines() if "delta-suite" in line]
            return {"message": " ".join(lines[:3]), "stderr": done.stderr[-1500:], "wall_seconds": seconds}
        return {"record": json.loads(paths[-1].read_text()), "wall_seconds": seconds}


def make_model(folder: Path, shape: str, gpus: int, *, dtype: str) -> Path:
    """Save a Llama of random weights, a file for each block, so that it needs no memory for all of them."""
    sys.path[:0] = [str(ROOT), str(ROOT / "suite")]
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from tests.tiny import make_tiny

    hidden, intermediate, layers, heads, groups = SHAPES[shape]
    place = make_tiny(folder / shape, layers=1)  # for its tokenizer
    (place / "model.safetensors").unlink()
    config = LlamaConfig(
        vocab_size=VOCABULARY if shape != "tiny" else 512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = getattr(torch, dtype)
    config.save_pretrained(place)
    narrow = groups * (hidden // heads)
    block = {
        **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "o")},
        **{f"self_attn.{name}_proj.weight": (narrow, hidden) for name in ("k", "v")},
        **{f"mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")},
        "mlp.down_proj.weight": (hidden, intermediate),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    files = {
        f"model-{layer:05d}.safetensors": {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        for layer in range(layers)
    }
    ends = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    files["model-ends.safetensors"] = ends | {"lm_head.weight": (config.vocab_size, hidden)}

    def write(number: int, name: str) -> None:
        device = f"cuda:{number % gpus}" if gpus else "cpu"
        drawn = torch.Generator(device).manual_seed(number)
        scale = 0.2 if shape == "tiny" else 0.02
        tensors = {}
        for key, size in files[name].items():
            tensor = torch.ones(size, device=device)
            if len(size) > 1:
                tensor.normal_(0.0, scale, generator=drawn)
            tensors[key] = tensor.to(getattr(torch, dtype)).cpu()
        save_file(tensors, place / name, metadata={"format": "pt"})

    with ThreadPoolExecutor(max(2, 2 * gpus)) as pool:
        list(pool.map(write, range(len(files)), files))
    names = {key: name for name, tensors in files.items() for key in tensors}
    index = {"metadata": {}, "weight_map": names}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    if gpus:
        torch.cuda.empty_cache()
    return place


def figures(part: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of a part of a record, with its place."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield from figures(value, f"{path}/{key}")
    elif isinstance(part, list):
        for index, value in enumerate(part):
            yield from figures(value, f"{path}/{index}")
    elif isinstance(part, int | float) and not isinstance(part, bool):
        yield path, float(part)


def compared(run: dict[str, Any], reference: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Return the largest difference of all figures of layers and phases from those of another record."""
    if "record" not in run or "record" not in reference:
        return {"ok": False, "message": run.get("message") or f"CPU: {reference.get('message')}"}
    worst, at = 0.0, ""
    for part in ("layers", "scopes"):
        there, here = dict(figures(reference["record"][part])), dict(figures(run["record"][part]))
        if there.keys() != here.keys():
            return {"ok": False, "message": f"other figures: {sorted(there.keys() ^ here.keys())[:4]}"}
        for place, value in there.items():
            apart = abs(here[place] - value) / max(1.0, abs(value))
            if not apart <= worst:
                worst, at = apart, place
    return {"ok": worst <= tolerance, "largest_difference": worst, "at": at, "wall_seconds": run["wall_seconds"]}


def told(run: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of a large run."""
    if "record" not in run:
        return run
    record, provenance = run["record"], run["record"]["provenance"]
    certificate = record["certificate"]
    return {
        "wall_seconds": run["wall_seconds"],
        "seconds": provenance["seconds"],
        "tokens": record["calibration"]["tokens"],
        "groups": record["resampling"]["groups"],
        "peak_memory_gb": {name: round(size / 1e9, 1) for name, size in provenance["peak_memory_bytes"].items()},
        "stream": provenance["stream"],
        "hardware": provenance["hardware"],
        "certificate": {name: each["error"] for name, each in certificate["identities"].items()},
        "holds": certificate["holds"],
        "effective_rank": [row["metrics"]["raw"]["effective_rank"]["value"] for row in record["layers"]][:4],
    }


def tiny_runs(bench: Bench, counts: Sequence[int], documents: int) -> dict[str, Any]:
    """Return how the tiny model's records on several GPUs differ from that on the CPU; all runs at once."""
    model = make_model(bench.folder, "tiny", 0, dtype="float32")
    options = ("--dtype", "float32", "--documents", str(documents))
    jobs = [("cpu", 0), *((mode, count) for count in counts for mode in MODES)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        runs = dict(
            zip(jobs, pool.map(lambda job: bench.measure(model, job[0], range(job[1]), *options), jobs), strict=True)
        )
    return {
        str(count): {mode: compared(runs[mode, count], runs["cpu", 0], TOLERANCE[mode]) for mode in MODES}
        for count in counts
    }


def large_runs(bench: Bench, shape: str, gpus: int, documents: int, modes: Sequence[str]) -> dict[str, Any]:
    """Return what came of the large model under each mode, one after the other, as long as there is time."""
    started = time.monotonic()
    model = make_model(bench.folder, shape, gpus, dtype="bfloat16")
    out: dict[str, Any] = {
        "shape": shape,
        "gpus": gpus,
        "weights_gb": round(sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9, 1),
        "written_in_seconds": round(time.monotonic() - started, 1),
    }
    for mode in modes:
        if bench.left < SHORTEST:
            out[mode] = {"message": "left out: there was no time"}
        else:
            out[mode] = told(bench.measure(model, mode, range(gpus), "--documents", str(documents)))
        print(f"{shape}, {mode}: {json.dumps(out[mode])[:300]}", file=sys.stderr, flush=True)
    return out


def suitable(gpus: int) -> str:
    """Return the largest shape whose weights take less than half of the memory of the GPUs together."""
    import torch

    memory = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus))
    sizes = {"70b": 137e9, "32b": 62e9, "8b": 14.5e9}
    return next((shape for shape, size in sizes.items() if 2 * size < memory), "8b")


def main() -> None:
    """Run everything, and print the JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "none"], help="the large model (default: by the GPUs' memory)")
    parser.add_argument("--modes", default=",".join(MODES), help="modes of the large model, in order")
    parser.add_argument("--documents", type=int, default=12, help="documents of core for the large model")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--work", type=Path, help="folder for weights (default: /dev/shm where it is large, or TMPDIR)")
    chosen = parser.parse_args()
    started = time.monotonic()
    import torch
    import transformers

    gpus = torch.cuda.device_count()
    counts = [count for count in (2, 4) if count <= gpus]
    shape = chosen.shape or suitable(gpus)
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 200e9
    place = chosen.work or (shared if roomy else Path(tempfile.gettempdir()))
    out: dict[str, Any] = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in range(gpus)],
    }
    with tempfile.TemporaryDirectory(dir=place) as folder:
        bench = Bench(Path(folder), started + 60 * chosen.minutes)
        out["tiny"] = tiny_runs(bench, counts or [2], 16)
        print(f"tiny: {json.dumps(out['tiny'])}", file=sys.stderr, flush=True)
        if shape != "none" and counts:
            out["large"] = large_runs(bench, shape, counts[-1], chosen.documents, chosen.modes.split(","))
    out["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
