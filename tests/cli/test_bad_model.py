"""Models, tokenizers, adapters, archives and teachers that are broken, of another kind, or do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitrain.cli.main import main

WEIGHTS = "model/model.safetensors"


def changed(file: str, **keys) -> Callable[[], None]:
    """Sets keys of a JSON file; ... takes one away."""

    def change():
        content = json.loads(Path(file).read_text()) | keys
        Path(file).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def written(file: str, content: str) -> Callable[[], None]:
    return lambda: Path(file).write_text(content)


def cut(file: str, size: int) -> Callable[[], None]:
    return lambda: Path(file).write_bytes(Path(file).read_bytes()[:size])


def tensors(edit: Callable[[dict], None]) -> Callable[[], None]:
    """Edits the weights of the model."""

    def change():
        state = load_file(WEIGHTS)
        edit(state)
        save_file(state, WEIGHTS, metadata={"format": "pt"})

    return change


def tokenizer_load_error():
    for file in Path("model").glob("token*"):
        file.unlink()


def a_shard_less():
    state = load_file(WEIGHTS)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {name: shards[number % 2] for number, name in enumerate(state)}
    kept = {name: state[name] for name in state if index[name] == shards[0]}
    save_file(kept, f"model/{shards[0]}", metadata={"format": "pt"})
    Path("model/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    Path(WEIGHTS).unlink()


def weights_in_a_folder():
    Path(WEIGHTS).unlink()
    Path(WEIGHTS).mkdir()


Q = "model.layers.0.self_attn.q_proj.weight"
NO_MODEL, NO_TOKENIZER = "no causal language model in 'model': ", "no tokenizer could be loaded from 'model': "


@pytest.mark.parametrize(
    "spoil, told",
    [
        (written("model/config.json", ""), NO_TOKENIZER + "model/config.json:1 is no valid JSON"),
        (written("model/config.json", '{"a": '), NO_TOKENIZER + "model/config.json:1 is no valid JSON"),
        (written("model/config.json", "[1]"), NO_TOKENIZER),
        (changed("model/config.json", model_type=...), NO_MODEL + "Unrecognized model in model"),
        (changed("model/config.json", model_type="never-heard-of"), "'model'"),
        (changed("model/config.json", model_type="vit", architectures=["ViTModel"]), NO_MODEL),
        (changed("model/config.json", model_type="t5"), NO_MODEL + "Unrecognized configuration class"),
        (changed("model/config.json", model_type="bert"), NO_MODEL + "bert is an encoder and continues no text"),
        (changed("model/config.json", hidden_size="x"), "Field 'hidden_size' expected int, got str"),
        (changed("model/config.json", num_attention_heads=3), "not a multiple of the number of attention heads (3)"),
        (
            changed("model/config.json", hidden_size=64),
            "weight has the shape [259, 32], and not [259, 64] as in its",
        ),
        (changed("model/config.json", num_hidden_layers=3), "do not hold model.layers.2.input_layernorm.weight and 8"),
        (tensors(lambda state: state.pop(Q)), f"model: its files do not hold {Q}, which its config.json asks for"),
        (lambda: Path(WEIGHTS).unlink(), NO_MODEL + "model holds no model.safetensors or pytorch_model.bin; copy or"),
        (weights_in_a_folder, NO_MODEL + "model holds no model.safetensors or pytorch_model.bin; copy or download"),
        (a_shard_less, NO_MODEL + "model/model-00002-of-00002.safetensors is missing, which model.safetensors.index."),
        (cut(WEIGHTS, 0), NO_MODEL + "model/model.safetensors is damaged ("),
        (cut(WEIGHTS, 1000), NO_MODEL + "model/model.safetensors is damaged ("),
        (cut(WEIGHTS, 20_000), "incomplete metadata, file not fully covered); copy or download it again"),
        (written(WEIGHTS, "version https://git-lfs"), "is a pointer of Git LFS in the place of weights; fetch them"),
        (tokenizer_load_error, NO_TOKENIZER),
        (written("model/tokenizer.json", "{}"), NO_TOKENIZER),
        (cut("model/tokenizer.json", 500), NO_TOKENIZER + "model/tokenizer.json:"),
        (written("model/tokenizer_config.json", "{"), NO_TOKENIZER + "model/tokenizer_config.json:1 is no valid JSON"),
        (changed("model/tokenizer_config.json", eos_token=None), "the tokenizer of 'model' has no EOS token"),
        (written("model/chat_template.jinja", "{% if %}"), "chat_template: not valid Jinja, line 1: "),
    ],
)
def test_a_folder_that_is_no_model(fails, spoil, told):
    """Of another kind, cut off, incomplete: nothing is drawn at random in the place of what is missing."""
    spoil()
    err = fails()
    assert told in err and len(err.splitlines()) == 1


def test_weights_that_are_no_numbers(folder, capsys):
    """Training looks at them; `validate` reads no weights."""
    tensors(lambda state: state["model.norm.weight"].fill_(torch.nan))()
    assert main(["train", "c.yml"]) == 2
    assert "the model gives NaN or inf, so its weights are damaged" in capsys.readouterr().err


def test_a_tokenizer_without_pad_and_template_is_no_mistake(folder):
    """It pads with its EOS, and talks ChatML."""
    changed("model/tokenizer_config.json", pad_token=None)()
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    assert main(["train", "c.yml"]) == 0


@pytest.mark.parametrize(
    "content, told",
    [
        ({"x": torch.zeros(1)}, "does not fit LlamaForCausalLM: missing ['model.embed_tokens.weight'"),
        ([1, 2], "it holds something else than names with tensors; save a state dict"),
        ({"state": {"a": 3}}, "does not fit LlamaForCausalLM: missing ['model.embed_tokens.weight'"),
        ({"state": Path()}, "it holds something else than names with tensors; save a state dict"),
    ],
)
def test_an_archive_that_does_not_fit(fails, content, told):
    """Of another model, or no state dict; objects are never unpickled."""
    torch.save(content, "a.pt")
    assert f"model.archive: a.pt {'' if 'fit' in told else 'cannot be loaded: '}{told}" in fails("model.archive=a.pt")


def test_an_archive_that_is_none(fails):
    """A text, and a safetensors file with nothing in it."""
    Path("empty.safetensors").write_bytes((16).to_bytes(8, "little") + b'{"x":{}}        ')
    assert "empty.safetensors cannot be loaded" in fails("model.archive=empty.safetensors")
    Path("text.pt").write_text("hello")
    assert "text.pt cannot be loaded" in fails("model.archive=text.pt")


CONFIG_FILE = "lora/adapter_config.json"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, llama_folder, rows_file):
    """A LoRA of the model, in PEFT's files."""
    folder = tmp_path_factory.mktemp("adapter")
    config = {"datasets": [str(rows_file)], "model": {"name_or_path": str(llama_folder)}, "n_steps": 1}
    config |= {"output_dir": str(folder), "exp_name": "run", "lora": {"rank": 2}}
    (folder / "c.yml").write_text(json.dumps(config))
    assert main(["train", str(folder / "c.yml")]) == 0
    return folder / "run" / "final"


