"""Packed rows of models that cannot separate documents: recurrent states, convolutions and masks of their own."""

import json
import math

import pytest
import torch
import transformers as tf

from minitrain.batch import Document, collate
from minitrain.model import attention
from minitrain.model.document_check import check_documents
from minitrain.model.policy import Policy
from minitrain.model.recompute import checkpoint_activations
from minitrain.model.tiny import tiny_tokenizer
from minitrain.training.step import Precision
from tests.conftest import metrics
from tests.rows import ROWS

pytestmark = pytest.mark.numeric

SHAPE = dict(vocab_size=259, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
LINEAR = dict(
    head_dim=16,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"],
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
CONFIGS = {
    "mamba": lambda: tf.MambaConfig(**SHAPE, state_size=8),
    "mamba2": lambda: tf.Mamba2Config(**SHAPE, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    "jamba": lambda: tf.JambaConfig(
        **SHAPE, **HEADS, **EXPERTS, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False
    ),
    "bamba": lambda: tf.BambaConfig(**SHAPE, **HEADS, **MAMBA, attn_layer_indices=[1]),
    "granite-hybrid": lambda: tf.GraniteMoeHybridConfig(
        **SHAPE, **HEADS, **MAMBA, num_local_experts=4, layer_types=["linear_attention", "full_attention"]
    ),
    "lfm2": lambda: tf.Lfm2Config(**SHAPE, **HEADS, layer_types=["conv", "full_attention"]),
    "qwen3-next": lambda: tf.Qwen3NextConfig(**SHAPE, **HEADS, **LINEAR, **EXPERTS, moe_intermediate_size=16),
    "qwen3.5": lambda: tf.Qwen3_5TextConfig(**SHAPE, **HEADS, **LINEAR),
    "gpt-oss-sinks": lambda: tf.GptOssConfig(
        **SHAPE,
        **HEADS,
        head_dim=8,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek-index": lambda: tf.DeepseekV32Config(
        **SHAPE, **LATENT, **HEADS | {"num_key_value_heads": 4}, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=16, index_topk=64, index_head_dim=8, index_n_heads=2,
        mlp_layer_types=["dense", "sparse"],
    ),
    "doge-top-k": lambda: tf.DogeConfig(**SHAPE, **HEADS, keep_window_size=8),
    "bloom-no-positions": lambda: tf.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4),
    "bart-own-positions": lambda: tf.BartConfig(
        vocab_size=259, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False, dropout=0.0,
    ),
}  # fmt: skip
LENGTHS = (21, 9, 30, 27, 28, 10)  # chunks and windows have 8 tokens; groups have 3, 1 and 2 documents
PROMPT = 6  # tokens that documents 0 and 1, 2 and 3, and 4 and 5 have in common


def model_of(name: str) -> torch.nn.Module:
    """A model whose parameters are large enough that each module matters."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def policy_of(model: torch.nn.Module) -> Policy:
    policy = Policy(model)
    attention.attend_by_document(model)
    policy.eval()
    check_documents(policy, packing=True)
    policy.train(model.training)
    return policy


def documents(n_shared: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(1)
    # No token twice in a document: which of two equal keys is among the top k of Doge depends on the padding.
    ids = [3 + torch.randperm(256, generator=generator)[:length].int() for length in LENGTHS]
    shared = [0, n_shared] * 3
    for own, before, n in zip(ids[1::2], ids[::2], shared[1::2], strict=True):
        own[:n] = before[:n]
    masks = [(torch.arange(length) >= max(1, n_shared)).to(torch.uint8) for length in LENGTHS]
    return [Document(*parts) for parts in zip(ids, masks, shared, strict=True)]


def alone(model: torch.nn.Module, docs: list[Document]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logps and gradients of transformers, each document by itself."""
    logps = []
    for doc in docs:
        ids = doc.ids.long()
        scores = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        logps.append(scores.gather(1, ids[1:, None])[doc.mask[1:].bool(), 0])
    logps = torch.cat(logps)
    return logps.detach(), gradients(model, -logps.sum())


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(policy: Policy, rows: list[list[Document]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logps = policy(collate(rows, 0)).logps
    return logps.detach(), gradients(policy.model, -logps.sum())


def assert_equal(found, wanted) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == wanted[1].keys()
    total = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in wanted[1].values()))
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).norm()) <= 1e-3 * max(float(gradient.norm()), 1e-3 * total), name


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_are_documents_alone(name):
    """In one row, in two, with shared prompts and with activation checkpointing: transformers' logps and gradients."""
    model = model_of(name)
    docs, sharing = documents(), documents(PROMPT)
    wanted, wanted_sharing = alone(model, docs), alone(model, sharing)
    policy = policy_of(model)
    assert policy.groups_documents
    assert_equal(packed(policy, [docs]), wanted)
    assert_equal(packed(policy, [docs[:1], docs[1:]]), wanted)
    assert_equal(packed(policy, [sharing]), wanted_sharing)
    checkpoint_activations(model)
    assert_equal(packed(policy, [docs]), wanted)


