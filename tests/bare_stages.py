"""What each extra promises, run where nothing else can be imported.

`python -S bare_stages.py FOLDER`: FOLDER holds a folder of modules for each extra, and
the current one is written to. An extra runs in a copy of the process of the extra that
it stands on, so that torch is imported once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

MODEL = "model"


def core() -> None:
    import numpy as np
    from PIL import Image

    from stellar_plugin import Stellar
    from stellar_plugin.visualize import overlay_tokens

    draw = np.random.default_rng(0).integers
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = Path("photos", split, name)
            folder.mkdir(parents=True)
            for i in range(12):
                photo = draw(256, size=(36, 32, 3), dtype=np.uint8)
                Image.fromarray(photo).save(folder / f"{i}.jpg")
    model = Stellar(
        "stellar_vit_tiny_patch16_224",
        **{"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1},
        **{"num_heads": 2, "num_queries": 3},
        **{"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    )
    model.save_pretrained(MODEL)
    model = Stellar.from_pretrained(MODEL)
    photo = Image.open("photos/train/a/0.jpg")
    images = model.transform()(photo).unsqueeze(0)
    assert overlay_tokens(model, images).dtype == np.uint8
    stellar("convert", MODEL, "model.safetensors", "--to", "timm")
    for command, extra in {
        "pretrain --config photos": "pretrain",
        "evaluate knn": "eval",
        "visualize": "eval",
        "index": "search",
        "search": "search",
        "export": "search",
        "demo": "demo",
        f"convert {MODEL} m.onnx --to onnx": "export",
    }.items():
        copied(lambda c=command, e=extra: refused(c, e))


def refused(command: str, extra: str) -> None:
    try:
        stellar(*command.split())
    except (SystemExit, ImportError) as error:
        assert f"stellar-plugin[{extra}]" in str(error), f"{command}: {error}"
    else:
        raise AssertionError(f"{command} runs without [{extra}]")


def pretrain() -> None:
    shape = ["img_size=32", "patch_size=16", "embed_dim=24", "depth=1", "num_heads=2"]
    shape += ["decoder_dim=16", "decoder_depth=1", "decoder_num_heads=2"]
    stellar(
        *("pretrain", "--config=digit_boards", "--data.path=photos/train"),
        *("--trainer.max_steps=1", "--data.batch_size=2", "--data.num_workers=0"),
        *("--trainer.accelerator=cpu", "--model.augment={gaussian_blur: 0.0}"),
        *("--data.transform.init_args.global_crop_size=32",),
        *("--data.transform.init_args.local_crop_size=16",),
        *(f"--model.model.{option}" for option in shape),
    )
    assert Path("runs/pretrain/model").is_dir()


def evaluate() -> None:
    where = ("--model", MODEL, "--accelerator", "cpu", "--output", "runs/evaluate")
    stellar("evaluate", "knn", *where, "--data", "photos")
    stellar("visualize", *where, "--data", "photos/val", "--limit", "2")
    for module in ("classification.linear", "reconstruction.reconstruction"):
        __import__(f"lightly_ext.evaluate.{module}")
    copied(lambda: refused("evaluate align-text", "text"))
    index = f"index --model {MODEL} --data photos/train --output index"
    copied(lambda: refused(index, "search"))


def search() -> None:
    options = ("--model", MODEL, "--accelerator", "cpu", "--data", "photos/train")
    stellar("index", *options, "--output", "index")
    said = stellar("search", "index", "photos/train/a/0.jpg")
    assert "a/0.jpg" in said, said
    stellar("export", "index", "--output", "tokens.parquet")


def mmseg() -> None:
    import torch
    from mmseg.registry import MODELS

    import stellar_plugin.mmseg  # noqa: F401

    backbone = MODELS.build(
        {"type": "StellarViT", "model_name": "stellar_vit_tiny_patch16_224", "depth": 1}
    )
    (features,) = backbone(torch.zeros(1, 3, 32, 48))
    assert features.shape == (1, 192, 2, 3)
    assert "stellar_ade20k" in stellar("configs")


def export() -> None:
    import onnxruntime

    stellar("convert", MODEL, "model.onnx", "--to", "onnx")
    assert onnxruntime.InferenceSession("model.onnx").get_inputs()


def stream() -> None:
    import datasets  # noqa: F401
    import pyarrow
    from pyarrow import parquet

    from lightly_ext.data.streams import StreamDataset, find_source

    paths = sorted(Path("photos/train").rglob("*.jpg"))
    photos = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    parquet.write_table(pyarrow.table({"image": photos}), "photos.parquet")
    assert len(StreamDataset(find_source(Path("photos.parquet")))) == 24


def jpeg() -> None:
    from lightly_ext.data import jpeg_decoder

    jpeg_decoder.cache_clear()
    assert "torchcodec" in str(jpeg_decoder())


def text() -> None:
    import open_clip

    import lightly_ext.evaluate.text.align_text  # noqa: F401

    assert open_clip.list_models()


def server() -> None:
    from qdrant_client import QdrantClient

    import lightly_ext.search.server_index  # noqa: F401

    assert QdrantClient(":memory:").get_collections().collections == []


def transformers() -> None:
    from transformers import AutoConfig, AutoModel  # noqa: F401


def docs() -> None:
    for module in ("furo", "myst_nb", "sphinx_copybutton", "sphinx_design"):
        __import__(module)
    from sphinx.cmd.build import main

    Path("guide").mkdir()
    Path("guide/index.md").write_text("# Guide\n")
    options = ["-q", "-C", "-D", "extensions=myst_nb,sphinx_design,sphinx_copybutton"]
    assert main([*options, "-D", "html_theme=furo", "guide", "site"]) == 0


def demo() -> None:
    import lightly_ext.demo.boards
    import lightly_ext.demo.run  # noqa: F401

    try:
        stellar("demo", "--help")
    except SystemExit as ended:
        assert ended.code == 0


# Extra, what it runs, and the extra whose process it goes on from.
STAGES: dict[str, tuple[Callable[[], None], str | None]] = {
    "core": (core, None),
    "mmseg": (mmseg, "core"),
    "export": (export, "core"),
    "transformers": (transformers, "core"),
    "docs": (docs, "core"),
    "pretrain": (pretrain, "core"),
    "stream": (stream, "pretrain"),
    "jpeg": (jpeg, "pretrain"),
    "demo": (demo, "pretrain"),
    "eval": (evaluate, "pretrain"),
    "text": (text, "eval"),
    "search": (search, "eval"),
    "server": (server, "eval"),
}


def stellar(*arguments: str) -> str:
    from stellar_cli.__main__ import main

    with redirect_stdout(StringIO()) as said:
        main([*arguments, "--debug"])
    return said.getvalue()


def copied(run: Callable[[], None]) -> bool:
    """Runs in a copy of this process; whether it went well."""
    process = os.fork()
    if process == 0:
        FAILED.clear()  # of the others
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    went_well = os.waitpid(process, 0)[1] == 0
    if not went_well:
        FAILED.append("a copy")
    return went_well


def run_stage(name: str) -> None:
    sys.path.append(str(Path(sys.argv[1], name)))
    STAGES[name][0]()
    print(f"{name}: {', '.join(FAILED) or 'runs'}", file=sys.stderr)
    for follower, (_, parent) in STAGES.items():
        if parent == name and not copied(lambda f=follower: run_stage(f)):
            print(f"{follower} failed", file=sys.stderr)
    if FAILED:
        raise SystemExit(1)


FAILED: list[str] = []
if __name__ == "__main__":
    run_stage("core")
