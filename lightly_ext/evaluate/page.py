"""Pages in one look, from the templates that extend page.html."""

from __future__ import annotations

from typing import Any

import jinja2


def render_page(template: str, **values: Any) -> str:
    """Fills a page that needs nothing else; every value in it is escaped.

    Args:
        template:
            Path of the template in this package.
        values:
            What the template names; it needs all of them, the title among them.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightly_ext.evaluate", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
