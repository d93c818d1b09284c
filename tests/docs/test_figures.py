from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from docs.figures import crops, first_screen, method
from docs.figures.card import SCALE, Box, Card, shades
from docs.figures.first_screen import draw_narrow, draw_wide
from lightly_ext.modules import STELLARProjectionHead
from stellar_plugin import Stellar
from stellar_plugin.checkpoints import save_heads
from stellar_plugin.visualize import denormalize, to_pictures, token_palette

SIZE, PATCH, TOKENS = 32, 8, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with its head, and two photos of noise."""
    path = tmp_path_factory.mktemp("figures")
    torch.manual_seed(0)
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 24, "depth": 1}
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    name = "stellar_vit_tiny_patch16_224"
    model = Stellar(name, num_queries=TOKENS, num_heads=2, **sizes, **decoder)
    model.save_pretrained(path / "model")
    head = STELLARProjectionHead(24, 16, 8, num_prototypes=6)
    save_heads({"sparse_head": head.state_dict()}, path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    for name, pixels in zip("ab", noise, strict=True):
        Image.fromarray(pixels).save(path / f"{name}.png")
    return path


def crop(card: Card, part: str) -> np.ndarray:
    return np.asarray(card.image.crop(card.parts[part].pixels))


class TestFirstScreen:
    @pytest.fixture(scope="class")
    def seen(self, folder: Path) -> first_screen.Seen:
        model = Stellar.from_pretrained(folder / "model")
        return first_screen.look(model, Image.open(folder / "a.png"))

    def test_main(self, folder: Path, tmp_path: Path) -> None:
        photos = [str(folder / "a.png"), str(folder / "b.png")]
        first_screen.main(str(folder / "model"), photos, str(tmp_path))
        sizes = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
        height = 92 + 2 * (first_screen.SIDE + first_screen.GAP) + 46
        assert sizes == {
            "first_screen.jpg": (2560, 2 * height),
            "first_screen_narrow.jpg": (780, 1360),
        }

    @pytest.mark.parametrize("narrow", [False, True])
    def test_draw__maps_are_scaled_to_the_colour_of_their_token(
        self, seen: first_screen.Seen, narrow: bool
    ) -> None:
        card = draw_narrow(seen) if narrow else draw_wide([seen])
        assert seen.tokens == list(range(TOKENS))
        for token, colour in enumerate(token_palette(TOKENS)):
            drawn = crop(card, f"map 0 of token {token}")
            y, x = np.unravel_index(seen.maps[token].argmax(), (4, 4))
            side = drawn.shape[0] / 4
            middle = drawn[int((y + 0.8) * side), int((x + 0.8) * side)]
            assert middle.tolist() == colour.tolist()
            y, x = np.unravel_index(seen.maps[token].argmin(), (4, 4))
            weak = drawn[int((y + 0.8) * side), int((x + 0.8) * side)]
            expected = (seen.maps[token].min() * colour.astype(float)).round()
            assert np.abs(weak - expected).max() <= 1

    def test_draw__pictures_are_those_of_the_model(
        self, folder: Path, seen: first_screen.Seen
    ) -> None:
        model = Stellar.from_pretrained(folder / "model")
        images = model.transform()(Image.open(folder / "a.png")).unsqueeze(0)
        with torch.no_grad():
            expected = to_pictures(model.reconstruct(images))[0]
        card = draw_wide([seen, seen])
        for row in range(2):
            drawn = crop(card, f"reconstruction {row}")
            # Pixels are enlarged, each to 11 x 11.
            assert (drawn[5::11, 5::11] == expected).all()
        # Each patch in the colours of all tokens, by its row of L.
        with torch.no_grad():
            weights = model(images).localization[0].numpy()
        colours = (weights @ token_palette(TOKENS)).round().reshape(4, 4, 3)
        assert np.abs(crop(card, "mixed 1")[44::88, 44::88] - colours).max() <= 1
        # The photo itself, not the model's 32 px: as small, it is the input.
        photo = Image.fromarray(crop(card, "photo 0")).resize((SIZE, SIZE))
        picture = denormalize(images, model.mean, model.std)[0]
        assert np.abs(np.asarray(photo).astype(int) - picture).mean() < 30

    def test_look__shares_and_maps(self, folder: Path) -> None:
        model = Stellar.from_pretrained(folder / "model")
        photo = Image.open(folder / "b.png")
        seen = first_screen.look(model, photo)
        with torch.no_grad():
            weights = model(model.transform()(photo).unsqueeze(0)).localization[0]
        assert seen.shares == [f"{share:.1%}" for share in weights.mean(dim=0).tolist()]
        expected = (weights / weights.amax(dim=0)).T.reshape(TOKENS, 4, 4)
        np.testing.assert_allclose(seen.maps, expected, rtol=1e-6)
        assert (seen.numbers.min(), seen.numbers.max()) == (0.0, 1.0)


class TestMethod:
    def test_main(self, folder: Path, tmp_path: Path) -> None:
        photos = [str(folder / "a.png"), str(folder / "b.png")]
        method.main(str(folder / "model"), photos, str(tmp_path))
        drawn = {path.stem: Image.open(path).width for path in tmp_path.iterdir()}
        assert drawn == dict.fromkeys(method.FIGURES, SCALE * method.WIDTH)
        # Every picture is on the page.
        page = Path(method.__file__).parents[1].joinpath("method.md").read_text()
        assert all(f"](method/{name}.jpg)" in page for name in method.FIGURES)

    def test_views__a_fifth_is_seen(self, folder: Path) -> None:
        scene = method.load_scene(str(folder / "model"), [str(folder / "a.png")])
        card = method.views(scene)
        for i in range(3):
            masked = crop(card, f"masked {i}")
            side = masked.shape[0] / 4
            middles = [int((j + 0.5) * side) for j in range(4)]
            cells = masked[middles][:, middles].reshape(16, 3)
            hidden = (cells == np.array([25, 35, 54])).all(axis=1)
            assert (~hidden).sum() == 3  # 16 patches * 0.2, rounded down

    def test_main__model_without_head(self, folder: Path, tmp_path: Path) -> None:
        heads = shutil.ignore_patterns("heads.safetensors")
        shutil.copytree(folder / "model", tmp_path / "bare", ignore=heads)
        with pytest.raises(ValueError, match="has no head of sparse tokens; take"):
            method.load_scene(str(tmp_path / "bare"), [str(folder / "a.png")])


class TestCrops:
    def test_main(self, folder: Path, tmp_path: Path) -> None:
        for name in ("one", "two"):
            photos = [str(folder / "a.png")]
            crops.main(photos, str(tmp_path / name), side=16, number=3)
        files = sorted((tmp_path / "one").iterdir())
        assert [file.name for file in files] == ["a_000.jpg", "a_001.jpg", "a_002.jpg"]
        assert {Image.open(file).size for file in files} == {(16, 16)}
        same = [
            (tmp_path / "two" / f.name).read_bytes() == f.read_bytes() for f in files
        ]
        assert same == [True] * 3
        assert len({file.read_bytes() for file in files}) == 3


class TestCard:
    def test_shades(self) -> None:
        shown = shades(np.array([[0.0, 0.5, 1.0]]), (200, 100, 3))
        assert shown.tolist() == [[[0, 0, 0], [100, 50, 2], [200, 100, 3]]]

    def test_picture__large_ones_are_averaged_small_ones_repeated(self) -> None:
        card = Card(20, 10)
        checks = np.indices((80, 80)).sum(axis=0) % 2 * 255
        picture = np.repeat(checks[..., None], 3, axis=2).astype(np.uint8)
        card.picture(Box(0, 0, 10, 10), picture, "large")
        card.picture(Box(10, 0, 10, 10), picture[:2, :2], "small")
        assert np.abs(crop(card, "large").astype(int) - 127).max() < 40
        small = crop(card, "small")
        assert (small[:10, :10] == 0).all() and (small[:10, 10:] == 255).all()
