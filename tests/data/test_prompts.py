"""Prompts: token ids as the chat template has them, length limits, batches that can be resumed."""

import dataclasses
import datetime
import json

import pytest

from grpo_jax.config import ConfigError
from grpo_jax.data.prompts import (
    PromptCounts,
    PromptIterator,
    encode_prompts,
    fingerprint,
    load_tokenizer,
    reordered,
    sft_examples,
)
from grpo_jax.data.schema import check_rows
from grpo_jax.types import Prompt

KEY = "data.train_files"


def rows_of(*prompts, answer="The answer is #### 5"):
    raw = [
        {
            "data_source": "s",
            "prompt": p,
            "reward_model": {"ground_truth": "5"},
            "extra_info": {"answer": answer},
        }
        for p in prompts
    ]
    return check_rows(raw, name="train", source="here", key=KEY)


def user(text):
    return [{"role": "user", "content": text}]


def encode(rows, tokenizer, limit=1000, overlong="filter"):
    return encode_prompts(rows, tokenizer, max_prompt_length=limit, overlong=overlong, key=KEY)


def without_template(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    return tokenizer


DATED = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = 'never' %}"
    '{% endif %}Today is {{ day }}, {{ strftime_now( format = "%H o\'clock" ) }}: {{ messages[0].content }}'
)


def test_a_template_that_prints_the_date_gets_the_one_of_the_run(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = DATED
    rows = rows_of(user("Why?"), "On strftime_now('%Y') it is")
    date = datetime.datetime(2024, 2, 29, 7, 30)
    limits = dict(max_prompt_length=1000, overlong="filter", key=KEY)
    (chat, plain), _ = encode_prompts(rows, tokenizer, date=date, **limits)
    assert chat.text == "Today is 29 Feb 2024, 07 o'clock: Why?"
    assert plain.text == "On strftime_now('%Y') it is"
    assert tokenizer.decode(chat.token_ids) == chat.text
    ((prompt, _), *_), _ = sft_examples(rows, tokenizer, 1000, 1000, date)
    assert tuple(prompt) == chat.token_ids
    # Without one it is the day that it is, which may end while the test runs.
    before = datetime.datetime.now()
    (today, _), _ = encode_prompts(rows, tokenizer, **limits)
    days = {f"Today is {day:%d %b %Y, %H} o'clock: Why?" for day in (before, datetime.datetime.now())}
    assert today.text in days


def test_the_fingerprint_is_of_ids_and_ground_truths_in_their_order():
    one, two = (Prompt(f"train/{i}", (i, 2), "text", "5", "s", {}) for i in (1, 7))
    others = [
        [two, one],
        [one],
        [one, dataclasses.replace(two, token_ids=(7, 3))],
        [one, dataclasses.replace(two, token_ids=(7,))],
        [one, dataclasses.replace(two, ground_truth="6")],
    ]
    assert len({fingerprint(prompts) for prompts in [[one, two], *others]}) == 6
    same = [dataclasses.replace(one, prompt_id="other/1", extra_info={"index": 1}), two]
    assert fingerprint(same) == fingerprint([one, two])


def test_messages_go_through_the_chat_template_and_strings_do_not(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, *user("What is 2 + 3?")]
    prompts, counts = encode(rows_of("What is 2 + 3?", chat, "Why?"), tokenizer)
    assert counts == PromptCounts(num_rows=3, num_filtered=0, num_truncated=0)
    assert [p.prompt_id for p in prompts] == ["train/0", "train/1", "train/2"]
    assert prompts[0].text == "What is 2 + 3?"
    assert prompts[2].text == "Why?"
    assert prompts[1].text == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\nWhat is 2 + 3?<|end|>\n<|start|>assistant\n"
    )
    for prompt in prompts:
        assert tokenizer.decode(prompt.token_ids) == prompt.text
    start = tokenizer.convert_tokens_to_ids("<|start|>")
    assert prompts[1].token_ids.count(start) == 3  # special tokens are tokens, not characters
    assert list(prompts[1].token_ids) == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert (prompts[0].ground_truth, prompts[0].data_source) == ("5", "s")
    assert prompts[0].extra_info == {"answer": "The answer is #### 5"}


def test_a_tokenizers_own_special_tokens_go_before_strings_only(tokenizer_folder):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<|pad|> $A", special_tokens=[("<|pad|>", 0)]
    )
    (plain, chat), _ = encode(rows_of("xyz", user("xyz")), tokenizer)  # <|pad|>, id 0, in the place of a BOS
    assert (plain.token_ids[0], len(plain.token_ids)) == (0, 4)
    assert 0 not in chat.token_ids


