"""docs/metrics.md has every metric that the code writes, and no other."""

import ast
import functools
import re

import docs_pages as docs

from grpo_jax.run import speed

PACKAGE = docs.ROOT / "grpo_jax"
GROUPS = (
    "reward actor kl training rollout_corr dynamic response_length prompt_length "
    "alarms timing_s expected_s perf val"
)
NAME = re.compile(rf"(?:{'|'.join(GROUPS.split())})/[\w@/]+")
WITHOUT_GROUP = {"accuracy", "frac_reward_zero_std", "step", "epoch", "time"}
TEXTS = {"val/completions"}
"""TensorBoard's names of texts."""
OF_VALIDATION = {"val/accuracy", "val/pass@NAME", "val/num_errors"}
"""`Run._validate` makes them of the result's own names."""
COLUMNS = {"reward/NAME"}
"""Of the Parquet file of tokens."""


@functools.cache
def of_code():
    """Names in the code, what is filled in as NAME or PHASE. Those that reports read are written elsewhere."""
    names, phases = set(), set(speed.PHASES)
    for path in PACKAGE.rglob("*.py"):
        if "report" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                names |= {name for name in [as_name(node)] if NAME.fullmatch(name)}
            elif isinstance(node, ast.Call):
                function = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
                if function in ("timers", "_timers", "timer", "_timer"):
                    phases.add(first)
                elif function == "_mean_max_min":
                    names |= {f"{first}/{part}" for part in ("mean", "max", "min")}
    names |= {f"timing_s/{phase}" for phase in phases if phase} | OF_VALIDATION
    return names - {"timing_s/PHASE", "val/NAME"} - TEXTS - COLUMNS


def as_name(node):
    """The text of a string, with a capital word in the place of what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    words = [
        part.value
        if isinstance(part, ast.Constant)
        else "PHASE"
        if ast.unparse(part.value) == "phase"
        else "NAME"
        for part in node.values
    ]
    return "".join(words)


def of_page():
    """Names in the first cells of the tables; `/std` and `_max` after a name stand for one like it."""
    names = set()
    for line in docs.prose(docs.DOCS / "metrics.md").splitlines():
        last = ""
        for span in re.findall(r"`([^`]+)`", line.split(" | ")[0]) if line.startswith("| `") else []:
            if span.startswith("/"):
                span = last.rpartition("/")[0] + span
            elif span.startswith("_"):
                span = last.rpartition("_")[0] + span
            last = span
            names.add(span)
    return {name.replace("pass@k", "pass@NAME") for name in names if "/" in name or name in WITHOUT_GROUP}


def test_the_page_has_what_the_code_writes_and_no_more():
    written, told = of_code(), of_page() - WITHOUT_GROUP
    assert len(told) > 60
    assert sorted(written - told) == []
    assert sorted(told - written) == []


def test_names_without_a_group_are_told():
    assert of_page() >= WITHOUT_GROUP


def test_what_a_page_abbreviates_is_read():
    told = of_page()
    assert {
        "reward/std",
        "training/token_age_max",
        "timing_s/old_log_prob",
        "rollout_corr/is_weight_max",
    } <= told


def test_what_the_code_fills_in_is_read():
    written = of_code()
    assert {
        "reward/NAME/mean",
        "expected_s/PHASE",
        "timing_s/gen",
        "prompt_length/min",
        "timing_s/ref",
    } <= written


def test_other_pages_name_metrics_that_there_are():
    known = of_code() | TEXTS | COLUMNS
    for page in docs.PAGES:
        if docs.name(page).startswith(("docs/decisions", "CHANGELOG")):
            continue
        is_of_others = docs.name(page).startswith("docs/from_")
        for span in docs.spans_of_here(page) if is_of_others else docs.spans(page):
            name = re.sub(r"^reward/\w+/mean$", "reward/NAME/mean", span.replace("pass@k", "pass@NAME"))
            assert not NAME.fullmatch(name) or name in known, (docs.name(page), span)
