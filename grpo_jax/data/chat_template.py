"""A tokenizer's chat template, with the run's date and the run's arguments."""

import ast
import dataclasses
import datetime
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo_jax.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "data.chat_template_args"
TODAY = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?("[^"]*"|'[^']*')\s*\)""")
"""In a chat template: today's date, in the form between the quotation marks."""
FOR_TEMPLATES = ("tools", "documents")
"""Arguments of `apply_chat_template` that it hands to the template; with the others it is called here."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """From messages to text."""

    tokenizer: "PreTrainedTokenizerBase"
    text: str
    """The template itself, in Jinja."""
    arguments: Mapping[str, Any]
    """For it, beside the messages."""

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text of a chat, generation prompt included.

        Raises: jinja2.TemplateError: the template refuses, say, a system message or a second user turn.
        """
        text = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.text,
            tokenize=False,
            add_generation_prompt=True,
            **self.arguments,
        )
        return str(text)


def open_template(
    tokenizer: "PreTrainedTokenizerBase", date: datetime.datetime | None, arguments: Sequence[str]
) -> ChatTemplate:
    """The template of a tokenizer that has one.

    Args:   date: as in `encode_prompts`; arguments: "NAME=VALUE" each.
    Raises: ConfigError: an argument of another form, or that the template does not know.
    """
    text = tokenizer.get_chat_template()
    read = read_arguments(arguments)
    own = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - set(FOR_TEMPLATES)
    for name, value in read.items():
        if name in own or name == "messages":
            raise ConfigError(KEY, f"{name}={value}", f"{name} is set by grpo_jax itself")
        if not re.search(rf"\b{name}\b", text):
            rule = f"the chat template of {tokenizer.name_or_path or 'this model'} reads no {name}"
            raise ConfigError(KEY, f"{name}={value}", rule)
    return ChatTemplate(tokenizer, _dated(text, date), read)


def read_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Reads ("enable_thinking=false", ...): values in JSON, or as Python writes them, or else plain words.

    Raises: ConfigError: one is not of that form, or named twice.
    """
    read: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(KEY, argument, "must be like 'NAME=VALUE', an argument of the chat template")
        if name in read:
            raise ConfigError(KEY, argument, f"{name} is there twice")
        read[name] = _read_value(value)
    return read


def _read_value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


def _dated(template: str, date: datetime.datetime | None) -> str:
    """The template, which takes `date` for today's; None: the day it is.

    transformers lets nobody choose what `strftime_now` returns, and hands no function to a template. So the date
    takes the place of the call.
    """
    if date is None:
        return template
    return TODAY.sub(lambda call: json.dumps(date.strftime(call[1][1:-1]), ensure_ascii=False), template)
