"""Grade responses to questions with documents: their reasoning, quotes and final answer.

The format is that of RAFT (arXiv 2403.10131): reasoning with quotes between ##begin_quote## and ##end_quote##, then
<ANSWER>: and the final answer.
"""

import collections
import re
import string
from dataclasses import dataclass

from minitrain.data.formats_raft import Documents, documents_of, teacher_answer

BEGIN, END, ANSWER = "##begin_quote##", "##end_quote##", "<ANSWER>"
QUOTE = re.compile(f"{BEGIN}(.*?){END}", re.DOTALL)
IGNORED = re.compile("[\\s\u00ad\"'`“”‘’„«»]+")  # white space, soft hyphens, quotation marks

# The table has the mean of each over the rows.
TABLE_METRICS = {
    "reasoning": lambda grade: grade["reasoning"],
    "quotes, all of them closed": lambda grade: bool(grade["quotes"]) and grade["quotes_closed"],
    "quotes, all of them verbatim": lambda grade: bool(grade["quotes"]) and "nowhere" not in grade["quotes"],
    "a quote from the oracle": lambda grade: "oracle" in grade["quotes"],
    "a quote from a distractor": lambda grade: "distractor" in grade["quotes"],
    "a quote from nowhere": lambda grade: "nowhere" in grade["quotes"],
    "one final answer": lambda grade: grade["final_answer"],
    "equal to the teacher's": lambda grade: grade["exact_match"],
    "token F1 with the teacher's": lambda grade: grade["f1"],
}


@dataclass
class Sections:
    """The sections of a response.

    Attributes:
        reasoning: The text before the final answer, without quotes.
        quotes: The quotes.
        closed: Every quote has a begin and an end marker.
        final: The final answer; empty if it is missing or not unique.
    """

    reasoning: str
    quotes: list[str]
    closed: bool
    final: str


def parse_sections(text: str) -> Sections:
    quotes, rest = QUOTE.findall(text), QUOTE.sub("", text)
    closed = BEGIN not in rest and END not in rest and not any(BEGIN in quote for quote in quotes)
    before, *final = text.split(ANSWER)
    reasoning = QUOTE.sub("", before).partition(BEGIN)[0].replace(END, "")
    only = final[0].replace(BEGIN, "").replace(END, "").strip() if len(final) == 1 else ""
    return Sections(reasoning.strip(), quotes, closed, only.removeprefix(":").strip())


def grade_response(row: dict, response: str) -> dict | None:
    """Return the grade of a response to a data row; None if the row lacks documents or a teacher's answer."""
    documents, teacher = documents_of(row), teacher_answer(row)
    return None if documents is None or teacher is None else grade(response, documents, teacher)


def grade(response: str, documents: Documents, teacher: str) -> dict:
    """Return the grade of a response.

    Final answers are compared; full texts if the teacher's answer has no final answer.

    Returns:
        Bools `reasoning`, `quotes_closed`, `final_answer` and `exact_match`; `f1` between 0 and 1; and `quotes`, a list
        of `find_quote_source` for each quote.
    """
    ours, expected = parse_sections(response), parse_sections(teacher)
    answers = (ours.final, expected.final) if ANSWER in teacher else (response, teacher)
    return {
        "reasoning": any(map(str.isalnum, ours.reasoning)),
        "quotes": [find_quote_source(quote, documents) for quote in ours.quotes],
        "quotes_closed": ours.closed,
        "final_answer": bool(ours.final),
        "exact_match": exact_match(*answers),
        "f1": token_f1(*answers),
    }


def find_quote_source(quote: str, documents: Documents) -> str:
    """Return which document contains a quote verbatim: oracle, distractor, document (untyped) or nowhere.

    White space, soft hyphens, quotation marks and punctuation at the end may differ, as in text extracted from a PDF.
    """
    quote = IGNORED.sub("", quote).rstrip(".,;:!?…")
    for source, texts in zip(("oracle", "distractor", "document"), documents, strict=True):
        if quote and any(quote in IGNORED.sub("", text) for text in texts):
            return source
    return "nowhere"


def normalized_words(text: str) -> list[str]:
    """Return the words that SQuAD compares (arXiv 1606.05250): lower case, no punctuation, no articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, expected: str) -> bool:
    return normalized_words(answer) == normalized_words(expected) != []


def token_f1(answer: str, expected: str) -> float:
    """Return SQuAD's F1: the harmonic mean of precision and recall of the words, counted with repetitions."""
    ours, theirs = normalized_words(answer), normalized_words(expected)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def format_table(rows: list[dict]) -> str:
    """Return a table of the mean grades of rows with `sections`, for the model and for the teacher."""
    grades = [row["sections"] for row in rows], [grade_response(row, teacher_answer(row)) for row in rows]
    width = max(map(len, TABLE_METRICS))
    lines = [f"{f'of {len(rows)} answers':<{width}}  {'model':>7}  {'teacher':>7}"]
    for name, metric in TABLE_METRICS.items():
        means = [sum(map(metric, column)) / len(column) for column in grades]
        lines.append(f"{name:<{width}}  " + "  ".join(f"{mean:>7.1%}" for mean in means))
    return "\n".join(lines)
