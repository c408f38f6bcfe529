"""LoRA against PEFT: the same start, gradients, files and merged weights, for every kind of layer and model."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from minitrain import ConfigError
from minitrain.batch import Document, collate
from minitrain.config.schema import Config
from minitrain.config.sections import LoRAConfig, ModelConfig
from minitrain.model.adapter_files import adapt_model, load_adapter
from minitrain.model.load import build_policy, load_merged, load_model, load_tokenizer
from minitrain.model.logprobs import chunked_logprobs
from minitrain.model.lora import _LoRALinear, merge_lora_weights
from minitrain.model.policy import Policy
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from minitrain.training.aux_models import InitialPolicySnapshot
from tests.messages import raises
from tests.model.test_policy import MODELS
from tests.tensors import close, shaken

pytestmark = pytest.mark.numeric

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 35).view(2, 16) * 3 % 128  # [2, 16]
VARIANTS = {
    "plain": {},
    "dropout-eval": {"dropout": 0.3},
    "rslora": {"use_rslora": True, "alpha": 16.0, "rank": 16},
    "dora": {"use_dora": True},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
    "names": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.0\..*(k_proj|o_proj)"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding-dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model as a folder; biases and norms are random too."""
    made = {}
    for name, make in MODELS.items():
        torch.manual_seed(1)
        model = make()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def adapted(folder, **options):
    """The model with a LoRA."""
    config = Config(model=ModelConfig(str(folder)), lora=LoRAConfig(**({"rank": 4, "alpha": 8.0} | options)))
    model = load_model(config.model, _Tokens(), 0)
    model.adapter = adapt_model(config, model, None, None)
    model.adapter.freeze(model, torch.float32)
    return model.eval()


class _Tokens:
    """Enough of a tokenizer to load a model of 128 tokens."""

    pad_token_id, eos_token_id = 0, 1

    def __len__(self):
        return 128

    def get_vocab(self):
        return {str(number): number for number in range(128)}

    def save_pretrained(self, folder):
        pass


def base(folder):
    return load_model(ModelConfig(str(folder)), _Tokens(), 0).eval()


def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def exact(model):
    """Logits in float64, where the order of sums no longer shows."""
    return logits(copy.deepcopy(model).double())


def gradients(model):
    """Of the mean of the squared logits."""
    logits(model).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_start_is_the_base_and_peft_agrees_on_everything_after(folders, tmp_path, name, variant):
    """Injected equals base; saved and loaded by PEFT: equal logits, equal gradients; merged equals unmerged."""
    options = VARIANTS[variant]
    if variant in ("names", "regex", "embedding", "embedding-dora") and name in ("gpt2", "phi-bias"):
        options = {"gpt2": {"target_modules": ["c_attn"]}, "phi-bias": {"target_modules": ["dense"]}}[name]
    if variant == "saved" and name == "gpt2":
        options = {"modules_to_save": ["lm_head", "ln_f"]}
    if variant == "saved" and name == "phi-bias":
        options = {"modules_to_save": ["lm_head", "final_layernorm"]}
    model = adapted(folders[name], **options)
    # In float32 are: base weights that pissa and olora change, and the norms of DoRA.
    rounded = {"pissa": 1e-4, "olora": 1e-4, "dora": 1e-5, "embedding-dora": 1e-5}.get(variant, 1e-6)
    close(exact(model), exact(base(folders[name])), rounded)
    shaken(model)
    save_model(model, _Tokens(), tmp_path, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base(folders[name]), tmp_path, is_trainable=True).eval()
    close(exact(theirs), exact(model), rounded)
    if variant in ("pissa", "olora"):  # saved as an ordinary LoRA of twice the rank
        ours = base(folders[name])
        load_adapter(ours, tmp_path)
        close(logits(ours), logits(model), 1e-4)
        return
    found, wanted = gradients(model), gradients(theirs)
    renamed = {_plain(key): grad for key, grad in wanted.items()}
    assert found.keys() == renamed.keys()
    for key, grad in found.items():
        close(grad, renamed[key], 1e-4)
    whole = copy.deepcopy(model)
    for module in whole.adapter.layers.values():
        merge_lora_weights(module)
    close(logits(whole), logits(model), 1e-4)
    assert not any("lora" in key for key, _ in whole.named_parameters())


