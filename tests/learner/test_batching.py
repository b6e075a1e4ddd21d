import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithm import loss as losses
from grpo_jax.config import ActorSection, parse_config
from grpo_jax.learner import batching
from grpo_jax.types import Completion, Prompt, RolloutGroup

PAD = 0


def make_group(prompt_ids, *completions, prompt_id="train/0"):
    """Each completion is a pair (token ids, log-probabilities)."""
    prompt = Prompt(prompt_id, tuple(prompt_ids), "", "", "test", {})
    return RolloutGroup(
        prompt, tuple(Completion(tuple(t), tuple(lp), "", "stop", 0) for t, lp in completions)
    )


GROUPS = [
    make_group([5, 6, 7], ([8, 9], [-0.5, -1.5]), ([PAD], [-2.5])),  # the second is just an EOS, which is pad
    make_group([4], ([3, PAD, 2, PAD], [-1.0, -2.0, -3.0, -4.0]), ([1, PAD], [-0.25, -0.75])),
]


def actor(**changes):
    section = ActorSection(
        num_minibatches=1,
        num_epochs=1,
        micro_batch_size_per_device=4,
        micro_batch_tokens_per_device=0,
        logits_chunk_tokens=1024,
    )
    return dataclasses.replace(section, **changes)


# Rows


def test_layout_by_hand():
    batch = batching.make_train_batch(GROUPS, pad_id=PAD, max_length=5)

    def head(field):
        field = np.asarray(field)
        assert field.shape == (4, 16)
        assert not field[:, 5:].any()
        return field[:, :5].tolist()

    assert head(batch.tokens) == [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [4, 3, 0, 2, 0], [4, 1, 0, 0, 0]]
    assert head(batch.positions) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert head(batch.segment_ids) == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert head(batch.completion_mask) == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert head(batch.sampler_logprobs) == [
        [0, 0, 0, -0.5, -1.5],
        [0, 0, 0, -2.5, 0],
        [0, -1, -2, -3, -4],
        [0, -0.25, -0.75, 0, 0],
    ]
    assert not np.any(batch.advantages)
    assert batch.old_logprobs is None and batch.ref_logprobs is None
    dtypes = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    dtypes = {name: str(value.dtype) for name, value in dtypes.items() if value is not None}
    assert dtypes == {
        "tokens": "int32",
        "positions": "int32",
        "segment_ids": "int32",
        "completion_mask": "float32",
        "sampler_logprobs": "float32",
        "advantages": "float32",
    }


def test_padding_is_the_pad_token_and_rows_are_bucketed():
    batch = batching.make_train_batch(
        [make_group(range(1, 16), ([7, 8], [-1, -1]))], pad_id=9, max_length=None
    )
    assert batch.tokens.shape == (1, 32)
    assert batch.tokens[0, 14:19].tolist() == [15, 7, 8, 9, 9]


def test_sft_batch_equals_the_train_batch_but_for_the_sampler():
    rows = [(g.prompt.token_ids, c.token_ids) for g in GROUPS for c in g.completions]
    sft = batching.make_sft_batch(rows, pad_id=PAD)
    train = batching.make_train_batch(GROUPS, pad_id=PAD, max_length=None)
    assert not np.any(sft.sampler_logprobs)
    expected = dataclasses.replace(train, sampler_logprobs=sft.sampler_logprobs)
    jax.tree.map(np.testing.assert_array_equal, sft, expected)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "same number of completions; they have \\[\\]"),
        ([make_group([1])], "at least one row"),
        ([GROUPS[0], make_group([1], ([2], [-1.0]))], "they have \\[1, 2\\]"),
        (
            [make_group([1], ([2, 3], [-1.0]), prompt_id="a/7")],
            "completion 0 of prompt a/7: 2 .* but 1 sampler",
        ),
        ([make_group([], ([2], [-1.0]))], "0 prompt and 1 completion tokens"),
        ([make_group([1], ([], []))], "1 prompt and 0 completion tokens"),
        ([make_group([1, 2, 3], ([4, 5], [-1.0, -1.0]))], "3 prompt and 2 completion tokens are more than 4"),
    ],
)
def test_refuses_rollouts_that_do_not_fit(groups, message):
    with pytest.raises(ValueError, match=message):
        batching.make_train_batch(groups, pad_id=PAD, max_length=4 if "more" in message else None)


def test_sft_refuses_an_empty_response():
    with pytest.raises(ValueError, match="example 1: 2 prompt and 0 completion"):
        batching.make_sft_batch([([1], [2]), ([1, 2], [])], pad_id=PAD)


# Advantages


