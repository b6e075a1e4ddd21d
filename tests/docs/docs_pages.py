"""The pages of the documentation as tests read them: headings, links, and the commands of their bash blocks."""

import dataclasses
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "examples").rglob("*.md")), *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.S | re.M)


def name(page):
    """A page as one calls it: its path in the repository."""
    return page.relative_to(ROOT).as_posix()


def prose(page):
    """Its text without the blocks of code, whose lines are empty instead."""
    return FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text())


def slug(heading):
    """The anchor of a heading, as GitHub makes it, and the site too (mkdocs.yml, `slugify`)."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(page):
    return {slug(heading) for heading in re.findall(r"^#+ +(.+?) *#*$", prose(page), re.M)}


def links(page):
    """(line, target) of each link and each picture that is no address of the network."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    found = [(text.count("\n", 0, m.start()) + 1, m[1]) for m in re.finditer(r"\]\(([^()\s]+)\)", text)]
    return [(line, target) for line, target in found if not re.match(r"[a-z]+:", target)]


def spans(page):
    """What its text sets as code."""
    return re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose(page))


def spans_of_here(page):
    """What the second column of its tables sets as code: on a page about another trainer, our names."""
    rows = [line.split(" | ") for line in prose(page).splitlines() if line.startswith("| ")]
    return [span for row in rows if len(row) > 1 for span in re.findall(r"`([^`]+)`", row[1])]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    line: int
    words: tuple[str, ...]
    """Without variables before it, and without what follows a comment sign."""
    variables: tuple[str, ...] = ()
    source: str = ""
    """The whole line of the shell, in which other commands may stand."""

    @property
    def text(self):
        return " ".join(self.words).replace("'", "")

    def __str__(self):
        return f"{self.page}:{self.line}: {self.text}"


def commands(page):
    """The commands of a page's bash blocks, in their order; a word `$name` is what the block has set it to."""
    text, found = page.read_text(), []
    for block in (block for block in FENCE.finditer(text) if block[2] == "bash"):
        first, known = text.count("\n", 0, block.start()) + 2, {}
        for offset, line in shell_lines(block[3]):
            for words, variables in split(line):
                if not words:
                    known |= {f"${name}": value.split() for name, _, value in map(parts, variables)}
                words = tuple(filled for word in words for filled in known.get(word, [word]))
                found.append(Command(name(page), first + offset, words, variables, line))
    return found


def parts(variable):
    return variable.partition("=")


def shell_lines(block):
    """(offset of its first line, text) of each line of a shell, which may go on after a backslash or in quotes."""
    pending, start = "", 0
    for offset, line in enumerate(block.splitlines()):
        start = start if pending else offset
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # quotes that go on
            pending += "\n"
            continue
        if words:
            yield start, pending
        pending = ""
    assert not pending, f"quotes without an end: {pending}"


def split(line):
    """(words, variables) of each command of a line of a shell."""
    line = re.sub(r"\d>&\d", "", line)  # output that goes where other output goes
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found, words = [], []
    for word in [*lexer, ";"]:
        if word and set(word) <= set(";&|"):
            count = next((i for i, w in enumerate(words) if not re.match(r"[A-Za-z_]+=", w)), len(words))
            found.append((tuple(words[count:]), tuple(words[:count])))
            words = []
        else:
            words.append(word)
    return [part for part in found if part != ((), ())]
