"""Small files of every layout that is read, and what reading them must give."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightly_ext.modules import STELLARProjectionHead
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain.cli import PretrainCLI, merge_recipes
from stellar_plugin import Stellar, StellarEncoder
from stellar_plugin.checkpoints import (
    create_encoder,
    load_head_weights,
    load_network,
    save_heads,
)
from stellar_plugin.checkpoints.aim import IN_BLOCKS, RENAMED
from stellar_plugin.checkpoints.export import to_official, to_timm
from stellar_plugin.checkpoints.names import to_transformers
from stellar_plugin.checkpoints.recognise import read_checkpoint
from stellar_plugin.networks.beit import BEiT
from stellar_plugin.networks.swin import Swin
from stellar_plugin.tokenizer import MaskGITVQGAN

NAME = "stellar_vit_tiny_patch16_224"
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
HEAD: dict[str, Any] = {"hidden_dim": 8, "output_dim": 6, "num_prototypes": 5}
TOKENIZER: dict[str, Any] = {
    "channels": 32,
    "channel_multipliers": (1, 1),
    "num_blocks": 1,
    "latent_dim": 4,
    "num_codes": 7,
}


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        write: Writes the files into a folder.
        load: Loads what the path names, uses it, and raises AssertionError if what was
            loaded is not what the file holds.
        source: The file that is loaded, "" for the folder.
    """

    write: Callable[[Path], None]
    load: Callable[[Path], None]
    source: str = ""


def _model(**kwargs: Any) -> Stellar:
    torch.manual_seed(0)
    return Stellar(NAME, num_queries=2, **{**DECODER, **VIT, **kwargs}).eval()


def _heads() -> dict[str, nn.Module]:
    names = ("sparse_head", "cls_head")
    return {n: STELLARProjectionHead(VIT["embed_dim"], **HEAD) for n in names}


def _states(modules: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {name: module.state_dict() for name, module in modules.items()}


def _vit(**kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**VIT, **kwargs})
    return dict(vit.state_dict())


def _prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _write_model(folder: Path) -> None:
    _model().save_pretrained(folder)
    save_heads(_states(_heads()), folder)


def _write_tokens(folder: Path) -> None:
    model = _model(target="tokens", num_codes=7, tokenizer=TOKENIZER)
    model.save_pretrained(folder)


def _write_training(folder: Path) -> None:
    arguments = {"model_name": NAME, "num_queries": 2, **DECODER, **VIT}
    module = StellarPretraining(model=arguments, head=HEAD)
    content = {
        "epoch": 3,
        "global_step": 12,
        "state_dict": dict(module.state_dict()),
        "hyper_parameters": {"model": arguments, "head": HEAD, "lr": 1e-4},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4}]}],
    }
    torch.save(content, folder / "last.ckpt")


def _write_official(folder: Path) -> None:
    save_file(to_official(_model(), _states(_heads())), folder / "official.safetensors")
    settings: dict[str, Any] = {"num_attention_heads": 3, "decoder_num_heads": 2}
    settings |= {"layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(settings))


def _write_timm_export(folder: Path) -> None:
    state, metadata = to_timm(_model().encoder)
    save_file(state, folder / "timm.safetensors", metadata)


def _write_timm_config(folder: Path) -> None:
    torch.save(_vit(), folder / "pytorch_model.bin")
    cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    settings = {"architecture": "vit_tiny", "num_heads": 3, "norm_eps": 1e-6}
    settings |= {"activation": "GELU", "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(settings))


def _write_transformers(folder: Path) -> None:
    torch.save(to_transformers(_vit(embed_dim=192)), folder / "vit.pth")


def _write_mae(folder: Path) -> None:
    state = _vit(embed_dim=192)
    state["decoder_pred.weight"] = torch.zeros(3, 4)
    content = {"model": state, "epoch": 1, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, folder / "mae.pth")


def _write_dino(folder: Path) -> None:
    state = _vit(embed_dim=192)
    content = {
        "student": _prefixed(state, "module.backbone."),
        "teacher": _prefixed(state, "backbone."),
        "epoch": 1,
    }
    path = folder / "legacy.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _write_aim(folder: Path) -> None:
    arguments: dict[str, Any] = {
        "class_token": False,
        "global_pool": "",
        "qkv_bias": False,
    }
    arguments |= {"proj_bias": False, "embed_norm_layer": "layernorm"}
    state = _vit(**arguments, embed_dim=128, num_heads=1)
    del state["pos_embed"]
    result = {}
    for name, tensor in state.items():
        for theirs, ours in RENAMED.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        for theirs, ours in IN_BLOCKS.items():
            name = name.replace(ours, theirs)
        result[name] = tensor
    torch.save(result, folder / "aim.pth")


def _write_beit(folder: Path) -> None:
    state = dict(BEiT(32, 8, 24, 2, 3).named.state_dict())
    state |= {
        "lm_head.weight": torch.zeros(24, 24),
        "mask_token": torch.zeros(1, 1, 24),
    }
    content = {"model": state, "epoch": 1, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, folder / "data2vec.pth")


def _write_swin(folder: Path) -> None:
    state = Swin(16, 4, 8, (1, 2), (1, 2)).named.state_dict()
    old = {k.replace("layers.1.down", "layers.0.down"): v for k, v in state.items()}
    content = {**_prefixed(old, "encoder."), "encoder.mask_token": torch.zeros(1, 1, 8)}
    torch.save({"model": content, "epoch": 1}, folder / "simmim.pth")


def _write_tokenizer(folder: Path) -> None:
    torch.save(MaskGITVQGAN(**TOKENIZER).state_dict(), folder / "tokenizer.bin")


def _write_recipe(folder: Path) -> None:
    recipe = {
        "seed_everything": 0,
        "output": "run",
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": "32"},
        "model": {
            "model": {"model_name": NAME, "num_queries": 2, **DECODER, **VIT},
            "head": HEAD,
            "loss": {"gather_distributed": False},
            "augment": {"gaussian_blur": 0.0},
            "mask_ratio": 0.5,
            "lr": 1e-4,
            "teacher_momentum": 0.9,
        },
        "data": {"path": "images", "batch_size": 2, "num_workers": 0},
    }
    (folder / "images").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))