@pytest.mark.parametrize(
    "spoil, told",
    [
        (changed(CONFIG_FILE, r=...), "lora/adapter_config.json does not say r."),
        (changed(CONFIG_FILE, r="x"), "lora/adapter_config.json: r is wrong, got 'x'. It has to be a whole number"),
        (changed(CONFIG_FILE, target_modules=...), "lora/adapter_config.json does not say target_modules."),
        (changed(CONFIG_FILE, r=3), "lora_A has the shape [2, 64], here it is [3, 64]"),
        (changed(CONFIG_FILE, peft_type="IA3"), "lora: an adapter of the kind IA3, which is not known here"),
        (changed(CONFIG_FILE, target_modules=["c_attn"]), "nothing in the model is called 'c_attn'"),
        (written(CONFIG_FILE, "{"), "lora/adapter_config.json cannot be read: "),
        (written(CONFIG_FILE, "[]"), "lora/adapter_config.json cannot be read: "),
        (written("lora/adapter_model.safetensors", "x"), "lora/adapter_model.safetensors cannot be read: "),
        (lambda: Path("lora/adapter_model.safetensors").unlink(), "lora/adapter_model.safetensors cannot be read: No"),
    ],
)
def test_an_adapter_that_is_none(fails, adapter, spoil, told):
    """Broken, incomplete, of a kind that is not known."""
    shutil.copytree(adapter, "lora")
    spoil()
    err = fails("model.adapter=lora")
    assert told in err and len(err.splitlines()) == 1


