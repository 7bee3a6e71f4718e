"""What the pages that people read have in common: one layout and style, no network, no times."""

import functools
from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(__file__).parent


def fill(template: str, **values: Any) -> str:
    """One self-contained HTML page; equal values give equal bytes.

    Args: template: name of a file in this folder, which extends page.html.jinja. values: what it shows, and functions.
    """
    return _templates().get_template(template).render(**values)


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
