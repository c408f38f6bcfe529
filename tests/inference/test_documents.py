"""`minitrain generate` about documents: prompts as in training, grades in the rows, the table of sections."""

import json
from pathlib import Path

import pytest

from minitrain.cli.main import main
from minitrain.inference import generate as generation
from minitrain.inference.raft_metrics import TABLE_METRICS, grade_response
from tests.messages import reports

TEACHER = "So ##begin_quote##Oslo is big.##end_quote##\n<ANSWER>: Oslo"
DOCUMENTS = [{"type": "oracle", "text": "Oslo is big."}, {"type": "distractor", "text": "Rome is old."}]
ROWS = [{"question": f"Which? {i}", "documents": DOCUMENTS, "teacher_answer": TEACHER} for i in range(4)]


@pytest.fixture
def ask(tmp_path, llama_folder, monkeypatch, capsys):
    """``ask(...)``: (exit code, stdout, stderr, prompts) of a generate command whose every answer is `ask.answer`."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("a.txt").write_text("\ufeffOslo is big.\n")
    Path("b.txt").write_text("Rome is old.")

    def ask(*arguments: str):
        asked = []

        def generate_from_ids(self, prompts, *_, **__):
            asked.extend(self.tokenizer.decode(ids) for ids in prompts)
            return [generation.Response(ask.answer, {"role": "assistant", "content": ask.answer})] * len(prompts)

        monkeypatch.setattr(generation.Generator, "generate_from_ids", generate_from_ids)
        code = main(["generate", str(llama_folder), *arguments])
        return code, *capsys.readouterr(), asked

    ask.answer = "Oslo"
    return ask


def user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_a_question_with_documents(ask):
    """Numbered in the order of the files, in front of the question, as in training."""
    code, out, err, asked = ask("--prompt", "Which?", "Why?", "--documents", "b.txt", "a.txt")
    assert (code, out, err) == (0, "Oslo\nOslo\n", "")
    documents = "Document 1: Rome is old.\n\nDocument 2: Oslo is big."
    assert asked == [user(f"{documents}\n\nWhich?"), user(f"{documents}\n\nWhy?")]


def test_its_row_can_be_asked_again(ask):
    """What --output writes is an --input that gives the same prompt."""
    given = ("--prompt", "Which?", "--documents", "a.txt", "b.txt", "--prompt-template", "{question} {documents}")
    asked = ask(*given, "--output", "out.jsonl")[3]
    assert asked == [user("Which? Document 1: Oslo is big.\n\nDocument 2: Rome is old.")]
    assert json.loads(Path("out.jsonl").read_text()).keys() == {"question", "documents", "response"}
    assert ask("--input", "out.jsonl", *given[-2:])[3] == asked


def test_the_template_of_training(ask):
    """--prompt-template also stands around plain prompts and the columns of rows; messages have none."""
    Path("p.jsonl").write_text(
        '{"instruction": "add", "input": "1 2", "topic": "sums"}\n{"query": "x", "topic": "y"}\n'
    )
    assert ask("--input", "p.jsonl", "--prompt-template", "[{topic}] {prompt}")[3] == [
        user("[sums] add\n1 2"),
        user("[y] x"),
    ]
    assert ask("--prompt", "{prompt}", "--prompt-template", "{prompt}!")[3] == [user("{prompt}!")]


def test_grades_and_table(ask):
    """A file of answers has the grade in each row; the table counts rows with a teacher's answer only."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "a"}]))
    ask.answer = "So ##begin_quote##Oslo is old.##end_quote## <ANSWER>: the Oslo"
    code, out, err, _ = ask("--input", "rows.jsonl", "--output", "out.jsonl")
    lines = out.splitlines()
    assert code == 0 and err == "" and lines[0] == "5 responses saved to out.jsonl"
    assert lines[1].split() == ["of", "4", "answers", "model", "teacher"] and len(lines) == 2 + len(TABLE_METRICS)
    assert lines[-4].split()[-2:] == ["100.0%", "0.0%"] and lines[-4].startswith("a quote from nowhere")
    *rows, plain = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert all(row["sections"] == grade_response(row, ask.answer) for row in rows) and "sections" not in plain
    assert rows[0]["sections"]["quotes"] == ["nowhere"] and rows[0]["sections"]["exact_match"]


def test_answers_of_several_lines(ask):
    """Without --output answers stand apart, and the table does not mix with them."""
    ask.answer = "So\n<ANSWER>: Oslo"
    code, out, err, asked = ask("--input", "rows.jsonl", "--rows", "2")
    assert code == 0 and out == f"{ask.answer}\n\n{ask.answer}\n" and len(asked) == 2
    assert err.startswith("of 2 answers ")


@pytest.mark.parametrize(
    "arguments, problem, part",
    [
        (["--input", "rows.jsonl", "--documents", "a.txt"], "conflict", "--documents"),
        (["--prompt", "a", "--rows", "2"], "no-effect", "--rows"),
        (["--prompt", "a", "--documents", "c.txt"], "unreadable", "c.txt: "),
        (["--prompt", "a", "--documents", "."], "unreadable", ".: "),
        (["--prompt", "a", "--documents", "empty.txt"], "no-data", "empty.txt: "),
        (["--prompt", "a", "--documents", "binary.txt"], "invalid-text", "binary.txt: "),
        (["--prompt", "a", "--prompt-template", "{x}"], "wrong-column", "--prompt-template"),
        (
            ["--input", "messages.jsonl", "--prompt-template", "{x}"],
            "no-effect",
            "messages.jsonl:1: ",
        ),
        (["--input", "bad.jsonl"], "invalid-row", "bad.jsonl:1: documents"),
        (["--input", "rows.jsonl", "--prompt-template", "{x}"], "wrong-column", "rows.jsonl:1: "),
    ],
)
def test_wrong_arguments(ask, wording, arguments, problem, part):
    """One line and exit code 2, before the model is loaded."""
    Path("empty.txt").write_text(" \n")
    Path("binary.txt").write_bytes(b"\xff")
    Path("messages.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    Path("bad.jsonl").write_text('{"question": "a", "documents": {}}\n')
    code, out, err, asked = ask(*arguments)
    wording(err)
    assert code == 2 and out == "" and reports(err, problem, part) and len(err.splitlines()) == 1 and asked == []