def test_an_adapter_of_another_model(fails, adapter):
    """One of two blocks, for a model of one; and generate names a base model that is not there."""
    shutil.copytree(adapter, "lora")
    changed("model/config.json", num_hidden_layers=1)()
    base = json.loads(Path(CONFIG_FILE).read_text())["base_model_name_or_path"]
    err = fails("model.adapter=lora")
    assert "lora does not fit the model: missing [], unexpected ['base_model." in err and f"made for {base}" in err


@pytest.mark.parametrize("base", [None, "./gone"])
def test_an_adapter_whose_base_is_not_there(folder, adapter, capsys, base):
    """generate and merge say where it is named."""
    shutil.copytree(adapter, "lora")
    changed(CONFIG_FILE, base_model_name_or_path=base)()
    for arguments in (["generate", "lora", "--prompt", "a"], ["merge", "lora", "--output", "m"]):
        assert main(arguments) == 2
        told = f"lora: its base model {base!r} is not there (seen from {Path.cwd()}); mend base_model_name_or_path in"
        assert told in capsys.readouterr().err and not Path("m").exists()


def other_tokenizer():
    tokenizer = json.loads(Path("teacher/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    Path("teacher/tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    "spoil, told",
    [
        (other_tokenizer, "loss.teacher: teacher has another tokenizer: 2 tokens differ"),
        (written("teacher/config.json", "{"), "no tokenizer could be loaded from 'teacher': teacher/config.json:1 is"),
        (cut("teacher/model.safetensors", 1000), "teacher/model.safetensors is damaged ("),
    ],
)
def test_a_teacher_that_cannot_teach(fails, spoil, told):
    """Of another vocabulary, or broken."""
    shutil.copytree("model", "teacher")
    spoil()
    assert told in fails("loss={name: kd, teacher: teacher}")


def test_blocks_that_the_model_does_not_have(fails):
    """What is checked against the model that was loaded."""
    for override, told in {
        "freeze_layers=[0-9]": "freeze_layers: 0-9 is outside of the model's blocks 0-1",
        "freeze_layers=[5-0]": "freeze_layers: the range 5-0 ends before it begins",
        "lora={rank: 2, layers_to_transform: [7]}": "lora.layers_to_transform: 7 is outside of the blocks 0-1",
        "lora={rank: 2, target_modules: [nothing]}": "lora.target_modules: nothing in the model is called 'nothing'",
        "lora={rank: 2, target_modules: '['}": "lora.target_modules: '[' is no regular expression",
        "lora={rank: 2, target_modules: '('}": "lora.target_modules: '(' is no regular expression",
        "lora={rank: 2, target_modules: []}": "lora.target_modules: is empty",
        "lora={rank: 999999999999}": "lora.rank: must be 32768 or less",
        "lora={rank: 2, modules_to_save: [nothing]}": "lora.modules_to_save: nothing in the model is called 'nothing'",
        "optimizer_args={momentum: -1}": "optimizer_args.momentum: AdamW takes",
    }.items():
        assert told in fails(override)
