"""Which layers LoRA adapts, and under which names it is saved: PEFT loads what is saved to equal logits."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import nn

from minitrain import ConfigError
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.model import peft_rules
from minitrain.model.adapter_files import adapt_model, load_adapter
from minitrain.model.load import load_merged
from minitrain.model.save import save_model
from tests.messages import raises
from tests.model.test_lora import _Tokens, adapted, base, logits
from tests.model.test_policy import SHAPE
from tests.tensors import close, shaken

pytestmark = pytest.mark.numeric

peft = pytest.importorskip("peft")
rules = pytest.importorskip("peft.tuners.tuners_utils")
conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_routed_experts": 4}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SHARED = MOE | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MODELS = {  # one of each property that PEFT's rules look at
    "linear-of-its-own": (tf.FalconConfig, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "router-is-a-linear": (tf.PhimoeConfig, {"num_local_experts": 4}),
    "changes-a-view-in-place": (
        tf.Gemma3nTextConfig,
        {
            "head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128,
            "laurel_rank": 16,
            "num_hidden_layers": 2,
            "intermediate_size": [48] * 2,
            "activation_sparsity_pattern": [0.5, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
        },
    ),
    "numbered-layers": (
        tf.CTRLConfig,
        {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "numbered-and-shared": (
        tf.Zamba2Config,
        {
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "num_key_value_heads": 4,
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "hybrid_layer_ids": [1, 3],
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "num_mem_blocks": 1,
        },
    ),
    "named-like-experts": (tf.DeepseekV3Config, SHARED | MLA | {"num_key_value_heads": 4}),
    "renamed-keys": (
        tf.LagunaConfig,
        {"num_attention_heads_per_layer": [4, 4], "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "refused-by-name": (
        tf.Mamba2Config,
        {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    ),
    "keys-of-no-layer": (
        tf.Inkling2TextConfig,
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """``folder_of(name)``: the folder of a model, made once."""
    folders = {}

    def get(name):
        if name not in folders:
            kind, options = MODELS[name]
            torch.manual_seed(1)
            model = tf.AutoModelForCausalLM.from_config(kind(**SHAPE | options))
            for p in model.parameters():
                p.data += 0.1 * torch.randn_like(p)
            folders[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[name])
        return folders[name]

    return get


def check_everywhere(model, folder, tmp_path):
    """Require that an adapter is the same where it is trained, in PEFT, loaded again and merged."""
    expected = logits(shaken(model)).detach()
    save_model(model, _Tokens(), tmp_path / "ours", torch.float32)
    close(logits(peft.PeftModel.from_pretrained(base(folder), tmp_path / "ours")), expected, 1e-4)
    again = base(folder)
    load_adapter(again, tmp_path / "ours")
    close(logits(again), expected, 1e-4)
    merged = load_merged(ModelConfig(str(folder), adapter=str(tmp_path / "ours")), _Tokens())
    close(logits(merged), expected, 1e-4)
    assert (expected - logits(base(folder))).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_all_linear_layers_is_the_same_everywhere(folder_of, tmp_path, name):
    """Logits in PEFT, loaded again and merged equal those of the training; and a step can be taken."""
    model = adapted(folder_of(name))
    model.train()(input_ids=torch.arange(3, 35).view(2, 16), use_cache=False).logits.square().mean().backward()
    check_everywhere(model.eval(), folder_of(name), tmp_path)


def targeted(folder, **options):
    """The layers that PEFT adapts."""
    model = peft.get_peft_model(base(folder), peft.LoraConfig(**options))
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }


def test_a_layer_that_is_not_affine_is_left_out(folder_of):
    """all-linear adapts what PEFT's does, without the routers at which PEFT fails."""
    folder = folder_of("router-is-a-linear")
    ours, theirs = adapted(folder).adapter.layers.keys(), targeted(folder, target_modules="all-linear")
    assert theirs - ours == {f"model.layers.{number}.mlp.router" for number in range(2)} and not ours - theirs


