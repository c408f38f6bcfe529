"""Frozen weights on a CPU are pages of the model's files, which processes share; they are never written to."""

import json
import os
import subprocess
import sys

import pytest
import torch

from minitrain import Session
from minitrain.model.lora import merge_lora_weights
from minitrain.model.weights import Weights
from tests.conftest import DEADLINE, ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
ROWS = [{"prompt": f"say {i}", "response": "ab" * (1 + i % 5)} for i in range(6)]
ON_RANKS = """
import json, sys
from minitrain import exit_process
from tests.model.test_mapped import ROWS, Session, is_mapped
session = Session(json.loads(sys.argv[1]))
frozen = [p.to_local() for p in session.policy.parameters() if not p.requires_grad]
loss = session.forward_backward(ROWS).loss.item()
print(json.dumps([sum(map(is_mapped, frozen)), len(frozen), loss, session.optim_step().grad_norm]))
exit_process()
"""


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is in a private mapping of a safetensors file."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, mode, *_, name = line.split()
            start, stop = (int(end, 16) for end in span.split("-"))
            if start <= tensor.data_ptr() < stop:
                return name.endswith(".safetensors") and mode.endswith("p")
    return False


def config(llama_folder, **more) -> dict:
    model = {"name_or_path": str(llama_folder), "policy_dtype": "float32"}
    return {"model": model, "lora": {"rank": 2, "target_modules": "all-linear"}, "lr": 1e-2, **more}


def test_frozen_weights_are_pages_of_the_file(llama_folder):
    """Training, merging and writing in place change the copy of this process, not the file."""
    before = (llama_folder / "model.safetensors").read_bytes()
    session = Session(config(llama_folder))
    frozen = [p for p in session.policy.parameters() if not p.requires_grad]
    assert frozen and all(map(is_mapped, frozen)) and not any(map(is_mapped, session.parameters))
    session.forward_backward(ROWS)
    session.optim_step()
    assert all(map(is_mapped, frozen))
    for module in list(session.policy.model.modules()):
        if hasattr(module, "lora"):
            merge_lora_weights(module)
    for parameter in frozen:
        parameter.data.add_(1)
    assert (llama_folder / "model.safetensors").read_bytes() == before


def test_rows_of_a_tensor_do_not_keep_all_of_it():
    weights = Weights.__new__(Weights)
    weights.sources = {"w": torch.arange(40.0).view(10, 4)}
    rows = weights.rows("w", 2, 5)
    assert torch.equal(rows, torch.arange(8.0, 20).view(3, 4)) and rows.untyped_storage().nbytes() == 3 * 4 * 4


@pytest.mark.parametrize("shard", ["none", "full"])
def test_shards_are_pages_of_the_file(shard, llama_folder):
    """Under FSDPTrainer, too, with the numbers of one device."""
    options = config(llama_folder, trainer="FSDPTrainer", fsdp={"shard": shard})
    command = [sys.executable, "-c", ON_RANKS, json.dumps(options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr[-2000:]
    n_mapped, n_frozen, loss, norm = json.loads(done.stdout)
    assert n_mapped == n_frozen > 0
    session = Session(config(llama_folder))
    assert loss == pytest.approx(session.forward_backward(ROWS).loss.item(), rel=1e-5)
    assert norm == pytest.approx(session.optim_step().grad_norm, rel=1e-4)
