"""Where results are kept, and how a run departs from the published protocols."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.fingerprints import Contents
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.identity import run_identity, run_provenance
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.loading import load_untrained
from lightly_ext.evaluate.options import check_positive, check_writable
from lightly_ext.evaluate.result import (
    RESULT_NAME,
    Result,
    is_count,
    is_untrained,
    shown_value,
)
from lightly_ext.evaluate.sizes import described_sizes, image_sizes
from stellar_plugin.protocols import Protocol

# In px; an image of it takes 0.75 GiB.
LARGEST_SIDE = 2**14
# Of more scores a table is printed.
MAX_IN_LINE = 3
P = TypeVar("P", bound=Protocol)
T = TypeVar("T")
Run = TypeVar("Run", bound=Callable[..., Any])


def evaluation(run: Run) -> Run:
    """Makes a function a task: `results` knows all options that it runs with.

    So an option that is new decides on the place of a result, unless a list above says
    what else does.
    """

    @functools.wraps(run)
    def told(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(run).bind(*args, **kwargs)
        bound.arguments["results"] = bound.arguments["results"].of_run(
            run, *args, **kwargs
        )
        return run(*bound.args, **bound.kwargs)

    return cast(Run, told)


class Results:
    """Where results are kept, and how they depart from the published protocols.

    Args:
        devices:
            Where the evaluation runs.
        output:
            Folder for results and cached features.
        resize:
            Length of the shorter side after resizing in px, instead of the model's.
        crop:
            Side of the crop in px, instead of the model's.
        limit:
            Use so many images of each part only, to try things out.
        controls:
            Also evaluate the same architecture with random weights, which an equal run
            has from then on. None does so where nothing is trained.

    Raises:
        ValueError: If an option is impossible, or nothing can be written to `output`.
    """

    def __init__(
        self,
        devices: Devices,
        output: str = "runs/evaluate",
        resize: int | None = None,
        crop: int | None = None,
        limit: int | None = None,
        controls: bool | None = None,
    ) -> None:
        check_positive(resize=resize, crop=crop, limit=limit)
        for name, side in {"resize": resize, "crop": crop}.items():
            if side is not None and side > LARGEST_SIDE:
                raise ValueError(f"{name} is {LARGEST_SIDE} px at most, got {side}.")
        self.devices = devices
        self.output = Path(output)
        check_writable(self.output)
        self.limit = limit
        self.controls = controls
        self._options = {"resize": resize, "crop": crop, "limit": limit}
        self._ahead: dict[str, Any] = {}
        self.contents = Contents(devices, self.cache)
        self._asked: dict[str, Any] | None = None
        self._run: Callable[..., Any] | None = None

    def look_ahead(self, check: Callable[..., Any], asked: dict[str, Any]) -> None:
        """Finds what a task needs before its model is loaded; see `required`.

        Args:
            check:
                As for `required`.
            asked:
                Options that the task will be called with.
        """
        options = _depends_on(check, asked)
        self._ahead[_call(check, options)] = check(self, **options)

    def required(self, check: Callable[..., T]) -> T:
        """What a task needs beside its model; every task begins with it.

        Args:
            check:
                `check_TASK`, beside `run_TASK`: raises if something is missing. Gets
                the options of the run that it has arguments for.

        Returns:
            What it found, now or by `look_ahead`.
        """
        assert self._asked is not None, "a task is decorated with `evaluation`"
        options = _depends_on(check, self._asked)
        call = _call(check, options)
        return self._ahead.pop(call) if call in self._ahead else check(self, **options)

    @property
    def cache(self) -> Path:
        """Folder for what is computed once."""
        return self.output / "cache"

    def protocol(self, model: FrozenModel, protocol: P, **fields: Any) -> P:
        """A protocol as the model and the options of this run change it.

        Images have the size that the model was made for, where it has one. Those of the
        protocol's own `crop` are cut as the protocol says, so that they share a column
        with published numbers; of others timm's `crop_pct` tells `resize`, and without
        one the shorter side becomes the crop. The options `resize` and `crop` go first.

        Args:
            model:
                What is evaluated.
            protocol:
                The protocol as published.
            fields:
                Other fields of it; None leaves what it says.

        Raises:
            ValueError: If the protocol does not have an option that was given, or the
                sizes do not fit each other or the model.
        """
        given = {k: v for k, v in self._options.items() if v is not None}
        for name in given:
            if not hasattr(protocol, name):
                raise ValueError(
                    f"{protocol.name} has nothing that --{name} could change: leave it "
                    "out."
                )
        sizes = image_sizes(model.origin, protocol, **self.sizes)
        model.check_size(sizes["crop"])
        changes = {**given, **sizes, **fields}
        return protocol.replace(**{k: v for k, v in changes.items() if v is not None})

    @property
    def sizes(self) -> dict[str, int | None]:
        """The options `resize` and `crop`."""
        return {name: self._options[name] for name in ("resize", "crop")}

    def of_run(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Results:
        """The same for a run of a task, with the options that it is called with."""
        bound = inspect.signature(run).bind(*args, **kwargs)
        bound.apply_defaults()
        results = copy.copy(self)
        results._asked = dict(bound.arguments)
        results._run = run
        results.contents = Contents(self.devices, self.cache)
        return results

    def settled(self, **options: Any) -> Results:
        """The same with the values of options whose default depends on the model."""
        assert self._asked is not None, "a task is decorated with `evaluation`"
        results = copy.copy(self)
        results._asked = {**self._asked, **options}
        return results

    def fingerprint(self, *parts: ImageFiles, beside: Any = None) -> str:
        """Fingerprint of images, see `Contents.fingerprint`."""
        return self.contents.fingerprint(*parts, beside=beside)

    def announce(self, model: FrozenModel, protocol: Protocol) -> None:
        """Prints the card of a protocol, before the work."""
        lines = [f"  {k}: {shown_value(v)}" for k, v in protocol.card().items()]
        lines = [f"Protocol, {model.origin.name}:", *lines]
        if hasattr(protocol, "crop"):
            lines.append(described_sizes(model.origin, protocol))
        self.devices.say("\n".join(lines))

    def result(
        self,
        model: FrozenModel,
        task: str,
        data: str,
        protocol: Protocol,
        scores: dict[str, Any],
        inputs: Mapping[str, str],
        chance: Mapping[str, float] | None = None,
        **provenance: Any,
    ) -> Result:
        """Puts scores, card, identity and provenance together.

        Args:
            model:
                What was evaluated.
            task:
                Name of the task.
            data:
                Name of the data set.
            protocol:
                The protocol as it was run.
            scores:
                Numbers by name, fractions in 0 to 1.
            inputs:
                Fingerprints of all data that decides, by what it is for.
            chance:
                What guessing gives, by the names of scores.
            provenance:
                What is special to this run: chosen values, numbers of images.
        """
        return Result(
            task,
            model.origin.name,
            data,
            scores,
            protocol.card(),
            {**provenance, **run_provenance(model, self.devices)},
            self.identity(model, protocol, inputs),
            chance or {},
        )

    def identity(
        self, model: FrozenModel, protocol: Protocol, inputs: Mapping[str, str]
    ) -> dict[str, dict[str, Any]]:
        """What decides on a score beside the card: model, options and inputs.

        Args:
            model:
                As for `result`.
            protocol:
                As for `result`; what it knows is on the card.
            inputs:
                As for `result`.
        """
        assert self._asked is not None, "a task is decorated with `evaluation`"
        options = {**self._options, **self._asked}
        return run_identity(model, self.devices, protocol, options, inputs)

    def folder(self, result: Result) -> Path:
        """Folder of a result: the same for the same run, another for any other."""
        parts = (result.task, _slug(result.data), _slug(result.model), result.digest)
        return self.output / "-".join(parts)

    def save(
        self,
        result: Result,
        control: bool = True,
        curves: Sequence[Sequence[str]] | None = None,
    ) -> Path:
        """Writes a result into its folder, in the first process, and prints it.

        The same architecture with random weights is evaluated, or found again, and
        stands beside the scores.

        Args:
            result:
                The result.
            control:
                Whether random weights have a meaning for it.
            curves:
                What to print of its curves, rows of text, the head first. None makes a
                table of them.

        Returns:
            The folder.
        """
        folder = self.folder(result)
        replaces = (folder / RESULT_NAME).exists()
        self._write(result, folder)  # before its control, which may be interrupted
        if control and result.control is not None:
            result = replace(result, untrained=self._control(result))
            self._write(result, folder)
        note = ", in place of an earlier one of the same run" if replaces else ""
        self._say_scores(result)
        self.devices.say_table(result.curve_rows() if curves is None else curves)
        self.devices.say(f"Stored in {folder}{note}.")
        return folder

    def _say_scores(self, result: Result) -> None:
        """Prints the scores that are numbers: a few in a line, more as a table."""
        plain = [k for k, v in result.scores.items() if not isinstance(v, Mapping)]
        tabled = [name for name in plain if not is_count(name)]
        tabled = tabled if len(tabled) > MAX_IN_LINE else []
        line = [_shown_score(result, name) for name in plain if name not in tabled]
        title = f"{result.task}, {result.model} on {result.data}"
        self.devices.say(": ".join(filter(None, (title, ", ".join(line)))))
        head, *rows = result.plain_rows()
        self.devices.say_table([head, *(row for row in rows if row[0] in tabled)])

    def stored(self) -> Iterator[tuple[Path, Result]]:
        """All results in the output folder that can be read."""
        for path in sorted(self.output.glob(f"*/{RESULT_NAME}")):
            try:
                yield path, Result.load(path)
            except ValueError:
                continue  # `stellar report` names broken files

    def _write(self, result: Result, folder: Path) -> None:
        self.devices.fabric.barrier()  # nobody writes before everybody has looked
        if self.devices.rank == 0:
            result.save(folder)
        self.devices.fabric.barrier()

    def _control(self, result: Result) -> Mapping[str, Any]:
        """Scores of the same run on random weights; none if they are not wanted."""
        found = self._scores_of(result.control)
        if found is not None:
            return found
        trains = "lrs" in result.protocol
        if not self.controls and (trains or self.controls is not None):
            return {}
        self.devices.say("The same architecture, untrained:")
        try:
            self._run_untrained()
        except (ValueError, RuntimeError, OSError) as error:
            self.devices.say(f"Not told of the untrained architecture: {error}")
        return self._scores_of(result.control) or {}

    def _scores_of(self, measurement: str | None) -> Mapping[str, Any] | None:
        """Scores of a stored measurement; another run may store it meanwhile."""

        def find() -> Mapping[str, Any] | None:
            stored = {r.measurement: r.scores for _, r in self.stored()}
            return stored.get(str(measurement))

        return self.devices.of_first(find)

    def _run_untrained(self) -> None:
        """Runs the task as it was called, with random weights of the run's seed."""
        assert self._asked is not None and self._run is not None
        results = copy.copy(self)
        results.controls = False
        model = load_untrained(self._asked["model"], self.devices.seed)
        with torch.random.fork_rng(devices=()):
            self.devices.fabric.seed_everything(self.devices.seed, verbose=False)
            evaluation(self._run)(**{**self._asked, "model": model, "results": results})


def _shown_score(result: Result, name: str) -> str:
    text = f"{name} {shown_value(result.scores[name])}"
    if is_count(name):
        return text
    chance, untrained = result.beside(name)
    if is_untrained(result):
        return f"{text} (chance {chance})"
    return f"{text} (chance {chance}, untrained {untrained})"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_")


def _depends_on(check: Callable[..., Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that a check has arguments for, beside `results`."""
    _, *names = inspect.signature(check).parameters
    return {name: asked[name] for name in names}


def _call(check: Callable[..., Any], options: dict[str, Any]) -> str:
    return repr((check, sorted(options.items())))
