"""The policy over real architectures: equal to transformers, packed or not; loading and saving."""

import json
import pickle
import shutil
import warnings

import pytest
import safetensors.torch
import torch
import transformers as tf
from safetensors import safe_open

from minitrain import ConfigError
from minitrain.batch import Document, collate
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.model import attention
from minitrain.model.decoder import find_blocks
from minitrain.model.load import build_policy, freeze_layers, load_model, load_tokenizer
from minitrain.model.load_check import check_policy
from minitrain.model.policy import Policy
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from minitrain.model.vocabulary import resize_embeddings
from tests.conftest import SHARED, random_llama
from tests.messages import raises
from tests.shapes import SHAPE

pytestmark = pytest.mark.numeric

MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE)),
    "qwen2-tied": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "mistral-window": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SHAPE, sliding_window=4)),
    "phi-bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SHAPE | {"num_key_value_heads": 4})),
    "gemma2-softcap": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, final_logit_softcapping=2.0)
    ),
    "cohere-scale": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SHAPE, logit_scale=0.3)),
    "granite-scaling": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
}
LENGTHS = (5, 11, 3)


def documents():
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in LENGTHS:
        mask = torch.ones(length, dtype=torch.uint8)
        mask[0] = 0
        made.append(Document(torch.randint(3, 128, (length,), generator=generator, dtype=torch.int32), mask))
    return made


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_those_of_the_models_own_logits(name, packing):
    """Log-probabilities, padded or packed, are those of transformers on each document alone."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    policy = Policy(model)
    if packing and model.config._attn_implementation == "sdpa":
        attention.attend_by_document(model)
    check_policy(policy, packing)
    docs = documents()
    rows = [docs] if packing else [[doc] for doc in docs]
    got = policy(collate(rows, 0)).logps
    want = []
    for ids in (doc.ids for doc in docs):
        logits = model(input_ids=ids[None].long()).logits[0, :-1].double()
        want.append(logits.log_softmax(-1).gather(1, ids[1:, None].long())[:, 0])
    torch.testing.assert_close(got.double(), torch.cat(want), rtol=1e-4, atol=1e-4)


def test_an_unknown_output_layer_is_refused():
    """A head that does more than minitrain knows is found before training, not by a strange loss."""
    model = random_llama()
    model.lm_head.register_forward_hook(lambda module, args, out: out + out.sin())
    with raises(ConfigError, "unsupported-model", "model.name_or_path: "):
        check_policy(Policy(model), packing=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["softcap", "scale", "multiplier"])
def test_an_output_layer_is_checked_on_large_logits(change, dtype):
    """A new model's logits are so small that none of these shows in them."""
    changes = {
        "softcap": lambda logits: 50 * torch.tanh(logits / 50),
        "scale": lambda logits: logits / 1.2,
        "multiplier": lambda logits: logits * 0.9,
    }
    model = random_llama(initializer_range=0.002).to(dtype).eval()
    policy = Policy(model)
    check_policy(policy, packing=False)
    model.lm_head.register_forward_hook(lambda module, args, out: changes[change](out))
    with raises(ConfigError, "unsupported-model", "model.name_or_path: "):
        check_policy(policy, packing=False)
    check_policy(Policy(model), packing=False)


