"""The 27 classes of label-free segmentation, of COCO-Stuff and of Cityscapes.

COCO-Stuff's hierarchy joins its 91 things (of which COCO labels 80) into 12 classes and
its 91 kinds of stuff into 15; published scores count these 27. Of Cityscapes' 34 labels
published scores count those that are no void.

- Things and Stuff Classes in Context, 2018, https://arxiv.org/abs/1612.03716
- PiCIE, 2021, https://arxiv.org/abs/2103.17070, which first scored on both
"""

from __future__ import annotations

from collections.abc import Mapping

# Ids of COCO-Stuff, 1 to 182. Its label images store the id less one, 255 for none.
COCO_STUFF_27: Mapping[str, tuple[int, ...]] = {
    "electronic": (*range(72, 78),),
    "appliance": (*range(78, 84),),
    "food": (*range(52, 62),),
    "furniture": (*range(62, 72),),
    "indoor": (*range(84, 92),),
    "kitchen": (*range(44, 52),),
    "accessory": (*range(26, 34),),
    "animal": (*range(16, 26),),
    "outdoor": (*range(10, 16),),
    "person": (1,),
    "sports": (*range(34, 44),),
    "vehicle": (*range(2, 10),),
    "ceiling": (102, 103),
    "floor": (101, *range(114, 119)),
    "food stuff": (121, 122, 153, 170),
    "furniture stuff": (98, 107, 108, 110, 112, 123, 130, 133, 156, 161, 165),
    "raw material": (100, 132, 139, 143),
    "textile": (92, 93, 104, 105, 109, 131, 137, 141, 152, 167, 168),
    "wall": (*range(171, 178),),
    "window": (180, 181),
    "building": (95, 96, 128, 151, 158, 166),
    "ground": (111, 125, 126, 136, 140, 144, 145, 147, 149, 154, 159),
    "plant": (94, 97, 119, 124, 129, 134, 142, 163, 169),
    "sky": (106, 157),
    "solid": (127, 135, 150, 160, 162, 182),
    "structural": (99, 113, 138, 146, 164),
    "water": (120, 148, 155, 178, 179),
}
# Values of Cityscapes' labelIds; 0 to 6 are void.
CITYSCAPES_27: Mapping[str, tuple[int, ...]] = {
    name: (value,)
    for value, name in enumerate(
        (
            *("road", "sidewalk", "parking", "rail track"),
            *("building", "wall", "fence", "guard rail", "bridge", "tunnel"),
            *("pole", "polegroup", "traffic light", "traffic sign"),
            *("vegetation", "terrain", "sky", "person", "rider"),
            *("car", "truck", "bus", "caravan", "trailer", "train"),
            *("motorcycle", "bicycle"),
        ),
        start=7,
    )
}
