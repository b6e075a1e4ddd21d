"""The policy: a Flax linen decoder, its sharding, and its Hugging Face form."""
