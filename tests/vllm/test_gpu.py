"""What only a GPU can show. `GRPO_JAX_TEST_GPU=1 pytest -m 'gpu and vllm' tests/vllm/test_gpu.py`"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vllm_helpers as helpers

from grpo_jax.rollout import SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.gpu]

GREEDY = SamplingParams(num_samples=1, temperature=0.0, max_tokens=24)


def test_nccl_is_found_and_broadcasts_to_itself():
    """A group of one: the library, its calling convention and the stream are right. Two need two GPUs."""
    from grpo_jax.weight_sync.nccl import Communicator, unique_id
    from grpo_jax.weight_sync.wire import deadline_check

    x = jnp.arange(1 << 20, dtype=jnp.float32)
    x.block_until_ready()
    communicator = Communicator(unique_id(), 0, 1, jax.local_devices()[0].local_hardware_id)
    communicator.broadcast(x.unsafe_buffer_pointer(), x.nbytes)
    communicator.synchronize(deadline_check(30.0, "no broadcast"))
    communicator.close()
    np.testing.assert_array_equal(np.asarray(x), np.arange(1 << 20, dtype=np.float32))


def test_an_engine_sleeps_and_wakes_with_new_weights(models, tmp_path):
    import os
    import subprocess

    def used():
        """Of the GPU, in MiB."""
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        query += ["--id=" + os.environ.get("CUDA_VISIBLE_DEVICES", "0")]
        return int(subprocess.run(query, capture_output=True, text=True).stdout)

    mesh = helpers.mesh_of()
    inspected, params = helpers.load(models["qwen2-untied"], mesh)
    moved = helpers.perturbed(params, seed=5)
    folder = helpers.save_as_folder(moved, inspected.config, models["qwen2-untied"], tmp_path / "moved")
    batch = helpers.prompts([11, 140])
    jax.block_until_ready(params)
    before = used()
    engine = helpers.engine_for(models["qwen2-untied"], mesh, sleep=True, gpu_memory_utilization=0.3)
    with contextlib.closing(engine):
        engine.sleep()  # as soon as it has started, so that the trainer can try out its update
        napping = used()
        engine.load_weights(params, version=0)
        engine.generate(batch, GREEDY, seed=0)
        awake = used()
        engine.sleep()
        asleep = used()
        # Asleep it keeps a CUDA context and its compiled kernels; the trainer's memory is not its to give up.
        kept = asleep - before
        assert awake - before > 20_000 and kept < 0.1 * (awake - before), (before, awake, asleep)
        assert napping - before < 0.1 * (awake - before), (before, napping, awake)
        engine.load_weights(moved, version=1)
        groups = engine.generate(batch, GREEDY, seed=0)
        model = helpers.reference(folder)
        assert [g.completions[0].token_ids for g in groups] == [
            helpers.reference_greedy(model, p.token_ids, 24) for p in batch
        ]