def _plain(key: str) -> str:
    """PEFT's name of a parameter -> ours."""
    for old, new in (
        ("base_model.model.", ""),
        (".base_layer", ""),
        (".modules_to_save.default", ""),
        (".lora_magnitude_vector.default.weight", ".lora_magnitude_vector"),
        (".default.weight", ""),
        (".default", ""),
    ):
        key = key.removeprefix(old) if old.startswith("base") else key.replace(old, new)
    return key


@pytest.mark.parametrize("keeps_product", [False, True])
def test_the_gradient_function_is_that_of_the_formula(keeps_product):
    """In float64, through the whole layer: input, A, B and bias."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4)
    first, second = torch.randn(2, 5), torch.randn(4, 2)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias, first, second)]
    assert torch.autograd.gradcheck(lambda *args: _LoRALinear.apply(*args, 1.7, keeps_product), inputs)
    plain = torch.nn.functional.linear(inputs[0], inputs[1] + 1.7 * inputs[4] @ inputs[3], inputs[2])
    close(_LoRALinear.apply(*inputs, 1.7, keeps_product), plain, 1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2-softcap"])
def test_an_adapter_of_peft_is_loaded(folders, tmp_path, name):
    """One with a pattern of ranks and alphas and a module of its own: equal logits, and it can be saved again."""
    target = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "up_proj"]
    patterns = {"rank_pattern": {target[1]: 8}, "alpha_pattern": {target[1]: 32}}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=target, modules_to_save=["lm_head"], fan_in_fan_out=name == "gpt2", **patterns
    )
    theirs = shaken(peft.get_peft_model(base(folders[name]), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = base(folders[name])
    ours.adapter = load_adapter(ours, tmp_path / "theirs")
    close(exact(ours), exact(theirs), 1e-6)
    ours.adapter.freeze(ours, torch.float32)
    save_model(ours, _Tokens(), tmp_path / "ours", torch.float32)
    again = peft.PeftModel.from_pretrained(base(folders[name]), tmp_path / "ours")
    close(exact(again), exact(theirs), 1e-6)


CARRIED = {
    "tied-embedding": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "auto"),
    "tied-head": ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "auto"),
    "embeddings": ({}, True),
    "adapted-embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, True),
}


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
@pytest.mark.parametrize("case", CARRIED)
def test_base_weights_in_an_adapters_file_are_saved_again(folders, tmp_path, name, case):
    """PEFT's tied modules and saved embeddings: loaded, saved, merged, loaded by PEFT: one model (peft#2864)."""
    options, embeddings = CARRIED[case]
    config = peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | options))
    theirs = peft.get_peft_model(base(folders[name]), config)
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    plain = dict(base(folders[name]).named_parameters())
    for key, p in theirs.named_parameters():  # what is neither trained nor saved stays that of the base
        own = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if own in plain and not ("embed" in own or "lm_head" in own):
            p.data.copy_(plain[own].data)
    theirs.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=embeddings)
    theirs = peft.PeftModel.from_pretrained(base(folders[name]), tmp_path / "theirs").eval()
    ours = base(folders[name])
    ours.adapter = load_adapter(ours, tmp_path / "theirs")
    ours.adapter.freeze(ours, torch.float32)
    close(exact(ours), exact(theirs), 1e-5)
    if "ensure_weight_tying" in options:
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (name == "qwen2-tied")
        assert ours.model.embed_tokens.weight.requires_grad or case == "tied-head"
    save_model(ours, _Tokens(), tmp_path / "ours", torch.float32)
    again = peft.PeftModel.from_pretrained(base(folders[name]), tmp_path / "ours").eval()
    close(exact(again), exact(theirs), 1e-5)
    merged = load_merged(ModelConfig(str(folders[name]), adapter=str(tmp_path / "ours")), _Tokens()).eval()
    close(logits(merged), logits(theirs), 1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_started_adapter_with_an_embedding_is_loaded(folders, tmp_path, init, rslora):
    """Twice the rank is of the layers that something was taken from, and not of an embedding."""
    options = {"target_modules": ["embed_tokens", "q_proj"], "init": init, "use_rslora": rslora}
    model = shaken(adapted(folders["llama"], **options))
    save_model(model, _Tokens(), tmp_path, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base(folders["llama"]), tmp_path).eval()
    close(exact(theirs), exact(model), 1e-4)
    merged = load_merged(ModelConfig(str(folders["llama"]), adapter=str(tmp_path)), _Tokens())
    close(logits(merged.eval()), logits(model), 1e-4)


def test_dora_over_a_row_of_zeros_is_refused(folders, tmp_path):
    """It has no direction: the error names the layer, and not the model's weights."""
    model = base(folders["llama"])
    model.model.layers[1].mlp.up_proj.weight.data[5] = 0.0
    model.save_pretrained(tmp_path)
    with raises(ConfigError, "conflict", "lora.use_dora: row 5 of model.layers.1.mlp.up_proj"):
        adapted(tmp_path, use_dora=True)
    adapted(tmp_path, use_dora=True, exclude_modules=["up_proj"])
    adapted(tmp_path)


def test_a_file_that_says_no_more_than_it_must_is_enough(folders, tmp_path):
    """r, lora_alpha, target_modules and peft_type are all that torchtune writes; what is missing of them is told."""
    theirs = shaken(peft.get_peft_model(base(folders["llama"]), peft.LoraConfig(r=4, target_modules=["q_proj"])))
    theirs.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "adapter_config.json").read_text())
    said = {key: whole[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    ours = base(folders["llama"])
    load_adapter(ours, tmp_path)
    close(exact(ours), exact(theirs.eval()), 1e-6)
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"r": None}))
    with raises(ConfigError, "invalid-value", f"{tmp_path / 'adapter_config.json'}: ", " r."):
        load_adapter(base(folders["llama"]), tmp_path)