@pytest.mark.parametrize("name", ["mamba2", "jamba", "lfm2", "qwen3.5", "gpt-oss-sinks"])
def test_packed_rows_in_bfloat16(name):
    """Finite, and near the logps in float32."""
    model, docs = model_of(name), documents()
    wanted, _ = alone(model, docs)
    with Precision(torch.bfloat16, torch.device("cpu")).autocast():
        logps, grads = packed(policy_of(model), [docs])
    assert abs(float(logps.mean() - wanted.mean())) < 0.05
    assert all(gradient.isfinite().all() for gradient in grads.values())


def test_a_model_that_separates_documents_reads_rows():
    """Attention by document is faster, so it is kept where it is exact."""
    shape = SHAPE | HEADS
    for config in (tf.LlamaConfig(**shape), tf.MistralConfig(**shape, sliding_window=8), tf.Qwen3Config(**shape)):
        assert not policy_of(tf.AutoModelForCausalLM.from_config(config)).groups_documents


def test_attention_in_chunks_is_not_attention_by_document():
    """No document of the check is as long as a chunk of a real model."""
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SHAPE, **HEADS))
    model.config.attention_chunk_size = 8192
    assert policy_of(model).groups_documents


def test_groups_have_little_padding():
    """Documents of similar length, and the shortest where their padding is small, share a call."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(60, generator=generator) ** 3 * 2000 + 10).long().tolist()
    stops = torch.tensor(lengths).cumsum(0)
    spans = torch.stack([torch.zeros_like(stops), stops - torch.tensor(lengths), stops], 1)
    groups, _ = attention.group_documents(spans, 1, sum(lengths), torch.device("cpu"))
    assert sum(len(group.positions) for group in groups) == 60 and len(groups) <= 12
    assert sum(group.positions.numel() for group in groups) < 1.15 * sum(lengths)
    assert sum(len(group.valid) for group in groups) == sum(lengths)


def test_batches_without_documents():
    """A batch of padding only, which a rank without examples has, and batch rows of one document."""
    policy = policy_of(model_of("mamba2"))
    assert policy(collate([], 0)).logps.shape == (0,)
    docs = documents()
    wanted = alone(policy.model, docs)
    assert_equal(packed(policy, [[doc] for doc in docs]), wanted)


def test_other_ranks_with_more_groups():
    """Additional calls change nothing, and take part in the backward pass."""
    policy, docs = policy_of(model_of("mamba2")), documents()
    wanted = alone(policy.model, docs)
    calls = []
    policy.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    policy.max_over_ranks = lambda n: n + 2.0
    assert_equal(packed(policy, [docs]), wanted)
    assert len(calls) == 3 + 2


@pytest.fixture
def hybrid_folder(tmp_path) -> str:
    """Mamba 2 as a folder that `from_pretrained` reads."""
    model_of("mamba2").save_pretrained(tmp_path / "hybrid")
    tiny_tokenizer().save_pretrained(tmp_path / "hybrid")
    return str(tmp_path / "hybrid")


PREFIX = "soft_prompt={num_virtual_tokens: 4, method: prefix}"


@pytest.mark.parametrize("options", [("model.name_or_path=HYBRID",), ("soft_prompt.num_virtual_tokens=4",), (PREFIX,)])
def test_packed_steps_are_padded_ones(make_trainer, hybrid_folder, options):
    """SFT of a hybrid from its files, and soft prompts, of which each document has its own."""
    losses, options = [], [option.replace("HYBRID", hybrid_folder) for option in options]
    for packing in ("true", "false"):
        trainer = make_trainer(*options, f"packing={packing}", f"exp_name=run-{packing}")
        trainer.train()
        losses.append([row["loss"] for row in metrics(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_reference_model_groups_documents_too(make_trainer, hybrid_folder, tmp_path):
    """Before the first step the policy is the reference, so DPO's loss is ln 2 with shared prompts."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS["preference"]))
    trainer = make_trainer(
        f"model.name_or_path={hybrid_folder}", f"datasets=[{file}]", "loss.name=dpo", "loss.reference=model",
        "packing=true", "n_steps=1",
    )  # fmt: skip
    trainer.train()
    assert metrics(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
