"""`minitrain inspect`: what is shown is what is in the tensors that the trainer gets."""

import json
import re
import shutil

import pytest

from minitrain import Trainer, load_config
from minitrain.batch import IGNORE_INDEX
from minitrain.cli.main import main
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import SHARED
from tests.messages import reports

N = 8  # rows, all of one step
PREFERENCES = [{"prompt": f"say {i}", "chosen": "ab" * (i + 1), "rejected": "no", "margin": i / 4} for i in range(N)]
ROWS = {
    "sft": [{"prompt": f"say {i}\nand [{i}]", "response": "ab " * (i % 3) + "é\nc"} for i in range(N)],
    "pairwise": PREFERENCES,
    "kto": [{"prompt": f"say {i}", "completion": "ab" * (i + 1), "label": i % 3 > 0} for i in range(N)],
    "classify": [{"text": f"text {i}", "label": ("bad", "fair", "good")[i % 3]} for i in range(N)],
    "policy": [{"prompt": f"say {i // 2}", "response": "ab" * (i + 1), "reward": i / 8} for i in range(N)],
}
CASES = {
    "conversation": ("sft", []),
    "packed": ("sft", ["packing=true"]),
    "micro-batches": ("sft", ["packing=true", "gradient_accumulation_steps=2"]),
    "eager": ("sft", ["packing=true", "model.attn_implementation=eager", "max_length=60"]),
    "preference": ("pairwise", []),
    "shared prompts": ("pairwise", ["packing=true"]),
    "unpaired_preference": ("kto", ["packing=true", "loss.reference=adapter"]),
    "classification": ("classify", []),
    "rollouts": ("policy", ["packing=true"]),
}


@pytest.fixture
def write(tmp_path, llama_folder):
    """``write("sft", ...)``: the path of a config over rows of that loss."""

    def write(loss: str, rows=None) -> str:
        data, file = tmp_path / "rows.jsonl", tmp_path / "c.yml"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[loss]))
        config = {"datasets": [str(data)], "model": {"name_or_path": str(llama_folder)}, "loss": {"name": loss}}
        config |= {"batch_size": N, "n_steps": 1, "output_dir": str(tmp_path / "runs"), "seed": 3}
        file.write_text(json.dumps(config))  # JSON is YAML
        return str(file)

    return write


