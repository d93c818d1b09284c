"""What scores have to be: loops in float64 over what is stored or a model gives."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.lib.stride_tricks import sliding_window_view
from open_clip import OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torch import Tensor

from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.probing.stability import ScaledCrops
from lightly_ext.evaluate.prototypes import load_sparse_head
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.text.probe import AttentionProbe
from lightly_ext.evaluate.text.tower import load_text_tower
from stellar_plugin import Stellar
from stellar_plugin.protocols import (
    EQUIVARIANCE_SHIFTS,
    IN_CONTEXT,
    KNN,
    STABILITY,
    STABILITY_SCALES,
)
from tests.lightly_ext.evaluate.brute_force_sets import (
    CLASSES,
    NUM_PROTOTYPES,
    SIDE,
    Array,
    Factors,
    Scores,
    labelled,
    numbered,
    read,
    readable_images,
)
from tests.lightly_ext.evaluate.dense.in_context_loops import (
    brute_force as in_context_scores,
)
from tests.lightly_ext.evaluate.dense.unsupervised_loops import (
    brute_force as scores_of_clusters,
)
from tests.lightly_ext.evaluate.dense.unsupervised_loops import clusters_at_px
from tests.lightly_ext.evaluate.discovery.discovery_loops import (
    brute_force as discovery_scores,
)
from tests.lightly_ext.evaluate.discovery.discovery_loops import inner_area
from tests.lightly_ext.evaluate.probing.where_loops import brute_force as where_scores
from tests.lightly_ext.evaluate.retrieval.loops import Seen, brute_force, forms
from tests.lightly_ext.evaluate.small import (
    NUM_QUERIES,
    Given,
)


def _vote(given: Given, root: Path, neighbours: int) -> dict[str, str]:
    """Class of each test image, by loops over the training images; ties by order."""

    def unit(image: Tensor) -> Array:
        row = given.model.pooled(image[None], "sparse")[0].double().numpy()
        return row / np.linalg.norm(row)

    train = [(name, unit(image)) for _, name, image in labelled(root, "train")]
    found = {}
    for file, _, image in labelled(root, "val"):
        query = unit(image)
        # 1e-9: copies have equal similarities, and sums of equal votes are equal.
        similar = [round(float((row * query).sum()), 9) for _, row in train]
        order = sorted(range(len(train)), key=lambda i: (-similar[i], i))
        votes = dict.fromkeys(CLASSES, 0.0)
        for i in order[:neighbours]:
            votes[train[i][0]] += float(np.exp(similar[i] / KNN.temperature))
        most = max(votes.values())
        found[file] = next(c for c in CLASSES if votes[c] > most * (1 - 1e-9))
    return found


def _guessed(given: Given, root: Path, result: Result) -> tuple[Scores, dict[str, str]]:
    """Scores by the stored guesses, and these, of all readable images."""
    path = given.results.folder(result) / "guesses.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    files = sorted(str(p.relative_to(root / "val")) for p in root.glob("val/*/*"))
    assert [row["image"] for row in rows] == files
    assert all(row["class"] == row["image"].split("/")[0] for row in rows)
    guesses = {row["image"]: row["guess_1"] for row in rows if row["guess_1"]}
    known = {file: name for file, name, _ in labelled(root, "val")}
    assert guesses.keys() == known.keys()
    correct = sum(guesses[file] == name for file, name in known.items())
    return {"accuracy": correct / len(known), "num_test": len(known)}, guesses


def by_votes(
    name: str, neighbours: int, given: Given, results: list[Result]
) -> list[Scores]:
    root, (result,) = given.results.output.parent / name, results
    scores, guesses = _guessed(given, root, result)
    assert guesses == _vote(given, root, neighbours)
    if name == "single":
        assert scores == {"accuracy": 1.0, "num_test": 1}
        assert result.chance == {"accuracy": 1.0}
    if name == "missing":
        assert set(guesses.values()) == {"cat", "dog"}
    return [scores]


def by_guesses(name: str, given: Given, results: list[Result]) -> list[Scores]:
    root, (result,) = given.results.output.parent / name, results
    unreadable = result.provenance["unreadable"]
    assert sum(unreadable.values()) == 2 and unreadable["test"] == 1
    num_train = result.provenance["num_train"] + result.provenance["num_held_out"]
    assert num_train == len(labelled(root, "train"))
    return [_guessed(given, root, result)[0]]


def decodings(given: Given, results: list[Result]) -> list[Scores]:
    """All scores in float64, from the images that the stored decoder makes."""
    root, (result,) = given.results.output.parent, results
    stellar = Stellar.from_pretrained(str(root / "model"))
    decoder = given.results.folder(result) / "decoder" / "model.safetensors"
    if decoder.is_file():
        assert stellar.decoder is not None
        stellar.decoder.load_state_dict(safetensors.torch.load_file(decoder))
    pairs, psnr, lpips, ssim = [], [], [], []
    for image in readable_images(root / "photos").values():
        decoded = stellar.reconstruct(given.model.normalize(image[None]))[0]
        pair = image.numpy() / 255, np.rint(decoded.numpy() * 255) / 255
        pairs.append(pair)
        psnr.append(-10 * np.log10(((pair[0] - pair[1]) ** 2).mean()))
        lpips.append(np.abs(pair[0] - pair[1]).mean())  # of the tiny network
        ssim.append(_ssim(*pair))
    features = [
        [_inception(image) for image in side] for side in zip(*pairs, strict=True)
    ]
    means = {"psnr_db": psnr, "lpips": lpips, "ssim": ssim}
    scores: Scores = {name: float(np.mean(values)) for name, values in means.items()}
    return [{**scores, "fid": _frechet(*features), "num_images": len(pairs)}]


def _ssim(first: Array, second: Array) -> float:
    """Mean over channels and windows of 11 x 11 px inside of the image."""
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2

    def mean(values: Array) -> Array:
        return (values * weights).sum(axis=(-2, -1), keepdims=True)

    x, y = (
        sliding_window_view(image, (11, 11), axis=(1, 2)) for image in (first, second)
    )
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean((x - mx) ** 2), mean((y - my) ** 2), mean((x - mx) * (y - my))
    top = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
    return float((top / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))).mean())


def _inception(image: Array) -> Array:
    return np.concatenate([image.mean(axis=(1, 2)), image[:, 1, 2]])


def _frechet(first: list[Array], second: list[Array]) -> float:
    x, y = np.array(first), np.array(second)
    a, b = np.cov(x.T), np.cov(y.T)
    # The root of a b has the roots of its eigenvalues, which are not negative.
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    mean = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum()
    return float(mean + np.trace(a) + np.trace(b) - 2 * roots)


def _pairs(images: list[Tensor | None]) -> list[tuple[int, int]]:
    """Numbers of readable images half the list apart."""
    half = len(images) // 2
    pairs = [(i, i + half) for i in range(half)]
    return [p for p in pairs if all(images[i] is not None for i in p)]


def _matched(first: Array, second: Array) -> Array:
    """Token of the second set for each of the first: five Sinkhorn steps in float64."""
    cost = np.linalg.norm(first[:, None] - second[None], axis=2)
    plan = np.exp(-cost / 0.1 + cost.min() / 0.1)
    for _ in range(5):
        plan = plan / plan.sum(axis=1, keepdims=True)
        plan = plan / plan.sum(axis=0, keepdims=True)
    return plan.argmax(axis=1)


def _changes(before: Factors, after: Factors) -> tuple[float, float, float, Array]:
    """Change of S and of L, share of tokens in place, L in the matched order."""
    match = _matched(before[0], after[0])
    ordered = after[0][match], after[1][:, match]
    of_s, of_l = (
        float(np.linalg.norm(y - x) / np.linalg.norm(x))
        for x, y in zip(before, ordered, strict=True)
    )
    return of_s, of_l, float((match == np.arange(NUM_QUERIES)).mean()), ordered[1]


def shifts(given: Given, results: list[Result]) -> list[Scores]:
    images = numbered(given.results.output.parent / "large")
    pixels = torch.stack([image for image in images if image is not None])

    def factors(left: int, top: int) -> list[Factors]:
        result = given.model(pixels[..., top : top + SIDE, left : left + SIDE])
        both = (x.double().numpy() for x in (result.sparse, result.localization))
        return list(zip(*both, strict=True))

    start = factors(0, 0)

    def means(names: str, rows: list[tuple[Any, ...]]) -> dict[str, float]:
        columns = list(zip(*rows, strict=True))
        return {name: float(np.mean(columns["slm".index(name)])) for name in names}

    scores: Scores = {"num_images": len(pixels)}
    for px in (0, *EQUIVARIANCE_SHIFTS):
        across, down = (
            [*map(_changes, start, factors(*shift))] for shift in ((px, 0), (0, px))
        )
        for way, rows in (
            ("_horizontal", across),
            ("_vertical", down),
            ("", across + down),
        ):
            for name, value in means("sl", rows).items():
                scores.setdefault(f"change_of_{name}{way}", {})[str(px)] = value
        same = means("m", across + down)["m"]
        scores.setdefault("identity_matches", {})[str(px)] = same
    numbers = [i for i, image in enumerate(images) if image is not None]
    of_number = dict(zip(numbers, start, strict=True))
    pairs = [(of_number[i], of_number[j]) for i, j in _pairs(images)]
    rows = [_changes(*pair) for pair in pairs] + [_changes(b, a) for a, b in pairs]
    for name, value in means("sl", rows).items():
        scores[f"change_of_{name}_other_image"] = value
    patch, moved = SIDE // 2, []  # a grid of 2 x 2
    for vertical, shift in enumerate(((patch, 0), (0, patch))):
        for before, after in zip(start, factors(*shift), strict=True):
            x = before[1].reshape(2, 2, -1)
            y = _changes(before, after)[3].reshape(2, 2, -1)
            x, y = (x[1], y[0]) if vertical else (x[:, 1], y[:, 0])
            moved.append(np.linalg.norm(y - x) / np.linalg.norm(x))
    scores["change_of_l_moved_back"] = {str(patch): float(np.mean(moved))}
    return [scores]


def crops(given: Given, results: list[Result]) -> list[Scores]:
    folder = given.results.output.parent / "large"
    files = ImageFiles(folder, sorted(p.name for p in folder.iterdir()))
    protocol = STABILITY.replace(**given.results.sizes)
    crops = ScaledCrops(files, protocol, STABILITY_SCALES, "bicubic", seed=0)
    images = numbered(folder)

    def unit(view: Tensor) -> Array:
        row = given.model.pooled(view[None], "sparse")[0].double().numpy()
        return row / np.linalg.norm(row)

    rows = {
        i: [unit(view) for view in crops[i].image]
        for i, image in enumerate(images)
        if image is not None
    }
    distances = [[1 - row @ views[0] for row in views[1:]] for views in rows.values()]
    means = np.mean(distances, axis=0)
    other = [1 - rows[i][0] @ rows[j][0] for i, j in _pairs(images)]
    names = map(str, STABILITY_SCALES)
    return [
        {
            "cosine_distance": dict(zip(names, means.tolist(), strict=True)),
            "cosine_distance_other_image": float(np.mean(other)),
            "num_images": len(rows),
        }
    ]


def _masked(root: Path) -> tuple[list[Tensor], list[Array]]:
    """Photos and their masks; an unreadable one is black, and all of it ignored."""
    images, masks = [], []
    for image, path in zip(
        numbered(root / "photos"), sorted((root / "masks").iterdir()), strict=True
    ):
        mask = np.array(Image.open(path)).astype(int)
        if image is None:  # counts nowhere
            image, mask = torch.zeros(3, SIDE, SIDE).byte(), np.full_like(mask, 255)
        images.append(image)
        masks.append(mask)
    return images, masks


def _strongest(given: Given, image: Tensor) -> Array:
    """The strongest token of each patch, at px."""
    weights = given.model(image[None]).localization[0].numpy()  # (4, num_queries)
    tokens = [max(range(NUM_QUERIES), key=lambda t: (w[t], -t)) for w in weights]
    return _px(np.reshape(tokens, (2, 2)))


def _px(patches: Array) -> Array:
    """Patches of 2 x 2 as px."""
    return np.kron(patches, np.ones((SIDE // 2, SIDE // 2), int))


QUARTERS = _px(np.arange(4).reshape(2, 2))


def places(given: Given, results: list[Result]) -> list[Scores]:
    images, masks = _masked(given.results.output.parent)
    parts = [_strongest(given, image) for image in images]
    grid = where_scores([QUARTERS] * len(masks), masks)
    scores: Scores = where_scores(parts, masks)
    scores |= {f"grid_{name}": value for name, value in grid.items()}
    return [{**scores, "num_images": 21 - 2}]


def objects(given: Given, results: list[Result]) -> list[Scores]:
    """Parts against instances; four clusters of four patches are these."""
    images, masks = _masked(given.results.output.parent)
    masks = [np.where(mask == 255, -1, mask) for mask in masks]
    tokens = [_strongest(given, image) for image in images]
    centre = np.zeros((SIDE, SIDE), dtype=int)
    centre[5:27, 5:27] = 1
    quarters = [QUARTERS] * len(masks)
    kinds = {
        "tokens": (tokens, [inner_area(part) for part in tokens]),
        "clusters": (quarters, [inner_area(part) for part in quarters]),
        "centre": ([centre] * len(masks), [centre == 1] * len(masks)),
    }
    scores: Scores = {
        f"{kind}_{name}": value
        for kind, found in kinds.items()
        for name, value in discovery_scores(*found, masks).items()
    }
    of_grid = {k: v for k, v in scores.items() if k.startswith("clusters_")}
    scores |= {k.replace("clusters", "grid"): v for k, v in of_grid.items()}
    return [{**scores, "num_images": 21 - 2}]


def prototypes_of_px(given: Given, results: list[Result]) -> list[Scores]:
    """Prototype of the strongest token of each px, as the stored heads tell it."""
    root = given.results.output.parent
    head = load_sparse_head(given.model)
    found, labels = [], []
    for name, image in readable_images(root / "scenes/images/val").items():
        result = given.model(image[None])
        embedded = head(result.sparse)[0].double().numpy()
        logits = embedded @ head.prototypes.weight.double().numpy().T
        maps = result.localization[0].half().double().numpy()
        found.append(clusters_at_px(maps, logits.argmax(axis=1), (2, 2), SIDE))
        mask = np.array(Image.open(root / "scenes/masks/val" / name)).astype(int)
        labels.append(np.where(mask == 255, -1, mask))
    return [scores_of_clusters(found, labels, NUM_PROTOTYPES, 3)]


def neighbours_of_patches(
    neighbours: int, given: Given, results: list[Result]
) -> list[Scores]:
    root = given.results.output.parent / "scenes"
    parts = []
    for part in ("train", "val"):
        pairs = []
        for name, image in readable_images(root / "images" / part).items():
            rows = given.model(image[None]).dense[0].double().numpy()
            labels = np.array(Image.open(root / "masks" / part / name)).astype(int)
            pairs.append((rows, np.where(labels == 255, -1, labels)))
        parts.append(pairs)
    train, test = parts
    scores = in_context_scores(
        train, test, (2, 2), 3, neighbours, IN_CONTEXT.temperature
    )
    return [scores]


def ratios(given: Given, results: list[Result]) -> list[Scores]:
    """Multiples of the encoder's time, of the stored times."""
    expected = dict(results[0].scores)
    names = [name[:-3] for name in expected if name[-3:] == "_ms" and "iqr" not in name]
    assert "encoder" in names and "decoder" in names
    for name in names:
        times, encoder = expected[f"{name}_ms"], expected["encoder_ms"]
        assert min(times.values()) > 0
        expected[f"{name}_x_encoder"] = {b: t / encoder[b] for b, t in times.items()}
    return [expected]


