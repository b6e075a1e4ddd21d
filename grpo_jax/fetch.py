"""Fetches a model from the Hugging Face hub or ModelScope, checks every byte of it, and lets it say a sentence.

    python -m grpo_jax.fetch Qwen/Qwen2.5-0.5B-Instruct --to=models/Qwen2.5-0.5B-Instruct [--from=hf|modelscope]
        [--revision=BRANCH] [--dtype=bfloat16] [--check_only]

Only what a run reads is fetched: safetensors, configuration, tokenizer. The same command goes on where one was cut
short. Files are compared with the hub's own checksums. HF_ENDPOINT names a mirror, HF_TOKEN opens gated models;
MODELSCOPE_ENDPOINT and MODELSCOPE_API_TOKEN do the same. With --check_only nothing is fetched: the folder is
compared with the hub's files as they are now.
"""

from pathlib import Path

from grpo_jax.config import KEYS, ConfigError
from grpo_jax.config.command_line import make_parser, one_line_errors
from grpo_jax.storage.hubs import HUBS, check, check_name, fetch

NUM_TOKENS = 32


@one_line_errors({"model.path": "--to"})
def main() -> None:
    parser = make_parser("grpo_jax.fetch", __doc__)
    parser.add_argument("name", metavar="OWNER/NAME", help="of the model, on the hub")
    parser.add_argument("--to", required=True, help="folder for it")
    parser.add_argument("--from", dest="hub", default="hf", choices=tuple(HUBS), help="which hub")
    parser.add_argument("--revision", help="branch, tag or commit (default: the hub's newest)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=KEYS["model.dtype"].choices, help="of the sample"
    )
    parser.add_argument("--check_only", action="store_true", help="fetch nothing")
    args = parser.parse_args()
    check_name(args.name)
    folder = Path(args.to)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("--to", args.to, "is a file")
    if args.check_only and not folder.is_dir():
        raise ConfigError("--to", args.to, "there is no such folder")
    hub = HUBS[args.hub]()
    get = check if args.check_only else fetch
    revision = get(hub, args.name, folder, args.revision or hub.branch)
    print(f"{folder}: every file is what the hub has at {revision}")
    from grpo_jax.run.sample import greedy_sample

    sample = greedy_sample(folder, num_tokens=NUM_TOKENS, dtype=args.dtype)
    print(f"prompt: {sample.prompt!r}\nanswer: {sample.answer!r}")
    print(f"Use it: --config.model.path={folder}")


if __name__ == "__main__":
    main()
