"""Answers to questions with documents: what stands in each section, where a quote is from, what the table says."""

import json

import pytest

from minitrain.data.files import read_rows
from minitrain.data.formats_raft import Documents
from minitrain.inference.raft_metrics import (
    exact_match,
    find_quote_source,
    format_table,
    grade,
    grade_response,
    parse_sections,
    token_f1,
)

SOUND = "I look it up. ##begin_quote##Oslo is big.##end_quote## So:\n<ANSWER>: Oslo"
DOCUMENTS = Documents(["Oslo is big. Bergen rains."], ["Rome is old."], [])


@pytest.mark.parametrize(
    "text, reasoning, quotes, closed, final",
    [
        (SOUND, "I look it up.  So:", ["Oslo is big."], True, "Oslo"),
        ("", "", [], True, ""),
        ("Oslo", "Oslo", [], True, ""),
        ("<ANSWER>:", "", [], True, ""),
        ("<ANSWER>: Oslo", "", [], True, "Oslo"),
        ("<ANSWER> Oslo", "", [], True, "Oslo"),
        ("So <ANSWER>: Oslo <ANSWER>: Rome", "So", [], True, ""),
        ("So <ANSWER>: <ANSWER>: Rome", "So", [], True, ""),
        ("So <ANSWER>: ##begin_quote##Oslo##end_quote##", "So", ["Oslo"], True, "Oslo"),
        ("So <answer>: Oslo", "So <answer>: Oslo", [], True, ""),
        ("##begin_quote##a##end_quote## <ANSWER>: b", "", ["a"], True, "b"),
        ("So ##begin_quote##a <ANSWER>: b", "So", [], False, "b"),
        ("So a##end_quote## <ANSWER>: b", "So a", [], False, "b"),
        ("So ##begin_quote##a ##begin_quote##b##end_quote##", "So", ["a ##begin_quote##b"], False, ""),
        ("So ##begin_quote##a\nb##end_quote## and ##begin_quote##c##end_quote##", "So  and", ["a\nb", "c"], True, ""),
        ("So ##begin_quote####end_quote##", "So", [""], True, ""),
    ],
)
def test_sections(text, reasoning, quotes, closed, final):
    """Every part of sound and of malformed answers; with more than one final answer there is none."""
    found = parse_sections(text)
    assert (found.reasoning, found.quotes, found.closed, found.final) == (reasoning, quotes, closed, final)


@pytest.mark.parametrize(
    "quote, expected",
    [
        ("Oslo is big.", "oracle"),
        ("Bergen rains", "oracle"),
        (' "Oslo\n is  big!" ', "oracle"),
        ("Rome is old.", "distractor"),
        ("Rome is big.", "nowhere"),
        ("oslo is big.", "nowhere"),
        ("Oslo is big. Rome is old.", "nowhere"),
        ("", "nowhere"),
        (" . ", "nowhere"),
    ],
)
def test_where_a_quote_is_from(quote, expected):
    """Word for word, quotation marks, white space and the last full stop aside; an empty quote is from nowhere."""
    assert find_quote_source(quote, DOCUMENTS) == expected


def test_documents_that_differ_in_nothing_that_counts():
    """The oracle comes first where both hold it, a broken line of a PDF is none, and unsorted documents are named."""
    assert find_quote_source("Rome", Documents(["Rome"], ["Rome"], [])) == "oracle"
    assert find_quote_source("“it improves”", Documents([], ['"it im\u00ad\nproves"'], [])) == "distractor"
    assert find_quote_source("Rome", Documents([], [], ["Oslo", "Rome"])) == "document"