def test_advantages_lie_on_completion_tokens():
    batch = batching.make_train_batch(GROUPS, pad_id=PAD, max_length=None)
    advantages = np.array([[1.5, -1.5], [0.5, -0.25]])
    filled = batching.add_advantages(batch, advantages).advantages
    assert filled.dtype == np.float32
    assert filled[:, :5].tolist() == [
        [0, 0, 0, 1.5, 1.5],
        [0, 0, 0, -1.5, 0],
        [0, 0.5, 0.5, 0.5, 0.5],
        [0, -0.25, -0.25, 0, 0],
    ]
    assert not filled[:, 5:].any()


@pytest.mark.parametrize("shape", [(2, 1), (4,), (3, 2), (1, 2)])
def test_refuses_advantages_of_another_batch(shape):
    batch = batching.make_train_batch(GROUPS, pad_id=PAD, max_length=None)
    with pytest.raises(ValueError, match=r"\(4, 16\)"):
        batching.add_advantages(batch, np.ones(shape))


# Mini-batches


def numbered_batch(num_rows):
    batch = batching.make_sft_batch([([1], [100 + i] * (i + 1)) for i in range(num_rows)], pad_id=PAD)
    return dataclasses.replace(batch, ref_logprobs=jnp.asarray(batch.tokens, jnp.float32))


def ids(batch):
    return [int(row[1]) - 100 for row in batch.tokens]


def test_minibatches_deal_out_every_row_once():
    batch = numbered_batch(12)
    parts = batching.split_minibatches(batch, 3, seed=1)
    assert [part.tokens.shape for part in parts] == [(4, 16)] * 3
    dealt = [i for part in parts for i in ids(part)]
    assert sorted(dealt) == list(range(12)) and dealt != list(range(12))
    for part in parts:  # every field moved with its row
        assert part.completion_mask.sum(axis=1).tolist() == [i + 1 for i in ids(part)]
        np.testing.assert_array_equal(part.ref_logprobs, part.tokens)
        assert part.old_logprobs is None


def test_minibatches_depend_on_the_seed_alone():
    batch = numbered_batch(12)

    def order(seed):
        return [i for part in batching.split_minibatches(batch, 2, seed=seed) for i in ids(part)]

    assert order(3) == order(3)
    assert order((0, 5, 1)) == order((0, 5, 1))
    assert order(3) != order(4)
    assert order((0, 5, 0)) != order((0, 5, 1))


def test_one_minibatch_keeps_the_order():
    (part,) = batching.split_minibatches(numbered_batch(5), 1, seed=1)
    assert ids(part) == [0, 1, 2, 3, 4]


def test_refuses_uneven_minibatches():
    with pytest.raises(ValueError, match="5 rows do not divide into 2"):
        batching.split_minibatches(numbered_batch(5), 2, seed=1)


# Packing


def test_places_by_hand():
    """Rows of 96 tokens hold three sequences at most. Longest first, each where it leaves the least room."""
    places = batching.find_places(np.array([10, 50, 40, 46, 4, 1]), 96)
    # 50 opens row 0; 46 fills it; 40 opens row 1, then 10 and 4 join it: three; 1 opens row 2.
    assert places.rows.tolist() == [1, 0, 1, 0, 1, 2]
    assert places.starts.tolist() == [40, 0, 0, 50, 50, 0]
    assert places.numbers.tolist() == [2, 1, 1, 2, 3, 1]


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="97 tokens does not fit a row of 96"):
        batching.find_places(np.array([3, 97]), 96)


def test_packing_loses_nothing_and_wastes_little():
    rng = np.random.default_rng(0)
    lengths = rng.integers(30, 400, 300)
    places = batching.find_places(lengths, 1024)
    used = np.zeros((places.rows.max() + 1, 1024), int)
    for row, start, length in zip(places.rows, places.starts, lengths, strict=True):
        used[row, start : start + length] += 1
    assert used.max() == 1 and used.sum() == lengths.sum()
    assert used.mean() > 0.97


def test_a_row_holds_no_more_sequences_than_attention_is_told_of():
    """100 of 10 tokens: rows of 640 tokens hold 16 of them, so 7 rows; they would fit into two."""
    places = batching.find_places(np.full(100, 10), 640)
    assert places.rows.max() == 6 and places.numbers.max() == 16 == batching.max_sequences(640)


def test_packed_fields_come_back():
    batch = batching.make_train_batch(GROUPS, pad_id=PAD, max_length=None)
    micro_batches, places = batching.pack(batch, 1, 96)
    assert all(part.tokens.shape == (1, 96) for part in micro_batches)
    for name in ("tokens", "positions", "completion_mask", "sampler_logprobs"):
        field = getattr(batch, name)
        packed = np.concatenate([getattr(part, name) for part in micro_batches])
        assert packed.dtype == field.dtype
        expected = np.where(batch.segment_ids > 0, field, 0)
        np.testing.assert_array_equal(places.unpack(packed, field.shape[1]), expected)
    segments = np.concatenate([part.segment_ids for part in micro_batches])
    for row in segments:  # 1, 2, ... in order, then padding
        present = [int(n) for n in dict.fromkeys(row.tolist())]
        assert present == [*range(1, max(present) + 1), *([0] if row[-1] == 0 else [])]


