"""Every option once: its name, type, default, limits and explanation.

These dataclasses are the only place where a default lives. `minitrain/config/load.py` reads a YAML file into
them and `docs/options.md` is generated from them.
"""

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from .option import option, show_options
from .schedules import DECAY_RATIO, SCHEDULES

MAX_NUMBER = 1_000_000_000  # of an option that names no bound: more is a slip, and overflows somewhere
MIN_FRACTION = 1e-30  # a number that is closer to 0 is 0 in float32, or its inverse overflows
MAX_SEED = 2**63 - 1  # what torch takes
DEFAULT_LOSS = {"name": "sft"}


class Written(NamedTuple):
    """What the user wrote before `${...}` was resolved, and the values that it was resolved to."""

    raw: dict
    resolved: dict


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


@show_options("All options of a run. `load_config` makes one from a file or a dict, and checks it.")
@dataclass
class Config:
    # run
    exp_name: str | None = option(
        None, "Name of the run directory; the name of the YAML file when left out.", affects_results=False
    )
    output_dir: str = option("runs", "Where run directories are made.", affects_results=False)
    seed: int = option(0, "Seed of the order of data, of dropout and of new weights.", ge=0, le=MAX_SEED)
    device: str = option(
        "auto", "auto takes a GPU if there is one.", choices=("auto", "cpu", "cuda", "mps"), affects_results=False
    )
    trainer: str = option(
        "BasicTrainer",
        "BasicTrainer trains on one device, FSDPTrainer on as many as torchrun starts it on.",
        choices=("BasicTrainer", "FSDPTrainer"),
        affects_results=False,
    )
    fsdp: FSDPConfig = option(FSDPConfig, "How FSDPTrainer cuts the model up.")
    quiet: bool = option(
        False, "No progress bars, and of the lines on the console only warnings.", affects_results=False
    )
    debug: bool = option(
        False, "Find the operation that makes a NaN (slow), and send nothing to trackers.", affects_results=False
    )

    # data
    datasets: list[DatasetConfig] = option([], "Training files; a plain path stands for {path: ...}.")
    eval_datasets: list[DatasetConfig] = option([], "Evaluation files.", affects_results=False)
    validation_split: float = option(
        0.0, "Hold out this share of the training examples for evaluation (1 or more: so many examples).", ge=0
    )
    chat_template: str = option(
        "auto",
        "auto: the tokenizer's own, else ChatML. chatml: ChatML. none: the texts as they are, the answer ended by "
        "EOS. Or the path of a .jinja file.",
    )
    train_on: str = option("all_turns", "Which turns of the assistant are learned.", choices=("all_turns", "last_turn"))
    max_length: int = option(1024, "Longest example in tokens.", ge=2)
    max_prompt_length: int | None = option(
        None, "Longest prompt: of a longer one the oldest tokens go, from both sides of a preference alike.", ge=1
    )
    truncation: str = option(
        "prompt",
        "What a longer example loses: the oldest of its prompt, its end, or (drop) the example is left out.",
        choices=("prompt", "end", "drop"),
    )
    mask_truncated: bool = option(
        False,
        "policy, value: do not train on rollouts whose sampling was cut off before an end token. Their rewards still "
        "count in the means of their groups, as those of rollouts longer than max_length always do.",
    )
    packing: bool = option(False, "Several examples in a row, so that padding is not computed. Same numbers, faster.")
    group_by_length: bool = option(False, "Batches of examples of like length, so that there is less padding.")
    on_bad_row: str = option("error", "What a row that cannot be used does.", choices=("error", "skip"))
    max_bad_rows: int = option(100, "With on_bad_row: skip, stop after so many bad rows in a file.", ge=0)
    num_proc: int | None = option(
        None, "Processes that tokenise; all cores when left out.", ge=1, le=1024, affects_results=False
    )
    cache_dir: str | None = option(
        None,
        "Where token ids are kept; $XDG_CACHE_HOME/minitrain or ~/.cache/minitrain when left out.",
        affects_results=False,
    )

    # model and loss
    model: ModelConfig = option(ModelConfig, "The model.")
    lora: LoRAConfig = option(LoRAConfig, "Small trained matrices beside the frozen model.")
    soft_prompt: SoftPromptConfig = option(SoftPromptConfig, "Prompt or prefix tuning beside the frozen model.")
    freeze_layers: list[Any] = option([], "Blocks that are not trained: numbers, ranges like 0-5, or `embeddings`.")
    loss: dict[str, Any] = option(DEFAULT_LOSS, "name: which loss; beside it its own options (see docs/losses.md).")

    # optimisation
    total_batch_size: int = option(
        32, "Examples of one optimizer step, over all micro-batches and devices.", ge=1, alias="batch_size"
    )
    gradient_accumulation_steps: int = option(
        1, "Micro-batches that each device's share of an optimizer step is cut into.", ge=1, affects_results=False
    )
    n_epochs: float = option(1.0, "Passes over the data.", gt=0, le=1e6, affects_results=False)
    n_steps: int | None = option(
        None, "Optimizer steps, in place of n_epochs; give one of them.", ge=1, affects_results=False
    )
    optimizer: str = option("AdamW", "Any optimizer of torch.optim by name.")
    optimizer_args: dict[str, Any] = option({}, "More arguments of the optimizer, e.g. {momentum: 0.9} for SGD.")
    lr: float = option(2e-5, "Peak learning rate.", ge=0, le=1000)
    weight_decay: float = option(0.0, "Decay of weight matrices; norms and biases are never decayed.", ge=0, le=1000)
    betas: list[float] = option([0.9, 0.999], "Adam's two decay rates.")
    eps: float = option(1e-8, "Adam's epsilon.", gt=0, le=1)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 does not clip.", ge=0)
    lr_scheduler: str = option(
        "linear",
        "How lr goes on after the warm-up. "
        + ". ".join(f"{name}: {one.help}" for name, one in SCHEDULES.items())
        + ".",
        choices=tuple(SCHEDULES),
    )
    lr_decay_ratio: float | None = option(
        None, f"wsd: share of all steps in which lr falls; {DECAY_RATIO} when left out.", gt=0, le=1
    )
    warmup_steps: int = option(0, "Steps in which lr rises from 0 to its peak.", ge=0)
    warmup_ratio: float = option(0.0, "The same as a share of all steps.", ge=0, le=1)
    activation_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, slower.")
    compile: bool = option(False, "Compile each block of the model with torch.compile.")
    max_bad_steps: int = option(10, "Give up after so many steps in a row with a non-finite gradient.", ge=1)

    # evaluation
    do_first_eval: bool = option(True, "Evaluate before the first step.", affects_results=False)
    eval_every_steps: int = option(0, "Evaluate every so many steps, besides the end; 0: only at the end.", ge=0)
    n_eval_examples: int | None = option(None, "Evaluate on the first so many; all when left out.", ge=1)
    eval_batch_size: int = option(16, "Examples in one forward pass of the evaluation.", ge=1, affects_results=False)
    eval_generate: EvalGenerateConfig = option(EvalGenerateConfig, "Answers generated at each evaluation.")
    early_stopping: EarlyStoppingConfig = option(EarlyStoppingConfig, "Stop when evaluation no longer improves.")

    # saving
    save_every_steps: int | None = option(
        None,
        "Write a checkpoint to resume from every so many steps and at the end; 0: none. When left out, about once a "
        "minute, or less often if that would take more than 2 % of the time.",
        ge=0,
        affects_results=False,
    )
    keep_checkpoints: int = option(2, "Keep the newest so many checkpoints.", ge=1, affects_results=False)
    save_models_every_steps: int = option(
        0,
        "Write the model as final/ is, into models/step-N, every so many steps; 0: none.",
        ge=0,
        affects_results=False,
    )
    keep_models: int | None = option(
        None, "Keep the newest so many of them; all when left out.", ge=1, affects_results=False
    )
    save_async: bool = option(
        False, "Write checkpoints while training goes on; takes memory for a copy.", affects_results=False
    )
    save_best: bool = option(
        False, "Keep the model with the best early_stopping.metric in best/.", affects_results=False
    )
    resume: str = option(
        "auto",
        "auto: go on from the newest checkpoint of the run directory. never: refuse a folder that holds a run. "
        "Or the path of a checkpoint.",
        affects_results=False,
    )
    allow_changes: list[str] = option(
        [],
        "Options that may differ from those of the run that is resumed, e.g. [lr, datasets, model].",
        affects_results=False,
    )

    # tracking
    log_every_steps: int = option(
        10, "A line on the console and in metrics.jsonl every so many steps.", ge=1, affects_results=False
    )
    ledger: bool = option(
        True,
        "Note each step's loss, gradient norm and a hash of its tokens, for `minitrain compare`.",
        affects_results=False,
    )
    wandb: WandbConfig = option(WandbConfig, "Weights & Biases.")
    report_to_tensorboard: bool = option(
        False, "Write TensorBoard files into the run directory.", affects_results=False
    )
    swanlab: SwanlabConfig = option(SwanlabConfig, "SwanLab.")

    # Not an option. `dataclasses.replace` keeps it, so that a copy saves `${...}` unresolved, too.
    written: Written = field(default=Written({}, {}), repr=False, compare=False, metadata={"internal": True})


def option_fields(schema: Any) -> list[Field]:
    """Return the fields of a dataclass, or of an instance of one, that are options."""
    return [f for f in fields(schema) if not f.metadata.get("internal")]


def aliases(schema: type = Config) -> dict[str, str]:
    """Return the other names of the options of a dataclass -> their names."""
    return {alias: f.name for f in option_fields(schema) for alias in f.metadata.get("aliases", ())}


def all_keys(schema: type = Config, path: str = "") -> Iterator[str]:
    """Every key, ``a`` and ``a.b``."""
    hints = get_type_hints(schema)
    for f in option_fields(schema):
        yield f"{path}{f.name}"
        if is_dataclass(hint := hints[f.name]):
            yield from all_keys(hint, f"{path}{f.name}.")
