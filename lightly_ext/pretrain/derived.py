"""What `auto` in a recipe becomes: what follows from images, machine and prior."""

from __future__ import annotations

import copy
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightly_ext.data import ImageDataset, ImageFolderDataset, num_cpus
from lightly_ext.data.listing import printable
from lightly_ext.data.reading import MAX_PIXELS, image_size
from lightly_ext.data.streams import StreamDataset, find_source
from lightly_ext.pretrain.recipes import RUN_RECIPE
from stellar_cli.errors import OptionError, did_you_mean
from stellar_plugin.checkpoints import NUMERICS, inherited, read_checkpoint
from stellar_plugin.checkpoints.layouts import STELLAR
from stellar_plugin.checkpoints.timm_models import architecture
from stellar_plugin.vit import SIZES
from stellar_plugin.wording import are, counted

AUTO = "auto"
# Options with an `auto` of their own.
OTHERS = {
    *("trainer.accelerator", "trainer.devices", "trainer.strategy", "model.compile"),
}

# The numbers behind the rules. Those of a CPU are for one core and an afternoon.
MIN_IMAGES = 200
MEASURED_IMAGES = 1000  # fewer were never measured
LOOKED_AT = 200  # images whose size is read
# Patch size by the least side of the images, and the largest view made of it, in px.
PATCHES = {4: (32, 48), 8: (64, 96), 16: (128, 224)}
MIN_TOKENS, MAX_TOKENS = 64, {"cpu": 64, "gpu": 196}
CPU_DEPTH = 4  # blocks, with which ViTs are measured on a CPU
SMALL_FROM = 10_000  # images from which a GPU trains vit_small
QUERIES, MANY_TOKENS, MORE_QUERIES = 8, 128, 16
BLUR_FROM = 128  # px: at 64 a blur of 0.1 to 2 px hides what is there
BATCH = {"cpu": 64, "gpu": 128}
MIN_BATCHES = 4  # of an epoch
# Memory of a step by images, tokens, width and blocks: 130 to 160 bytes are kept for
# the backward pass in bf16. The part of a GPU for it.
BYTES_PER_TOKEN, MEMORY_SHARE = 160, 0.6
# Hidden and output width of the heads, by the largest width of the encoder.
HEADS = {192: (512, 128), 384: (1024, 256), math.inf: (2048, 256)}
MAX_DECODER, DECODER_DEPTH = 512, 2
# Learning rate at 64 images per step, for random weights and priors of `stellar
# pretrain`, and for others, which are not measured.
LR, PUBLIC_LR = 1e-3, 1e-4
# Images seen in a run, by the method; an epoch sees each image once.
IMAGES_SEEN = {
    "stellar": {"cpu": 200_000, "gpu": 2_000_000},
    "mae": {"cpu": 600_000, "gpu": 6_000_000},
}
MIN_EPOCHS, MAX_EPOCHS = 10, 1600
MAX_WORKERS = 16

MODEL, TRANSFORM = "model.model.", "data.transform.init_args."
CROP, PATCH = f"{TRANSFORM}global_crop_size", f"{MODEL}patch_size"
NAME, IMG_SIZE = f"{MODEL}model_name", f"{MODEL}img_size"
BATCH_SIZE, NUM_QUERIES = "data.batch_size", f"{MODEL}num_queries"


class Derived(NamedTuple):
    """A value and what it follows from.

    Attributes:
        value:
            For the option.
        reason:
            In a few words.
    """

    value: Any
    reason: str


class Photos(NamedTuple):
    """What is known of the images.

    Attributes:
        path:
            Their folder, or what else names them.
        number:
            Number of images.
        side:
            Median of the shorter side of those that were looked at, in px.
    """

    path: str
    number: int
    side: int


class Machine(NamedTuple):
    """What trains.

    Attributes:
        kind:
            "cpu" or "gpu".
        cores:
            CPU cores of this machine.
        processes:
            Training processes of all machines.
        local_processes:
            Training processes of this machine.
        memory:
            Bytes of the GPU; 0 without one, and where it is not known.
        precision:
            What it computes fast and safely in.
    """

    kind: str
    cores: int
    processes: int
    local_processes: int
    memory: int
    precision: str


class Prior(NamedTuple):
    """What training starts from.

    Attributes:
        source:
            As given.
        arguments:
            Of the model, as far as the weights fix them.
        head:
            Of the heads, likewise.
        img_size:
            Side of the images that it was made for, in px.
        own:
            Whether `stellar pretrain` has made it.
    """

    source: str
    arguments: dict[str, Any]
    head: dict[str, int]
    img_size: int
    own: bool


