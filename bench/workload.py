"""The same model and the same data for every peer, built from a seed."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<unk>")
SEED = 0


@dataclass
class Setting:
    """One line of the comparison: sizes of model and batch, dtype, and how long to measure."""

    vocab: int
    dtype: str
    steps: int  # timed ones
    batch: int
    hidden: int = 256
    intermediate: int = 704
    layers: int = 4
    max_length: int = 512
    median_length: int = 100
    warmup: int = 2
    lr: float = 5e-4
    lora: int = 0  # rank; 0 trains all weights
    experts: int = 0  # of a Mixtral, two for each token; 0 is a Llama

    @property
    def name(self) -> str:
        return f"{self.vocab:,} tokens, {self.dtype}" + (f", LoRA of rank {self.lora}" if self.lora else "")

    @property
    def n_examples(self) -> int:
        return self.batch * (self.steps + self.warmup)


def build(setting: Setting, folder: Path) -> None:
    """Writes model/, data.jsonl (texts, for minitrain) and tokens.json (the same as ids, in minitrain's order)."""
    from minitrain.data.sampler import epoch_order

    folder.mkdir(parents=True)
    build_tokenizer(setting).save_pretrained(folder / "model")
    build_model(setting).save_pretrained(folder / "model")
    if setting.lora:
        build_adapter(setting, folder)
    rows = make_rows(setting)
    with open(folder / "data.jsonl", "w") as file:
        for prompt, answer in rows:
            texts = {"prompt": _words(prompt) + " ", "response": _words(answer)}
            file.write(json.dumps(texts) + "\n")
    eos = SPECIAL.index("<eos>")
    ordered = [rows[i] for i in epoch_order([len(rows)], [1.0], SEED, 0)]
    tokens = [{"ids": [*p, *a, eos], "n_prompt": len(p)} for p, a in ordered]
    (folder / "tokens.json").write_text(json.dumps(tokens))


def build_tokenizer(setting: Setting) -> PreTrainedTokenizerFast:
    """One token a word, w3 being the token 3, so that texts and ids are known from one another."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), setting.vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=1 << 20
    )


def build_model(setting: Setting) -> LlamaForCausalLM | MixtralForCausalLM:
    shape = dict(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=max(4, setting.hidden // 64),
        num_key_value_heads=max(4, setting.hidden // 64),
        max_position_embeddings=2 * setting.max_length,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<eos>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )
    torch.manual_seed(SEED)
    if setting.experts:
        return MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=setting.experts, num_experts_per_tok=2))
    return LlamaForCausalLM(LlamaConfig(**shape))


def build_adapter(setting: Setting, folder: Path) -> None:
    """adapter/, which all peers start from: on every linear layer but the output layer, B zero."""
    from minitrain.config.schema import Config
    from minitrain.config.sections import LoRAConfig, ModelConfig
    from minitrain.model.adapter_files import adapt_model, save_adapter
    from minitrain.model.weights import full_tensors

    model = build_model(setting)
    model.new_ids = []
    config = Config(
        model=ModelConfig(str(folder / "model")), lora=LoRAConfig(rank=setting.lora, alpha=2 * setting.lora)
    )
    model.adapter = adapt_model(config, model, None, None)
    (folder / "adapter").mkdir()
    save_adapter(model, model.adapter, full_tensors(model, lambda tensor: tensor), folder / "adapter")


def make_rows(setting: Setting) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) ids: lognormal lengths, answers of about half, frequent and rare words as in language."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    lengths = generator.lognormal(np.log(setting.median_length), 0.7, setting.n_examples)
    lengths = lengths.clip(16, setting.max_length).astype(int)
    ranks = np.arange(setting.vocab - len(SPECIAL))
    chances = 1 / (ranks + 10.0)
    ids = generator.choice(ranks, int(lengths.sum()), p=chances / chances.sum()) + len(SPECIAL)
    rows = []
    for document in np.split(ids, np.cumsum(lengths)[:-1]):
        n_prompt = int(len(document) * generator.uniform(0.3, 0.7))
        rows.append((document[:n_prompt].tolist(), document[n_prompt:-1].tolist()))  # the last one is EOS
    return rows


def step_sizes(setting: Setting, folder: Path) -> list[dict[str, int]]:
    """What each step has to process, padding aside: tokens, supervised tokens, sum of squared lengths."""
    rows = json.loads((folder / "tokens.json").read_text())
    steps = [rows[i : i + setting.batch] for i in range(0, len(rows), setting.batch)]
    return [
        {
            "tokens": sum(len(row["ids"]) for row in step),
            "supervised": sum(len(row["ids"]) - row["n_prompt"] for row in step),
            "squares": sum(len(row["ids"]) ** 2 for row in step),
        }
        for step in steps
    ]


def flops(setting: Setting, size: dict[str, int]) -> dict[str, float]:
    """FLOPs that one step cannot do without: 6 for each weight and token (forward and backward), 4 if it is frozen."""
    each = 4.0 if setting.lora else 6.0
    body = setting.layers * (4 * setting.hidden**2 + 3 * setting.hidden * setting.intermediate)
    return {
        "body": each * body * size["tokens"],
        "head": each * setting.hidden * setting.vocab * size["supervised"],
        "attention": 6.0 * setting.layers * setting.hidden * size["squares"],  # causal: half of the square
    }


def _words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def pick_settings(quick: bool, only: str = "", lora: int = 0) -> list[Setting]:
    """Small and large vocabulary, float32 and bfloat16; larger models on a GPU. Quick: one dtype, few steps."""
    steps = {(8_192, "float32"): 10, (8_192, "bfloat16"): 4, (128_256, "float32"): 6, (128_256, "bfloat16"): 3}
    size, quick_dtype = dict(batch=8, warmup=1), "float32"
    if torch.cuda.is_available():
        steps, quick_dtype = dict.fromkeys(steps, 20), "bfloat16"
        size = dict(batch=32, hidden=1024, intermediate=2816, layers=12, max_length=1024, median_length=250, warmup=4)
    if quick:
        steps = {key: max(2, n // 3) for key, n in steps.items() if key[1] == quick_dtype}
    settings = [Setting(vocab, dtype, steps=n, lora=lora, **size) for (vocab, dtype), n in steps.items()]
    return pick({setting.name: setting for setting in settings}, only)


def pick(named: dict[str, Any], only: str) -> list:
    """Return what has `only` in its name. Ends the command if nothing has."""
    picked = [each for name, each in named.items() if only in name]
    if not picked:
        sys.exit(f"--only {only}: expected a part of one of these: {'; '.join(named)}")
    return picked
