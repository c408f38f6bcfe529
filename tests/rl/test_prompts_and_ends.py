"""Ends of answers, resumed references and the answers that are trained on (silent RL bugs R27, R34, R36, R45)."""

import pytest
import torch

from tests.conftest import metrics
from tests.rl.test_rounds import ROLLOUT, online  # noqa: F401 (a fixture)


def spans(cache):
    return [slice(a, b) for a, b in zip(cache.offsets[:-1], cache.offsets[1:], strict=True)]


def test_a_resumed_run_keeps_its_reference(online):  # noqa: F811
    """The reference is the model before training, not that of the checkpoint (silent RL bug R27)."""
    options = {
        "loss": {"name": "policy", "kl_coef": 0.1},
        "n_steps": 4,
        "lr": 0.1,
        "save_every_steps": 1,
        "log_every_steps": 1,
    }
    whole = online("whole", **options)
    whole.train()

    def stop(trainer):
        if trainer.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        online("cut", hooks={"on_save": stop}, **options).train()
    resumed = online("cut", **options)
    resumed.train()
    expected, found = ([row["kl"] for row in metrics(trainer)] for trainer in (whole, resumed))
    assert found[-2:] == expected[-2:] and min(abs(kl) for kl in expected[-2:]) > 1e-3


def test_the_end_of_a_truncated_answer_is_what_was_sampled(online):  # noqa: F811
    """An end token in its place would have another log-probability under the policy (silent RL bug R34)."""
    trainer = online(n_steps=1, lr=1e-30, rollout={"max_new_tokens": 2, "importance_correction": "tis"})
    trainer.train()
    cache = trainer.train_loader.examples.caches[0]
    cut = [span for span, ended in zip(spans(cache), cache.doc_features["ended"], strict=True) if not ended]
    assert cut
    for span in cut:
        ids, targets = cache.ids[span], cache.mask[span].bool()
        assert int(targets.sum()) == 2 and bool(targets[-1])
        logits = trainer.generator.model(input_ids=ids[None].long()).logits[0, :-1]  # [T - 1, V]
        logps = logits.log_softmax(-1).gather(1, ids[1:, None].long())[:, 0]  # [T - 1]
        sampled = cache.token_features["sample_logps"][span][1:]
        torch.testing.assert_close(logps[targets[1:]], sampled[targets[1:]], rtol=1e-4, atol=1e-4)


def test_only_truncated_answers_lose_their_reward(online):  # noqa: F811
    """`truncated: zero` changes no reward of an answer that has ended (silent RL bug R36)."""
    found = {}
    for truncated in ("keep", "zero"):
        rollout = {"truncated": truncated, "max_new_tokens": 4, "rewards": [{"name": "length", "target": 100}]}
        trainer = online(truncated, n_steps=1, rollout=rollout)
        trainer.template.end_ids = lambda: list(range(3, 30))
        trainer.train()
        features = trainer.train_loader.examples.caches[0].doc_features
        found[truncated] = features["reward"].copy(), features["ended"].astype(bool)
    (kept, ended), (zeroed, again) = found["keep"], found["zero"]
    assert (ended == again).all() and 0 < ended.sum() < len(ended) and (kept[ended] != 0).any()
    assert (kept[ended] == zeroed[ended]).all() and (zeroed[~ended] == 0).all() and (kept[~ended] != 0).any()


def test_all_lengths_are_trained_on(online):  # noqa: F811
    """The trained answers have the lengths of the sampled ones, in each pass (silent RL bug R45)."""
    rollout = {"num_iterations": 2, "prompts_per_round": 4, "max_new_tokens": 12}
    trained = []

    def note(trainer):
        trained.extend(trainer.indices)

    trainer = online(n_steps=4, total_batch_size=2, rollout=rollout, hooks={"on_step_end": note})
    trainer.template.end_ids = lambda: list(range(3, 60))
    trainer.train()
    examples = trainer.train_loader.examples
    lengths = [[int(document.mask.sum()) for document in examples[i]] for i in range(4)]
    assert len({n for of_prompt in lengths for n in of_prompt}) > 3
    assert sorted(trained) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sum(map(len, lengths)) == 4 * ROLLOUT["num_generations"]
