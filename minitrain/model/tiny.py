"""The built-in default: a byte-level tokenizer and a small Llama with random weights."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte, which can encode any string, and the special tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(seed: int, vocab_size: int, eos_token_id: int, pad_token_id: int, **changes) -> LlamaForCausalLM:
    """Return a Llama of about 100,000 parameters; `seed` determines its weights, `changes` override its config."""
    shape = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    config = LlamaConfig(
        vocab_size=vocab_size,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        **(shape | changes),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_scorer(model: LlamaForCausalLM, n_outputs: int, seed: int) -> LlamaForSequenceClassification:
    """Return the model with a new scalar head of `n_outputs` labels instead of its LM head."""
    model.config.num_labels = n_outputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = LlamaForSequenceClassification(model.config)
    scorer.model = model.model
    return scorer
