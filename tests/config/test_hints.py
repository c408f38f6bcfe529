"""What is suggested for a key or value that minitrain does not have: nothing, or the right thing."""

from pathlib import Path

import pytest

from minitrain import load_config
from minitrain.cli.main import main
from minitrain.config.schedules import SCHEDULES
from minitrain.config.suggest import nearest_names, suggest
from minitrain.errors import InvalidConfigError
from tests.messages import reports


@pytest.fixture
def hint(rows_file):
    """``hint("lrr=1")``: what the error says about an override after naming it; None if it is accepted."""

    def hint(override: str) -> str | None:
        try:
            load_config({"datasets": str(rows_file), "model": {"name_or_path": "tiny"}}, [override])
        except InvalidConfigError as error:
            (issue,) = error.issues
            return issue.message
        return None

    return hint


# as typed -> the whole of what is said
KEYS = {
    # the value converts
    "validation_split_percentage=2.0": "Use validation_split=0.02.",
    "validation_split_percentage=5": "Use validation_split=0.05.",
    "num_warmup_steps=0.1": "Use warmup_ratio=0.1.",
    "num_warmup_steps=10": "Use warmup_steps.",
    "val_set_size=0.05": "Use validation_split (a fraction below 1, or a number of examples).",
    "per_device_train_batch_size=4": "Use total_batch_size (value x gradient_accumulation_steps x devices).",
    "micro_batch_size=2": "Use total_batch_size (value x gradient_accumulation_steps x devices).",
    # the same value
    "sequence_len=2048": "Use max_length.",
    "warmup_steps_ratio=0.1": "Use warmup_ratio.",
    "learning_rate=1": "Use lr.",
    "prompt_template=x": "Use datasets[0].prompt_template (with columns in braces, like {prompt}).",
    "dataset.name=x": "Use datasets[0].path (a file, a directory, or a name on the Hub).",
    # what another tool's value says decides
    "use_peft=true": "Use lora.rank=16 (a rank above 0 enables LoRA).",
    "use_peft=false": "Remove it: it is off by default.",
    "peft.method=lora": "Use lora.rank=16.",
    "peft={method: qlora}": "Use lora.rank=16 model.quantization=4bit.",
    "adapter=lora": "Use lora.rank=16.",
    "adapter=qlora": "Use lora.rank=16 model.quantization=4bit.",
    "adapter=runs/a/final": "Use model.adapter (a directory with adapter_config.json).",
    "save_strategy=steps": "Use save_every_steps (by time by default).",
    "save_strategy=no": "Use save_every_steps=0.",
    "save_strategy=best": "Use save_best=true.",
    "eval_strategy=no": "Use eval_every_steps=0 (only the end of training is evaluated).",
    "evaluation_strategy=steps": "Use eval_every_steps.",
    "report_to=swanlab": "Use swanlab.enabled=true.",
    "report_to=[wandb]": "Use wandb.enabled=true.",
    "report_to=none": "Remove it: no tracker is on by default.",
    "optim=adamw_torch": "Use optimizer=AdamW.",
    "lr_scheduler_kwargs={num_cycles: 2}": "Use lr_scheduler_args.",
    "cosine_min_lr_ratio=0.1": "Use lr_scheduler=cosine_with_min_lr (with lr_scheduler_args.min_lr_rate).",
    "optim=adamw_8bit": "Use optimizer=bitsandbytes.AdamW8bit.",
    "bf16=true": "Use model.policy_dtype=bfloat16.",
    "bf16=false": "Remove it: it is off by default.",
    "use_amp=true": "Use model.policy_dtype=float16.",
    "mixed_precision=no": "Remove it: float32 is the default.",
    "loss_type=ipo": "Use loss.name=dpo loss.variant=ipo.",
    "clip_grad_norm=null": "Use max_grad_norm=0.",
    "max_steps=-1": "Remove it: -1 there means that the epochs count.",
    "max_steps=100": "Use n_steps.",
    "resume_from_checkpoint=null": "Remove it: without a value it has no effect.",
    # nothing here, and none is needed
    "do_train=true": "Remove it: `minitrain train` trains, and evaluates if evaluation data is set.",
    "use_auth_token=x": "Remove it: `hf auth login` or HF_TOKEN gives access to the Hub.",
    "model.use_auth_token=true": "Remove it: `hf auth login` or HF_TOKEN gives access to the Hub.",
    "model.block_name=GPTNeoXLayer": "Remove it: the blocks are detected.",
    # typos, capitals, another section
    "batchsize=8": "Did you mean total_batch_size?",
    "Lr=1": "Did you mean lr?",
    "max-length=8": "Did you mean max_length?",
    "maxLength=8": "Did you mean max_length?",
    "Learning_Rate=1": "Use lr.",
    "model.dtpye=bfloat16": "Use model.policy_dtype (float32, bfloat16 or float16).",
    "lerning_rate=1": "Use lr.",
    "eval_every_step=3": "Did you mean eval_every_steps?",
    "wandb_projct=x": "Use wandb.project.",
    "lora_init=pissa": "Did you mean lora.init?",
    "training.lr=1": "Did you mean lr?",
    "model.lora.rank=1": "Did you mean lora.rank?",
    "training={lr: 1}": "Did you mean lr?",
    "datasets[0].file_name=x": "Use datasets[0].path.",
    "eval_datasets=[{hf_hub_url: x}]": "Use eval_datasets[0].path.",
    # all keys with a beginning
    "ddp_fancy_thing=1": "Remove it: torchrun and trainer=FSDPTrainer decide.",
    "wandb_log_model=true": "Remove it: WANDB_MODE and the other variables of wandb work.",
    "wandb_project=x": "Use wandb.project.",
    "fsdp_cpu_offload=true": "Use fsdp.cpu_offload.",
    # nothing like it: nothing is suggested
    "use_eaft=true": "docs/options.md lists all options.",
    "adam_beta3=0.9": "docs/options.md lists all options.",
    "rl_coef=1": "docs/options.md lists all options.",
    "asft_alpha=1": "docs/options.md lists all options.",
    "context_lengths_of=1": "docs/options.md lists all options.",
    "galore_targets=x": "Remove it: these optimizers are not supported.",
    "zzz=1": "docs/options.md lists all options.",
    "trains=x": "docs/options.md lists all options.",
    "save=1": "docs/options.md lists all options.",
    "wandb.foo=1": "Valid options: enabled, entity, project.",
}
VALUES = {
    "resume=false": "expected a string, got False. Use resume=never.",
    "resume=true": "expected a string, got True. Use resume=auto.",
    "warmup_steps=0.1": "expected an integer, got 0.1. Use warmup_ratio=0.1.",
    "early_stopping=true": " got True. Use early_stopping.patience=3.",
    "lora=true": " got True. Use lora.rank=16.",
    "model=gpt2": " got 'gpt2'. Use model.name_or_path=gpt2.",
    "max_grad_norm=null": " Use max_grad_norm=0.",
    "n_steps=-1": " Remove it: an unset option does not limit the run.",
    "model.policy_dtype=bf16": " Use model.policy_dtype=bfloat16.",
    "model.quantization=4": " Use model.quantization=4bit.",
    "optimizer=PagedAdamW8bit": " Use optimizer=bitsandbytes.PagedAdamW8bit.",
    "optimizer={_component_: torch.optim.AdamW}": "unknown option. Use optimizer.",
    "lr_scheduler=constant_with_warmup": " Use lr_scheduler=constant (with warmup_steps or warmup_ratio).",
    "lr_scheduler=cosin": " Did you mean cosine?",
    "lr_scheduler=reduce_lr_on_plateau": f"expected one of {', '.join(SCHEDULES)}, got 'reduce_lr_on_plateau'.",
    "truncation=keep_end": " Use truncation=prompt.",
    "chat_template=llama3": " Use chat_template=auto (the tokenizer's own).",
    "device=cuda:0": " Use device=cuda (CUDA_VISIBLE_DEVICES chooses which one).",
    "trainer=TensorParallelTrainer": " Use trainer=FSDPTrainer.",
    "loss.name=nll": " Use loss.name=sft.",
    "loss=ipo": " Use loss.name=dpo loss.variant=ipo.",
    "loss.name=grpo": " Use loss.name=policy loss.advantage_estimator=grpo.",
    "datasets[0].type=sharegpt": " Use datasets[0].type=conversations.",
}


