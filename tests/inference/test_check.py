"""`minitrain check`: how much of a saved model the class of its base reaches, and whether the logits are equal."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from minitrain import ConfigError
from minitrain.cli.main import main
from minitrain.inference.check import check_model
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises
from tests.model.multimodal_models import multimodal_model

pytestmark = pytest.mark.numeric

peft = pytest.importorskip("peft")

FEW = {"n_prompts": 2, "max_new_tokens": 4}
SHORT = ["--n-prompts", "2", "--max-new-tokens", "4"]
LORA = ("lora.rank=4", "lora.target_modules=all-linear")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Qwen3.5 with a vision tower."""
    folder = tmp_path_factory.mktemp("base")
    multimodal_model("qwen3_5").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_and_an_adapter_pass(base, make_trainer, capsys):
    """All tensors of the model, all modules of the adapter, in PEFT and merged."""
    for name, options in {"full": (), "lora": LORA}.items():
        trainer = make_trainer(f"model.name_or_path={base}", f"exp_name={name}", *options)
        trainer.train()
        capsys.readouterr()
        base_of_model = ["--base", str(base)] if not options else []
        assert main(["check", str(trainer.run.path), *base_of_model, *SHORT]) == 0
        lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
        assert lines[0].split() == ["class", "Qwen3_5ForConditionalGeneration"]
        counts = [line.split("  ")[-1].split() for line in lines if "reached" in line]
        assert len(counts) == 2 and all(words[0] == words[2] and int(words[0]) > 8 for words in counts)
        equal = [line for line in lines if "equal, largest difference" in line]
        assert len(equal) == sum(line.startswith("log") for line in lines) > 1


def test_a_model_of_the_text_class_fails(base, tmp_path, capsys):
    """Qwen3_5ForCausalLM has other names than its base model: its class reaches no layer of them."""
    text = tf.AutoModelForCausalLM.from_pretrained(base)
    text.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert check_model(str(tmp_path), **FEW).passed
    assert main(["check", str(tmp_path), "--base", str(base), *SHORT]) == 1
    assert "Qwen3_5ForCausalLM; the base model is Qwen3_5ForConditionalGeneration" in capsys.readouterr().out


def test_an_adapter_of_the_text_class_fails(base, tmp_path, capsys):
    """minitrain reads its names, but the class of the base model has none of its layers."""
    text = tf.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, base_model_name_or_path=str(base))
    peft.get_peft_model(text, config).save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--base", str(base), *SHORT]) == 1
    out = capsys.readouterr().out
    assert "0 of 1 reached" in out and "different" in out


def test_an_adapter_that_peft_applies_otherwise_fails(base, make_trainer):
    """Here lora_alpha is changed after PEFT read it."""
    trainer = make_trainer(f"model.name_or_path={base}", *LORA)
    trainer.train()
    file = trainer.run.final / "adapter_config.json"
    original = peft.PeftModel.from_pretrained

    def changed(model, folder):
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"lora_alpha": 4 * config["lora_alpha"]}))
        return original(model, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.PeftModel, "from_pretrained", changed)
        found = check_model(str(trainer.run.final), **FEW)
    assert not found.passed and found.lines["logits in PEFT"].startswith("different")


def test_a_scorer_and_new_tokens_pass(make_trainer, tmp_path, rows_file):
    """A new head and new embedding rows come from the adapter."""
    rows = tmp_path / "labels.jsonl"
    rows.write_text("".join(json.dumps({"text": f"a{i}", "label": "ab"[i % 2]}) + "\n" for i in range(16)))
    trainer = make_trainer(f"datasets=[{rows}]", "loss.name=classify", "lora.rank=2")
    trainer.train()
    assert check_model(str(trainer.run.final), **FEW).passed


def test_what_cannot_be_checked_is_refused(base, make_trainer, tmp_path):
    trainer = make_trainer("soft_prompt.num_virtual_tokens=2")
    trainer.train()
    with raises(ConfigError, "unsupported-model", "soft prompt"):
        check_model(str(trainer.run.final))
    adapter = make_trainer("lora.rank=2", "exp_name=adapter", "model.name_or_path=tiny")
    adapter.train()
    with raises(ConfigError, "unsupported-model", "`tiny`", "minitrain merge"):
        check_model(str(adapter.run.path))
    with raises(ConfigError, "not-found", "--base: "):
        check_model(str(base), "./nowhere")
    with raises(ConfigError, "not-found"):
        check_model("runs/nothing")


def test_a_tensor_that_the_class_lacks_fails(base, tmp_path, capsys):
    """It would be dropped without a word."""
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"model.extra.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = check_model(str(tmp_path), **FEW)
    assert not found.passed and "model.extra.weight" in found.lines["tensors"]


def test_without_peft_the_merged_model_is_compared(make_trainer, monkeypatch):
    trainer = make_trainer("n_steps=1", *LORA)
    trainer.train()
    monkeypatch.setattr("minitrain.inference.check.find_spec", lambda name: None)
    check = check_model(str(trainer.run.path), **FEW)
    assert check.passed and "minitrain[peft]" in check.lines["logits in PEFT"]
    assert check.lines["responses when merged"] == "2 of 2 equal"


def test_an_adapter_that_peft_refuses_fails(base, make_trainer, monkeypatch):
    """PEFT refuses some layers of some models with errors of its own; the rest is checked nevertheless."""
    trainer = make_trainer(f"model.name_or_path={base}", "n_steps=1", *LORA)
    trainer.train()

    def refuse(model, folder):
        raise ValueError("out_proj is incompatible")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", refuse)
    check = check_model(str(trainer.run.final), **FEW)
    assert not check.passed and "out_proj is incompatible" in check.lines["logits in PEFT"]
    assert check.lines["logits when merged"].startswith("equal")