def curve(given: Given, results: list[Result]) -> list[Scores]:
    """Of the models one by one, which are found in the same folder."""
    stored = [r for _, r in given.results.stored()]
    expected: Scores = {}
    for name, task in (("accuracy", "linear"), ("fid", "reconstruction")):
        expected[name] = {
            str(r.provenance["num_queries"]): r.scores[name]
            for r in stored
            if r.task == task and r.data in ("mixed", "photos")
        }
    root = given.results.output.parent
    for result in stored:
        if result.task == "linear" and result.data == "mixed":
            assert _guessed(given, root / "mixed", result)[0] == result.scores
    assert expected["accuracy"].keys() == {"2", "4"}
    return [expected]


def texts(given: Given, results: list[Result]) -> list[Scores]:
    root = given.results.output.parent
    tower = load_text_tower(f"local-dir:{root / 'tower'}", None)
    (folder,) = given.results.output.glob("align-text-probe-*")
    sizes = json.loads((folder / "config.json").read_text())["sizes"]
    probe = AttentionProbe(**sizes).eval()
    safetensors.torch.load_model(probe, folder / "model.safetensors")

    def seen(image: Tensor) -> Array:
        tokens = given.model(image[None]).sparse.half().float()
        return probe(tokens)[0].double().numpy()

    def said(text: str) -> Array:
        return tower([text])[0].double().numpy()

    def classified(name: str) -> Scores:
        classes = sorted(path.name for path in (root / name / "val").iterdir())
        prompts = [[said(t(c)) for t in OPENAI_IMAGENET_TEMPLATES] for c in classes]
        means = [np.mean(rows, axis=0) for rows in prompts]
        means = [mean / np.linalg.norm(mean) for mean in means]
        hits = [
            _rank([seen(image) @ mean for mean in means], [classes.index(own)]) == 0
            for _, own, image in labelled(root / name, "val")
        ]
        return {"zero_shot_top1": float(np.mean(hits)), "num_images": len(hits)}

    return [
        dict(results[0].scores),  # of an epoch's end: tests of the training
        classified("mixed"),
        _recalled(root, seen, said),
        *_told_apart(root, seen, said),
        classified("single"),
    ]


