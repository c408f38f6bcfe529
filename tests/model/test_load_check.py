"""The check of a loaded model: what transformers computes for a document must not depend on its batch."""

import pytest
import torch
import transformers as tf

from minitrain import ConfigError
from minitrain.batch import Document, collate
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.model import attention
from minitrain.model.decoder import find_blocks
from minitrain.model.document_check import check_documents, packed_lengths
from minitrain.model.few_blocks import distinct_blocks, with_few_blocks
from minitrain.model.load import build_policy
from minitrain.model.load_check import check_autocast, check_policy
from minitrain.model.policy import Policy
from minitrain.model.sequence_head import make_policy
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises

pytestmark = pytest.mark.numeric

SHAPE = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
WIDE = SHAPE | dict(intermediate_size=64, head_dim=8, max_position_embeddings=256, pad_token_id=0)
ALTERNATING = dict(use_sliding_window=True, sliding_window=40, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
BART = dict(
    vocab_size=128,
    d_model=32,
    decoder_layers=2,
    decoder_attention_heads=4,
    decoder_ffn_dim=64,
    max_position_embeddings=128,
)
GOOD = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE)),
    "window": lambda: tf.MistralForCausalLM(tf.MistralConfig(**WIDE, sliding_window=40)),
    "two kinds of layers": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**WIDE, **ALTERNATING)),
    "softcap": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**WIDE, sliding_window=40)),
    "experts": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**WIDE, **EXPERTS)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
}
NOT_CAUSAL = {
    "xlnet": lambda: tf.XLNetLMHeadModel(tf.XLNetConfig(vocab_size=128, d_model=32, n_layer=2, n_head=4, d_inner=64)),
    "bert-generation": lambda: tf.BertGenerationDecoder(
        tf.BertGenerationConfig(**SHAPE, intermediate_size=64, bos_token_id=1, eos_token_id=2)
    ),
    "cpmant": lambda: tf.CpmAntForCausalLM(
        tf.CpmAntConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, dim_head=8, dim_ff=64
        )
    ),
}
SPARSE = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
INDEXED = dict(index_n_heads=2, index_head_dim=8, index_topk=8, n_routed_experts=4, n_group=1, topk_group=1)
NOT_PACKED = {
    "positions of the row": lambda: tf.BartForCausalLM(tf.BartConfig(**BART)),
    "dynamic mask": lambda: tf.DogeForCausalLM(tf.DogeConfig(**WIDE, keep_window_size=8)),
    "indexed keys": lambda: tf.DeepseekV32ForCausalLM(
        tf.DeepseekV32Config(**WIDE | {"num_key_value_heads": 4}, **SPARSE, **INDEXED, moe_intermediate_size=16)
    ),
}


def policy_of(model, packing: bool = True, std: float = 0.2) -> Policy:
    """With large random weights, and the attention that packed rows have in training."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=std, generator=generator)
    if packing:
        attention.attend_by_document(model)
    return Policy(model.eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", GOOD)
def test_good_models_pass(kind, packing, dtype):
    policy = policy_of(GOOD[kind]().to(dtype), packing)
    check_policy(policy, packing)
    assert not policy.groups_documents


def test_logits_that_are_cast_to_float32_have_the_rounding_of_bfloat16():
    """Mamba casts the logits that it computes in bfloat16."""
    policy = policy_of(tf.MambaForCausalLM(tf.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)))
    with torch.autocast("cpu", torch.bfloat16):
        check_policy(policy.bfloat16(), packing=False)


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_models_that_are_not_causal_are_refused(kind):
    """Packed or not: logps of earlier tokens would depend on later ones."""
    policy = policy_of(NOT_CAUSAL[kind](), packing=False)
    with raises(ConfigError, "unsupported-model", "model.name_or_path: ", "causal"):
        check_policy(policy, packing=False)


@pytest.mark.parametrize("kind", NOT_PACKED)
def test_models_that_cannot_be_packed_read_groups(kind):
    """Documents do not attend to each other in BART, which counts positions from the row."""
    policy = policy_of(NOT_PACKED[kind]())
    check_policy(policy, packing=True)
    assert policy.groups_documents


@pytest.mark.parametrize("kind", ["window", "two kinds of layers"])
def test_packed_documents_are_longer_than_the_window(kind, monkeypatch):
    """Attention that forgets the window of packed documents is noticed (slime#1686)."""
    policy = policy_of(GOOD[kind]())
    assert min(packed_lengths(policy, torch.device("cpu"))) > 40
    mask = attention._mask
    monkeypatch.setattr(attention, "_mask", lambda window, *rest: mask(None, *rest))
    check_policy(policy, packing=True)
    assert policy.groups_documents


def test_a_choice_of_keys_beyond_its_number_is_noticed(monkeypatch):
    """The keys are chosen in the row instead of the document; no gradient shows the choice."""
    policy = policy_of(GOOD["llama"]())
    policy.model.config.index_topk = 60
    hidden_states = policy.hidden_states

    def chosen(batch):
        states = hidden_states(batch)
        return states * (1 + (torch.arange(states.shape[1]) >= 60))[:, None]  # tokens that have more than 60 before

    monkeypatch.setattr(policy, "hidden_states", chosen)
    with raises(ConfigError, "conflict", "packing: "):
        check_documents(policy, packing=True)  # groups do not help
    policy.model.config.index_topk = 0
    check_documents(policy, packing=True)  # the documents are too short


def test_padding_that_changes_a_document_is_refused(monkeypatch):
    """A model that centers its states over the row would be trained with those of the padding."""
    policy = policy_of(GOOD["llama"](), packing=False)
    hidden_states = policy.hidden_states
    monkeypatch.setattr(policy, "hidden_states", lambda batch: hidden_states(batch) * len(batch.input_ids))
    with raises(ConfigError, "unsupported-model", "model.name_or_path: ", "padding"):
        check_documents(policy, packing=False)


def test_packed_rows_that_cost_too_much_are_shorter():
    """The window of this model is 4,096; a check on the CPU takes less than a second."""
    policy = policy_of(tf.MistralForCausalLM(tf.MistralConfig(**WIDE | {"max_position_embeddings": 1 << 15})))
    lengths = packed_lengths(policy, torch.device("cpu"))
    assert 21 < lengths[1] < lengths[0] < 4096
    policy.model.config.sliding_window = None
    assert packed_lengths(policy, torch.device("cpu")) == (32, 21)


def test_one_block_of_each_kind_is_checked():
    """The layer types of the config follow the blocks."""
    options = WIDE | ALTERNATING | {"num_hidden_layers": 6, "layer_types": ALTERNATING["layer_types"] * 3}
    model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**options))
    policy, seen = policy_of(model), []
    assert distinct_blocks(policy) == [0, 1]
    with_few_blocks(policy, lambda: seen.append((len(find_blocks(model)), len(model.config.layer_types))))
    assert seen == [(2, 2)] and len(find_blocks(model)) == len(model.config.layer_types) == 6


