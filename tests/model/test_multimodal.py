"""The text part of a multimodal model is trained, and the class of its files loads what is saved."""

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from minitrain import ConfigError
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.inference.generate import Sampling, load_generator
from minitrain.inference.merge import merge_adapters
from minitrain.model.load import build_policy, load_model, load_tokenizer
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises
from tests.model.multimodal_models import MODELS, VISION, multimodal_model

pytestmark = pytest.mark.numeric

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 25)[None]  # [1, 22]
OPT = dict(
    vocab_size=288, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
)
LORA = ("lora.rank=4", "lora.target_modules=all-linear")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folders(name)``: the folder of a random multimodal model."""
    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            model = multimodal_model(name)
            model.save_pretrained(made[name])
            tiny_tokenizer().save_pretrained(made[name])
        return made[name]

    return folder


def load(folder, name=None):
    """Return the model in a folder, loaded by transformers with the class that the base model names."""
    config = json.loads((folder / "config.json").read_text())
    model, info = getattr(tf, name or config["architectures"][0]).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def config_of(folder) -> dict:
    """Return the config.json of a folder without its dtype."""
    config = json.loads((folder / "config.json").read_text())
    parts = {key: part for key, part in config.items() if isinstance(part, dict)}
    return config | {key: {k: v for k, v in part.items() if k != "dtype"} for key, part in parts.items()}


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def text_names(model) -> set[str]:
    """Return the names of the tensors of the decoder, the embeddings and the LM head."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    ids = {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in ids}


def tensors_in(folder) -> dict[str, torch.Tensor]:
    """Return the tensors in the files of a model."""
    return {key: tensor for path in folder.glob("model*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_class_of_the_base_loads_a_trained_model(name, folders, make_trainer):
    """Its text part is trained, the other tensors are those of the base model, and nothing is renamed."""
    base_folder = folders(name)
    trainer = make_trainer(f"model.name_or_path={base_folder}")
    trainer.train()
    base, final = load(base_folder), load(trainer.run.final)
    assert type(final) is type(base) is type(trainer.policy.model)
    torch.testing.assert_close(logits_of(final), logits_of(trainer.policy.model.eval()), rtol=0, atol=0)
    before, after, text = base.state_dict(), final.state_dict(), text_names(base)
    assert [key for key in before if key not in text and not torch.equal(before[key], after[key])] == []
    assert sum(not torch.equal(before[key], after[key]) for key in text) > len(text) / 2
    assert len(before) > len(text) + 8
    assert tensors_in(trainer.run.final).keys() == tensors_in(base_folder).keys()
    changes = {"eos_token_id": trainer.policy.model.config.eos_token_id}
    assert config_of(trainer.run.final) == config_of(base_folder) | changes


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_loads_in_peft_on_the_class_of_the_base(name, folders, make_trainer, tmp_path, recwarn):
    """PEFT applies each tensor, adapts no vision tower, and the logits are equal; so are those of the merged model."""
    base_folder = folders(name)
    trainer = make_trainer(f"model.name_or_path={base_folder}", *LORA)
    trainer.train()
    final, expected = trainer.run.final, logits_of(trainer.policy.model.eval())
    adapted = peft.PeftModel.from_pretrained(load(base_folder), final).eval()
    layers = {
        key.rpartition(".lora_")[0].removeprefix("base_model.model.")
        for key in load_file(final / "adapter_model.safetensors")
    }
    assert {key for key, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")} == layers
    assert not [warning for warning in recwarn if "missing" in str(warning.message).lower()]
    torch.testing.assert_close(logits_of(adapted), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits_of(load(base_folder)), atol=1e-3)
    again = load_model_with(base_folder, final)
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-5, atol=1e-5)
    merge_adapters([final], tmp_path / "merged")
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    base, text = load(base_folder).state_dict(), text_names(merged)
    assert all(torch.equal(tensor, base[key]) for key, tensor in merged.state_dict().items() if key not in text)


def load_model_with(folder, adapter):
    """Return the model that minitrain loads with an adapter."""
    config = Config(model=ModelConfig(str(folder), adapter=str(adapter)))
    return build_policy(config, load_tokenizer(config.model))[0].model.eval()


@pytest.mark.parametrize("targets", ["q_proj", ".*language_model.*(q_proj|down_proj)"])
def test_an_adapter_of_peft_loads(targets, folders, tmp_path, make_trainer):
    """One that PEFT made on the class of the base, whether it adapts the vision tower or not, is trained further.

    The LoRA of the vision tower is saved again as it is.
    """
    base_folder = folders("gemma3")
    config = peft.LoraConfig(r=2, target_modules=[targets] if targets == "q_proj" else targets, init_lora_weights=False)
    made = peft.get_peft_model(load(base_folder), config)
    made.save_pretrained(tmp_path / "adapter")
    model = load_model_with(base_folder, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(model), logits_of(made), rtol=1e-5, atol=1e-5)
    trainer = make_trainer(f"model.name_or_path={base_folder}", f"model.adapter={tmp_path / 'adapter'}")
    trainer.train()
    again = peft.PeftModel.from_pretrained(load(base_folder), trainer.run.final).eval()
    torch.testing.assert_close(logits_of(again), logits_of(trainer.policy.model.eval()), rtol=1e-5, atol=1e-5)
    before, after = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "adapter", trainer.run.final)
    )
    tower = [key for key in before if "vision_tower" in key]
    assert before.keys() == after.keys() and bool(tower) == (targets == "q_proj")
    assert all(torch.equal(before[key], after[key]) for key in tower)
    if tower:
        with raises(ConfigError, "unsupported-model", "vision_tower"):
            merge_adapters([trainer.run.final], tmp_path / "merged")


