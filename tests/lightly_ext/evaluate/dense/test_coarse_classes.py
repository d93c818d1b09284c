from __future__ import annotations

import pytest

from lightly_ext.evaluate.dense.coarse_classes import CITYSCAPES_27, COCO_STUFF_27

# Ids by name, from COCO-Stuff's list of labels.
KNOWN = {
    "person": (1, "person"),
    "bicycle": (2, "vehicle"),
    "traffic light": (10, "outdoor"),
    "giraffe": (25, "animal"),
    "suitcase": (33, "accessory"),
    "frisbee": (34, "sports"),
    "bottle": (44, "kitchen"),
    "cake": (61, "food"),
    "door": (71, "furniture"),
    "tv": (72, "electronic"),
    "microwave": (78, "appliance"),
    "toothbrush": (90, "indoor"),
    "banner": (92, "textile"),
    "branch": (94, "plant"),
    "bridge": (95, "building"),
    "cage": (99, "structural"),
    "carpet": (101, "floor"),
    "ceiling-tile": (103, "ceiling"),
    "clouds": (106, "sky"),
    "fog": (120, "water"),
    "grass": (124, "plant"),
    "hill": (127, "solid"),
    "metal": (132, "raw material"),
    "road": (149, "ground"),
    "rug": (152, "textile"),
    "salad": (153, "food stuff"),
    "stairs": (161, "furniture stuff"),
    "tree": (169, "plant"),
    "wall-wood": (177, "wall"),
    "window-blind": (180, "window"),
    "wood": (182, "solid"),
}


class TestCocoStuff27:
    def test_coco_stuff_27__each_id_once(self) -> None:
        ids = [i for values in COCO_STUFF_27.values() for i in values]
        assert len(COCO_STUFF_27) == 27
        assert sorted(ids) == list(range(1, 183))

    def test_coco_stuff_27__things_first(self) -> None:
        names = list(COCO_STUFF_27)
        things = [i for name in names[:12] for i in COCO_STUFF_27[name]]
        assert sorted(things) == list(range(1, 92))

    @pytest.mark.parametrize("fine", KNOWN)
    def test_coco_stuff_27__known_assignment(self, fine: str) -> None:
        number, coarse = KNOWN[fine]
        assert number in COCO_STUFF_27[coarse]


class TestCityscapes27:
    def test_cityscapes_27__all_that_is_no_void(self) -> None:
        assert [*CITYSCAPES_27.values()] == [(value,) for value in range(7, 34)]

    def test_cityscapes_27__known_values(self) -> None:
        known = {"road": 7, "tunnel": 16, "sky": 23, "car": 26, "bicycle": 33}
        assert {name: CITYSCAPES_27[name][0] for name in known} == known
