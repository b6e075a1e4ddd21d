"""The configuration: its keys, the rules they obey, how a command reads them. Standard library only at import."""

from grpo_jax.config.command_line import defaults, load_config
from grpo_jax.config.rules import (
    ConfigError,
    check_value,
    differences,
    nearest,
    parse_config,
    split_file_name,
    unread_keys,
    unread_warning,
)
from grpo_jax.config.sections import (
    KEYS,
    ActorSection,
    AlgorithmSection,
    ArithmeticSection,
    CheckpointSection,
    Config,
    DataSection,
    EvalSection,
    LoggingSection,
    LoraSection,
    MeshSection,
    ModelSection,
    OptimSection,
    RandomModelSection,
    RewardSection,
    RolloutSection,
    SftSection,
    TrainerSection,
)
