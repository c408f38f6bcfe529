"""Interrupted and resumed equals uninterrupted, bit for bit; damaged, foreign and finished runs are told apart."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from minitrain import RunError
from minitrain.training.atomic_dir import atomic_folder, checkpoints, fingerprint
from tests.conftest import metrics, weights
from tests.messages import raises

DROPOUT = 0.2


def with_dropout(trainer):
    """Attention dropout, so that random numbers matter."""
    for module in trainer.policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = DROPOUT
    return trainer


def trace(trainer) -> list:
    """(step, loss bits) as logged."""
    return [(row["step"], row["loss"]) for row in metrics(trainer)]


def stop_at_1(trainer):
    """Stops as a signal does."""
    if trainer.step == 1:
        trainer._received = signal.SIGTERM


OPTIONS = ("n_steps=9", "total_batch_size=6", "gradient_accumulation_steps=2", "save_every_steps=1", "warmup_steps=2")


@pytest.fixture
def oracle(make_trainer):
    """An uninterrupted run: 40 examples in steps of 6, so that an epoch ends in step 7 with a short step."""
    trainer = with_dropout(make_trainer("exp_name=oracle", *OPTIONS))
    trainer.train()
    return trainer


@pytest.mark.parametrize("stop", [1, 4, 6, 7, 8])
def test_resumed_equals_uninterrupted_bit_for_bit(make_trainer, oracle, stop):
    """Order, dropout, moments and schedule: stopped within and at the border of an epoch
    (accelerate#4203, transformers#46628)."""

    def interrupt(trainer):
        if trainer.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    first = with_dropout(make_trainer(*OPTIONS, on_step_end=interrupt))
    first.train()
    assert first.signal == signal.SIGTERM and first.step == stop
    torch.manual_seed(12345)  # another process would have another state
    second = with_dropout(make_trainer(*OPTIONS))
    second.train()
    assert trace(second) == trace(oracle)
    for name, p in weights(oracle).items():
        assert torch.equal(weights(second)[name], p), name
    assert second.consumed == oracle.consumed


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor", "RMSprop", "NAdam", "Adagrad", "ASGD"])
def test_the_state_of_any_optimizer_is_restored(make_trainer, optimizer):
    """Steps, moments and scalars of each kind."""
    options = ("n_steps=4", "save_every_steps=2", f"optimizer={optimizer}", "lr_scheduler=constant")
    whole = make_trainer("exp_name=whole", *options)
    whole.train()
    half = make_trainer(*options, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 2 else None)
    half.train()
    rest = make_trainer(*options)
    rest.train()
    assert all(torch.equal(p, weights(rest)[name]) for name, p in weights(whole).items())


def test_float16_scale_is_part_of_the_state(make_trainer):
    """The loss scale goes on from where it was."""
    options = ("model.policy_dtype=float16", "n_steps=3", "save_every_steps=1")
    first = make_trainer(*options, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 1 else None)
    first.precision.scale = 512.0
    first.train()
    second = make_trainer(*options)
    second.train()
    assert second.precision.scale == 512.0 and second.precision.clean_steps == 3


def test_only_the_newest_checkpoints_are_kept_and_debris_is_cleared(make_trainer):
    """keep_checkpoints counts committed ones; what a crash left is removed."""
    trainer = make_trainer("n_steps=5", "save_every_steps=1", "keep_checkpoints=2")
    debris = trainer.run.checkpoints / ".tmp-step-9-dead"
    debris.mkdir(parents=True)
    trainer.train()
    assert [path.name for path in checkpoints(trainer.run.checkpoints)] == ["step-4", "step-5"]
    assert not debris.exists()


def damage(folder, how: str) -> None:
    manifest = folder / "manifest.json"
    if how == "no manifest":
        return manifest.unlink()
    if how == "manifest edited":
        content = json.loads(manifest.read_text())
        content["files"]["rng-0.safetensors"]["sha256"] = "0" * 64
        return manifest.write_text(json.dumps(content))
    file = folder / "optimizer-0.safetensors"
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "truncated":
        file.write_bytes(data[:-7])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "deleted":
        file.unlink()
    elif how == "swapped":
        other = folder / "model-0.safetensors"
        other.rename(folder / "x")
        file.rename(other)
        (folder / "x").rename(file)


@pytest.mark.parametrize(
    "how", ["flipped", "truncated", "empty", "deleted", "swapped", "no manifest", "manifest edited"]
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(make_trainer, oracle, how, capsys):
    """The newest is damaged: said by file name, the one before is used, the end is the same."""
    options = (*OPTIONS, "keep_checkpoints=3")
    first = with_dropout(
        make_trainer(*options, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 5 else None)
    )
    first.train()
    damage(first.run.checkpoint(5), how)
    second = with_dropout(make_trainer(*options))
    second.train()
    assert second.checkpoint == first.run.checkpoint(4)
    named = "manifest.json is missing" if how == "no manifest" else ".safetensors"
    assert any("step-5" in line and named in line for line in capsys.readouterr().out.splitlines())
    assert all(torch.equal(p, weights(second)[name]) for name, p in weights(oracle).items())


def test_never_silently_back_to_step_zero(make_trainer):
    """When no checkpoint is sound the run refuses; a damaged one that was named is an error too."""
    first = make_trainer("save_every_steps=1", on_step_end=stop_at_1)
    first.train()
    damage(first.run.checkpoint(1), "flipped")
    with raises(RunError, "damaged-file", f"{first.run.checkpoint(1)}"):
        make_trainer("save_every_steps=1").train()
    with raises(RunError, "damaged-file", "optimizer-0.safetensors: "):
        make_trainer("save_every_steps=1", f"resume={first.run.checkpoint(1)}").train()


def test_a_manifest_cannot_name_files_elsewhere(make_trainer):
    """A path with .. in a manifest is refused."""
    first = make_trainer("save_every_steps=1", on_step_end=stop_at_1)
    first.train()
    manifest = first.run.checkpoint(1) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["../../x"] = {"bytes": 0, "sha256": ""}
    manifest.write_text(json.dumps(content))
    with raises(RunError, "damaged-file", "'../../x'"):
        make_trainer("save_every_steps=1", f"resume={manifest.parent}").train()


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(make_trainer, capsys, wording):
    """Running it again says so; with more steps it continues from its checkpoint."""
    options = ("save_every_steps=3", "lr_scheduler=constant")
    first = make_trainer(*options)
    first.train()
    capsys.readouterr()
    again = make_trainer(*options)
    assert again.train() == {} and again.step == 0
    wording(capsys.readouterr().out)
    longer = make_trainer(*options, "n_steps=5")
    longer.train()
    assert longer.step == 5 and [row["step"] for row in metrics(longer)] == [1, 2, 3, 4, 5]
    whole = make_trainer(*options, "n_steps=5", "exp_name=whole")
    whole.train()
    assert all(torch.equal(p, weights(longer)[name]) for name, p in weights(whole).items())


def test_a_run_of_an_older_version_is_resumed(make_trainer):
    """Its config.yml and its checkpoint lack newer options, which are at their default; other values are refused."""
    trainer = make_trainer("save_every_steps=2", "n_steps=2")
    trainer.train()
    for file in (trainer.run.path / "config.yml", trainer.run.checkpoint(2) / "state.json"):
        content = yaml.safe_load(file.read_text())
        for saved in (content, content.get("config", {})):
            saved.pop("rollout", None)
            saved.get("lora", {}).pop("target_parameters", None)
        file.write_text(yaml.safe_dump(content) if file.suffix == ".yml" else json.dumps(content))
    make_trainer("save_every_steps=2", "n_steps=2")
    with raises(RunError, "other-run", "allow_changes=[lora.rank]"):
        make_trainer("save_every_steps=2", "n_steps=2", "lora.rank=2")


def test_other_options_are_refused_with_the_difference(make_trainer):
    """What changes the numbers may not change under a run that goes on; what does not, may."""
    make_trainer("save_every_steps=3").train()
    with raises(RunError, "other-run", "lr: 0.01 -> 0.02", "allow_changes=[lr]"):
        make_trainer("save_every_steps=3", "lr=0.02")
    make_trainer("save_every_steps=3", "log_every_steps=2")
    with raises(RunError, "other-run", "seed: 0 -> 1", "allow_changes=[seed]") as caught:
        make_trainer("save_every_steps=3", "lr=0.02", "seed=1", "allow_changes=[lr]")
    assert "lr: 0.01" not in str(caught.value)


def test_other_data_are_refused(make_trainer, rows_file, tmp_path):
    """The same file name with other content is another data set."""
    copy = tmp_path / "copy.jsonl"
    copy.write_text(rows_file.read_text())
    options = (f"datasets=[{copy}]", "save_every_steps=1", "n_steps=3")
    make_trainer(*options, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 1 else None).train()
    copy.write_text(rows_file.read_text().replace("say 1", "say one"))
    with raises(RunError, "other-run", "allow_changes=[datasets]"):
        make_trainer(*options).train()
    going_on = make_trainer(*options, "allow_changes=[datasets]")
    going_on.train()
    assert going_on.checkpoint is not None and going_on.step == 3


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_another_base_model_is_refused(make_trainer, llama_folder, tmp_path, file):
    """Weights, or a tokenizer that gives other ids, changed under a run that goes on."""
    folder = shutil.copytree(llama_folder, tmp_path / "base")
    options = (f"model.name_or_path={folder}", "save_every_steps=1", "freeze_layers=[0]")
    make_trainer(*options, on_step_end=lambda t: setattr(t, "_received", 15) if t.step == 1 else None).train()
    changed = folder / file
    if file.endswith(".json"):
        changed.write_text(changed.read_text().replace('"a":', '"@":').replace('"b":', '"a":').replace('"@":', '"b":'))
    else:
        save_file({name: tensor * 1.01 for name, tensor in load_file(changed).items()}, changed)
    key = "datasets" if file.endswith(".json") else "model"
    with raises(RunError, "other-run", f"allow_changes=[{key}]"):
        make_trainer(*options).train()
    allowed = make_trainer(*options, "allow_changes=[datasets, model]")
    allowed.train()
    assert allowed.step == 3


def test_an_index_cannot_name_files_elsewhere(make_trainer, tmp_path):
    """A checkpoint whose hashes are right and whose index leads out of it is refused."""
    first = make_trainer("save_every_steps=1", on_step_end=stop_at_1)
    first.train()
    folder = first.run.checkpoint(1)
    shutil.copy(folder / "model-0.safetensors", tmp_path / "elsewhere.safetensors")
    index = (folder / "index.json").read_text().replace("model-0.safetensors", str(tmp_path / "elsewhere.safetensors"))
    (folder / "index.json").write_text(index)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"]["index.json"] = fingerprint(folder / "index.json")
    (folder / "manifest.json").write_text(json.dumps(content))
    with raises(RunError, "damaged-file", "index.json: ", "elsewhere.safetensors"):
        make_trainer("save_every_steps=1").train()


def test_resume_never_refuses_a_folder_that_holds_a_run(make_trainer):
    """Nothing is written over."""
    make_trainer().train()
    with raises(RunError, "already-exists", "exp_name"):
        make_trainer("resume=never")


def test_a_failing_save_leaves_what_was_there(tmp_path):
    """The new folder is gone, the old one is as it was."""
    target = tmp_path / "final"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("old")
    with raises(RunError, "no-space", f"{target}: "), atomic_folder(target) as temporary:
        (temporary / "a").write_text("new")
        raise OSError(28, "No space left on device")
    assert (target / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("step", [0, 2])
def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(make_trainer, rows_file, step):
    """Every evaluation stands once in metrics.jsonl, and best and the count towards early stopping are those of a run
    that was let alone; one that was made is not made again, and no random number is drawn for it."""
    options = (f"eval_datasets=[{rows_file}]", "n_steps=5", "eval_every_steps=2", "save_best=true")
    whole = with_dropout(make_trainer("exp_name=whole", *options))
    whole.train()
    for name, before in (("cut", True), ("made", False)):
        first = with_dropout(make_trainer(f"exp_name={name}", *options))
        evaluate = first.evaluate

        def interrupted(first=first, evaluate=evaluate, before=before):
            found = {} if before and first.step == step else evaluate()
            if first.step == step:
                os.kill(os.getpid(), signal.SIGINT)
            return found

        first.evaluate = interrupted
        first.train()
        assert first.step == step and first.evaluated_step == (None if before and step == 0 else 0 if before else step)
        evaluated = []
        hooks = {"on_eval_end": lambda t, evaluated=evaluated: evaluated.append(t.step)}
        second = with_dropout(make_trainer(f"exp_name={name}", *options, **hooks))
        second.train()
        assert evaluated == [each for each in (0, 2, 4, 5) if each > step or (before and each == step)]
        ours, theirs = (
            [(row["kind"], row["step"], row["loss"]) for kind in ("train", "eval") for row in metrics(each, kind)]
            for each in (second, whole)
        )
        assert ours == theirs and (second.best, second.evals_without_improvement) == (
            whole.best,
            whole.evals_without_improvement,
        )
        assert all(torch.equal(p, weights(second)[key]) for key, p in weights(whole).items())


def test_a_longer_run_repeats_no_evaluation(make_trainer, rows_file):
    """The last step of the shorter run is one on the way of the longer one, whose evaluations are those of a run that
    was as long from the start."""
    options = (f"eval_datasets=[{rows_file}]", "eval_every_steps=2", "save_every_steps=2", "lr_scheduler=constant")
    for name, lengths in (("grown", (2, 4)), ("whole", (4,))):
        for n_steps in lengths:
            trainer = make_trainer(f"exp_name={name}", f"n_steps={n_steps}", *options)
            trainer.train()
        assert [row["step"] for row in metrics(trainer, "eval")] == [0, 2, 4]
    assert trainer.evals_without_improvement == 0


def test_a_signal_during_evaluation_is_answered(make_trainer, rows_file):
    """SIGINT in the middle of the last evaluation: a checkpoint, no final/, and the same command finishes."""
    options = (f"eval_datasets=[{rows_file}]", "do_first_eval=false")
    trainer = make_trainer(*options)
    evaluate = trainer.evaluate

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate()

    trainer.evaluate = interrupted
    trainer.train()
    assert trainer.signal == signal.SIGINT and not trainer.run.final.exists()
    assert [path.name for path in checkpoints(trainer.run.checkpoints)] == ["step-3"]
    second = make_trainer(*options)
    second.train()
    assert second.run.final.exists()


def test_a_signal_during_the_last_save_sets_the_exit_code(make_trainer):
    """The run is finished, but a script that started it must not begin the next one."""
    trainer = make_trainer("n_steps=1", "eval_datasets=[]")
    trainer.run.finish_saving = lambda *args, **options: trainer._receive(signal.SIGTERM)
    trainer.train()
    assert trainer.signal == signal.SIGTERM and trainer.run.final.exists()


@pytest.mark.parametrize(("rank", "lines"), [(0, ["SIGINT: "]), (1, [])])
def test_a_signal_is_reported_once(make_trainer, capfd, rank, lines):
    """By rank 0 alone, and not again when it is repeated."""
    trainer = make_trainer()
    trainer.parallel.rank = rank
    trainer._receive(signal.SIGINT)
    trainer._receive(signal.SIGTERM)
    assert [line[:8] for line in capfd.readouterr().err.splitlines() if "checkpoint" in line] == lines
