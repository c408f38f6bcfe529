"""Quantized bases are trained and saved as the ordinary weights that they stand for, or refused before anything."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from minitrain.cli.main import main
from minitrain.config.sections import ModelConfig
from minitrain.errors import ConfigError
from minitrain.inference.generate import Sampling, load_generator
from minitrain.inference.merge import merge_adapters
from minitrain.model.load import load_model, load_tokenizer
from minitrain.model.pretrained import quantization_of, read_model_config
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from minitrain.tools.preflight.validate import validate
from tests.conftest import random_llama
from tests.messages import raises, reports

BLOCK = (48, 20)  # of 64, 32 and 72 rows and columns: some end within a block
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes")


def rewrite(folder, quantization: dict, tensors: dict) -> None:
    """Puts quantized tensors, and what their config says of them, into a model's folder."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def is_matrix(name: str) -> bool:
    return name.endswith("proj.weight")


def as_fp8(folder, block=BLOCK, kind=torch.float8_e4m3fn) -> dict[str, torch.Tensor]:
    """Makes a folder FP8; returns what its weights are, element by element."""
    generator = torch.Generator().manual_seed(0)
    files, truth = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        files[name] = truth[name] = weight
        if not is_matrix(name):
            continue
        rows, columns = weight.shape
        n, m = block or (rows, columns)
        scales = torch.rand(-(-rows // n), -(-columns // m), generator=generator) + 0.5
        scales = scales if block else scales.view(())
        files[name], files[f"{name}_scale_inv"] = weight.to(kind), scales
        truth[name] = torch.tensor(
            [
                [float(files[name][i, j]) * float(scales[i // n, j // m] if block else scales) for j in range(columns)]
                for i in range(rows)
            ]
        )
    files["model.layers.0.self_attn.q_proj.activation_scale"] = torch.ones(())
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and list(block)}
    rewrite(folder, quantization, files)
    return truth


def as_bitsandbytes(folder, bits: int) -> dict[str, torch.Tensor]:
    """Makes a folder one of bitsandbytes; returns what its weights are, as it says before they are written."""
    import bitsandbytes.functional as F

    files, truth = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        files[name] = truth[name] = weight
        if not is_matrix(name):
            continue
        if bits == 4:
            files[name], state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            truth[name] = F.dequantize_4bit(files[name], state)
            files |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        else:
            files[name], scales, _ = F.int8_vectorwise_quant(weight.half())
            truth[name] = files[name].float() * scales[:, None] / 127
            files[f"{name.removesuffix('weight')}SCB"] = scales
            files[f"{name}_format"] = torch.tensor(0, dtype=torch.uint8)
    rewrite(folder, {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}, files)
    return truth


MAKE = {
    "fp8": as_fp8,
    "fp8-whole": lambda folder: as_fp8(folder, None, torch.float8_e5m2),
    "nf4": pytest.param(lambda folder: as_bitsandbytes(folder, 4), marks=needs_bitsandbytes),
    "int8": pytest.param(lambda folder: as_bitsandbytes(folder, 8), marks=needs_bitsandbytes),
}
formats = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@pytest.fixture
def base(tmp_path):
    """A random Llama with 72 rows in its MLP, for blocks that do not divide them."""
    save_model(random_llama(intermediate_size=72), tiny_tokenizer(), tmp_path / "base", torch.float32)
    return tmp_path / "base"


def load(folder, **options):
    config = ModelConfig(name_or_path=str(folder), **options)
    return load_model(config, load_tokenizer(config), 0)


def same(model, truth: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    for name, wanted in truth.items():
        torch.testing.assert_close(state[name].float(), wanted.float(), rtol=1e-6, atol=1e-7)


@formats
def test_what_is_trained_is_what_is_saved(make, base, make_trainer):
    """The weights are what the files stand for, element by element; final/ holds the trained ones and nothing of the
    quantization, and transformers computes with it the loss that was logged."""
    truth = make(base)
    same(load(base), truth)
    options = ("model.policy_dtype=float32", "validation_split=8")
    trainer = make_trainer(f"model.name_or_path={base}", *options)
    trainer.train()
    saved = AutoModelForCausalLM.from_pretrained(trainer.run.final)
    assert "quantization_config" not in saved.config.to_dict()
    trained = trainer.policy.model.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in saved.state_dict().items())
    again = make_trainer(f"model.name_or_path={trainer.run.final}", "exp_name=again", *options)
    assert again.evaluate()["loss"] == pytest.approx(trainer.eval_metrics["loss"], rel=1e-6)


@formats
def test_an_adapter_over_it_can_be_merged(make, base, make_trainer, tmp_path):
    """What `merge` writes are the dequantized weights with the adapter's change, and it answers as the adapter does."""
    truth = make(base)
    trainer = make_trainer(f"model.name_or_path={base}", "lora.rank=2", "lora.target_modules=[q_proj]", "lr=0.1")
    trainer.train()
    merge_adapters([str(trainer.run.final)], tmp_path / "merged", dtype="float32")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, weight in truth.items():
        assert torch.allclose(saved[name], weight.float(), atol=1e-6) != ("q_proj" in name), name
    prompts = [[{"role": "user", "content": text}] for text in ("a", "what is 1 + 1?")]
    answers = [
        load_generator(str(f)).generate(prompts, trainer_sampling()) for f in (trainer.run.final, tmp_path / "merged")
    ]
    assert answers[0] == answers[1]


def trainer_sampling():

    return Sampling(max_new_tokens=8)


METHODS = {"fp8": "fp8", "fp8-whole": "fp8", "nf4": "bitsandbytes", "int8": "bitsandbytes"}


@pytest.mark.parametrize(
    ("make", "method"),
    [
        pytest.param(getattr(make, "values", [make])[0], METHODS[name], marks=getattr(make, "marks", ()))
        for name, make in MAKE.items()
    ],
    ids=MAKE,
)
def test_dequantizing_is_told_with_the_memory_it_takes(make, method, tmp_path, make_trainer, caplog):
    """One line, the same from train and validate; with an adapter the base is in policy_dtype, as a teacher is."""
    base = tmp_path / "wide"
    save_model(random_llama(intermediate_size=1200), tiny_tokenizer(), base, torch.float32)
    n = sum(weight.numel() for weight in load_file(base / "model.safetensors").values())
    make(base)
    told = f"{base}: its {method} weights are dequantized on loading to {{}}, which takes {{:,.1f}} MiB."
    adapter = ["lora.rank=2", "model.policy_dtype=bfloat16"]
    kd = ["loss={name: kd, teacher: " + str(base) + "}"]
    cases = [
        ([f"model.name_or_path={base}"], [("float32", 4)]),
        ([f"model.name_or_path={base}", *adapter], [("bfloat16", 2)]),
        ([f"model.name_or_path={base}", *adapter, *kd], [("bfloat16", 2)] * 2),
    ]
    for options, expected in cases:
        caplog.clear()
        trainer = make_trainer(*options)
        lines = [told.format(dtype, n * size / 2**20) for dtype, size in expected]
        assert caplog.messages == lines
        caplog.clear()
        validate(trainer.config)
        assert caplog.messages == lines
    caplog.clear()
    load_generator(str(base))
    assert len(caplog.messages) == 1


@needs_bitsandbytes
def test_it_can_be_quantized_again(base, make_trainer):
    """With model.quantization the dequantized weights are packed, so that little memory is needed."""
    as_bitsandbytes(base, 4)
    trainer = make_trainer(f"model.name_or_path={base}", "lora.rank=2", "model.quantization=4bit")
    assert type(trainer.policy.model.model.layers[0].mlp.up_proj.weight).__name__ == "Params4bit"
    trainer.train()


def gpt_oss(folder):
    """A GPT-OSS with MXFP4 experts; returns what their weights are, element by element."""
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=32, num_local_experts=2, num_experts_per_tok=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=259, layer_types=["full_attention"],
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    files, truth = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        files[name] = truth[name] = weight
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, rows, columns = weight.shape
        blocks = torch.randint(256, (experts, columns, rows // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, columns, rows // 32), dtype=torch.uint8)
        del files[name]
        files |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        truth[name] = torch.empty(experts, rows, columns)
        for e in range(experts):
            for i in range(rows):
                for j in range(columns):
                    byte = int(blocks[e, j, i // 32, i % 32 // 2])
                    value = E2M1[byte >> 4 if i % 2 else byte & 15]
                    truth[name][e, i, j] = value * 2.0 ** (int(scales[e, j, i // 32]) - 127)
    rewrite(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, files)
    return truth


def test_mxfp4(tmp_path):
    """Experts of GPT-OSS are what their bits say, as transformers reads them too."""
    truth = gpt_oss(tmp_path)
    same(load(tmp_path), truth)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(theirs[name].float(), value.float()) for name, value in truth.items())


def test_mxfp4_trains(tmp_path, make_trainer):
    """What is saved loads as an ordinary model with the logged loss."""
    gpt_oss(tmp_path / "base")
    options = ("model.policy_dtype=float32", "validation_split=8")
    trainer = make_trainer(f"model.name_or_path={tmp_path / 'base'}", *options)
    trainer.train()
    again = make_trainer(f"model.name_or_path={trainer.run.final}", "exp_name=again", *options)
    assert again.evaluate()["loss"] == pytest.approx(trainer.eval_metrics["loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "torchao", "fbgemm_fp8", "of next year", None])
def test_other_quantizations_are_refused(method, base, rows_file, tmp_path, capsys):
    """By train, validate, generate and score alike, with the name of the method, and nothing is written."""
    rewrite(base, {"quant_method": method, "bits": 4}, load_file(base / "model.safetensors"))
    words = ["--overrides", f"model.name_or_path={base}", f"datasets=[{rows_file}]", f"output_dir={tmp_path / 'runs'}"]
    (tmp_path / "a.yml").write_text("n_steps: 1\n")
    for command in (
        ["train", str(tmp_path / "a.yml"), *words],
        ["validate", str(tmp_path / "a.yml"), *words],
        ["generate", str(base), "--prompt", "a"],
        ["score", str(base), "--text", "a"],
    ):
        assert main(command) == 2, command
        assert reports(capsys.readouterr().err, "unsupported-model", repr(method)), command
    assert not (tmp_path / "runs").exists()


def test_parts_of_a_model_are_looked_at(base):
    """A quantization in the config of a part is found as well."""
    found = read_model_config(ModelConfig(name_or_path=str(base)))
    assert quantization_of(found) is None
    found.text_config = read_model_config(ModelConfig(name_or_path=str(base)))
    found.text_config.quantization_config = {"quant_method": "gptq"}
    assert quantization_of(found) == {"quant_method": "gptq"}


@pytest.mark.parametrize(
    ("change", "code", "part"),
    [
        (lambda files, name: files.pop(f"{name}_scale_inv"), "unsupported-model", "torch.float8_e4m3fn"),
        (lambda files, name: files.update({f"{name}_scale_inv": torch.ones(3, 3)}), "mismatch", "[3, 3]"),
        (
            lambda files, name: files.update({name: torch.ones(64, 16, dtype=torch.int8)}),
            "unsupported-model",
            "torch.int8",
        ),
    ],
)
def test_damaged_scales_are_refused(change, code, part, base):
    """A weight without its scales, or with those of another shape, is never read as if it had them."""
    as_fp8(base)
    files, name = load_file(base / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    change(files, name)
    save_file(files, base / "model.safetensors", metadata={"format": "pt"})
    with raises(ConfigError, code, name, part):
        load(base)


def test_files_that_are_no_safetensors_are_refused(base):
    as_fp8(base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with raises(ConfigError, "unsupported-model", "safetensors"):
        load(base)
