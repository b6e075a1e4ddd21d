"""Whether an engine has our scheduler (`scheduler.py`) or vLLM's own. Runs in the engine's environment.

Ours notes most tokens itself and hands them over in runs. What vLLM would give along with each token is lost with
it, and what it counts on of vLLM's insides may change with any version. Where one of that matters, vLLM's own is
used, and a line says so.
"""

import os
from collections.abc import Mapping
from typing import Any

TESTED = ("0.25", "0.32")
"""Minor versions of vLLM whose insides `scheduler.py` was tested with."""

LOST = (
    "enable_return_routed_experts", "aux_output_config",  # the experts of each token
    "return_sampling_mask",  # the tokens that it was drawn from
    "speculative_config", "per_request_spec_decode_metrics",  # several tokens a step; what became of drafts
    "kv_transfer_config", "kv_offloading_size", "kv_events_config",  # cache blocks that others look at
    "ec_transfer_config",  # encoder inputs that others make
)  # fmt: skip
"""Engine arguments that ask for what ours drops, or was not tested with."""
LOST_VARIABLES = ("VLLM_COMPUTE_NANS_IN_LOGITS", "VLLM_RAISE_ON_LOGIT_NANS")
"""The same in the environment: NaNs are counted for each token."""


def choose_scheduler(
    options: Mapping[str, Any], version: str, *, is_asynchronous: bool
) -> tuple[str | None, str]:
    """Returns our scheduler's name for vLLM's `scheduler_cls`, and ""; or None for vLLM's own, and why.

    Args:
        options: fields of vLLM's `AsyncEngineArgs`.
        version: of vLLM.
        is_asynchronous: the next step is scheduled while this one runs.
    """
    why = _why_not_ours(options, version)
    if why:
        return None, why
    name = "AsyncRunScheduler" if is_asynchronous else "RunScheduler"
    return f"grpo_jax.rollout.vllm.scheduler.{name}", ""


def _why_not_ours(options: Mapping[str, Any], version: str) -> str:
    asked = [name for name in LOST if options.get(name) not in (None, False, 0, "none")]
    asked += [name for name in LOST_VARIABLES if os.environ.get(name, "0") not in ("", "0")]
    if asked:
        return f"ours would lose what {', '.join(asked)} asks for"
    if ".".join(version.split(".")[:2]) not in TESTED:
        return f"ours was tested with {' and '.join(TESTED)} only, and this is vLLM {version}"
    try:
        from grpo_jax.rollout.vllm.scheduler import changes
    except ImportError as error:
        return f"vLLM {version} lacks what ours derives from ({error})"
    changed = changes()
    return f"vLLM {version} has changed {', '.join(changed)}, which ours relies on" if changed else ""
