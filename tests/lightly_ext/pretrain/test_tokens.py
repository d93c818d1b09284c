from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightly_ext.pretrain import StellarPretraining
from lightly_ext.transforms import STELLARViews
from stellar_plugin import Stellar
from tests.pretraining import TINY, loader, tiny, trainer
from tests.tokenizer_weights import reference_tokenizer

TOKENS = {**TINY["model"], "target": "tokens", "num_codes": 64}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.bin"
    torch.save(dict(reference_tokenizer().state_dict()), path)
    return str(path)


def views_and_keep() -> tuple[STELLARViews, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = STELLARViews(
        torch.randn(2, 3, 32, 32, generator=generator),
        torch.randn(2, 2, 3, 32, 32, generator=generator),
        None,
        torch.rand(2, 3, 32, 32, generator=generator),
    )
    return views, torch.arange(8).expand(2, 2, 8)


class TestTokenTarget:
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_fit__every_trainable_parameter_has_gradient(
        self, precision: Any, tokenizer: str, tmp_path: Path
    ) -> None:
        module = tiny(model=TOKENS, tokenizer=tokenizer)
        trainer(tmp_path, max_steps=1, precision=precision).fit(module, loader())
        missing = [
            n
            for n, p in module.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
        ]
        assert missing == []
        frozen = dict(module.model.tokenizer.named_parameters())
        assert not any(p.requires_grad for p in frozen.values())
        for name, expected in reference_tokenizer().state_dict().items():
            assert frozen[name].equal(expected), name

    def test_loss_terms__codes_of_the_uncoloured_target_view(
        self, tokenizer: str
    ) -> None:
        module = tiny(model=TOKENS, tokenizer=tokenizer).eval()
        views, keep = views_and_keep()
        with torch.no_grad():
            terms, *_ = module.loss_terms(views, keep)
            result = module.model(views.target)
            logits = module.model.predict_codes(result.lowrank, result.grid_size)
        # 4 x 4 patches of 8 px, so 64 px for codes of 16 px.
        raw = torch.nn.functional.interpolate(
            views.images, size=(64, 64), mode="bicubic"
        )
        codes = reference_tokenizer().encode(raw).flatten(1)
        expected = -logits.log_softmax(-1).gather(-1, codes[..., None]).mean()
        torch.testing.assert_close(terms.reconstruction, expected)
        assert module.criterion.weights["reconstruction"] == 0.05

    @pytest.mark.slow
    def test_fit__learns_the_codes(self, tokenizer: str, tmp_path: Path) -> None:
        settings = {"lr": 1e-2, "min_lr": 1e-2, "warmup_fraction": 0.0}
        module = tiny(
            model=TOKENS,
            tokenizer=tokenizer,
            loss={"reconstruction_weight": 1.0},
            **settings,
        )
        losses = []
        watch = module._watch
        module._watch = lambda t, *x: losses.append(t.reconstruction) or watch(t, *x)
        trainer(tmp_path, max_epochs=10).fit(module, loader())
        assert losses[-1] < losses[0] - 0.5

    def test_checkpoint__without_the_tokenizer(
        self, tokenizer: str, tmp_path: Path
    ) -> None:
        module = tiny(model=TOKENS, tokenizer=tokenizer)
        fit = trainer(tmp_path, max_epochs=1)
        fit.fit(module, loader())
        path = tmp_path / "run.ckpt"
        fit.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert not [name for name in saved if "tokenizer" in name]
        loaded = StellarPretraining.load_from_checkpoint(path)
        for name, value in module.state_dict().items():
            assert loaded.state_dict()[name].equal(value), name
        resumed = tiny(model=TOKENS, tokenizer=tokenizer)
        fit = trainer(tmp_path, max_epochs=2)
        fit.fit(resumed, loader(), ckpt_path=path)
        assert fit.global_step == 4

    def test_weights__bring_their_tokenizer(
        self, tokenizer: str, tmp_path: Path
    ) -> None:
        first = tiny(model=TOKENS, tokenizer=tokenizer)
        for parameter in first.model.parameters():
            parameter.data += 0.5  # other weights than the seed makes
        first.model.save_pretrained(tmp_path)
        module = tiny(model=TOKENS, weights=str(tmp_path))
        for name, value in first.model.state_dict().items():
            assert module.model.state_dict()[name].equal(value), name
        assert Stellar.from_pretrained(tmp_path).tokenizer is not None
        # No other file has it, so checkpoints do.
        fit = trainer(tmp_path, max_steps=1)
        fit.fit(module, loader())
        fit.save_checkpoint(tmp_path / "run.ckpt")
        (tmp_path / "model.safetensors").unlink()
        loaded = StellarPretraining.load_from_checkpoint(tmp_path / "run.ckpt")
        for name, value in module.state_dict().items():
            assert loaded.state_dict()[name].equal(value), name

    def test_init__no_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"needs tokenizer.*huggingface\.co/fun"):
            tiny(model=TOKENS)
        with pytest.raises(FileNotFoundError, match=r"no tokenizer file '.*x\.bin'"):
            tiny(model=TOKENS, tokenizer=str(tmp_path / "x.bin"))

    def test_init__without_reconstruction_needs_no_tokenizer(self) -> None:
        module = tiny(model=TOKENS, loss={"reconstruction_weight": 0.0})
        assert module.model.target is None

    def test_init__tokenizer_for_pixels(self, tokenizer: str) -> None:
        with pytest.raises(ValueError, match="needs target='tokens'"):
            tiny(tokenizer=tokenizer)
