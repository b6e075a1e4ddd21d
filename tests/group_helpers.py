"""Groups of completions for the tests of batches."""

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
