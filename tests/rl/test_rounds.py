"""Online training: rounds that are sampled, judged and trained on."""

import json

import numpy as np
import pytest
import torch
import transformers as tf

from minitrain import ConfigError, DataError, Trainer
from minitrain.data.sampler import epoch_order
from minitrain.inference import choice
from minitrain.inference.sampler import by_own_logits
from minitrain.losses import create_loss
from minitrain.model.logprobs import logits_of
from minitrain.model.tiny import tiny_tokenizer
from minitrain.rl import rewards as registry
from minitrain.rl import rounds as round_loader
from minitrain.rl.documents import JudgedAnswer, make_examples, tensors_of
from minitrain.rl.rewards import NoOptions, RewardFunction
from minitrain.rl.rounds import MAX_EMPTY_ROUNDS, Rounds
from tests.conftest import metrics
from tests.messages import raises
from tests.shapes import SHAPE as TINY

ROLLOUT = {
    "num_generations": 4,
    "prompts_per_round": 4,
    "max_new_tokens": 6,
    "rewards": ["length", {"name": "regex", "pattern": ".*a.*", "weight": 2.0}],
}
LOSSES = {
    "grpo": {"name": "policy"},
    "ppo": {"name": "policy", "advantage_estimator": "gae", "vf_coef": 0.1, "kl_coef": 0.01},
    "dpo": {"name": "dpo"},
    "kto": {"name": "kto"},
    "sft": {"name": "sft"},
    "dft": {"name": "dft"},
    "kd": {"name": "kd", "teacher": "tiny"},
}


