"""Fetches a model from the Hugging Face hub, checks every byte of it, and lets it say a sentence.

    python -m grpo_jax.fetch Qwen/Qwen2.5-0.5B-Instruct --to=models/Qwen2.5-0.5B-Instruct [--revision=main]
        [--dtype=bfloat16] [--check_only]

Only what a run reads is fetched: safetensors, configuration, tokenizer. The same command goes on where one was cut
short. Files are compared with the hub's own checksums. HF_ENDPOINT names a mirror, HF_TOKEN opens gated models.
With --check_only nothing is fetched: the folder is compared with the hub's files as they are now.
"""

from pathlib import Path
from typing import Any

from grpo_jax.config import KEYS, ConfigError
from grpo_jax.config.command_line import make_parser, one_line_errors

WANTED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
NUM_TOKENS = 32


def fetch(name: str, folder: Path, revision: str, *, is_check: bool) -> str:
    """Downloads what is not there yet, and compares all of it with the hub's checksums.

    Returns: the hub's commit, a hash.
    Raises:  ConfigError: the hub does not give it, or a file is not what the hub says.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        commit = str(api.model_info(name, revision=revision).sha)
        if not is_check:
            huggingface_hub.snapshot_download(
                name, revision=commit, local_dir=folder, allow_patterns=list(WANTED)
            )
        found = api.verify_repo_checksums(name, revision=commit, local_dir=folder)
    except OSError as error:
        if error.filename:  # a disk that is full, a folder that may not be written to
            raise
        raise _refusal(name, error) from None
    except (
        Exception
    ) as error:  # no network, a proxy, a wrong name, a token that is missing: the hub says which
        raise _refusal(name, error) from None
    _check(folder, found)
    return commit


def _refusal(name: str, error: Exception) -> ConfigError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2]) or type(error).__name__
    return ConfigError(
        "NAME", name, f"the hub did not give it ({reason}); run the same command again to go on"
    )


def _check(folder: Path, found: Any) -> None:
    """Args: found: the hub's `FolderVerification`. Raises: ConfigError: a file is damaged or missing."""
    from huggingface_hub.utils import filter_repo_objects

    if damaged := [mismatch["path"] for mismatch in found.mismatches]:
        rule = f"{', '.join(damaged)}: not what the hub has; delete it, and fetch again"
        raise ConfigError("--to", str(folder), rule)
    if missing := list(filter_repo_objects(found.missing_paths, allow_patterns=list(WANTED))):
        raise ConfigError("--to", str(folder), f"lacks {', '.join(missing)}; fetch again")


@one_line_errors({"model.path": "--to"})
def main() -> None:
    parser = make_parser("grpo_jax.fetch", __doc__)
    parser.add_argument("name", metavar="OWNER/NAME", help="of the model, on the hub")
    parser.add_argument("--to", required=True, help="folder for it")
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=KEYS["model.dtype"].choices, help="of the sample"
    )
    parser.add_argument("--check_only", action="store_true", help="fetch nothing")
    args = parser.parse_args()
    folder = Path(args.to)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("--to", args.to, "is a file")
    if args.check_only and not folder.is_dir():
        raise ConfigError("--to", args.to, "there is no such folder")
    commit = fetch(args.name, folder, args.revision, is_check=args.check_only)
    print(f"{folder}: every file is what the hub has at commit {commit}")
    from grpo_jax.run.sample import greedy_sample

    prompt, answer = greedy_sample(folder, num_tokens=NUM_TOKENS, dtype=args.dtype)
    print(f"prompt: {prompt!r}\nanswer: {answer!r}")
    print(f"Use it: --config.model.path={folder}")


if __name__ == "__main__":
    main()
