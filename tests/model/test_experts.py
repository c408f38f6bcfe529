"""Experts, which transformers stores as 3-D parameters: how much of a model an option reaches is reported."""

import copy
import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from minitrain import ConfigError
from minitrain.config.schema import Config
from minitrain.config.sections import LoRAConfig, ModelConfig
from minitrain.model.adapter_files import load_adapter
from minitrain.model.decoder import find_blocks
from minitrain.model.experts import mark_recomputed
from minitrain.model.load import CPU, META, build_policy, load_base, load_merged, load_model
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises
from tests.tensors import close, shaken

pytestmark = pytest.mark.numeric

peft = pytest.importorskip("peft")

SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    num_experts_per_tok=2,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MODELS = {
    "mixtral": lambda **k: tf.MixtralForCausalLM(tf.MixtralConfig(**SHAPE, num_local_experts=4, **k)),
    "qwen3-moe": lambda **k: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SHAPE, num_experts=4, **k)),
    "gpt-oss": lambda **k: tf.GptOssForCausalLM(
        tf.GptOssConfig(**SHAPE, num_local_experts=4, rope_parameters=ROPE, sliding_window=16, **k)
    ),
    "deepseek-v3": lambda **k: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **SHAPE | {"num_key_value_heads": 4},
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            **k,
        )
    ),
    "gpt2": lambda **k: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, **k)),
}

EXPERTS = ["mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3"]
HINT = "; lora.target_parameters=all-experts adapts the experts"
IDS = torch.arange(3, 35).view(2, 16) * 3 % 128  # [2, 16]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model as a folder, with the embedded tokenizer and random values everywhere."""
    tokenizer, made = tiny_tokenizer(), {}
    for name, make in MODELS.items():
        torch.manual_seed(1)
        model = make(vocab_size=len(tokenizer))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        made[name] = tmp_path_factory.mktemp(name)
        save_model(model, tokenizer, made[name], torch.float32)
    return made


def build(folder, device=CPU, quantization="none", **lora):
    """The model of `build_policy` with a LoRA."""
    config = Config(model=ModelConfig(str(folder), quantization=quantization), lora=LoRAConfig(**{"rank": 4} | lora))
    return build_policy(config, tiny_tokenizer(), device)[0].model


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_lora_on_all_linear_layers_says_how_much_it_reaches(folders, name):
    """In a layer with 4 experts these are the attention's 3,072 of 21,632 weights; routers are parameters too."""
    model = build(folders[name])
    attention, experts, router = 32 * 32 * 2 + 2 * 16 * 32, 4 * 3 * 48 * 32, 4 * 32
    share = attention / (attention + experts + router)
    kinds = "mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp." + {"mixtral": "gate", "gpt-oss": "router"}[name]
    assert model.matrices == f"{share:.1%} adapted, {1 - share:.1%} frozen ({kinds}){HINT}"
    assert build(folders[name], META).matrices == model.matrices


def test_full_training_and_frozen_layers(folders):
    """Everything is trained; a frozen block is half of the matrices, by name."""
    config = Config(model=ModelConfig(str(folders["gpt2"])))
    assert build_policy(config, tiny_tokenizer())[0].model.matrices == "100.0% trained"
    config.freeze_layers = [0]
    words = build_policy(config, tiny_tokenizer())[0].model.matrices
    assert words == "50.0% trained, 50.0% frozen (mlp.c_fc, mlp.c_proj, attn.c_attn, attn.c_proj)"


# ------------------------------------------------------------------------------------------------------------- LoRA


def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def base(folder):
    return load_model(ModelConfig(str(folder)), tiny_tokenizer(), 0).eval()


def exact(model):
    """Logits in float64, where the order of sums no longer shows."""
    model = copy.deepcopy(model).double()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_experts_implementation("eager")  # products of groups have no float64
    return logits(model)


def expert_gradients(model) -> dict[str, torch.Tensor]:
    """Of the mean of the squared logits, by our names: PEFT's wrappers are named by what they wrap."""
    logits(model).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", EXPERTS)
def test_peft_agrees_on_experts(folders, tmp_path, name, implementation):
    """The start is the base; with random matrices, PEFT computes the same logits and gradients from our file."""
    model = build(folders[name], target_modules=[], target_parameters="all-experts", alpha=8.0)
    model.set_experts_implementation(implementation)
    close(exact(model), exact(base(folders[name])), 1e-6)
    ours = expert_gradients(shaken(model))
    save_model(model, tiny_tokenizer(), tmp_path / "ours", torch.float32)
    theirs = peft.PeftModel.from_pretrained(base(folders[name]), tmp_path / "ours", is_trainable=True)
    close(exact(model), exact(theirs), 1e-5)
    close(logits(model), logits(theirs), 1e-3)
    assert set(expert_gradients(theirs)) == {
        key.replace(".weight", ".default.weight") for key in load_file(tmp_path / "ours/adapter_model.safetensors")
    }
    norms = [sorted(float(grad.norm()) for grad in each.values()) for each in (ours, expert_gradients(theirs))]
    close(torch.tensor(norms[0]), torch.tensor(norms[1]) / 2, 1e-4)  # theirs were added up twice


