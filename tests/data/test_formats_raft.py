"""Questions with documents: the three shapes of their rows, the prompt that is made of them, and its draws."""

import pytest

from minitrain.config.sections import DatasetConfig
from minitrain.data.examples import to_example
from minitrain.data.formats_raft import Documents, documents_of
from minitrain.errors import DataError
from minitrain.inference.prompts import messages_of
from tests.messages import raises

TYPED = [
    {"type": "distractor", "text": "no 1"},
    {"type": "oracle", "text": "yes"},
    {"type": "distractor", "text": "no 2"},
]
SHAPES = {
    "raft": {"documents": TYPED},
    "raft_context": {"context": {"sentences": [["no 1", "yes", "no 2"]]}, "oracle_context": "yes"},
    "raft_distractors": {"oracle_context": "yes", "distractors": ["no 1", "no 2"]},
}


def prompt(row: dict, **options) -> str:
    """What a model is trained on for a row."""
    return to_example(row, DatasetConfig(path="x.jsonl", **options)).messages[0]["content"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("answer", ["teacher_answer", "cot_answer", "answer"])
def test_shapes(name, answer):
    """Each shape with each name of the answer is the same example."""
    row = {"question": "ask", **SHAPES[name], answer: "tell"}
    assert documents_of(row) == Documents(["yes"], ["no 1", "no 2"], [])
    first = {"question": "ask", **SHAPES["raft"], "teacher_answer": "tell"}
    made = to_example(row, DatasetConfig(path="x.jsonl"))
    assert made == to_example(first, DatasetConfig(path="x.jsonl")) and made.messages[1]["content"] == "tell"
    assert made == to_example(row, DatasetConfig(path="x.jsonl", type=name))


def test_columns_of_ones_own():
    """Any names, by `columns`."""
    row = {"q": "ask", "gold": "yes", "others": ["no 1", "no 2"], "reply": "tell"}
    columns = {"question": "q", "oracle_context": "gold", "distractors": "others", "teacher_answer": "reply"}
    assert prompt(row, columns=columns) == prompt({"question": "ask", **SHAPES["raft"], "answer": "tell"})


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("template", [None, "{question}\n{documents}"])
def test_inference_asks_as_training_does(name, template):
    """The same prompt with the answer, without it, and in training; other keys that are prompts come after."""
    row = {"question": "ask", **SHAPES[name], "instruction": "not this"}
    trained = prompt(row | {"answer": "tell"}, prompt_template=template)
    for asked in (row, row | {"answer": "tell"}):
        assert messages_of(asked, template) == [{"role": "user", "content": trained}]
    assert trained.startswith("ask\n" if template else "Document 1: ")


def test_the_oracle_stays_at_inference():
    """Whatever share of training leaves it out, and in an order that the question alone decides."""
    for i in range(20):
        row = {"question": f"ask {i}", **SHAPES["raft"]}
        (turn,) = messages_of(row)
        assert "yes" in turn["content"] and messages_of(row) == [turn]
        assert turn["content"] == prompt(row | {"answer": "tell"}, p_oracle=1.0)


def test_unsorted_documents():
    """Texts of which nobody has said what they are: in their order at inference, refused in training."""
    row = {"question": "ask", "documents": ["one", "two", "three"]}
    (turn,) = messages_of(row)
    assert turn["content"] == "Document 1: one\n\nDocument 2: two\n\nDocument 3: three\n\nask"
    with raises(DataError, "invalid-row", "documents[0]"):
        prompt(row | {"answer": "tell"})


@pytest.mark.parametrize(
    "row, code, part",
    [
        (SHAPES["raft"], "invalid-row", "teacher_answer, cot_answer, answer"),
        (SHAPES["raft"] | {"answer": ""}, "no-answer", "answer"),
        (SHAPES["raft"] | {"answer": ["x"]}, "invalid-row", "answer"),
        ({"documents": "x", "answer": "y"}, "invalid-row", "documents"),
        ({"documents": [], "answer": "y"}, "invalid-row", "documents"),
        ({"documents": ["x", {"text": "y"}], "answer": "y"}, "invalid-row", "documents[0]"),
        ({"documents": [{"type": "gold", "text": "y"}], "answer": "y"}, "invalid-row", "documents[0]"),
        ({"documents": [{"type": "oracle", "text": 1j}], "answer": "y"}, "invalid-row", "text"),
        ({"context": {"sentences": [[1]]}, "oracle_context": "x", "answer": "y"}, "invalid-row", "context.sentences"),
        ({"context": "x", "oracle_context": "x", "answer": "y"}, "invalid-row", "context.sentences"),
        ({"oracle_context": "x", "distractors": "no 1", "answer": "y"}, "invalid-row", "distractors"),
        ({"oracle_context": None, "distractors": [], "answer": "y"}, "invalid-row", "oracle_context"),
    ],
)
def test_bad_rows(row, code, part, wording):
    """Each says which part of it is wrong."""
    with raises(DataError, code, part) as caught:
        prompt({"question": "ask"} | row)
    wording(caught.value)


def test_rows_without_documents():
    """Questions about a context of another kind (HotpotQA, SQuAD) are no RAFT rows."""
    row = {"question": "ask", "answer": "tell", "context": {"title": ["a"], "sentences": [["b"]]}}
    assert (
        documents_of(row) is None and messages_of(row) == [{"role": "user", "content": "ask"}] and prompt(row) == "ask"
    )


def raft(n_rows: int = 200, **options) -> list[str]:
    """The prompts made of rows with one oracle and three distractors."""
    kinds = ["oracle", "distractor", "distractor", "distractor"]
    documents = [{"type": kind, "text": f"text {i}"} for i, kind in enumerate(kinds)]
    rows = [{"question": f"ask {i}?", "documents": documents, "teacher_answer": "tell"} for i in range(n_rows)]
    return [prompt(row, **options) for row in rows]


def test_raft_prompts():
    """All documents, numbered, in an order that differs by question and seed, then the question (arXiv 2403.10131)."""
    prompts = raft()
    for i, made in enumerate(prompts):
        lines = made.split("\n\n")
        assert [line.split(": ")[0] for line in lines[:-1]] == [f"Document {n}" for n in range(1, 5)]
        assert {line.split(": ")[1] for line in lines[:-1]} == {f"text {n}" for n in range(4)}
        assert lines[-1] == f"ask {i}?"
    places = [made.index("text 0") for made in prompts]
    assert len(set(places)) == 4 and prompts == raft() != raft(seed=1)


def test_a_question_that_is_asked_again():
    """About other documents its oracle stands elsewhere, so that no place is learned with the question."""
    places = set()
    for i in range(40):
        documents = [*TYPED, {"type": "distractor", "text": f"no {i}"}]
        made = prompt({"question": "ask", "documents": documents, "answer": "tell"})
        places.add(made[: made.index("yes")].count("Document"))
    assert places == {1, 2, 3, 4}


def test_raft_without_the_oracle():
    """p_oracle is the share of questions that keep it; the distractors always stay."""
    for share in (0.0, 0.8, 1.0):
        prompts = raft(1000, p_oracle=share)
        assert sum("text 0" in made for made in prompts) == pytest.approx(1000 * share, abs=40 * (0 < share < 1))
        assert all("text 1" in made and "text 3" in made for made in prompts)


def test_raft_with_fewer_distractors():
    """n_distractors are drawn anew for each question; more than there are is all."""
    prompts = raft(300, n_distractors=1)
    for n in (1, 2, 3):
        assert sum(f"text {n}" in made for made in prompts) == pytest.approx(100, abs=30)
    assert all(made.count("Document") == 2 and "text 0" in made for made in prompts)
    assert raft(20, n_distractors=3) == raft(20, n_distractors=9) == raft(20)
    assert raft(1, n_distractors=0) == ["Document 1: text 0\n\nask 0?"]


def test_raft_templates():
    """The template has the documents and every column of the row."""
    (made,) = raft(1, prompt_template="Q: {question} D: {documents}")
    assert made.startswith("Q: ask 0? D: Document 1: text ")