@pytest.mark.parametrize(("typed", "said"), KEYS.items(), ids=KEYS)
def test_keys(hint, typed, said):
    """An unknown key is an error that ends in one right suggestion, or in none."""
    assert hint(typed) == f"unknown option. {said}"


@pytest.mark.parametrize(("typed", "said"), VALUES.items(), ids=VALUES)
def test_values(hint, typed, said):
    """So is another tool's value of an option that minitrain has."""
    assert hint(typed).endswith(said)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cosin", ["cosine"]),
        ("cosnie", ["cosine"]),
        ("linaer", ["linear"]),
        ("constnat", ["constant"]),
        ("line", []),
        ("gost", []),
        ("", []),
        ("sin", []),
    ],
)
def test_a_typo_differs_in_a_letter(name, near):
    """What differs in more is another word."""
    assert nearest_names(name, ["linear", "cosine", "constant"]) == near


def test_a_typo_of_two_names():
    """Both are named; of three nothing is said."""
    assert suggest("kdo", ["kto", "kdx"]) == " Did you mean kto or kdx?"
    assert suggest("kdo", ["kto", "kdx", "kda"]) == ""
    assert suggest("FSDP_trainer", ["BasicTrainer", "FSDPTrainer"]) == " Did you mean FSDPTrainer?"


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--lr=1", "--overrides lr=..."),
        ("--learning_rate", "learning_rate: Use lr."),
        ("--learning-rate=1", "learning_rate: Use lr."),
        ("--bf16=true", "bf16: Use model.policy_dtype=bfloat16."),
        ("--do_train", "do_train: Remove it: "),
    ],
)
def test_options_on_the_command_line(argument, said, capsys):
    """An option of the config without --overrides is suggested by its name here."""
    assert main(["train", "c.yml", argument]) == 2
    assert reports(capsys.readouterr().err.splitlines()[-1], "usage", said)


def test_a_section_of_another_tool(wording):
    """Each key in it gets its hint, a misspelt section of our own is named, and nothing is said to be missing."""
    given = {"model": {"model_name_or_path": "x"}, "training": {"learning_rate": 1, "output_dir": "y"}}
    with pytest.raises(InvalidConfigError) as error:
        load_config(given | {"modle": {"name_or_path": "tiny"}, "dataset": {"train_file": "a.jsonl"}})
    wording(error.value)
    assert [(issue.key, issue.code) for issue in error.value.issues] == [
        ("model.model_name_or_path", "unknown-option"),
        ("training.learning_rate", "unknown-option"),
        ("training.output_dir", "unknown-option"),
        ("modle", "unknown-option"),
        ("dataset.train_file", "unknown-option"),
    ]


def test_hints_are_in_the_package():
    """The table is a file beside the module, which an installed package has, too."""
    assert '"": ["*.txt"' in (Path(__file__).parents[2] / "setup.py").read_text()
