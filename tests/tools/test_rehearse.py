"""`minitrain rehearse`: what would end a run ends its rehearsal, which leaves nothing behind."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from minitrain import RunError, load_config
from minitrain.cli.main import main
from minitrain.model.tiny import tiny_tokenizer
from minitrain.tools.rehearsal import ranks, rehearse
from minitrain.tools.rehearsal.on_cpu import parse_for_cpu
from minitrain.tools.rehearsal.rehearse import Rehearsal
from minitrain.tools.rehearsal.small_run import small_config
from minitrain.training.setup import dry_run
from tests.conftest import write
from tests.messages import raises
from tests.tools.test_validate import ENDLESS

FAILING_REWARD = """
from minitrain.rl.rewards import NoOptions, register_reward

@register_reward("seeded", NoOptions)
def seeded(answer, options):
    return answer.row["missing"]
"""
ROLLOUT = '{"num_generations": 4, "prompts_per_round": 8, "max_new_tokens": 8, "rewards": [%s]}'


@pytest.fixture
def temporary(folder, monkeypatch):
    """The parent of temporary folders, which is empty in the end."""
    parent = folder / "temporary"
    parent.mkdir()
    monkeypatch.setattr(rehearse.tempfile, "tempdir", str(parent))
    yield parent
    assert not list(parent.iterdir())


@pytest.fixture
def finds(temporary, capsys, monkeypatch):
    """``finds("lr=x")``: (exit code, stdout, stderr) of a rehearsal that ends before it starts a process."""

    def start(*args):
        raise RunError("a process would start", "process-failed")

    monkeypatch.setattr(rehearse, "run_ranks", start)

    def finds(*overrides: str, arguments: tuple[str, ...] = ()) -> tuple[int, str, str]:
        code = main(["rehearse", "c.yml", *arguments, *(["--overrides", *overrides] if overrides else [])])
        return (code, *capsys.readouterr())

    return finds


# ------------------------------------------------------------------------------------------------------ seeded faults


def test_a_folder_that_cannot_be_written(finds):
    Path("out").touch()
    code, _, err = finds()
    assert code == 2 and "out/c: cannot be written" in err and err.endswith("[not-writable]\n")


def test_a_template_without_an_end(finds):
    Path("t.jinja").write_text(ENDLESS)
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")] * 2
    code, _, err = finds("chat_template=t.jinja", write("turns.jsonl", *[{"messages": turns}] * 9))
    assert code == 2 and "turns.jsonl:1" in err and err.endswith("[wrong-tokens]\n")


@pytest.mark.parametrize("package, override", [("swanlab", "swanlab.enabled=true"), ("bitsandbytes", "8bit")])
def test_a_package_that_is_missing(finds, monkeypatch, package, override):
    found = importlib.util.find_spec

    def find_spec(name, *args):
        return None if name == package else found(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    for module in [module for name, module in sys.modules.items() if name.startswith("minitrain.")]:
        if getattr(module, "find_spec", None) is found:
            monkeypatch.setattr(module, "find_spec", find_spec)
    more = ["lora.rank=2", "model.quantization=8bit"] if override == "8bit" else [override]
    code, _, err = finds(*more)
    assert code == 2 and f"package {package} is not installed" in err and "[not-installed]" in err


def test_a_row_that_is_too_long(finds):
    """Truncated rows are a warning, that a user may want; one that the model cannot take ends the rehearsal."""
    rows = [{"prompt": "a", "response": "b"}] * 20 + [{"prompt": "c" * 3000, "response": "d"}]
    override = write("long.jsonl", *rows)
    code, out, err = finds(override, "max_length=64")
    assert code == 1 and "a process would start" in err
    assert "warning: rows left out or truncated: 1 " in out and "truncated" in out
    size = {"vocab_size": len(tiny_tokenizer()), "n_positions": 32, "n_embd": 32, "n_head": 2, "n_layer": 1}
    GPT2LMHeadModel(GPT2Config(**size, eos_token_id=2, pad_token_id=0)).save_pretrained("gpt")
    tiny_tokenizer().save_pretrained("gpt")
    code, _, err = finds(override, "max_length=64", "model.name_or_path=gpt")
    assert code == 2 and "long.jsonl:21 has 64 tokens" in err and err.endswith("[too-large]\n")


@pytest.mark.parametrize("unjudged", [{"unjudged": 0.25}, {"unjudged": 0.0, "unjudged/seeded": 0.25}])
def test_a_reward_function_that_fails(finds, monkeypatch, unjudged):
    """By the metrics of the rounds of the first process and the reasons in its log, also if others judge the answer."""

    def start(command, n_ranks, n_machines, logs, environment):
        run = Path(json.loads(json.dumps(str(logs.parent)))) / "runs" / "c"
        (run / "checkpoints" / "step-2").mkdir(parents=True)
        row = {"step": 0, "kind": "rollout", **unjudged}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        logs.mkdir()
        (logs / "0.txt").write_text("warning: reward seeded: KeyError: 'missing' (4 answers)\n")
        return [-signal.SIGKILL]

    monkeypatch.setattr(rehearse, "run_ranks", start)
    code, out, err = finds()
    assert code == 1 and "25% of the answers were not judged" in err and "KeyError: 'missing'" in err
    assert err.endswith("[plugin-failed]\n") and "tried:" not in out


@pytest.mark.slow(minutes=1)
def test_a_reward_function_that_fails_in_processes(temporary, capsys):
    Path("seeded.py").write_text(FAILING_REWARD)
    options = ["loss.name=policy", "rollout=" + ROLLOUT % '"seeded"']
    assert main(["rehearse", "c.yml", "--plugin", "seeded.py", "--overrides", *options]) == 1
    _, err = capsys.readouterr()
    assert "100% of the answers were not judged" in err and "KeyError" in err and not Path("out").exists()


# ----------------------------------------------------------------------------------------------------- what it does

RUNS = {
    "FSDP, LoRA, wandb": ["trainer=FSDPTrainer", "lora.rank=4", "validation_split=5", "report_to_tensorboard=false"],
    "4 bits": ["lora.rank=4", "model.quantization=4bit", "validation_split=5"],
    "online": ["loss.name=policy", "rollout=" + ROLLOUT % '"exact_match"', "validation_split=5"],
    "online preferences": ["loss.name=dpo", "rollout=" + ROLLOUT % '"exact_match"'],
    "two machines": ["trainer=FSDPTrainer", "fsdp.shard=hybrid"],
    "classifier": ["loss.name=classify", "datasets=[labels.jsonl]"],
    "teacher": ["loss={name: kd, teacher: model}"],
}


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_rehearsed(temporary, capsys, name):
    """From the first step to an answer of the final model; the run directory and its parent do not exist."""
    if name == "4 bits":
        pytest.importorskip("bitsandbytes")
    write("labels.jsonl", *({"text": f"say {i}", "label": "ab"[i % 2]} for i in range(20)))
    assert main(["rehearse", "c.yml", "--overrides", *RUNS[name]]) == 0, capsys.readouterr()
    out, _ = capsys.readouterr()
    tried, untried = out.partition("tried:\n")[2].split("not tried:\n")
    assert (
        "resuming from step-2" in out and "final model" in tried and "weights" in untried and not Path("out").exists()
    )
    if "trainer=FSDPTrainer" in RUNS[name]:
        n = 4 if name == "two machines" else 2
        assert f"written on {n} ranks; kill -9 after step 2; read on {'2 ranks' if n == 4 else '1 process'}" in tried
    if "online" in name:
        assert "rounds of" in tried and "reward" in tried


def small(folder: Path, *overrides: str, n_ranks: int = 2):
    config, shard, untried = parse_for_cpu("c.yml", overrides)
    config, model, more = small_config(config, folder, n_ranks, shard)
    return config, model, untried | more


def test_the_small_run(folder, tmp_path):
    """It has the data, the loss and the layout of the run, and is three steps of a few examples elsewhere."""
    options = ("batch_size=64", "gradient_accumulation_steps=4", "validation_split=9", "eval_every_steps=500")
    more = ("early_stopping.patience=1", "eval_generate.n_examples=9", "max_minutes=3", "n_steps=900")
    config, model, untried = small(tmp_path / "s", *options, *more, "freeze_layers=[1]", "trainer=FSDPTrainer")
    assert (config.n_steps, config.total_batch_size, config.gradient_accumulation_steps) == (3, 8, 2)
    assert config.output_dir == str(tmp_path / "s" / "runs") and config.max_minutes is None
    assert (config.n_eval_examples, config.eval_generate.n_examples, config.early_stopping.patience) == (8, 2, 100)
    assert config.datasets[0].path == "rows.jsonl" and config.freeze_layers == [0] and config.device == "cpu"
    assert config.model.name_or_path == str(tmp_path / "s" / "model") and "LlamaForCausalLM" in model
    assert "model" in untried["weights"] and "900 steps" in untried["length"]


def test_evaluations_are_short(folder, tmp_path):
    """Of the evaluation data and of the retention data; all rows of both are read and checked before."""
    options = ("datasets=[rows.jsonl]", "validation_split=9", "retention_datasets=[rows.jsonl]")
    assert len(dry_run(load_config("c.yml", overrides=options)).retention_loader.examples) > 8
    run = dry_run(small(tmp_path / "s", *options, n_ranks=1)[0])
    assert len(run.eval_loader.examples) == len(run.retention_loader.examples) == 8


def test_what_needs_a_gpu_is_named(folder, tmp_path):
    options = ("compile=true", "activation_offload=true", "device=cuda")
    of_model = ("model.attn_implementation=flash_attention_2", "model.float8=rowwise")
    config, _, untried = parse_for_cpu("c.yml", [*options, *of_model])
    assert untried.keys() == {"GPU", "attention", "FP8", "dtype", "compile", "offloading"}
    assert config.model.float8 is None and not config.compile and config.model.attn_implementation == "auto"
    assert config.device == "cpu"


def test_rounds_stay_rounds(folder, tmp_path):
    """One step or several in a round, as in the run; answers of random weights end, and their rewards differ."""
    one = ["loss.name=policy", "batch_size=8", "rollout=" + ROLLOUT % '"exact_match"']
    for overrides, n in ((one, 1), ([*one, "rollout.prompts_per_round=32"], 2)):
        config, _, untried = small(tmp_path / str(n), *overrides, n_ranks=1)
        assert config.rollout.prompts_per_round == n * config.total_batch_size
        assert [entry if isinstance(entry, str) else entry["name"] for entry in config.rollout.rewards] == [
            "exact_match",
            "length",
        ]
        assert config.rollout.engine == "local" and "e" in config.rollout.stop and "rewards" in untried


@pytest.mark.parametrize(
    "overrides, n", [((), "2"), (("trainer=FSDPTrainer", "fsdp.shard=hybrid"), "3")], ids=["one device", "hybrid"]
)
def test_numbers_of_ranks_that_do_not_fit(finds, overrides, n):
    code, _, err = finds(*overrides, arguments=("--ranks", n))
    assert code == 2 and err.startswith("minitrain: --ranks: ") and err.endswith("[conflict]\n")


# ---------------------------------------------------------------------------------------------------- its processes


def script(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", "import os, sys, time, signal\nrank = os.environ['RANK']\n" + text]


def test_ranks_know_where_they_are(tmp_path):
    text = "print(rank, *(os.environ[n] for n in ('LOCAL_RANK', 'GROUP_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'X')))"
    assert ranks.run_ranks(script(text), 4, 2, tmp_path / "logs", {"X": "x"}) == [0, 0, 0, 0]
    logs = [(tmp_path / "logs" / f"{rank}.txt").read_text().split() for rank in range(4)]
    assert logs == [[*map(str, (rank, rank % 2, rank // 2, 4, 2)), "x"] for rank in range(4)]


def test_when_a_rank_fails_the_others_end(tmp_path, monkeypatch):
    """And what they have started; here a process that the rank which waits has started itself."""
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.1)
    child = f"import subprocess; subprocess.Popen([{sys.executable!r}, '-S', '-c', 'import time; time.sleep(99)'])\n"
    began = time.monotonic()
    text = f"sys.exit(3) if rank == '1' else None\n{child}print('started', flush=True)\ntime.sleep(99)"
    codes = ranks.run_ranks(script(text), 2, 1, tmp_path / "logs", {})
    assert codes == [-signal.SIGKILL, 3] and time.monotonic() - began < 60
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "time.sleep(99)" not in listed


@pytest.mark.parametrize(
    "logs, codes, code, text",
    [
        (
            ["step 1\nminitrain: out: disk full [no-space]\n", "minitrain: rank 1: other [locked]"],
            [1, 1],
            "no-space",
            "disk",
        ),
        (["", "Traceback\nValueError: seeded\n"], [-9, 1], "process-failed", "seeded"),
        (
            ["", "minitrain: 1 problem in the configuration\n  c.yml:1: lr: x [no-effect]\n"],
            [0, 2],
            "no-effect",
            "c.yml:1",
        ),
    ],
)
def test_the_error_of_a_process(folder, tmp_path, logs, codes, code, text):
    (tmp_path / "phase").mkdir()
    for rank, log in enumerate(logs):
        (tmp_path / "phase" / f"{rank}.txt").write_text(log)
    error = Rehearsal(load_config("c.yml"), tmp_path, [], False).failure("phase", codes, "the training")
    with raises(RunError, code, "the training failed", text):
        raise error
