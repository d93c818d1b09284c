"""Pages in one look, from the templates that extend page.html."""

from __future__ import annotations

import base64
import io
from typing import Any

import jinja2
from PIL import Image


def render_page(template: str, **values: Any) -> str:
    """Fills a page that needs nothing else; every value in it is escaped.

    Args:
        template:
            Path of the template in `lightly_ext`.
        values:
            What the template names; it needs all of them, the title among them.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightly_ext", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def data_uri(image: Image.Image, kind: str, **options: int) -> str:
    """A picture as the address of itself.

    Args:
        image:
            The picture.
        kind:
            Its format, "png" or "jpeg".
        options:
            Of `Image.save`.
    """
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind};base64,{text}"
