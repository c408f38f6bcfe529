"""Two ranks whose answers a vLLM server samples: weights are gathered from shards, and each rank asks for its own."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitrain.config.sections import ModelConfig
from minitrain.model.load import load_merged, load_tokenizer
from tests.distributed.launch import launch
from tests.rl.vllm_server import VLLMServer

pytestmark = pytest.mark.slow(minutes=1)


def test_two_ranks_use_one_server(job, scratch, tmp_path, llama_folder):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "say " + "x" * i}) + "\n" for i in range(10)))
    server = VLLMServer(AutoModelForCausalLM.from_pretrained(llama_folder), AutoTokenizer.from_pretrained(llama_folder))
    rollout = {
        "num_generations": 3,
        "prompts_per_round": 4,
        "max_new_tokens": 5,
        "rewards": ["length"],
        "engine": "vllm",
        "engine_args": {"url": server.url, "sleep": True},
    }
    options = (f"datasets=[{path}]", f"eval_datasets=[{path}]", "loss.name=policy", "total_batch_size=4", "lr=0.05")
    options = (*options, f"rollout={json.dumps(rollout)}")
    weights = {}
    for name, more in {"full": (), "lora": ("lora.rank=4", "lora.init=gaussian")}.items():
        server.requests.clear()
        one = job(name, *options, *more, fsdp="full")
        launch(2, [one], scratch / name)
        weights[name] = dict(server.current.model.state_dict())
        paths = [path for path, _ in server.requests]
        assert paths.count("/collective_rpc") == 6  # for the check, for 2 evaluations and for 3 rounds
        assert paths.count("/wake_up") == 5 and paths.count("/sleep?level=1") == 6 and server.is_asleep
        assert paths.count("/v1/completions") == 2 * 2 + 3 * 4 + 2 * 10
        server.is_asleep = False
    final = {name: Path(one["config"]["output_dir"]) / name / "final" for name in weights}
    config = ModelConfig(str(llama_folder), adapter=str(final["lora"]))
    expected = {
        "full": AutoModelForCausalLM.from_pretrained(final["full"]),
        "lora": load_merged(config, load_tokenizer(config)),
    }
    for name, model in expected.items():
        for key, value in model.state_dict().items():
            torch.testing.assert_close(weights[name][key], value, rtol=1e-5, atol=1e-5, msg=f"{name} {key}")
    # A reload that takes longer than the timeout.
    server.faults["/collective_rpc"] = lambda handler, body: time.sleep(12)
    server.is_asleep = False
    launch(2, [job("slow", *options, "n_steps=1", "fsdp.timeout_seconds=6", fsdp="full")], scratch / "slow")
    server.close()
