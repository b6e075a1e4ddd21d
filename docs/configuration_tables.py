"""Writes the tables of docs/configuration.md, which are made from the lines of grpo_jax/config/sections.py:

python docs/configuration_tables.py
"""

import dataclasses
import json
import re
from pathlib import Path

from grpo_jax.algorithm.advantages import ADVANTAGE_ESTIMATORS
from grpo_jax.algorithm.kl import KL_ESTIMATORS
from grpo_jax.algorithm.policy_losses import POLICY_LOSSES
from grpo_jax.config.rules import shown
from grpo_jax.config.sections import ARRAYS, FIXED, FREE, KEYS, LENGTH, SECTIONS, Key

PAGE = Path(__file__).with_name("configuration.md")
TABLE = re.compile(r"(<!-- keys of (\w+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
ON_RESUME = {FIXED: "", FREE: "free", LENGTH: "free, see above", ARRAYS: "never"}
FUNCTIONS = {
    "algorithm.adv_estimator": ADVANTAGE_ESTIMATORS,
    "algorithm.policy_loss": POLICY_LOSSES,
    "algorithm.kl_estimator": KL_ESTIMATORS,
}
HEAD = ["key", "default", "range", "unit", "what", "read with", "on resume"]


def with_tables(page: str) -> str:
    """Returns the text of the page with the tables as they are to be."""
    return TABLE.sub(lambda match: f"{match[1]}{table(match[2])}{match[3]}", page)


def table(section: str) -> str:
    """The table of a section, in Markdown."""
    fields = dataclasses.fields(SECTIONS[section])
    rows = [row(section, field.name) for field in fields]
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(section: str, name: str) -> list[str]:
    """The cells of one key."""
    key, functions = KEYS[f"{section}.{name}"], FUNCTIONS.get(f"{section}.{name}")
    values = allowed(key) if functions is None else ", ".join(f"`{f}`" for f in (*functions, "FILE.py:NAME"))
    read_with = re.sub(
        r"[a-z_.]+(=|!=|>)[\w|-]+", lambda term: f"`{term[0]}`".replace("|", "` or `"), key.only
    )
    default = f"`{written(key.default)}`"
    return [f"`{name}`", default, values, key.unit, key.meaning, read_with, ON_RESUME[key.resume]]


def written(value: object) -> str:
    """A value as one writes it in a configuration file."""
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))})"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def allowed(key: Key) -> str:
    """The values that a key may have by itself."""
    if key.rule:
        return key.rule
    if key.choices:
        choices = [f"`{choice}`" for choice in key.choices]
        return f"{'among ' if isinstance(key.default, tuple) else ''}{', '.join(choices)}"
    bounds = {"≥": key.at_least, ">": key.above, "≤": key.at_most, "<": key.below}
    texts = [f"{sign} {shown(bound)}" for sign, bound in bounds.items() if bound is not None]
    if key.besides is not None:
        texts.append(f"or {key.besides[0]}: {key.besides[1]}")
    return ", ".join(texts) or ("`True`, `False`" if key.type is bool else "any")


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
