"""Train a deep Llama from nothing, keep checkpoints on a log scale, and measure each: how the structure comes about.

    python examples/deep_training_text.py --out text.jsonl.xz --debs debs     # once: the text, from packages
    python examples/deep_training_run.py --text text.jsonl.xz --out deep      # on a GPU of 80 GB, until it is done

36 layers of width 512, 117 million parameters, 3,200 steps of 64 x 512 tokens: 105 million tokens, in bfloat16 with
float32 weights. A leg ends before `--minutes` are over, and the same command goes on from there, to the same losses.
Checkpoints stay in `--work`; records, arrays and the loss curve go to `--out`, in files of at most 15 MiB. Whoever
trains again gets another model: what is measured of this one can be verified, and never be computed again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import lzma
import math
import shutil
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import delta_suite as ds
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FIRST_CHECKPOINT = 4
"""Steps; before it nothing but the warm-up has happened."""
HELD_OUT = 0.005
"""Share of the documents whose loss is told, and on which nothing is trained."""
HELD_OUT_ROWS = 256
TOKENIZER_CHARACTERS = 40_000_000
"""Text that the tokenizer is trained on; more changes it little, and takes minutes."""
WARM_UP = 0.05
"""Share of the steps."""
LAST_RATE = 0.1
"""Of the highest learning rate, at the last step."""
PART_BYTES = 15 * 2**20
"""Bytes of a file that is taken away."""


class Clock:
    """The time that a leg has."""

    def __init__(self, minutes: float) -> None:
        self.start, self.limit = time.monotonic(), 60 * minutes

    @property
    def seconds(self) -> float:
        """Seconds since the leg began."""
        return time.monotonic() - self.start

    def has(self, seconds: float) -> bool:
        """Return True if so many seconds are left."""
        return self.seconds + seconds < self.limit

    def say(self, text: str) -> None:
        """Print a line with the time before it."""
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)


def checkpoint_steps(last: int, first: int = FIRST_CHECKPOINT) -> list[int]:
    """Return step 0, each doubling from the first, and the last.

    >>> checkpoint_steps(3200)
    [0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3200]
    """
    doublings = [first * 2**power for power in range(64) if first * 2**power < last]
    return [0, *doublings, last]


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Return the rate of a step, from 0: a linear warm-up, then half a cosine.

    >>> learning_rate(0, 1000, 1.0), learning_rate(49, 1000, 1.0), round(learning_rate(999, 1000, 1.0), 3)
    (0.02, 1.0, 0.1)
    """
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return highest * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return highest * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def documents_of(path: Path) -> list[str]:
    """Return the texts of a file of `deep_training_text.py`."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def trained_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of the first of these texts, which stand in random order."""
    taken, characters = [], 0
    for text in texts:
        if characters >= TOKENIZER_CHARACTERS:
            break
        taken.append(text)
        characters += len(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(taken, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def prepared(options: argparse.Namespace, clock: Clock) -> tuple[PreTrainedTokenizerFast, Any, Any]:
    """Return the tokenizer, the tokens to train on, and those held out; kept in the folder of the run."""
    folder: Path = options.work / "text"
    if not folder.is_dir():
        texts = documents_of(options.text)
        clock.say(f"{len(texts):,} documents, {sum(map(len, texts)):,} characters")
        tokenizer = trained_tokenizer(texts, options.vocabulary)
        clock.say(f"tokenizer of {len(tokenizer):,} tokens")
        kept = max(1, round(HELD_OUT * len(texts)))
        fresh = fresh_folder(folder)
        tokenizer.save_pretrained(fresh)
        np.save(fresh / "held_out.npy", tokens_of(texts[:kept], tokenizer))
        np.save(fresh / "tokens.npy", tokens_of(texts[kept:], tokenizer))
        fresh.rename(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens, held_out = np.load(folder / "tokens.npy"), np.load(folder / "held_out.npy")
    clock.say(f"{len(tokens):,} distinct tokens to train on, {len(held_out):,} held out")
    return tokenizer, tokens, held_out


def tokens_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the ids of all texts in one array, each behind the token that begins a text."""
    begin, parts = [tokenizer.bos_token_id], []
    for start in range(0, len(texts), 1000):
        for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts[start : start + 1000])):
            parts.append(np.array(begin + encoding.ids, np.uint16))
    return np.concatenate(parts)


def fresh_folder(folder: Path) -> Path:
    """Return an empty folder beside one that is to be, so that no half-written one is ever taken for whole."""
    fresh = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


class Batches:
    """Rows of the text: each once an epoch, in an order that follows from the step, so that a leg can go on."""

    def __init__(self, tokens: Any, batch: int, context: int, device: str) -> None:
        rows = len(tokens) // context
        if rows < batch:
            raise SystemExit(f"the text has {rows} rows of {context} tokens, fewer than a batch: gather more of it.")
        self.ids = torch.from_numpy(tokens[: rows * context].astype(np.int32)).reshape(rows, context).to(device)
        self.batch = batch
        self.orders: dict[int, Any] = {}

    def __call__(self, step: int) -> torch.Tensor:
        """Return the ids of a step, (batch, context)."""
        places = range(step * self.batch, (step + 1) * self.batch)
        rows = [self._order(place // len(self.ids))[place % len(self.ids)] for place in places]
        return self.ids[torch.tensor(rows, device=self.ids.device)].long()

    def _order(self, epoch: int) -> Any:
        if epoch not in self.orders:
            self.orders[epoch] = np.random.default_rng(epoch).permutation(len(self.ids))
        return self.orders[epoch]


class Training:
    """A model, its optimiser, how far it is, and its losses."""

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
        self.options, self.tokenizer = options, tokenizer
        torch.manual_seed(0)
        self.model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=options.hidden,
                intermediate_size=options.hidden * 5 // 2,
                num_hidden_layers=options.layers,
                num_attention_heads=max(1, options.hidden // 64),
                num_key_value_heads=max(1, options.hidden // 64),
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).to(options.device)
        weights = list(self.model.parameters())
        groups = [
            {"params": [one for one in weights if one.ndim > 1], "weight_decay": 0.1},
            {"params": [one for one in weights if one.ndim == 1], "weight_decay": 0.0},
        ]
        on_gpu = options.device.startswith("cuda")
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=on_gpu)
        self.step = 0
        self.losses: list[float] = []
        self.held_out: dict[int, float] = {}
        self.seconds = 0.0
        if self.state.is_file():
            self._resume()
        if options.compile:
            # By layer: one is compiled, and the others use its code.
            torch._dynamo.config.recompile_limit = 2 * options.layers
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
            for layer in self.model.model.layers:
                layer.compile()

    @property
    def state(self) -> Path:
        """The file that a later leg goes on from."""
        return Path(self.options.work) / "state.pt"

    def _resume(self) -> None:
        state = torch.load(self.state, map_location=self.options.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.losses = state["step"], state["losses"]
        self.held_out, self.seconds = state["held_out"], state["seconds"]

    def save_state(self) -> None:
        """Write what a later leg needs, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "held_out": self.held_out,
            "seconds": self.seconds,
        }
        part = self.state.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.state)

    def save_checkpoint(self, held_out: torch.Tensor) -> None:
        """Write the checkpoint of this step as transformers does, with its tokenizer, and take the held-out loss."""
        self.held_out[self.step] = self.loss_of(held_out)
        folder: Path = self.options.work / f"checkpoint-{self.step}"
        fresh = fresh_folder(folder)
        self.model.save_pretrained(fresh)
        self.tokenizer.save_pretrained(fresh)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch, the forward pass in bfloat16."""
        with torch.autocast(ids.device.type, torch.bfloat16):
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

    @torch.no_grad()
    def loss_of(self, rows: torch.Tensor) -> float:
        """Return the mean loss of many rows."""
        parts = [self.loss(part).item() * len(part) for part in rows.split(self.options.batch)]
        return sum(parts) / len(rows)

    def advance(self, ids: torch.Tensor) -> torch.Tensor:
        """Take one step, and return the loss before it."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, self.options.steps, self.options.learning_rate)
        loss = self.loss(ids)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        return loss.detach()


def train(run: Training, batches: Batches, held_out: torch.Tensor, clock: Clock) -> None:
    """Train to the last step, or as long as the leg has time; each leg takes one step at least."""
    steps: int = run.options.steps
    due = set(checkpoint_steps(steps))
    pending: list[torch.Tensor] = []
    before, begun = run.seconds, clock.seconds

    def settle() -> None:
        run.losses += [one.item() for one in pending]
        pending.clear()
        run.seconds = before + clock.seconds - begun
        if run.losses and not math.isfinite(run.losses[-1]):
            raise SystemExit(
                f"the loss is {run.losses[-1]} at step {run.step}: begin again with a lower learning rate."
            )

    if run.step == 0 and not run.state.is_file():
        run.save_checkpoint(held_out)
        run.save_state()
    first = run.step
    while run.step < steps:
        pending.append(run.advance(batches(run.step)))
        told = run.step % 100 == 0 or run.step - first in {1, 10}
        if told or run.step in due or not clock.has(0):
            settle()
        if run.step in due:
            run.save_checkpoint(held_out)
            run.save_state()
        if told or run.step in due:
            speed = (run.step - first) * batches.batch * run.options.context / (clock.seconds - begun)
            clock.say(f"step {run.step}: loss {run.losses[-1]:.3f}, {speed:,.0f} tokens a second")
        if not clock.has(0) and run.step < steps:
            run.save_state()
            clock.say(f"step {run.step} of {steps}: the time of this leg is over")
            return


def measured(options: argparse.Namespace, clock: Clock) -> list[str]:
    """Measure every checkpoint, and the last one's control, as far as there is time; return those that are left."""
    done = [step for step in checkpoint_steps(options.steps) if (options.work / f"checkpoint-{step}").is_dir()]
    names = [str(options.work / f"checkpoint-{step}") for step in done]
    if done and done[-1] == options.steps:
        names.append(f"{names[-1]}@random-weights")
    longest = 0.0
    for place, name in enumerate(names):
        if not clock.has(longest):
            return names[place:]
        begun = clock.seconds
        measurement = ds.measure(
            name, calibration=options.calibration, documents=options.documents, device=options.device, parts="all"
        )
        path = measurement.save(options.work / "results")
        longest = max(longest, clock.seconds - begun)
        clock.say(f"{name}: {path.name}, {clock.seconds - begun:.1f} s")
    return []


def write_curve(run: Training, path: Path) -> None:
    """Write step, tokens, learning rate, loss before the step, and held-out loss where a checkpoint was saved."""
    options, each = run.options, run.options.batch * run.options.context
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", "learning_rate", "loss", "held_out_loss"])
        for step in range(run.step + 1):
            rate = learning_rate(step, options.steps, options.learning_rate) if step < options.steps else ""
            loss = run.losses[step] if step < len(run.losses) else ""
            writer.writerow([step, step * each, rate, loss, run.held_out.get(step, "")])


def describe(run: Training, tokens: int, path: Path) -> None:
    """Write what was trained on what, with what."""
    options = run.options
    on_gpu = options.device.startswith("cuda")
    drawn = run.step * options.batch * options.context
    facts = {
        "architecture": "LlamaForCausalLM",
        "layers": options.layers,
        "hidden": options.hidden,
        "parameters": run.model.num_parameters(),
        "vocabulary": len(run.tokenizer),
        "steps": run.step,
        "of_steps": options.steps,
        "batch": [options.batch, options.context],
        "tokens": drawn,
        "distinct_tokens": tokens,
        "epochs": drawn / tokens,
        "learning_rate": options.learning_rate,
        "training_seconds": run.seconds,
        "checkpoints": run.held_out,
        "text_sha256": hashlib.sha256(options.text.read_bytes()).hexdigest(),
        "hardware": torch.cuda.get_device_name(options.device) if on_gpu else "cpu",
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(options.device) if on_gpu else None,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "delta-suite": ds.__version__,
        },
    }
    path.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def pack(results: Path, out: Path) -> list[Path]:
    """Pack the records and arrays of a results folder into as few tar files as their size allows."""
    for old in out.glob("records-*.tar"):
        old.unlink()
    written: list[Path] = []
    size = PART_BYTES
    tar: tarfile.TarFile | None = None
    for path in sorted(results.glob("runs/*/*")):
        need = path.stat().st_size + 2048
        if tar is None or size + need > PART_BYTES:
            if tar is not None:
                tar.close()
            written.append(out / f"records-{len(written) + 1}.tar")
            tar, size = tarfile.open(written[-1], "w"), 20480  # noqa: SIM115 (closed above, or below)
        tar.add(path, str(path.relative_to(results)))
        size += need
    if tar is not None:
        tar.close()
    return written


