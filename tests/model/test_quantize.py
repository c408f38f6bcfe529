"""Weights in 4 and 8 bits: what they unpack to, that nothing repacks them, and what is computed with them."""

import copy

import pytest
import torch
import transformers as tf

from minitrain.inference.generate import Sampling
from minitrain.model.quantize import QuantizedLinear, dequantize_model, dequantized, is_quantized, quantize_model
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import random_llama
from tests.tensors import close

pytestmark = pytest.mark.numeric

bnb = pytest.importorskip("bitsandbytes")

BITS = pytest.mark.parametrize("bits", ["4bit", "8bit"])
# Widths that are multiples of 16, 32 and 64, of none of them, and odd: kernels differ between these.
SHAPES = [(5, 16), (7, 48), (64, 96), (33, 288), (32, 64), (64, 172), (172, 64), (3, 33), (1, 1)]


def packed(rows: int, columns: int, bits: str) -> tuple[torch.Tensor, QuantizedLinear]:
    """A weight [rows, columns] and its layer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows))
    model.get_output_embeddings = lambda: torch.nn.Identity()
    weight = model[0].weight.detach().clone()
    quantize_model(model, bits, torch.float32, torch.device("cpu"))
    return weight, model[0]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A Llama with biases, whose widths are no multiples of 64."""
    folder = tmp_path_factory.mktemp("biased")
    model = random_llama(hidden_size=96, intermediate_size=172, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    save_model(model, tiny_tokenizer(), folder, torch.float32)
    return folder


def quantized_layers(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if is_quantized(getattr(module, "weight", None))}


def held(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of the tensors that a packed weight consists of."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        return [weight.detach().clone(), weight.SCB.clone()]
    state = weight.quant_state
    tensors = weight.detach(), state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_four_bits_are_codes_times_the_scales_of_64_weights(rows, columns):
    """Code by code in float64, the scales of blocks that run on over the ends of rows."""
    weight, layer = packed(rows, columns, "4bit")
    state = layer.weight.quant_state
    scales = (
        state.state2.code[state.absmax.long()].double()
        * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
        + state.offset.double()
    )  # [blocks]
    codes = torch.stack([layer.weight.data[:, 0] >> 4, layer.weight.data[:, 0] & 15], 1).view(-1)[: rows * columns]
    want = state.code.double()[codes.long()] * scales.repeat_interleave(64)[: rows * columns]
    torch.testing.assert_close(dequantized(layer).double().view(-1), want, rtol=1e-6, atol=1e-7)
    largest = torch.nn.functional.pad(weight.view(-1), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)  # [blocks]
    error = (dequantized(layer) - weight).view(-1).abs()
    assert (error <= 0.17 * largest.repeat_interleave(64)[: len(error)] + 1e-6).all()  # half of NF4's widest gap: 0.152


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_eight_bits_are_integers_times_the_scale_of_their_row(rows, columns):
    """Off by no more than half a step of the row."""
    weight, layer = packed(rows, columns, "8bit")
    steps = weight.abs().amax(1, keepdim=True) / 127  # [rows, 1]
    assert ((dequantized(layer) - weight).abs() <= 0.5 * steps + 1e-3 * weight.abs()).all()  # scales come from float16


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_unpacked_weight(bits, dtype):
    """In training and in evaluation, with and without gradients; with the bias, which gets one, too."""
    _, layer = packed(33, 48, bits)
    layer.dtype = dtype
    weight = dequantized(layer).double()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for training in (True, False):
        layer.train(training)
        x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        want = x.detach().double() @ weight.T + layer.bias.detach().double()
        close(y.double(), want, tolerance)
        with torch.no_grad():
            close(layer(x).double(), want, tolerance)
        layer.bias.grad = None
        y.pow(2).sum().backward()
        close(x.grad.double(), 2 * want @ weight, 30 * tolerance)
        close(layer.bias.grad.double(), 2 * want.sum((0, 1)), 30 * tolerance)


@BITS
@pytest.mark.parametrize("options", [("lora.bias=all",), ("lora.use_dora=true",), ("lora.dropout=0.1",)])
@pytest.mark.parametrize("capable", [True, False])
def test_a_packed_weight_stays_as_it_was_made(make_trainer, rows_file, biased, monkeypatch, bits, options, capable):
    """Through training, evaluation, generation and saving, whatever bitsandbytes knows of the processor.

    On CPUs with AVX512-BF16 its own layer repacks weights in eval mode, which crashes for these widths.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: capable, raising=False)
    trainer = make_trainer(
        f"model.name_or_path={biased}",
        f"model.quantization={bits}",
        "model.policy_dtype=bfloat16",
        "lora.rank=2",
        f"eval_datasets=[{rows_file}]",
        *options,
    )
    layers = quantized_layers(trainer.policy.model)
    assert len(layers) == 14
    before = copy.deepcopy({name: held(layer) for name, layer in layers.items()})
    trained = [p for p in trainer.policy.parameters() if p.requires_grad]
    trainer.train()
    trainer.generator.generate_from_ids([[5, 6, 7]], Sampling(max_new_tokens=3))
    for name, layer in layers.items():
        for old, new in zip(before[name], held(layer), strict=True):
            assert torch.equal(old, new), name
    assert all(p.dtype == torch.float32 for p in trained)


@BITS
def test_a_weight_that_another_module_reads_is_not_packed(bits):
    """Mamba's mixer multiplies by `self.dt_proj.weight`, which would be bytes."""
    config = tf.MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=1, use_mambapy=False)
    model = tf.MambaForCausalLM(config).eval()
    model.heads = None
    quantize_model(model, bits, torch.float32, torch.device("cpu"))
    assert list(quantized_layers(model)) == ["backbone.layers.0.mixer.in_proj"]
    ids = torch.arange(3, 23)[None]
    packed_logits = model(input_ids=ids, use_cache=False).logits
    dequantize_model(model)
    close(packed_logits, model(input_ids=ids, use_cache=False).logits, 1e-4)
