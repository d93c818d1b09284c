"""Zero-shot classification: the class whose prompts are closest to an image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.datasets import WORDNET_ID, find_classification_set
from lightly_ext.evaluate.text.tasks import (
    EmbedTexts,
    Scores,
    TextTask,
    best_ranks,
    similarities,
)

TOP = (1, 5)


@dataclass(frozen=True)
class ZeroShot(TextTask):
    """Images of classes.

    Attributes:
        class_names: A name for each class, as it stands in the prompts.
    """

    class_names: Sequence[str]

    @classmethod
    def find(cls, data: str, class_names: str | None, limit: int | None) -> ZeroShot:
        """Finds the test part of a classification set.

        Args:
            data:
                What `find_classification_set` finds.
            class_names:
                File for `read_class_names`. None takes the names of the folders, and
                ImageNet's for its 1000 WordNet ids.
            limit:
                Number of images, None for all.

        Raises:
            ValueError: If folders are WordNet ids of another set, or classes are the
                numbers of a table, without a file.
        """
        found = find_classification_set(data)
        classes = found.test.classes
        if class_names is None:
            if found.test.rows is not None and all(map(str.isdecimal, classes)):
                raise ValueError(
                    f"'{data}' has numbers for classes ('{classes[0]}', ...), which are"
                    " no prompts: give a file --class_names with lines such as "
                    "'0 tench'."
                )
            names = folder_class_names(classes)
        else:
            names = read_class_names(Path(class_names), classes)
        rule = (
            f"{len(OPENAI_IMAGENET_TEMPLATES)} prompts of CLIP for each class, mean of "
            "their embeddings, cosine similarity"
        )
        return cls(found.name, found.test.limited(limit), rule, names)

    def score(
        self, images: Tensor, readable: Tensor, embed_texts: EmbedTexts
    ) -> Scores:
        """Accuracy of the first guess and, with more than five classes, of five."""
        classifier = class_embeddings(self.class_names, embed_texts)
        labels = self.files.label_tensor[readable].to(images.device)
        num_classes = len(self.class_names)
        tops = [k for k in TOP if k < num_classes or k == 1]
        wanted = labels[:, None] == torch.arange(num_classes, device=labels.device)
        ranks = best_ranks(similarities(images, classifier), wanted)
        values = {f"zero_shot_top{k}": float((ranks < k).double().mean()) for k in tops}
        chance = {f"zero_shot_top{k}": k / num_classes for k in tops}
        return Scores(values, chance, len(images))


def class_embeddings(class_names: Sequence[str], embed_texts: EmbedTexts) -> Tensor:
    """One unit vector per class, float32 (num_classes, dim).

    The same as `open_clip.build_zero_shot_classifier`, on embeddings that are cached.

    Args:
        class_names:
            Names of the classes.
        embed_texts:
            Embeds the prompts.
    """
    templates = OPENAI_IMAGENET_TEMPLATES
    prompts = embed_texts([t(name) for name in class_names for t in templates])
    means = prompts.unflatten(0, (len(class_names), len(templates))).mean(dim=1)
    return F.normalize(means, dim=1)


def folder_class_names(folders: Sequence[str]) -> list[str]:
    """Names of classes from the names of their folders.

    Args:
        folders:
            Sorted names of the folders.

    Raises:
        ValueError: If they are WordNet ids, but not the 1000 of ImageNet.
    """
    if all(map(WORDNET_ID.fullmatch, folders)):
        if len(folders) == len(IMAGENET_CLASSNAMES):  # in the order of the ids
            return list(IMAGENET_CLASSNAMES)
        raise ValueError(
            f"The folders of the {len(folders)} classes are WordNet ids "
            f"('{folders[0]}', ...), which are no prompts: give a file --class_names "
            "with lines such as 'n01440764 tench'."
        )
    return [re.sub(r"[_\s]+", " ", folder).strip() for folder in folders]


def read_class_names(path: Path, folders: Sequence[str]) -> list[str]:
    """Names of classes from a file.

    Args:
        path:
            Text file, one class per line: its folder, a tab or a space, its name. Of
            several names, separated by commas, the first one counts.
        folders:
            Names of the folders.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not name all classes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}' with names of classes.")
    names = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        folder, _, name = line.partition("\t" if "\t" in line else " ")
        names[folder.strip()] = name.partition(",")[0].strip()
    missing = [folder for folder in folders if not names.get(folder)]
    if missing:
        raise ValueError(
            f"'{path}' has no name for {len(missing)} of {len(folders)} classes "
            f"({', '.join(missing[:5])}): it needs a line 'FOLDER NAME' for each."
        )
    return [names[folder] for folder in folders]
