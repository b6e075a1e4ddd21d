from config_helpers import gsm8k

from grpo_jax.run.summary import batch_table


def test_table_of_the_shipped_run():
    table = dict(batch_table(gsm8k(), num_data_shards=8, steps_per_epoch=29))
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
    table = dict(batch_table(gsm8k(**changes), num_data_shards=4, steps_per_epoch=1494))
    assert table["updates per step"] == "6 (mini-batches: 2, passes: 3)"
    assert table["completions per update"] == "15"
    # 2,048 tokens hold 2 rows of 1,024; 4 shards hold 8 rows, so 2 micro-batches of 8 for 15.
    assert table["micro-batches per update"] == (
        "at most 2, of 2 packed rows of 1,024 tokens on each of 4 data shards"
    )
    assert table["steps in all"] == "10"
