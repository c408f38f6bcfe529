"""The sections of a config: an entry of `datasets`, `model`, `lora` and so on."""

from dataclasses import MISSING, dataclass
from typing import Any

from .option import MAX_SEED, option, show_options


@show_options("An entry of `datasets`, `eval_datasets` or `retention_datasets`.")
@dataclass
class DatasetConfig:
    path: str = option(
        MISSING,
        "A .json, .jsonl, .csv, .tsv or .parquet file (or one of these with .gz), a folder with a data set, or the "
        "name of a data set on the Hub (owner/name). Parquet files, folders and the Hub need the extra `data`.",
    )
    split: str | None = option(None, "Split of a data set on the Hub or in a folder (default: train).")
    name: str | None = option(
        None, "Configuration of a data set on the Hub or in a folder (default: the only one, or the one named default)."
    )
    revision: str | None = option(None, "Branch, tag or commit of a data set on the Hub (default: main).")
    type: str | None = option(None, "Row format, see docs/data.md (default: detected from the keys of the rows).")
    tools: Any = option(
        None, "Tools of rows that have none: a list, or the path of a JSON file with one (default: none)."
    )
    columns: dict[str, str] = option({}, "Name of the column for each key of the format: {prompt: q, response: reply}.")
    prompt_template: str | None = option(
        None,
        "Template of the user turn, with {prompt} or any column in braces, for formats with one prompt and one "
        "response (default: the prompt alone; for RAFT the template in docs/raft.md).",
    )
    response_template: str | None = option(
        None, "Template of the assistant turn, with {response} or any column in braces (default: the response alone)."
    )
    p_oracle: float = option(1.0, "RAFT: probability that the prompt of a row has the oracle document.", ge=0, le=1)
    n_distractors: int | None = option(
        None, "RAFT: number of distractor documents sampled for each row (default: all).", ge=0
    )
    seed: int = option(0, "RAFT: seed for the choice and the order of the documents.", ge=0, le=MAX_SEED)
    n_examples: int | None = option(None, "Use only the first N rows (default: all).", ge=1)
    weight: float = option(
        1.0, "How often an epoch uses each example: 0.5 is half of them, 2 is each one twice.", gt=0, le=10_000
    )


