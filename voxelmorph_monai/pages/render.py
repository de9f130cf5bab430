"""Render a page as one file with its style and script, and a security policy that blocks all other content."""

import base64
import hashlib
import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

__all__ = ["data_uri", "encode", "render"]

_ASSETS = Path(__file__).parent / "assets"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,  # names of pairs are not trusted
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def encode(array: NDArray[Any]) -> str:
    """Encode the bytes of an array in base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def data_uri(slices: NDArray[np.uint8], *, exact: bool = False, quality: int = 80) -> str:
    """Data URI of a picture of slices ``(n, R, C)``, stacked from top to bottom: JPEG, or PNG for exact values."""
    stream = io.BytesIO()
    picture = Image.fromarray(slices.reshape(-1, slices.shape[-1]))
    if exact:
        picture.save(stream, "PNG", compress_level=6)
    else:
        picture.save(stream, "JPEG", quality=quality)
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def render(name: str, pictures: str = "data:", **context: Any) -> str:
    """Fill the template ``name.html``, and include ``common.css``, ``name.css`` and ``name.js``.

    Args:
        name: name of the template.
        pictures: sources from which the page may load pictures, as in a Content Security Policy.
        context: variables of the template.
    """
    style = "".join((_ASSETS / file).read_text(encoding="utf-8") for file in ("common.css", f"{name}.css"))
    script = (_ASSETS / f"{name}.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src {pictures}; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    template = _environment().get_template(f"{name}.html")
    return template.render(policy=policy, style=Markup(style), script=Markup(script), **context)
