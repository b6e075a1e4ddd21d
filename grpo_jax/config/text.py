"""Text of models, users and files as it may be printed: nothing in it acts on a terminal."""

import re
from collections.abc import Sequence

HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Characters that cannot be seen, or that would move others or the cursor."""


def visible(text: str) -> str:
    """A text with signs in the place of hidden characters; line breaks stay, after a sign."""
    return printable(text).replace("\n", "⏎\n")


def printable(text: str) -> str:
    """The same, with line breaks as they are."""
    return HIDDEN.sub(lambda match: _sign(match[0]), text)


def verbatim(texts: Sequence[str]) -> str:
    """Markdown that shows texts as they are, with rules between them."""
    return "\n\n---\n\n".join("    " + text.replace("\n", "\n    ") for text in texts)


def _sign(character: str) -> str:
    if character == "\n":
        return character
    return chr(0x2400 + ord(character)) if character < " " else f"⟨U+{ord(character):04X}⟩"