@pytest.mark.parametrize("name", EXPERTS)
def test_peft_adapters_of_experts_are_loaded_and_merged(folders, tmp_path, name):
    """With ranks and alphas by name, rsLoRA, a router and a layer; ours and the merged model compute the same."""
    router = "router.weight" if name == "gpt-oss" else "gate.weight"
    attention = "kv_a_proj_with_mqa" if name == "deepseek-v3" else "k_proj"
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        target_modules=[attention],
        target_parameters=["experts.down_proj", "experts.gate_up_proj", router],
        rank_pattern={r".*1\.mlp\.experts\.down_proj": 3, attention: 4},
        alpha_pattern={"experts.gate_up_proj": 5},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base(folders[name]), config)
    theirs.save_pretrained(tmp_path)
    ours = base(folders[name])
    ours.adapter = load_adapter(ours, tmp_path)
    close(exact(ours), exact(theirs), 1e-5)
    assert ours.adapter.experts["model.layers.1.mlp.experts.down_proj"].lora_parameters["down_proj"].rank == 3
    save_model(ours, tiny_tokenizer(), tmp_path / "again", torch.float32)
    close(exact(peft.PeftModel.from_pretrained(base(folders[name]), tmp_path / "again")), exact(theirs), 1e-5)
    merged = load_merged(ModelConfig(str(folders[name]), adapter=str(tmp_path)), tiny_tokenizer())
    close(exact(merged), exact(theirs), 1e-4)
    assert type(merged) is type(ours) and type(merged.model.layers[1].mlp.experts).__name__.endswith("Experts")
    assert {name for name, _ in merged.named_parameters()} == {n for n, _ in base(folders[name]).named_parameters()}


@pytest.mark.parametrize(
    ("name", "options", "code", "about"),
    [
        ("mixtral", {"target_parameters": ["experts.gate_up"]}, "not-a-choice", "mean experts.gate_up_proj"),
        ("mixtral", {"target_parameters": ["q_proj.weight"]}, "not-a-choice", "target_modules"),
        ("gpt2", {"target_parameters": "all-experts"}, "not-a-choice", "GPT2LMHeadModel"),
        (
            "mixtral",
            {"target_parameters": "all-experts", "modules_to_save": ["experts"]},
            "conflict",
            "model.layers.0.mlp.experts.gate_up_proj",
        ),
        ("mixtral", {"target_parameters": "all-experts", "layers_to_transform": [2]}, "out-of-range", "0-1"),
    ],
)
def test_wrong_targets_are_refused(folders, name, options, code, about):
    """With the nearest names, on the meta device as in training."""
    for device in (CPU, META):
        with raises(ConfigError, code, "lora.", about):
            build(folders[name], device, **options)


def test_an_adapter_of_peft_that_computes_something_else_is_refused(folders, tmp_path):
    """PEFT has neither dropout nor DoRA on parameters, so such files are not its."""
    model = build(folders["mixtral"], target_parameters="all-experts")
    save_model(model, tiny_tokenizer(), tmp_path, torch.float32)
    file = tmp_path / "adapter_config.json"
    for change in ({"lora_dropout": 0.1}, {"use_dora": True}):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.0, "use_dora": False} | change))
        with raises(ConfigError, "unsupported-model", next(iter(change))):
            load_adapter(base(folders["mixtral"]), tmp_path)


def test_chosen_blocks_and_names_are_saved_as_they_were_chosen(folders, tmp_path):
    """PEFT adapts the same parameters; a target that reaches more than was adapted is written in full."""
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "layers_to_transform": [1]}
    model = shaken(build(folders["qwen3-moe"], **options))
    save_model(model, tiny_tokenizer(), tmp_path, torch.float32)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_parameters"] == ["model.layers.1.mlp.experts.down_proj"]
    close(exact(model), exact(peft.PeftModel.from_pretrained(base(folders["qwen3-moe"]), tmp_path)), 1e-5)
    save_model(build(folders["gpt-oss"], target_parameters="all-experts"), tiny_tokenizer(), tmp_path, torch.float32)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]


def test_experts_can_be_trained_in_full(folders, tmp_path):
    """With modules_to_save beside a LoRA; PEFT loads them."""
    model = build(folders["mixtral"], target_modules=["q_proj"], modules_to_save=["layers.1.mlp.experts"])
    save_model(shaken(model), tiny_tokenizer(), tmp_path, torch.float32)
    close(logits(model), logits(peft.PeftModel.from_pretrained(base(folders["mixtral"]), tmp_path)), 1e-4)


# ----------------------------------------------------------------------------------------------------- quantization

BITS = pytest.mark.parametrize("bits", ["4bit", "8bit"])