def main(words: Sequence[str] | None = None) -> bool:
    """Go on with the run as far as the leg has time; return True where nothing is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="file of deep_training_text.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for records, arrays and the loss curve")
    parser.add_argument("--work", type=Path, default=Path("training/deep"), help="folder for checkpoints")
    parser.add_argument("--minutes", type=float, default=9.0, help="time of this leg")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=16384, help="tokens; fewer than 65,536")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch", type=int, default=64, help="rows of a step")
    parser.add_argument("--context", type=int, default=512, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the highest")
    parser.add_argument("--calibration", default="core")
    parser.add_argument("--documents", type=int, help="of the calibration; by default all")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers: faster after the first minute")
    options = parser.parse_args(words)
    clock = Clock(options.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)

    tokenizer, tokens, kept = prepared(options, clock)
    run = Training(options, tokenizer)
    clock.say(f"{run.model.num_parameters():,} parameters on {options.device}, at step {run.step} of {options.steps}")
    batches = Batches(tokens, options.batch, options.context, options.device)
    rows = min(HELD_OUT_ROWS, len(kept) // options.context)
    held_out = torch.from_numpy(kept[: rows * options.context].astype(np.int64)).reshape(rows, options.context)
    train(run, batches, held_out.to(options.device), clock)
    write_curve(run, options.out / "loss.csv")
    describe(run, len(tokens), options.out / "run.json")
    trained = run.step == options.steps
    del run, batches, held_out
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the measurement plans with the memory that is free
    left = measured(options, clock)
    packed = pack(options.work / "results", options.out)
    clock.say(f"{options.out}: loss.csv, run.json, {', '.join(path.name for path in packed) or 'no records yet'}")
    if not trained or left:
        clock.say(f"not finished: {len(left)} to measure. Run the same command again.")
    return trained and not left


if __name__ == "__main__":
    main()