def _check_module(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        assert tensor.device.type == "cpu", f"{name} is on {tensor.device}"
        assert tensor.isfinite().all(), f"{name} is not finite"
        assert tensor.dtype.itemsize in (2, 4, 8), f"{name} is {tensor.dtype}"
    pointers = [p.data_ptr() for p in module.parameters() if p.numel()]
    assert len(pointers) == len(set(pointers)), "parameters share memory"


@torch.no_grad()
def _use(encoder: StellarEncoder) -> Tensor:
    side = 2 * encoder.patch_size
    result = encoder(torch.rand(1, 3, side, side))
    assert result.dense.shape == (1, 4, encoder.embed_dim)
    assert result.sparse.shape == (1, encoder.num_queries, encoder.embed_dim)
    return result.dense


@torch.no_grad()
def _load_model(path: Path) -> None:
    model = Stellar.from_pretrained(path)
    _check_module(model)
    _use(model.encoder)
    if model.decoder is not None and model.tokenizer is not None:
        model.target_codes(torch.rand(1, 3, 32, 32))
    if model.decoder is not None and (model.target == "pixels" or model.tokenizer):
        model.reconstruct(torch.rand(1, 3, *[2 * model.encoder.patch_size] * 2))
    file = path / "model.safetensors"
    if file.is_file():
        stored = load_file(file)
        for name, tensor in model.state_dict().items():
            # A file of another layout may lie there, with other names.
            same = stored.get(name, tensor).to(tensor.dtype)
            assert tensor.equal(same), f"{name} is another"
    load_head_weights(_heads(), read_checkpoint(path))


def _load_encoder(path: Path) -> None:
    encoder = create_encoder(path)
    _check_module(encoder)
    _use(encoder)


@torch.no_grad()
def _load_network(path: Path) -> None:
    network, _ = load_network(path)
    _check_module(network)
    side = 2 * network.stride
    result = network(torch.rand(1, 3, side, side))
    assert result.dense.shape == (1, 4, network.embed_dim)


def _load_tokenizer(path: Path) -> None:
    tokenizer = MaskGITVQGAN.from_pretrained(path)
    _check_module(tokenizer)
    tokenizer.decode(tokenizer.encode(torch.rand(1, 3, 16, 16)))


def _load_recipe(path: Path) -> None:
    cli = PretrainCLI(merge_recipes(["--config", str(path)]))
    cli.build()
    _use(cli.model.model.encoder)


LAYOUTS = {
    "saved model": Layout(_write_model, _load_model),
    "saved model, tokens": Layout(_write_tokens, _load_model),
    "training": Layout(_write_training, _load_model, "last.ckpt"),
    "official": Layout(_write_official, _load_model, "official.safetensors"),
    "timm export": Layout(_write_timm_export, _load_encoder, "timm.safetensors"),
    "timm folder": Layout(_write_timm_config, _load_encoder),
    "transformers": Layout(_write_transformers, _load_encoder, "vit.pth"),
    "MAE": Layout(_write_mae, _load_encoder, "mae.pth"),
    "AIM": Layout(_write_aim, _load_encoder, "aim.pth"),
    "DINO, legacy": Layout(_write_dino, _load_encoder, "legacy.pth"),
    "BEiT": Layout(_write_beit, _load_network, "data2vec.pth"),
    "Swin": Layout(_write_swin, _load_network, "simmim.pth"),
    "tokenizer": Layout(_write_tokenizer, _load_tokenizer, "tokenizer.bin"),
    "recipe": Layout(_write_recipe, _load_recipe, "config.yaml"),
}