def trained_gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits(model).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@BITS
@pytest.mark.parametrize("name", MODELS)
def test_experts_and_conv1d_layers_are_quantized(folders, name, bits):
    """All matrices but routers; the shares are the same on the meta device."""
    pytest.importorskip("bitsandbytes")
    lora = {"target_modules": "all-linear"} | ({} if name == "gpt2" else {"target_parameters": "all-experts"})
    model = build(folders[name], quantization=bits, **lora)
    router = {"gpt2": "", "gpt-oss": "mlp.router"}.get(name, "mlp.gate")
    assert "100.0% quantized" in model.matrices if name == "gpt2" else f"quantized (not {router})" in model.matrices
    assert (f"frozen ({router})" if router else "100.0% adapted") in model.matrices
    assert build(folders[name], META, quantization=bits, **lora).matrices == model.matrices


@BITS
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_experts", [True, False])
def test_quantized_models_compute_with_their_rounded_weights(folders, tmp_path, name, bits, with_experts):
    """Logits and gradients are those of the merged base with the same LoRA, and merging gives the same logits."""
    pytest.importorskip("bitsandbytes")
    reached = {"target_parameters": "all-experts"} if with_experts and name != "gpt2" else {}
    model = shaken(build(folders[name], quantization=bits, **reached))
    save_model(model, tiny_tokenizer(), tmp_path, torch.float32)
    rounded = load_base(ModelConfig(str(folders[name]), quantization=bits), tiny_tokenizer())
    assert {type(m) for m in rounded.modules()} == {type(m) for m in base(folders[name]).modules()}
    assert not torch.equal(logits(rounded), logits(base(folders[name])))
    rounded.adapter = load_adapter(rounded, tmp_path)
    rounded.adapter.freeze(rounded, torch.float32)
    close(logits(model), logits(rounded), 1e-3)
    ours, theirs = trained_gradients(model), trained_gradients(rounded)
    assert ours.keys() == theirs.keys()
    for key in ours:
        close(ours[key], theirs[key], 1e-2)
    for block in find_blocks(model):
        mark_recomputed(block)
    for key, gradient in trained_gradients(model).items():
        close(gradient, ours[key], 1e-4)
    merged = load_merged(ModelConfig(str(folders[name]), quantization=bits, adapter=str(tmp_path)), tiny_tokenizer())
    close(logits(merged), logits(rounded), 1e-3)


@BITS
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "gpt2"])
def test_packed_experts_have_the_sizes_of_the_meta_device(folders, name, bits):
    """So that the memory that `validate` estimates is right."""
    pytest.importorskip("bitsandbytes")
    real, meta = (build(folders[name], device, quantization=bits) for device in (CPU, META))
    taken = [tensor for p in real.parameters() for tensor in packed_tensors(p)] + list(real.buffers())
    held = sum(tensor.numel() * tensor.element_size() for tensor in taken)
    estimated = sum(t.numel() * t.element_size() for t in (*meta.parameters(), *meta.buffers()))
    assert estimated == held


def packed_tensors(parameter: torch.Tensor) -> list[torch.Tensor]:
    """What a packed or an ordinary parameter consists of."""
    if type(parameter).__name__ == "Int8Params":
        return [parameter.data, parameter.SCB]
    if type(parameter).__name__ == "Params4bit":
        state = parameter.quant_state
        return [parameter.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return [parameter]


def test_unpacked_experts_are_not_kept_for_the_backward_pass(folders):
    """Only packed weights and activations are alive between the passes."""
    pytest.importorskip("bitsandbytes")
    model = build(folders["mixtral"], quantization="4bit")
    kept = []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits(model)
    assert kept and not any(len(shape) == 3 and shape[0] == 4 and shape[1] in (32, 96) for shape in kept)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("quantization", ["none", "4bit"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_resumed_run_ends_with_the_same_experts(make_trainer, capsys, folders, quantization, checkpointing):
    """Every matrix of LoRA moves, packed rows or not; the first lines and the card say what is reached."""
    if quantization == "4bit":
        pytest.importorskip("bitsandbytes")
    options = [
        "n_steps=4",
        "save_every_steps=2",
        f"model={{name_or_path: {folders['qwen3-moe']}, quantization: {quantization}}}",
        "lora={rank: 2, target_parameters: all-experts}",
        f"activation_checkpointing={str(checkpointing).lower()}",
        f"packing={str(not checkpointing).lower()}",
    ]
    trained = make_trainer("exp_name=whole", *options)
    trained.train()
    make_trainer(*options, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 2 else None).train()
    resumed = make_trainer(*options)
    resumed.train()
    line = trained.policy.model.matrices
    assert f"matrices: {line}" in capsys.readouterr().out
    assert f"{line}." in (trained.run.final / "README.md").read_text()
    first = make_trainer("exp_name=start", *options)
    starts = dict(first.policy.named_parameters())
    ends = dict(resumed.policy.named_parameters())
    for name, parameter in trained.policy.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, ends[name]), name
            assert not torch.equal(parameter, starts[name]), name