def test_a_prompt_of_exactly_the_limit_is_kept_and_one_token_more_is_not(tokenizer):
    rows = rows_of("xyz", "wxyz")  # no merges: a token a character
    prompts, counts = encode(rows, tokenizer, limit=3)
    assert [p.text for p in prompts] == ["xyz"]
    assert counts == PromptCounts(num_rows=2, num_filtered=1, num_truncated=0)


def test_truncation_cuts_the_left_end(tokenizer):
    prompts, counts = encode(rows_of("xyz", "vwxyz"), tokenizer, limit=3, overlong="truncate")
    assert [p.text for p in prompts] == ["xyz", "xyz"]
    assert prompts[0].token_ids == prompts[1].token_ids
    assert counts == PromptCounts(num_rows=2, num_filtered=0, num_truncated=1)


def test_no_prompt_left_names_the_limit(tokenizer):
    with pytest.raises(ConfigError, match=r"data.max_prompt_length=2: leaves none of the 1 prompts"):
        encode(rows_of("xyz"), tokenizer, limit=2)


def test_messages_without_a_chat_template_are_refused(tokenizer_folder):
    with pytest.raises(ConfigError, match=r"model.path=.*no chat template, and prompt train/1"):
        encode(rows_of("Plain", user("Hi")), without_template(tokenizer_folder))
    assert encode(rows_of("Plain"), without_template(tokenizer_folder))[0][0].text == "Plain"


def test_a_chat_that_the_template_refuses_is_named(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}x"
    )
    with pytest.raises(ConfigError, match=r"data.train_files='train/1': .* no system messages"):
        encode(rows_of(user("Hi"), [{"role": "system", "content": "Hi"}]), tokenizer)


