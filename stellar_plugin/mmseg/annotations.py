"""Label files whose values are not the indices of classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine import fileio
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS
from PIL import Image

from stellar_plugin.state_dict import shown

IGNORED = 255


@TRANSFORMS.register_module()
class LoadConvertedAnnotations(LoadAnnotations):
    """Loads label maps, and makes classes of their values or colours.

    In place of `LoadAnnotations`, for masks of 0 and 255 (`values=[0, 255]`), one-based
    labels (`values=[1, 2, 3], ignored=[0]`), values of 16 bits, and colours
    (`values=[[0, 0, 0], [128, 0, 0]]`). Where a sample has no label file, as in
    inference, nothing is loaded.

    Args:
        values:
            Value of every class, in the order of the classes; or its colour, red, green
            and blue.
        ignored:
            Values or colours that are no class; a single value may stand alone.
        kwargs:
            backend_args, as of `LoadAnnotations`.

    Raises:
        ValueError: If there are more classes than labels of 8 bits can tell, a value is
            given twice, or values and colours are mixed.
    """

    def __init__(
        self,
        values: Sequence[int | Sequence[int]],
        ignored: int | Sequence[int | Sequence[int]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        ignored = [ignored] if isinstance(ignored, int) else ignored
        named = np.asarray([*values, *ignored]) if _alike(*values, *ignored) else None
        if named is None or len(values) > IGNORED:
            raise ValueError(
                f"values has to be up to {IGNORED} integers, or as many colours "
                f"[red, green, blue], and ignored more of the same; got {values} and "
                f"{ignored}."
            )
        self.colours = named.ndim == 2
        codes = _codes(named, self.colours)
        if len(np.unique(codes)) != len(codes):
            raise ValueError(f"A value stands twice in {values} and {ignored}.")
        self.order = np.argsort(codes)
        self.codes = codes[self.order]
        classes = np.full(len(codes), IGNORED, np.uint8)
        classes[: len(values)] = np.arange(len(values))
        self.classes = classes[self.order]

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds "gt_seg_map", uint8 with shape (height, width), to a sample.

        Args:
            results:
                What an mmsegmentation pipeline holds.

        Raises:
            ValueError: If the file has other values, or the data set converts too.
        """
        if "seg_map_path" in results:
            self._load_seg_map(results)
        return results

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        path = results["seg_map_path"]
        if results.get("reduce_zero_label") or results.get("label_map"):
            raise ValueError(
                "LoadConvertedAnnotations makes classes of values; set "
                "reduce_zero_label=False, and only metainfo.classes of a "
                "BaseSegDataset."
            )
        read = self._read(path)
        codes = _codes(read, self.colours)
        if read.dtype.kind == "f" and (codes != read).any():
            raise ValueError(f"'{path}' has values that are no integers.")
        places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        wrong = np.unique(codes[self.codes[places] != codes])
        if len(wrong):
            raise ValueError(
                f"'{path}' has {self._shown(wrong)}, which LoadConvertedAnnotations "
                "knows neither as values nor as ignored."
                + " The file has 1 bit per pixel: values are 0 and 1, however a viewer "
                "shows them." * (read.dtype == bool)
            )
        results["gt_seg_map"] = self.classes[places]
        results["seg_fields"].append("gt_seg_map")

    def _read(self, path: str) -> np.ndarray:
        content = fileio.get(path, backend_args=self.backend_args)
        with Image.open(io.BytesIO(content)) as image:
            if self.colours:
                return np.asarray(image.convert("RGB"))
            if len(image.getbands()) > 1:
                raise ValueError(
                    f"'{path}' has colours ({image.mode}); give "
                    "LoadConvertedAnnotations a colour per class, values=[[RED, GREEN, "
                    "BLUE], ...]."
                )
            return np.asarray(image)

    def _shown(self, codes: np.ndarray) -> str:
        """The first few values or colours, as text."""
        if not self.colours:
            return f"the values {shown(codes.tolist())}"
        colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
        return f"the colours {shown(colours.tolist())}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.codes)} values)"


def _alike(*values: int | Sequence[int]) -> bool:
    """Whether there are values, and all are integers or all are colours."""
    lengths = {len(value) if isinstance(value, list | tuple) else 0 for value in values}
    numbers = np.hstack(values).dtype if len(lengths) == 1 else np.dtype(object)
    if numbers.kind not in "biu":
        return False
    return lengths in ({0}, {3})


def _codes(values: np.ndarray, colours: bool) -> np.ndarray:
    """One integer per value, or per colour (..., 3)."""
    values = values.astype(np.int64)
    if not colours:
        return values
    return values[..., 0] << 16 | values[..., 1] << 8 | values[..., 2]