@pytest.mark.parametrize(
    "given, wanted, exact, f1",
    [
        ("Oslo", "Oslo", True, 1.0),
        ("the Oslo.", "oslo", True, 1.0),
        ("in Oslo", "Oslo", False, 2 / 3),
        ("new york city", "york city hall", False, 2 / 3),
        ("b x x b", "x b b b", False, 0.75),
        ("a cat and an owl", "the cat and owl", True, 1.0),
        ("Rome", "Oslo", False, 0.0),
        ("", "Oslo", False, 0.0),
        ("", "", False, 0.0),
        ("the", "a", False, 0.0),
        ("Andes", "Andes!", True, 1.0),
    ],
)
def test_squad(given, wanted, exact, f1):
    """Exact match and F1 as in SQuAD (arXiv 1606.05250), by hand; nothing is no answer."""
    assert exact_match(given, wanted) is exact and token_f1(given, wanted) == pytest.approx(f1)


def test_grades():
    """A sound answer, one from a distractor, one without a section; a teacher without sections is compared whole."""
    right = {"reasoning": True, "quotes": ["oracle"], "quotes_closed": True, "final_answer": True}
    assert grade(SOUND, DOCUMENTS, SOUND) == right | {"exact_match": True, "f1": 1.0}
    wrong = "So ##begin_quote##Rome is old##end_quote## ##begin_quote##x##end_quote##\n<ANSWER>: Rome"
    expected = right | {"quotes": ["distractor", "nowhere"], "exact_match": False, "f1": 0.0}
    assert grade(wrong, DOCUMENTS, SOUND) == expected
    bare = {"reasoning": True, "quotes": [], "quotes_closed": True, "final_answer": False}
    assert grade("Oslo", DOCUMENTS, SOUND) == bare | {"exact_match": False, "f1": 0.0}
    assert grade("Oslo", DOCUMENTS, "oslo") == bare | {"exact_match": True, "f1": 1.0}
    assert grade(".", DOCUMENTS, SOUND)["reasoning"] is False


def test_rows_without_documents_or_a_teacher():
    """They have no grade."""
    row = {"question": "Which?", "documents": ["Oslo is big."]}
    assert (
        grade_response(row, SOUND) is None and grade_response({"question": "Which?", "answer": "Oslo"}, SOUND) is None
    )
    assert grade_response(row | {"answer": "Oslo"}, SOUND)["quotes"] == ["document"]


def test_table():
    """Shares of the rows, of the model's answers and of the teacher's."""
    row = {"question": "Which?", "oracle_context": "Oslo is big.", "distractors": ["Rome is old."], "answer": SOUND}
    others = ["", "So ##begin_quote##Rome is old##end_quote## <ANSWER>: Oslo fjord", "So ##begin_quote##Oslo"]
    lines = format_table([row | {"sections": grade_response(row, text)} for text in [SOUND, *others]]).splitlines()
    assert lines[0].split() == ["of", "4", "answers", "model", "teacher"]
    told = {line.rstrip("%0123456789. ").strip(): line.split()[-2:] for line in lines[1:]}
    assert told == {
        "reasoning": ["75.0%", "100.0%"],
        "quotes, all of them closed": ["50.0%", "100.0%"],
        "quotes, all of them verbatim": ["50.0%", "100.0%"],
        "a quote from the oracle": ["25.0%", "100.0%"],
        "a quote from a distractor": ["25.0%", "0.0%"],
        "a quote from nowhere": ["0.0%", "0.0%"],
        "one final answer": ["50.0%", "100.0%"],
        "equal to the teacher's": ["25.0%", "100.0%"],
        "token F1 with the teacher's": ["41.7%", "100.0%"],
    }
    assert len({len(line) for line in lines}) == 1


def test_real_teachers(shared):
    """RAFT's authors: all answers have reasoning and one final answer, 12 of 20 quote, 10 of these word for word."""
    rows = [row for _, row in read_rows(shared("data/raft") / "en_test.jsonl")]
    found = [grade_response(row, row["cot_answer"]) for row in rows]
    assert all(
        one["reasoning"] and one["final_answer"] and one["quotes_closed"] and one["exact_match"] for one in found
    )
    assert sum("oracle" in one["quotes"] for one in found) == 10 and sum(one["quotes"] != [] for one in found) == 12
    assert json.loads(json.dumps(found)) == found
