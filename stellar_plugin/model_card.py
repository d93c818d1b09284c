"""The model card: what is recorded of weights, for people and for the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stellar_plugin.checkpoints.files import (
    OFFICIAL_REPO,
    OFFICIAL_VARIANTS,
    TIMM_PREFIX,
    is_path,
)
from stellar_plugin.provenance import (
    STARTED_FROM,
    WEIGHTS_SHA256,
    inherited_license,
    without_home,
)
from stellar_plugin.wording import counted

if TYPE_CHECKING:
    from stellar_plugin.model import Stellar

CARD_NAME = "README.md"
# By it a card that may be written anew is told from a user's own text.
MARK = "<!-- written by stellar-plugin, and written anew unless this line is gone -->"
REPLACED = (MARK, "[PytorchModelHubMixin]")
PAPER = "https://arxiv.org/abs/2602.01905"
# The hub's names of licences.
LICENSES = {
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "GPL-3.0": "gpl-3.0",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
}
LICENSE_ID = re.compile(r"[a-z0-9]+([.-][a-z0-9.]+)*")
UNKNOWN = "unknown"
# How commands name images of the hub.
HUB_DATA = re.compile(r"^hf:([^:]+)")
HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
CITATION = """\
@article{stellar2026,
  title   = {Learning Sparse Visual Representations via Spatial-Semantic Factorization},
  journal = {arXiv preprint arXiv:2602.01905},
  year    = {2026},
  url     = {https://arxiv.org/abs/2602.01905}
}"""


def model_card(
    model: Stellar,
    source: str | None = None,
    license: str | None = None,
    results: str | Path | None = None,
) -> ModelCard:
    """Writes the card of a model; what is not recorded is said to be not known.

    Args:
        model:
            A model whose `provenance` is that of its weights.
        source:
            What the weights are loaded by, for example the name of a hub repository.
        license:
            The hub's name of the licence of the weights. None is that of the weights
            that they started from, "unknown" where there are none.
        results:
            Folder with stored results of `stellar evaluate`; those of these very
            weights are shown.

    Raises:
        FileNotFoundError: If `results` is no folder.
        ValueError: If a stored result is damaged.
    """
    provenance = without_home(model.provenance)
    found = [] if results is None else _results(Path(results), provenance)
    parts = [
        f"---\n{_front_matter(provenance, license, found, source)}\n---\n{MARK}",
        _description(model),
        _usage(source, model.target == "pixels" or model.tokenizer is not None),
        _training(provenance),
        _scores(found),
        _license(provenance, license),
        _limits(model, provenance),
        f"## Citation\n\n```bibtex\n{CITATION}\n```\n\n[Paper]({PAPER}); the code is "
        "the package `stellar-plugin` (MIT).",
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def _front_matter(
    provenance: Mapping[str, Any],
    license: str | None,
    results: Sequence[Mapping[str, Any]],
    source: str | None,
) -> str:
    told = license or inherited_license(provenance)[0] or UNKNOWN
    name = LICENSES.get(told, told if LICENSE_ID.fullmatch(told) else "other")
    more: dict[str, Any] = {}
    if name != told and name == "other":
        link = re.search(r"https?://\S+", told)
        more["license_name"] = re.sub(r",?\s*https?://\S+", "", told)
        more["license_link"] = link[0] if link else None
    data = HUB_DATA.match(str(provenance.get("data", {}).get("path", "")))
    scores = [
        EvalResult(
            task_type="image-feature-extraction",
            task_name=" ".join(
                f"{result['task']}, protocol {result['protocol'].get('name')}".split()
            ),
            dataset_type=re.sub(r"[^\w.-]+", "-", str(result["data"])),
            dataset_name=" ".join(str(result["data"]).split()),
            metric_type=score,
            metric_value=value,
        )
        for result in results
        for score, value in _numbers(result)
    ]
    card = ModelCardData(
        library_name="stellar-plugin",
        license=name,
        pipeline_tag="image-feature-extraction",
        tags=["stellar", "self-supervised-learning", "vision-transformer", "timm"],
        base_model=_base_model(provenance),
        datasets=[data[1]] if data else None,
        model_name=(source or "STELLAR") if scores else None,
        eval_results=scores or None,
        **more,
    )
    return card.to_yaml()


def _base_model(provenance: Mapping[str, Any]) -> str | None:
    """What the hub calls the weights that these started from, if they are there."""
    started = provenance.get(STARTED_FROM) or {}
    name = str(started.get("source", ""))
    if name.removeprefix("stellar-") in OFFICIAL_VARIANTS:
        return OFFICIAL_REPO
    if name.startswith(TIMM_PREFIX):
        return f"timm/{name.removeprefix(TIMM_PREFIX)}"
    at_hub = HUB_NAME.match(name) and not started.get("is_local", is_path(name))
    return name if at_hub else None


def _description(model: Stellar) -> str:
    encoder, config = model.encoder, model.config
    height, width = encoder.image_size
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    target = {
        "pixels": "to pixels",
        "tokens": f"to {config['num_codes']} codes of a frozen tokenizer",
        None: "none, trained without reconstruction",
    }[model.target]
    rows = {
        "architecture": f"`{config['model_name']}`, {millions:.1f} M parameters",
        "sparse tokens": f"{encoder.num_queries} of width {encoder.embed_dim}",
        "images": f"{height} x {width} px, patches of {encoder.patch_size} px; any "
        "multiple of the patch size",
        "mean, std": f"{list(model.mean)}, {list(model.std)}",
        "decoder": target,
        "projection heads": ", ".join(model.heads) or "none",
    }
    return (
        "# STELLAR\n\nAn image as a few sparse tokens (*what*) and a localization "
        f"matrix (*where*) [[paper]({PAPER})], without labels.\n\n{_table(rows)}"
    )


def _usage(source: str | None, has_decoder: bool) -> str:
    name = source or "PATH"
    where = "" if source else "`PATH` is this folder, or its repository on the hub.\n\n"
    back = "image = model.reconstruct(images)  # in [0, 1]\n" if has_decoder else ""
    return f"""\
## How to load it

{where}`pip install stellar-plugin`

```python
from PIL import Image
from stellar_plugin import Stellar

model = Stellar.from_pretrained("{name}")
images = model.transform()(Image.open("photo.jpg")).unsqueeze(0)
result = model(images)  # result.sparse is what, result.localization where
{back}```

transformers (`pip install 'stellar-plugin[transformers]'`):

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
output = model(**processor(Image.open("photo.jpg")))
```

timm: `stellar convert {name} stellar_timm.safetensors --to timm` writes a file and
prints the call of `timm.create_model` that loads it.

mmsegmentation:

```python
custom_imports = dict(imports=["stellar_plugin.mmseg"])
backbone = dict(
    type="StellarViT", init_cfg=dict(type="Pretrained", checkpoint="{name}")
)
```"""


def _training(provenance: Mapping[str, Any]) -> str:
    text = "## How it was trained\n\n"
    if "commands" not in provenance:
        text += "What was done to these weights is not recorded."
        return text + _start(provenance)
    data = provenance.get("data") or {}
    rows = {
        "method": provenance.get("method"),
        "images": _images(data),
        "steps": _of(provenance.get("step"), provenance.get("total_steps")),
        "images seen": provenance.get("images_seen"),
        "images per step": provenance.get("global_batch"),
        "time": _time(provenance.get("seconds")),
        "device": provenance.get("device"),
        "precision": provenance.get("precision"),
        "versions": ", ".join(
            f"{k} {v}" for k, v in provenance.get("versions", {}).items()
        )
        or None,
        "revision of the code": provenance.get("revision"),
        "weights": f"sha256 {provenance.get(WEIGHTS_SHA256, 'not known')}",
    }
    text += f"{_table(rows)}\n\n{_block('bash', *provenance['commands'])}"
    text += _start(provenance)
    for title, name in (
        ("What followed from images, machine and prior", "derived"),
        ("All settings of the method", "settings"),
    ):
        if told := provenance.get(name):
            lines = json.dumps(told, indent=1, default=str)
            text += f"\n\n<details><summary>{title}</summary>\n\n"
            text += f"{_block('json', lines)}\n\n</details>"
    return text


def _start(provenance: Mapping[str, Any]) -> str:
    """What the weights were before, back to the first."""
    started = provenance.get(STARTED_FROM)
    if not started:
        known = "commands" in provenance
        return "\n\nIt started from random weights." if known else ""
    text = f"\n\nIt started from {_code(started['source'])}, read as "
    text += _cell(started["read_as"])
    before = started.get("provenance", {})
    if "commands" in before:
        text += f", which was trained on {_images(before.get('data') or {})} by\n\n"
        text += _block("bash", *before["commands"])
    else:
        text += "; how those were trained is not recorded here."
    return text + _start(before)


def _images(data: Mapping[str, Any]) -> str:
    if not {"path", "images"} <= data.keys():
        return "not recorded"
    # The rest of a path is of the machine.
    name = str(data["path"])
    name = name if HUB_DATA.match(name) else Path(name).name
    digest = data.get("digest")
    names = f"; names and sizes: sha256 {digest[:16]}" if digest else ""
    return f"{counted(data['images'], 'image')} of {_code(name)}{names}"


def _results(folder: Path, provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Stored results of these very weights."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder of results '{folder}'; it is the --output of `stellar "
            "evaluate`."
        )
    found = []
    for path in sorted(folder.rglob("result.json")):
        try:
            result = json.loads(path.read_text(), parse_constant=lambda _: None)
            of = result["identity"].get("model") or result["provenance"]
            same = of.get("sha256") == provenance.get(WEIGHTS_SHA256)
            _check_shape(result)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is no stored result: {error!r}.") from error
        if same and of.get("sha256"):
            found.append(result)
    return found