@pytest.fixture
def online(tmp_path):
    """Return a function that makes a trainer on sampled answers."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": str(i)}) + "\n" for i in range(12)))

    def make(exp_name="run", rollout=None, hooks=None, **options):
        config = {
            "model": {"name_or_path": "tiny"},
            "datasets": [str(rows)],
            "output_dir": str(tmp_path / "runs"),
            "exp_name": exp_name,
            "quiet": True,
            "loss": {"name": "policy"},
            "total_batch_size": 4,
            "n_steps": 2,
            "lr": 1e-3,
            "packing": True,
            "save_every_steps": 0,
            "rollout": {} if rollout is False else ROLLOUT | (rollout or {}),
        }
        return Trainer(config | options, **(hooks or {}))

    return make


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_that_generates_trains_online(online, name, packing):
    trainer = online(loss=LOSSES[name], packing=packing)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.train()
    after = zip(before, trainer.parameters, strict=True)
    assert trainer.step == 2 and any(not torch.equal(old, new) for old, new in after)


def test_the_ratio_is_1_where_the_policy_has_sampled(online):
    """The packed training pass gives the log-probabilities of the decode loop: no ratio differs from 1."""
    trainer = online(rollout={"temperature": 0.7, "num_iterations": 2}, n_steps=1)
    trainer.train()
    cache = trainer.train_loader.examples.caches[0]
    targets = cache.mask.bool()
    old, sampled = (cache.token_features[name][targets] for name in ("old_logps", "sample_logps"))
    torch.testing.assert_close(old, sampled, rtol=1e-4, atol=1e-4)
    assert trainer.train_metrics["ratio"] == pytest.approx(1, abs=1e-4)


def test_a_round_equals_the_same_rollouts_from_a_file(online, tmp_path):
    """The gradient of a round is that of a file with its token ids, rewards and groups."""
    trainer = online(rollout={"save_samples": -1}, n_steps=1)
    batches = next(trainer.train_loader.steps())[1]
    gradients = _gradients(trainer, batches)
    cache, rows = trainer.train_loader.examples.caches[0], []
    for document in range(len(cache.offsets) - 1):
        span = slice(cache.offsets[document], cache.offsets[document + 1])
        ids, mask = cache.ids[span].tolist(), cache.mask[span].tolist()
        start = mask.index(1)
        reward = float(cache.doc_features["reward"][document])
        rows.append({"prompt_ids": ids[:start], "response_ids": ids[start:], "reward": reward})
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / "rollouts.jsonl")]
    offline = online("offline", rollout=False, datasets=files, total_batch_size=len(rows))
    again = _gradients(offline, next(offline.train_loader.steps())[1])
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


def _gradients(trainer, batches):
    trainer.forward_backward(batches)
    return {name: p.grad.clone() for name, p in trainer.policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_an_interrupted_round_resumes_bit_for_bit(online, stop_at):
    """Two passes of two steps over each round: within a pass, at its end, and at the end of a round."""
    rollout = {"num_iterations": 2, "zero_variance_groups": "resample", "prompts_per_round": 4}
    options = {"rollout": rollout, "total_batch_size": 2, "n_steps": 6, "save_every_steps": 1, "keep_checkpoints": 9}
    whole = online("whole", **options)
    whole.train()

    def stop(trainer):
        if trainer.step == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        online("cut", hooks={"on_save": stop}, **options).train()
    resumed = online("cut", **options)
    resumed.train()
    ledgers = [(trainer.run.path / "ledger.jsonl").read_text() for trainer in (whole, resumed)]
    assert ledgers[0] == ledgers[1]


@pytest.mark.parametrize("part", ["sampling", "judging", "logps"])
def test_a_signal_within_a_round_ends_it_at_once(online, part, monkeypatch):
    """The round is dropped, and its prompts are drawn again: the ledger is that of an undisturbed run."""
    options = {"n_steps": 3, "rollout": {"importance_correction": "tis"}}
    undisturbed = online("undisturbed", **options)
    undisturbed.train()
    trainer, calls = online("stopped", **options), []
    rounds = trainer.train_loader

    def interrupting(function):
        def call(*args):
            calls.append(rounds.number)
            if trainer.step == 1 and trainer.signal is None:
                trainer._receive(15)
            return function(*args)

        return call

    if part == "sampling":
        monkeypatch.setattr(choice.Chooser, "__call__", interrupting(choice.Chooser.__call__))
    elif part == "judging":
        monkeypatch.setattr(rounds.workers, "keep_alive", interrupting(rounds.workers.keep_alive))
    else:
        monkeypatch.setattr(round_loader, "add_logps", interrupting(round_loader.add_logps))
    trainer.train()
    assert (trainer.signal, trainer.step, rounds.workers.workers) == (15, 1, [])
    assert calls.count(0) == 1  # after the first round
    monkeypatch.undo()
    online("stopped", **options).train()
    ledgers = [(one.run.path / "ledger.jsonl").read_text() for one in (undisturbed, trainer)]
    assert ledgers[0] == ledgers[1]


def test_a_signal_before_a_round_samples_nothing(online):
    """No prompts are drawn, and no engine is given the weights, which takes long for a large model."""
    trainer = online(n_steps=3, hooks={"on_step_end": lambda trainer: trainer._receive(15)})
    engine, calls = trainer.train_loader.engine, []
    refresh = engine.refresh
    engine.refresh = lambda is_updated: calls.append(trainer.step) or refresh(is_updated)
    trainer.train()
    assert (trainer.signal, trainer.step, calls) == (15, 1, [0])


@pytest.mark.parametrize(("point", "number"), [("round.sample", 0), ("round.logps", 1)])
def test_a_signal_after_a_round_that_ends_without_targets(online, monkeypatch, point, number):
    """The second half of the first round has nothing to train on, so the second round is sampled, or has been."""
    of_round, rest = round_loader.RoundData.is_trained.func, epoch_order([4], [1.0], 0, 0)[2:]

    def is_trained(data):
        first = data.caches and data.caches[0].source == "round 1"
        return of_round(data) & ~np.isin(range(data.n), rest if first else [])

    monkeypatch.setattr(round_loader.RoundData, "is_trained", property(is_trained))
    options = {"total_batch_size": 2, "n_steps": 4, "seed": 0}
    undisturbed = online("undisturbed", **options)
    undisturbed.train()
    trainer = online("stopped", **options)
    with monkeypatch.context() as patch:
        patch.setattr(round_loader, "failpoint", lambda name: name == point and trainer.step and trainer._receive(15))
        trainer.train()
    assert (trainer.step, trainer.consumed, trainer.train_loader.number) == (1, 2, number)
    online("stopped", **options).train()
    ledgers = [(one.run.path / "ledger.jsonl").read_text() for one in (undisturbed, trainer)]
    assert ledgers[0] == ledgers[1]


def test_the_watchdog_waits_for_slow_rewards(online):
    """The trainer passes on how long a call can take, which fsdp.timeout_seconds does not limit."""
    trainer, beats = online(), []
    trainer.parallel.keep_alive = beats.append
    trainer.train_loader.workers.keep_alive(7.0)
    assert beats == [7.0]


def test_a_signal_ends_an_evaluation_of_answers(online, monkeypatch):
    """Also the processes whose calls have begun."""
    trainer = online(validation_split=2)
    workers = trainer.train_loader.workers
    monkeypatch.setattr(workers, "keep_alive", lambda seconds: [trainer._receive(2), trainer.keep_alive()])
    assert trainer.evaluate() == {} and workers.workers == []


def test_rewards_rise(online):
    """30 rounds of GRPO for an `a` in the answer: from a fraction to most of the answers."""
    trainer = online(
        rollout={"rewards": [{"name": "regex", "pattern": ".*a.*"}], "prompts_per_round": 8},
        n_steps=30,
        total_batch_size=8,
        lr_scheduler="constant",
    )
    trainer.train()
    rewards = [row["reward"] for row in metrics(trainer, "rollout")]
    assert len(rewards) == 30 and sum(rewards[:3]) / 3 < 0.35 and sum(rewards[-3:]) / 3 > 0.4


def answer(reward, ids=(5, 6), ended=True):
    return JudgedAnswer([3, 4], list(ids), [True] * len(ids), [-1.0] * len(ids), reward, ended)


def test_what_a_loss_makes_of_the_answers(online):
    """Best and worst for preferences, the best for sft, all for rollouts; ties and unjudged answers are left out."""
    options = online().config.rollout
    group = [answer(0.0), answer(1.0, (7,)), answer(float("nan"), (8,)), answer(0.5)]
    tie = [answer(1.0), answer(1.0)]
    examples = make_examples([group, tie], "rollout", options, False)
    assert [document.doc_features["reward"] for document in examples[0]] == [0.0, 1.0, 0.5]
    pairs = make_examples([group, tie], "preference", options, False)
    assert [document.answer.reward for document in pairs[0]] == [1.0, 0.0] and pairs[1] == []
    best = make_examples([group, tie], "conversation", options, False)
    assert [len(example) for example in best] == [1, 2] and best[0][0].answer.ids == [7]
    everything = make_examples([group], "conversation", options, True)
    assert len(everything[0]) == 4
    labeled = make_examples([group, [answer(-1.0, (9,))]], "unpaired_preference", options, False)
    assert [document.doc_features["desirable"] for document in labeled[0]] == [0, 0, 1, 1, 1, 1]
    assert labeled[0][1].answer.ids == [9] and labeled[1][1].answer.ids != [9]  # a response to the other prompt


@pytest.mark.parametrize("packing", [True, False])
def test_each_answer_keeps_its_own_reward(online, packing, monkeypatch):
    """In the round and in the batches of a step, packed or not, it is that of its own tokens (silent RL bug R13)."""
    checksum = RewardFunction(lambda one, options: float(sum(one.ids) % 97), NoOptions)
    monkeypatch.setitem(registry._REGISTRY, "checksum", checksum)
    trainer = online(rollout={"rewards": ["checksum"]}, n_steps=1, packing=packing)
    batches = next(trainer.train_loader.steps())[1]
    rewards = []
    for batch in batches:
        sums = torch.zeros(batch.n_docs, dtype=torch.int64).index_add(0, batch.target_docs, batch.targets)
        assert batch.doc_feature("reward").tolist() == (sums % 97).tolist()
        rewards += sums.tolist()
    assert len(rewards) == 16 and len(set(rewards)) > 4


def test_truncated_answers_count_in_the_group_and_are_not_trained_on(online):
    trainer = online(rollout={"truncated": "mask", "max_new_tokens": 2}, n_steps=1)
    trainer.train()
    cache = trainer.train_loader.examples.caches[0]
    ended = cache.doc_features["ended"]
    assert not ended.all()
    for document in range(len(ended)):
        span = slice(cache.offsets[document], cache.offsets[document + 1])
        assert bool(cache.mask[span].any()) == bool(ended[document])
    advantages = cache.token_features["advantages"]
    assert advantages[cache.mask == 0].any()  # theirs were computed


def test_dr_grpo_divides_by_the_option_and_not_by_the_longest_answer(online):
    trainer = online(loss={"name": "policy", "loss_aggregation": "dr_grpo"}, n_steps=1)
    trainer.train()
    assert trainer.loss.max_new_tokens == ROLLOUT["max_new_tokens"]


@pytest.mark.parametrize("packing", [True, False])
def test_the_tokens_of_a_micro_batch_are_those_of_its_round(online, packing):
    """Not those of the round before, whose answers have other lengths."""
    trainer = online(packing=packing, max_tokens_per_micro_batch=150, n_steps=3, loss={"name": "sft"})
    rounds, sizes = trainer.train_loader, []
    for round_number, (_, batches) in enumerate(rounds.steps(0)):
        longest = rounds.examples.per_example(lambda cache: np.diff(cache.offsets), np.maximum)
        sizes.append(longest.tolist())
        assert rounds.sizes.longest.tolist() == sizes[-1]
        assert len(batches) > 1 and all(batch.input_ids.numel() <= 150 for batch in batches)
        if round_number == 2:
            break
    assert len(set(map(tuple, sizes))) > 1


def test_a_checkpoint_has_the_round_only_within_it(online):
    trainer = online(rollout={"num_iterations": 2}, n_steps=1)
    trainer.train()
    rounds = trainer.train_loader
    assert isinstance(rounds, Rounds)
    state, tensors = rounds.state(4)
    assert state["round"] == 0 and tensors.keys() == tensors_of(rounds.examples.caches[0]).keys()
    assert rounds.state(8) == ({"drawn": 4, "round": None}, {})


def test_a_loss_from_files_is_untouched():
    assert create_loss("policy").online is False


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
HYBRIDS = {
    "mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(**SMALL, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8)
    ),
    "lfm2": lambda: tf.Lfm2ForCausalLM(
        tf.Lfm2Config(**SMALL | TINY | {"vocab_size": 300}, layer_types=["conv", "full_attention"])
    ),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_model_without_plain_keys_and_values_trains_online(online, tmp_path, name):
    """A slower loop samples, which the run says once; its log-probabilities are those of the policy."""
    torch.manual_seed(0)
    HYBRIDS[name]().save_pretrained(tmp_path / name)
    tiny_tokenizer().save_pretrained(tmp_path / name)
    model = {"name_or_path": str(tmp_path / name)}
    trainer = online(model=model, packing=False, rollout={"temperature": 0.7, "num_iterations": 2}, n_steps=1)
    assert len([note for note in trainer.notes if note.startswith("rollout: ")]) == 1
    trainer.train()
    cache = trainer.train_loader.examples.caches[0]
    targets = cache.mask.bool()
    old, sampled = (cache.token_features[column][targets] for column in ("old_logps", "sample_logps"))
    torch.testing.assert_close(old, sampled, rtol=1e-4, atol=1e-4)


def test_a_loop_that_differs_from_the_policy_does_not_sample(online, monkeypatch):
    """Here it forgets the scale of the logits, as one that calls the LM head itself would."""
    monkeypatch.setattr(choice, "logits_of", lambda *args: (3 * logits_of(*args)[0], None))
    trainer = online(n_steps=1)
    assert trainer.train_loader.engine.sampler.make_loop is by_own_logits
    assert any(note.startswith("rollout: ") for note in trainer.notes)


def test_a_sampler_that_differs_from_the_policy_is_refused(online, monkeypatch):
    """Here it reports log-probabilities at another temperature."""
    choose = choice.Chooser.__call__

    def hotter(self, logits, uniforms):
        ids, logps = choose(self, logits, uniforms)
        return ids, 0.9 * logps

    monkeypatch.setattr(choice.Chooser, "__call__", hotter)
    with raises(ConfigError, "unsupported-model", "rollout.num_generations: "):
        online()


@pytest.mark.parametrize("entry", [{"name": "exact_match", "key": "right"}, "exact_match"])
def test_a_reward_without_its_column_is_refused_before_a_model_is_loaded(online, tmp_path, monkeypatch, entry):
    (tmp_path / "no-answers.jsonl").write_text(json.dumps({"prompt": "say 1"}) + "\n")
    monkeypatch.setattr("minitrain.trainer.load_parts", None)
    with raises(ConfigError, "wrong-column", "rollout.rewards[0]: "):
        online(datasets=[str(tmp_path / "no-answers.jsonl")], rollout={"rewards": [entry]})


def test_rows_from_python_are_evaluated(online):
    """The answers are judged by these rows, not by those of the config's files."""
    rollout = {"rewards": ["exact_match", "length"], "eval_temperature": 0.0}
    trainer = online(n_steps=1, rollout=rollout, validation_split=2)
    trainer.train()
    said = trainer.predict(["a new prompt"], max_new_tokens=6)[0]
    for right, reward in ((said, 1.0), (f"{said} not", 0.0)):
        found = trainer.evaluate([{"prompt": "a new prompt", "answer": right}])
        assert found["reward/exact_match"] == reward


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_a_run_ends_that_has_nothing_to_train_on(online, num_iterations, monkeypatch):
    """No answer is judged, so no round has an example."""
    monkeypatch.setitem(registry._REGISTRY, "silent", RewardFunction(lambda one, options: None, NoOptions))
    trainer = online(debug=True, rollout={"rewards": ["silent"], "num_iterations": num_iterations})
    with raises(DataError, "unsuitable-data", "rollout"):
        trainer.train()
    assert trainer.train_loader.number == MAX_EMPTY_ROUNDS - 1
