"""Measure a model while the Trainer of transformers trains it.

    trainer = Trainer(model, args, processing_class=tokenizer, ..., callbacks=[ds.DeltaCallback(every=500)])

The numbers go through the Trainer's own `log`, and so to every tracker of `report_to`.
"""

from __future__ import annotations

import sys
import weakref
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from delta_suite.errors import OptionError, SuiteError
from delta_suite.monitor import SAVE, DeltaMonitor


class DeltaCallback(DeltaMonitor, TrainerCallback):  # type: ignore[misc,unused-ignore]
    """A DeltaMonitor that the Trainer of transformers calls; it takes the same options.

    Of several processes (DDP) the first one measures, and the others wait for it, at most for the `ddp_timeout` of the
    Trainer. FSDP and DeepSpeed are refused at the start.

    Example:
        >>> DeltaCallback(every="save", documents=17).every
        'save'
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the Trainer's tokenizer, and refuse what cannot be measured."""
        self._begin(**kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do the same where the callback was added later, and begin to time the steps."""
        self._begin(**kwargs)
        self.forget()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if this step is due."""
        self.step_done()
        if isinstance(self.every, int) and state.global_step % self.every == 0:
            self._measure(args, state, control, kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if `every` is "save"."""
        if self.every == SAVE:
            self._measure(args, state, control, kwargs["model"])

    def _begin(self, *, model: Any = None, processing_class: Any = None, **_: Any) -> None:
        """Find the Trainer and the tokenizer. Raises OptionError."""
        trainer = _calling_trainer(self)
        if trainer is None:
            raise OptionError("DeltaCallback is for transformers' Trainer: in another loop use DeltaMonitor.")
        self._trainer = weakref.ref(trainer)  # the Trainer holds the callback
        for kind, used in (("FSDP", trainer.is_fsdp_enabled), ("DeepSpeed", trainer.is_deepspeed_enabled)):
            if used:
                raise OptionError(
                    f"DeltaCallback measures a model that each process holds as a whole, and this one is sharded by "
                    f"{kind}. Leave it out, and measure the saved checkpoints: pytest hypotheses/ --model=CHECKPOINT "
                    f"--baseline=FILE"
                )
        if self.tokenizer is None:
            self.tokenizer = getattr(processing_class, "tokenizer", processing_class)  # a processor has one
        self.require_measurable(model)

    def _measure(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> None:
        """Measure in the first process, log the numbers, and stop in all processes if it says so."""
        reading = error = None
        if state.is_world_process_zero:
            try:
                reading = self.measure(model, state.global_step)
            except Exception as raised:  # the others wait, and must be told first
                error = raised
        stops, failed = _from_first_process((reading is not None and reading.stops, error is not None))
        if error is not None:
            raise error
        if failed:
            raise SuiteError("DeltaCallback: the measurement failed in the first process, which says why.")
        if reading is not None:
            self._log(dict(reading.scalars), control)
        if stops:
            control.should_training_stop = True
            control.should_save |= self.every != SAVE and args.save_strategy != "no"  # nothing trained is lost

    def _log(self, scalars: dict[str, float], control: TrainerControl) -> None:
        """Log numbers through the Trainer, whose own log of this step is still to come where it is due."""
        trainer, due = self._trainer(), control.should_log
        if trainer is not None:
            trainer.log(scalars)
        control.should_log = due


def _calling_trainer(callback: TrainerCallback) -> Any:
    """Return the Trainer that is calling a callback, or None.

    transformers hands callbacks everything but the Trainer, whose `log` alone reaches all trackers: those of
    `report_to` are called before any callback of the user. So it is looked for among the callers.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        handler = getattr(caller, "callback_handler", None)
        if handler is not None and any(each is callback for each in handler.callbacks):
            return caller
        frame = frame.f_back
    return None


def _from_first_process(values: tuple[bool, bool]) -> tuple[bool, bool]:
    """Return the values of the first process in every process; without several, those given."""
    import torch.distributed as group

    if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return values
    shared = [values]
    group.broadcast_object_list(shared, src=0)
    return shared[0]
