from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from lightly_ext.evaluate.features import check_present
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.text.tasks import best_ranks
from lightly_ext.evaluate.text.tower import load_text_tower
from lightly_ext.evaluate.text.zero_shot import (
    ZeroShot,
    class_embeddings,
    folder_class_names,
    read_class_names,
)
from tests.lightly_ext.data.streams.shard_files import write_tar
from tests.lightly_ext.evaluate.small import write_classes
from tests.lightly_ext.evaluate.text.small_text import write_tower


def test_class_embeddings__as_open_clip(tmp_path: Path) -> None:
    tower = load_text_tower(write_tower(tmp_path), None)
    names = ["cat", "fire truck"]
    expected = open_clip.build_zero_shot_classifier(
        tower.model, tower.tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    found = class_embeddings(names, tower)
    torch.testing.assert_close(found, expected.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_best_ranks__scikit_learn(k: int) -> None:
    torch.manual_seed(0)
    similarities, labels = torch.randn(50, 7), torch.randint(7, (50,))
    expected = top_k_accuracy_score(labels, similarities, k=k, labels=range(7))
    ranks = best_ranks(similarities, labels[:, None] == torch.arange(7))
    assert float((ranks < k).double().mean()) == pytest.approx(expected)


def test_best_ranks__of_equal_columns_the_first_goes_first() -> None:
    values = torch.tensor([[1.0, 3, 1, 3, 3]]).expand(5, 5)
    assert best_ranks(values, torch.eye(5).bool()).tolist() == [3, 0, 4, 1, 2]
    assert best_ranks(values[:1], torch.tensor([[1, 0, 1, 1, 1]]) > 0).tolist() == [1]


def test_score__one_class_is_no_choice() -> None:
    files = ImageFiles(Path("x"), ["0.jpg", "1.jpg"], [0, 0], ["cat"])
    task = ZeroShot("set", files, "", ["cat"])
    images = torch.eye(2)
    scores = task.score(images, torch.arange(2), lambda t: torch.ones(len(t), 2))
    assert scores == ({"zero_shot_top1": 1.0}, {"zero_shot_top1": 1.0}, 2)


@pytest.mark.parametrize("num_classes", [4, 8])
def test_score__readable_images_and_chance(num_classes: int) -> None:
    labels = [i % num_classes for i in range(2 * num_classes)]
    names = [f"{i}" for i in range(num_classes)]
    files = ImageFiles(Path("x"), [f"{i}.jpg" for i in labels], labels, names)
    task = ZeroShot("set", files, "", names)

    def embed(prompts: list[str]) -> torch.Tensor:
        return torch.eye(num_classes).repeat_interleave(
            len(prompts) // num_classes, dim=0
        )

    readable = torch.tensor([1, 3, 4, num_classes + 2])
    images = torch.eye(num_classes)[torch.tensor(labels)[readable]]
    images[1] = images[1].roll(1)
    scores = task.score(images, readable, embed)
    assert scores.num == 4
    assert scores.values["zero_shot_top1"] == 3 / 4
    assert scores.chance["zero_shot_top1"] == 1 / num_classes
    assert ("zero_shot_top5" in scores.values) == (num_classes > 5)


def test_folder_class_names() -> None:
    assert folder_class_names(["apple_pie", "hot  dog"]) == ["apple pie", "hot dog"]
    ids = [f"n{i:08d}" for i in range(1000)]
    names = folder_class_names(ids)
    assert (names[0], names[999]) == ("tench", "toilet paper")
    with pytest.raises(ValueError, match="give a file --class_names"):
        folder_class_names(ids[:100])


def test_read_class_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("n2 great white shark, white shark\nn1 tench\nhot dog\ta hot dog\n")
    folders = ["hot dog", "n1", "n2"]
    assert read_class_names(path, folders) == [
        "a hot dog",
        "tench",
        "great white shark",
    ]
    with pytest.raises(ValueError, match=r"no name for 1 of 2 classes \(n3\)"):
        read_class_names(path, ["n1", "n3"])
    with pytest.raises(FileNotFoundError, match="names of classes"):
        read_class_names(tmp_path / "none", folders)


def test_find__test_part(tmp_path: Path) -> None:
    data = write_classes(tmp_path, classes=("a_cat", "dog"), num=3)
    task = ZeroShot.find(str(data), None, limit=4)
    assert task.class_names == ["a cat", "dog"]
    assert len(task.files) == 4
    assert task.files.root.name == "val"


def test_find__numbers_of_tars(tmp_path: Path) -> None:
    names = [f"{number}.{suffix}" for number in (0, 1) for suffix in ("png", "cls")]
    for part in ("train", "val"):
        files = {name: name[:1].encode() for name in names}
        write_tar(tmp_path / f"{part}-0.tar", files)
    with pytest.raises(ValueError, match=r"numbers for classes \('0', \.\.\.\)"):
        ZeroShot.find(str(tmp_path), None, None)
    listed = tmp_path / "names.txt"
    listed.write_text("0 tench, Tinca tinca\n1 goldfish\n")
    task = ZeroShot.find(str(tmp_path), str(listed), None)
    assert task.class_names == ["tench", "goldfish"]
    check_present(task.files)