def told(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def blocks(out: str) -> list[tuple[str, int, str, str]]:
    """(batch, row from 0, what is told of a document, its text with brackets) of each document that is shown."""
    found, title, row, head = [], "", -1, ""
    for line in out.splitlines():
        if line.startswith("    "):
            text = line[4:]
            if head:
                found.append([title, row, head, text])
            else:
                found[-1][3] += f"\n{text}"
            head = ""
        elif line.startswith("  "):
            head = line[2:] if "rows.jsonl" in line else ""
        elif line.startswith("row "):
            row = int(line.split()[1]) - 1
        else:
            title = line
    return [(*some, text.replace("↵\n", "\n")) for *some, text in found]


def bracketed(batch, d: int, tokenizer) -> str:
    """A document's own tokens as bytes, one after another, with brackets where the labels say that they are learned."""
    row, start, stop = batch.spans[d].tolist()
    text, learned = b"", False
    symbols = {symbol: byte for byte, symbol in _bytes().items()}
    for token, label in zip(batch.input_ids[row, start:stop].tolist(), batch.labels[row, start:stop].tolist()):
        if (label != IGNORE_INDEX) != learned:
            text += "⟧".encode() if learned else "⟦".encode()
            learned = not learned
        symbol = tokenizer.convert_ids_to_tokens(token)
        text += bytes([symbols[symbol]]) if symbol in symbols else symbol.encode()
    return (text + ("⟧".encode() if learned else b"")).decode()


def _bytes() -> dict[int, str]:
    """How byte-level tokenizers write the 256 bytes (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


@pytest.mark.parametrize("case", CASES)
def test_what_is_shown_is_what_the_trainer_gets(write, capsys, case):
    """Every document of the first step, in the trainer's rows and order: text, learned tokens, places, padding."""
    loss, overrides = CASES[case]
    path = write(loss)
    overrides = [*overrides, "lora.rank=2"] if loss == "kto" else overrides
    out = told(capsys, path, "--rows", N, *(["--overrides", *overrides] if overrides else []))
    trainer = Trainer(load_config(path, overrides))
    _, batches = next(trainer.train_loader.steps())
    want, titles = [], []
    for number, batch in enumerate(batches, 1):
        size = batch.input_ids.numel()
        padding = size - batch.n_tokens
        titles.append(
            f"step 1, micro-batch {number} of {len(batches)}: {len(batch.input_ids)} rows of "
            f"{batch.input_ids.shape[1]} tokens; {batch.n_targets} targets, {padding} padding "
            f"({100 * padding / size:.1f}%)"
        )
        for d in range(batch.n_docs):
            row, start, stop = batch.spans[d].tolist()
            learned = int((batch.labels[row, start:stop] != IGNORE_INDEX).sum())
            place = f"tokens {start} to {stop - 1}; {stop - start} tokens, {learned} targets"
            if batch.prefixes is not None and batch.prefixes[d, 1]:
                place += f"; after the shared tokens {batch.prefixes[d, 0]} to {batch.prefixes[d, 1] - 1}"
            want.append((titles[-1], row, place, bracketed(batch, d, trainer.tokenizer)))
    found = blocks(out)
    assert [(title, row, text) for title, row, _, text in found] == [(t, row, text) for t, row, _, text in want]
    for (_, _, head, _), (_, _, place, _) in zip(found, want, strict=True):
        assert place in head
    assert [line for line in out.splitlines() if line.startswith("step ")] == titles
    rows = [count for batch in batches for count in (batch.doc_ids < 0).sum(1).tolist() if count]
    assert [int(line.split()[0]) for line in out.splitlines() if re.fullmatch(r"  \d+ padding", line)] == rows
    assert any("shared tokens" in place for _, _, place, _ in want) == (
        case in ("shared prompts", "unpaired_preference")
    )


@pytest.mark.parametrize("loss", ["pairwise", "classify", "kto", "policy"])
def test_values_in_words(write, capsys, loss):
    """Each document is named by its line, with the numbers of that row; chosen stands before rejected."""
    overrides = ["lora.rank=2", "packing=true"] if loss == "kto" else ["packing=false"]
    found = blocks(told(capsys, write(loss), "--rows", N, "--overrides", *overrides))
    lines = []
    for _, _, head, text in found:
        line = int(re.search(r"rows\.jsonl:(\d+)", head)[1])
        row, part = ROWS[loss][line - 1], lines.count(line)
        lines.append(line)
        if loss == "pairwise":
            assert f", {('chosen', 'rejected')[part]}: " in head and f"; margin {row['margin']:.4g}" in head
            assert f"⟦{row[('chosen', 'rejected')[part]]}<|im_end|>⟧" in text
        elif loss == "classify":
            assert f"; label {row['label']};" in head and text == row["text"]
        elif loss == "kto":
            assert head.endswith("; desirable" if row["label"] else "; undesirable")
            assert part or f"⟦{row['completion']}<|im_end|>⟧" in text
        else:
            assert f"; reward {row['reward']:.4g}; advantages " in head and "; group " in head
    assert sorted(lines) == sorted(list(range(1, N + 1)) * (2 if loss in ("pairwise", "kto") else 1))


def test_the_first_rows_of_the_first_epoch(write, capsys):
    """--rows takes them in the order of training, over steps, and the rest of a packed row is counted."""
    path = write("sft", rows=[{"prompt": str(i), "response": "a"} for i in range(20)])
    trainer = Trainer(load_config(path, ["packing=true"]))
    order = (trainer.train_loader.order(0) + 1).tolist()
    for n, others in ((3, [5]), (10, [6]), (1, [7])):
        out = told(capsys, path, "--rows", n, "--overrides", "packing=true")
        assert {int(line) for line in re.findall(r"rows\.jsonl:(\d+)", out)} == set(order[:n])
        assert [int(count) for count in re.findall(r"^  (\d+) other documents$", out, re.M)] == others
    assert "step 2, micro-batch 1 of 1" in told(capsys, path, "--rows", 10)


def test_evaluation(write, capsys):
    """--split eval shows the batches of an evaluation, and is refused without data for one."""
    path = write("sft")
    found = blocks(told(capsys, path, "--split", "eval", "--rows", 2, "--overrides", "validation_split=4"))
    trainer = Trainer(load_config(path, ["validation_split=4"]))
    (batch,) = trainer.eval_loader.eval_batches()
    texts = [bracketed(batch, d, trainer.tokenizer) for d in range(batch.n_docs)]
    examples = trainer.eval_loader.examples
    held = [examples.where(i) for i in range(2)]
    assert sorted(head.partition(": ")[0] for _, _, head, _ in found) == sorted(held)
    assert all(text in texts and title.startswith("evaluation, batch 1: 4 rows") for title, _, _, text in found)
    assert main(["inspect", path, "--split", "eval"]) == 2
    assert reports(capsys.readouterr().err, "no-data", "--split: ")


def test_colours_on_a_terminal_only(write, capsys, monkeypatch):
    """Dim prompts and green answers on a terminal; brackets when piped or with NO_COLOR; no codes out of the data."""
    path = write("sft", rows=[{"prompt": "a\x1b[31mb\tc", "response": "d"}])
    assert main(["inspect", path]) == 0
    piped = capsys.readouterr().out
    assert "\x1b" not in piped and "a\\x1b[31mb\\tc<|im_end|>↵" in piped and "⟦d<|im_end|>⟧" in piped
    for no_color, want in (("1", False), ("", True)):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert main(["inspect", path]) == 0
        out = capsys.readouterr().out
        assert ("\x1b[32md<|im_end|>\x1b[0m" in out) == want == ("⟦" not in out) == ("\x1b[2m<|im_start|>user" in out)


def test_no_weights_are_read(write, capsys, llama_folder, tmp_path):
    """A model's folder without its weights is enough."""
    shutil.copytree(llama_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    path = write("sft")
    assert told(capsys, path, "--overrides", f"model.name_or_path={tmp_path / 'bare'}") == told(capsys, path)


def test_a_tokenizer_that_writes_spaces_otherwise(write, capsys):
    """Of SentencePiece's kind: pieces of a text read as they do in the whole, with the one BOS."""
    folder = SHARED / "tokenizers" / "mistral-v3"
    if not folder.exists():
        pytest.skip("no real tokenizers")
    path = write("sft", rows=[{"prompt": "two words", "response": "three more words"}])
    ((_, _, _, text),) = blocks(told(capsys, path, "--overrides", f"model.tokenizer_name_or_path={folder}"))
    assert text.startswith("<s>") and text.count("<s>") == 1
    assert re.search(r"two words.*\[/INST\] ?⟦ ?three more words</s>⟧$", text)


@pytest.mark.parametrize(
    "arguments, code, about",
    [
        (["--rows", "0"], "usage", "--rows: "),
        (["--split", "test"], "usage", "--split: "),
        (["--overrides", "lrr=1"], "unknown-option", "lrr: "),
        (["--overrides", "datasets=[none.jsonl]"], "not-found", "none.jsonl"),
        (["--plugin", "none.py"], "not-found", "none.py"),
    ],
)
def test_what_cannot_be_shown(write, capsys, arguments, code, about):
    """Exit code 2, and one message."""
    assert main(["inspect", write("sft"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert reports(err, code, about) and out == "" and "Traceback" not in err


def test_the_embedded_tokenizer_is_of_bytes():
    """What `bracketed` takes for granted."""
    table = {symbol: byte for byte, symbol in _bytes().items()}
    wanted = [symbol for byte in "é\n".encode() for symbol, known in table.items() if known == byte]
    assert tiny_tokenizer().tokenize("é\n") == wanted