def test_names_of_the_text_class_are_read(folders, tmp_path):
    """An adapter and an archive of Qwen3_5ForCausalLM, which AutoModelForCausalLM loads from the same files."""
    base_folder = folders("qwen3_5")
    text = tf.AutoModelForCausalLM.from_pretrained(base_folder)
    assert type(text) is tf.Qwen3_5ForCausalLM
    for targets in (["q_proj"], ["model.layers.1.self_attn.q_proj"]):
        made = peft.get_peft_model(text, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        made.save_pretrained(tmp_path / "adapter")
        model = load_model_with(base_folder, tmp_path / "adapter")
        torch.testing.assert_close(logits_of(model), logits_of(made), rtol=1e-5, atol=1e-5)
        text = made.unload()
    for parameter in text.parameters():
        parameter.data.add_(0.01)
    torch.save(text.state_dict(), tmp_path / "state.pt")
    config = ModelConfig(str(base_folder), archive=str(tmp_path / "state.pt"))
    model = load_model(config, tiny_tokenizer(), 0)
    torch.testing.assert_close(logits_of(model.eval()), logits_of(text.eval()), rtol=1e-5, atol=1e-5)


def test_an_archive_of_the_full_model_replaces_the_other_tensors(folders, tmp_path, make_trainer):
    """The tensors of its vision tower are saved, not those of the base model."""
    other = load(folders("mistral3"))
    for parameter in other.parameters():
        parameter.data.add_(0.01)
    torch.save(other.state_dict(), tmp_path / "state.pt")
    trainer = make_trainer(
        f"model.name_or_path={folders('mistral3')}", f"model.archive={tmp_path / 'state.pt'}", "lr=0"
    )
    trainer.train()
    final, expected = load(trainer.run.final).state_dict(), other.state_dict()
    assert all(torch.equal(final[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen2_5_vl"])
def test_ranks_read_only_the_text_part(name, folders, make_trainer):
    """A model that is built empty has the tensors of its text part in its files, and the others to save."""
    config = Config(model=ModelConfig(str(folders(name))))
    tokenizer = load_tokenizer(config.model)
    empty, weights = build_policy(config, tokenizer, sharded=True)
    full, _ = build_policy(config, tokenizer)
    expected = dict(full.model.named_parameters())
    assert {key for key, _ in empty.model.named_parameters()} == expected.keys() <= text_names(load(folders(name)))
    assert all(torch.equal(weights.rows(key, 0, len(p)), p) for key, p in expected.items())
    assert empty.model.other_tensors.sources.keys() == full.model.other_tensors.sources.keys()
    assert all(
        torch.equal(tensor, load_file(folders(name) / "model.safetensors")[key])
        for key, tensor in empty.model.other_tensors
    )


def test_other_tensors_are_in_files_of_limited_size(folders, make_trainer, monkeypatch):
    """The index names every tensor once, and transformers loads them."""
    monkeypatch.setattr("minitrain.model.weights.SHARD_BYTES", 20000)
    trainer = make_trainer(f"model.name_or_path={folders('qwen2_5_vl')}")
    trainer.train()
    files = sorted(path.name for path in trainer.run.final.glob("*.safetensors"))
    assert len(files) > 4 and files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    index = json.loads((trainer.run.final / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == tensors_in(folders("qwen2_5_vl")).keys()
    model = load(trainer.run.final)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_other_tensors_keep_their_bits(folders, make_trainer, tmp_path):
    """A float32 tower beside bfloat16 text stays float32. The base folder may be deleted while the model trains."""
    base = shutil.copytree(folders("mistral3"), tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state = {key: tensor if "vision_tower" in key else tensor.bfloat16() for key, tensor in state.items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    trainer = make_trainer(f"model.name_or_path={base}", "model.policy_dtype=bfloat16")
    shutil.rmtree(base)
    trainer.train()
    final = tensors_in(trainer.run.final)
    assert {key: tensor.dtype for key, tensor in final.items()} == {key: tensor.dtype for key, tensor in state.items()}
    same = [key for key in state if torch.equal(final[key], state[key])]
    assert {key for key in state if "vision_tower" in key or "multi_modal_projector" in key} <= set(same)
    assert len(same) < len(state)


def test_other_tensors_of_a_pickled_model_are_saved(folders, make_trainer, tmp_path):
    """They cannot be read one by one, so they are kept in memory."""
    base = shutil.copytree(folders("mistral3"), tmp_path / "base")
    (base / "model.safetensors").unlink()
    expected = load(folders("mistral3")).state_dict()
    torch.save(expected, base / "pytorch_model.bin")
    trainer = make_trainer(f"model.name_or_path={base}", "lr=0")
    trainer.train()
    final = load(trainer.run.final).state_dict()
    assert all(torch.equal(final[key], expected[key]) for key in expected)


def test_nothing_else_reaches_the_vision_tower(folders, make_trainer):
    """It is not quantized, frozen or optimized, and takes no memory; one line says so."""
    trainer = make_trainer(f"model.name_or_path={folders('gemma3')}", *LORA, "model.quantization=4bit")
    names = [name for name, _ in trainer.policy.named_parameters()]
    assert not [name for name in names if "vision" in name or "projector" in name]
    assert any("model.vision_tower, model.multi_modal_projector" in note for note in trainer.notes)


def test_responses_are_those_of_the_base_class(folders):
    for name in ("gemma3", "qwen2_5_vl"):
        generator = load_generator(str(folders(name)), "cpu", "chatml")
        prompt = IDS[0, :9].tolist()
        got = generator._generate([prompt], Sampling(6))[0]
        options = dict(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        expected = load(folders(name)).generate(input_ids=torch.tensor([prompt]), **options)[0, 9:].tolist()
        assert got[: len(expected)] == expected


def test_a_multimodal_encoder_decoder_is_refused(tmp_path, make_trainer):
    tf.T5Gemma2Config().save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    tiny_tokenizer().save_pretrained(tmp_path)
    with raises(ConfigError, "unsupported-model", "encoder-decoder"):
        make_trainer(f"model.name_or_path={tmp_path}")


def test_a_model_that_needs_an_image_is_refused(tmp_path, make_trainer):
    """BLIP-2 puts the outputs of its vision tower before every text."""
    parts = dict(vision_config=VISION | {"image_size": 16, "patch_size": 8}, text_config=tf.OPTConfig(**OPT).to_dict())
    qformer = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = tf.Blip2ForConditionalGeneration(
        tf.Blip2Config(qformer_config=qformer | {"encoder_hidden_size": 16}, **parts)
    )
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with raises(ConfigError, "unsupported-model", "pixel_values"):
        make_trainer(f"model.name_or_path={tmp_path}")