def test_the_last_micro_batch_is_filled_with_padding():
    batch = batching.make_train_batch(GROUPS, pad_id=PAD, max_length=None)
    micro_batches, places = batching.pack(batch, 100, 32)
    assert len(micro_batches) == 1
    assert not np.any(micro_batches[0].segment_ids[places.rows.max() + 1 :])


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_rows_of_padding_have_no_weight(mode):
    mask = batching.make_train_batch(GROUPS, pad_id=PAD, max_length=None).completion_mask
    padded = np.pad(mask, ((0, 4), (0, 0)))
    np.testing.assert_allclose(losses.loss_weights(padded, mode, 1)[:4], losses.loss_weights(mask, mode, 1))


# Micro-batches


@pytest.mark.parametrize(
    ("tokens", "length", "expected"), [(0, 1024, 4), (4096, 1024, 4), (4096, 640, 6), (4096, 5120, 1)]
)
def test_micro_batch_rows(tokens, length, expected):
    assert batching.micro_batch_rows(actor(micro_batch_tokens_per_device=tokens), length) == expected


@pytest.mark.parametrize(
    ("num_rows", "shards", "expected"),  # with at most 4 rows a shard
    [
        (1024, 8, 32),
        (9, 1, 3),  # three times, and not 4 rows three times, of which 3 would be padding
        (4, 8, 8),  # one on each of 8, and not 4 on each
        (10, 2, 6),
        (1, 1, 1),
        (33, 8, 24),
    ],
)
def test_micro_batches_are_few_and_even(num_rows, shards, expected):
    assert batching.plan_rows(num_rows, 512, actor(), shards) == expected


def test_micro_batches_always_hold_all_rows_within_memory():
    for num_rows in range(1, 70):
        for shards in (1, 2, 3, 8):
            rows = batching.plan_rows(num_rows, 512, actor(), shards)
            assert rows % shards == 0 and rows // shards <= 4
            num = -(-num_rows // rows)
            assert num * rows < num_rows + num * shards  # less than a row a shard is lost
            assert num == -(-num_rows // (4 * shards))


def test_the_shape_holds_the_longest_prompt_with_the_longest_completion():
    changes = {"data.max_prompt_length": 500, "data.max_response_length": 100, "actor.num_minibatches": 2}
    # 600 tokens: rows of 640. 1,024 / 2 completions, 4 a shard on 8 shards: 32 rows, 16 times.
    assert batching.micro_batch_shape(gsm8k_config(**changes), 512, 8) == (32, 640)


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [(30, 10, 48), (100, 30, 160), (128, 4096, 4224), (512, 8000, 8576)],  # the last two: 33 x 128, 67 x 128
)
def test_rows_are_hardly_longer_than_the_longest_sequence(prompt, response, expected):
    changes = {"data.max_prompt_length": prompt, "data.max_response_length": response}
    assert batching.micro_batch_shape(gsm8k_config(**changes), 512, 1)[1] == expected


# The table


def gsm8k_config(**changes):
    path = pathlib.Path(__file__).parents[2] / "configs" / "gsm8k.py"
    spec = importlib.util.spec_from_file_location("gsm8k", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update_from_flattened_dict(changes)
    return parse_config(config)


def test_table_of_the_shipped_run():
    table = dict(batching.batch_table(gsm8k_config(), num_data_shards=8, steps_per_epoch=29))
    assert table == {
        "prompts per step": "256",
        "completions per step": "1,024 (4 a prompt)",
        "updates per step": "1 (mini-batches: 1, passes: 1)",
        "completions per update": "1,024",
        "micro-batches per update": "at most 32, of 4 packed rows of 1,024 tokens on each of 8 data shards",
        "tokens per step, at most": "1,048,576",  # 1,024 x (512 + 512)
        "steps per epoch": "29",
        "steps in all": "87",
    }


def test_table_of_an_uneven_run():
    changes = {
        "data.train_batch_size": 5,
        "algorithm.group_size": 6,
        "actor.num_minibatches": 2,
        "actor.num_epochs": 3,
        "actor.micro_batch_tokens_per_device": 2048,
        "trainer.num_steps": 10,
    }
    table = dict(batching.batch_table(gsm8k_config(**changes), num_data_shards=4, steps_per_epoch=1494))
    assert table["updates per step"] == "6 (mini-batches: 2, passes: 3)"
    assert table["completions per update"] == "15"
    # 2,048 tokens hold 2 rows of 1,024; 4 shards hold 8 rows, so 2 micro-batches of 8 for 15.
    assert table["micro-batches per update"] == (
        "at most 2, of 2 packed rows of 1,024 tokens on each of 4 data shards"
    )
    assert table["steps in all"] == "10"