def test_the_error_with_all_blocks_counts():
    """A model without some of its blocks can fail where the full one does not."""
    policy, seen = policy_of(tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE))), []

    def check():
        seen.append(len(find_blocks(policy.model)))
        if len(seen) == 1:
            raise IndexError

    with_few_blocks(policy, check)
    assert seen == [1, 2]


def test_hidden_states_of_zeros_are_equal():
    """A model that is not initialized is not taken for one that is not causal."""
    check_policy(policy_of(GOOD["llama"](), std=0.0), packing=True)


# ------------------------------------------------------------------------------------------------- classifiers

SCORERS = {
    "last token of the row": lambda: tf.XLNetForSequenceClassification(
        tf.XLNetConfig(vocab_size=128, d_model=32, n_layer=2, n_head=4, d_inner=64, pad_token_id=0)
    ),
    "no mask": lambda: tf.FNetForSequenceClassification(
        tf.FNetConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    ),
}
BERT = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def scorer_of(model) -> Policy:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.2, generator=generator)
    return make_policy(model.eval())


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 128, (n,), generator=generator) for n in (19, 3, 7, 3)]
    return [Document(tokens, torch.ones(len(tokens), dtype=torch.uint8)) for tokens in ids]


@pytest.mark.parametrize("kind", SCORERS)
def test_encoders_that_depend_on_padding_compute_each_length_by_itself(kind):
    """Scores are those of each document alone, in the order of the batch."""
    policy = scorer_of(SCORERS[kind]())
    check_policy(policy, packing=False)
    assert not policy.ignores_padding
    padded = policy(collate([[document] for document in documents()], 0)).scores
    alone = [policy.model(input_ids=document.ids[None].long()).logits[0] for document in documents()]
    torch.testing.assert_close(padded, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_encoders_that_ignore_padding_compute_all_lengths_together():
    policy = scorer_of(tf.BertForSequenceClassification(tf.BertConfig(**BERT)))
    check_policy(policy, packing=False)
    assert policy.ignores_padding


def test_a_classifier_that_cannot_be_trained_is_refused():
    """Reformer accepts any length in evaluation, but not in training."""
    sizes = dict(attention_head_size=16, feed_forward_size=64, attn_layers=["local"], axial_pos_shape=[8, 8])
    options = dict(axial_pos_embds_dim=[16, 16], local_attn_chunk_length=8, is_decoder=False)
    config = tf.ReformerConfig(vocab_size=128, hidden_size=32, num_attention_heads=2, **sizes, **options)
    with raises(ConfigError, "unsupported-model", "model.name_or_path: ReformerForSequenceClassification "):
        check_policy(scorer_of(tf.ReformerForSequenceClassification(config)), packing=False)


@pytest.mark.parametrize("kind", ["bart", "t5", "perceiver"])
def test_classifiers_of_other_kinds_are_refused(kind, tmp_path):
    """Those with a decoder beside their encoder, and those without an embedding of tokens."""
    configs = {
        "bart": lambda: tf.BartConfig(**BART),
        "t5": lambda: tf.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        "perceiver": lambda: tf.PerceiverConfig(vocab_size=128, d_model=32, d_latents=32, num_latents=8),
    }
    tf.AutoModelForSequenceClassification.from_config(configs[kind]()).save_pretrained(tmp_path)
    config = Config(model=ModelConfig(str(tmp_path)))
    with raises(ConfigError, "unsupported-model", kind.capitalize() if kind == "perceiver" else kind):
        build_policy(config, tiny_tokenizer(), torch.device("meta"), outputs=["no", "yes"])


def test_a_model_that_bfloat16_breaks_is_refused():
    """Before the first step. DBRX adds experts in bfloat16 to a float32 tensor under autocast."""
    shape = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 64, "max_seq_len": 64, "num_key_value_heads": 2}
    attention_config = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
    experts = {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1}
    model = tf.DbrxForCausalLM(tf.DbrxConfig(**shape, attn_config=attention_config, ffn_config=experts))
    policy = policy_of(model, packing=False)
    check_autocast(policy, torch.autocast("cpu", torch.float32, enabled=False))
    with raises(ConfigError, "unsupported-model", "model.policy_dtype: ", "bfloat16"):
        check_autocast(policy, torch.autocast("cpu", torch.bfloat16))
