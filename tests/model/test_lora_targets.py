"""Which layers LoRA adapts, and under which names it is saved: PEFT loads what is saved to equal logits."""

import pytest
import torch
import transformers as tf

from minitrain.config.sections import ModelConfig
from minitrain.model.adapter_files import load_adapter
from minitrain.model.load import load_merged
from minitrain.model.save import save_model
from tests.model.test_lora import _Tokens, adapted, base, logits
from tests.model.test_policy import SHAPE
from tests.tensors import close, shaken

pytestmark = pytest.mark.numeric

peft = pytest.importorskip("peft")

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_routed_experts": 4}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
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


def test_a_layer_that_is_not_affine_is_left_out(folder_of):
    """all-linear adapts what PEFT's does, without the routers at which PEFT fails."""
    ours = set(adapted(folder_of("router-is-a-linear")).adapter.layers)
    theirs = peft.get_peft_model(base(folder_of("router-is-a-linear")), peft.LoraConfig(target_modules="all-linear"))
    theirs = {
        name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if hasattr(module, "lora_A")
    }
    assert theirs - ours == {f"model.layers.{number}.mlp.router" for number in range(2)} and not ours - theirs
