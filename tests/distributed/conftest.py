"""Jobs over the random Llama for the driver."""

from pathlib import Path

import pytest


@pytest.fixture
def job(tmp_path, llama_folder, rows_file):
    """``job("name", "lr=0.1", fsdp="full", dropout=0.2)``: a job with a run directory and files named after it."""

    def make(name: str, *overrides: str, fsdp: str | None = None, **more) -> dict:
        base = {
            "datasets": [str(rows_file)],
            "model": {"name_or_path": str(llama_folder)},
            "output_dir": str(tmp_path / "runs"),
            "cache_dir": str(tmp_path / "cache"),
            "exp_name": name,
            "total_batch_size": 8,
            "n_steps": 3,
            "lr": 1e-2,
            "log_every_steps": 1,
            "num_proc": 1,
            "max_grad_norm": 0.5,
        }
        if fsdp:
            base |= {"trainer": "FSDPTrainer", "fsdp": {"shard": fsdp}}
        files = {key: str(tmp_path / f"{name}.{key}") for key in ("trace", "ended", "gradients")}
        return {"config": base, "overrides": list(overrides), **files, **more}

    return make


@pytest.fixture
def scratch(tmp_path) -> Path:
    return tmp_path / "launch"
