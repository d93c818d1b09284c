from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from stellar_plugin import MaskGITVQGAN, Stellar
from stellar_plugin.checkpoints import load_network, read_checkpoint
from stellar_plugin.networks.titok import TiTok
from tests import titok_loops as loops
from tests.titok_files import B_64, L_32, Sizes, shapes, weights, write_titok
from tests.tokenizer_weights import reference_tokenizer

SIZES = Sizes()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return weights(shapes(SIZES))


@pytest.fixture(scope="module")
def titok(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> TiTok:
    path = tmp_path_factory.mktemp("titok") / "tokenizer_titok_b64.bin"
    torch.save(state, path)
    return _load(path)


@pytest.fixture(scope="module")
def images() -> Tensor:
    images = torch.rand(2, 3, SIZES.side, SIZES.side, generator=_generator())
    return images * torch.tensor([1, 0.1]).view(2, 1, 1, 1)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _load(path: Path, **kwargs: Any) -> TiTok:
    network = load_network(path, **kwargs)[0]
    assert isinstance(network, TiTok)
    return network


def _double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


class TestPublished:
    @pytest.mark.parametrize(
        ("sizes", "tensors", "parameters", "arguments"),
        [
            (B_64, 404, 204_814_095, {}),
            (
                *(L_32, 692, 641_054_735),
                {
                    **{"embed_dim": 1024, "depth": 24, "num_queries": 32},
                    **{"decoder_dim": 1024, "decoder_depth": 24},
                },
            ),
        ],
    )
    def test_names_and_shapes(
        self, sizes: Sizes, tensors: int, parameters: int, arguments: dict[str, int]
    ) -> None:
        with torch.device("meta"):
            titok = TiTok(**arguments)
        published = shapes(sizes)
        assert len(published) == tensors
        assert sum(torch.Size(s).numel() for s in published.values()) == parameters
        found = {name: tuple(t.shape) for name, t in titok.state_dict().items()}
        assert found == published
        assert not list(titok.buffers())
        heads = {m.num_heads for m in titok.modules() if hasattr(m, "num_heads")}
        assert heads == {sizes.width // 64}
        assert titok.image_size == (256, 256) and titok.stride == 16


class TestFeatures:
    def test_forward__loops(
        self, titok: TiTok, state: dict[str, Tensor], images: Tensor
    ) -> None:
        with torch.no_grad():
            result = titok(images)
        assert result.cls is not None and result.grid_size == (SIZES.grid, SIZES.grid)
        tokens = torch.cat([result.cls[:, None], result.dense, result.sparse], dim=1)
        expected = [loops.tokens_of(_double(state), x.double()) for x in images]
        torch.testing.assert_close(
            tokens.double(), torch.stack(expected), rtol=0, atol=1e-5
        )
        assert result.sparse.shape == (2, SIZES.num_tokens, SIZES.width)
        assert titok.num_queries == SIZES.num_tokens and not titok.has_localization
        with pytest.raises(ValueError, match="TiTok have no localization"):
            assert result.localization

    def test_forward__another_size(self, titok: TiTok) -> None:
        with pytest.raises(ValueError, match=r"32 x 32 px alone.* got 48 x 32"):
            titok(torch.zeros(1, 3, 48, 32))
        with torch.device("meta"):
            published = TiTok()
            with pytest.raises(ValueError, match=r"256 x 256 px alone.* got 224 x 224"):
                published(torch.zeros(1, 3, 224, 224))

    def test_init__width_of_no_heads(self) -> None:
        with torch.device("meta"), pytest.raises(ValueError, match=r"of 64.* got 100"):
            TiTok(embed_dim=100)

    def test_gradient__encoder_alone(self, titok: TiTok, images: Tensor) -> None:
        titok.zero_grad()
        titok(images).sparse.square().mean().backward()
        reached = {n: p.grad for n, p in titok.named_parameters() if p.grad is not None}
        encoder = {name for name in titok.state_dict() if name.startswith("encoder.")}
        unused = {"encoder.conv_out.weight", "encoder.conv_out.bias"}
        assert reached.keys() == {"latent_tokens", *encoder} - unused
        assert min(float(grad.abs().max()) for grad in reached.values()) > 0


class TestCodes:
    def test_codes__loops(
        self, titok: TiTok, state: dict[str, Tensor], images: Tensor
    ) -> None:
        with torch.no_grad():
            tokens = titok(images).sparse
            codes = titok.codes(tokens)
        expected = [loops.codes_of(_double(state), t.double()) for t in tokens]
        assert codes.tolist() == expected
        assert len({tuple(row) for row in expected}) == 2

    def test_codes__reshaped_where_one_would_transpose(
        self, titok: TiTok, state: dict[str, Tensor], images: Tensor
    ) -> None:
        with torch.no_grad():
            tokens = titok(images).sparse
        right, transposed = (
            torch.tensor(
                [loops.codes_of(_double(state), t.double(), legacy) for t in tokens]
            )
            for legacy in (True, False)
        )
        assert (right != transposed).float().mean() > 0.5
        assert titok.codes(tokens).equal(right)

    @pytest.mark.parametrize("use_l2_norm", [True, False])
    def test_codes__brute_force(self, use_l2_norm: bool) -> None:
        titok = TiTok(64, 0, 50, 32, 16, 6, 300, 64, 0, False, use_l2_norm)
        vectors = torch.randn(3, 50, 64, generator=_generator())
        rows = titok.quantize.embedding.weight.detach().double()
        with torch.no_grad():
            found = titok.encoder.conv_out(vectors.mT[..., None])[..., 0].mT
            wanted = found.double()
            if use_l2_norm:
                rows = rows / rows.norm(dim=1, keepdim=True)
                wanted = wanted / wanted.norm(dim=2, keepdim=True)
            distances = (wanted[:, :, None] - rows).square().sum(dim=3)
            assert titok.codes(vectors).equal(distances.argmin(dim=2))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_codes__float32_under_autocast(self, dtype: torch.dtype) -> None:
        titok = TiTok(64, 0, 20, 32, 16, 6, 40, 64, 0, False)
        titok.encoder.conv_out = nn.Identity()
        tokens, noise = torch.randn(2, 1, 20, 64, generator=_generator())
        rows = tokens[0].repeat_interleave(2, dim=0)
        # The second of each two is the token; the first is nearer than half precision.
        rows[::2] += 3e-3 * noise[0]
        titok.quantize.embedding = nn.Embedding.from_pretrained(rows)
        with torch.autocast("cpu", dtype):
            assert titok.codes(tokens)[0].tolist() == list(range(1, 40, 2))


class TestDecode:
    def test_decode__loops(
        self, titok: TiTok, state: dict[str, Tensor], images: Tensor
    ) -> None:
        with torch.no_grad():
            codes = titok.codes(titok(images).sparse)
            found = titok.decode(codes)
        expected = [loops.decoded(_double(state), row) for row in codes.tolist()]
        assert found.shape == images.shape
        torch.testing.assert_close(
            found.double(), torch.stack(expected), rtol=0, atol=1e-5
        )
        assert found.std() > 0.03

    def test_decode__soft_codes(
        self, titok: TiTok, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Tensor] = []

        def watched(latent: Tensor) -> Tensor:
            seen.append(latent)
            return latent[:, :3]

        monkeypatch.setattr(titok.pixel_decoder, "forward", watched)
        codes = torch.tensor([[3, 1, 4, 1, 5]])
        with torch.no_grad():
            titok.decode(codes)
        patches = loops.patches_of(_double(state), codes[0].tolist())
        expected = loops.soft_codes(_double(state), patches)
        found = seen[0][0].flatten(1).mT.double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_decode__in_chunks(
        self, titok: TiTok, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        codes = torch.arange(15).view(3, 5)
        with torch.no_grad():
            whole = titok.decode(codes)
            monkeypatch.setattr("stellar_plugin.networks.titok.CHUNK_SIZE", 2)
            torch.testing.assert_close(titok.decode(codes), whole)

    def test_decode__clamped(self, titok: TiTok) -> None:
        assert titok.pixel_decoder.conv_out.bias is not None
        bias = titok.pixel_decoder.conv_out.bias.detach()
        before = bias.clone()
        bias += torch.tensor([-9.0, 0, 9.0])
        try:
            image = titok.decode(torch.zeros(1, 5, dtype=torch.int64))[0]
        finally:
            bias.copy_(before)
        assert (image[0] == 0).all() and (image[2] == 1).all()
        assert (image[1] > 0).all() and (image[1] < 1).all()

    def test_decode__half_precision(self, titok: TiTok) -> None:
        codes = torch.arange(5)[None]
        with torch.no_grad():
            expected = titok.decode(codes)
            with torch.autocast("cpu", torch.bfloat16):
                found = titok.decode(codes)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)

    def test_decode__later_file_at_once_to_pixels(self, tmp_path: Path) -> None:
        state = weights(shapes(SIZES, legacy=False))
        torch.save(state, tmp_path / "bl.bin")
        titok = _load(tmp_path / "bl.bin", use_l2_norm=True)
        assert not titok.is_legacy and titok.has_decoder
        codes = [3, 1, 4, 1, 5]
        expected = loops.decoded_at_once(_double(state), codes)
        with torch.no_grad():
            found = titok.decode(torch.tensor([codes]))[0].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        tokens = torch.randn(1, 5, SIZES.width, generator=_generator())
        expected_codes = loops.codes_of(
            _double(state), tokens[0].double(), legacy=False
        )
        assert titok.codes(tokens)[0].tolist() == expected_codes


class TestFiles:
    def test_load__every_tensor(self, tmp_path: Path) -> None:
        path = write_titok(tmp_path / "tokenizer_titok_b64.bin")
        network, report = load_network(path)
        assert set(report.matched) == set(shapes(SIZES))
        assert not report.missing + report.unexpected + report.ignored
        assert not network.training
        expected = weights(shapes(SIZES))
        assert all(t.equal(expected[n]) for n, t in network.state_dict().items())
        checkpoint = read_checkpoint(path)
        assert checkpoint.method is not None and checkpoint.method.name == "TiTok"
        assert checkpoint.config["mean"] == (0, 0, 0)
        assert checkpoint.config["std"] == (1, 1, 1)
        assert checkpoint.method.feature == "sparse"

    def test_load__folder_as_of_the_hub(self, tmp_path: Path) -> None:
        state = weights(shapes(SIZES))
        config = {**_vq_model(), "use_l2_norm": False}
        network, report = load_network(_folder(tmp_path, state, config))
        assert isinstance(network, TiTok) and not network.use_l2_norm
        assert network.is_legacy and not report.untold

    def test_load__what_is_not_told(self, tmp_path: Path) -> None:
        path = tmp_path / "a.bin"
        for legacy, assumed in ((True, "True"), (False, "False")):
            torch.save(weights(shapes(SIZES, legacy)), path)
            network, report = load_network(path)
            assert report.untold == (f"use_l2_norm={assumed}",)
            assert isinstance(network, TiTok)
            assert str(network.use_l2_norm) == assumed
            assert load_network(path, use_l2_norm=True)[1].untold == ()

    def test_load__config_of_another_model(self, tmp_path: Path) -> None:
        state = weights(shapes(SIZES))
        config = {**_vq_model(), "num_latent_tokens": 64, "is_legacy": False}
        folder = _folder(tmp_path, state, config)
        with pytest.raises(
            ValueError,
            match=r"num_latent_tokens 64, the weights 5; is_legacy False, the weights "
            r"True; take the files of one model",
        ):
            read_checkpoint(folder)
        config = {**_vq_model(), "use_l2_norm": "yes"}
        with pytest.raises(ValueError, match="use_l2_norm must be true or false"):
            read_checkpoint(_folder(tmp_path, state, config))

    def test_load__first_stage_has_no_pixels(
        self, tmp_path: Path, titok: TiTok, images: Tensor
    ) -> None:
        state = weights(shapes(SIZES, pixels=False))
        torch.save(state, tmp_path / "stage1.bin")
        network = _load(tmp_path / "stage1.bin")
        with torch.no_grad():
            assert network(images).sparse.shape == titok(images).sparse.shape
        assert not network.has_decoder and titok.has_decoder
        with pytest.raises(ValueError, match=r"has no pixel decoder, .*first stage"):
            network.decode(torch.zeros(1, 5, dtype=torch.int64))

    @pytest.mark.parametrize(
        ("drop", "add", "message"),
        [
            (("decoder.", "quantize."), None, "the encoder of a TiTok alone: take the"),
            ("quantize.", None, "a TiTok of a VAE, without codes; only TiTok with"),
            ("x", "decoder.text_guidance_proj.weight", "TA-TiTok, whose decoder reads"),
            ("decoder.decoder_embed.", None, "no whole TiTok.*decoder_embed.weight"),
            ("encoder.ln_pre.", None, "missing: encoder.ln_pre.weight, encoder.ln_pre"),
            ("x", "decoder.mask", "unexpected: decoder.mask"),
            ("x", "encoder.transformer.99999999.a", "missing: encoder.transformer.2"),
        ],
    )
    def test_load__what_is_no_titok_of_codes(
        self,
        tmp_path: Path,
        drop: str | tuple[str, ...],
        add: str | None,
        message: str,
    ) -> None:
        state = weights(shapes(SIZES))
        state = {k: v for k, v in state.items() if not k.startswith(drop)}
        state |= {add: torch.ones(2)} if add else {}
        torch.save(state, tmp_path / "a.bin")
        with pytest.raises(ValueError, match=message):
            load_network(tmp_path / "a.bin")

    def test_load__in_the_place_of_something_else(self, tmp_path: Path) -> None:
        path = write_titok(tmp_path / "titok.bin")
        with pytest.raises(ValueError, match=r"holds a TiTok, .*name it by --model"):
            MaskGITVQGAN.from_pretrained(path)
        with pytest.raises(ValueError, match="holds a TiTok, which takes no latent"):
            Stellar.from_pretrained(path)
        tokenizer = tmp_path / "maskgit.bin"
        torch.save(reference_tokenizer().state_dict(), tokenizer)
        with pytest.raises(ValueError, match=r"MaskGIT-VQGAN, .*--tokenizer"):
            read_checkpoint(tokenizer)


def _vq_model() -> dict[str, Any]:
    """As config.json has it beside the published weights."""
    return {
        "codebook_size": SIZES.num_codes,
        "token_size": SIZES.token_size,
        "use_l2_norm": True,
        "commitment_cost": 0.25,
        "vit_enc_model_size": "base",
        "vit_dec_model_size": "base",
        "num_latent_tokens": SIZES.num_tokens,
        "finetune_decoder": True,
    }


def _folder(folder: Path, state: dict[str, Tensor], vq_model: dict[str, Any]) -> Path:
    safetensors.torch.save_file(state, folder / "model.safetensors")
    config = {"model": {"vq_model": vq_model}, "dataset": {"preprocessing": {}}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
