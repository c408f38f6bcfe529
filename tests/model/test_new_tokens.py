"""Tokens that are new to a model: distinct rows that are trained and saved, with every way to train the rest."""

import json

import pytest
import torch

from minitrain import ConfigError
from minitrain.batch import Distillation, Document, collate
from minitrain.config.schema import Config
from minitrain.config.sections import LoRAConfig, ModelConfig, SoftPromptConfig
from minitrain.data.template import Template
from minitrain.inference.generate import find_model, model_config
from minitrain.losses.kd import forward_kl
from minitrain.model.load import build_policy, load_merged, load_model, load_tokenizer
from minitrain.model.load_check import check_policy
from minitrain.model.logprobs import LMHead
from minitrain.model.save import save_model
from tests.conftest import byte_tokenizer
from tests.messages import raises
from tests.model.test_policy import MODELS
from tests.tensors import close, shaken

N = 257  # tokens of `byte_tokenizer`
IDS = torch.cat([torch.arange(3, 35) * 7 % N, torch.tensor([N, N + 1, 8, N + 1])]).view(2, 18)  # with both new tokens
LAYERS = {"gpt2": ("wte", "c_attn"), "phi-bias": ("embed_tokens", "q_proj")}  # of the others: llama's
WAYS = {
    "lora": lambda embed, linear: dict(lora=LoRAConfig(4, 8.0)),
    "dora": lambda embed, linear: dict(lora=LoRAConfig(4, 8.0, use_dora=True)),
    "pissa": lambda embed, linear: dict(lora=LoRAConfig(4, 8.0, init="pissa")),
    "lora-embedding": lambda embed, linear: dict(lora=LoRAConfig(4, 8.0, target_modules=[embed, linear])),
    "dora-embedding": lambda embed, linear: dict(lora=LoRAConfig(4, 8.0, target_modules=[embed], use_dora=True)),
    "lora-head": lambda embed, linear: dict(lora=LoRAConfig(4, 8.0, target_modules=["lm_head", linear])),
    "dora-head": lambda embed, linear: dict(lora=LoRAConfig(4, 8.0, target_modules=["lm_head"], use_dora=True)),
    "saved-embedding": lambda embed, linear: dict(lora=LoRAConfig(4, 8.0, modules_to_save=[embed])),
    "saved-head": lambda embed, linear: dict(lora=LoRAConfig(4, 8.0, modules_to_save=["lm_head"])),
    "prompt": lambda embed, linear: dict(soft_prompt=SoftPromptConfig(3)),
    "prefix": lambda embed, linear: dict(soft_prompt=SoftPromptConfig(3, "prefix")),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models of 257 tokens as folders, with a tokenizer that has no chat template."""
    made = {}
    for name, make in MODELS.items():
        torch.manual_seed(1)
        model = make()
        model.resize_token_embeddings(N)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        made[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(made[name])
    return made


def chatml(folder):
    """The tokenizer of a folder with ChatML's two tokens, which it lacks."""
    tokenizer = load_tokenizer(ModelConfig("", folder))
    Template(tokenizer)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [N, N + 1]
    return tokenizer


def both_rows():
    """A batch of `IDS`."""
    mask = (torch.arange(18) > 0).to(torch.uint8)
    return collate([[Document(row.int(), mask)] for row in IDS], 0)


def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def embeddings(model):
    """Input embeddings and output layer."""
    return [model.get_input_embeddings(), model.get_output_embeddings()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gpt2", "phi-bias", "gemma2-softcap"])
def test_new_rows_are_distinct_trained_and_saved(bases, byte_folder, tmp_path, name, way):
    """Only new rows of what is frozen are trained; policy, model, PEFT, merged and reloaded model agree."""
    peft = pytest.importorskip("peft")
    tokenizer = chatml(byte_folder)
    config = Config(model=ModelConfig(bases[name]), **WAYS[way](*LAYERS.get(name, ("embed_tokens", "q_proj"))))
    policy, _ = build_policy(config, tokenizer)
    model = policy.model.eval()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert (layer.weight[N] - layer.weight[N + 1]).abs().max() > 1e-3
        trained = "token_rows" if not layer.weight.requires_grad else "weight"
        assert getattr(layer, trained).requires_grad
    shaken(model)
    check_policy(policy, packing=False)  # the policy's head against the model's own logits
    save_model(model, tokenizer, tmp_path, torch.float32)
    resized = load_base(bases[name])
    resized.resize_token_embeddings(N + 2, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(resized, tmp_path).eval()
    again = ModelConfig(bases[name], adapter=str(tmp_path))
    reloaded, _ = build_policy(Config(model=again), tokenizer)
    reloaded.eval()
    batch = both_rows()
    close(reloaded(batch).logps, policy(batch).logps, 1e-4)
    if config.soft_prompt.num_virtual_tokens:
        wanted = theirs(input_ids=IDS).logits[:, -18:-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
        close(policy(batch).logps.view(2, 17), wanted, 1e-4)
        return
    close(logits(theirs), logits(model), 1e-4)
    close(logits(load_merged(again, tokenizer).eval()), logits(model), 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "phi-bias", "gemma2-softcap"])
@pytest.mark.parametrize("told", ["plain", "entropy", "distillation"])
def test_the_gradient_of_the_rows_is_that_of_the_whole_weight(bases, byte_folder, name, told):
    """Through the chunked head and the embeddings, against the model's own logits with the rows in its weights."""
    policy, _ = build_policy(Config(model=ModelConfig(bases[name]), lora=LoRAConfig(4)), chatml(byte_folder))
    model = policy.eval().model
    batch = both_rows()
    if told == "distillation":
        teacher = torch.randn(34, 8), LMHead(torch.randn(N + 2, 8))
        scores = policy(batch, distillation=Distillation(teacher, forward_kl, 1.0, None, (1.0, 0.5)))
        (scores.divergence.sum() + 0.5 * -scores.logps.sum()).backward()
    else:
        scores = policy(batch, entropy=told == "entropy", detached_weight_fn=lambda logps: torch.ones_like(logps))
        (-scores.logps.sum() + (scores.entropy.sum() if told == "entropy" else 0.0)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert any("token_rows" in n for n in found)
    whole = load_model(ModelConfig(bases[name]), chatml(byte_folder), 0).eval()
    for layer in {id(layer.weight): layer for layer in (whole.get_input_embeddings(), whole.lm_head)}.values():
        layer.weight.requires_grad_(True)
    logps = whole(input_ids=IDS).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)  # [34, V]
    picked = logps.gather(1, IDS[:, 1:].flatten()[:, None]).sum()
    if told == "distillation":
        theirs = (teacher[0] @ teacher[1].weight.T).log_softmax(-1)
        (((theirs.exp() * (theirs - logps)).sum()) - 0.5 * picked).backward()
    else:
        (-picked - ((logps.exp() * logps).sum() if told == "entropy" else 0.0)).backward()
    for key, grad in found.items():
        if "token_rows" in key:
            close(grad, whole.get_parameter(key.replace("token_rows", "weight")).grad[[N, N + 1]], 1e-3)


def load_base(folder):
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "options",
    [("lora.rank=8",), ("freeze_layers=[embeddings]",), ("lora.rank=8", "lora.modules_to_save=[embed_tokens]"), ()],
)
def test_a_model_without_a_template_learns_to_stop(make_trainer, byte_folder, tmp_path, options):
    """Twin rows would give both new tokens one probability for ever: after an answer, that of the end is near 1."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}", "response": "ok"}) + "\n" for i in range(8)))
    more = (f"datasets=[{file}]", f"model.tokenizer_name_or_path={byte_folder}", "n_steps=40", "lr=0.02")
    trainer = make_trainer(*more, *options)
    start, end = trainer.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    trainer.train()
    model = trainer.generator.model
    ids = trainer.template.encode_prompt([{"role": "user", "content": "say 3"}]) + trainer.tokenizer("ok")["input_ids"]
    probs = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    assert probs[end] > 0.9 and probs[start] < 0.05
    assert trainer.predict(["say 5"]) == ["ok"]
    config = model_config(find_model(str(trainer.run.final)))
    tokenizer = load_tokenizer(config)
    saved = load_merged(config, tokenizer) if config.adapter else load_model(config, tokenizer, 0)
    close(saved.eval()(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1), probs, 1e-4)


def test_spare_rows_of_new_tokens_are_new(bases, byte_folder, tmp_path):
    """Rows that a model has beyond its tokenizer may all be the same: a token that is added gets a row of its own."""
    model = load_base(bases["llama"])
    model.resize_token_embeddings(N + 40, mean_resizing=False)
    for layer in (model.model.embed_tokens, model.lm_head):
        layer.weight.data[N:] = 0.0
    model.save_pretrained(tmp_path)
    tokenizer = chatml(byte_folder)
    for empty in (False, True):
        policy, weights = build_policy(Config(model=ModelConfig(str(tmp_path))), tokenizer, sharded=empty)
        assert policy.model.new_ids == [N, N + 1]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = weights.rows(name, 0, N + 40) if empty else policy.model.get_parameter(name).detach()
            assert (rows[N] - rows[N + 1]).abs().max() > 1e-3 and not rows[N + 2 :].any()
            assert torch.equal(rows[:N], model.get_parameter(name)[:N])


def test_ids_with_holes(bases, tmp_path):
    """The largest id counts, not the number of tokens; tokens that would share an id are refused."""
    byte_tokenizer(hole=3).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig("", str(tmp_path)))
    assert len(tokenizer) == N and max(tokenizer.get_vocab().values()) == N + 2
    Template(tokenizer, "none")
    config = Config(model=ModelConfig(bases["llama"]), lora=LoRAConfig(4))
    model = build_policy(config, tokenizer)[0].model
    assert model.lm_head.weight.shape[0] == N + 3 and model.new_ids == [N, N + 1, N + 2]
    Template(tokenizer, "chatml")  # transformers gives the new tokens the ids of two bytes
    with raises(ConfigError, "unsupported-model", "model.tokenizer_name_or_path: ", "got 25"):
        build_policy(config, tokenizer)


def test_new_rows_do_not_depend_on_the_seed(bases, byte_folder):
    """So the reference of a preference loss and a later merge start from the rows of the policy."""
    tokenizer = chatml(byte_folder)
    one, other = (load_model(ModelConfig(bases["llama"]), tokenizer, seed) for seed in (0, 7))
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_an_adapter_of_peft_with_trained_rows_goes_on(bases, byte_folder, tmp_path):
    """PEFT's rows of old tokens, in any order, beside those of new ones: equal logits, trained on, and saved again."""
    peft = pytest.importorskip("peft")
    for name, wanted in (("llama", {"embed_tokens": [40, 7], "lm_head": [9]}), ("qwen2-tied", [41, 5, 12])):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=wanted)
        theirs = shaken(peft.get_peft_model(load_base(bases[name]), config)).eval()
        theirs.save_pretrained(tmp_path / name)
        loaded = ModelConfig(bases[name], adapter=str(tmp_path / name))
        plain = load_tokenizer(ModelConfig("", byte_folder))
        Template(plain, "none")
        ours = build_policy(Config(model=loaded), plain)[0].model.eval()
        close(ours(input_ids=IDS % N).logits, theirs(input_ids=IDS % N).logits, 1e-5)
        tokenizer = chatml(byte_folder)
        model = shaken(build_policy(Config(model=loaded), tokenizer)[0].model).eval()
        ids = wanted["lm_head"] if name == "llama" else wanted
        assert model.lm_head.token_ids.tolist() == sorted([*ids, N, N + 1])
        save_model(model, tokenizer, tmp_path / f"{name}-again", torch.float32)
        resized = load_base(bases[name])
        resized.resize_token_embeddings(N + 2, mean_resizing=False)
        again = peft.PeftModel.from_pretrained(resized, tmp_path / f"{name}-again").eval()
        close(logits(again), logits(model), 1e-5)