def test_checking_leaves_modes_and_gradients_alone():
    """check_policy restores training mode and leaves no gradient."""
    model = random_llama().train()
    check_policy(Policy(model), packing=True)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_growing_embeddings_never_shrinks_them():
    """160 rows and 130 tokens: untouched; 170 tokens: new rows are near the mean and distinct (unsloth-zoo#923)."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE | {"vocab_size": 160}))
    before = model.get_input_embeddings().weight.detach().clone()
    resize_embeddings(model, _Tokens(130))
    assert torch.equal(model.get_input_embeddings().weight, before)
    resize_embeddings(model, _Tokens(170))
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape[0] == 170
        known, new = layer.weight[:160], layer.weight[160:]
        away = (new - known.mean(0)) / known.std(0, correction=0)  # [10, H]
        assert 0.05 < away.std() < 0.15 and away.abs().max() < 0.5
        assert torch.pdist(new).min() > 0.01
    assert torch.equal(model.get_input_embeddings().weight[:160], before)


class _Tokens:
    """A tokenizer of so many tokens."""

    def __init__(self, n_tokens):
        self.n_tokens = n_tokens
        self.pad_token_id, self.eos_token_id = 0, 1

    def get_vocab(self):
        return {str(number): number for number in range(self.n_tokens)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_frequencies_stay_float32(llama_folder, dtype):
    """inv_freq in bf16 is off by radians at position 4096 (transformers#25681)."""
    model = load_model(ModelConfig(str(llama_folder), master_dtype=dtype), tiny_tokenizer(), 0)
    inv_freq = model.model.rotary_emb.inv_freq
    assert inv_freq.dtype == torch.float32
    heads = inv_freq.shape[0]
    exact = 100.0 ** (-torch.arange(0, 2 * heads, 2, dtype=torch.float64) / (2 * heads))
    assert ((inv_freq.double() - exact) * 4096).abs().max() < 1e-2


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    """Save, load, save again: one key, one tensor, equal logits (transformers#48972)."""
    model = random_llama()
    ids = torch.arange(3, 20)[None]
    want = model(ids).logits
    for turn in ("first", "second"):
        save_model(model, tiny_tokenizer(), tmp_path / turn, torch.float32)
        with safe_open(tmp_path / turn / "model.safetensors", "pt") as file:
            assert [key for key in file.keys() if "lm_head" in key] == []  # noqa: SIM118
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / turn)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model(ids).logits, want)


def test_saving_over_the_loaded_folder_keeps_the_weights(tmp_path, monkeypatch):
    """Loaded weights are mapped from the very file that is written, and save_file may empty it before it reads them
    (safetensors#764)."""
    from minitrain.training.atomic_dir import atomic_folder

    def save_in_place(tensors, path, metadata=None):
        if path.exists():
            path.write_bytes(bytes(path.stat().st_size))
        path.write_bytes(safetensors.torch.save(tensors, metadata))

    folder = tmp_path / "model"
    save_model(random_llama(), tiny_tokenizer(), folder, torch.float32)
    model = load_model(ModelConfig(str(folder)), tiny_tokenizer(), 0)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(safetensors.torch, "save_file", save_in_place)
    with atomic_folder(folder) as temporary:
        save_model(model, tiny_tokenizer(), temporary, torch.float32)
    again = load_model(ModelConfig(str(folder)), tiny_tokenizer(), 0).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in want.items())


def test_saved_dtype_is_cast_once(tmp_path):
    """A bf16 save holds exactly the rounded float32 weights, and config.json says so."""
    model = random_llama()
    save_model(model, tiny_tokenizer(), tmp_path, torch.bfloat16)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_freezing_blocks_and_embeddings():
    """Numbers, ranges and `embeddings`; frozen weights take the dtype of compute."""
    model = random_llama(num_hidden_layers=4)
    freeze_layers(model, ["0-1", 3, "embeddings"], torch.bfloat16)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(("model.layers.2", "model.norm")) for name in trained)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[2].mlp.up_proj.weight.dtype == torch.float32
    with raises(ConfigError, "out-of-range", "freeze_layers: 4", "0-3"):
        freeze_layers(model, [4], torch.float32)
    with raises(ConfigError, "invalid-value", "freeze_layers: "):
        whole = random_llama()
        freeze_layers(whole, ["0-1", "embeddings"], torch.float32)
        whole.model.norm.requires_grad_(False)
        freeze_layers(whole, [0], torch.float32)


def test_blocks_are_found_in_every_architecture():
    """Two blocks in each."""
    for make in MODELS.values():
        assert len(find_blocks(make())) == 2


