"""Set-up of the whole suite: eight virtual CPU devices, and no silent broadcasting between ranks."""

import dataclasses
import functools
import os

# Read once, when JAX starts its CPU back end; hence before the import.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Compiling is most of what the suite does, and without these emitters it takes a quarter of the time.
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    ]
)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # on NVIDIA GPUs too: values are compared


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """Compiles every program once, whether it is made again in this process or in one that a test starts."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compilation_cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        # Compiling is most of the work, and unoptimized code takes half as long to make.
        "jax_disable_most_optimizations": True,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    compilation_cache.reset_cache()  # programs may have been compiled while tests were collected


@pytest.fixture(scope="module")
def optimized():
    """For modules that look at what the compiler makes of a program, or at the time that it takes."""
    name = "jax_disable_most_optimizations"
    jax.config.update(name, False)
    os.environ[name.upper()] = "False"
    yield
    jax.config.update(name, True)
    os.environ[name.upper()] = "True"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models of torch that are too tiny to share, and threads that wait in a loop for each other."""
    import torch

    torch.set_num_threads(1)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE tokenizer on disk, as Hugging Face stores it: few merges, any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["What is 2 + 3?", "The answer is #### 5", "Let's think step by step."], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


def section_of(name):
    """Returns `section(key=value, ...)`: a section with its defaults, but for those keys."""
    from grpo_jax.config import Config

    return functools.partial(dataclasses.replace, getattr(Config(), name))


@pytest.fixture(scope="session")
def rollout_section():
    return section_of("rollout")


@pytest.fixture(scope="session")
def reward_section():
    return section_of("reward")
