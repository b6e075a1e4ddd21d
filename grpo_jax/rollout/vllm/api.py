"""vLLM's OpenAI-compatible server over the policy, on loopback: to talk to a model in training."""

import asyncio
import importlib
from typing import Any

MODEL_NAME = "policy"


async def serve(llm: Any, model: str, port: int, ready: asyncio.Event) -> None:
    """Answers on 127.0.0.1:`port` until it is cancelled.

    Args:
        llm: the `AsyncLLM` that samples the rollouts.
        model: folder with its tokenizer.
        ready: is set once requests are answered.
    """
    import uvicorn
    from vllm.entrypoints.openai.api_server import build_app, init_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        cli_args = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    except ImportError:  # vLLM 0.25
        cli_args = importlib.import_module("vllm.entrypoints.openai.cli_args")
    flags = ["--model", model, "--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)]
    args = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.05)
        if server.started:
            ready.set()
        await serving
    finally:
        serving.cancel()
