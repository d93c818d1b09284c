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
from stellar_plugin.provenance import STARTED_FROM, WEIGHTS_SHA256, inherited_license

if TYPE_CHECKING:
    from stellar_plugin.model import Stellar

CARD_NAME = "README.md"
# By it a card that may be written anew is told from a user's own text.
MARK = "<!-- written by stellar-plugin -->"
REPLACED = (MARK, "[PytorchModelHubMixin]")
PAPER = "https://arxiv.org/abs/2602.01905"
# The hub's names of licences.
LICENSES = {
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "GPL-3.0": "gpl-3.0",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
}
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
    provenance = model.provenance
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
    inherited, _ = inherited_license(provenance)
    name = license or (LICENSES.get(inherited, "other") if inherited else UNKNOWN)
    more: dict[str, Any] = {}
    if name == "other" and inherited:
        link = re.search(r"https?://\S+", inherited)
        more["license_name"] = re.sub(r",?\s*https?://\S+", "", inherited)
        more["license_link"] = link[0] if link else None
    data = HUB_DATA.match(str(provenance.get("data", {}).get("path", "")))
    scores = [
        EvalResult(
            task_type="image-feature-extraction",
            task_name=f"{result['task']}, protocol {result['protocol'].get('name')}",
            dataset_type=re.sub(r"[^\w.-]+", "-", str(result["data"])),
            dataset_name=str(result["data"]),
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
    at_hub = HUB_NAME.match(name) and not is_path(name) and not Path(name).exists()
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
        "steps": f"{provenance['step']} of {provenance['total_steps']}",
        "images seen": provenance.get("images_seen"),
        "images per step": provenance.get("global_batch"),
        "time": f"{provenance.get('seconds', 0) / 3600:.2f} h",
        "device": f"{provenance.get('device')}, {provenance.get('precision')}",
        "versions": ", ".join(
            f"{k} {v}" for k, v in provenance.get("versions", {}).items()
        ),
        "revision of the code": provenance.get("revision") or "not known",
        "weights": f"sha256 {provenance.get(WEIGHTS_SHA256, 'not known')}",
    }
    commands = "\n".join(provenance["commands"])
    text += f"{_table(rows)}\n\n```bash\n{commands}\n```"
    text += _start(provenance)
    for title, name in (
        ("What followed from images, machine and prior", "derived"),
        ("All settings of the method", "settings"),
    ):
        if told := provenance.get(name):
            lines = json.dumps(told, indent=1, default=str)
            text += (
                f"\n\n<details><summary>{title}</summary>\n\n```json\n{lines}\n```\n"
            )
            text += "\n</details>"
    return text


def _start(provenance: Mapping[str, Any]) -> str:
    """What the weights were before, back to the first."""
    started = provenance.get(STARTED_FROM)
    if not started:
        known = "commands" in provenance
        return "\n\nIt started from random weights." if known else ""
    text = f"\n\nIt started from `{started['source']}`, read as {started['read_as']}"
    before = started.get("provenance", {})
    if "commands" in before:
        text += f", which was trained on {_images(before.get('data') or {})} by\n\n"
        text += "```bash\n" + "\n".join(before["commands"]) + "\n```"
    else:
        text += "; how those were trained is not recorded here."
    return text + _start(before)


def _images(data: Mapping[str, Any]) -> str:
    if not data:
        return "not recorded"
    # The rest of a path is of the machine.
    name = str(data["path"])
    name = name if HUB_DATA.match(name) else Path(name).name
    digest = data.get("digest")
    names = f"; names and sizes: sha256 {digest[:16]}" if digest else ""
    return f"{data['images']} images of `{name}`{names}"


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
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is no stored result: {error!r}.") from error
        if same and of.get("sha256"):
            found.append(result)
    return found


def _numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in result["scores"].items():
        if isinstance(value, (int, float)) and not name.startswith("num_"):
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
            levels = [result.get(of, {}).get(name) for of in ("untrained", "chance")]
            beside = ["not told" if v is None else f"{v:.4g}" for v in levels]
            cells = [result["task"], result["data"], name, f"{value:.4g}", *beside]
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        title = f"Protocol of {result['task']} on {result['data']}"
        command = result["provenance"].get("command", "not recorded")
        protocols.append(
            f"<details><summary>{title}</summary>\n\n{_table(result['protocol'])}\n\n"
            f"`{command}`\n\n</details>"
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
        text += (
            f" They started from {of}, published under {inherited}: its terms apply."
        )
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
