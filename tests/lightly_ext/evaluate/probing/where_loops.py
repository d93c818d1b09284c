"""Scores of localization, by loops over pixels, tokens and assignments."""

from __future__ import annotations

import itertools

import numpy as np


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


def brute_force(
    parts: list[np.ndarray], masks: list[np.ndarray], num_tokens: int = 4
) -> dict[str, float]:
    """All scores, px by px, from maps of parts; background 0, ignored 255.

    An image without a segment counts nowhere.
    """
    empty = [set(np.unique(mask)) <= {0, 255} for mask in masks]
    masks = [
        np.full_like(m, 255) if e else m for m, e in zip(masks, empty, strict=True)
    ]
    valid = [mask != 255 for mask in masks]
    roles = []
    for half in (1, 0):  # of even images, decided on odd ones
        role = []
        for token in range(num_tokens):
            won = [
                m[(p == token) & v]
                for p, m, v in list(zip(parts, masks, valid, strict=True))[half::2]
            ]
            values = np.concatenate(won)
            role.append((values > 0).sum() > (values == 0).sum())
        roles.append(np.array(role))
    rows = []
    for i, (part, mask, v) in enumerate(zip(parts, masks, valid, strict=True)):
        if empty[i]:
            continue
        part, foreground = part[v], mask[v] > 0
        segments = [mask[v] == s for s in np.unique(mask[v]) if s > 0]
        tokens = [part == t for t in range(num_tokens)]
        ious = np.array([[_iou(t, s) for s in segments] for t in tokens])
        subsets = itertools.product([False, True], repeat=num_tokens)
        # Lacking tokens or segments stand for nothing, with IoU 0.
        side = max(ious.shape)
        padded = np.zeros((side, side))
        padded[: ious.shape[0], : ious.shape[1]] = ious
        sums = [
            padded[list(order), range(side)].sum()
            for order in itertools.permutations(range(side))
        ]
        rows.append(
            {
                "foreground_iou": _iou(roles[i % 2][part], foreground),
                "foreground_iou_oracle": max(
                    _iou(np.array(chosen)[part], foreground) for chosen in subsets
                ),
                "token_overlap": ious.max(axis=0).mean(),
                "token_overlap_one_to_one": max(sums) / len(segments),
            }
        )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
