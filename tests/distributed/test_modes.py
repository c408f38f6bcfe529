"""FSDPTrainer with every kind of model, precision and mesh trains what one process does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitrain.model.tiny import tiny_tokenizer
from tests.distributed.launch import launch, trace
from tests.distributed.test_fsdp import figures, same_training
from tests.losses.test_rollouts import rows
from tests.messages import reports
from tests.model.test_dequantize import as_fp8
from tests.model.test_dtypes import MODELS as MADE_IN_FLOAT32
from tests.model.test_policy import MODELS
from tests.model.test_router import MODELS as MOE

EVERYTHING = pytest.mark.slow


def random_folder(name: str, folder: Path) -> Path:
    """A small random model of 128 tokens, fewer than the tokenizer has, so that rows must be added."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize(
    "names", [("gpt2", "phi-bias"), pytest.param(("qwen2-tied", "gemma2-softcap", "mistral-window"), marks=EVERYTHING)]
)
def test_other_architectures(job, scratch, tmp_path, names):
    """Read by rows with rows added, tied or not; what is saved is what was trained, tied weights once."""
    folders = {name: random_folder(name, tmp_path) for name in names}
    settings = ("loss.name=dft", "eval_generate.n_examples=4", "eval_generate.max_new_tokens=8", "validation_split=6")
    alone = {n: job(f"alone-{n}", f"model.name_or_path={f}", *settings) for n, f in folders.items()}
    ranked = {n: job(f"ranks-{n}", f"model.name_or_path={f}", *settings, fsdp="full") for n, f in folders.items()}
    launch(0, list(alone.values()), scratch / "alone")
    launch(2, list(ranked.values()), scratch / "ranks")
    for name in names:
        same_training(ranked[name], alone[name])
        found, wanted = (figures(each[name], "eval") for each in (ranked, alone))
        assert [row["exact_match"] for row in found] == [row["exact_match"] for row in wanted]
        final = Path(ranked[name]["config"]["output_dir"]) / f"ranks-{name}" / "final"
        saved, trained = AutoModelForCausalLM.from_pretrained(final).state_dict(), load_file(ranked[name]["ended"])
        assert all(torch.equal(tensor, saved[key]) for key, tensor in trained.items() if not key.startswith("moments/"))
        kept = load_file(final / "model.safetensors")
        assert ("lm_head.weight" in kept) == (name in ("phi-bias", "mistral-window"))


def test_router_auxiliary_loss(job, scratch, tmp_path):
    """The choices of a step are those of all micro-batches and ranks, and so are the metrics of the load."""
    torch.manual_seed(0)
    folder = tmp_path / "moe"
    MOE["qwen3-moe"]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    settings = (f"model.name_or_path={folder}", "model.router_aux_loss_coef=0.5")
    changes = {"": (), "-parts": ("gradient_accumulation_steps=2",)}
    changes["-recomputed"] = ("activation_checkpointing=true", "packing=true")
    alone = {name: job(f"alone{name}", *settings, *more) for name, more in changes.items()}
    ranked = {name: job(f"ranks{name}", *settings, *more, fsdp="full") for name, more in changes.items()}
    ranked[""]["config"]["fsdp"] = {"shard": "grad"}
    launch(0, list(alone.values()), scratch / "alone")
    launch(2, list(ranked.values()), scratch / "ranks")
    for name, ours in ranked.items():
        for wanted in (alone[name], alone[""]):
            same_training(ours, wanted)
            for mine, theirs in zip(figures(ours), figures(wanted), strict=True):
                for key in ("router/aux_loss", "router/max_violation", "router/unused_experts"):
                    assert mine[key] == pytest.approx(theirs[key], rel=1e-5), key


def test_quantized_base(job, scratch, tmp_path):
    """An FP8 base is dequantized for each rank, and what is saved are ordinary weights."""
    folder = random_folder("qwen2-tied", tmp_path)
    as_fp8(folder, block=(24, 24))
    settings = (f"model.name_or_path={folder}",)
    alone, ours = job("alone", *settings), job("ranks", *settings, fsdp="full")
    launch(0, [alone], scratch / "alone")
    launch(2, [ours], scratch / "ranks")
    same_training(ours, alone)
    saved = AutoModelForCausalLM.from_pretrained(Path(ours["config"]["output_dir"]) / "ranks" / "final")
    trained = load_file(ours["ended"])
    assert all(torch.equal(value, trained[name]) for name, value in saved.state_dict().items() if name in trained)


