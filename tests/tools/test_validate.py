"""`minitrain validate`: its figures are those of the training, and what would teach something wrong is refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitrain import Trainer, load_config
from minitrain.batch import IGNORE_INDEX
from minitrain.cli.main import main
from minitrain.errors import ConfigError
from minitrain.model.policy import Policy
from minitrain.model.tiny import tiny_tokenizer
from minitrain.tools.preflight.memory import estimate_memory
from minitrain.tools.preflight.validate import find_bad_rows
from minitrain.training.setup import dry_run
from tests.conftest import ROOT
from tests.messages import reports
from tests.scorers import random_base

ROWS = [{"prompt": f"say {i}", "response": "ab" * (1 + 7 * i % 11)} for i in range(20)]
PAIRS = [{"prompt": f"say {i}", "chosen": "ab" * (1 + 5 * i % 9), "rejected": "no"} for i in range(20)]
LABELLED = [{"text": f"text {'x' * i}", "label": str(i % 3)} for i in range(20)]
ROLLOUTS = [{"prompt": f"say {i // 2}", "response": "ab", "reward": i % 2} for i in range(20)]
CHAT = [
    {"messages": [{"role": ("user", "assistant")[i % 2], "content": f"{i}"} for i in range(n)]} for n in (2, 4, 2, 6, 6)
]
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OTHER_END = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}"
    "{{ '<|pad|>' if m['content'] == '3' else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWICE = "{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
EACH_TURN = "{% for m in messages %}{{ bos_token if m['role'] == 'user' }}{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def write(tmp_path, llama_folder):
    """``write(rows, key=value, ...)``: the path of a config over these rows."""

    def write(rows: list, name: str = "c", **options) -> str:
        data, file = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.yml"
        data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        config = {"datasets": [str(data)], "model": {"name_or_path": str(llama_folder)}, "batch_size": 8, "seed": 3}
        file.write_text(json.dumps(config | {"output_dir": str(tmp_path / "runs")} | options))  # JSON is YAML
        return str(file)

    return write


@pytest.fixture
def report(capsys):
    """``report(path, ...)``: (exit code, figures by name, stderr)."""

    def report(*arguments: str):
        code = main(["validate", *arguments])
        out, err = capsys.readouterr()
        return code, dict(re.findall(r"^  (\S.*?)  +(.*)$", out, re.M)), err

    return report


def test_figures(write, report):
    """Counts, lengths and steps of a small file by hand."""
    rows = [*ROWS, {"prompt": "x" * 200, "response": "a"}, {"prompt": "b" * 60, "response": "a"}, "no json"]
    options = {"max_length": 80, "truncation": "drop", "on_bad_row": "skip", "validation_split": 5, "n_epochs": 3}
    code, found, err = report(write(rows, **options))
    assert code == 0 and err == ""
    assert found["examples"] == "15 to train on, 5 to evaluate on"
    assert (
        found["left out"] == "1 bad rows skipped of 23 (4.3%); 2 examples dropped (longer than max_length) of 23 (8.7%)"
    )
    assert found["steps"] == "6 of 8 examples, 3.00 epochs of 15 examples"
    code, found, _ = report(write(ROWS, n_steps=7))
    texts = [f"|user\nsay {i}|\n|assistant\n{row['response']}|" for i, row in enumerate(ROWS)]
    lengths = sorted(map(len, texts))  # a byte is a token, | a special one
    told = f"median {lengths[9]} tokens, 90% up to {lengths[17]}, 99% up to {lengths[19]}, longest {lengths[19]};"
    assert told in found["lengths"] and found["left out"] == "nothing"
    assert found["steps"] == "7 of 8 examples, 2.33 epochs of 20 examples"


@pytest.mark.parametrize("rows, loss", [(ROWS, "sft"), (PAIRS, "pairwise"), (LABELLED, "classify")])
@pytest.mark.parametrize("packing", [False, True])
def test_tokens_and_padding_are_those_of_the_batches(write, report, rows, loss, packing):
    """Of the first epoch, as counted in the tensors of a trainer with and without packing."""
    options = {"loss": loss, "packing": packing, "group_by_length": not packing, "gradient_accumulation_steps": 2}
    path = write(rows, **options)
    code, found, _ = report(path)
    assert code == 0
    tokens, shares = {}, {}
    for packed in (False, True):
        trainer = Trainer(load_config(path, [f"packing={packed}", f"exp_name=x{packed}"]))
        loader = trainer.train_loader
        steps = [batches for (_, batches), _ in zip(loader.steps(), range(loader.steps_per_epoch))]
        batches = [batch for step in steps for batch in step]
        tokens[packed] = sum(batch.n_tokens for batch in batches)
        shares[packed] = 1 - tokens[packed] / sum(batch.input_ids.numel() for batch in batches)
        learned = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
    assert found["padding"] == f"{100 * shares[False]:.1f}% without packing, {100 * shares[True]:.1f}% with it"
    assert shares[False] > 0.02
    mine = tokens[packing]
    assert found["tokens"] == f"{mine / 3:,.0f} per step, {mine:,} per epoch; {100 * learned / mine:.1f}% targets"


@pytest.mark.parametrize(
    "rows, options",
    [
        (ROWS, {"model": {"name_or_path": "tiny"}}),
        (ROWS, {}),
        (ROWS, {"freeze_layers": [0, "embeddings"]}),
        (ROWS, {"lora": {"rank": 4, "modules_to_save": ["embed_tokens"], "init": "pissa", "use_dora": True}}),
        (ROWS, {"soft_prompt": {"num_virtual_tokens": 5, "method": "prefix", "prefix_projection": True}}),
        (PAIRS, {"loss": "pairwise"}),
        (LABELLED, {"loss": "classify", "lora": {"rank": 2}}),
        (ROLLOUTS, {"loss": {"name": "policy", "advantages": "reinforce++", "vf_coef": 0.1}}),
        (ROWS, {"chat_template": "chatml", "model": {"tokenizer_name_or_path": "grown"}}),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_parameters_are_those_of_the_training(write, report, rows, options, llama_folder, tmp_path):
    """Trained and total, as the trainer has them, without reading any weights, which are no numbers here."""
    shutil.copytree(llama_folder, tmp_path / "bare")
    file = tmp_path / "bare" / "model.safetensors"
    nothing = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}
    save_file(nothing, file, metadata={"format": "pt"})
    options = dict(options)
    if "model" in options:
        options["model"] = {"name_or_path": str(llama_folder)} | options["model"]
        if "tokenizer_name_or_path" in options["model"]:
            options["model"]["tokenizer_name_or_path"] = str(tmp_path / "grown")
            tokenizer = tiny_tokenizer()
            tokenizer.add_tokens([f"<new {i}>" for i in range(50)])
            tokenizer.save_pretrained(tmp_path / "grown")
    path = write(rows, **options)
    trainer = Trainer(load_config(path))
    trained, total = (sum(p.numel() for p in ps) for ps in (trainer.parameters, trainer.policy.parameters()))
    bare = [] if "tiny" in str(options) else ["--overrides", f"model.name_or_path={tmp_path / 'bare'}"]
    code, found, err = report(path, *bare)
    assert code == 0, err
    assert found["parameters"] == f"{trained:,} of {total:,} trained"
    assert found["matrices"] == trainer.policy.model.matrices


# ----------------------------------------------------------------------------------------------------------- faults


def with_bos(folder) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_template_that_never_ends_a_turn(write, report, tmp_path, wording):
    """Each row with an answer that nothing ends is named, but for those that max_length cut (trl#1623)."""
    (tmp_path / "t.jinja").write_text(ENDLESS)
    path = write(CHAT, chat_template=str(tmp_path / "t.jinja"))
    code, found, err = report(path)
    assert code == 2 and found == {}
    wording(err)
    assert reports(err, "wrong-tokens", *(f"{tmp_path / 'c.jsonl'}:{line}: " for line in (2, 4, 5)))
    assert report(path, "--overrides", "train_on=last_turn")[0] == 0
    assert report(write(ROWS, max_length=30, truncation="end"))[0] == 0


def test_an_end_that_generation_does_not_know(write, report, tmp_path, wording):
    """Some answers end in another special token; the first three rows are named, and the others counted."""
    (tmp_path / "t.jinja").write_text(OTHER_END)
    code, _, err = report(write(CHAT[1:] * 2, chat_template=str(tmp_path / "t.jinja")))
    data = tmp_path / "c.jsonl"
    wording(err)
    assert code == 2 and re.findall(rf"{data}:(\d+): ", err) == ["1", "3", "4"]
    assert reports(err, "wrong-tokens", f"{data}: ", " 3 ", " 8 ")


def test_more_than_one_bos(write, report, tmp_path):
    """A BOS that both the template and the text bring is refused; a template that begins each turn with it is not
    (transformers#31796)."""
    model = {"name_or_path": "tiny", "tokenizer_name_or_path": with_bos(tmp_path / "bos")}
    for name, template in {"twice": TWICE, "each": EACH_TURN}.items():
        (tmp_path / f"{name}.jinja").write_text(template)
    code, _, err = report(write(CHAT, model=model, chat_template=str(tmp_path / "twice.jinja")))
    assert code == 2 and reports(err, "wrong-tokens", f"{tmp_path / 'c.jsonl'}:1: ", "'<|bos|>'")
    assert report(write(CHAT, model=model, chat_template=str(tmp_path / "each.jinja")))[0] == 0
    for length in range(20, 30):  # a prompt that is cut may leave the kept BOS before a turn
        path = write(CHAT, model=model, chat_template=str(tmp_path / "each.jinja"), max_length=length - 16)
        assert report(path)[0] == 0
    rows = [*ROWS[:6], {"prompt": "<|bos|>say", "response": "a"}]
    assert report(write(rows, model=model))[0] == 0  # text of a user
    code, _, err = report(write(rows, model=model, split_special_tokens=False))
    assert code == 2 and err.count("\n") == 1
    assert reports(err, "wrong-tokens", f"{tmp_path / 'c.jsonl'}:7: ", "'<|bos|>'")
    assert report(write(ROWS, model=model))[0] == 0


@pytest.mark.parametrize("rows, loss", [(ROWS, "sft"), (PAIRS, "pairwise"), (LABELLED, "classify")])
def test_a_row_without_anything_to_learn(write, rows, loss, tmp_path):
    """Whatever took its labels: the row is named by its line, blank lines and rows that are left out counted
    (trl#6668)."""
    rows = ["", *rows[:4], "bad", *rows[4:]]
    run = dry_run(load_config(write(rows, loss=loss, on_bad_row="skip")))
    (cache,) = run.data.train.caches
    assert list(find_bad_rows(cache, run)) == []
    assert cache.lines.tolist() == [*range(2, 6), *range(7, 23)]
    document = cache.first_documents[10]
    cache.mask = cache.mask.clone()
    cache.mask[cache.offsets[document] : cache.offsets[document + 1]] = 0
    if loss == "classify":
        cache.doc_features["label"] = np.where(np.arange(20) == 10, np.nan, cache.doc_features["label"])
    (line,) = find_bad_rows(cache, run)
    assert line.startswith(f"{tmp_path / 'c.jsonl'}:13: has no ")


@pytest.mark.parametrize(
    "rows, options, problem, about",
    [
        ([*ROWS[:2], "{"], {}, "invalid-json", "c.jsonl:3: "),
        ([*ROWS[:2], {"prompt": "a"}], {}, "invalid-row", "c.jsonl:3: "),
        ([*ROWS[:2], {"prompt": "a", "response": ""}], {}, "no-answer", "c.jsonl:3: "),
        ([*LABELLED, {"text": "a"}], {"loss": "classify"}, "invalid-row", "c.jsonl:21: "),
        ([*LABELLED[:2], {"text": "a", "label": None}], {"loss": "classify"}, "invalid-row", "c.jsonl:3: label: "),
        (ROWS, {"lrr": 1}, "unknown-option", "lrr: "),
        (ROWS, {"max_length": 4, "truncation": "drop"}, "no-data", "c.jsonl: "),
    ],
)
def test_what_training_would_refuse(write, report, rows, options, problem, about):
    """Config and rows are read as the trainer reads them, and refused with the same words."""
    code, found, err = report(write(rows, **options))
    assert code == 2 and found == {} and reports(err, problem, about) and "Traceback" not in err


@pytest.mark.parametrize("packing", [False, True])
def test_an_encoder_of_packed_rows(write, report, packing, tmp_path):
    """Refused before training in the words of training."""
    path = write(LABELLED, loss="classify", packing=packing, model={"name_or_path": str(random_base("bert", tmp_path))})
    code, _, err = report(path)
    assert code == (2 if packing else 0), err
    if packing:
        with pytest.raises(ConfigError) as refused:
            Trainer(load_config(path))
        assert err.endswith(f"minitrain: {refused.value}\n") and reports(err, "conflict", "packing: ")


# ---------------------------------------------------------------------------------------------------------- memory


def test_peak_memory_is_told_by_part(write, report):
    """Of one device; of each of two that FSDP cuts the model over; BasicTrainer has no two."""
    code, found, err = report(write(ROWS))
    assert code == 0 and "warning" not in found, err
    names = re.findall(r"(\w+) [\d,.]+(?:, |$)", found["peak memory"].partition(": ")[2])
    assert names == ["weights", "gradients", "optimizer", "activations", "head"]
    assert re.match(r"[\d.]+ MiB on cpu; peak of each part: ", found["peak memory"])
    code, found, _ = report(write(ROWS, trainer="FSDPTrainer"), "--devices", "2")
    assert code == 0 and " MiB on cpu on each of 2; " in found["peak memory"] and "gathered" in found["peak memory"]
    code, _, err = report(write(ROWS), "--devices", "2")
    assert code == 2 and reports(err, "conflict", "trainer: ")


def test_more_than_the_machine_has(write, report, monkeypatch):
    """A warning and no error, on the CPU for all processes together."""
    peaks = {}
    for mode in ("none", "selective", "full"):
        run = dry_run(load_config(write(ROWS), [f"activation_checkpointing={mode}"]))
        peaks[mode] = estimate_memory(run, torch.device("cpu")).peak
    there = int(1.01 * peaks["none"])
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": there}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    assert not {"warning", "recompute"} & report(write(ROWS))[1].keys()
    code, found, _ = report(write(ROWS, trainer="FSDPTrainer"), "--devices", "2")
    assert code == 0 and re.match(r"the peak memory of .* is more than the .* MiB of this machine", found["warning"])
    sizes["SC_PHYS_PAGES"] = peaks["none"] - 1
    found = report(write(ROWS))[1]
    selective, full = re.findall(r"=(?:selective|full) ([\d.]+) MiB", found["recompute"])
    assert float(selective) == pytest.approx(peaks["selective"] / 2**20, abs=0.06)
    assert float(full) == pytest.approx(peaks["full"] / 2**20, abs=0.06) and peaks["full"] < peaks["none"]
    assert "recompute" not in report(write(ROWS, activation_checkpointing="full"))[1]


def test_a_model_that_needs_its_values(write, report, monkeypatch):
    """Where no number can be told, it is said why; the other figures are there."""
    monkeypatch.setattr(Policy, "lm_head", lambda self, hidden: hidden.nonzero())
    code, found, _ = report(write(ROWS))
    assert code == 0 and found["peak memory"].startswith("unknown, since the model cannot run without values: ")
    assert "parameters" in found


# ---------------------------------------------------------------------------------------------------- many configs


def test_the_examples(monkeypatch, capsys):
    """Without a network, and with a teacher in the place of the one that another example leaves: those of the embedded
    model are fine, those of models on the hub are not checked, one line each, and that has an exit code of its own."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TEACHER", "tiny")
    monkeypatch.setenv("POLICY", "tiny")
    assert main(["validate", "--all", "example/"]) == 3
    out, err = capsys.readouterr()
    paths = sorted(f"example/{path.name}" for path in (ROOT / "example").glob("*.yml"))
    assert err == "" and [line.partition(": ")[0] for line in out.splitlines()] == paths
    for path, line in zip(paths, out.splitlines(), strict=True):
        name = load_config(path).model.name_or_path
        if name == "tiny":
            assert ": valid; " in line and " to train on" in line and " epochs of " in line
        else:
            assert f": not checked: {name}: " in line and "(HF_HUB_OFFLINE is set)" in line


def test_what_is_refused_outweighs_what_cannot_be_reached(write, capsys, tmp_path):
    """Exit code 2, whichever comes first."""
    fine, away = write(ROWS, "a"), write(ROWS, "b", model={"name_or_path": "FacebookAI/roberta-base"})
    wrong = write([*ROWS, "{"], "c")
    assert main(["validate", fine, away]) == 3
    assert main(["validate", away, wrong, fine]) == main(["validate", wrong, away]) == 2
    assert capsys.readouterr().out.count("not checked: ") == 3


def test_one_bad_config_among_others(write, capsys, tmp_path):
    """The others are looked at all the same; the exit code is 2, and the error stands below."""
    write(ROWS, "a")
    write([*ROWS, "{"], "b")
    write(ROWS, "c")
    assert main(["validate", "--all", str(tmp_path), "--full"]) == 2
    out, err = capsys.readouterr()
    assert [line.rpartition(": ")[2] for line in out.splitlines() if "yml" in line] == ["valid", "invalid", "valid"]
    assert out.count("  parameters") == 2
    assert err.count("\n") == 1 and reports(err, "invalid-json", f"{tmp_path / 'b.jsonl'}:21: ")


def test_nothing_to_validate(capsys, tmp_path):
    """Neither a config nor a folder with some."""
    for arguments, code in (([], "usage"), (["--all", str(tmp_path)], "not-found")):
        assert main(["validate", *arguments]) == 2
        assert reports(capsys.readouterr().err, code)


@pytest.mark.parametrize("lora", [{}, {"rank": 2}])
def test_new_tokens_are_named(write, report, byte_folder, llama_folder, lora):
    """Which tokens the model lacks, and how their rows are trained."""
    model = {"name_or_path": str(llama_folder), "tokenizer_name_or_path": byte_folder}
    code, figures, _ = report(write(ROWS, model=model, lora=lora))
    how = "only their rows are trained, the others are frozen" if lora else "their rows are trained"
    assert code == 0 and figures["new tokens"] == f"<|im_start|>, <|im_end|>, which are new to the model: {how}"
    assert "new tokens" not in report(write(ROWS, lora=lora))[1]
