"""The callback that writes what a run was, is and shows into its folder."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import platform
import shlex
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule
from torch import Tensor

from lightly_ext.durable import replace_text
from lightly_ext.pretrain.derived import Derived, shown
from lightly_ext.pretrain.next_steps import next_steps
from lightly_ext.pretrain.processes import gathered
from lightly_ext.pretrain.provenance import (
    device_name,
    fingerprint,
    git_revision,
    versions,
)
from lightly_ext.pretrain.resume import changes
from lightly_ext.pretrain.run_log import read_log
from lightly_ext.pretrain.run_page import run_page, run_summary
from lightly_ext.pretrain.samples import (
    draw_samples,
    moments,
    sample_images,
    save_picture,
)
from lightly_ext.pretrain.signals import Interrupted

RECORD = "run.json"
# Writing takes at most one part in so many of the time.
THRIFT = 50
# Seconds that the end waits for the images to be counted.
PATIENCE = 10.0
# Categories of Lightning's advice on settings, and of what only programmers can mend.
NO_EVENTS = ("PossibleUserWarning", "DeprecationWarning", "FutureWarning")
# A run that warns all the time has no story of warnings alone.
MAX_WARNINGS = 50


class RunStory(Callback):
    """Tells the story of a run: `run.json`, `summary.md` and `index.html`.

    A context around the run, in which warnings become events, and a callback of the
    trainer in it. It writes when training starts, after checkpoints, at the ends of
    epochs and of the run, each file as a whole. A failure to write is reported and ends
    nothing.

    Attributes:
        output:
            Folder of the run.
        command:
            Arguments of `stellar pretrain`.
        derived:
            Value and reason of options that were derived, by their full names.
    """

    def __init__(
        self,
        output: str | Path,
        command: Sequence[str],
        derived: Mapping[str, Derived] | None = None,
    ) -> None:
        self.output = Path(output)
        self.command = shlex.join(["stellar", "pretrain", *command])
        self.record: dict[str, Any] = {"sessions": [], "events": [], "samples": {}}
        self.record["derived"] = {
            shown(name): f"{value}: {reason}"
            for name, (value, reason) in (derived or {}).items()
        }
        self._images = 0  # seen since the first step of the run
        self._seconds = 0.0  # of training before this session
        self._start = 0.0
        self._knn: dict[str, float] = {}
        self._changes = ""
        self._next_write = -math.inf
        self._due = False
        self._moments: list[int] = []
        self._samples: Tensor | None = None
        self._failed = False
        self._step = self._total = -1
        self._trainer: Any = None
        self._fingerprint: list[dict[str, Any]] = []
        self._counting: threading.Thread | None = None
        self._show_warning: Any = None

    def __enter__(self) -> RunStory:
        """Listens to warnings."""
        self._watch_warnings()
        return self

    def __exit__(self, *_: object) -> None:
        """Listens no more."""
        warnings.showwarning = self._show_warning

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned, which listen by themselves."""
        return {**self.__dict__, "_show_warning": None}

    def facts(self, trainer: Any) -> dict[str, Any]:
        """What goes with the weights: commands, images, length, machine, versions."""
        self._note_data()
        session = self.record["sessions"][-1]
        kept = ("global_batch", "device", "precision", "versions", "revision")
        images = trainer.datamodule.train_dataset
        uncounted = {"path": images.location, "images": len(images)}
        return {
            "commands": [told["command"] for told in self.record["sessions"]],
            "data": self.record.get("data", uncounted),
            "step": trainer.global_step,
            "total_steps": self._total,
            "images_seen": self._images,
            "seconds": round(self._time(), 1),
            "derived": self.record["derived"],
            **{name: session[name] for name in kept},
        }

    def state_dict(self) -> dict[str, Any]:
        """What is counted, as of a checkpoint."""
        return {"images": self._images, "seconds": self._time(), "knn": self._knn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self._images, self._seconds = state_dict["images"], state_dict["seconds"]
        self._knn = state_dict["knn"]

    def tell(self, kind: str, text: str) -> None:
        """Adds an event.

        Args:
            kind:
                One word for it, such as "warning".
            text:
                What happened.
        """
        same = [e for e in self.record["events"] if e["kind"] == kind]
        if any(e["text"] == text for e in same) or len(same) >= MAX_WARNINGS:
            return
        step = 0 if self._trainer is None else self._trainer.global_step
        event = {"time": _now(), "step": step, "kind": kind}
        self.record["events"].append({**event, "text": text})

    def on_load_checkpoint(
        self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes what is otherwise than before."""
        self._changes = changes(trainer, checkpoint)

    def on_sanity_check_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Keeps the accuracy of the untrained model, and that of guessing."""
        accuracy = trainer.callback_metrics.get("knn_top1")
        if accuracy is not None:
            labels = trainer.datamodule.knn_datasets[1].labels
            # Whoever guesses best always says the most frequent class.
            guessed = labels.bincount().max() / len(labels)
            self._knn = {"untrained": float(accuracy), "chance": float(guessed)}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins a session, with the samples as the model sees them before it."""
        self._trainer = trainer
        self._total = pl_module.continuation.total_steps(trainer)
        self._start, self._step = time.monotonic(), trainer.global_step
        hosts = dict.fromkeys(gathered(platform.node()))
        if trainer.is_global_zero:
            with self._harmless():
                self._begin(trainer, pl_module, ", ".join(hosts))
        with self._harmless():
            if pl_module.draws_samples:
                self._moments = [m for m in moments(self._total) if m >= self._step]
            self._look(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts, looks at the samples if it is time, and writes after a checkpoint."""
        self._images += len(batch[0]) * trainer.world_size
        if trainer.global_step == self._step:
            return  # gradients are accumulated
        self._step = trainer.global_step
        with self._harmless():
            self._look(trainer, pl_module)
        if self._due and trainer.is_global_zero:
            self._write(trainer)

    def on_save_checkpoint(self, *_: Any) -> None:
        """Writes after the next step, when the checkpoint is there."""
        self._due = True

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Writes after the next step, when what the epoch has logged is there."""
        self._due = True

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Writes what the run has become."""
        complete = trainer.global_step >= self._total
        self._end(trainer, "finished" if complete else "stopped")

    def on_exception(
        self, trainer: Any, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes how it ended, if it had begun."""
        if self.record["sessions"] and self._step >= 0:
            if isinstance(exception, Interrupted):
                self._end(trainer, f"stopped by {exception.signal.name}")
                return
            text = " ".join(f"{type(exception).__name__}: {exception}".split())
            self.tell("failed", text)
            self._end(trainer, "failed")

    def _begin(self, trainer: Any, module: Any, hosts: str) -> None:
        path = self.output / RECORD
        if trainer.ckpt_path is not None and path.is_file():
            early = self.record["events"]
            self.record = json.loads(path.read_text())
            for event in early:
                self.tell(event["kind"], event["text"])
        for session in self.record["sessions"]:
            if session["ended"] is None:
                session["ended"] = "cut off"
        data, strategy = trainer.datamodule, trainer.strategy
        batch = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        self.record["sessions"].append(
            {
                "command": self.command,
                "started": _now(),
                "from_step": self._step,
                "ended": None,
                "versions": versions(),
                "revision": git_revision(Path(__file__).parent),
                "host": hosts,
                "device": f"{trainer.world_size} x {device_name(strategy.root_device)}",
                "precision": str(trainer.precision),
                "global_batch": batch,
            }
        )
        self.record["output"] = str(self.output)
        self.record["method"] = module.METHOD
        self.record["parameters"] = sum(p.numel() for p in module.model.parameters())
        self.record["next"] = next_steps(self.output, data, module.METHOD)
        if trainer.ckpt_path is not None:
            file = Path(trainer.ckpt_path).resolve().name
            self.tell("resumed", f"Goes on behind step {self._step}, from {file}.")
        if self._changes:
            self.tell("changed", f"{self._changes}.")
        if self._show_warning is None:
            self._watch_warnings()
        images, found = data.train_dataset, self._fingerprint
        # Of a million files on a shared disk it takes minutes.
        self._counting = threading.Thread(
            target=lambda: found.append(fingerprint(images)), daemon=True
        )
        self._counting.start()

    def _note_data(self) -> None:
        if self._fingerprint:
            self.record["data"] = self._fingerprint.pop()

    def _watch_warnings(self) -> None:
        show = self._show_warning = warnings.showwarning

        def show_and_tell(message: Any, category: Any, *rest: Any) -> None:
            show(message, category, *rest)
            if category.__name__ not in NO_EVENTS:
                self.tell("warning", " ".join(str(message).split()))

        warnings.showwarning = show_and_tell  # type: ignore[assignment]

    def _look(self, trainer: Any, module: Any) -> None:
        if not self._moments or self._step < self._moments[0]:
            return
        self._moments = [moment for moment in self._moments if moment > self._step]
        data, samples = trainer.datamodule, self.record["samples"]
        if self._samples is None:
            size = data.transform.global_crop_size
            self._samples, samples["images"] = sample_images(data.train_dataset, size)
        # By all processes, of which each may hold a shard of the weights.
        inputs, seen = draw_samples(module, self._samples)
        if not trainer.is_global_zero:
            return
        name = f"samples/step_{self._step:08d}.jpg"
        save_picture(inputs, self.output / "samples" / "images.jpg")
        save_picture(seen, self.output / name)
        moments = {int(k): v for k, v in samples.get("moments", {}).items()}
        kept = {step: file for step, file in moments.items() if step < self._step}
        samples["moments"] = {**kept, self._step: name}
        samples["caption"] = module.CAPTION

    def _end(self, trainer: Any, how: str) -> None:
        if trainer.is_global_zero:
            with self._harmless():
                self.record["sessions"][-1]["ended"] = how
                if self._counting is not None:
                    self._counting.join(PATIENCE)
            self._next_write = -math.inf
            self._write(trainer)

    def _write(self, trainer: Any) -> None:
        self._due = False
        start = time.monotonic()
        if start < self._next_write:
            self._due = True
            return
        with self._harmless():
            self._note_data()
            self._note_progress(trainer)
            log = read_log(self.output / "csv")
            record = json.loads(json.dumps(self.record))
            replace_text(self.output / RECORD, json.dumps(record, indent=1) + "\n")
            replace_text(self.output / "summary.md", run_summary(record, log))
            replace_text(self.output / "index.html", run_page(record, log, self.output))
        self._next_write = time.monotonic() + THRIFT * (time.monotonic() - start)

    def _note_progress(self, trainer: Any) -> None:
        self.record["sessions"][-1]["to_step"] = self._step
        unreadable = trainer.callback_metrics.get("unreadable_images", 0)
        self.record |= {
            "step": self._step,
            "total_steps": self._total,
            "images_seen": self._images,
            "seconds": round(self._time(), 1),
            "knn": self._knn,
            "unreadable_images": int(unreadable),
            "written": _now(),
        }

    def _time(self) -> float:
        started = time.monotonic() - self._start if self._start else 0.0
        return self._seconds + started

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Reports an error, once, in place of ending the training."""
        try:
            yield
        except Exception as error:
            if not self._failed:
                self._failed = True
                warnings.warn(
                    f"The report in {self.output} could not be written: "
                    f"{type(error).__name__}: {error}. Training goes on.",
                    stacklevel=2,
                )


def tell(trainer: Any, kind: str, text: str) -> None:
    """Adds an event to the story of a run, see `RunStory.tell`."""
    for callback in trainer.callbacks:
        if isinstance(callback, RunStory):
            callback.tell(kind, text)


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