def test_dropout_is_on_the_matrices_input_only(folders):
    """Training mode: with all dropped, what is left is the base."""
    model = shaken(adapted(folders["llama"], dropout=1.0)).train()
    close(logits(model), logits(base(folders["llama"])), 1e-5)


FEATURES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"dropout": 0.5},
    "dora-dropout": {"use_dora": True, "dropout": 0.5},
    "bias": {"bias": "all"},
}
LAYERS = {
    "linear": ("llama", ["q_proj", "down_proj"]),
    "conv1d": ("gpt2", ["c_attn", "c_fc"]),
    "embedding": ("llama", ["embed_tokens"]),
    "tied-embedding": ("qwen2-tied", ["embed_tokens"]),
    "head": ("cohere-scale", ["lm_head"]),
    "head-bias": ("phi-bias", ["lm_head", "q_proj"]),
    "tied-head": ("gemma2-softcap", ["lm_head"]),
    "tied-both": ("qwen2-tied", ["lm_head", "embed_tokens"]),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_logged_is_what_is_saved_and_merged(folders, tmp_path, layer, feature):
    """Log-probabilities of the policy are those of PEFT over the file and of the merged model (unsloth-zoo#828)."""
    name, targets = LAYERS[layer]
    policy = Policy(shaken(adapted(folders[name], target_modules=targets, **FEATURES[feature]))).eval()
    batch = collate([[Document(row.int(), (torch.arange(16) > 0).to(torch.uint8))] for row in IDS], 0)
    logps = policy(batch).logps.view(2, 15)
    save_model(policy.model, _Tokens(), tmp_path, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base(folders[name]), tmp_path).eval()
    merged = load_merged(ModelConfig(str(folders[name]), adapter=str(tmp_path)), _Tokens()).eval()
    for model in (policy.model, theirs, merged):
        wanted = logits(model)[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
        close(logps, wanted, 2e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_acts_on_an_adapted_output_layer(folders, dora):
    """When all of the matrices' input is dropped, the policy gives what the base gives."""
    model = shaken(adapted(folders["llama"], target_modules=["lm_head"], dropout=1.0, use_dora=dora))
    batch = collate([[Document(row.int(), (torch.arange(16) > 0).to(torch.uint8))] for row in IDS], 0)
    with torch.no_grad():
        plain = Policy(base(folders["llama"]))(batch).logps
        if not dora:
            close(Policy(model.train())(batch).logps, plain, 1e-5)
        assert (Policy(model.eval())(batch).logps - plain).abs().max() > 0.1
        assert (Policy(model.train())(batch).logps - Policy(model.eval())(batch).logps).abs().max() > 0.1


def test_the_gradient_of_an_adapted_output_layer_is_that_of_its_own_forward(folders):
    """With DoRA, and with dropout of the same places: A, B and magnitude through the chunked head."""
    for feature in ("plain", "dora", "dora-dropout"):
        model = shaken(adapted(folders["llama"], target_modules=["lm_head"], **FEATURES[feature])).train()
        batch = collate([[Document(row.int(), (torch.arange(16) > 0).to(torch.uint8))] for row in IDS], 0)
        policy = Policy(model).train()
        hidden = policy.hidden_states(batch).flatten(0, 1).index_select(0, batch.predict_positions)
        torch.manual_seed(5)
        states, layer = policy.lm_head(hidden)
        (-chunked_logprobs(states, batch.targets, layer).logps.sum()).backward()
        found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        torch.manual_seed(5)
        torch.nn.functional.cross_entropy(model.lm_head(hidden.detach()), batch.targets, reduction="sum").backward()
        own = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == own.keys() and len(found) == (2 if feature == "plain" else 3)
        for key, grad in found.items():
            close(grad, own[key], 1e-3)


def test_rank_stabilised_scaling_survives(folders, tmp_path):
    """r = alpha = 16 is a factor of 4 in training, after loading, and in the merged weights (peft#2733)."""
    model = shaken(adapted(folders["llama"], rank=16, alpha=16.0, use_rslora=True))
    save_model(model, _Tokens(), tmp_path, torch.float32)
    again = base(folders["llama"])
    layers = load_adapter(again, tmp_path).layers
    assert all(layer.lora.scaling == 4.0 for layer in layers.values())
    layer = layers["model.layers.0.self_attn.q_proj"]
    want = layer.weight + 4.0 * layer.lora_B @ layer.lora_A
    merge_lora_weights(layer)
    close(layer.weight, want)


def test_a_merge_is_rounded_once(folders):
    """bfloat16 weights: the sum is made in float32, not of rounded parts (peft#1388)."""
    model = shaken(adapted(folders["llama"]))
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.data = layer.weight.data.bfloat16()
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    merge_lora_weights(layer)
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.weight != exact.bfloat16()).float().mean() < 1e-3  # ties of float32 and float64


def test_grown_embeddings_are_in_the_adapter(folders, tmp_path):
    """More tokens than the base has: reloaded by PEFT over the resized base, the logits are equal (peft#1689)."""
    tiny_tokenizer().save_pretrained(folders["qwen2-tied"])
    config = Config(model=ModelConfig(str(folders["qwen2-tied"])), lora=LoRAConfig(rank=4))
    tokenizer = load_tokenizer(config.model)
    model = shaken(build_policy(config, tokenizer)[0].model).eval()
    save_model(model, tokenizer, tmp_path, torch.float32)
    resized = base(folders["qwen2-tied"])
    resized.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(resized, tmp_path)
    close(logits(theirs.eval()), logits(model), 1e-4)
    config = ModelConfig(str(folders["qwen2-tied"]), adapter=str(tmp_path))
    close(logits(load_merged(config, tokenizer).eval()), logits(model), 1e-4)


WRONG = {
    "r": (0, -1, True, 1.5, "4", 10**12),
    "lora_alpha": (float("nan"), float("inf"), "16", 10**400),
    "lora_dropout": (2, float("nan"), "0.1"),
    "target_modules": ([], "", [1], ["q_proj", ""], {"q_proj": 1}, "(", "nothing", ["nothing"]),
    "exclude_modules": ([1], "(", {"a": 1}),
    "rank_pattern": ({"(": 5}, {"q_proj": 0}, {"q_proj": 10**12}, [5]),
    "alpha_pattern": ({"(": 5}, {"q_proj": float("nan")}, 3),
    "layers_to_transform": (["1"], "1", [9], 1.5),
    "modules_to_save": ("lm_head", [1]),
    "bias": ("some", 1),
    "trainable_token_indices": ([1, 1], [-1], [128], ["a"], {"nothing": [1]}, 5),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_in_an_adapters_config_is_one_error(folders, tmp_path, key):
    """It names the file and the key, before anything of that size is made."""
    save_model(adapted(folders["llama"], target_modules=["q_proj"]), _Tokens(), tmp_path, torch.float32)
    file = tmp_path / "adapter_config.json"
    right, codes = json.loads(file.read_text()), ("invalid-value", "wrong-type", "out-of-range", "not-a-choice")
    for value in WRONG[key]:
        file.write_text(json.dumps(right | {key: value}))
        with pytest.raises(ConfigError) as raised:
            load_adapter(base(folders["llama"]), tmp_path)
        assert f"adapter_config.json: {key}" in raised.value.message and raised.value.code in codes, value
        assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 500, value


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_expression_that_never_ends_is_stopped(folders, tmp_path, monkeypatch, key):
    """Matching is cut off after a time, and the error says by which expression."""
    monkeypatch.setattr("minitrain.model.adapter_targets.MATCH_SECONDS", 0.2)
    save_model(adapted(folders["llama"], target_modules=["q_proj"]), _Tokens(), tmp_path, torch.float32)
    file = tmp_path / "adapter_config.json"
    endless = r"(.|\w)*(?=\d\d\d)"
    value = {endless: 4} if key == "rank_pattern" else endless
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with raises(ConfigError, "invalid-value", f"{key}: ", repr(endless)[1:-1], "0.2 seconds"):
        load_adapter(base(folders["llama"]), tmp_path)


def test_names_that_peft_accepts_are_accepted(folders, tmp_path):
    """A target that the model lacks beside one it has, excluded ones, and a start that leaves the base as it is."""
    for number, options in enumerate(
        (
            {"target_modules": ["q_proj", "Wqkv"]},
            {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
            {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
            {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        )
    ):
        folder = tmp_path / str(number)
        theirs = shaken(peft.get_peft_model(base(folders["llama"]), peft.LoraConfig(r=4, **options))).eval()
        theirs.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | options))  # PEFT may have shortened them
        ours = base(folders["llama"])
        load_adapter(ours, folder)
        close(exact(ours), exact(theirs), 1e-6)


def test_layers_that_are_all_left_out_are_told(folders):
    """The layer is there, but another option has it."""
    for options in ({"exclude_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        with raises(ConfigError, "conflict", "lora.target_modules: ", *options, "lm_head"):
            adapted(folders["llama"], target_modules=["lm_head"], **options)
    with raises(ConfigError, "invalid-value", "lora.layers_to_transform: ", "lm_head"):
        adapted(folders["llama"], target_modules=["lm_head"], layers_to_transform=[0])


def test_what_cannot_be_adapted_is_told(folders, tmp_path):
    """A layer that is not there names those that are like it; an adapter of another model names what is missing."""
    with raises(ConfigError, "not-a-choice", "lora.target_modules: ", "'q_prj'", "q_proj"):
        adapted(folders["llama"], target_modules=["q_prj"])
    with raises(ConfigError, "not-a-choice", "lora.modules_to_save: ", "'lm_hat'", "Did you mean lm_head"):
        adapted(folders["llama"], modules_to_save=["lm_hat"])
    with raises(ConfigError, "out-of-range", "lora.layers_to_transform: 7", "0-1"):
        adapted(folders["llama"], layers_to_transform=[7])
    with raises(ConfigError, "invalid-value", "lora.target_modules: ", "'(q'"):
        adapted(folders["llama"], target_modules="(q")
    save_model(adapted(folders["llama"]), _Tokens(), tmp_path, torch.float32)
    with raises(ConfigError, "not-a-choice", "target_modules: ", "_proj'"):
        load_adapter(base(folders["gpt2"]), tmp_path)
    changed = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed | {"init_lora_weights": "pissa"}))
    with raises(ConfigError, "unsupported-model", "path_initial_model_for_weight_conversion"):
        load_adapter(base(folders["llama"]), tmp_path)


# ------------------------------------------------------------------------------------------------ in the trainer


def test_adapters_are_float32_over_a_bf16_base(make_trainer):
    """Weights, moments and file; the base is bfloat16 and does not move (peft#1706)."""
    trainer = make_trainer("lora.rank=4", "model.policy_dtype=bfloat16")
    frozen = {n: p.clone() for n, p in trainer.policy.named_parameters() if not p.requires_grad}
    trainer.train()
    for name, p in trainer.policy.named_parameters():
        assert p.dtype == (torch.float32 if "lora" in name else torch.bfloat16)
        assert "lora" in name or torch.equal(p, frozen[name])
    assert all(state["exp_avg"].dtype == torch.float32 for state in trainer.optimizer.state.values())
    saved = load_file(trainer.run.final / "adapter_model.safetensors")
    assert saved and all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_every_matrix_moves_with_activation_checkpointing(make_trainer):
    """Frozen inputs and recomputation: every lora_B has changed after one step (transformers#21381)."""
    trainer = make_trainer("lora.rank=4", "activation_checkpointing=true", "n_steps=1")
    trainer.train()
    moved = {n: bool(p.any()) for n, p in trainer.policy.named_parameters() if n.endswith("lora_B")}
    assert len(moved) == 14 and all(moved.values())


def test_a_checkpoint_is_the_size_of_the_adapter_and_resumes(make_trainer):
    """The base is not in it; interrupted and resumed equals uninterrupted, with dropout and a started adapter."""
    options = ("lora.rank=4", "lora.dropout=0.2", "lora.init=pissa", "n_steps=4", "save_every_steps=2")
    whole = make_trainer(*options, "exp_name=whole")
    whole.train()
    first = make_trainer(*options, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 2 else None)
    first.train()
    held = load_file(first.run.checkpoint(2) / "model-0.safetensors")
    assert held and all("lora_" in name for name in held)
    second = make_trainer(*options)
    second.train()
    ended = dict(second.policy.named_parameters())
    assert all(torch.equal(p, ended[name]) for name, p in whole.policy.named_parameters())


def test_lora_plus_moves_b_faster(make_trainer):
    """The schedule scales both groups; B has a multiple of lr (LoRA+)."""
    trainer = make_trainer("lora.rank=4", "lora.loraplus_lr_ratio=8", "n_steps=2")
    trainer.train()
    by_ratio = {group["lr_ratio"]: group for group in trainer.optimizer.param_groups}
    assert by_ratio[8.0]["lr"] == pytest.approx(8 * by_ratio[1.0]["lr"])
    names = {id(p): n for n, p in trainer.policy.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in by_ratio[8.0]["params"]} == {"lora_B"}


def test_an_adapter_goes_on_where_it_stopped(make_trainer):
    """model.adapter: evaluated before its first step it is what was saved."""
    options = ("validation_split=8", "lora.rank=4", "n_steps=6")
    first = make_trainer(*options, "exp_name=first")
    ended = first.train()
    began = []
    more = (f"model.adapter={first.run.final}", "validation_split=8", "exp_name=second")
    second = make_trainer(*more, on_eval_end=lambda t: began.append(t.eval_metrics["loss"]))
    second.train()
    assert began[0] == pytest.approx(ended["loss"], rel=1e-6) and began[-1] < began[0]


def test_an_adapted_output_layer_is_learned(make_trainer):
    """LoRA on lm_head goes through the chunked head: the same first gradient as through the model's own logits."""
    trainer = make_trainer("lora.rank=4", "lora.target_modules=[lm_head]", "lora.init=gaussian", "n_steps=1")
    _, (batch,) = next(trainer.train_loader.steps())
    shaken(trainer.policy)
    (-trainer.policy(batch).logps.sum()).backward()
    head = trainer.policy.model.lm_head
    found = head.lora_A.grad.clone(), head.lora_B.grad.clone()
    trainer.policy.zero_grad()
    total = 0.0
    for row, start, stop in batch.spans.tolist():
        ids, labels = batch.input_ids[row : row + 1, start:stop], batch.labels[row, start + 1 : stop]
        total = total + torch.nn.functional.cross_entropy(
            trainer.policy.model(input_ids=ids).logits[0, :-1], labels, reduction="sum"
        )
    total.backward()
    close(found[0], head.lora_A.grad, 1e-4)
    close(found[1], head.lora_B.grad, 1e-4)


@pytest.mark.parametrize("loaded", [False, True])
def test_the_reference_is_the_policy_as_it_was_loaded(make_trainer, loaded):
    """A loaded adapter, not the base without it, and it does not drift; the policy goes on unharmed (trl#1193)."""
    first = make_trainer("lora.rank=4", "lora.modules_to_save=[norm]", "exp_name=first", "lr=0.05")
    first.train()
    options = [f"model.adapter={first.run.final}"] if loaded else ["lora.rank=4", "lora.init=pissa"]
    trainer = make_trainer(*options, "exp_name=second", "lr=0.05")
    _, (batch,) = next(trainer.train_loader.steps())
    began = trainer.policy.eval()(batch).logps.detach()
    plain = make_trainer("exp_name=plain").policy.eval()(batch).logps
    assert torch.allclose(began, plain, atol=1e-4) != loaded
    reference = InitialPolicySnapshot(trainer.policy, trainer.parallel)
    trainer.train()
    trainer.policy.eval()
    ended = trainer.policy(batch).logps
    with reference.restored():
        assert torch.equal(trainer.policy(batch).logps, began)
    ended.sum().backward()  # what was computed before the swap can still be differentiated
    assert not torch.allclose(ended, began, atol=1e-3) and torch.equal(trainer.policy(batch).logps, ended)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_computes_with_its_rounded_weights(folders, tmp_path, bits):
    """Logits and gradients are those of the dense model with the weights made whole again; merged likewise."""
    pytest.importorskip("bitsandbytes")
    model_config = ModelConfig(str(folders["llama"]), quantization=bits)
    config = Config(model=model_config, lora=LoRAConfig(rank=4))
    model = shaken(build_policy(config, _Tokens())[0].model).eval()
    assert all(p.dtype in (torch.uint8, torch.int8) for n, p in model.named_parameters() if n.endswith("proj.weight"))
    save_model(model, _Tokens(), tmp_path, torch.float32)
    dense = load_merged(ModelConfig(str(folders["llama"]), quantization=bits, adapter=str(tmp_path)), _Tokens()).eval()
    close(logits(model), logits(dense), 1e-4)
    assert (logits(dense) - logits(base(folders["llama"]))).abs().max() > 0.1
    trained = base(folders["llama"])
    for name, p in trained.named_parameters():
        if name.endswith("proj.weight"):
            p.data.copy_(dense.get_parameter(name))
    gradient = gradients(model)
    assert gradient and all("lora" in name and bool(grad.isfinite().all()) for name, grad in gradient.items())
