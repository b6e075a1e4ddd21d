"""Rows of a dataset become prompts in token ids, and prompts come out in shuffled batches.

Rows are those of `data/schema.py`. The order of the batches follows from the seed alone, so that an iterator
restored from its state goes on exactly where the saved one stood.
"""

import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax.config import ConfigError
from grpo_jax.data.chat_template import ChatTemplate, open_template, read_arguments
from grpo_jax.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any one of them holds the vocabulary


@dataclasses.dataclass(frozen=True)
class PromptCounts:
    """What became of the rows of a dataset."""

    num_rows: int
    num_filtered: int
    """Left out, being longer than the limit."""
    num_truncated: int
    """Kept, without their left end."""


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a local Hugging Face folder; never asks the hub.

    Raises:
        ConfigError: no such folder, no tokenizer in it, or one that transformers cannot load.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError("model.path", str(folder), "there is no such folder")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        rule = f"has no tokenizer: one of {', '.join(TOKENIZER_FILES)} must be there"
        raise ConfigError("model.path", str(folder), rule)
    # That transformers finds no PyTorch is no news here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # damaged files raise anything, from KeyError to the Rust side's own
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError("model.path", str(folder), f"its tokenizer cannot be loaded: {reason}") from None


def encode_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int,
    overlong: str,
    key: str,
    date: datetime.datetime | None = None,
    template_args: Sequence[str] = (),
) -> tuple[list[Prompt], PromptCounts]:
    """Encodes rows: chat messages through the chat template, generation prompt included; strings as they are.

    Args:
        rows: what `read_rows` or `check_rows` returned.
        max_prompt_length: tokens, the chat template included.
        overlong: "filter" drops longer prompts, "truncate" cuts their left end.
        key: the configuration key that named the rows, for messages.
        date: what a chat template takes for today's; None: the day it is.
        template_args: for the chat template, "NAME=VALUE" each.

    Returns:
        The prompts, in the order of the rows, and how many were too long.

    Raises:
        ConfigError: messages without a chat template, an argument that it does not know, a prompt of no tokens,
            or no prompt left.
    """
    prompts, num_overlong = [], 0
    encoded = _encode_rows(rows, tokenizer, key, date, template_args)
    for row, (text, ids) in zip(rows, encoded, strict=True):
        if len(ids) > max_prompt_length:
            num_overlong += 1
            if overlong == "filter":
                continue
            ids = ids[-max_prompt_length:]
            text = str(tokenizer.decode(ids))
        prompts.append(
            Prompt(
                prompt_id=row["prompt_id"],
                token_ids=tuple(ids),
                text=text,
                ground_truth=row["reward_model"]["ground_truth"],
                data_source=row["data_source"],
                extra_info=row["extra_info"],
            )
        )
    if not prompts:
        raise ConfigError(
            "data.max_prompt_length",
            max_prompt_length,
            f"leaves none of the {len(rows)} prompts of {key}; raise it, or set "
            "data.overlong_prompts='truncate'",
        )
    is_filter = overlong == "filter"
    return prompts, PromptCounts(
        num_rows=len(rows),
        num_filtered=num_overlong if is_filter else 0,
        num_truncated=0 if is_filter else num_overlong,
    )


def sft_examples(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_length: int,
    max_response_length: int,
    date: datetime.datetime | None = None,
    template_args: Sequence[str] = (),
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Encodes worked examples: prompts as in `encode_prompts`, responses `extra_info.answer` and EOS.

    Returns:
        Pairs (prompt ids, response ids), and how many examples were dropped because one part was too long.

    Raises:
        ConfigError: a row without an answer, a tokenizer without EOS, or no example left.
    """
    key = "sft.train_files"
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ConfigError("model.path", tokenizer.name_or_path, "its tokenizer has no EOS token")
    for row in rows:
        answer = row["extra_info"].get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise ConfigError(key, row["prompt_id"], "this row has no extra_info.answer to learn from")
    answers = [row["extra_info"]["answer"] for row in rows]
    responses = tokenizer(answers, add_special_tokens=False)["input_ids"]
    pairs = [
        (prompt_ids, [*response_ids, eos_id])
        for (_, prompt_ids), response_ids in zip(
            _encode_rows(rows, tokenizer, key, date, template_args), responses, strict=True
        )
    ]
    kept = [
        (prompt, response)
        for prompt, response in pairs
        if len(prompt) <= max_prompt_length and len(response) <= max_response_length
    ]
    if not kept:
        rule = (
            f"none of the {len(rows)} examples fits data.max_prompt_length={max_prompt_length} and "
            f"data.max_response_length={max_response_length}"
        )
        raise ConfigError(key, len(rows), rule)
    return kept, len(pairs) - len(kept)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of token ids and ground truths: equal for the same prompts in the same order."""
    hashed = hashlib.sha256()
    for prompt in prompts:
        hashed.update(json.dumps([prompt.token_ids, prompt.ground_truth]).encode())
    return hashed.hexdigest()


def _encode_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    key: str,
    date: datetime.datetime | None,
    template_args: Sequence[str],
) -> list[tuple[str, list[int]]]:
    """Returns (text, token ids) of each row's prompt.

    Templates are rendered one by one, to name the row that one refuses; the tokenizer, where the time goes,
    gets all texts of a kind at once.
    """
    read_arguments(template_args)
    encoded: list[tuple[str, list[int]]] = [("", [])] * len(rows)
    chats = [i for i, row in enumerate(rows) if not isinstance(row["prompt"], str)]
    plain = [i for i, row in enumerate(rows) if isinstance(row["prompt"], str)]
    texts_of = {i: rows[i]["prompt"] for i in plain}
    if chats:
        _check_has_template(tokenizer, rows[chats[0]]["prompt_id"])
        template = open_template(tokenizer, date, template_args)
        texts_of |= {i: _render(rows[i], template, key) for i in chats}
    for indices, is_chat in ((chats, True), (plain, False)):
        if not indices:
            continue
        texts = [texts_of[i] for i in indices]
        # A rendered template holds its special tokens already.
        ids = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
        for i, text, text_ids in zip(indices, texts, ids, strict=True):
            if not text_ids:
                raise ConfigError(key, rows[i]["prompt_id"], "this prompt encodes to no tokens")
            encoded[i] = (text, text_ids)
    return encoded


