"""The estimate of the memory of rounds against rounds that are sampled and trained on."""

import gc
import json
import re

import pytest
import torch

from minitrain import Trainer, load_config
from minitrain.data.loader import TokenizedDataset
from minitrain.model import attention
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_scorer, tiny_tokenizer
from minitrain.tools.preflight import memory_rounds
from minitrain.tools.preflight.memory import StepInputs, _estimate, _largest_batch, estimate_memory, simulate_step
from minitrain.tools.preflight.memory_rounds import (
    COPY,
    JUDGES,
    KEYS_AND_VALUES,
    PROMPTS,
    Judge,
    conversation_limit,
    longest_round,
    simulate_judging,
    simulate_sampling,
)
from minitrain.tools.preflight.memory_tracker import MemoryTracker
from minitrain.tools.preflight.validate import validate
from minitrain.training.setup import dry_run, make_loader
from tests.conftest import random_llama
from tests.rl.test_rounds import HYBRIDS
from tests.scorers import random_base

CPU = torch.device("cpu")
ROLLOUT = {"num_generations": 6, "prompts_per_round": 8, "max_new_tokens": 30, "num_slots": 16, "rewards": ["length"]}
PPO = {"name": "policy", "advantage_estimator": "gae", "vf_coef": 0.1, "kl_coef": 0.1}


@pytest.fixture
def config(tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "say " * (1 + i), "answer": "a"}) + "\n" for i in range(12)))

    def make(model="tiny", rollout=None, dtype="float32", **options):
        base = {
            "model": {"name_or_path": str(model), "policy_dtype": dtype},
            "datasets": [str(rows)],
            "output_dir": str(tmp_path / "runs"),
        }
        base |= {"loss": {"name": "policy"}, "total_batch_size": 4, "rollout": ROLLOUT | (rollout or {})}
        return load_config(base | {"exp_name": "run", "quiet": True} | options)

    return make


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True, "loss": PPO},
        {"loss": {"name": "dpo"}, "dtype": "bfloat16"},
        {"loss": {"name": "kd", "teacher": "tiny"}},
        {"loss": {"name": "kto"}, "lora": {"rank": 2}},
        {"loss": {"name": "sft"}, "rollout": {"num_slots": 2, "top_p": 0.9, "top_k": 20}},
        {"soft_prompt": {"num_virtual_tokens": 3, "method": "prefix"}},
        {
            "rollout": {
                "rewards": [{"name": "model", "name_or_path": "SCORER"}, {"name": "teacher", "name_or_path": "tiny"}]
            }
        },
        {"rollout": {"sampler_dtype": "bfloat16"}, "lora": {"rank": 2}},
    ],
    ids=str,
)
def test_parts_are_those_of_a_real_model(config, tmp_path, options):
    """The same step, sampling and judging with real tensors: every part to the byte.

    Nothing that a training keeps depends on when Python collects garbage.
    """
    if "rewards" in options.get("rollout", {}):
        save_model(tiny_scorer(random_llama(), 1, 1), tiny_tokenizer(), tmp_path / "scorer", torch.float32)
        options = json.loads(json.dumps(options).replace("SCORER", str(tmp_path / "scorer")))
    config = config(**options)
    found = estimate_memory(dry_run(config), CPU)
    trainer, tracker = Trainer(config), MemoryTracker()
    config = trainer.config
    prompts = trainer.train_loader.prompts.examples
    limit = conversation_limit(config, trainer.policy)
    data = longest_round(prompts, config, trainer.loss, limit)
    loader = make_loader(data, config, trainer.tokenizer, trainer.policy)
    attention._groups.cache_clear()
    gc.collect()
    batches = [_largest_batch(loader, False)]

    judges = [Judge(judge.model, 16) for judge in trainer.train_loader.judges if judge]
    inputs = StepInputs(config, trainer.loss, trainer.policy, trainer.models, trainer.parallel, batches, judges=judges)
    simulate_step(inputs, tracker)
    gc.collect()
    estimates = [(found, _estimate(tracker))]
    simulate_sampling(trainer.policy, prompts, config, trainer.parallel, trainer.precision, tracker)
    estimates.append((found.sampling, _estimate(tracker)))
    if judges:
        simulate_judging(judges, prompts, config, trainer.policy, trainer.parallel, tracker)
        estimates.append((found.judging, _estimate(tracker)))
        weights = sum(tensor.nbytes for judge in judges for tensor in judge.model.tensors())
        assert found.parts[JUDGES] == found.judging.parts[JUDGES] == weights
    for estimate, real in estimates:
        assert estimate.parts == real.parts and estimate.peak == real.peak and estimate.parts["optimizer"]


def test_judging_stays_within_the_estimate(config):
    """All answers reach the limit. The teacher reads the tokens of the policy; a reward model has its own."""
    config = config(rollout={"rewards": [{"name": "teacher", "name_or_path": "tiny"}]})
    judging = estimate_memory(dry_run(config), CPU).judging
    estimate = judging.peak - judging.parts["weights"] - judging.parts["optimizer"] - judging.parts[JUDGES]
    trainer, tracker = Trainer(config), MemoryTracker()
    trainer.template.end_ids = list
    rounds = trainer.train_loader
    episodes = rounds.play([rounds.prompts.get(int(i), n) for n, i in enumerate(range(4, 12))], (0,), 6)
    with tracker:
        rounds.judge(episodes)
    assert 0.7 * estimate < tracker.peak <= 1.03 * estimate  # the layout of a batch has no part in it


