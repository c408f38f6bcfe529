"""Prompt and prefix tuning against PEFT on the same parameters; in training, generation and files."""

import pytest
import torch
from safetensors.torch import load_file

from minitrain import ConfigError, load_config
from minitrain.batch import Batch
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig, SoftPromptConfig
from minitrain.inference.generate import Sampling, load_generator
from minitrain.model.adapter_files import load_adapter
from minitrain.model.load import build_policy
from minitrain.model.policy import Policy
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import weights
from tests.messages import raises
from tests.model.test_lora import IDS, _Tokens, base, close, folders  # noqa: F401
from tests.model.test_policy import MODELS

peft = pytest.importorskip("peft")
KINDS = {
    "prompt": {"method": "prompt"},
    "prefix": {"method": "prefix"},
    "projected": {"method": "prefix", "prefix_projection": True, "encoder_hidden_size": 16},
}
KNOWN = [name for name in MODELS if name != "gemma2-softcap"]  # PEFT does not know Gemma 2's caches of two kinds


def has_soft_prompt(folder, **options) -> Policy:
    """A policy with 5 vectors, larger than they start, so that they matter."""
    config = Config(model=ModelConfig(str(folder)), soft_prompt=SoftPromptConfig(num_virtual_tokens=5, **options))
    policy = build_policy(config, _Tokens())[0].eval()
    with torch.no_grad():
        for p in policy.model.soft_prompt.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return policy


def batch() -> Batch:
    rows, columns = IDS.shape
    positions = torch.arange(columns).expand(rows, -1)
    labels = torch.where(positions == 0, -100, IDS)
    return Batch(IDS, positions, labels, torch.arange(rows)[:, None].expand(-1, columns), rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", KNOWN)
def test_peft_agrees(folders, tmp_path, name, kind):  # noqa: F811
    """Log-probabilities and gradients of what is saved equal those of PEFT, which loads it; and back."""
    policy = has_soft_prompt(folders[name], **KINDS[kind])
    save_model(policy.model, _Tokens(), tmp_path, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base(folders[name]), tmp_path).eval()
    theirs.prompt_encoder["default"].embedding.weight.requires_grad_()
    logits = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]
    wanted = logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None]).flatten()
    found = policy(batch()).logps
    close(found, wanted, 1e-4)
    again = base(folders[name])
    again.adapter = load_adapter(again, tmp_path)
    close(Policy(again).eval()(batch()).logps, found, 1e-5)
    if kind == "projected":  # PEFT keeps the vectors only
        return
    found.square().sum().backward()
    wanted.square().sum().backward()
    close(policy.model.soft_prompt.weight.grad, theirs.prompt_encoder["default"].embedding.weight.grad, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_prompt_is_trained(make_trainer, kind):
    """The base stays, the vectors move, also with recomputed activations; what is saved answers as the trainer does."""
    options = [f"soft_prompt.{key}={value}" for key, value in KINDS[kind].items()]
    plain, recomputed = (
        make_trainer(
            "soft_prompt.num_virtual_tokens=4", *options, f"exp_name=is-{flag}", f"activation_checkpointing={flag}"
        )
        for flag in ("false", "true")
    )
    before = weights(plain)
    plain.train()
    recomputed.train()
    for name, p in weights(plain).items():
        assert torch.equal(p, before[name]) == ("soft_prompt" not in name), name
        close(weights(recomputed)[name], p, 1e-4)
    assert list(load_file(plain.run.final / "adapter_model.safetensors")) == ["prompt_embeddings"]
    prompts = ["say 1", "say something longer"]
    generator = load_generator(str(plain.run.path), device="cpu")
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    sampling = Sampling(max_new_tokens=12)
    answers = generator.generate(messages, sampling)
    assert answers == plain.predict(prompts, max_new_tokens=12) and any(answers)
    alone = [generator.generate([message], sampling)[0] for message in messages]
    assert alone == answers  # padding on the left changes nothing


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generation_is_that_of_the_training_forward(make_trainer, method):
    """The first token of an answer is the likeliest by the policy's own log-probabilities."""
    trainer = make_trainer("soft_prompt.num_virtual_tokens=4", f"soft_prompt.method={method}", "n_steps=8", "lr=0.1")
    trainer.train()
    ids = trainer.generator.encode([{"role": "user", "content": "say 7"}])
    answer = trainer.generator._generate([ids], Sampling(max_new_tokens=1))[0][0]
    scores = []
    for token in range(len(tiny_tokenizer())):
        row = torch.tensor([[*ids, token]])
        labels = torch.full_like(row, -100)
        labels[0, -1] = token
        one = Batch(row, torch.arange(row.shape[1])[None], labels, torch.zeros_like(row), 1)
        scores.append(trainer.policy.eval()(one).logps.item())
    assert int(torch.tensor(scores).argmax()) == int(answer)


def test_a_prompt_starts_from_a_text(make_trainer):
    """The embeddings of the text's tokens, repeated."""
    trainer = make_trainer("soft_prompt.num_virtual_tokens=5", "soft_prompt.init_text=ab")
    ids = tiny_tokenizer()("ababa")["input_ids"]
    close(trainer.policy.model.soft_prompt.weight, trainer.policy.model.get_input_embeddings().weight[ids])


@pytest.mark.parametrize(
    "overrides, code, key",
    [
        (["lora.rank=4"], "conflict", "soft_prompt"),
        (["soft_prompt.method=prefix", "soft_prompt.init_text=a"], "no-effect", "soft_prompt.init_text"),
        (["soft_prompt.prefix_projection=true"], "no-effect", "soft_prompt.prefix_projection"),
        (["soft_prompt.num_virtual_tokens=0", "soft_prompt.method=prefix"], "no-effect", "soft_prompt"),
        (["freeze_layers=[0]"], "no-effect", "freeze_layers"),
    ],
)
def test_what_cannot_work_is_refused(rows_file, overrides, code, key):
    """Before a model is loaded."""
    config = {"datasets": [str(rows_file)], "model": {"name_or_path": "tiny"}}
    with raises(ConfigError, code, f": {key}: "):
        load_config(config, ["soft_prompt.num_virtual_tokens=4", *overrides])
