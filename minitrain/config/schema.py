"""The options of a run: `Config`, with its sections in `sections.py`.

These dataclasses alone define the defaults. `load.py` reads a YAML file into them, and `docs/options.md` is generated
from them.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from .option import MAX_SEED, option, show_options
from .schedules import DECAY_RATIO, SCHEDULES
from .sections import (
    DatasetConfig,
    EarlyStoppingConfig,
    EvalGenerateConfig,
    FSDPConfig,
    LoRAConfig,
    ModelConfig,
    SoftPromptConfig,
    SwanlabConfig,
    WandbConfig,
)

DEFAULT_LOSS = {"name": "sft"}


class Written(NamedTuple):
    """What the user wrote before `${...}` was resolved, and the values that it was resolved to."""

    raw: dict
    resolved: dict


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