def _check_has_template(tokenizer: "PreTrainedTokenizerBase", prompt_id: str) -> None:
    if tokenizer.chat_template is None:
        rule = f"its tokenizer has no chat template, and prompt {prompt_id} is a list of chat messages"
        raise ConfigError("model.path", tokenizer.name_or_path, rule)


def _render(row: Mapping[str, Any], template: ChatTemplate, key: str) -> str:
    import jinja2

    try:
        return template.render(row["prompt"])
    except jinja2.TemplateError as error:
        raise ConfigError(key, row["prompt_id"], f"the chat template refuses its messages: {error}") from None


class PromptIterator:
    """Endless batches of P prompts, shuffled anew each epoch.

    What is left at the end of an epoch and fills no batch is dropped; shuffled, it is others each time.

    Raises:
        ConfigError: fewer prompts than one batch holds.
    """

    def __init__(self, prompts: Sequence[Prompt], *, batch_size: int, seed: int, shuffle: bool):
        if len(prompts) < batch_size:
            rule = f"must be at most the number of prompts, {len(prompts)}"
            raise ConfigError("data.train_batch_size", batch_size, rule)
        import grain

        self._dataset = grain.MapDataset.source(prompts).seed(seed)
        if shuffle:
            self._dataset = self._dataset.shuffle()
        self._sizes = {"num_prompts": len(prompts), "batch_size": batch_size}
        self.steps_per_epoch = len(prompts) // batch_size
        self._num_taken = 0
        self._reorders: list[list[int]] = []

    def __iter__(self) -> "PromptIterator":
        return self

    def __next__(self) -> list[Prompt]:
        epoch, batch = divmod(self._num_taken, self.steps_per_epoch)
        size, places = self._sizes["batch_size"], self._places(epoch)
        self._num_taken += 1
        # An index beyond the number of prompts is of a later epoch, which is shuffled in another way.
        first = epoch * self._sizes["num_prompts"]
        return [self._dataset[first + int(i)] for i in places[batch * size : (batch + 1) * size]]

    def _places(self, epoch: int) -> np.ndarray:
        """[number of prompts] which place of the shuffled epoch stands where, after what `reordered` changed."""
        places = np.arange(self._sizes["num_prompts"])
        for num_taken, seed in self._reorders:
            of_epoch, batch = divmod(num_taken, self.steps_per_epoch)
            if of_epoch == epoch:
                rest = places[batch * self._sizes["batch_size"] :]  # a view
                np.random.default_rng(seed).shuffle(rest)
        return places

    def state(self) -> dict[str, Any]:
        """Returns the position, as JSON can hold it."""
        return self._sizes | {"grain": {"next_index": self._num_taken}, "reorders": list(self._reorders)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `state` returned, on an iterator made with the same arguments.

        Raises:
            ConfigError: the number of prompts or the batch size has changed since.
        """
        for name, key in (("num_prompts", "data.train_files"), ("batch_size", "data.train_batch_size")):
            if state[name] != self._sizes[name]:
                rule = f"the checkpoint was made with {name.replace('_', ' ')} {state[name]}"
                raise ConfigError(key, self._sizes[name], rule)
        self._num_taken = state["grain"]["next_index"]
        self._reorders = [list(reorder) for reorder in state.get("reorders", ())]  # older ones have none


def reordered(state: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A position of `PromptIterator` from which on the prompts that are left of the epoch come in another order.

    Each of them still comes at most once. Args: state: as `PromptIterator.state` returned it; seed: of the order.
    """
    reorders = [*state.get("reorders", ()), [state["grain"]["next_index"], seed]]
    return {**state, "reorders": reorders}
