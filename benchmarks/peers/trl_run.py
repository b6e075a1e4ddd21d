"""TRL's GRPOTrainer at a workload of benchmarks/step.py; prints one line "STEP {...}" a step.

    python benchmarks/peers/trl_run.py --model=DIR --data=FILE.parquet --prompts=64 --samples=8 ...

`step.py --peer=trl` runs it. Needs trl and datasets, and vLLM unless --no-vllm. TRL's own defaults stand wherever
the workload says nothing. "seconds" run from the end of one step to the end of the next, reports included.
"""

import argparse
import json
import os
import time
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# A process group of one: colocated vLLM asks for it.
for name, value in dict(
    RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511"
).items():
    os.environ.setdefault(name, value)

import torch  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from reward import compute_score  # noqa: E402
from transformers import AutoTokenizer, TrainerCallback  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("--model", "--data", "--output"):
        parser.add_argument(flag, required=True)
    for flag in ("--prompts", "--samples", "--prompt_tokens", "--new", "--steps", "--micro_batch"):
        parser.add_argument(flag, type=int, required=True)
    parser.add_argument("--lora_rank", type=int, default=0, help="peft's, on all linear layers; 0: none")
    parser.add_argument("--kl", type=float, default=0.001)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.4)
    parser.add_argument("--vllm", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = trl.GRPOTrainer(
        model=args.model,
        reward_funcs=reward,
        args=settings(args),
        train_dataset=Dataset.from_list(read_prompts(args, tokenizer)),
        processing_class=tokenizer,
        **adapters(args),
    )
    report = Report(trainer)
    trainer.add_callback(report)
    trainer.train()


def settings(args: Any) -> Any:
    rows = args.prompts * args.samples
    if rows % args.micro_batch:
        raise SystemExit(f"{rows} completions a step are no multiple of the micro-batch, {args.micro_batch}")
    engine: dict[str, Any] = {}
    if args.vllm:
        engine = dict(
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=args.gpu_memory_utilization,
            vllm_max_model_length=args.prompt_tokens + args.new,
        )
    return trl.GRPOConfig(
        output_dir=args.output,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=rows // args.micro_batch,  # one update, and one generation, a step
        num_generations=args.samples,
        max_completion_length=args.new,
        use_vllm=args.vllm,
        # Master weights; on a GPU the computation is in bfloat16. With adapters, only these have masters.
        model_init_kwargs={"dtype": "bfloat16" if args.lora_rank else "float32"},
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=True,
        beta=args.kl,
        temperature=args.temperature,
        learning_rate=args.learning_rate,
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **engine,
    )


def adapters(args: Any) -> dict[str, Any]:
    if not args.lora_rank:
        return {}
    from peft import LoraConfig

    wanted = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules="all-linear")
    return {"peft_config": wanted}


def read_prompts(args: Any, tokenizer: Any) -> list[dict[str, str]]:
    """The rendered prompts, with as many tokens as the workload says."""
    import pyarrow.parquet as pq

    messages = pq.read_table(args.data, columns=["prompt"]).column("prompt").to_pylist()
    texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
    lengths = {len(ids) for ids in tokenizer(texts)["input_ids"]}
    assert lengths == {args.prompt_tokens}, lengths
    return [{"prompt": text} for text in texts]


def reward(completions: list[str], **_: Any) -> list[float]:
    return [compute_score(solution_str=text) for text in completions]


class Report(TrainerCallback):
    """Prints a step's time, of which the generation, and what TRL logged of its completions."""

    def __init__(self, trainer: Any):
        self._trainer, self._generate = trainer, trainer._generate
        self._end, self._generation_s = 0.0, 0.0
        trainer._generate = self._timed

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        start = now()
        result = self._generate(*args, **kwargs)
        self._generation_s += now() - start
        return result

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._end = now()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "completions/mean_length" not in (logs or {}):
            return  # the summary of the whole run
        end = now()
        print(
            "STEP "
            + json.dumps(
                dict(
                    step=state.global_step,
                    time=end,
                    seconds=end - self._end,
                    generation_s=self._generation_s,
                    mean_length=logs["completions/mean_length"],
                    reward=logs["reward"],
                    allocated_gb=torch.cuda.max_memory_allocated() / 1e9
                    if torch.cuda.is_available()
                    else None,
                )
            ),
            flush=True,
        )
        self._end, self._generation_s = end, 0.0


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


if __name__ == "__main__":
    main()