def _check_shape(result: Mapping[str, Any]) -> None:
    """Raises a TypeError if a stored result has not what a card shows of it."""
    for name in ("scores", "protocol", "provenance"):
        if not isinstance(result[name], dict):
            raise TypeError(f"{name} is no object")
    for name in ("task", "data"):
        if not isinstance(result[name], str):
            raise TypeError(f"{name} is no text")


def _numbers(
    result: Mapping[str, Any], of: str = "scores"
) -> Iterator[tuple[str, float]]:
    for name, value in (result.get(of) or {}).items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not name.startswith("num_"):
            yield name, value


def _scores(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return (
            "## Scores\n\nNone are stored for these weights: what the features are "
            "good for is not known. `stellar evaluate` measures it."
        )
    lines = ["| task | data | score | value | untrained | chance |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    protocols = []
    for result in results:
        for name, value in _numbers(result):
            levels = [
                dict(_numbers(result, of)).get(name) for of in ("untrained", "chance")
            ]
            beside = ["not told" if v is None else f"{v:.4g}" for v in levels]
            cells = [result["task"], result["data"], name, f"{value:.4g}", *beside]
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        title = _cell(f"Protocol of {result['task']} on {result['data']}")
        command = result["provenance"].get("command", "not recorded")
        protocols.append(
            f"<details><summary>{title}</summary>\n\n{_table(result['protocol'])}\n\n"
            f"{_code(without_home(command))}\n\n</details>"
        )
    text = "Fractions are in 0 to 1; untrained is the same architecture with random "
    text += "weights. A score holds under its protocol alone."
    return "\n\n".join(["## Scores", "\n".join(lines), text, *protocols])


def _license(provenance: Mapping[str, Any], license: str | None) -> str:
    inherited, of = inherited_license(provenance)
    text = "## Licence\n\n"
    if license:
        text += f"Of these weights: {license}, as stated by whoever published them."
    elif inherited:
        text += f"Of these weights: {inherited}, that of the weights they started from."
    else:
        text += "Of these weights: not stated by whoever trained them."
    if inherited:
        text += f" They started from {_cell(of)}, published under {inherited}: its "
        text += "terms apply."
    elif provenance.get(STARTED_FROM):
        text += " The licence of the weights that they started from is not known."
    return text + " The terms of the training images are not recorded. The code is MIT."


def _limits(model: Stellar, provenance: Mapping[str, Any]) -> str:
    images = "What it learned is what its training images show"
    if not provenance.get("data"):
        images += ", and which they were is not recorded"
    patch = model.encoder.patch_size
    return f"""\
## Limits

- {images}; how it treats other images, groups of people and places was not examined.
- Tokens have no names: what each means is found out by looking, or by a labelled probe.
- Places are shares of tokens in patches of {patch} px: no segmentation, nothing finer.
- Reconstructions keep what the tokens hold; they are no compression of the image."""


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: Any) -> str:
    text = "not known" if value is None else str(value)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _code(text: Any) -> str:
    """Text within a line as it is, but for breaks of lines."""
    line = " ".join(str(text).split())
    return f"`` {line} ``" if "`" in line else f"`{line}`"


def _block(language: str, *lines: str) -> str:
    """A block of code that its own lines cannot end."""
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _of(done: Any, total: Any) -> str | None:
    return None if done is None or total is None else f"{done} of {total}"


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
