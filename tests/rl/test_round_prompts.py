"""Prompts of rounds: their tokens, what of them is trained on, and what is left out; estimators of the KL."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from minitrain import Trainer, load_config
from minitrain.inference.evaluation import response_start
from minitrain.losses.advantages import kl_estimate
from minitrain.model.tiny import tiny_model, tiny_tokenizer
from minitrain.tools.preflight.validate import validate
from minitrain.training.setup import dry_run

ROLLOUT = {"num_generations": 3, "prompts_per_round": 4, "max_new_tokens": 4, "rewards": ["length"]}


@pytest.fixture
def config(tmp_path):
    def make(rows, **options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = {"datasets": [str(tmp_path / "rows.jsonl")], "model": {"name_or_path": "tiny"}, "quiet": True}
        base |= {"output_dir": str(tmp_path / "runs"), "exp_name": "run", "total_batch_size": 4, "n_steps": 1}
        return base | {"loss": {"name": "policy"}, "rollout": ROLLOUT, "packing": True} | options

    return make


def conversation(n: int) -> dict:
    """n questions, all of them answered."""
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(n) for role in ("user", "assistant")]
    return {"messages": turns}


@pytest.mark.parametrize("loss", ["policy", "dpo", "kto", "sft"])
def test_answers_in_the_prompt_are_not_trained_on(config, loss):
    """Only what was sampled has a target, not the first two answers of a conversation of three (silent RL bug R29)."""
    trainer = Trainer(config([conversation(3)] * 4, loss={"name": loss}))
    prompt = trainer.train_loader.prompts.get(0, 0)
    text = trainer.tokenizer.decode(prompt.ids)
    assert "assistant 0" in text and "assistant 1" in text and "assistant 2" not in text
    next(trainer.train_loader.steps())
    cache, n = trainer.train_loader.examples.caches[0], len(prompt.ids)
    for start, stop in zip(cache.offsets[:-1], cache.offsets[1:], strict=True):
        assert cache.ids[start : start + n].tolist() == prompt.ids
        assert not cache.mask[start : start + n].any() and 1 <= cache.mask[start + n : stop].sum() <= 4


@pytest.mark.parametrize("template", ["{{ bos_token }}", "", None])
def test_prompts_are_those_of_training_on_answers(config, tmp_path, template):
    """One BOS, whether the tokenizer, the chat template or both add it (silent RL bug R30)."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.backend_tokenizer.post_processor = begins
    if template is not None:
        tokenizer.chat_template = template + (
            "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    tiny_model(0, len(tokenizer), tokenizer.eos_token_id, 0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"model": {"name_or_path": str(tmp_path / "model")}}
    options |= {"chat_template": "auto" if template is not None else "none"}
    rows = [{"prompt": f"say {i}", "response": f"{i}"} for i in range(4)]
    trained = dry_run(load_config(config(rows, **options, loss={"name": "sft"}, rollout={})))
    sampled = Trainer(config(rows, **options)).train_loader.prompts
    for i in range(4):
        (document,) = trained.data.train[i]
        prompt = document.ids[: response_start(document, trained.template)].tolist()
        assert sampled.get(i, i).ids == prompt and prompt[0] == bos and prompt.count(bos) == 1


def test_prompts_that_are_too_long_are_left_out_and_counted(config):
    """Nothing is cut: what is left has all of its tokens, from the first one (silent RL bug R31)."""
    rows = [{"prompt": "a" * n} for n in (5, 100, 20, 101, 30, 40)]
    options = config(rows, max_length=64)
    report = validate(load_config(options))
    assert report["examples"].startswith("4 to train on")
    assert "2 examples dropped (longer than max_length)" in report["left out"]
    trainer = Trainer(options)
    assert any("2 examples dropped" in note for note in trainer.notes)
    prompts = trainer.train_loader.prompts
    texts = [trainer.tokenizer.decode(prompts.get(i, i).ids) for i in range(len(prompts))]
    assert texts == [f"<|im_start|>user\n{'a' * n}<|im_end|>\n<|im_start|>assistant\n" for n in (5, 20, 30, 40)]
    assert len(Trainer(options | {"max_prompt_length": 40, "exp_name": "other"}).train_loader.prompts) == 2


def test_the_gradients_of_estimators_of_the_kl():
    """By enumeration of 3 tokens: that of k1 in the loss is 0, and that of k2 is the KL's (silent RL bug R25)."""
    torch.manual_seed(0)
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, dtype=torch.float64).log_softmax(0)

    def gradient(function):
        return torch.autograd.grad(function(logits.log_softmax(0)), logits)[0]

    def expected(estimator):
        return lambda logps: (logps.detach().exp() * kl_estimate(logps - reference, estimator)).sum()

    kl = gradient(lambda logps: (logps.exp() * (logps - reference)).sum())
    reverse = gradient(lambda logps: (reference.exp() * (reference - logps)).sum())
    assert gradient(expected("k1")).abs().max() < 1e-12 < kl.abs().max()
    torch.testing.assert_close(gradient(expected("k2")), kl)
    torch.testing.assert_close(gradient(expected("k3")), reverse)
