from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from lightly_ext.data import read_image
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import centre_crop
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.search import TokenIndex
from lightly_ext.search.index import run_index
from lightly_ext.search.search import main, run_search
from stellar_cli.errors import OptionError
from stellar_plugin import Stellar
from stellar_plugin.protocols import CropProtocol
from tests.lightly_ext.evaluate.small import NUM_QUERIES, write_model
from tests.page import Page

# Photos of 40 x 60 px become 32 x 48, whose middle 32 x 32 has patches of 8 x 8: of the
# photo, 10 x 10 px from the left edge 10 on.
SIDE, PATCH, LEFT = 32, 10, 10
TURNED = "turned.jpg"
SLOW = pytest.mark.slow


class Made(NamedTuple):
    root: Path
    model: str
    images: Path
    index: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Eight photos, one of them stored on its side, and their index."""
    root = tmp_path_factory.mktemp("search")
    model = _write_model(root / "model")
    images = root / "images"
    _write_photos(images, 7)
    made = Made(root, model, images, root / "index")
    _make_index(made.images, made.index, model=model)
    return made


def _write_model(folder: Path, **kwargs: Any) -> str:
    """A model whose tokens of different photos differ, as those of a trained one."""
    write_model(folder, patch_size=8, **kwargs)
    model = Stellar.from_pretrained(str(folder))
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.ndim > 1:
                parameter *= 4
    model.save_pretrained(folder)
    return str(folder)


def _write_photos(folder: Path, num: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(num + 1):
        coarse = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((60, 40), Image.Resampling.NEAREST)
        if i < num:
            photo.save(folder / f"{i}.png")
            continue
        turned = photo.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        turned.save(folder / TURNED, exif=exif, quality=95)


def _make_index(images: Path, folder: Path, **model: Any) -> TokenIndex:
    devices = Devices(accelerator="cpu", batch_size=8, num_workers=0)
    return run_index({"seed": 0, **model}, devices, str(images), str(folder))


def _query(made: Made, name: str) -> dict[str, NDArray[np.float64]]:
    """What the model makes of a photo."""
    model = load_frozen_model(made.model)
    protocol = CropProtocol(name="", source="", resize=SIDE, crop=SIDE)
    image = read_image(made.images / name)
    assert image.shape == (3, 40, 60)
    crop = centre_crop(protocol, model.origin.interpolation)(image)
    result = model(crop[None])
    assert result.cls is not None
    return {
        "tokens": result.sparse[0].double().numpy(),
        "maps": result.localization[0].T.double().numpy(),
        "cls": result.cls[0].double().numpy(),
    }


def _shares(maps: NDArray[np.float64], box: list[float] | None) -> list[float]:
    """Share of the patches in a box that each token has, patch by patch."""
    x0, y0, x1, y1 = box or [0, 0, 60, 40]
    shares = [0.0] * len(maps)
    total = 0.0
    for row in range(4):
        for column in range(4):
            left, top = LEFT + column * PATCH, row * PATCH
            across = min(x1, left + PATCH) - max(x0, left)
            down = min(y1, top + PATCH) - max(y0, top)
            inside = max(across, 0) * max(down, 0)
            total += inside
            for i, where in enumerate(maps):
                shares[i] += inside * where[row * 4 + column]
    return [share / total for share in shares]


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def _brute_force(
    made: Made,
    name: str,
    token: int | None,
    box: list[float] | None,
    by: str,
    weights: str,
) -> list[tuple[float, str, int]]:
    """Score, file and matched token of all images, the best first, by loops."""
    query = _query(made, name)
    shares = _shares(query["maps"], box)
    if token is not None:
        shares = [float(i == token) for i in range(len(shares))]
    counting = [i for i, share in enumerate(shares) if share > 0]
    decide = [shares[i] if weights == "mass" else 1 / len(counting) for i in counting]
    vectors = query["tokens"]
    if token is None and box is None:
        mean = vectors.mean(axis=0)
    else:
        mean = sum(w * vectors[i] for w, i in zip(decide, counting, strict=True))
    index = TokenIndex.open(made.index)
    entries = index.entries(index.files)
    heaviest = vectors[int(np.argmax(shares))]
    answers = []
    for n, file in enumerate(entries.files):
        tokens = entries.tokens[n].double().numpy()
        score = {
            "maxsim": sum(
                w * max(_cosine(vectors[i], t) for t in tokens)
                for w, i in zip(decide, counting, strict=True)
            ),
            "mean": _cosine(mean, entries.mean[n].double().numpy()),
            "cls": _cosine(query["cls"], entries.cls[n].double().numpy()),
        }[by]
        matched = int(np.argmax([_cosine(heaviest, t) for t in tokens]))
        answers.append((score, file, matched))
    return sorted(answers, key=lambda answer: (-answer[0], answer[1]))


def _search(made: Made, name: str = "2.png", **options: Any) -> list[Any]:
    image = str(made.images / name)
    return run_search(str(made.index), image, accelerator="cpu", **options)


class TestRunSearch:
    @pytest.mark.parametrize(
        "token, box, by, weights",
        [
            (None, [24, 11, 61, 30], "maxsim", "mass"),
            pytest.param(None, None, "maxsim", "mass", marks=SLOW),
            pytest.param(None, None, "maxsim", "uniform", marks=SLOW),
            pytest.param(None, None, "mean", "mass", marks=SLOW),
            pytest.param(None, None, "cls", "mass", marks=SLOW),
            pytest.param(3, None, "maxsim", "mass", marks=SLOW),
            pytest.param(3, None, "mean", "uniform", marks=SLOW),
            pytest.param(None, [0, 0, 23.5, 17], "maxsim", "uniform", marks=SLOW),
            pytest.param(None, [24, 11, 61, 30], "mean", "mass", marks=SLOW),
        ],
    )
    def test_run_search__brute_force(
        self, made: Made, token: int | None, box: Any, by: Any, weights: Any
    ) -> None:
        for name in ("2.png", TURNED):
            wanted = _brute_force(made, name, token, box, by, weights)
            text = None if box is None else ",".join(map(str, box))
            found = _search(
                made, name, token=token, box=text, by=by, weights=weights, top=5
            )
            assert [(a.file, a.token) for a in found] == [a[1:] for a in wanted[:5]]
            np.testing.assert_allclose(
                [a.score for a in found], [a[0] for a in wanted[:5]], atol=1e-6
            )

    def test_run_search__boxes_in_the_file(self, made: Made) -> None:
        for answer in _search(made):
            assert answer.map.shape == (4, 4)
            strong = (answer.map >= answer.map.max() / 2).nonzero()
            (y0, x0), (y1, x1) = strong.amin(0).tolist(), strong.amax(0).tolist()
            x0, x1 = LEFT + PATCH * x0, LEFT + PATCH * (x1 + 1)
            assert answer.box == (x0, PATCH * y0, x1, PATCH * (y1 + 1))
            assert answer.state == ""

    @pytest.mark.slow
    def test_run_search__itself_is_first(self, made: Made) -> None:
        for name in ("5.png", TURNED):
            answer = _search(made, name)[0]
            assert answer.file == name
            assert answer.score == pytest.approx(1, abs=2e-4)

    def test_run_search__json(self, made: Made, tmp_path: Path) -> None:
        path = tmp_path / "answers.json"
        found = _search(made, json=str(path), top=3)
        written = json.loads(path.read_text())
        assert [list(one) for one in written] == [["file", "score", "token", "box"]] * 3
        wanted = [[a.file, a.score, a.token, list(a.box)] for a in found]
        assert [list(one.values()) for one in written] == wanted

    @pytest.mark.parametrize(
        "options", [{}, pytest.param({"box": "24,11,61,30"}, marks=SLOW)]
    )
    def test_run_search__page(
        self, made: Made, tmp_path: Path, options: dict[str, str]
    ) -> None:
        path = tmp_path / "page.html"
        found = _search(made, page=str(path), top=4, **options)
        text = path.read_text()
        page = Page(text)
        assert all(address.startswith("data:image/") for address in page.addresses)
        assert "http" not in text and "script" not in page.tags
        # As wide as the column, where that makes none too high.
        assert text.count("max-width: calc(28rem * 1.5)") == 1 + len(found)
        assert "link" not in page.tags and "url(" not in text
        photos = [picture for kind, picture in page.decoded() if kind == "jpeg"]
        assert [photo.size for photo in photos] == [(640, 427), *[(400, 267)] * 4]
        maps = [picture for kind, picture in page.decoded() if kind == "png"]
        assert [layer.size for layer in maps] == [(4, 4)] * (4 if options else 5)
        lit = np.array(maps[-1])[..., :3].any(axis=2)
        strong = found[-1].map >= found[-1].map.max() / 2
        assert lit.tolist() == strong.tolist()
        for number, (answer, caption) in enumerate(
            zip(found, page.captions, strict=True)
        ):
            said = " ".join(caption.split())
            assert said.startswith(f"{number + 1}. {answer.score:.3f} token")
            assert said.endswith(answer.file)
        alts = [image["alt"] for image in page.images if "jpeg" in image["src"][:16]]
        assert alts[1].startswith(f"Answer 1, {found[0].file}: token {found[0].token}")

    def test_run_search__says_how_it_was_read(
        self, made: Made, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _search(made, box="0,0,20,40")
        said = capsys.readouterr().out
        assert "60 x 40 px; the model sees its middle, 10,0,50,40." in said
        assert "Searched with the box 0,0,20,40, of which the model sees 50%." in said
        assert "The index has 8 images, fewer than 20: all are listed." in said

    @pytest.mark.slow
    def test_run_search__changed_and_gone(
        self, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = tmp_path / "images"
        shutil.copytree(made.images, images)
        _make_index(images, tmp_path / "index", model=made.model)
        here = Made(tmp_path, made.model, images, tmp_path / "index")
        (images / "1.png").unlink()
        Image.new("RGB", (9, 9)).save(images / "3.png")
        os.utime(images / "4.png", (1, 1))  # the same content
        capsys.readouterr()
        page = tmp_path / "page.html"
        states = {a.file: a.state for a in _search(here, page=str(page))}
        assert {f: s for f, s in states.items() if s} == {
            "1.png": "gone",
            "3.png": "changed",
        }
        said = capsys.readouterr().out
        assert "1 of these files are gone" in said
        assert said.count("run stellar index again") == 2
        written = Page(page.read_text()).text
        assert "cannot be shown" in written and "run stellar index again" in written

    @pytest.mark.slow
    def test_run_search__model_has_moved(self, made: Made, tmp_path: Path) -> None:
        shutil.copytree(made.model, tmp_path / "model")
        shutil.copytree(made.images, tmp_path / "images")
        folder = tmp_path / "index"
        _make_index(tmp_path / "images", folder, model=str(tmp_path / "model"))
        (tmp_path / "model").rename(tmp_path / "moved")
        here = Made(tmp_path, "", tmp_path / "images", folder)
        with pytest.raises(FileNotFoundError, match="say where with --model"):
            _search(here)
        first = _search(here, model=str(tmp_path / "moved"))[0]
        assert first.file == "2.png"
        other = _write_model(tmp_path / "other", num_queries=3)
        with pytest.raises(ValueError, match="num_tokens: 4 there, 3 here"):
            _search(here, model=other)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"box": "1,2,3"}, "box must be four numbers"),
            ({"box": "1,2,3,x"}, "box must be four numbers"),
            ({"box": "1,2,nan,4"}, "box must be four numbers"),
            ({"box": "10,10,10,20"}, "has no inside"),
            ({"box": "20,10,10,20"}, "has no inside"),
            ({"box": "70,10,80,20"}, "outside of '.*2.png', which is 60 x 40 px"),
            ({"box": "20,10,62,20"}, "outside of '.*2.png', which is 60 x 40 px"),
            ({"box": "20,-2,50,20"}, "outside of '.*2.png', which is 60 x 40 px"),
            ({"box": "0,0,9,40"}, "outside of what the model sees .* 10,0,50,40"),
            ({"box": "0,0,9,9", "token": 1}, "a token or a box, not both"),
            ({"box": "0,0,9,9", "by": "cls"}, "A CLS token is of a whole image"),
            ({"token": 1, "by": "cls"}, "A CLS token is of a whole image"),
            ({"token": NUM_QUERIES}, "token must be in 0 to 3"),
            ({"token": -1}, "token must be in 0 to 3"),
            ({"top": 0}, "top must be at least 1"),
            ({"json": "/none/a.json"}, "no folder '/none' for --json"),
            ({"page": "/none/a.html"}, "no folder '/none' for --page"),
            ({"page": "/tmp"}, "is a folder: name a file in it"),
        ],
    )
    def test_run_search__bad_input(
        self, made: Made, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            _search(made, **options)

    @pytest.mark.parametrize("edited", [{"identity": {}}, {"model": {"name": "m"}}])
    def test_run_search__card_without_its_model(
        self, made: Made, tmp_path: Path, edited: dict[str, Any]
    ) -> None:
        index = shutil.copytree(made.index, tmp_path / "index")
        replace(TokenIndex.open(index).card, **edited).save(index)
        with pytest.raises(ValueError, match="does not tell what made it"):
            _search(made._replace(index=index))

    def test_run_search__read_only(
        self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
        with pytest.raises(PermissionError, match="written: its folder is read-only"):
            _search(made, json=str(tmp_path / "a.json"))

    def test_run_search__no_cls(self, made: Made, tmp_path: Path) -> None:
        index = TokenIndex.open(made.index)
        entries = index.entries(index.files)
        card = replace(index.card, cls_dim=0)
        index = TokenIndex.create(tmp_path / "index", card)
        index.put(replace(entries, cls=entries.cls[:, :0]))
        with pytest.raises(ValueError, match="no CLS token: search by maxsim or mean"):
            run_search(str(tmp_path / "index"), str(made.images / "2.png"), by="cls")

    def test_run_search__bad_images(self, made: Made, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no image '.*none.png' to"):
            _search(made, "none.png")
        (tmp_path / "broken.png").write_text("no image")
        with pytest.raises(ValueError, match=r"broken.png' cannot be read"):
            run_search(str(made.index), str(tmp_path / "broken.png"))

    @pytest.mark.slow
    def test_main(self, made: Made, tmp_path: Path) -> None:
        arguments = [str(made.index), str(made.images / "2.png"), "--top", "2"]
        path = tmp_path / "a.json"
        main([*arguments, "--token", "1", "--json", str(path)])
        assert len(json.loads(path.read_text())) == 2
        with pytest.raises(OptionError, match="by"):
            main([*arguments, "--by", "median"])


class TestClusters:
    @pytest.mark.slow
    def test_run_search__without_mass(self, tmp_path: Path) -> None:
        images = tmp_path / "images"
        _write_photos(images, 3)
        # Two colours and what is between, so four of the 16 clusters have patches.
        half = np.zeros((40, 40, 3), np.uint8)
        half[:, 20:] = 200
        Image.fromarray(half).save(images / "half.png")
        folder = tmp_path / "index"
        _make_index(images, folder, model="patches:8")
        here = Made(tmp_path, "", images, folder)
        with pytest.raises(
            ValueError, match=r"Token 9 is nowhere in .* name one of 0, 1, 2, 3\."
        ):
            _search(here, "half.png", token=9)
        first, *others = _search(here, "half.png", weights="uniform")
        assert first.file == "half.png"
        assert first.score == pytest.approx(1, abs=1e-3)
        # Zeros are like nothing: no answer is a cluster without patches.
        assert all(torch.any(answer.map > 0) for answer in (first, *others))
