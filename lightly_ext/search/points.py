"""What a collection of a Qdrant server holds of images: a point of each."""

from __future__ import annotations

import base64
import hashlib
import os
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightly_ext.search.entries import Entries
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.scoring import SKETCH_DIM, sketch_matrix, unit_length

# Payload that holds the name of a file.
FILE = ("file", "file_bytes")


def vector_config(card: IndexCard) -> Mapping[str, Any]:
    """How the server keeps vectors: whole ones on disk, and in memory some of bytes.

    Without graphs: candidates are found by a scan of the bytes, as in a folder.
    """
    from qdrant_client import models

    in_bytes = models.ScalarQuantization(
        scalar=models.ScalarQuantizationConfig(
            type=models.ScalarType.INT8, always_ram=True
        )
    )
    many = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)

    def vectors(size: int, **options: Any) -> Any:
        return models.VectorParams(
            size=size,
            distance=models.Distance.DOT,
            datatype=models.Datatype.FLOAT16,
            on_disk=True,
            hnsw_config=models.HnswConfigDiff(m=0),
            **options,
        )

    sketch_dim = min(card.dim, SKETCH_DIM)
    named = {
        "tokens": vectors(card.dim, multivector_config=many),
        "sketch": vectors(
            sketch_dim, multivector_config=many, quantization_config=in_bytes
        ),
        "mean": vectors(card.dim, quantization_config=in_bytes),
    }
    if card.cls_dim:
        named["cls"] = vectors(card.cls_dim, quantization_config=in_bytes)
    return named


def point_id(file: str) -> str:
    """What a point is found by, always the same for the same name."""
    return str(uuid.UUID(bytes=hashlib.sha256(os.fsencode(file)).digest()[:16]))


def to_points(entries: Entries) -> list[Any]:
    """The points of images: vectors by name, and all else as payload."""
    from qdrant_client import models

    tokens = unit_length(entries.tokens.cpu())
    sketch = tokens @ sketch_matrix(tokens.shape[-1])
    pooled = {"mean": unit_length(entries.mean.cpu())}
    if entries.cls.shape[1]:
        pooled["cls"] = unit_length(entries.cls.cpu())
    steps = (entries.maps.cpu() * 255).round().byte().numpy()
    points = []
    for i, file in enumerate(entries.files):
        # Tokens of zeros are like nothing: Qdrant shall not compare them.
        present = tokens[i].any(dim=1).nonzero().flatten()
        vectors: Any = {name: values[i].tolist() for name, values in pooled.items()}
        if len(present):
            vectors["tokens"] = tokens[i, present].tolist()
            vectors["sketch"] = sketch[i, present].tolist()
        payload = {
            **_file_payload(file),
            "present": present.tolist(),
            "masses": entries.masses[i].tolist(),
            "maps": base64.b64encode(steps[i].tobytes()).decode(),
            "size": entries.sizes[i].tolist(),
            "stamp": entries.stamps[i].tolist(),
            "hash": bytes(entries.hashes[i].tolist()).hex(),
        }
        points.append(
            models.PointStruct(id=point_id(file), vector=vectors, payload=payload)
        )
    return points


def _file_payload(file: str) -> dict[str, str]:
    """The name of a file; as bytes too where it is no text."""
    text = os.fsencode(file).decode(errors="backslashreplace")
    return {"file": text} | (
        {} if text == file else {"file_bytes": os.fsencode(file).hex()}
    )


def file_of(payload: Mapping[str, Any]) -> str:
    """The name of a file, of the payload of its point."""
    if "file_bytes" in payload:
        return os.fsdecode(bytes.fromhex(payload["file_bytes"]))
    return payload["file"]


def maps_of(text: str, num_tokens: int) -> Tensor:
    """Maps of a payload, float32 in [0, 1] with shape (num_tokens, num_patches)."""
    steps = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    return steps.unflatten(0, (num_tokens, -1)).float() / 255