@dataclass
class Known:
    """All that rules read.

    Attributes:
        options:
            Values by the full names of options: those given, and those derived so far.
        photos:
            The images.
        machine:
            What trains.
        prior:
            What training starts from, or None for random weights.
    """

    options: dict[str, Any]
    photos: Photos
    machine: Machine
    prior: Prior | None

    @property
    def tokens(self) -> int:
        """Patches of a global view."""
        return int(self.options.get(CROP, 224) // self.options.get(PATCH, 16)) ** 2

    @property
    def width(self) -> int:
        """Width of the encoder."""
        width = self.options.get(f"{MODEL}embed_dim")
        return int(width or _size_of(self.options[NAME])[0])

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        depth = self.options.get(f"{MODEL}depth")
        return int(depth or _size_of(self.options[NAME])[1])

    @property
    def global_batch(self) -> int:
        """Images of all processes in an optimiser step."""
        accumulated = int(self.options.get("trainer.accumulate_grad_batches", 1))
        return int(self.options[BATCH_SIZE] * self.machine.processes * accumulated)


def resolved(
    recipe: Mapping[str, Any],
    parse: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, Derived]]:
    """A recipe with numbers in place of every `auto`.

    A run that goes on keeps those of its folder, whatever images and machine are now.

    Args:
        recipe:
            Options by name, nested.
        parse:
            Adds the options of the command line, which win, to a recipe.

    Returns:
        The recipe, and what became of options that were `auto`, by their full names.

    Raises:
        OptionError: If an option cannot be derived, or contradicts the prior.
        ValueError: If there are too few images, or they are too small.
    """
    names = asked_for(recipe)
    if not names:
        return dict(recipe), {}
    recipe = without(recipe, names)
    given = parse(recipe)
    options = dict(flat(given))
    for name, value in options.items():
        if value == AUTO and name not in OTHERS:
            raise OptionError(
                f"--{shown(name)}: {AUTO} stands in recipes only. Give a value, or "
                "leave the option out."
            )
    names = [name for name in names if name not in options]
    run = Path(options["output"]) / RUN_RECIPE
    derived: dict[str, Derived] = {}
    if run.is_file():
        stored = dict(flat(yaml.safe_load(run.read_text())))
        # A prior had told more of the model than the recipe asks for. The model of
        # another method has other arguments, and is refused where checkpoints are read.
        same = _method(stored) == _method(options)
        values = {
            name: value
            for name, value in stored.items()
            if name in names
            or (same and name.startswith(MODEL) and name not in options)
        }
        rank_zero_only(print)(f"Where the recipe says auto, what '{run}' says stays.")
    else:
        derived = derive(names, options)
        values = {name: value for name, (value, _) in derived.items()}
    return with_values(recipe, values), derived


def table(derived: Mapping[str, Derived]) -> str:
    """What was derived, in columns: option, value, reason."""
    rows = [(shown(name), str(value), why) for name, (value, why) in derived.items()]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"  {a:{first}}  {b:{second}}  {c}" for a, b, c in rows)


def asked_for(recipe: Mapping[str, Any]) -> list[str]:
    """Options whose values shall be derived.

    Args:
        recipe:
            Options by name, nested.

    Returns:
        Their full names.

    Raises:
        OptionError: If nothing is known that another one could follow from.
    """
    names = [name for name, value in flat(recipe) if value == AUTO]
    names = [name for name in names if name not in OTHERS]
    for name in names:
        if name not in RULES:
            raise OptionError(
                f"--{shown(name)} cannot be {AUTO}: nothing tells its value. "
                f"Give one.{did_you_mean(name, RULES)} {AUTO} can stand for "
                f"{', '.join(map(shown, RULES))}."
            )
    return names


def derive(names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Derived]:
    """Values of options, from images, machine, prior and the values of others.

    Args:
        names:
            Full names of the options to derive.
        given:
            All others by their full names.

    Returns:
        Values by the full names of options, those that a prior decides on among them.

    Raises:
        OptionError: If a given value contradicts the prior.
        ValueError: If there are too few images, or they are too small.
    """
    prior, machine = _prior(given), _machine(given)
    return follow(names, Known(dict(given), _photos(given), machine, prior))


