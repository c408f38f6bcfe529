"""Models, tokenizers, adapters, archives and teachers that are broken, of another kind, or do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitrain.cli.main import main
from tests.messages import reports

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


@pytest.mark.parametrize(
    "spoil, code, about",
    [
        (written("model/config.json", ""), "damaged-file", "'model'"),
        (written("model/config.json", '{"a": '), "damaged-file", "'model'"),
        (written("model/config.json", "[1]"), "unreadable", "'model'"),
        (changed("model/config.json", model_type=...), "unreadable", "'model'"),
        (changed("model/config.json", model_type="never-heard-of"), "unreadable", "'model'"),
        (changed("model/config.json", model_type="vit", architectures=["ViTModel"]), "unreadable", "'model'"),
        (changed("model/config.json", model_type="t5"), "unreadable", "'model'"),
        (changed("model/config.json", model_type="bert"), "unsupported-model", "'model'"),
        (changed("model/config.json", hidden_size="x"), "unreadable", "'hidden_size'"),
        (changed("model/config.json", num_attention_heads=3), "unreadable", ""),
        (
            changed("model/config.json", hidden_size=64),
            "mismatch",
            "",
        ),
        (changed("model/config.json", num_hidden_layers=3), "damaged-file", "model.layers"),
        (tensors(lambda state: state.pop(Q)), "damaged-file", "model:"),
        (lambda: Path(WEIGHTS).unlink(), "damaged-file", "'model'"),
        (weights_in_a_folder, "damaged-file", "'model'"),
        (a_shard_less, "damaged-file", "'model'"),
        (cut(WEIGHTS, 0), "damaged-file", "'model'"),
        (cut(WEIGHTS, 1000), "damaged-file", "'model'"),
        (cut(WEIGHTS, 20_000), "damaged-file", ""),
        (written(WEIGHTS, "version https://git-lfs"), "damaged-file", ""),
        (tokenizer_load_error, "unreadable", "'model'"),
        (written("model/tokenizer.json", "{}"), "unreadable", "'model'"),
        (cut("model/tokenizer.json", 500), "damaged-file", "'model'"),
        (written("model/tokenizer_config.json", "{"), "damaged-file", "'model'"),
        (changed("model/tokenizer_config.json", eos_token=None), "unsupported-model", "'model'"),
        (written("model/chat_template.jinja", "{% if %}"), "invalid-template", "chat_template:"),
    ],
)
def test_a_folder_that_is_no_model(fails, spoil, code, about):
    """Of another kind, cut off, incomplete: nothing is drawn at random in the place of what is missing."""
    spoil()
    err = fails()
    assert reports(err, code, about) and len(err.splitlines()) == 1


def test_weights_that_are_no_numbers(folder, capsys):
    """Training looks at them; `validate` reads no weights."""
    tensors(lambda state: state["model.norm.weight"].fill_(torch.nan))()
    assert main(["train", "c.yml"]) == 2
    assert reports(capsys.readouterr().err, "not-finite", "model.name_or_path: ")


def test_a_tokenizer_without_pad_and_template_is_no_mistake(folder):
    """It pads with its EOS, and talks ChatML."""
    changed("model/tokenizer_config.json", pad_token=None)()
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    assert main(["train", "c.yml"]) == 0


@pytest.mark.parametrize(
    "content, code, about",
    [
        ({"x": torch.zeros(1)}, "mismatch", "'model.embed_tokens.weight'"),
        ([1, 2], "unreadable", ""),
        ({"state": {"a": 3}}, "mismatch", "'model.embed_tokens.weight'"),
        ({"state": Path()}, "unreadable", ""),
    ],
)
def test_an_archive_that_does_not_fit(fails, content, code, about):
    """Of another model, or no state dict; objects are never unpickled."""
    torch.save(content, "a.pt")
    assert reports(fails("model.archive=a.pt"), code, "model.archive: a.pt ", about)


def test_an_archive_that_is_none(fails):
    """A text, and a safetensors file with nothing in it."""
    Path("empty.safetensors").write_bytes((16).to_bytes(8, "little") + b'{"x":{}}        ')
    assert reports(fails("model.archive=empty.safetensors"), "unreadable", "empty.safetensors")
    Path("text.pt").write_text("hello")
    assert reports(fails("model.archive=text.pt"), "unreadable", "text.pt")


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
    "spoil, code, about",
    [
        (changed(CONFIG_FILE, r=...), "invalid-value", "lora/adapter_config.json"),
        (changed(CONFIG_FILE, r="x"), "invalid-value", "lora/adapter_config.json:"),
        (changed(CONFIG_FILE, target_modules=...), "invalid-value", "lora/adapter_config.json"),
        (changed(CONFIG_FILE, r=3), "mismatch", ""),
        (changed(CONFIG_FILE, peft_type="IA3"), "unsupported-model", "lora/"),
        (changed(CONFIG_FILE, target_modules=["c_attn"]), "not-a-choice", "'c_attn'"),
        (written(CONFIG_FILE, "{"), "unreadable", "lora/adapter_config.json"),
        (written(CONFIG_FILE, "[]"), "unreadable", "lora/adapter_config.json"),
        (written("lora/adapter_model.safetensors", "x"), "unreadable", "lora/adapter_model.safetensors"),
        (lambda: Path("lora/adapter_model.safetensors").unlink(), "unreadable", "lora/adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_is_none(fails, adapter, spoil, code, about):
    """Broken, incomplete, of a kind that is not known."""
    shutil.copytree(adapter, "lora")
    spoil()
    err = fails("model.adapter=lora")
    assert reports(err, code, about) and len(err.splitlines()) == 1


def test_an_adapter_of_another_model(fails, adapter):
    """One of two blocks, for a model of one; and generate names a base model that is not there."""
    shutil.copytree(adapter, "lora")
    changed("model/config.json", num_hidden_layers=1)()
    base = json.loads(Path(CONFIG_FILE).read_text())["base_model_name_or_path"]
    err = fails("model.adapter=lora")
    assert reports(err, "mismatch", "lora: ", "['base_model.", base)


@pytest.mark.parametrize("base", [None, "./gone"])
def test_an_adapter_whose_base_is_not_there(folder, adapter, capsys, wording, base):
    """generate and merge say where it is named."""
    shutil.copytree(adapter, "lora")
    changed(CONFIG_FILE, base_model_name_or_path=base)()
    for arguments in (["generate", "lora", "--prompt", "a"], ["merge", "lora", "--output", "m"]):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        wording(err)
        assert reports(err, "not-found", "lora: ", repr(base), "base_model_name_or_path") and not Path("m").exists()


def other_tokenizer():
    tokenizer = json.loads(Path("teacher/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    Path("teacher/tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    "spoil, code, about",
    [
        (other_tokenizer, "mismatch", "loss.teacher:"),
        (written("teacher/config.json", "{"), "damaged-file", "'teacher'"),
        (cut("teacher/model.safetensors", 1000), "damaged-file", "teacher/model.safetensors"),
    ],
)
def test_a_teacher_that_cannot_teach(fails, spoil, code, about):
    """Of another vocabulary, or broken."""
    shutil.copytree("model", "teacher")
    spoil()
    assert reports(fails("loss={name: kd, teacher: teacher}"), code, about)


def test_blocks_that_the_model_does_not_have(fails):
    """What is checked against the model that was loaded."""
    for override, code, about in (
        ("freeze_layers=[0-9]", "out-of-range", "freeze_layers: 0-9 "),
        ("freeze_layers=[5-0]", "invalid-value", "freeze_layers: "),
        ("lora={rank: 2, layers_to_transform: [7]}", "out-of-range", "lora.layers_to_transform: 7 "),
        ("lora={rank: 2, target_modules: [nothing]}", "not-a-choice", "lora.target_modules: "),
        ("lora={rank: 2, target_modules: '['}", "invalid-value", "lora.target_modules: '[' "),
        ("lora={rank: 2, target_modules: '('}", "invalid-value", "lora.target_modules: '(' "),
        ("lora={rank: 2, target_modules: []}", "invalid-value", "lora.target_modules: "),
        ("lora={rank: 999999999999}", "out-of-range", "lora.rank: "),
        ("lora={rank: 2, modules_to_save: [nothing]}", "not-a-choice", "lora.modules_to_save: "),
        ("optimizer_args={momentum: -1}", "unknown-option", "optimizer_args.momentum: "),
    ):
        assert reports(fails(override), code, about), (override, code)
