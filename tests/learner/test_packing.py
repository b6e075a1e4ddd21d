import numpy as np
import pytest
from config_helpers import gsm8k
from group_helpers import GROUPS, PAD

from grpo_jax.algorithm import loss as losses
from grpo_jax.config import ActorSection
from grpo_jax.learner import batching, packing
from grpo_jax.model.fused_attention import max_sequences


def test_places_by_hand():
    """Rows of 96 tokens hold three sequences at most. Longest first, each where it leaves the least room."""
    places = packing.find_places(np.array([10, 50, 40, 46, 4, 1]), 96)
    # 50 opens row 0; 46 fills it; 40 opens row 1, then 10 and 4 join it: three; 1 opens row 2.
    assert places.rows.tolist() == [1, 0, 1, 0, 1, 2]
    assert places.starts.tolist() == [40, 0, 0, 50, 50, 0]
    assert places.numbers.tolist() == [2, 1, 1, 2, 3, 1]


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="97 tokens does not fit a row of 96"):
        packing.find_places(np.array([3, 97]), 96)


def test_packing_loses_nothing_and_wastes_little():
    rng = np.random.default_rng(0)
    lengths = rng.integers(30, 400, 300)
    places = packing.find_places(lengths, 1024)
    used = np.zeros((places.rows.max() + 1, 1024), int)
    for row, start, length in zip(places.rows, places.starts, lengths, strict=True):
        used[row, start : start + length] += 1
    assert used.max() == 1 and used.sum() == lengths.sum()
    assert used.mean() > 0.97


def test_a_row_holds_no_more_sequences_than_attention_is_told_of():
    """100 of 10 tokens: rows of 640 tokens hold 16 of them, so 7 rows; they would fit into two."""
    places = packing.find_places(np.full(100, 10), 640)
    assert places.rows.max() == 6 and places.numbers.max() == 16 == max_sequences(640)


def test_packed_fields_come_back():
    batch = batching.make_train_batch(GROUPS, pad_id=PAD)
    micro_batches, places = packing.pack(batch, 1, 96)
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
    batch = batching.make_train_batch(GROUPS, pad_id=PAD)
    micro_batches, places = packing.pack(batch, 100, 32)
    assert len(micro_batches) == 1
    assert not np.any(micro_batches[0].segment_ids[places.rows.max() + 1 :])


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_rows_of_padding_have_no_weight(mode):
    mask = batching.make_train_batch(GROUPS, pad_id=PAD).completion_mask
    padded = np.pad(mask, ((0, 4), (0, 0)))
    np.testing.assert_allclose(losses.loss_weights(padded, mode, 1)[:4], losses.loss_weights(mask, mode, 1))


# Micro-batches


@pytest.mark.parametrize(
    ("tokens", "length", "expected"), [(0, 1024, 4), (4096, 1024, 4), (4096, 640, 6), (4096, 5120, 1)]
)
def test_micro_batch_rows(tokens, length, expected):
    assert packing.micro_batch_rows(ActorSection(micro_batch_tokens_per_device=tokens), length) == expected


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
    assert packing.plan_rows(num_rows, 512, ActorSection(), shards) == expected


def test_micro_batches_always_hold_all_rows_within_memory():
    for num_rows in range(1, 70):
        for shards in (1, 2, 3, 8):
            rows = packing.plan_rows(num_rows, 512, ActorSection(), shards)
            assert rows % shards == 0 and rows // shards <= 4
            num = -(-num_rows // rows)
            assert num * rows < num_rows + num * shards  # less than a row a shard is lost
            assert num == -(-num_rows // (4 * shards))


def test_the_shape_holds_the_longest_prompt_with_the_longest_completion():
    changes = {"data.max_prompt_length": 500, "data.max_response_length": 100, "actor.num_minibatches": 2}
    # 600 tokens: rows of 640. 1,024 / 2 completions, 4 a shard on 8 shards: 32 rows, 16 times.
    assert packing.micro_batch_shape(gsm8k(**changes), 512, 8) == (32, 640)


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [(30, 10, 48), (100, 30, 160), (128, 4096, 4224), (512, 8000, 8576)],  # the last two: 33 x 128, 67 x 128
)
def test_rows_are_hardly_longer_than_the_longest_sequence(prompt, response, expected):
    changes = {"data.max_prompt_length": prompt, "data.max_response_length": response}
    assert packing.micro_batch_shape(gsm8k(**changes), 512, 1)[1] == expected