def test_load_tokenizer_refuses_folders_without_one(tokenizer_folder, tmp_path):
    assert load_tokenizer(tokenizer_folder).eos_token == "<|end|>"
    with pytest.raises(ConfigError, match=r"model.path=.*no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"model.path=.*has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match=r"model.path=.*cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_sft_response_is_the_answer_and_eos(tokenizer):
    examples, num_dropped = sft_examples(rows_of(user("What is 2 + 3?")), tokenizer, 1000, 1000)
    ((prompt_ids, response_ids),) = examples
    assert num_dropped == 0
    assert tokenizer.decode(prompt_ids).endswith("<|end|>\n<|start|>assistant\n")
    assert tokenizer.decode(response_ids) == "The answer is #### 5<|end|>"
    assert response_ids[-1] == tokenizer.eos_token_id


def test_sft_limits_hold_for_both_parts_eos_included(tokenizer):
    rows = rows_of("xyz", "wxyz", answer="wxyz")  # a token a character, and EOS
    examples, num_dropped = sft_examples(rows, tokenizer, 3, 5)
    assert (len(examples), num_dropped) == (1, 1)
    with pytest.raises(ConfigError, match=r"sft.train_files=2: none of the 2 examples fits .*length=4$"):
        sft_examples(rows, tokenizer, 4, 4)


def test_sft_refuses_a_row_without_an_answer_and_a_tokenizer_without_eos(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    for answer in (None, "", 5):
        rows = rows_of("Good") + rows_of("Bad", answer=answer)
        with pytest.raises(
            ConfigError, match=r"sft.train_files='train/0': this row has no extra_info.answer"
        ):
            sft_examples(rows, tokenizer, 10, 10)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"model.path=.*no EOS token"):
        sft_examples(rows_of("Good"), tokenizer, 10, 10)


def prompts_named(count):
    return [Prompt(f"p/{i}", (i,), "", "", "", {}) for i in range(count)]


def take(iterator, count):
    return [[prompt.prompt_id for prompt in next(iterator)] for _ in range(count)]


def make_iterator(count=11, batch_size=3, seed=0, shuffle=True):
    return PromptIterator(prompts_named(count), batch_size=batch_size, seed=seed, shuffle=shuffle)


def test_an_epoch_holds_each_prompt_at_most_once_and_drops_the_remainder():
    iterator = make_iterator()
    assert iterator.steps_per_epoch == 3  # 11 // 3, two prompts dropped
    first, second = take(iterator, 3), take(iterator, 3)
    for epoch in (first, second):
        names = [name for batch in epoch for name in batch]
        assert [len(batch) for batch in epoch] == [3, 3, 3]
        assert len(set(names)) == 9
    assert first != second
    assert take(make_iterator(), 6) == first + second
    assert take(make_iterator(seed=1), 6)[:3] not in (first, second)


def test_without_shuffling_every_epoch_has_the_files_order():
    expected = [["p/0", "p/1", "p/2"], ["p/3", "p/4", "p/5"]]
    assert take(make_iterator(7, shuffle=False), 4) == expected * 2


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_a_restored_iterator_goes_on_where_it_was_saved(steps):
    iterator = make_iterator()
    take(iterator, steps)
    state = json.loads(json.dumps(iterator.state()))
    expected = take(iterator, 7)  # across two epoch edges
    restored = make_iterator()
    take(restored, 2)
    restored.restore(state)
    assert take(restored, 7) == expected
    assert restored.state() == iterator.state()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_reordered_epoch_has_each_prompt_once_and_the_next_ones_are_as_they_were(steps, shuffle):
    plain = take(make_iterator(12, shuffle=shuffle), 8)  # four steps an epoch
    iterator = make_iterator(12, shuffle=shuffle)
    assert take(iterator, steps) == plain[:steps]
    state = json.loads(json.dumps(reordered(iterator.state(), seed=1)))
    iterator.restore(state)
    rest = take(iterator, 8 - steps)
    assert rest[: 4 - steps] != plain[steps:4] and rest[4 - steps :] == plain[4:]
    names = lambda batches: sorted(name for batch in batches for name in batch)
    assert names(rest[: 4 - steps]) == names(plain[steps:4])
    # Another seed is another order, and a second time goes on from the first.
    others = [
        reordered(iterator.state() | {"grain": state["grain"], "reorders": []}, seed=2),
        reordered(state, seed=2),
    ]
    for other in others:
        iterator.restore(other)
        again = take(iterator, 4 - steps)
        assert again != rest[: 4 - steps] and names(again) == names(plain[steps:4])


def test_a_reordered_iterator_goes_on_where_it_was_saved():
    iterator = make_iterator()
    iterator.restore(reordered(iterator.state(), seed=1))
    take(iterator, 2)
    state = json.loads(json.dumps(iterator.state()))
    expected = take(iterator, 3)
    restored = make_iterator()
    restored.restore(state)
    assert take(restored, 3) == expected


def test_the_order_at_the_end_of_an_epoch_is_of_the_next_one():
    plain, iterator = take(make_iterator(12), 8), make_iterator(12)
    take(iterator, 4)
    iterator.restore(reordered(iterator.state(), seed=1))
    assert take(iterator, 4) != plain[4:]


def test_a_state_from_before_there_were_orders_is_restored():
    iterator = make_iterator()
    take(iterator, 2)
    state = {name: value for name, value in iterator.state().items() if name != "reorders"}
    expected = take(iterator, 3)
    iterator.restore(state)
    assert take(iterator, 3) == expected


def test_a_state_of_other_sizes_is_refused():
    state = make_iterator().state()
    with pytest.raises(ConfigError, match=r"data.train_files=12: .*num prompts 11"):
        make_iterator(12).restore(state)
    with pytest.raises(ConfigError, match=r"data.train_batch_size=4: .*batch size 3"):
        make_iterator(batch_size=4).restore(state)


def test_fewer_prompts_than_a_batch_are_refused():
    assert make_iterator(3).steps_per_epoch == 1
    with pytest.raises(ConfigError, match=r"data.train_batch_size=3: must be at most .* 2$"):
        make_iterator(2)


THINKING = (
    "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<none>{% endif %}"
)


def with_arguments(tokenizer_folder, *arguments):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = THINKING
    settings = {"max_prompt_length": 1000, "overlong": "filter", "key": KEY, "template_args": arguments}
    (prompt,), _ = encode_prompts(rows_of(user("Hi")), tokenizer, **settings)
    (example,), _ = sft_examples(rows_of(user("Hi")), tokenizer, 1000, 1000, None, arguments)
    assert list(prompt.token_ids) == example[0]
    return prompt.text


def test_arguments_reach_the_template(tokenizer_folder):
    assert with_arguments(tokenizer_folder) == "Hi"
    for no in ("False", "false", "0", "None", "null"):  # the word "false" would be true in a template
        assert with_arguments(tokenizer_folder, f"enable_thinking={no}") == "Hi<none>"
    for yes in ("True", "true", "1", "high"):
        assert with_arguments(tokenizer_folder, f"enable_thinking={yes}") == "Hi"


def test_arguments_that_nothing_reads_are_refused(tokenizer_folder):
    for argument, rule in (
        ("enable_thinkin=False", r"enable_thinkin=False': the chat template of .* reads no enable_thinkin$"),
        ("enable", "must be like 'NAME=VALUE'"),
        ("a b=1", "must be like 'NAME=VALUE'"),
        ("tokenize=True", "tokenize is set by grpo_jax itself"),
        ("messages=[]", "messages is set by grpo_jax itself"),
    ):
        with pytest.raises(ConfigError, match=rule) as caught:
            with_arguments(tokenizer_folder, argument)
        assert caught.value.key == "data.chat_template_args"
    with pytest.raises(ConfigError, match="enable_thinking is there twice"):
        with_arguments(tokenizer_folder, "enable_thinking=1", "enable_thinking=0")