@pytest.mark.parametrize("dtype, rtol", [("bfloat16", 2e-2), ("float16", 5e-3)])
def test_mixed_precision(job, scratch, dtype, rtol):
    """Blocks gathered in policy_dtype compute what autocast does: same losses and norms to the dtype's rounding."""
    settings = (f"model.policy_dtype={dtype}", "gradient_accumulation_steps=2", "loss.name=dft")
    alone, *ranked = job("alone", *settings), job("full", *settings, fsdp="full"), job("none", *settings, fsdp="none")
    launch(0, [alone], scratch / "alone")
    launch(2, ranked, scratch / "ranks")
    for ours in ranked:
        for mine, theirs in zip(figures(ours), figures(alone), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=rtol)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5 * rtol)
        ended = load_file(ours["ended"])
        assert all(tensor.dtype == torch.float32 for tensor in ended.values())


def test_layer_norms_in_half_precision(job, scratch, tmp_path):
    """Blocks gathered in bfloat16 beside a float32 residual stream, which the CPU refuses; the model on the way is that
    of its step."""
    folder = random_folder("gpt2", tmp_path)
    settings = (f"model.name_or_path={folder}", "model.policy_dtype=bfloat16", "save_models_every_steps=2")
    alone, ours = job("alone", *settings), job("ranks", *settings, fsdp="full")
    launch(0, [alone], scratch / "alone")
    launch(2, [ours], scratch / "ranks")
    for mine, theirs in zip(figures(ours), figures(alone), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
    runs = Path(ours["config"]["output_dir"])
    saved = [load_file(runs / name / "models" / "step-2" / "model.safetensors") for name in ("ranks", "alone")]
    for name, tensor in saved[0].items():
        torch.testing.assert_close(tensor.float(), saved[1][name].float(), rtol=0, atol=5e-2)


def test_two_machines(job, scratch):
    """hybrid: cut over two ranks of each of two machines, repeated across."""
    settings = ("gradient_accumulation_steps=2", "save_every_steps=2")
    alone, ours = job("alone", *settings), job("hybrid", *settings, fsdp="hybrid")
    launch(0, [alone], scratch / "alone")
    launch(4, [ours], scratch / "ranks", machines=2)
    same_training(ours, alone)
    checkpoint = Path(ours["config"]["output_dir"]) / "hybrid" / "checkpoints" / "step-2"
    held = [len(load_file(checkpoint / f"model-{rank}.safetensors")) for rank in range(4)]
    assert held[0] and held[1] and not held[2] and not held[3]  # the second machine has nothing of its own


def test_one_rank_without_a_launcher(job, scratch):
    """FSDPTrainer on one device is BasicTrainer."""
    alone, ours = job("alone"), job("one", fsdp="full")
    launch(0, [alone, ours], scratch)
    same_training(ours, alone)


def test_an_archive_takes_the_place_of_the_files(job, scratch, llama_folder, tmp_path):
    """model.archive: each rank reads its rows of the state dict."""
    weights = load_file(llama_folder / "model.safetensors")
    changed = {name: tensor * 1.5 for name, tensor in weights.items()}
    torch.save({"state": changed}, tmp_path / "policy.pt")
    save_file(changed, tmp_path / "policy.safetensors")
    files = [f"model.archive={tmp_path / name}" for name in ("policy.pt", "policy.safetensors")]
    alone = job("alone", files[0])
    ranked = [job(f"ranks-{i}", file, fsdp="full") for i, file in enumerate(files)]
    launch(0, [alone], scratch / "alone")
    launch(2, ranked, scratch / "ranks")
    for ours in ranked:
        same_training(ours, alone)


def test_early_stopping_and_best_model(job, scratch):
    """All ranks stop after the same evaluation, and best/ holds the model of the best one."""
    settings = ("validation_split=8", "eval_every_steps=1", "n_steps=8", "save_best=true")
    settings += ("early_stopping.patience=2", "early_stopping.threshold=1")
    alone, ours = job("alone", *settings), job("ranks", *settings, fsdp="full")
    launch(0, [alone], scratch / "alone")
    output = launch(2, [ours], scratch / "ranks")
    assert output.count("stopping early") == 1
    steps = [line[0] for line in trace(Path(ours["trace"]))]
    assert steps == [line[0] for line in trace(Path(alone["trace"]))] and len(steps) < 8
    found, wanted = (Path(each["config"]["output_dir"]) / each["config"]["exp_name"] / "best" for each in (ours, alone))
    found, wanted = (load_file(folder / "model.safetensors") for folder in (found, wanted))
    assert all(torch.allclose(found[name], wanted[name], atol=5e-4) for name in wanted)


def test_actor_and_critic_on_two_ranks(job, scratch, tmp_path):
    """A joined step with old values, a KL to a second model and a temperature, whole groups cut over ranks and
    micro-batches: that of one process, value head and all (transformers#34242)."""
    file = tmp_path / "rollouts.jsonl"
    given = rows(old_logps=lambda n: [-5.0] * n, values=lambda n: [0.1 * k for k in range(n)])
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    settings = [f"datasets=[{file}]", "loss.name=policy", "loss.vf_coef=0.5", "loss.temperature=0.8"]
    settings += ["loss.kl_coef=0.2", "gradient_accumulation_steps=2", "validation_split=5"]
    wanted = {
        "group": (*settings, "loss.loss_aggregation=grpo", "loss.importance_sampling_level=sequence"),
        "gae": (
            *settings,
            "loss.advantage_estimator=gae",
            "loss.kl_in=loss",
            "packing=true",
            "model.name_or_path=tiny",
        ),
    }
    alone = {name: job(f"alone-{name}", *more) for name, more in wanted.items()}
    ranked = {name: job(f"ranks-{name}", *more, fsdp="full") for name, more in wanted.items()}
    launch(0, list(alone.values()), scratch / "alone")
    launch(2, list(ranked.values()), scratch / "ranks")
    for name in wanted:
        same_training(ranked[name], alone[name], rtol=2e-5)
        ours, theirs = (figures(each[name], "eval")[-1] for each in (ranked, alone))
        for key in ours.keys() - {"seconds", "kind"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


def test_dropout_differs_between_ranks(job, scratch, tmp_path):
    """Of a row given twice, each rank drops something else: the loss is not that of the row given once, which it would
    be if both drew the same numbers (pytorch#5059)."""
    for n in (1, 2):
        (tmp_path / f"{n}.jsonl").write_text('{"prompt": "say it", "response": "and once more"}\n' * n)
    losses = {}
    for dropout in (0.0, 0.3):
        given = [(f"datasets=[{tmp_path / f'{n}.jsonl'}]", f"total_batch_size={n}", "n_steps=1") for n in (1, 2)]
        once = job(f"once-{dropout}", *given[0], dropout=dropout)
        twice = job(f"twice-{dropout}", *given[1], fsdp="full", dropout=dropout)
        launch(0, [once], scratch / f"once-{dropout}")
        launch(2, [twice], scratch / f"twice-{dropout}")
        losses[dropout] = [figures(each)[0]["loss"] for each in (once, twice)]
    assert losses[0.0][0] == pytest.approx(losses[0.0][1], rel=1e-6)
    assert losses[0.3][0] != pytest.approx(losses[0.3][1], rel=1e-3)


@EVERYTHING
def test_compiled_blocks(job, scratch):
    """compile=true under FSDP."""
    alone, ours = job("alone"), job("compiled", "compile=true", fsdp="full")
    launch(0, [alone], scratch / "alone")
    launch(2, [ours], scratch / "ranks")
    same_training(ours, alone, rtol=1e-4)


def test_a_mistake_is_told_once_and_before_the_model(job, scratch):
    """A wrong option and a wrong row under two ranks: exit code 2, no traceback, the message of rank 0."""
    wrong = job("wrong", "lrr=1", fsdp="full")
    output = launch(2, [wrong], scratch / "option", expect=2)
    assert reports(output, "unknown-option", "lrr: ") and "Traceback" not in output
    rows = scratch / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    output = launch(2, [job("row", f"datasets=[{rows}]", fsdp="full")], scratch / "row", expect=2)
    assert reports(output, "invalid-row", f"{rows}:2: ") and "Traceback" not in output


def test_shards_keep_what_transformers_keeps_in_float32(job, scratch, tmp_path):
    """A router that the class makes in float32: at lr 0, ranks save what transformers loads in bfloat16."""
    config, _ = MADE_IN_FLOAT32["a linear layer that is made in float32"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    options = (f"model.name_or_path={tmp_path / 'base'}", "model.policy_dtype=bfloat16", "lr=0", "n_steps=1")
    launch(2, [job("sharded", *options, fsdp="full")], scratch)
    base, saved = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        for folder in (tmp_path / "base", tmp_path / "runs" / "sharded" / "final")
    )
    assert torch.float32 in {tensor.dtype for tensor in saved.values()}
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.items())
