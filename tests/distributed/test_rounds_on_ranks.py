"""Sampled rounds on two ranks: the rollouts and the training of one process."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitrain.distributed.watchdog import Watchdog
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_scorer, tiny_tokenizer
from minitrain.tools.analysis.compare import read_ledger
from tests.conftest import random_llama
from tests.distributed.launch import Ranks, launch
from tests.distributed.test_fsdp import figures
from tests.rl.test_rounds import HYBRIDS

SETTINGS = {
    "grpo": ("packing=true",),
    "iterations": ("rollout.num_iterations=2", "total_batch_size=2", "n_steps=8"),
    "lora": ("lora.rank=4", "lora.init=gaussian", "loss.kl_coef=0.1"),
    "copy": ("rollout.sampler_dtype=float32", "lora.rank=4", "lora.init=gaussian", "rollout.num_iterations=2"),
    "whiten": ("loss.advantage_estimator=reinforce++-baseline", "loss.loss_aggregation=grpo", "total_batch_size=2"),
    "resample": ("rollout.zero_variance_groups=resample", "rollout.rewards=[{name: regex, pattern: '.*[a-f].*'}]"),
}
FROZEN = (
    "loss.advantage_estimator=reinforce++",
    "rollout.rewards=[{name: model, name_or_path: SCORER, batch_size: 2}, {name: teacher, name_or_path: tiny}]",
)
ROLLOUT = "rollout={num_generations: 3, prompts_per_round: 4, max_new_tokens: 5, rewards: [length], save_samples: -1}"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "say " + "x" * i}) + "\n" for i in range(10)))
    return path


def rollouts(job):
    folder = Path(job["config"]["output_dir"]) / job["config"]["exp_name"] / "rollouts"
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


SLOW = """
import time

from minitrain.rl.rewards import register_reward


@register_reward("slow")
def slow(answer, options):
    time.sleep(2 * (answer.group % 2))
    return len(answer.ids)
"""


@pytest.mark.slow(minutes=1)
def test_a_rank_waits_for_one_that_judges_for_longer_than_the_timeout(job, scratch, prompts, tmp_path):
    """The prompts of rank 1 take 2 x 3 x 2 seconds, while rank 0 waits. A rank that hangs is still found."""
    (tmp_path / "slow.py").write_text(SLOW)
    options = (f"datasets=[{prompts}]", "loss.name=policy", "total_batch_size=4", ROLLOUT, "rollout.rewards=[slow]")
    more = ("n_steps=1", "fsdp.timeout_seconds=6")
    one = job("slow", *options, *more, fsdp="full", plugin=str(tmp_path / "slow.py"))
    began = time.monotonic()
    launch(2, [one], scratch / "slow")
    assert time.monotonic() - began > 12
    one = job("hangs", *options, *more, "rollout.rewards=[length]", fsdp="full", plugin=str(tmp_path / "slow.py"))
    code, output = Ranks(2, [one], scratch / "hangs", {"MINITRAIN_FAULT": "round.reward:sleep#1"}).finish()
    assert code == 1 and "rank 1: no progress for 6 s in round 1; the others wait for this rank" in output


def test_a_wait_with_its_own_limit_does_not_count():
    """Later progress does not shorten it; the next collective does."""
    watchdog, began = Watchdog(0, 2, None, 1.0), time.monotonic()
    watchdog.keep_alive(100.0)
    watchdog.keep_alive()
    assert watchdog.last >= began + 100
    watchdog.beat()
    assert watchdog.last <= time.monotonic()


def test_ranks_share_the_prompts_of_trainer_generate(job, scratch, tmp_path):
    """The responses of one process, in order; the two blocks and the rest are gathered once, however long they are."""
    settings = ("eval_generate={n_examples: 5, max_new_tokens: 8}", "validation_split=6", "lr=1e-4")
    alone = job("alone", *settings, answers=str(tmp_path / "alone"))
    ranked = job("ranks", *settings, fsdp="full", answers=str(tmp_path / "ranks"))
    launch(0, [alone], scratch / "alone")
    launch(2, [ranked], scratch / "ranks")
    found, wanted = (json.loads((tmp_path / name).read_text()) for name in ("ranks", "alone"))
    assert len(set(wanted[2]["texts"])) == 5
    assert [one["texts"] for one in found] == [one["texts"] for one in wanted]
    assert [one["gathers"] for one in found] == [[3, 3]] * 3
    found, wanted = (figures(one, "eval") for one in (ranked, alone))
    assert [row["exact_match"] for row in found] == [row["exact_match"] for row in wanted]


def test_two_ranks_sample_and_train_as_one_process(job, scratch, prompts, tmp_path):
    """The same answers to the same prompts, each rank its own groups, and the same gradients: means and deviations are
    those of all ranks (silent RL bug R22).

    A reward model and a teacher are sharded, and score the answers of a rank in as many batches as the other has.
    Of a hybrid, each rank samples with the slower loop.
    """
    save_model(tiny_scorer(random_llama(), 1, 1), tiny_tokenizer(), tmp_path / "scorer", torch.float32)
    settings = SETTINGS | {"frozen": tuple(one.replace("SCORER", str(tmp_path / "scorer")) for one in FROZEN)}
    torch.manual_seed(0)
    save_model(HYBRIDS["lfm2"](), tiny_tokenizer(), tmp_path / "hybrid", torch.float32)
    settings["hybrid"] = (f"model.name_or_path={tmp_path / 'hybrid'}", "rollout.temperature=0.7")
    options = (f"datasets=[{prompts}]", "loss.name=policy", "total_batch_size=4", ROLLOUT)
    alone = {name: job(name, *options, *more) for name, more in settings.items()}
    ranked = {name: job(f"ranks-{name}", *options, *more, fsdp="full") for name, more in settings.items()}
    launch(0, list(alone.values()), scratch / "alone")
    launch(2, list(ranked.values()), scratch / "ranks")
    for name, wanted in alone.items():
        ours, theirs = rollouts(ranked[name]), rollouts(wanted)
        assert [one["messages"] for one in ours] == [one["messages"] for one in theirs], name
        rewards = [one["reward"] for one in theirs]
        assert [one["reward"] for one in ours] == pytest.approx(rewards, rel=1e-4, abs=1e-4), name
        # The loss of a round is 0 up to rounding, so gradients and weights are compared.
        for file in ("gradients", "ended"):
            found, expected = load_file(ranked[name][file]), load_file(wanted[file])
            for key in expected:
                torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=5e-4, msg=f"{name} {file} {key}")
        ledgers = [
            read_ledger(Path(one["config"]["output_dir"]) / one["config"]["exp_name"]) for one in (ranked[name], wanted)
        ]
        assert [line.tokens for line in ledgers[0].values()] == [line.tokens for line in ledgers[1].values()], name
