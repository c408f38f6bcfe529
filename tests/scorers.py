"""Random models of several kinds as folders, each with a made-up tokenizer that does what real ones of its kind do."""

from pathlib import Path

import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=96,
    initializer_range=0.3,
)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3)
DISTIL = dict(dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=96, initializer_range=0.3)


def tokenizer(special: dict[str, str], single: str | None = None, pair: str | None = None):
    """One token a byte behind the special ones; `single` and `pair` say where these are put."""
    tokens = list(dict.fromkeys(special.values()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate((*tokens, *alphabet))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if single:
        pairs = [(token, vocabulary[token]) for token in tokens]
        made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=pairs)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if pair and ":1" in pair else [])]
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **special)


BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
ROBERTA = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>"}
ROBERTA |= {"sep_token": "</s>", "mask_token": "<mask>"}
LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}  # no pad token
END = "<|endoftext|>"
TOKENIZERS = {
    "bert": lambda: tokenizer(BERT, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "distilbert": lambda: tokenizer(BERT, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"),
    "roberta": lambda: tokenizer(ROBERTA, "<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "gpt2": lambda: tokenizer({"bos_token": END, "eos_token": END, "unk_token": END}),
    "llama": lambda: tokenizer(LLAMA, "<s> $A", "<s> $A <s> $B"),
    "qwen2": lambda: tokenizer({"pad_token": END, "eos_token": END}),  # its pad token is its EOS
}
BASES = {
    "bert": lambda n: tf.BertForMaskedLM(tf.BertConfig(vocab_size=n, **SHAPE)),
    "distilbert": lambda n: tf.DistilBertForMaskedLM(tf.DistilBertConfig(vocab_size=n, **DISTIL)),
    "roberta": lambda n: tf.RobertaForMaskedLM(
        tf.RobertaConfig(vocab_size=n, type_vocab_size=1, pad_token_id=1, **SHAPE)
    ),
    "gpt2": lambda n: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=n, bos_token_id=0, eos_token_id=0, **GPT2)),
    "llama": lambda n: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=n, **SHAPE)),
    "qwen2": lambda n: tf.Qwen2ForCausalLM(
        tf.Qwen2Config(vocab_size=n, num_key_value_heads=2, tie_word_embeddings=True, **SHAPE)
    ),
}
ENCODERS, DECODERS = ("bert", "distilbert", "roberta"), ("gpt2", "llama", "qwen2")


def random_base(kind: str, folder: Path, words=None) -> Path:
    """A model that was only pre-trained, with weights large enough to matter; `words` is another tokenizer for it."""
    words = words or TOKENIZERS[kind]()
    torch.manual_seed(0)
    model = BASES[kind](len(words))
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