def follow(names: Sequence[str], known: Known) -> dict[str, Derived]:
    """Applies the rules, in their order.

    Args:
        names:
            Full names of the options to derive.
        known:
            What they follow from; derived values are added to its options.

    Returns:
        Values by the full names of options.
    """
    derived: dict[str, Derived] = {}
    if known.prior is not None:
        told = {f"{MODEL}{k}": value for k, value in known.prior.arguments.items()}
        derived = {
            name: Derived(value, "of the prior")
            for name, value in told.items()
            if name not in known.options
        }
    known.options |= {name: value for name, (value, _) in derived.items()}
    for name, rule in RULES.items():
        if name in names and name not in derived and (found := rule(known)):
            derived[name] = found
            known.options[name] = found.value
    return derived


def flat(options: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Full names and values of nested options."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def without(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Nested options but those of some full names."""
    return {
        name: without(
            value, [n.partition(".")[2] for n in names if n.split(".")[0] == name]
        )
        if isinstance(value, Mapping)
        else value
        for name, value in options.items()
        if name not in names
    }


def with_values(
    options: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Nested options with other values, by their full names."""
    changed = copy.deepcopy(dict(options))
    for name, value in values.items():
        *groups, last = name.split(".")
        group = changed
        for part in groups:
            group = group.setdefault(part, {})
        group[last] = value
    return changed


def shown(name: str) -> str:
    """Name of an option on the command line."""
    return name.replace(".init_args.", ".")


def _method(options: Mapping[str, Any]) -> str:
    return str(options.get("method", "stellar"))


def _photos(options: Mapping[str, Any]) -> Photos:
    path = os.path.expanduser(options["data.path"])
    limit = options.get("data.max_pixels", MAX_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run says it, and its page
        source = find_source(path)
        images: ImageDataset = (
            StreamDataset(source) if source else ImageFolderDataset(path)
        )
    if len(images) < MIN_IMAGES:
        raise ValueError(
            f"There {are(len(images))} {counted(len(images), 'image')} below "
            f"{printable(path)}: with fewer than {MIN_IMAGES} nothing can be learned "
            "from them alone. Add images, or use public weights as they are: "
            "`stellar evaluate knn --model timm:vit_small_patch16_224.dino`."
        )
    sizes = [image_size(encoded, limit) for encoded in images.spread(LOOKED_AT)]
    sides = [min(size) for size in sizes if size is not None]
    if not sides:
        raise ValueError(
            f"None of {counted(len(sizes), 'image')} below {printable(path)} can be "
            "read: is the folder complete?"
        )
    side = int(statistics.median(sides))
    least = min(least for least, _ in PATCHES.values())
    if side < least and not options.keys() & {CROP, IMG_SIZE}:
        raise ValueError(
            f"The images below {printable(path)} are too small: their shorter side is "
            f"{side} px in the median, and {least} px are the least that is learned "
            f"from. Use larger images, or name the size that they shall be enlarged to:"
            f" --{shown(CROP)} {least}."
        )
    return Photos(str(path), len(images), side)


def _machine(options: Mapping[str, Any]) -> Machine:
    accelerator = options.get("trainer.accelerator", AUTO)
    devices = options.get("trainer.devices", AUTO)
    gpu = torch.cuda.is_available() and accelerator in (AUTO, "gpu", "cuda")
    kind: Any = CUDAAccelerator if gpu else CPUAccelerator
    count = 1
    try:
        if devices not in (AUTO, -1, "-1"):
            parsed = kind.parse_devices(devices)
            count = parsed if isinstance(parsed, int) else len(parsed)
        elif gpu:
            count = kind.auto_device_count()
    except (MisconfigurationException, TypeError):
        pass  # the trainer says what is wrong
    # 1.4 times as fast on one core of an EPYC; where it is emulated, slower.
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    fast = capabilities.get("avx512_bf16", False)
    memory, precision = 0, "bf16-mixed" if fast else "32-true"
    if gpu:
        # Of all, so that every process comes to the same.
        found = [torch.cuda.get_device_properties(i) for i in range(count)]
        memory = min(device.total_memory for device in found)
        bf16 = all(device.major >= 8 for device in found)
        precision = "bf16-mixed" if bf16 else "16-mixed"
    nodes = options.get("trainer.num_nodes", 1)
    name = "gpu" if gpu else "cpu"
    return Machine(name, num_cpus(), count * nodes, count, memory, precision)


def _prior(options: Mapping[str, Any]) -> Prior | None:
    weights = options.get("model.weights")
    source = weights or options.get("model.prior")
    if source is None:
        return None
    checkpoint = read_checkpoint(source)
    config = inherited(checkpoint, {"num_heads": options.get(f"{MODEL}num_heads")})
    head = {}
    if _method(options) == "mae":
        config.pop("num_queries", None)  # weights that have some are refused by it
    elif weights:
        config |= {
            name: value
            for name, value in checkpoint.config.items()
            if name.startswith("decoder_") or name in ("target", "num_codes")
        }
        for state in checkpoint.heads.values():
            matrices = [w for k, w in state.items() if "layers" in k and w.ndim == 2]
            head = {"hidden_dim": len(matrices[0]), "output_dim": len(matrices[-1])}
    size = config.pop("img_size", 224)
    fixed = {k: v for k, v in config.items() if k not in NUMERICS and v is not None}
    for name, value in fixed.items():
        asked = options.get(f"{MODEL}{name}", value)
        if asked != value and name != "model_name":
            raise OptionError(
                f"--{MODEL}{name} {asked} contradicts '{source}', whose {name} is "
                f"{value}: leave the option out, or start from other weights."
            )
    folder = Path(source).parent
    own = checkpoint.layout == STELLAR and (
        not checkpoint.num_queries  # wherever it lies: nothing else writes these
        or any((run / RUN_RECIPE).is_file() for run in (folder, folder.parent))
    )
    side = size if isinstance(size, int) else min(size)
    return Prior(str(source), fixed, head, side, own)


def _size_of(name: str) -> tuple[int, int]:
    """Width and number of blocks of a model by name."""
    for size in SIZES:
        if name in (size.name, f"stellar_{size.name}"):
            return size.embed_dim, size.depth
    vit: Any = architecture(name)
    return vit.embed_dim, len(vit.blocks)


def _model_name(known: Known) -> Derived:
    images = known.photos.number
    if known.machine.kind == "cpu":
        return Derived("stellar_vit_tiny_patch16_224", "the smallest, for a CPU")
    if images < SMALL_FROM:
        reason = f"fewer than {SMALL_FROM} images"
        return Derived("stellar_vit_tiny_patch16_224", reason)
    return Derived("stellar_vit_small_patch16_224", f"{SMALL_FROM} images or more")


def _depth(known: Known) -> Derived:
    width, depth = _size_of(known.options[NAME])
    if known.machine.kind == "cpu" and width == SIZES[0].embed_dim:
        return Derived(CPU_DEPTH, f"of {depth} blocks, for a CPU")
    return Derived(depth, "the model's")


def _patch_size(known: Known) -> Derived:
    side = known.options.get(CROP) or known.options.get(IMG_SIZE) or known.photos.side
    fitting = [patch for patch, (least, _) in PATCHES.items() if side >= least]
    patch = max(fitting, default=min(PATCHES))
    return Derived(patch, f"for images of {side} px")


def _crop_size(known: Known) -> Derived:
    given, prior = known.options.get(IMG_SIZE), known.prior
    side, patch = known.photos.side, known.options[PATCH]
    if given is not None:
        return Derived(given, "the model's img_size")
    if prior is not None and prior.own and prior.img_size <= side:
        return Derived(prior.img_size, "the prior's")
    most = patch * math.isqrt(MAX_TOKENS[known.machine.kind])
    least = patch * math.isqrt(MIN_TOKENS)
    if patch in PATCHES and prior is None:
        most, least = min(most, PATCHES[patch][1]), patch
    fitting = side // patch * patch
    size = max(least, min(fitting, most))
    reason = f"of images of {side} px"
    if size > side:
        reason += f", enlarged for {MIN_TOKENS} tokens"
    elif size < fitting:
        reason += f", {(size // patch) ** 2} tokens at most"
    return Derived(size, reason)


def _img_size(known: Known) -> Derived:
    return Derived(known.options[CROP], "the size of global views")


def _num_queries(known: Known) -> Derived:
    number = QUERIES if known.tokens < MANY_TOKENS else MORE_QUERIES
    return Derived(number, f"for {known.tokens} patches")


def _weight_init(known: Known) -> Derived | None:
    if known.prior is not None:
        return None
    return Derived("jax", "Xavier, as of MAE: a small width learns faster")


def _decoder_dim(known: Known) -> Derived:
    return Derived(min(known.width, MAX_DECODER), "as the encoder, 512 at most")


def _decoder_depth(known: Known) -> Derived:
    return Derived(DECODER_DEPTH, "as measured, and cheap")


def _decoder_heads(known: Known) -> Derived:
    width = known.options.get(f"{MODEL}decoder_dim", 512)
    return Derived(math.gcd(width, max(1, width // 64)), "64 of the width for each")


def _local_crop_size(known: Known) -> Derived:
    patch = known.options.get(PATCH, 16)
    size = max(patch, known.options.get(CROP, 224) // 2 // patch * patch)
    return Derived(size, "half of a global view")


def _blur(known: Known) -> Derived:
    if known.options.get(CROP, 224) < BLUR_FROM:
        return Derived(0.0, f"none below {BLUR_FROM} px")
    return Derived(0.5, f"as published, from {BLUR_FROM} px on")


def _batch_size(known: Known) -> Derived:
    machine, images = known.machine, known.photos.number
    batch = BATCH[machine.kind]
    reason = f"{batch} on a {machine.kind.upper()}"
    fits = batch
    while fits > machine.processes and fits * MIN_BATCHES > images:
        fits //= 2
        reason = f"{MIN_BATCHES} steps of {images} images in an epoch"
    each = BYTES_PER_TOKEN * known.tokens * known.width * known.depth
    room = MEMORY_SHARE * machine.memory
    while (
        machine.memory
        and fits > machine.processes
        and _share(fits, machine) * each > room
    ):
        fits //= 2
        reason = f"what {machine.memory / 2**30:.0f} GiB of a GPU hold"
    if machine.processes > 1:
        reason = f"{fits} shared by {machine.processes} processes: {reason}"
    return Derived(_share(fits, machine), reason)


def _share(batch: int, machine: Machine) -> int:
    return max(1, batch // machine.processes)


def _hidden_dim(known: Known) -> Derived:
    return _head(known, "hidden_dim", 0)


def _output_dim(known: Known) -> Derived:
    return _head(known, "output_dim", 1)


def _head(known: Known, name: str, which: int) -> Derived:
    sizes = next(sizes for width, sizes in HEADS.items() if known.width <= width)
    value = Derived(sizes[which], f"for a width of {known.width}")
    return _of_heads(known, name) or value


def _of_heads(known: Known, name: str) -> Derived | None:
    head = known.prior.head if known.prior else {}
    return Derived(head[name], "of the weights") if name in head else None


def _lr(known: Known) -> Derived:
    batch, prior = known.global_batch, known.prior
    public = prior is not None and not prior.own
    at_64 = PUBLIC_LR if public else LR
    reason = f"{at_64:g} x sqrt({batch} images / 64)"
    if public:
        reason += "; with a public prior not measured"
    return Derived(float(f"{at_64 * math.sqrt(batch / 64):.3g}"), reason)


def _max_epochs(known: Known) -> Derived:
    images = known.photos.number
    seen = IMAGES_SEEN[_method(known.options)][known.machine.kind]
    epochs = max(MIN_EPOCHS, min(round(seen / images), MAX_EPOCHS))
    reason = f"{epochs * images} images seen, {images} in an epoch"
    if images < MEASURED_IMAGES:
        reason += f"; so few (below {MEASURED_IMAGES}) are not measured"
    return Derived(epochs, reason)


def _precision(known: Known) -> Derived:
    machine = known.machine
    exact = machine.precision == "32-true"
    reason = "has no fast half precision" if exact else "is faster by it"
    return Derived(machine.precision, f"this {machine.kind.upper()} {reason}")


def _num_workers(known: Known) -> Derived:
    machine = known.machine
    cores = machine.cores // machine.local_processes
    reason = f"{machine.cores} CPU cores"
    if machine.kind == "gpu":
        return Derived(min(max(1, cores), MAX_WORKERS), reason)
    # Views of an image take a fiftieth of a step.
    return Derived(0 if cores < 2 else max(1, cores // 4), f"{reason}, which train too")


# In this order: later ones follow from earlier ones.
RULES: dict[str, Callable[[Known], Derived | None]] = {
    NAME: _model_name,
    f"{MODEL}depth": _depth,
    PATCH: _patch_size,
    CROP: _crop_size,
    IMG_SIZE: _img_size,
    f"{MODEL}weight_init": _weight_init,
    NUM_QUERIES: _num_queries,
    f"{MODEL}decoder_dim": _decoder_dim,
    f"{MODEL}decoder_depth": _decoder_depth,
    f"{MODEL}decoder_num_heads": _decoder_heads,
    f"{TRANSFORM}local_crop_size": _local_crop_size,
    "model.augment.gaussian_blur": _blur,
    BATCH_SIZE: _batch_size,
    "model.head.hidden_dim": _hidden_dim,
    "model.head.output_dim": _output_dim,
    "model.lr": _lr,
    "trainer.max_epochs": _max_epochs,
    "trainer.precision": _precision,
    "data.num_workers": _num_workers,
}