@show_options("The section `model`.")
@dataclass
class ModelConfig:
    name_or_path: str = option(
        MISSING, "Folder or Hub name of a causal language model, or `tiny` for the built-in model with random weights."
    )
    tokenizer_name_or_path: str | None = option(
        None, "Folder or Hub name of the tokenizer (default: the tokenizer of the model)."
    )
    revision: str | None = option(None, "Branch, tag or commit on the Hub (default: main).")
    policy_dtype: str = option(
        "auto",
        "Dtype of compute (autocast) and of the saved model. auto: bfloat16 on a GPU that supports it, else float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    master_dtype: str = option(
        "float32",
        "Dtype of the trained parameters. bfloat16 halves their memory, but rounds small updates away.",
        choices=("float32", "bfloat16"),
    )
    master_weights: str = option(
        "model",
        "Where the master weights are. model: parameters are in master_dtype, and autocast rounds them in each forward "
        "pass. optimizer: linear layers of the blocks are in policy_dtype, and the optimizer has their master weights: "
        "the same results without these casts.",
        choices=("model", "optimizer"),
    )
    reference_dtype: str | None = option(
        None,
        "Dtype of the weights of a reference model (default: policy_dtype).",
        choices=("float32", "bfloat16", "float16"),
    )
    archive: str | None = option(
        None,
        "Weights to start from: a .safetensors or .pt state dict, or a folder such as final/ (default: the weights of "
        "name_or_path).",
    )
    adapter: str | None = option(
        None, "PEFT adapter to start from: a folder with adapter_config.json (default: a new adapter, or none)."
    )
    quantization: str = option(
        "none",
        "Quantize the frozen linear layers with bitsandbytes to 4 bits (NF4 with double quantization) or 8 bits. "
        "Needs an adapter.",
        choices=("none", "4bit", "8bit"),
    )
    attn_implementation: str = option(
        "auto",
        "Attention implementation of transformers. auto: sdpa, or eager for models without sdpa.",
        choices=("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"),
    )
    float8: str | None = option(
        None,
        "Compute the linear layers of the blocks in FP8 with torchao, on GPUs from compute capability 8.9; needs "
        "compile to be fast. rowwise: a scale for each token and output. tensorwise: one for each tensor; less exact.",
        choices=("rowwise", "tensorwise"),
    )
    router_aux_loss_coef: float | None = option(
        None,
        "Coefficient of the auxiliary loss that balances the experts of a mixture of experts; 0 is off (default: that "
        "of the model's config if its output_router_logits is true, else 0). With gradient_accumulation_steps, each "
        "micro-batch needs one more forward pass.",
        ge=0,
        le=1000,
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model. Use it only for models you trust.")


@show_options("The section `lora`.")
@dataclass
class LoRAConfig:
    rank: int = option(0, "Rank of the LoRA matrices; 0 trains without LoRA.", ge=0, le=32768)
    alpha: float = option(16.0, "Scale the update by alpha / rank.", gt=0, le=1e6)
    dropout: float = option(0.0, "Dropout probability of the input of the LoRA matrices.", ge=0, lt=1)
    target_modules: Any = option(
        "all-linear",
        "Layers that get LoRA matrices: a list of names, a regular expression, or all-linear for all linear layers "
        "except the LM head.",
    )
    target_parameters: Any = option(
        [],
        "Parameters that are no layer and get LoRA matrices: a list of names such as mlp.experts.gate_up_proj, or "
        "all-experts.",
    )
    exclude_modules: list[str] = option([], "Layers to exclude from target_modules.")
    layers_to_transform: list[int] = option([], "Numbers of the blocks that get LoRA matrices; [] is all blocks.")
    modules_to_save: list[str] = option([], "Modules to train in full and to save with the adapter.")
    bias: str = option(
        "none",
        "Biases to train: all, or with lora_only those of the adapted layers.",
        choices=("none", "all", "lora_only"),
    )
    use_rslora: bool = option(False, "Scale the update by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).")
    use_dora: bool = option(False, "Train magnitude and direction separately (DoRA, arXiv 2402.09353); slower.")
    init: str = option(
        "default",
        "Initialization. default, gaussian: the update is 0. pissa: from the largest singular values of the weights. "
        "olora: from their QR decomposition.",
        choices=("default", "gaussian", "pissa", "olora"),
    )
    loraplus_lr_ratio: float = option(
        1.0, "Learning rate of the B matrices as a multiple of lr (LoRA+, arXiv 2402.12354).", gt=0, le=10_000
    )


@show_options("The section `soft_prompt`.")
@dataclass
class SoftPromptConfig:
    num_virtual_tokens: int = option(
        0, "Number of trained vectors before every example; 0 trains without a soft prompt.", ge=0, le=32768
    )
    method: str = option(
        "prompt",
        "prompt: the vectors are input embeddings. prefix: they are keys and values of the attention in every layer.",
        choices=("prompt", "prefix"),
    )
    init_text: str | None = option(
        None, "prompt: text whose embeddings initialize the vectors (default: random vectors)."
    )
    prefix_projection: bool = option(False, "prefix: compute the keys and values with a small network.")
    encoder_hidden_size: int | None = option(
        None, "Hidden size of the network of prefix_projection (default: that of the model).", ge=1, le=65536
    )


@show_options("The section `rollout`: responses that are sampled during training.")
@dataclass
class RolloutConfig:
    num_generations: int = option(
        0, "Responses sampled for each prompt; 0 trains on the responses in the data files.", ge=0, le=4096
    )
    prompts_per_round: int = option(32, "Prompts of a round. All are answered before its first optimizer step.", ge=1)
    num_iterations: int = option(1, "Passes over the responses of a round.", ge=1)
    max_new_tokens: int = option(256, "Maximum length of a response, in tokens; of each turn of an environment.", ge=1)
    max_turns: int = option(1, "Maximum number of responses in a conversation with an environment.", ge=1)
    temperature: float = option(
        1.0, "Sampling temperature, also of the log-probabilities in the loss.", ge=0.01, le=100
    )
    top_p: float = option(
        1.0, "Sample from the smallest set of most likely tokens whose probabilities sum to this.", gt=0, le=1
    )
    top_k: int = option(0, "Sample from the k most likely tokens; 0 from all.", ge=0)
    stop: list[str] = option([], "Strings that end a response.")
    rewards: list[Any] = option(
        [], "Reward functions: names, or mappings with `name`, `weight` and the options of the function."
    )
    environment: Any = option(
        None, "Environment that replies to responses: a name, or a mapping with `name` and its options."
    )
    zero_variance_groups: str = option(
        "keep",
        "Prompts whose responses all have the same reward. keep: train on them. skip: do not. resample: replace them "
        "by other prompts.",
        choices=("keep", "skip", "resample"),
    )
    max_draws: int = option(4, "resample: largest number of prompts drawn in a round, as a multiple of it.", ge=1)
    truncated: str = option(
        "keep",
        "Responses that max_new_tokens cut off. keep: like others. mask: their rewards count in the group, but their "
        "tokens are not trained on. zero: their reward is 0.",
        choices=("keep", "mask", "zero"),
    )
    importance_correction: str = option(
        "none",
        "Weight of a token for the difference between sampling and training. tis: min(p_train / p_sample, high). "
        "icepop: 0 outside of [low, high].",
        choices=("none", "tis", "icepop"),
    )
    correction_level: str = option(
        "token",
        "Level of the correction's ratio. token: each token. sequence: geometric mean over a response.",
        choices=("token", "sequence"),
    )
    correction_low: float = option(0.5, "icepop: smallest ratio.", gt=0, le=1)
    correction_high: float = option(2.0, "Largest ratio of the correction.", ge=1)
    min_reward: float | None = option(None, "sft, dft: train only on responses with a higher reward (default: all).")
    eval_generations: int = option(1, "Responses to each evaluation prompt.", ge=1, affects_results=False)
    eval_temperature: float | None = option(
        None,
        "Sampling temperature in evaluations; 0 is greedy (default: temperature).",
        ge=0,
        le=100,
        affects_results=False,
    )
    num_slots: int | None = option(
        None,
        "Responses that a device samples at the same time (default: 64 to 512, as many as fit into 1 GiB of keys, "
        "values and logits); vllm: prompts that a rank sends at the same time (default: 64).",
        ge=1,
        affects_results=False,
    )
    engine: str = option(
        "local",
        "What samples the responses. local: the model in training. vllm: a server, see docs/online.md.",
        choices=("local", "vllm"),
    )
    engine_args: dict[str, Any] = option(
        {}, "vllm: `url`, `weights_dir`, `timeout`, `retries` and `sleep`.", affects_results=False
    )
    sampler_dtype: str | None = option(
        None,
        "local: sample from a copy of the weights in this dtype, with the adapter merged. Each device holds the full "
        "copy while it samples (default: sample from the weights in training).",
        choices=("float32", "bfloat16", "float16"),
    )
    reward_timeout: float = option(10.0, "Seconds after which a reward function is stopped.", gt=0)
    save_samples: int = option(
        32, "Responses of each round to write to rollouts/; -1 writes all.", ge=-1, affects_results=False
    )


@show_options("The section `early_stopping`.")
@dataclass
class EarlyStoppingConfig:
    patience: int = option(
        0, "Number of evaluations without a better `metric` after which training stops; 0 never stops early.", ge=0
    )
    threshold: float = option(0.0, "Improvement of `metric` that an evaluation must exceed to count.", ge=0)
    metric: str = option(
        "loss",
        "Evaluation metric that selects the best model, also for save_best; of sampled answers, loss stands for "
        "reward. Lower is better for losses, perplexity and kl, and for length, turns and unjudged. For metrics other "
        "than loss, exact_match and reward, an evaluation before the first step checks that the metric exists.",
    )


@show_options("The section `eval_generate`.")
@dataclass
class EvalGenerateConfig:
    n_examples: int = option(
        0,
        "Number of evaluation prompts to answer at each evaluation for the metric exact_match; 0 generates nothing.",
        ge=0,
        affects_results=False,
    )
    num_generations: int = option(
        1,
        "Answers to sample for each prompt besides the greedy one, for the metrics pass@1, pass@2, pass@4 and so on; "
        "1 samples none.",
        ge=1,
        le=4096,
        affects_results=False,
    )
    temperature: float = option(1.0, "Temperature of these samples.", ge=0.01, le=100, affects_results=False)
    max_new_tokens: int = option(
        64, "Maximum length of an answer, in tokens.", ge=1, le=1_000_000, affects_results=False
    )
    match: str = option(
        "text",
        "Part of an answer that must equal that of the reference. text: the full answer. number: the final number, "
        "which is after ####, in \\boxed{} or the last one. Or a regular expression with one group: the group of its "
        "last match.",
        affects_results=False,
    )
    show: int = option(3, "Number of answers to print at each evaluation.", ge=0, affects_results=False)


@show_options("The section `fsdp`.")
@dataclass
class FSDPConfig:
    shard: str = option(
        "full",
        "full: shard parameters, gradients and optimizer state (ZeRO-3). grad: gather the parameters once for the "
        "forward and the backward pass (ZeRO-2). hybrid: shard inside each machine and replicate across machines. "
        "none: replicate everything on each rank.",
        choices=("full", "grad", "hybrid", "none"),
        affects_results=False,
    )
    cpu_offload: bool = option(
        False, "Keep parameters, gradients and optimizer state in CPU memory.", affects_results=False
    )
    timeout_seconds: float = option(
        1800,
        "Seconds without progress after which the run ends and reports which rank is stuck where.",
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
    entity: str | None = option(None, "User or team (default: that of your account).", affects_results=False)
    project: str = option("minitrain", "Project.", affects_results=False)


@show_options("The section `swanlab`.")
@dataclass
class SwanlabConfig:
    enabled: bool = option(False, "Log to SwanLab (install the package `swanlab`).", affects_results=False)
    project: str = option("minitrain", "Project.", affects_results=False)
    mode: str = option(
        "cloud", "Where SwanLab stores the run.", choices=("cloud", "local", "offline"), affects_results=False
    )


@show_options("The section `trackio`.")
@dataclass
class TrackioConfig:
    enabled: bool = option(False, "Log to Trackio (install the package `trackio`).", affects_results=False)
    project: str = option("minitrain", "Project.", affects_results=False)
    space_id: str | None = option(
        None, "Space on the Hub to log to, such as user/space (default: on this machine).", affects_results=False
    )


@show_options("The section `mlflow`.")
@dataclass
class MLflowConfig:
    enabled: bool = option(False, "Log to MLflow (install the package `mlflow`).", affects_results=False)
    tracking_uri: str | None = option(
        None, "Server or folder of MLflow (default: MLFLOW_TRACKING_URI, else mlflow.db).", affects_results=False
    )
    experiment: str = option("minitrain", "Experiment.", affects_results=False)