@pytest.mark.parametrize("kind", ["tiny", "gpt2", "qwen2", "bfloat16"])
@pytest.mark.parametrize("n_slots", [5, 16, 64])
def test_a_round_that_is_sampled_stays_within_the_estimate(config, tmp_path, kind, n_slots):
    """All answers reach the limit, at the same time, so with 64 slots no rows are exchanged: half of the estimate."""
    dtype = {"dtype": kind} if kind == "bfloat16" else {}
    model = "tiny" if kind in ("tiny", "bfloat16") else random_base(kind, tmp_path / kind)
    config = config(model, rollout={"num_slots": n_slots}, **dtype)
    sampling = estimate_memory(dry_run(config), CPU).sampling
    estimate = sampling.peak - sampling.parts["weights"] - sampling.parts["optimizer"]
    trainer, tracker = Trainer(config), MemoryTracker()
    trainer.template.end_ids = list
    rounds = trainer.train_loader
    prompts = [rounds.prompts.get(int(i), n) for n, i in enumerate(range(4, 12))]
    with tracker:
        episodes = rounds.play(prompts, (0,), 6)
    assert {len(episode.ids) for group in episodes for episode in group} <= {29, 30}  # gpt2 has 96 positions
    assert (0.45 if n_slots == 64 else 0.66) * estimate < tracker.peak <= estimate


def test_the_copy_that_samples_by_hand(config):
    """Two bytes for each weight, besides those in training."""
    run = dry_run(config(rollout={"sampler_dtype": "bfloat16"}))
    n = sum(parameter.numel() for parameter in run.policy.parameters())
    assert estimate_memory(run, CPU).sampling.parts[COPY] == 2 * n


def test_the_default_number_of_slots(config, monkeypatch):
    """It is that of the sampler, for the longest conversation."""
    estimates, lengths = [], []
    monkeypatch.setattr(memory_rounds, "fitting_slots", lambda policy, length: lengths.append(length) or 3)
    for n_slots in (None, 3, 4):
        run = dry_run(config(rollout={"num_slots": n_slots}))
        estimates.append(estimate_memory(run, CPU).sampling.parts)
    assert estimates[0] == estimates[1] != estimates[2]
    assert set(lengths) == {int(run.data.train.lengths.max()) + 30}


def test_keys_and_values_by_hand(config):
    """2 layers of 2 x 64 float32 in 16 slots. Two batches of rows are held while some of them are exchanged."""
    run = dry_run(config())
    length = int(run.data.train.lengths.max()) + 30
    found = estimate_memory(run, CPU).sampling.parts[KEYS_AND_VALUES]
    capacity = [width + 64 * (1 + width // 256) for width in (length - 3, length - 2)]
    copied = 64 * 4 * 8 * (length - 2)  # of one tensor
    assert found == pytest.approx(2 * 2 * 64 * 4 * 16 * sum(capacity) + copied, rel=0.001)


def test_keys_and_values_of_graphs_by_hand(config):
    """The first batch is in the memory of the graphs, whose columns are a multiple of 64, while the second is made."""
    run = dry_run(config(packing=True))
    length = int(run.data.train.lengths.max()) + 30
    found = estimate_memory(run, torch.device("cuda")).sampling.parts[KEYS_AND_VALUES]
    first, second = (width + 64 * (1 + width // 256) for width in (length - 3, length - 2))
    rounded = -(-first // 64) * 64
    assert rounded > first and rounded >= second
    copied = 64 * 4 * 8 * (length - 2)  # of one tensor
    assert found == pytest.approx(2 * 2 * 64 * 4 * 16 * (rounded + second) + copied, rel=0.001)


@pytest.mark.parametrize("n_slots", [5, 16])
def test_graphs_take_what_they_take_with_real_tensors(config, n_slots):
    config = config(rollout={"num_slots": n_slots}, packing=True)
    run = dry_run(config)
    found = estimate_memory(run, torch.device("cuda")).sampling
    trainer, tracker = Trainer(config), MemoryTracker()
    simulate_sampling(
        trainer.policy, run.data.train, trainer.config, trainer.parallel, trainer.precision, tracker, with_graphs=True
    )
    real = _estimate(tracker).parts
    assert real.keys() == {KEYS_AND_VALUES, PROMPTS, "activations", "head"}
    assert real == {part: found.parts[part] for part in real}


def test_every_answer_of_the_longest_round_has_its_longest_length(config):
    config = config(rollout={"max_turns": 3, "environment": {"name": "tools", "tools": ["calculator"]}}, max_length=80)
    run = dry_run(config)
    data = longest_round(run.data.train, config, run.loss, conversation_limit(config, run.policy))
    assert isinstance(data, TokenizedDataset) and len(data) == 8
    lengths = run.data.train.lengths
    assert data.lengths.tolist() == sorted((n + 6 * min(90, 80 - n) for n in lengths), reverse=True)[:8]


def test_what_samples_is_reported_where_it_is_not_estimated(config, tmp_path):
    """A hybrid, which needs the slower loop, and a server."""
    torch.manual_seed(0)
    save_model(HYBRIDS["lfm2"](), tiny_tokenizer(), tmp_path / "lfm2", torch.float32)
    assert re.fullmatch(
        r"with the slower loop .*; 16 slots of \d+ tokens", validate(config(tmp_path / "lfm2"))["sampling"]
    )
    server = config(rollout={"engine": "vllm", "engine_args": {"url": "http://gpu:8000"}})
    assert re.search(r"http://gpu:8000, 8 prompts .* \d+ tokens; ", validate(server)["sampling"])


def test_both_are_reported(config):
    report = validate(config())
    assert "activations" in report["peak memory"] and "gradients" in report["peak memory"]
    assert "keys and values" in report["sampling"] and "16 slots of " in report["sampling"]
    assert "gradients" not in report["sampling"] and "optimizer" in report["sampling"]
