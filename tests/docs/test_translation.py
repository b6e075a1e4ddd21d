"""README.zh.md and docs/zh/ say what the English pages say, as far as that can be seen without knowing Chinese."""

import dataclasses
import itertools
import pathlib
import posixpath
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRANSLATIONS = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.zh.md"), *ROOT.glob("docs/zh/**/*.md")]
)
HEADING = re.compile(r"#{1,6} ")
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"`((?:[^`\n]|\n(?!\s*\n))+)`")
"""Code within a paragraph, which may be broken at the end of a line."""
COMMENT = re.compile(r"\s+# .*$")


@dataclasses.dataclass
class Section:
    """From a heading to the next. What stands before the first heading is a section without one."""

    heading: str = ""
    code: list[str] = dataclasses.field(default_factory=list)
    """Lines of fenced blocks, their fences included; those of a block with a language, without comments."""
    tables: list[int] = dataclasses.field(default_factory=list)
    """Rows of each."""
    text: list[str] = dataclasses.field(default_factory=list)
    """All other lines, tables included."""

    @property
    def level(self) -> int:
        return len(self.heading) - len(self.heading.lstrip("#"))

    @property
    def names(self) -> set[str]:
        return {" ".join(name.split()) for name in NAME.findall("\n".join(self.text))}

    def links(self, page: str) -> set[str]:
        return {english(target) for target in targets("\n".join(self.text), page)}


def sections(text: str) -> list[Section]:
    found, fence, is_table = [Section()], "", False
    for line in text.splitlines():
        section = found[-1]
        if fence or line.startswith("```"):
            section.code.append(COMMENT.sub("", line) if fence not in ("", "```") else line.rstrip())
            fence = "" if fence and line == "```" else fence or line
            is_table = False
            continue
        if HEADING.match(line):
            found.append(section := Section(line))
        if line.startswith("|"):
            section.tables = section.tables if is_table else [*section.tables, 0]
            section.tables[-1] += 1
        is_table = line.startswith("|")
        section.text.append(line)
    return found


def targets(text: str, page: str) -> list[str]:
    """Where a page's links lead, in their order: addresses as they are, files from the root of the repository."""
    folder = posixpath.dirname(page)
    return [
        link if "://" in link or link.startswith("#") else posixpath.normpath(posixpath.join(folder, link))
        for link in LINK.findall(text)
    ]


def english(page: str) -> str:
    return page.replace("docs/zh/", "docs/").replace(".zh.md", ".md")


def first_difference(original: str, translated: str, page: str) -> str:
    """In one line, with its heading; "" where there is none. Args: page: the path of the translation."""
    pairs = list(itertools.zip_longest(sections(original), sections(translated), fillvalue=Section("(none)")))
    for ours, theirs in pairs:
        if ours.level != theirs.level or "(none)" in (ours.heading, theirs.heading):
            return f"heading {ours.heading!r}: the translation has {theirs.heading!r} there"
    for ours, theirs in pairs:
        place = f"{ours.heading!r} (there {theirs.heading!r})"
        for one, other in itertools.zip_longest(ours.code, theirs.code, fillvalue="(none)"):
            if one != other:
                return f"{place}: command or output {one!r}: the translation has {other!r}"
        if ours.tables != theirs.tables:
            return f"{place}: tables of {ours.tables} rows: the translation's have {theirs.tables}"
        for what, one, other in (
            ("links to", ours.links(english(page)), theirs.links(page)),
            ("names", ours.names, theirs.names),
        ):
            if one != other:
                lacks, has = sorted(one - other), sorted(other - one)
                return f"{place}: {what}: the translation lacks {lacks}, and has {has}"
    return ""


@pytest.mark.parametrize("page", TRANSLATIONS)
def test_the_translation_is_in_step(page):
    original, translated = (ROOT / english(page)).read_text(), (ROOT / page).read_text()
    difference = first_difference(original, translated, page)
    assert not difference, f"{english(page)}, {difference}; change {page} together with {english(page)}"


@pytest.mark.parametrize("page", TRANSLATIONS)
def test_each_page_begins_with_the_other_language(page):
    original = english(page)
    to_translation, *_ = targets((ROOT / original).read_text(), original)
    to_original, *others = targets((ROOT / page).read_text(), page)
    assert (to_translation, to_original) == (page, original)
    has_translation = {english(one) for one in TRANSLATIONS}
    assert not has_translation & set(others), "links to an English page that is there in Chinese"


def test_there_are_translations():
    assert {"README.zh.md", "docs/zh/journey.md"} <= set(TRANSLATIONS)


ORIGINAL = """# Title

[中文](README.zh.md)

Read [this](docs/journey.md#there) and [that](https://example.org), set `a.b=1
--c`.

## Go

```bash
pip install x   # all of it
```

| key | what |
|---|---|
| `k` | first |
"""
TRANSLATED = """# 标题

[English](README.md)

阅读[这个](docs/zh/journey.md#there)和[那个](https://example.org)，设置 `a.b=1 --c`。

## 开始

```bash
pip install x   # 全部
```

| 键 | 说明 |
|---|---|
| `k` | 第一 |
"""


def test_a_faithful_translation_has_no_difference():
    assert first_difference(ORIGINAL, TRANSLATED, "README.zh.md") == ""


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("## Go", "### Go", "heading '### Go': the translation has '## 开始' there"),
        ("## Go\n", "", "heading '(none)': the translation has '## 开始' there"),
        ("| first |\n", "| first |\n\n## More\n", "heading '## More': the translation has '(none)' there"),
        ("install x ", "install y ", "command or output 'pip install y': the translation has 'pip install x'"),
        ("```bash", "```python", "'```python': the translation has '```bash'"),
        ("all of it\n", "all of it\npip check\n", "'pip check': the translation has '```'"),
        ("| `k` | first |\n", "| `k` | first |\n| l | second |\n", "tables of [4] rows: the translation"),
        ("#there", "#here", "lacks ['docs/journey.md#here'], and has ['docs/journey.md#there']"),
        ("example.org", "example.com", "lacks ['https://example.com'], and has ['https://example.org']"),
        ("a.b=1", "a.b=2", "'# Title' (there '# 标题'): names: the translation lacks ['a.b=2 --c']"),
        ("`k`", "`m`", "'## Go' (there '## 开始'): names: the translation lacks ['m'], and has ['k']"),
    ],
)  # fmt: skip
def test_what_is_changed_on_one_side_is_named(old, new, said):
    assert ORIGINAL.count(old) == 1
    difference = first_difference(ORIGINAL.replace(old, new), TRANSLATED, "README.zh.md")
    assert said in difference and "\n" not in difference


def test_output_is_compared_to_the_letter():
    """A "#" in what a program prints is no comment."""
    one, other = "# T\n```\nloss # 1\n```\n", "# T\n```\nloss # 2\n```\n"
    assert "'loss # 1': the translation has 'loss # 2'" in first_difference(one, other, "README.zh.md")
