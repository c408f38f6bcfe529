"""Each place of the code that can refuse a training is reached by a case here, or is listed with the reason."""

import ast
import collections
import contextlib
import functools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitrain.cli.main import main
from minitrain.config.issues import ConfigIssues, _InvalidValue
from minitrain.errors import MinitrainError
from tests.cli import test_bad_data, test_bad_input, test_bad_model
from tests.conftest import CONFIG, ROOT, fill_folder, write
from tests.messages import code_argument, makes_problem, strings
from tests.tools import test_validate_refusals

PACKAGE = ROOT / "minitrain"
KINDS = {"ConfigError", "DataError", "RunError", "RunDirError", "UnreachableError", "_InvalidValue"}
OTHER_COMMANDS = (  # no training goes through these
    "cli/",
    "tools/analysis/",
    "tools/evaluation/",
    "tools/rehearsal/",
    "model/shrink.py",
    "tools/preflight/preview.py",
    "inference/check.py",
    "inference/check_prompts.py",
    "inference/push.py",
    "inference/served.py",
    "inference/generate.py",
    "inference/prompts.py",
    "inference/score.py",
    "inference/merge.py",
    "inference/teacher_cache.py",
    "inference/raft_metrics.py",
    "session.py",  # tests/training/test_session.py
)


ELSEWHERE = (  # reached or not by what is installed, by the user and by the devices of a machine
    "model/checks:_check_quantization: not-installed",
    "model/checks:_check_float8: not-installed",
    "config/load:_read_text: unreadable",
    "distributed/checks:check_device: device error.code",
    "distributed/checks:check_device: model.float8 no-device",
    "distributed/checks:check_device: trainer conflict",
    "distributed/checks:check_device: trainer conflict (2)",
    "training/checks:_check_run: .enabled not-installed",
    "training/checks:_check_run: report_to_tensorboard not-installed",
    "model/dequantize:method_of: not-installed",
    "distributed/parallel:pick_device: no-device",
    "distributed/parallel:pick_device: no-device (2)",
    "data/checks:check_source: .path unreadable",
    "data/checks:check_source: .path not-installed",
    "data/checks:check_source: .path not-installed (2)",
    "data/tables:load_table: not-installed",
    "data/tables:read_parquet: not-installed",
    "io/hub:unreachable_error:",
    "model/checks:_check_model: model.attn_implementation not-installed",
)
PYTHON_ONLY = (
    "data/rows",
    "model/given",
    "tools/preflight/python",
    "training/callbacks",
)  # tests/training/test_python_api
UNREACHED = {  # why no case reaches a place, or which tests do -> the places
    "Python alone can give it": (
        "training/checks:check_optimizer_options: no-effect",
        "training/checks:check_optimizer_options: optimizer not-found",
        "training/optim:_call_factory: invalid-value",
        "training/optim:_call_factory: wrong-type",
        "training/optim:optimizer_object: wrong-type",
        "training/saving:check_target: already-exists",
        "config/load:parse_config: wrong-type",
        "config/load:_read: wrong-type",
        "data/checks:check_source: .path not-found",
        "data/examples:row_format: usage",
        "inference/evaluation:load_rows: conflict",
        "losses/base:_check_contract: usage",
        "model/checks:_check_model: model. not-found",
        "training/checks:check_loss_fits: loss.reference conflict",
        "losses/base:create_loss: unknown-option",
        "losses/base:create_loss: not-a-choice",
        "losses/base:register_loss.register: already-exists",
        "config/load:_apply_keywords: wrong-type",
        "config/load:check_writable: invalid-value",
        "config/load:merge_loss: conflict",
        "config/schema:_missing_model: missing-option",
        "distributed/parallel:pick_device: not-a-choice",
        "losses/base:register_loss.register: wrong-type",
        "losses/base:register_loss.register: wrong-type (2)",
        "training/step:forward_backward: wrong-type",
        "trainer:optim_step: usage",
        "trainer:forward_backward: conflict",
        "model/checks:_check_master_weights: no-effect (4)",
        "training/checks:_check_in_backward: no-effect",
    ),
    "it depends on the values of weights, and validate reads none": (
        "model/adapter_files:_init_lora: conflict",
        "training/aux_models:_check_reference_matches_policy: mismatch",
        "model/load_check:_compare_logps: not-finite",
        "model/load_check:_compare_logps: unsupported-model",
        "model/decoder:find_blocks: unsupported-model",
        "model/load_check:_check_scores: unsupported-model",
        "rl/engine:build_engine: unsupported-model",
        "model/float8:use_float8: unsupported-model",
        "model/dequantize:_scale_blocks: mismatch",
        "model/dequantize:dequantized: unsupported-model (2)",
        "model/dequantize:dequantized: unsupported-model",
    ),
    "it takes an optimizer of an extra, another number of ranks or a NaN: tests/training/test_optimizers.py": (
        "training/checkpoint:_check_ranks: mismatch",
        "training/checkpoint:_load_optimizer_state.read: mismatch",
        "training/checkpoint:_load_optimizer_state: mismatch",
        "training/checks:_check_stochastic_rounding: conflict",
        "training/checks:_check_stochastic_rounding: no-effect",
        "training/optim:check_optimizer: invalid-value",
        "training/optim:check_optimizer: invalid-value (2)",
        "training/optimizers:non_finite_in_backward: not-finite",
    ),
    "the model is multimodal: tests/model/test_multimodal.py": (
        "model/multimodal:is_multimodal: unsupported-model",
        "model/multimodal:check_text_part: unsupported-model",
    ),
    "after the first step, or while a model is saved": (
        "training/atomic_dir:atomic_folder: write_error_code(error)",
        "training/checkpoint:_check_free_space: no-space",
        "training/checkpoint:_commit: write_error_code(error)",
        "training/checkpoint:_make_temporary: write_error_code(error)",
        "training/step:update: not-finite",
        "training/after_step:count_bad_step: not-finite",
        "training/after_step:report_stop: out-of-range",
    ),
    "the kernels of a GPU: tests/training/test_deterministic.py": (
        "training/determinism:check_repeatable: mismatch",
        "training/determinism:deterministic_algorithms: unsupported-model",
    ),
    "other processes: tests/distributed, tests/faults and tests/rl/test_reward_workers.py": (
        "distributed/checks:check_processes: trainer conflict",
        "data/cache:load_cache: process-failed",
        "tools/preflight/memory:_check_devices: conflict (2)",
        "tools/preflight/memory:_check_devices: conflict",
        "training/run_dir:_take_lock: locked",
        "distributed/sharded:check_same: mismatch",
        "distributed/sharded:naming_failures: process-failed",
        "rl/reward_workers:_restart: process-failed",
        "distributed/sharded:local_rank0_first: process-failed",
    ),
    "another command says it": (
        "training/metrics_log:read_history: damaged-file or no-data",
        "training/metrics_log:read_lines: unreadable",
        "training/metrics_log:check_exists: not-found",
        "training/metrics_log:read_lines: not-found",
        "inference/resolve:find_model: wrong-path",
        "inference/resolve:find_model: not-found",
        "inference/resolve:find_model: unfinished-run",
        "model/adapter_config:read_adapter_outputs: mismatch",
    ),
    "validate alone says it of rows: tests/tools/test_validate.py": (
        "tools/preflight/validate:validate: wrong-tokens",
    ),
    "the check of the config comes first": (
        "training/aux_models:load_teacher: missing-option",
        "data/files:check_is_file: not-found",
        "data/files:check_is_file: wrong-path",
        "model/load:freeze_layers: invalid-value",
        "data/template:_read: not-found",
        "losses/value:values_of: conflict",
    ),
    "the file changes or the disk fills while it is read": (
        "data/cache:load_cache: unreadable",
        "data/tables:rows_of: unreadable",
    ),
    "takes seconds: tests/config/test_config.py and tests/model/test_lora.py": (
        "model/adapter_targets:_full_match: invalid-value",
        "model/adapter_targets:_full_match: invalid-value (2)",
    ),
    "the model needs experts: tests/model/test_experts.py": ("model/adapter_targets:target_parameters: conflict",),
    "tests/config/test_config.py and tests/cli/test_bad_input.py": (
        "config/load:_convert_errors: invalid-yaml (2)",
        "config/load:_limit_calls: too-large",
        "config/load:_read_text: wrong-path",
    ),
    "tests/model/test_new_tokens.py and tests/model/test_savable.py": (
        "model/adapter:train_new_rows: mismatch",
        "model/adapter_files:_load_rows: mismatch",
        "model/adapter_files:_resolve_modules: mismatch (2)",
        "model/adapter_files:_load_prompt: mismatch (2)",
        "model/save:check_saving: unsupported-model",
        "model/vocabulary:count_ids: unsupported-model",
    ),
    "tests/model/test_router.py": ("model/router:_aux_loss: unsupported-model (2)",),
    "tests/model/test_lora_targets.py": (
        "model/adapter_names:check_loadable: unsupported-model",
        "model/adapter_names:check_loadable: unsupported-model (2)",
        "model/adapter_names:check_loadable: unsupported-model (3)",
    ),
    "tests/rl/test_vllm.py": (
        "rl/engine:_check_server: mismatch",
        "rl/vllm:__init__: conflict",
        "rl/vllm:_call_once: code",
        "rl/vllm:_wrong: process-failed",
        "rl/vllm:call: unreachable",
        "rl/vllm:model_name: process-failed",
    ),
    "tests/rl/test_rounds.py": ("rl/rounds:_steps: unsuitable-data",),
    "tests/rl/test_online_evaluation.py and tests/tools/test_online_trial.py": (
        "rl/environments:call: plugin-failed",
        "rl/evaluation:references: invalid-row",
    ),
    "tests/rl": (
        "rl/checks:_check_loss_options: loss.advantage_estimator conflict",
        "rl/checks:_check_loss_options: loss.reference conflict",
        "rl/checks:_check_loss_options: loss.teacher_outputs conflict",
        "rl/checks:_check_loss_options: loss.temperature conflict",
        "rl/checks:_check_loss_options: loss.vf_coef missing-option",
        "rl/checks:_check_loss: rollout. conflict",
        "rl/checks:_check_loss: rollout.num_generations conflict",
        "rl/checks:_check_loss: rollout.prompts_per_round conflict",
        "rl/checks:_check_loss: rollout.rewards missing-option",
        "rl/checks:_check_sampling: rollout.eval_generations conflict",
        "rl/checks:_check_sampling: rollout.max_new_tokens too-large",
        "rl/checks:_check_sampling: rollout.max_turns conflict",
        "rl/checks:_check_sampling: rollout.prompts_per_round mismatch",
        "rl/checks:check: no-effect",
        "rl/checks:check: loss. no-effect",
        "rl/checks:check: rollout. no-effect",
        "rl/checks:check: rollout. no-effect (2)",
        "rl/checks:check: rollout.num_generations conflict",
        "rl/engine:_check_sampler_dtype: conflict",
        "rl/engine:_check_sampler_dtype: conflict (2)",
        "rl/engine:_check_sampler_dtype: no-effect",
        "rl/engine:check_copy: conflict",
        "rl/engine:check_engine: .url invalid-value",
        "rl/engine:check_engine: .weights_dir not-found",
        "rl/engine:check_engine: no-effect",
        "rl/engine:check_engine: rollout.engine conflict",
        "rl/environments:_check_tools: .pattern invalid-value",
        "rl/environments:_check_tools: .pattern invalid-value (2)",
        "rl/environments:_check_tools: .tools not-a-choice",
        "rl/environments:build_environment: not-a-choice",
        "rl/environments:build_environment: wrong-type",
        "rl/environments:register_environment.register: already-exists",
        "rl/prompts:check_rows: rollout.rewards[] wrong-column",
        "rl/reward_models:_find: unsupported-model",
        "rl/reward_models:_label: not-a-choice",
        "rl/rewards:build_rewards: . code",
        "rl/rewards:build_rewards: not-a-choice",
        "rl/rewards:build_rewards: wrong-type",
        "rl/rewards:register_reward.register: already-exists",
        "training/checks:check_loss_fits: eval_generate.num_generations no-effect",
        "training/checks:check_loss_fits: loss.reference no-effect",
    ),
    "tests/training/test_drift.py": (
        "training/checks:_check_drift: conflict",
        "training/checks:_check_drift: eval_kl_to_start conflict",
        "training/checks:_check_drift: eval_kl_to_start no-effect",
        "training/checks:_check_drift: retention_datasets[].type mismatch",
    ),
    "tests/losses/test_kd.py": (
        "losses/kd:read_outputs: mismatch (2)",
        "losses/kd:read_outputs: mismatch",
        "losses/kd:read_outputs: damaged-file",
    ),
    "tests/data, tests/inference/test_tools.py and tests/losses/test_weights.py": (
        "data/answers:_split_at_mark: invalid-template",
        "data/encode:_check_weights: no-effect",
        "data/examples:to_example: invalid-row (3)",
        "data/formats_preference:openai_preference_of: invalid-row",
        "data/messages:_answer_fields: invalid-row",
        "data/messages:_answer_fields: invalid-row (2)",
        "data/messages:_call: invalid-row",
        "data/messages:_call: invalid-row (2)",
        "data/messages:_parts: invalid-row (2)",
        "data/messages:_tool: invalid-row",
        "data/messages:_weight: invalid-row",
        "data/messages:parse_message: invalid-row (3)",
        "data/messages:parse_tools: invalid-row",
        "data/needles:_check_prompt: other-prompt",
        "data/needles:_report_lost: lost-field",
        "data/rendering:check_variables: no-effect",
        "data/rendering:check_variables: unknown-option",
        "data/rendering:check_variables: wrong-type",
        "data/template:encode_prompt: lost-field",
        "data/text_encoder:_encode: invalid-text",
        "data/text_encoder:_refuse_lost: invalid-text",
        "data/text_encoder:join: invalid-text",
        "losses/base:add_features: no-effect",
        "data/encode:_preference: same-answers",
        "data/files:_lines: too-large",
        "model/load:load_tokenizer: unsupported-model",
        "data/tables:_row: invalid-row",
        "data/tables:load_table: unreadable",
        "data/template:__init__: invalid-template",
    ),
    "tests/model/test_load_check.py": (
        "model/diagnostics:check_can_score: unsupported-model",
        "model/document_check:explained: code",
        "model/document_check:_check_padded: unsupported-model",
        "model/document_check:_check_padded: unsupported-model (2)",
        "model/document_check:_check_packed: conflict",
        "model/document_check:_check_gradient: conflict",
        "model/sequence_head:check_embedding: unsupported-model",
    ),
    "only on ranks with shards": ("model/load_check:check_encoder: unsupported-model",),
    "tests/losses/test_rollouts.py": (
        "data/formats_preference:_make_rollout: invalid-row",
        "losses/advantages:rewards: invalid-row",
    ),
}


