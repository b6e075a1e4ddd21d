"""A run of each family on eight devices: sampled from, trained, and saved as what transformers loads."""

import shutil

import integration_helpers as helpers
import numpy as np
import pytest
import torch
from family_models import FAMILY_ROWS, SIZES, kind_and_fields
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("row", FAMILY_ROWS)
def test_a_run(row, tmp_path, tokenizer_folder):
    kind, fields = kind_and_fields(row, SIZES | {"vocab_size": 300, "eos_token_id": 2})
    before = save_tiny_model(tmp_path / "model", kind, seed=1, scale=0.1, **fields)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, tmp_path / "model")
    changes = {
        "model.path": str(tmp_path / "model"),
        "model.scan_layers": True,
        "model.remat": "full",
        "data.max_prompt_length": 120,
        "algorithm.kl_coef": 0.01,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "trainer.total_epochs": 1,
    }
    helpers.train_ok(tmp_path / "run", changes)
    lines = helpers.read_lines(tmp_path / "run")
    # Sampler and trainer are of the same opinion, in float32.
    assert max(line["training/rollout_probs_diff_max"] for line in lines) < 1e-5
    assert lines[-1]["kl/mean"] > 0  # the policy has left the reference
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-epoch-1")
    assert type(after) is type(before)
    for name, parameter in before.state_dict().items():
        assert not torch.equal(after.state_dict()[name], parameter), name
    assert all(np.isfinite(p.detach().numpy()).all() for p in after.parameters())
