"""One HTML file that needs no other: styles, scripts and data are in it, and it runs no script but its own.

Data are gzipped JSON in base64, so that nothing that a model has written is ever read as HTML or as a script;
texts of the templates are escaped. A Content-Security-Policy names the scripts by their hashes and forbids all
others, and everything that would be fetched.
"""

import base64
import functools
import gzip
import hashlib
import importlib.resources
import json
from typing import Any

import jinja2

ASSETS = importlib.resources.files("grpo_jax.report") / "assets"
LIBRARY = "uPlot-1.6.32.min"
"""The plotting library (docs/decisions/0019)."""


def render(template: str, scripts: tuple[str, ...], data: Any, **values: Any) -> str:
    """Returns the HTML of a page.

    Args: template, scripts: names in assets/; data: JSON for the scripts; values: for the template.
    """
    texts = [_asset(name) for name in scripts]
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in texts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"
    styles = _asset(f"{LIBRARY}.css") + _asset("page.css")
    page = _environment().get_template(template)
    return page.render(
        policy=policy, styles=styles, scripts=texts, data=packed(data), license=_asset("uPlot-LICENSE"), **values
    ).encode("utf-8", "replace").decode()  # fmt: skip


def packed(data: Any) -> str:
    """JSON, gzipped, in base64."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def unpacked(text: str) -> Any:
    """What `packed` packed."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


@functools.cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    load = jinja2.FunctionLoader(_asset)
    return jinja2.Environment(
        loader=load, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
