"""Makes a model folder from nothing: a tokenizer trained on given texts and a Qwen2-shaped random model.

For machines without a model and without a network. The quickstart and the smoke test start from it; from then on
the folder is treated like one from the hub.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from grpo_jax.config import RandomModelSection
from grpo_jax.model.config import hf_config, random_model_config
from grpo_jax.model.hf import save_folder
from grpo_jax.model.transformer import init_params, num_params

logger = logging.getLogger(__name__)

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Trains a byte-level BPE on `texts`, with Qwen2's normalizer and pre-tokenizer and a chat template.

    They have to be Qwen2's. If config.json says qwen2, `AutoTokenizer` puts them in place of those in
    tokenizer.json, and a resumed run would see other tokens than before.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    qwen2 = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = qwen2.normalizer
    tokenizer.pre_tokenizer = qwen2.pre_tokenizer  # among other things, every digit is a token of its own
    tokenizer.decoder = qwen2.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The roles of the chat template are in every prompt. As words of the corpus, each becomes one token.
    roles = ["system", "user", "assistant"] * 100
    tokenizer.train_from_iterator([*texts, *roles], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
    )


def make_random_model(
    folder: Path, section: RandomModelSection, tokenizer: Any, *, seed: int, mesh: Mesh
) -> None:
    """Writes a Hugging Face folder with a tokenizer of `make_tokenizer` and random weights, seeded."""
    config = random_model_config(section)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with tempfile.TemporaryDirectory() as files, jax.set_mesh(mesh):
        tokenizer.save_pretrained(files)
        (Path(files) / "config.json").write_text(json.dumps(hf_config(config, **ids), indent=2))
        (Path(files) / "generation_config.json").write_text(json.dumps(ids))
        params = init_params(config, jax.random.key(seed), mesh)
        save_folder(folder, params, config, files_from=Path(files), dtype="F32")
    logger.info("made a random model of %s parameters in %s", f"{num_params(config):,}", folder)
