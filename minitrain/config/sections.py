"""The sections of a config: an entry of `datasets`, `model`, `lora` and so on."""

from dataclasses import MISSING, dataclass
from typing import Any

from .option import MAX_SEED, option, show_options


@show_options("An entry of `datasets` or `eval_datasets`.")
@dataclass
class DatasetConfig:
    path: str = option(
        MISSING,
        "A .json, .jsonl, .csv, .tsv or .parquet file (.gz behind it is fine), a folder with a data set in "
        "it, or the name of one on the hub (owner/name). Parquet, folders and the hub need the extra `data`.",
    )
    split: str | None = option(None, "Of a data set on the hub or in a folder: which split; train when left out.")
    name: str | None = option(None, "Of such a data set: its configuration, where it has several.")
    revision: str | None = option(None, "Of a data set on the hub: branch, tag or commit.")
    type: str | None = option(None, "The schema of its rows (see docs/data.md); told by their keys when left out.")
    columns: dict[str, str] = option({}, "Which column holds what, e.g. {prompt: query, response: reply}.")
    prompt_template: str | None = option(
        None, "Text of the user's turn, with {prompt} or any column in braces. Prompt/response kinds only."
    )
    response_template: str | None = option(None, "Text of the assistant's turn, with {response} or any column.")
    p_oracle: float = option(1.0, "RAFT rows: share of them that keep the oracle document.", ge=0, le=1)
    n_distractors: int | None = option(
        None, "RAFT rows: so many of their distractors, drawn for each question; all when left out.", ge=0
    )
    seed: int = option(
        0, "Seed of what is drawn in making examples: which RAFT documents, and their order.", ge=0, le=MAX_SEED
    )
    n_examples: int | None = option(None, "Use only the first so many rows.", ge=1)
    weight: float = option(
        1.0, "How often an epoch sees each example: 0.5 is half of them, 2 is twice.", gt=0, le=10_000
    )