def test_an_archive_loads_over_the_model(tmp_path, llama_folder):
    """A .pt state dict, bare or under `state`, and .safetensors; a wrong one is refused by name."""
    from safetensors.torch import save_file

    other = random_llama()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    state = {k: v.clone() for k, v in other.state_dict().items() if k != "lm_head.weight"}
    torch.save({"state": state}, tmp_path / "policy.pt")
    save_file(state, tmp_path / "policy.safetensors")
    for name in ("policy.pt", "policy.safetensors"):
        config = ModelConfig(str(llama_folder), archive=str(tmp_path / name))
        model = load_model(config, tiny_tokenizer(), 0)
        assert torch.equal(model.model.norm.weight, other.model.norm.weight)
        assert torch.equal(model.lm_head.weight, other.lm_head.weight)
    torch.save({"wrong": torch.zeros(1)}, tmp_path / "wrong.pt")
    with raises(ConfigError, "mismatch", "wrong.pt"):
        load_model(ModelConfig(str(llama_folder), archive=str(tmp_path / "wrong.pt")), tiny_tokenizer(), 0)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("place", ["archive", "pytorch_model.bin", "adapter_model.safetensors"])
def test_no_file_can_run_code(tmp_path, llama_folder, place, empty):
    """A pickled call in an archive, in a model's or in an adapter's file is refused, and is not executed."""
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    file = tmp_path / ("evil.pt" if place == "archive" else place)
    file.write_bytes(pickle.dumps({"state": Attack()}))
    model = ModelConfig(str(llama_folder))
    if place == "archive":
        model.archive = str(file)
    elif place == "pytorch_model.bin":
        shutil.copy(llama_folder / "config.json", tmp_path)
        model.name_or_path = str(tmp_path)
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        model.adapter = str(tmp_path)
    with warnings.catch_warnings(), pytest.raises(ConfigError):
        warnings.simplefilter("ignore")
        build_policy(Config(model=model), tiny_tokenizer(), sharded=empty)
    assert not canary.exists()


@pytest.mark.skipif(not SHARED.exists(), reason="real models are not here")
def test_a_real_model_scores_and_speaks_as_its_reference():
    """stories260K: mean nll of its own greedy story, and the story, equal what was recorded elsewhere."""
    import json

    folder = SHARED / "models" / "stories260K"
    config = Config(model=ModelConfig(str(folder)), packing=True)
    tokenizer = load_tokenizer(config.model)
    policy = build_policy(config, tokenizer)[0].eval()
    for entry in json.loads((folder / "reference.json").read_text()):
        ids = torch.tensor(entry["greedy_ids"], dtype=torch.int32)
        mask = torch.ones(len(ids), dtype=torch.uint8)
        mask[0] = 0
        nll = -policy(collate([[Document(ids, mask)]], 0)).logps.mean()
        assert nll.item() == pytest.approx(entry["mean_nll_of_greedy_ids"], abs=1e-4)
        prompt = torch.tensor([entry["prompt_ids"]])
        story = policy.model.generate(prompt, do_sample=False, max_length=len(ids), attention_mask=prompt > 0)
        assert story[0].tolist() == entry["greedy_ids"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_empty_and_read_by_rows(tmp_path, name):
    """No parameter has memory, tied ones are one, and rows are those of a model that was loaded whole, new ones too."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)  # of 259 tokens, more than the model's 128
    config = Config(model=ModelConfig(name_or_path=str(tmp_path)))
    tokenizer = load_tokenizer(config.model)
    whole, _ = build_policy(config, tokenizer)
    empty, weights = build_policy(config, tokenizer, sharded=True)
    assert all(p.is_meta for p in empty.model.parameters())
    wanted = dict(whole.model.named_parameters())
    assert {key: p.shape for key, p in empty.model.named_parameters()} == {key: p.shape for key, p in wanted.items()}
    for key, p in wanted.items():
        middle = len(p) // 2 + 1
        rows = torch.cat([weights.rows(key, 0, middle), weights.rows(key, middle, len(p))])
        torch.testing.assert_close(rows, p.detach(), rtol=0, atol=1e-7)
    for key, buffer in empty.model.named_buffers():
        assert torch.equal(buffer, whole.model.get_buffer(key))