def _rank(values: list[float], wanted: list[int]) -> int:
    """Rank of the best wanted value, of equal ones the first."""
    order = sorted(range(len(values)), key=lambda i: (-round(values[i], 6), i))
    return min(order.index(i) for i in wanted)


Embed = Callable[[Any], Array]


def _recalled(root: Path, seen: Embed, said: Embed) -> Scores:
    photos = readable_images(root / "photos")
    images = {name: seen(image) for name, image in photos.items()}
    with (root / "photos.csv").open(newline="") as file:
        rows = [(r["image"], r["caption"]) for r in csv.DictReader(file)]
    rows = sorted((r for r in rows if r[0] in images), key=lambda row: row[0])
    texts, names = [said(text) for _, text in rows], list(images)
    ranks = {
        "t2i": [
            _rank([text @ x for x in images.values()], [names.index(row[0])])
            for text, row in zip(texts, rows, strict=True)
        ],
        "i2t": [
            _rank(
                [x @ text for text in texts],
                [i for i, r in enumerate(rows) if r[0] == n],
            )
            for n, x in images.items()
        ],
    }
    scores: Scores = {
        f"{way}_recall_{k}": float(np.mean([rank < k for rank in found]))
        for way, found in ranks.items()
        for k in (1, 5)
    }
    return {**scores, "num_images": len(images)}


