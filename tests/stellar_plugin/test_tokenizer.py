from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from stellar_plugin import MaskGITVQGAN
from stellar_plugin.vqgan import Codebook
from tests import reference
from tests.tokenizer_weights import SIZES, reference_tokenizer, tokenizer_weights

CASES = ["square64", "square48", "odd50", "nonsquare32x64"]


@pytest.fixture(scope="module")
def tokenizer() -> MaskGITVQGAN:
    return reference_tokenizer()


class TestReferenceWeights:
    def test_rule__printed_numbers(self) -> None:
        state = tokenizer_weights(MaskGITVQGAN(**SIZES))
        for name, numbers in (
            (
                "decoder.conv_in.bias",
                [-0.0820675045, -0.0932807326, 0.077534914, -0.0770730227],
            ),
            (
                "quantize.embedding.weight",
                [-0.227241039, 0.899153113, -0.846261621, 0.129722238],
            ),
        ):
            assert state[name].flatten()[:4].tolist() == pytest.approx(numbers)


class TestMaskGITVQGANParity:
    @pytest.mark.parametrize("case", CASES)
    def test_encode__reference_numbers(
        self, tokenizer: MaskGITVQGAN, case: str
    ) -> None:
        data = reference.load("tokenizer_io")
        images = data[f"{case}.image"]
        with torch.no_grad():
            hidden = tokenizer.encoder(images)
        torch.testing.assert_close(hidden, data[f"{case}.hidden"], rtol=0, atol=2e-5)
        codes = tokenizer.encode(images)
        assert codes.shape == (len(images), *hidden.shape[-2:])
        assert codes.flatten(1).equal(data[f"{case}.codes"])

    @pytest.mark.parametrize("case", CASES)
    def test_decode__reference_numbers(
        self, tokenizer: MaskGITVQGAN, case: str
    ) -> None:
        data = reference.load("tokenizer_io")
        expected = data[f"{case}.decoded"]
        codes = data[f"{case}.codes"]
        grid = [side // 16 for side in expected.shape[-2:]]
        decoded = tokenizer.decode(codes.unflatten(1, grid))
        torch.testing.assert_close(decoded, expected, rtol=0, atol=5e-5)

    def test_decode_unclamped__reference_numbers(self, tokenizer: MaskGITVQGAN) -> None:
        data = reference.load("tokenizer_io")
        decoded = tokenizer.decode_unclamped(data["square48.codes"].view(1, 3, 3))
        expected = data["square48.decoded_unclamped"]
        torch.testing.assert_close(decoded, expected, rtol=0, atol=5e-5)


class TestMaskGITVQGAN:
    def test_init__sizes_of_the_published_file(self) -> None:
        with torch.device("meta"):
            tokenizer = MaskGITVQGAN()
        shapes = {
            name: "x".join(map(str, tensor.shape))
            for name, tensor in tokenizer.state_dict().items()
        }
        lines = (reference.FIXTURES / "tokenizer_keys.txt").read_text().splitlines()
        published = dict(line.split("\t") for line in lines[1:])
        assert len(published) == 168
        assert shapes == published
        assert tokenizer.downsample_factor == 16

    def test_frozen__whatever_is_called(self, tokenizer: MaskGITVQGAN) -> None:
        tokenizer.train()
        assert not any(module.training for module in tokenizer.modules())
        assert not any(p.requires_grad for p in tokenizer.parameters())
        images = torch.rand(1, 3, 32, 32, requires_grad=True)
        codes = tokenizer.encode(images)
        assert not codes.requires_grad and not tokenizer.decode(codes).requires_grad

    def test_encode__in_chunks(
        self, tokenizer: MaskGITVQGAN, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        whole = tokenizer.encode(images)
        monkeypatch.setattr("stellar_plugin.tokenizer.CHUNK_SIZE", 2)
        assert tokenizer.encode(images).equal(whole)

    @pytest.mark.parametrize("autocast", [True, False])
    def test_encode__bfloat16(self, autocast: bool) -> None:
        tokenizer = reference_tokenizer()
        data = reference.load("tokenizer_io")
        if not autocast:
            tokenizer.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            codes = tokenizer.encode(data["square64.image"])
            decoded = tokenizer.decode(codes)
        agreement = codes.flatten(1) == data["square64.codes"]
        assert agreement.float().mean() > 0.9
        assert decoded.dtype == torch.float32

    def test_encode__bad_images(self, tokenizer: MaskGITVQGAN) -> None:
        with pytest.raises(ValueError, match=r"floats in \[0, 1\].*got torch.uint8"):
            tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"shape \(3, 32, 32\)"):
            tokenizer.encode(torch.zeros(3, 32, 32))
        with pytest.raises(ValueError, match=r"at least 16 px .* got 32 x 8"):
            tokenizer.encode(torch.zeros(1, 3, 32, 8))

    def test_decode__bad_codes(self, tokenizer: MaskGITVQGAN) -> None:
        with pytest.raises(ValueError, match=r"must be grids .* unflatten"):
            tokenizer.decode(torch.zeros(1, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match="0 to 63, got 0 to 64"):
            tokenizer.decode(torch.tensor([[[0, 64]]]))

    def test_init__channels_do_not_divide(self) -> None:
        with pytest.raises(ValueError, match=r"multiple of 32.*got 48"):
            MaskGITVQGAN(channels=48)

    def test_encode_to_grid__smooth_only_where_images_get_smaller(
        self, tokenizer: MaskGITVQGAN
    ) -> None:
        factor = tokenizer.downsample_factor
        images = torch.rand(2, 3, 3 * factor, 3 * factor)
        assert tokenizer.encode_to_grid(images, (3, 3)).equal(tokenizer.encode(images))
        for side, antialias in ((4, False), (2, True)):
            size = (side * factor, side * factor)
            other = F.interpolate(images, size, mode="bicubic", antialias=antialias)
            codes = tokenizer.encode_to_grid(images, (side, side))
            assert codes.equal(tokenizer.encode(other))


class TestCodebook:
    def test_nearest__brute_force_and_first_of_equals(self) -> None:
        torch.manual_seed(0)
        codebook = Codebook(7, 3)
        codebook.embedding.weight.data[5] = codebook.embedding.weight.data[2]
        hidden = torch.randn(2, 3, 4, 5)
        hidden[0, :, 0, 0] = codebook.embedding.weight.data[5]
        codes = codebook.nearest(hidden)
        assert codes[0, 0, 0] == 2
        for b, row, column in torch.cartesian_prod(*map(torch.arange, (2, 4, 5))):
            distances = codebook.embedding.weight - hidden[b, :, row, column]
            assert codes[b, row, column] == distances.square().sum(1).argmin()


class TestFromPretrained:
    @pytest.mark.parametrize("name", ["tokenizer.bin", "tokenizer.safetensors"])
    def test_from_pretrained__sizes_and_weights(
        self, tokenizer: MaskGITVQGAN, name: str, tmp_path: Path
    ) -> None:
        save(tokenizer.state_dict(), tmp_path / name)
        loaded = MaskGITVQGAN.from_pretrained(tmp_path / name)
        assert loaded.config == tokenizer.config
        assert not any(p.requires_grad for p in loaded.parameters())
        images = torch.rand(1, 3, 32, 48)
        assert loaded.encode(images).equal(tokenizer.encode(images))

    def test_from_pretrained__other_sizes(self, tmp_path: Path) -> None:
        tokenizer = MaskGITVQGAN(32, (2, 1, 4), 3, 8, 16)
        save(tokenizer.state_dict(), tmp_path / "other.bin")
        loaded = MaskGITVQGAN.from_pretrained(tmp_path / "other.bin")
        assert loaded.config == tokenizer.config
        assert loaded.downsample_factor == 4

    def test_from_pretrained__no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"x\.bin'.*huggingface\.co/fun-re"):
            MaskGITVQGAN.from_pretrained(tmp_path / "x.bin")

    def test_from_pretrained__missing_and_unexpected(
        self, tokenizer: MaskGITVQGAN, tmp_path: Path
    ) -> None:
        state = tokenizer.state_dict()
        del state["decoder.norm_out.bias"]
        state["decoder.extra"] = torch.zeros(1)
        state["decoder.conv_out.bias"] = torch.zeros(4)
        save(state, tmp_path / "x.bin")
        message = (
            r"x\.bin' is no complete .*missing: decoder\.norm_out\.bias; unexpected: "
            r"decoder\.extra; of another shape: decoder\.conv_out\.bias \(4,\) instead"
        )
        with pytest.raises(ValueError, match=message):
            MaskGITVQGAN.from_pretrained(tmp_path / "x.bin")

    def test_from_pretrained__other_weights(self, tmp_path: Path) -> None:
        save({"cls_token": torch.zeros(1)}, tmp_path / "x.bin")
        with pytest.raises(ValueError, match=r"no MaskGIT-VQGAN.*keys: cls_token"):
            MaskGITVQGAN.from_pretrained(tmp_path / "x.bin")

    @pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04half a zip"])
    @pytest.mark.parametrize("suffix", ["bin", "safetensors"])
    def test_from_pretrained__damaged(
        self, content: bytes, suffix: str, tmp_path: Path
    ) -> None:
        (tmp_path / f"x.{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            MaskGITVQGAN.from_pretrained(tmp_path / f"x.{suffix}")

    def test_from_pretrained__truncated(
        self, tokenizer: MaskGITVQGAN, tmp_path: Path
    ) -> None:
        save(tokenizer.state_dict(), tmp_path / "x.bin")
        content = (tmp_path / "x.bin").read_bytes()
        (tmp_path / "x.bin").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="cut short"):
            MaskGITVQGAN.from_pretrained(tmp_path / "x.bin")

    def test_from_pretrained__no_dictionary_of_tensors(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, tmp_path / "x.bin")
        with pytest.raises(ValueError, match="no dictionary of tensors"):
            MaskGITVQGAN.from_pretrained(tmp_path / "x.bin")

    def test_from_pretrained__never_runs_a_pickle(self, tmp_path: Path) -> None:
        torch.save({"x": Path("anything")}, tmp_path / "x.bin")
        with pytest.raises(ValueError, match=r"tensors alone: it holds pathlib"):
            MaskGITVQGAN.from_pretrained(tmp_path / "x.bin")


def save(state: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(dict(state), path)
    else:
        safetensors.torch.save_file(state, path)