@pytest.mark.parametrize("name", ["named-like-experts", "renamed-keys"])
def test_an_adapter_of_peft_on_weights_of_layers_is_loaded(folder_of, tmp_path, name):
    """target_parameters can name the weight of a layer; ranks and alphas by pattern are kept when it is saved again."""
    folder, weights = folder_of(name), ["mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"]
    config = peft.LoraConfig(
        r=4,
        target_modules=["o_proj"],
        target_parameters=weights,
        rank_pattern={"up_proj.weight": 8, "o_proj": 2},
        alpha_pattern={"gate_proj.weight": 32},
    )
    theirs = shaken(peft.get_peft_model(base(folder), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = base(folder)
    ours.adapter = load_adapter(ours, tmp_path / "theirs")
    ours.adapter.freeze(ours, torch.float32)
    close(logits(ours), logits(theirs), 1e-4)
    save_model(ours, _Tokens(), tmp_path / "ours", torch.float32)
    close(logits(peft.PeftModel.from_pretrained(base(folder), tmp_path / "ours")), logits(theirs), 1e-4)


def test_dropout_outlives_a_file_in_which_peft_allows_none(folder_of, tmp_path):
    model = adapted(folder_of("named-like-experts"), dropout=0.25)
    save_model(model, _Tokens(), tmp_path, torch.float32)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
    again = base(folder_of("named-like-experts"))
    assert {module.lora.dropout for module in load_adapter(again, tmp_path).layers.values()} == {0.25}


REFUSED = {
    "by-name": ("refused-by-name", {"target_modules": ["in_proj", "out_proj"]}, "out_proj"),
    "by-key": ("keys-of-no-layer", {"target_modules": ["weight_proj"]}, "weight_proj"),
    "dora": ("named-like-experts", {"use_dora": True}, "down_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_load_is_refused_at_the_start(folder_of, wording, case):
    name, options, layer = REFUSED[case]
    with raises(ConfigError, "unsupported-model", "lora.target_modules", layer, "PEFT") as caught:
        adapted(folder_of(name), **options)
    wording(caught.value)


def test_layers_that_no_names_match_alone_are_refused(folder_of, monkeypatch, wording):
    monkeypatch.setattr("minitrain.model.adapter_names.find_targets", lambda *args: None)
    with raises(ConfigError, "unsupported-model", "lora.target_modules", "PEFT") as caught:
        adapted(folder_of("refused-by-name"))
    wording(caught.value)


def test_a_loaded_adapter_that_peft_cannot_load_is_refused_for_training_only(folder_of, tmp_path, wording):
    """Its update can be merged, and the merged model be trained."""
    folder = folder_of("refused-by-name")
    model = adapted(folder, target_modules=["in_proj"])
    save_model(model, _Tokens(), tmp_path, torch.float32)
    old = {}  # as version 0.1.0 saved it
    for name, module in model.named_modules():
        if name.endswith("out_proj"):
            rows, columns = module.weight.shape
            old[f"base_model.model.{name}.lora_A.weight"] = torch.full((4, columns), 0.1)
            old[f"base_model.model.{name}.lora_B.weight"] = torch.full((rows, 4), 0.1)
    save_file(old, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"target_modules": ["out_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    merged = load_merged(ModelConfig(str(folder), adapter=str(tmp_path)), _Tokens())
    assert (logits(merged) - logits(base(folder))).abs().max() > 1e-2
    with raises(ConfigError, "unsupported-model", "model.adapter", "out_proj") as caught:
        adapt_model(Config(model=ModelConfig(str(folder), adapter=str(tmp_path))), base(folder), None, None)
    wording(caught.value)


class _Tree(nn.Module):
    """Modules by their names, as in a model of a type."""

    def __init__(self, model_type, *names):
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        for name in names:
            parent = self
            *parts, last = name.split(".")
            for part in parts:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, nn.Linear(2, 2))


TREES = {  # names of layers, those to adapt first
    "short": ("llama", ["a.q", "b.q"], ["a.k"], ["q"]),
    "full": ("llama", ["a.q"], ["b.q"], ["a.q"]),
    "also-a-block": ("llama", ["a.0", "a.2"], ["b.0.q"], ["a.0", "a.2"]),
    "end-of-another": ("llama", ["a.q"], ["b.a.q"], r"a\.q"),
    "end-of-another-expert": ("deepseek_v3", ["a.gate_proj"], ["b.a.gate_proj"], None),
    "end-of-another-in-a-type-of-experts": ("deepseek_v3", ["a.q"], ["b.a.q"], None),
}


@pytest.mark.parametrize("case", TREES)
def test_names_that_match_exactly_the_layers(case):
    model_type, names, others, expected = TREES[case]
    model = _Tree(model_type, *names, *others)
    found = peft_rules.find_targets(model.config, [name for name, _ in model.named_modules()], names, [])
    assert (found and found[0]) == expected
    if found:
        config = peft.LoraConfig(target_modules=found[0], target_parameters=found[1] or None)
        adapted_by_peft = peft.inject_adapter_in_model(config, model).named_modules()
        assert {name for name, module in adapted_by_peft if hasattr(module, "lora_A")} == set(names)


def test_a_layer_in_two_places_is_not_loadable():
    """PEFT replaces a layer only where it finds it first."""
    model = _Tree("llama", "a.q", "a.k")
    model.a.shared = model.a.q
    model.b = nn.Module()
    model.b.q = model.a.q
    assert peft_rules.find_unloadable(model, ["a.q", "a.k"]).keys() == {"a.q"}


def test_the_names_of_experts_are_those_of_peft():
    """For each type of model that transformers has: what PEFT takes out of target_modules, and what it refuses."""
    names = sorted(set().union(*peft_rules.EXPERT_NAMES.values(), peft_rules.BYPASSED, {"q_proj"}))
    for model_type in tf.CONFIG_MAPPING:
        model = _Tree(model_type, "layer")
        config = peft.LoraConfig(target_modules=[f"a.{name}" for name in names if name != "gate"] + ["gate"])
        conversion.convert_peft_config_for_transformers(config, model, None)
        taken = set(names) - {peft_rules.last_part(name) for name in config.target_modules}
        assert peft_rules.expert_names(model.config) & set(names) == taken, model_type
        refused = set()
        for name in names:
            try:
                rules._check_lora_target_modules_mamba(config, model, name)
            except ValueError:
                refused.add(name)
        is_refused = peft_rules.BYPASSED if model_type in peft_rules.MAMBA_TYPES else set()
        assert refused == is_refused, model_type


@pytest.mark.parametrize("name", MODELS)
def test_the_keys_that_are_loaded_are_those_of_peft(folder_of, name):
    """Each key of a layer and of an expert, as it is and as transformers saves the layer."""
    model = base(folder_of(name))
    groups = [[name] for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups += [["model.layers.1.mlp.shared_expert.gate_proj"], ["model.layers.1.mlp.experts.base_layer"]]
    for experts, names in {
        "mlp.experts": ("gate_proj", "up_proj", "down_proj"),
        "moe.experts": ("w1", "w2", "w3"),
    }.items():
        groups.append([f"model.layers.1.{experts}.{number}.{name}" for number in range(2) for name in names])
    for layers in groups:
        tensors = {f"base_model.model.{layer}.lora_{m}.weight": torch.zeros(2, 2) for layer in layers for m in "AB"}
        theirs = conversion.convert_peft_adapter_state_dict_for_transformers(model, peft.LoraConfig(), tensors)
        ours = peft_rules.loaded_keys(model, tensors)
        assert {key for key in ours.values() if key} <= theirs.keys(), layers
        assert not {key for key in ours if not ours[key]} & theirs.keys(), layers
