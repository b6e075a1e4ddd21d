import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from group_helpers import GROUPS, PAD, make_group

from grpo_jax.learner import batching

# Rows


def test_layout_by_hand():
    batch = batching.make_train_batch(GROUPS, pad_id=PAD)

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
    batch = batching.make_train_batch([make_group(range(1, 16), ([7, 8], [-1, -1]))], pad_id=9)
    assert batch.tokens.shape == (1, 32)
    assert batch.tokens[0, 14:19].tolist() == [15, 7, 8, 9, 9]


def test_sft_batch_equals_the_train_batch_but_for_the_sampler():
    rows = [(g.prompt.token_ids, c.token_ids) for g in GROUPS for c in g.completions]
    sft = batching.make_sft_batch(rows, pad_id=PAD)
    train = batching.make_train_batch(GROUPS, pad_id=PAD)
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
    ],
)
def test_refuses_rollouts_that_do_not_fit(groups, message):
    with pytest.raises(ValueError, match=message):
        batching.make_train_batch(groups, pad_id=PAD)


def test_sft_refuses_an_empty_response():
    with pytest.raises(ValueError, match="example 1: 2 prompt and 0 completion"):
        batching.make_sft_batch([([1], [2]), ([1, 2], [])], pad_id=PAD)


# Advantages


def test_advantages_lie_on_completion_tokens():
    batch = batching.make_train_batch(GROUPS, pad_id=PAD)
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
    batch = batching.make_train_batch(GROUPS, pad_id=PAD)
    with pytest.raises(ValueError, match=r"\(4, 16\)"):
        batching.add_advantages(batch, np.ones(shape))


# Ages


def test_every_token_knows_how_old_its_weights_are():
    changed = dataclasses.replace(GROUPS[1].completions[0], policy_version=2, changes=((1, 3), (3, 5)))
    groups = [GROUPS[0], dataclasses.replace(GROUPS[1], completions=(changed, GROUPS[1].completions[1]))]
    assert changed.token_versions.tolist() == [2, 3, 3, 5]
    batch = batching.make_train_batch(groups, pad_id=PAD, version=5)
    ages = [batch.token_ages[row][batch.completion_mask[row] > 0].tolist() for row in range(4)]
    assert ages == [[5, 5], [5], [3, 2, 2, 0], [5, 5]]  # the others are of version 0
    assert batch.token_ages.sum() == 5 * 5 + 7  # and 0 elsewhere
    assert batching.make_train_batch(groups, pad_id=PAD).token_ages is None


# Mini-batches


def numbered_batch(num_rows):
    batch = batching.make_sft_batch([([1], [100 + i] * (i + 1)) for i in range(num_rows)], pad_id=PAD)
    return dataclasses.replace(batch, ref_logprobs=jnp.asarray(batch.tokens, jnp.float32))


def ids(batch):
    return [int(row[1]) - 100 for row in batch.tokens]


def test_minibatches_deal_out_every_row_once():
    batch = numbered_batch(12)
    parts = [batching.take_rows(batch, rows) for rows in batching.split_minibatches(12, 3, seed=1)]
    assert [part.tokens.shape for part in parts] == [(4, 16)] * 3
    dealt = [i for part in parts for i in ids(part)]
    assert sorted(dealt) == list(range(12)) and dealt != list(range(12))
    for part in parts:  # every field moved with its row
        assert part.completion_mask.sum(axis=1).tolist() == [i + 1 for i in ids(part)]
        np.testing.assert_array_equal(part.ref_logprobs, part.tokens)
        assert part.old_logprobs is None


def test_minibatches_depend_on_the_seed_alone():
    def order(seed):
        return np.concatenate(batching.split_minibatches(12, 2, seed=seed)).tolist()

    assert order(3) == order(3)
    assert order((0, 5, 1)) == order((0, 5, 1))
    assert order(3) != order(4)
    assert order((0, 5, 0)) != order((0, 5, 1))


def test_one_minibatch_keeps_the_order():
    (rows,) = batching.split_minibatches(5, 1, seed=1)
    assert rows.tolist() == [0, 1, 2, 3, 4]


def test_refuses_uneven_minibatches():
    with pytest.raises(ValueError, match="5 rows do not divide into 2"):
        batching.split_minibatches(5, 2, seed=1)
