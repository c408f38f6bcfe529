"""LoRA against PEFT: the same start, gradients, files and merged weights, for every kind of layer and model."""

import copy

import pytest
import torch

from minitrain.model.adapter_files import adapt_model, load_adapter
from minitrain.model.load import load_model, save_model
from minitrain.model.lora import fold
from minitrain.schema import Config, LoRAConfig, ModelConfig
from tests.core.test_policy import MODELS

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
    model.adapter = adapt_model(config, model, None)
    model.adapter.freeze(model, torch.float32)
    return model.eval()


class _Tokens:
    """Enough of a tokenizer to load a model of 128 tokens."""

    pad_token_id = 0

    def __len__(self):
        return 128

    def save_pretrained(self, folder):
        pass


def base(folder):
    return load_model(ModelConfig(str(folder)), _Tokens(), 0).eval()


def shaken(model):
    """Other values for all that is trained, so that B and the like are not zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def gradients(model):
    """Of the mean of the squared logits."""
    logits(model).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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
    close(logits(model), logits(base(folders[name])), 1e-4)
    shaken(model)
    save_model(model, _Tokens(), tmp_path, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base(folders[name]), tmp_path, is_trainable=True).eval()
    close(logits(theirs), logits(model), 1e-4)
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
    for module in whole.adapter.adapted.values():
        fold(module)
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