def sites() -> dict[tuple[str, int], str]:
    """(file, line) -> a name, for each line of a call that makes an error or adds to the issues of a config.

    The name has the function, the key and the code, and the number of the call among those that are alike.
    """
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        place = str(file.relative_to(PACKAGE).with_suffix(""))
        if f"{place}.py".startswith(OTHER_COMMANDS):
            continue
        tree = ast.parse(file.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and makes_problem(node, KINDS)]
        names = collections.Counter()
        for call in sorted(calls, key=lambda call: call.lineno):
            inside = ".".join(f.name for f in functions if f.lineno <= call.lineno <= f.end_lineno)
            name = " ".join([f"{place}:{inside}:", *_key_and_code(call)])
            names[name] += 1
            for line in range(call.lineno, call.end_lineno + 1):
                found[str(file), line] = f"{name} ({names[name]})" if names[name] > 1 else name
    return found


def _key_and_code(call: ast.Call) -> list[str]:
    key = "".join(strings(call.args[0])) if isinstance(call.func, ast.Attribute) else ""
    code = code_argument(call)
    return [word for word in (key, "" if code is None else " or ".join(strings(code)) or ast.unparse(code)) if word]


@contextlib.contextmanager
def reached(monkeypatch):
    """Inside, the lines of calls that refuse are noted."""
    noted = set()

    def noting(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            frame = sys._getframe(1)
            noted.add((frame.f_code.co_filename, frame.f_lineno))
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(MinitrainError, "__init__", noting(MinitrainError.__init__))
        patch.setattr(ConfigIssues, "add", noting(ConfigIssues.add))
        patch.setattr(_InvalidValue, "__init__", noting(_InvalidValue.__init__))
        yield noted


def options(*overrides: str):
    return lambda: overrides


def rows(loss: str, *lines, **entry):
    def prepare():
        write("bad.jsonl", *lines)
        return [f"datasets=[{json.dumps({'path': 'bad.jsonl'} | entry)}]", f"loss={loss}"]

    return prepare


def prompts(*lines):
    def prepare():
        write("bad.jsonl", *lines)
        rollout = "rollout={num_generations: 2, rewards: [length], prompts_per_round: 8}"
        return ["datasets=[{path: bad.jsonl}]", "loss=policy", rollout]

    return prepare


def config(text: str):
    def prepare():
        Path("c.yml").write_text(text)
        return []

    return prepare


def model(spoil, *overrides: str):
    def prepare():
        spoil()
        return overrides

    return prepare


def adapter(*settings: str, **keys):
    """An adapter with other keys in its adapter_config.json."""

    def prepare():
        adapter_of(*settings)
        test_bad_model.changed(test_bad_model.CONFIG_FILE, **keys)()
        return ["model.adapter=lora"]

    return prepare


def adapter_of(*settings: str) -> None:
    """The folder lora/ with an adapter of the model: a LoRA, or what the settings say."""
    quick = ("n_steps=1", "output_dir=made", "quiet=true", "save_every_steps=0")
    assert main(["train", "c.yml", "--overrides", *(settings or ["lora={rank: 2}"]), *quick]) == 0
    shutil.move("made/c/final", "lora")
    shutil.rmtree("made")


TURN = {"role": "user", "content": "a"}
ORACLE = {"question": "a", "documents": [{"type": "oracle", "text": "b"}], "answer": "c"}
ROLLOUT = test_bad_data.ROLLOUT
QLORA = "model.quantization=4bit"
LORA = "lora={rank: 2}"
PREFIX = "soft_prompt={num_virtual_tokens: 2, method: prefix}"
MORE = [
    options(*[f"unknown{i}=1" for i in range(25)]),
    options("lr=1e-300"),
    options("lr_decay_ratio=0.2"),
    options("model.float8=rowwise"),
    options("model.float8=rowwise", LORA),
    options("model.float8=rowwise", "model.policy_dtype=bfloat16", "device=cpu"),
    options("activation_checkpointing=[1]"),
    options("lr_scheduler_args={num_cycles: 2}"),
    options("optimizer=not_a_package.AdamW"),
    options("optimizer=torch.optim.missing.AdamW"),
    options("optimizer=torch.optim.AdamWW"),
    options("optimizer=torch.optim.LBFGS"),
    options("optimizer=torch..AdamW"),
    options("optimizer=torch.optim.SGD", "optimizer_args={momentum: -1}"),
    options("optimizer=minitrain.training.optim.local_rows"),
    options("optimizer_in_backward=true"),
    options("optimizer_in_backward=true", "max_grad_norm=0", "gradient_accumulation_steps=2"),
    options("optimizer_in_backward=true", "max_grad_norm=0", "model.policy_dtype=float16"),
    options("optimizer_in_backward=true", "max_grad_norm=0", "max_bad_steps=2"),
    options("model.master_weights=optimizer"),
    options("model.master_weights=optimizer", "model.policy_dtype=bfloat16", "lora.rank=2"),
    options("model.master_weights=optimizer", "model.policy_dtype=bfloat16", "trainer=FSDPTrainer"),
    options("model.master_weights=optimizer", "model.policy_dtype=bfloat16", "model.master_dtype=bfloat16"),
    options("lr_scheduler=wsd", "lr_scheduler_args={num_decay_steps: 2}", "lr_decay_ratio=0.2"),
    config(CONFIG + "loss: {name: policy, eps_low: 0.1, clip_eps_low: 0.1}\n"),
    options("lora={rank: 2, dropout: 1}"),
    options("lr=???"),
    config(CONFIG + 'exp_name: "a\\0b"'),
    config("- a"),
    config("#" * (1 << 20) + CONFIG),
    config(CONFIG + "betas: [" + "1," * 10_001 + "]"),
    config(CONFIG + "betas: " + "[" * 40 + "]" * 40),
    model(lambda: Path("c.yml").unlink()),
    model(lambda: (Path("c.yml").unlink(), Path("c.yml").mkdir())),
    model(lambda: (Path("c.yml").unlink(), os.mkfifo("c.yml"))),
    options("keep_models=2"),
    options("lora.alpha=2"),
    options("soft_prompt.init_text=a"),
    options("soft_prompt.num_virtual_tokens=2", "lora.rank=2"),
    options(PREFIX, "soft_prompt.init_text=a"),
    options("soft_prompt={num_virtual_tokens: 2, prefix_projection: true}"),
    options(PREFIX, "soft_prompt.encoder_hidden_size=4"),
    options("lora={rank: 2, target_modules: 3}"),
    options("lora={rank: 2, target_modules: '('}"),
    options(LORA, "freeze_layers=[0]"),
    options(LORA, "model.master_dtype=bfloat16"),
    options(QLORA),
    options(QLORA, LORA, "trainer=FSDPTrainer"),
    options(QLORA, LORA, "lora.init=pissa"),
    options("model.attn_implementation=flash_attention_3"),
    options("freeze_layers=[5-0]"),
    options("optimizer=Adafactor", "trainer=FSDPTrainer"),
    options("trainer=FSDPTrainer", "fsdp.shard=hybrid"),
    options("trainer=FSDPTrainer", "device=cpu", "fsdp.cpu_offload=true"),
    options("device=cpu", "activation_checkpointing=full", "activation_offload=true"),
    options("activation_offload=true"),
    options("deterministic=true", "optimizer_in_backward=true", "max_grad_norm=0"),
    options("fsdp.shard=none"),
    options("eval_datasets=[rows.jsonl]", "n_eval_examples=2", "eval_generate.n_examples=3"),
    options("eval_datasets=[rows.jsonl]", "eval_generate={n_examples: 1, match: '('}"),
    options("eval_datasets=[rows.jsonl]", "eval_generate={n_examples: 1, match: 'a'}"),
    options("loss=classify", "train_on=last_turn"),
    options("loss=classify", "model.router_aux_loss_coef=0.1"),
    options("model.router_aux_loss_coef=0.1"),
    options("loss=dpo", "mask_truncated=true"),
    options("loss=policy", "truncation=end"),
    options("loss=policy", "eval_datasets=[rows.jsonl]", "eval_generate.n_examples=1"),
    options("loss=classify", "eval_datasets=[rows.jsonl]", "eval_generate.n_examples=1"),
    options("loss=dpo", "datasets=[{path: rows.jsonl, type: text}]"),
    options("loss=some.Class"),
    options("lora={rank: 2, exclude_modules: [proj]}"),
    options("lora={rank: 2, target_modules: [q_proj], exclude_modules: [q_proj]}"),
    options("lora={rank: 2, target_modules: [lm_head], layers_to_transform: [0]}"),
    options("lora={rank: 2, layers_to_transform: [7]}"),
    options("lora={rank: 2, modules_to_save: [nothing]}"),
    options("lora={rank: 2, target_modules: '(a+)+b'}"),
    options("datasets=[model/config.json]"),
    model(lambda: Path("empty").mkdir(), "datasets=[empty]"),
    model(lambda: Path("empty").mkdir(), "datasets=[{path: empty, revision: a}]"),
    options("datasets=[{path: rows.jsonl, split: a}]"),
    model(lambda: (Path("run").mkdir(), shutil.copytree("model", "run/final")), "model.name_or_path=./run"),
    model(lambda: (Path("run").mkdir(), shutil.copytree("model", "run/final")), "model.archive=run"),
    model(lambda: adapter_of(), "model.name_or_path=./lora"),
    model(lambda: adapter_of(), "model.archive=lora"),
    model(lambda: adapter_of(), "model.adapter=lora", LORA),
    model(lambda: adapter_of(), "model.adapter=lora", "soft_prompt.num_virtual_tokens=2"),
    model(lambda: Path("a.parquet").write_text("x"), "datasets=[a.parquet]"),
    adapter(r=...),
    adapter(use_bdlora=True, alora_invocation_tokens=[1]),
    adapter(init_lora_weights="pissa"),
    adapter(task_type="SEQ_CLS"),
    adapter(trainable_token_indices="x"),
    adapter(trainable_token_indices={"nothing": [1]}),
    adapter(trainable_token_indices=[1, 1]),
    adapter(trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
    adapter(target_modules=["lm_head"], ensure_weight_tying=True),
    adapter(target_modules="(a+)+b"),
    rows("sft", {"messages": [TURN, {"role": "assistant", "content": [{"type": "image"}]}]}),
    rows("sft", {"messages": ["a"]}),
    rows("sft", {"messages": [TURN, {"role": "assistant", "content": "b", "weight": 1, "train": False}]}),
    rows("sft", {"messages": [TURN, {"role": "assistant", "content": "b", "weight": 0}]}),
    rows("sft", {"prompt": "a", "response": "b", "chat_template_kwargs": 3}),
    rows("sft", {"prompt": "a", "response": "b"}, tools="missing.json"),
    prompts({"messages": [{"role": "assistant", "content": "b"}]}),
    rows(
        "sft", {"messages": [TURN, {"role": "assistant", "content": ""}, TURN, {"role": "assistant", "content": "b"}]}
    ),
    rows("sft", {"instruction": "a", "output": "b", "history": [1]}),
    rows("sft", {"messages": [TURN, {"role": "assistant", "content": "b"}]}, prompt_template="{prompt}"),
    rows("sft", {"prompt": "a", "response": "b"}, p_oracle=0.5),
    rows("sft", ORACLE | {"documents": 3}),
    rows("sft", ORACLE | {"documents": [3]}),
    rows("sft", ORACLE | {"documents": ["a"]}),
    rows("sft", ORACLE | {"answer": ""}),
    rows("sft", {key: ORACLE[key] for key in ("question", "documents")}),
    rows("sft", {"question": "a", "context": 3, "oracle_context": "b", "answer": "c"}),
    rows("sft", {"question": "a", "distractors": 3, "oracle_context": "b", "answer": "c"}),
    rows("classify", {"text": "", "label": "x"}),
    rows("classify", {"text": "a", "label": "1"}, {"text": "b", "label": "1.0"}),
    rows("{name: classify, class_weights: {z: 2}}", {"text": "a", "label": "x"}, {"text": "b", "label": "y"}),
    rows("kto", {"prompt": "a", "response": "b", "label": True}),
    rows("kto", {"messages": [TURN], "label": True}),
    rows("policy", ROLLOUT | {"response": ""}),
    rows("policy", ROLLOUT | {"prompt": []}),
    rows("policy", {"messages": [], "response": "a", "reward": 1}),
    model(lambda: Path("t.jinja").write_text("{{ messages[0]['content'] }}"), "chat_template=t.jinja"),
    model(lambda: Path("outputs").write_text("x"), "loss={name: kd, teacher_outputs: outputs}"),
    options(LORA, "model.archive=model/model.safetensors"),
    model(lambda: torch.save([1], "a.pt"), "model.archive=a.pt"),
    model(lambda: Path("a.pt").write_text("x"), "model.archive=a.pt"),
    model(lambda: torch.save(other_shape(), "a.pt"), "model.archive=a.pt"),
    adapter("soft_prompt.num_virtual_tokens=2", num_virtual_tokens=3),
    model(lambda: Path("a.json").write_text('[{"prompt": "a"} {}]'), "datasets=[a.json]"),
    model(lambda: Path("a.json").write_bytes(b'[{"prompt": "\xff"}]'), "datasets=[a.json]"),
    options("lr=0x" + "f" * 400),
    rows("policy", {"prompt": "a", "response": "b", "returns": 1}),
    rows("policy", {"prompt": "a", "response": "b", "advantages": 1}),
    rows("policy", {"prompt_ids": [], "response_ids": [1], "reward": 1}),
    model(lambda: two_files(ROLLOUT | {"old_logps": [-1, -1]}, ROLLOUT), "loss=policy", "datasets=[a.jsonl,b.jsonl]"),
    model(lambda: more_tensors("lora={rank: 2}"), "model.adapter=lora"),
    model(lambda: more_tensors("soft_prompt.num_virtual_tokens=2"), "model.adapter=lora"),
    rows("{name: policy, advantages: given}", ROLLOUT),
    rows("{name: policy, kl_coef: 0.1, kl_in: reward}", ROLLOUT, ROLLOUT),
    model(test_bad_model.changed("model/config.json", quantization_config={"quant_method": "gptq"})),
    lambda: ["lora={rank: 2, target_parameters: all-experts}"],
    options("validation_split=0.5", "eval_generate={n_examples: 2, temperature: 0.5}"),
    lambda: ["lora={rank: 2, target_parameters: [experts.gate_up_proj]}"],
]


def two_files(*rows: dict) -> None:
    for name, row in zip(("a.jsonl", "b.jsonl"), rows, strict=True):
        write(name, *[row] * 4)


def more_tensors(settings: str) -> None:
    adapter_of(settings)
    file = "lora/adapter_model.safetensors"
    save_file(load_file(file) | {"visual.weight": torch.ones(2)}, file)


def other_shape() -> dict:
    state = load_file("model/model.safetensors")
    return state | {"model.norm.weight": torch.ones(7)}


def table(test) -> list:
    """The arguments that a test of another file is called with."""
    return next(mark for mark in test.pytestmark if mark.name == "parametrize").args[1]


def prepared_cases():
    """Yield arguments of `validate`, each with its files in the current folder, which is empty before."""
    for overrides, *_ in table(test_bad_input.test_wrong_options):
        yield overrides
    for more, *_ in table(test_bad_input.test_a_config_that_is_no_yaml):
        Path("c.yml").write_bytes(CONFIG.encode() + (more if isinstance(more, bytes) else more.encode()) + b"\n")
        yield []
    for rows, *_ in table(test_bad_data.test_bad_data):
        yield [write("bad.jsonl", *rows)]
    for name, content, *_ in table(test_bad_data.test_a_file_that_is_not_what_its_name_says):
        Path(name).write_bytes(content)
        yield [f"datasets=[{name}]"]
    for loss, rows, *_ in table(test_bad_data.test_data_that_a_loss_cannot_learn_from):
        yield [write("bad.jsonl", *rows), f"loss={loss}"]
    for overrides, *_ in table(test_bad_data.test_options_that_do_not_fit_the_data):
        yield overrides
    for template, *_ in table(test_bad_data.test_a_chat_template_that_is_none):
        Path("t.jinja").write_text(template)
        yield ["chat_template=t.jinja"]
    for spoil, *_ in table(test_bad_model.test_a_folder_that_is_no_model):
        spoil()
        yield []
    for spoil, *_ in table(test_bad_model.test_an_adapter_that_is_none):
        adapter_of()
        spoil()
        yield ["model.adapter=lora"]
    for spoil, *_ in table(test_bad_model.test_a_teacher_that_cannot_teach):
        shutil.copytree("model", "teacher")
        spoil()
        yield ["loss={name: kd, teacher: teacher}"]
    for prepare in MORE:
        yield prepare()


@pytest.mark.slow(minutes=1)
def test_each_refusal_is_reached(tmp_path, monkeypatch, llama_folder, rows_file):
    """`validate` reaches each place that can refuse a training, or the place is listed above."""

    def start_over(place: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        monkeypatch.chdir(place)
        fill_folder(llama_folder, rows_file)

    start_over(tmp_path / "a")
    with reached(monkeypatch) as noted:
        for overrides in prepared_cases():
            main(["validate", "c.yml", *(["--overrides", *overrides] if overrides else [])])
            start_over(tmp_path / "a")
        for case, make in test_validate_refusals.CASES.items():
            folder = tmp_path / case.replace(" ", "-")
            folder.mkdir()
            path, *_ = make(
                functools.partial(test_validate_refusals.config_file, folder, llama_folder), folder, llama_folder
            )
            main(["validate", path])
    known = sites()
    unreached = set(known.values()) - {known[place] for place in noted if place in known}
    unreached = {name for name in unreached if name.partition(":")[0] not in PYTHON_ONLY}
    listed = {name for names in UNREACHED.values() for name in names}
    assert not (new := sorted(unreached - listed - {*ELSEWHERE})), "\n".join(new)
    assert not (old := sorted(listed - unreached)), "reached, or gone:\n" + "\n".join(old)


@pytest.mark.parametrize("number", range(len(MORE)))
def test_both_refuse(both_fail, number):
    """Training and `validate` refuse in the same words (see `both_fail`)."""
    both_fail(*MORE[number]())