def _told_apart(root: Path, seen: Embed, said: Embed) -> list[Scores]:
    """Scores of Winoground and MMVP, which have the same images and other prompts."""
    rows, right = [], []
    images = [
        read(root / f"winoground/images/{i}_{j}.png") for i in range(11) for j in (0, 1)
    ]
    for i in range(11):
        pair = images[2 * i : 2 * i + 2]
        if any(image is None for image in pair):
            continue
        x, y = map(seen, pair)
        a, b = said(f"a {i}"), said(f"b {i}")
        more = partial(_more, 1e-6)
        text = more(a @ x, b @ x) and more(b @ y, a @ y)
        image = more(a @ x, a @ y) and more(b @ y, b @ x)
        rows.append((text, image, text and image))
        a, b = said(f"a photo of a {i}"), said(f"a photo of b {i}")
        right.append(more(a @ x, a @ y) and more(b @ y, b @ x))
    names = ("winoground_text", "winoground_image", "winoground_group")
    scores = dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))
    num = {"num_images": len(rows)}
    return [{**scores, **num}, {"mmvp": float(np.mean(right)), **num}]


def _more(least: float, first: float, second: float) -> bool:
    return bool(first > second + least)


def rankings(
    name: str, clusters: int, given: Given, results: list[Result]
) -> list[Scores]:
    """Every image of the test part ranks the others."""
    images = labelled(given.results.output.parent / name, "val")
    seen = [Seen(forms(given.model, i, clusters), label, []) for _, label, i in images]
    generator = torch.Generator().manual_seed(given.devices.seed)
    order = torch.randperm(len(seen), generator=generator).tolist()
    counts = [sum(s.label == t.label for s in seen) > 1 for t in seen]
    numbers = {"num_images": len(seen), "num_queries": sum(counts)}
    return [{**brute_force(seen, 2, SIDE, 1, order), **numbers}]
