"""model.archive: weights from a file or a folder, as this and other trainers write them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitrain import ConfigError
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.model import weights
from minitrain.model.load import build_policy, load_model
from minitrain.model.save import save_model
from minitrain.model.state_dict import read_archive
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import random_llama
from tests.messages import raises


def neox(seed: int):
    """A random GPT-NeoX, as Pythia is, over the embedded tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = tiny_tokenizer()
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**shape, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    ).eval()


@pytest.fixture
def pythia(tmp_path):
    """A folder with another model of that kind, whose weights the archive replaces."""
    neox(1).save_pretrained(tmp_path / "pythia")
    tiny_tokenizer().save_pretrained(tmp_path / "pythia")
    return tmp_path / "pythia"


def same_logits(model, other) -> bool:
    ids = torch.arange(10)[None]
    with torch.no_grad():
        return torch.equal(model.eval()(ids).logits, other(ids).logits)


def test_what_the_dpo_authors_trainer_writes(tmp_path, pythia):
    """policy.pt: step_idx, state and metrics, with the names and the buffers that GPT-NeoX had in those days."""
    other = neox(2)
    state = {name.replace("lm_head", "embed_out"): tensor for name, tensor in other.state_dict().items()}
    for block in ("gpt_neox.layers.0.attention", "gpt_neox.layers.1.attention"):
        state[f"{block}.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
        state[f"{block}.masked_bias"] = torch.tensor(-1e9)
        state[f"{block}.rotary_emb.inv_freq"] = torch.ones(2)
    file = tmp_path / "policy.pt"
    torch.save({"step_idx": 320, "state": state, "metrics": {"loss/eval": 1.5}}, file)
    assert same_logits(load_model(ModelConfig(str(pythia), archive=str(file)), tiny_tokenizer(), 0), other)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_as_final_is(tmp_path, monkeypatch, llama_folder, sharded, empty):
    """One file or several with an index; for one device, and as each of many ranks reads it."""
    other = random_llama(initializer_range=0.3).eval()
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000 if sharded else 1 << 30)
    save_model(other, tiny_tokenizer(), tmp_path / "final", torch.float32)
    assert len(list((tmp_path / "final").glob("*.safetensors"))) == 1 or sharded
    assert (tmp_path / "final" / "model.safetensors.index.json").exists() == sharded
    config = Config(model=ModelConfig(str(llama_folder), archive=str(tmp_path / "final")))
    policy, rows = build_policy(config, tiny_tokenizer(), sharded=empty)
    assert (rows is not None) == empty
    if not empty:
        assert same_logits(policy.model, other)
    for name, tensor in other.named_parameters() if empty else ():
        assert torch.equal(rows.rows(name, 0, len(tensor)), tensor), name


def test_a_trained_pythia_is_an_archive(make_trainer, pythia):
    """What is saved has the names of the files that it came from; it loads over the model all the same."""
    trainer = make_trainer(f"model.name_or_path={pythia}")
    trainer.train()
    final = trainer.run.final
    assert "embed_out.weight" in load_file(final / "model.safetensors")
    loaded = load_model(ModelConfig(str(pythia), archive=str(final)), tiny_tokenizer(), 0)
    assert same_logits(loaded, trainer.policy.model.eval())


def test_what_is_of_another_model_is_refused(tmp_path, llama_folder):
    """Missing, foreign and misshapen tensors are named; an optimizer's state is no model's."""
    state = load_file(llama_folder / "model.safetensors")
    norm = "model.norm.weight"
    wrong = {
        "missing": ({k: v for k, v in state.items() if k != norm}, ("missing", norm)),
        "foreign": (state | {"model.extra": torch.ones(1)}, ("unexpected", "model.extra")),
        "shape": (state | {norm: torch.ones(3)}, (norm, "[3]")),
    }
    for name, (tensors, parts) in wrong.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with raises(ConfigError, "mismatch", f"{name}.safetensors", *parts):
            read_archive(random_llama(), tmp_path / f"{name}.safetensors")
    torch.save({"step_idx": 1, "state": {"state": {0: {}}, "param_groups": []}}, tmp_path / "optimizer.pt")
    with raises(ConfigError, "mismatch", "optimizer.pt"):
        read_archive(random_llama(), tmp_path / "optimizer.pt")


def test_folders_that_are_no_archive(make_trainer, tmp_path):
    """A run's folder, an adapter's and an empty one are told with what to do; none is good for an adapter."""
    (tmp_path / "sft" / "final").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({}))
    (tmp_path / "empty").mkdir()
    found = {
        "sft": ("wrong-path", str(tmp_path / "sft" / "final")),
        "adapter": ("wrong-path", "model.adapter"),
        "empty": ("not-found", str(tmp_path / "empty")),
    }
    for name, (code, part) in found.items():
        with raises(ConfigError, code, "model.archive: ", part):
            make_trainer(f"model.archive={tmp_path / name}")
    save_file({}, tmp_path / "some.safetensors")
    with raises(ConfigError, "conflict", "model.archive: "):
        make_trainer(f"model.archive={tmp_path / 'some.safetensors'}", "lora.rank=2")


def test_pythia_in_half_precision(make_trainer, pythia, tmp_path):
    """The CPU's layer_norm refuses float32 beside weights of half precision: frozen ones, and those of a reference."""
    trainer = make_trainer(f"model.name_or_path={pythia}", "model.policy_dtype=bfloat16", "freeze_layers=[0]")
    trainer.train()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"say {i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(8))
    )
    dpo = ("loss.name=dpo", f"datasets=[{pairs}]", "exp_name=dpo", "model.policy_dtype=bfloat16")
    trainer = make_trainer(f"model.name_or_path={pythia}", f"model.archive={trainer.run.final}", *dpo, "n_steps=1")
    trainer.train()
    assert trainer.train_metrics["loss"] == pytest.approx(0.6931, abs=1e-3)