@show_options("The section `model`.")
@dataclass
class ModelConfig:
    name_or_path: str = option(
        MISSING, "A folder or hub name of a causal language model, or `tiny`, the embedded model built on the spot."
    )
    tokenizer_name_or_path: str | None = option(None, "Where the tokenizer is; the model's own when left out.")
    revision: str | None = option(None, "Branch, tag or commit on the hub.")
    policy_dtype: str = option(
        "float32", "The dtype of compute (autocast) and of the saved model.", choices=("float32", "bfloat16", "float16")
    )
    master_dtype: str = option(
        "float32",
        "The dtype of the trained parameters. bfloat16 halves their memory, but small updates are rounded away.",
        choices=("float32", "bfloat16"),
    )
    reference_dtype: str | None = option(
        None,
        "The dtype of a reference model's weights; policy_dtype when left out.",
        choices=("float32", "bfloat16", "float16"),
    )
    archive: str | None = option(
        None,
        "Weights to start from, over those of name_or_path: a .safetensors or .pt state dict, or a folder like final/.",
    )
    adapter: str | None = option(None, "An adapter to go on with, in PEFT's format: a folder with adapter_config.json.")
    quantization: str = option(
        "none",
        "Keep the frozen linear layers in 4 bits (NF4, twice quantised) or 8 bits, by bitsandbytes. Needs an adapter.",
        choices=("none", "4bit", "8bit"),
    )
    attn_implementation: str = option(
        "auto",
        "auto: sdpa, or eager for models that have no sdpa.",
        choices=("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"),
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model. Only for models you trust.")


@show_options("The section `lora`.")
@dataclass
class LoRAConfig:
    rank: int = option(0, "Rank of the matrices; 0 trains without LoRA.", ge=0, le=32768)
    alpha: float = option(16.0, "The update is scaled by alpha / rank.", gt=0, le=1e6)
    dropout: float = option(0.0, "Dropout of the matrices' input.", ge=0, lt=1)
    target_modules: Any = option(
        "all-linear", "Names of layers in a list, a regular expression, or all-linear: all but the output layer."
    )
    exclude_modules: list[str] = option([], "Layers that get none although target_modules names them.")
    layers_to_transform: list[int] = option([], "Only in these blocks; all when left out.")
    modules_to_save: list[str] = option([], "Modules that are trained whole, and saved with the adapter.")
    bias: str = option(
        "none", "Which biases are trained: all, or those of the adapted layers.", choices=("none", "all", "lora_only")
    )
    use_rslora: bool = option(False, "Scale by alpha / sqrt(rank) instead (arXiv 2312.03732).")
    use_dora: bool = option(False, "Learn magnitude and direction apart (DoRA, arXiv 2402.09353); slower.")
    init: str = option(
        "default",
        "default or gaussian: the model as it is. pissa or olora: its strongest directions move into the adapter.",
        choices=("default", "gaussian", "pissa", "olora"),
    )
    loraplus_lr_ratio: float = option(
        1.0, "lr of the B matrices as a multiple of lr (LoRA+, arXiv 2402.12354).", gt=0, le=10_000
    )


@show_options("The section `soft_prompt`.")
@dataclass
class SoftPromptConfig:
    num_virtual_tokens: int = option(0, "Trained vectors before every example; 0 trains without.", ge=0, le=32768)
    method: str = option(
        "prompt",
        "prompt: in the place of embeddings. prefix: keys and values in every layer's attention.",
        choices=("prompt", "prefix"),
    )
    init_text: str | None = option(None, "With prompt: start from the embeddings of this text.")
    prefix_projection: bool = option(False, "With prefix: make the keys and values by a small network.")
    encoder_hidden_size: int | None = option(None, "Width of that network; the model's when left out.", ge=1, le=65536)


@show_options("The section `early_stopping`.")
@dataclass
class EarlyStoppingConfig:
    patience: int = option(0, "Stop after so many evaluations without a better `metric`; 0 never stops early.", ge=0)
    threshold: float = option(0.0, "An improvement must be larger than this to count.", ge=0)
    metric: str = option(
        "loss",
        "The eval metric that decides, also for save_best. Less is better for losses, perplexity and kl. For another "
        "than loss and exact_match there is an evaluation before the first step, to see that there is such a metric.",
    )


@show_options("The section `eval_generate`.")
@dataclass
class EvalGenerateConfig:
    n_examples: int = option(
        0, "At each evaluation, answer so many eval prompts and log exact_match.", ge=0, affects_results=False
    )
    max_new_tokens: int = option(64, "Longest answer, in tokens.", ge=1, le=1_000_000, affects_results=False)
    match: str = option(
        "text",
        "What has to be the same as in the reference. text: the whole answer. number: the final number, behind ####, "
        "in \\boxed{} or the last one. Or a regular expression with one group: what that holds in its last match.",
        affects_results=False,
    )
    show: int = option(3, "Print so many of the answers.", ge=0, affects_results=False)


@show_options("The section `fsdp`.")
@dataclass
class FSDPConfig:
    shard: str = option(
        "full",
        "full: parameters, gradients and optimizer are cut over the ranks (ZeRO-3). grad: parameters stay whole from "
        "the forward to the backward pass (ZeRO-2). hybrid: cut inside a machine, repeated across. none: every rank "
        "has all.",
        choices=("full", "grad", "hybrid", "none"),
        affects_results=False,
    )
    cpu_offload: bool = option(
        False, "Keep parameters, gradients and optimizer in the memory of the CPU.", affects_results=False
    )
    timeout_seconds: float = option(
        1800,
        "End the run when nothing has moved for so long, and say which rank is stuck where.",
        gt=0,
        le=1e6,
        affects_results=False,
    )


@show_options("The section `wandb`.")
@dataclass
class WandbConfig:
    enabled: bool = option(
        False, "Log to Weights & Biases (WANDB_MODE=offline works without a network).", affects_results=False
    )
    entity: str | None = option(None, "User or team.", affects_results=False)
    project: str = option("minitrain", "Project.", affects_results=False)


@show_options("The section `swanlab`.")
@dataclass
class SwanlabConfig:
    enabled: bool = option(False, "Log to SwanLab (the package `swanlab` must be installed).", affects_results=False)
    project: str = option("minitrain", "Project.", affects_results=False)
    mode: str = option("cloud", "Where it logs to.", choices=("cloud", "local", "offline"), affects_results=False)
