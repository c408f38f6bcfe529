"""The options of a run: `Config`, with its sections in `sections.py`.

These dataclasses alone define the defaults. `load.py` reads a YAML file into them, and `docs/options.md` is generated
from them.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from minitrain.errors import ConfigError

from .option import MAX_SEED, option, show_options
from .schedules import DECAY_RATIO, SCHEDULES
from .sections import (
    DatasetConfig,
    EarlyStoppingConfig,
    EvalGenerateConfig,
    FSDPConfig,
    LoRAConfig,
    MLflowConfig,
    ModelConfig,
    RolloutConfig,
    SoftPromptConfig,
    SwanlabConfig,
    TrackioConfig,
    WandbConfig,
)

DEFAULT_LOSS = {"name": "sft"}
LISTS = ("datasets", "eval_datasets", "retention_datasets")  # one entry is short for a list of one


def _missing_model() -> ModelConfig:
    raise ConfigError(
        'model: is required. Give Config(model=ModelConfig("NAME")), a folder or Hub name.', "missing-option"
    )


class Interpolation(NamedTuple):
    """A config before and after `${...}` is resolved."""

    raw: dict
    resolved: dict


@show_options("All options of a run. `load_config` makes one from a file or a dict, and checks it.")
@dataclass
class Config:
    # run
    exp_name: str | None = option(
        None, "Name of the run directory (default: the name of the YAML file).", affects_results=False
    )
    output_dir: str = option("runs", "Folder of the run directories.", affects_results=False)
    seed: int = option(
        0, "Seed of the order of the examples, of dropout and of newly initialized weights.", ge=0, le=MAX_SEED
    )
    device: str = option(
        "auto",
        "auto: a GPU if there is one, else the CPU.",
        choices=("auto", "cpu", "cuda", "mps"),
        affects_results=False,
    )
    trainer: str = option(
        "BasicTrainer",
        "BasicTrainer: one device. FSDPTrainer: all processes that torchrun starts.",
        choices=("BasicTrainer", "FSDPTrainer"),
        affects_results=False,
    )
    fsdp: FSDPConfig = option(FSDPConfig, "How FSDPTrainer shards the model.")
    quiet: bool = option(False, "Print only warnings and errors, and no progress bars.", affects_results=False)
    debug: bool = option(
        False, "Report the operation that makes a NaN (slow), and log nothing to trackers.", affects_results=False
    )

    # data
    datasets: list[DatasetConfig] = option([], "Training data; a path alone is short for {path: ...}.")
    eval_datasets: list[DatasetConfig] = option([], "Evaluation data.", affects_results=False)
    retention_datasets: list[DatasetConfig] = option(
        [],
        "Conversations or text on which the model should stay as good as it was. Each evaluation has their loss as "
        "retention/loss, whatever the loss of the training, so that forgetting shows.",
        affects_results=False,
    )
    validation_split: float = option(
        0.0,
        "Fraction of the training examples to hold out for evaluation; 1 or more is a number of examples.",
        ge=0,
    )
    chat_template: str = option(
        "auto",
        "auto: that of the tokenizer, else ChatML. chatml: ChatML. none: plain text, with EOS after the response. Or "
        "the path of a .jinja file.",
    )
    chat_template_kwargs: dict[str, Any] = option(
        {},
        "Arguments of the chat template, e.g. {enable_thinking: false}; those of a row override them. The saved "
        "model's template has them as defaults.",
    )
    train_on: str = option(
        "all_turns",
        "Assistant turns to train on. each_turn: all, each after the conversation as rendered at inference.",
        choices=("all_turns", "last_turn", "each_turn"),
    )
    train_on_reasoning: bool = option(True, "Train on the reasoning of a turn, too.")
    on_missing: str = option(
        "error",
        "If the chat template omits a field of a row. warn: count it, and train on the rest.",
        choices=("error", "warn"),
    )
    split_special_tokens: bool = option(True, "Tokenize special tokens in user and tool content as ordinary text.")
    max_length: int = option(1024, "Maximum length of an example, in tokens.", ge=2)
    max_prompt_length: int | None = option(
        None,
        "Maximum length of a prompt, in tokens. Removes the oldest tokens, the same number from both prompts of a "
        "preference pair (default: no limit of its own).",
        ge=1,
    )
    truncation: str = option(
        "prompt",
        "What to do with an example longer than max_length. prompt: remove the oldest tokens of the prompt. end: "
        "remove the last tokens. drop: drop the example.",
        choices=("prompt", "end", "drop"),
    )
    mask_truncated: bool = option(
        False,
        "policy, value: exclude rollouts that ended without an end token from training. Their rewards still count in "
        "the means of their groups, as do those of rollouts longer than max_length in any case.",
    )
    packing: bool = option(
        False, "Pack several examples into a batch row instead of padding: the same results, faster."
    )
    group_by_length: bool = option(False, "Make batches of examples of similar length, to reduce padding.")
    on_bad_row: str = option("error", "What to do with an invalid data row.", choices=("error", "skip"))
    max_bad_rows: int = option(
        100, "With on_bad_row=skip: number of invalid rows in a file above which training stops.", ge=0
    )
    num_proc: int | None = option(
        None, "Number of processes that tokenize (default: all cores).", ge=1, le=1024, affects_results=False
    )
    cache_dir: str | None = option(
        None,
        "Folder of the token cache (default: $XDG_CACHE_HOME/minitrain or ~/.cache/minitrain).",
        affects_results=False,
    )

    # model and loss
    model: ModelConfig = option(_missing_model, "The model.")
    lora: LoRAConfig = option(LoRAConfig, "LoRA: small trained matrices next to frozen weights.")
    soft_prompt: SoftPromptConfig = option(SoftPromptConfig, "Prompt or prefix tuning of a frozen model.")
    freeze_layers: list[Any] = option([], "Blocks to freeze: numbers, ranges such as 0-5, or `embeddings`.")
    loss: dict[str, Any] = option(DEFAULT_LOSS, "name: the loss, next to its own options (see docs/losses.md).")

    rollout: RolloutConfig = option(RolloutConfig, "Online training: responses that are sampled during training.")

    # optimization
    total_batch_size: int = option(
        32, "Examples per optimizer step, over all micro-batches and devices.", ge=1, alias="batch_size"
    )
    gradient_accumulation_steps: int = option(
        1, "Micro-batches per optimizer step on each device.", ge=1, affects_results=False
    )
    max_tokens_per_micro_batch: int | None = option(
        None,
        "Maximum number of tokens of a micro-batch on each device, padding included, also in evaluations. It sets the "
        "number of micro-batches instead of gradient_accumulation_steps; the results are the same (default: no limit).",
        ge=1,
        affects_results=False,
    )
    n_epochs: float = option(1.0, "Passes over the training data.", gt=0, le=1e6, affects_results=False)
    n_steps: int | None = option(None, "Optimizer steps (default: by n_epochs).", ge=1, affects_results=False)
    optimizer: str = option(
        "AdamW",
        "Name of a class of torch.optim (Muon: for matrices in the blocks, AdamW for the rest), or an import path such "
        "as bitsandbytes.AdamW8bit, bitsandbytes.PagedAdamW8bit or torchao.AdamW4bit.",
    )
    optimizer_args: dict[str, Any] = option({}, "Other arguments of the optimizer, e.g. {momentum: 0.9} for SGD.")
    optimizer_in_backward: bool = option(
        False,
        "Update each parameter as soon as its gradient is computed, and free the gradient: less memory. Needs "
        "max_grad_norm=0 and one micro-batch.",
        affects_results=False,
    )
    lr: float | None = option(
        None,
        "Peak learning rate (default: by the loss and the adapter, for example 2e-5 for sft, 2e-4 with LoRA; see "
        "docs/learning-rates.md).",
        ge=0,
        le=1000,
    )
    weight_decay: float = option(0.0, "Decay of weight matrices; norms and biases never decay.", ge=0, le=1000)
    betas: list[float] = option([0.9, 0.999], "Beta1 and beta2 of Adam.")
    eps: float = option(1e-8, "Epsilon of Adam.", gt=0, le=1)
    max_grad_norm: float = option(1.0, "Clip the gradient norm to this value; 0 does not clip.", ge=0)
    lr_scheduler: str = option(
        "linear",
        "Schedule of lr after the warmup. "
        + ". ".join(f"{name}: {schedule.help}" for name, schedule in SCHEDULES.items())
        + ".",
        choices=tuple(SCHEDULES),
    )
    lr_decay_ratio: float | None = option(
        None, f"wsd: fraction of all steps in which lr decays (default: {DECAY_RATIO}).", gt=0, le=1
    )
    lr_scheduler_args: dict[str, Any] = option(
        {}, "Arguments of lr_scheduler, e.g. {min_lr_rate: 0.1}; its help lists them in braces, with their defaults."
    )
    warmup_steps: int = option(0, "Optimizer steps in which lr rises linearly from 0 to its peak.", ge=0)
    warmup_ratio: float = option(0.0, "Warmup as a fraction of all steps.", ge=0, le=1)
    activation_checkpointing: str | int = option(
        "none",
        "Recompute activations in the backward pass: less memory, slower. full: of each block. selective: except the "
        "results of matrix products and attention, which takes little time. A number n: of every n-th block.",
        choices=("none", "full", "selective"),
        spellings={"true": "full", "false": "none", "none": "none"},
        ge=1,
        affects_results=False,
    )
    activation_offload: bool = option(
        False,
        "Keep the inputs of recomputed blocks in host memory between the forward and the backward pass. Needs a GPU.",
        affects_results=False,
    )
    compile: bool = option(False, "Compile each block of the model with torch.compile.")
    deterministic: bool = option(
        False,
        "Use deterministic algorithms, and check before the first step that a step computed twice gives the same bits. "
        "Slower on a GPU.",
    )
    max_bad_steps: int = option(
        10, "Number of consecutive steps with a non-finite loss or gradient after which training stops.", ge=1
    )

    # evaluation
    do_first_eval: bool = option(True, "Evaluate before the first step.", affects_results=False)
    eval_every_steps: int = option(0, "Steps between two evaluations; 0 evaluates only at the end.", ge=0)
    n_eval_examples: int | None = option(None, "Evaluate only the first N examples (default: all).", ge=1)
    eval_batch_size: int = option(16, "Examples per forward pass of an evaluation.", ge=1, affects_results=False)
    eval_kl_to_start: bool = option(
        False,
        "Add the metric kl_to_start to evaluations: KL(policy || policy before training), mean over the targets. It "
        "takes two more forward passes; with an adapter no memory, otherwise that of a frozen copy of the model.",
        affects_results=False,
    )
    eval_generate: EvalGenerateConfig = option(EvalGenerateConfig, "Answers generated at each evaluation.")
    early_stopping: EarlyStoppingConfig = option(EarlyStoppingConfig, "Stop when evaluations no longer improve.")

    # saving
    save_every_steps: int | None = option(
        None,
        "Steps between two checkpoints, with one more at the end; 0 writes none (default: about one a minute, or "
        "fewer if writing takes more than 2% of the time).",
        ge=0,
        affects_results=False,
    )
    keep_checkpoints: int = option(2, "Number of newest checkpoints to keep.", ge=1, affects_results=False)
    save_models_every_steps: int = option(
        0,
        "Steps between two saved models in models/step-N, each like final/; 0 writes none.",
        ge=0,
        affects_results=False,
    )
    keep_models: int | None = option(
        None, "Number of newest models in models/ to keep (default: all).", ge=1, affects_results=False
    )
    save_async: bool = option(
        False, "Write checkpoints while training continues; takes memory for a copy.", affects_results=False
    )
    max_minutes: float | None = option(
        None,
        "Minutes from the start of loading after which the run has ended with a checkpoint: it stops before a step, an "
        "evaluation and the checkpoint would take longer. The same command resumes (default: no limit).",
        gt=0,
        affects_results=False,
    )
    save_best: bool = option(
        False, "Keep the model with the best early_stopping.metric in best/.", affects_results=False
    )
    resume: str = option(
        "auto",
        "auto: resume from the newest checkpoint of the run directory. never: refuse a directory that holds a run. "
        "Or the path of a checkpoint.",
        affects_results=False,
    )
    allow_changes: list[str] = option(
        [],
        "Options that may differ from those of the resumed run, e.g. [lr, datasets, model].",
        affects_results=False,
    )

    # tracking
    log_every_steps: int = option(
        10, "Steps between two lines on the console and in metrics.jsonl.", ge=1, affects_results=False
    )
    ledger: bool = option(
        True,
        "Record loss, gradient norm and a hash of the tokens of each step, for `minitrain compare`.",
        affects_results=False,
    )
    wandb: WandbConfig = option(WandbConfig, "Weights & Biases.")
    report_to_tensorboard: bool = option(
        False, "Write TensorBoard files into the run directory.", affects_results=False
    )
    swanlab: SwanlabConfig = option(SwanlabConfig, "SwanLab.")
    trackio: TrackioConfig = option(TrackioConfig, "Trackio.")
    mlflow: MLflowConfig = option(MLflowConfig, "MLflow.")

    # Not an option. `dataclasses.replace` keeps it, so a copy also saves `${...}` unresolved.
    interpolation: Interpolation = field(
        default=Interpolation({}, {}), repr=False, compare=False, metadata={"internal": True}
    )


def option_fields(schema: Any) -> list[Field]:
    """Return the fields of a dataclass or its instance that are options."""
    return [f for f in fields(schema) if not f.metadata.get("internal")]


def aliases(schema: type = Config) -> dict[str, str]:
    """Return {alias: name} for the options of a dataclass."""
    return {alias: f.name for f in option_fields(schema) for alias in f.metadata.get("aliases", ())}


def all_keys(schema: type = Config, path: str = "") -> Iterator[str]:
    """Yield the key of every option and section, such as ``a`` and ``a.b``."""
    hints = get_type_hints(schema)
    for f in option_fields(schema):
        yield f"{path}{f.name}"
        if is_dataclass(hint := hints[f.name]):
            yield from all_keys(hint, f"{path}{f.name}.")
