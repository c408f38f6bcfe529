"""The sections of an answer to a question with documents, checked: reasoning, quotes, and the final answer.

The form is that of RAFT (arXiv 2403.10131): reasoning with quotes between ##begin_quote## and ##end_quote##, and then
<ANSWER>: with the answer itself.
"""

import collections
import re
import string
from dataclasses import dataclass

from minitrain.data.formats_raft import Documents, documents_of, teacher_answer

BEGIN, END, ANSWER = "##begin_quote##", "##end_quote##", "<ANSWER>"
QUOTE = re.compile(f"{BEGIN}(.*?){END}", re.DOTALL)
ASIDE = re.compile("[\\s\u00ad\"'`“”‘’„«»]+")  # white space, soft hyphens, quotation marks

# What the lines of the table are the share, or the mean, of.
LINES = {
    "reasoning": lambda found: found["reasoning"],
    "quotes, all of them closed": lambda found: bool(found["quotes"]) and found["quotes_closed"],
    "quotes, all of them verbatim": lambda found: bool(found["quotes"]) and "nowhere" not in found["quotes"],
    "a quote from the oracle": lambda found: "oracle" in found["quotes"],
    "a quote from a distractor": lambda found: "distractor" in found["quotes"],
    "a quote from nowhere": lambda found: "nowhere" in found["quotes"],
    "one final answer": lambda found: found["final_answer"],
    "it is the teacher's": lambda found: found["exact_match"],
    "token F1 with the teacher's": lambda found: found["f1"],
}


@dataclass
class Sections:
    """What stands in an answer. `closed`: every quote that begins ends, and none ends that has not begun."""

    reasoning: str
    quotes: list[str]
    closed: bool
    final: str  # empty where there is no final answer, or more than one


def sections(text: str) -> Sections:
    quotes, rest = QUOTE.findall(text), QUOTE.sub("", text)
    closed = BEGIN not in rest and END not in rest and not any(BEGIN in quote for quote in quotes)
    before, *final = text.split(ANSWER)
    reasoning = QUOTE.sub("", before).partition(BEGIN)[0].replace(END, "")
    only = final[0].replace(BEGIN, "").replace(END, "").strip() if len(final) == 1 else ""
    return Sections(reasoning.strip(), quotes, closed, only.removeprefix(":").strip())


def check(text: str, documents: Documents, teacher: str) -> dict:
    """The verdict on an answer: reasoning, quotes_closed, final_answer and exact_match are bools, f1 is from 0 to 1,
    and `quotes` has where each of them stands word for word: oracle, distractor, document (when nobody has said which
    of both it is) or nowhere.

    Final answers are compared with one another, or whole texts where the teacher's has no such section.
    """
    found, expected = sections(text), sections(teacher)
    given, wanted = (found.final, expected.final) if ANSWER in teacher else (text, teacher)
    return {
        "reasoning": any(map(str.isalnum, found.reasoning)),
        "quotes": [source(quote, documents) for quote in found.quotes],
        "quotes_closed": found.closed,
        "final_answer": bool(found.final),
        "exact_match": exact_match(given, wanted),
        "f1": token_f1(given, wanted),
    }


def verdict(row: dict, text: str) -> dict | None:
    """`check` for an answer to a row; None for a row without documents or without a teacher's answer."""
    documents, teacher = documents_of(row), teacher_answer(row)
    return None if documents is None or teacher is None else check(text, documents, teacher)


def source(quote: str, documents: Documents) -> str:
    """Where a quote stands word for word. White space, hyphens of broken lines, quotation marks, and the punctuation
    at its end may differ, as they do where a document was a PDF."""
    wanted = ASIDE.sub("", quote).rstrip(".,;:!?…")
    for name, texts in zip(("oracle", "distractor", "document"), documents, strict=True):
        if wanted and any(wanted in ASIDE.sub("", text) for text in texts):
            return name
    return "nowhere"


def normalised(text: str) -> list[str]:
    """The words that SQuAD compares (arXiv 1606.05250): lower case, no punctuation, no articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(given: str, wanted: str) -> bool:
    return normalised(given) == normalised(wanted) != []


def token_f1(given: str, wanted: str) -> float:
    """SQuAD's F1: harmonic mean of precision and recall of the words, each as often as it stands there."""
    words, right = normalised(given), normalised(wanted)
    common = sum((collections.Counter(words) & collections.Counter(right)).values())
    return 2 * common / (len(words) + len(right)) if common else 0.0


def table(rows: list[dict]) -> str:
    """Of how many rows with `sections` each line is true, of the model's answers and of the teacher's own."""
    verdicts, teachers = [row["sections"] for row in rows], [verdict(row, teacher_answer(row)) for row in rows]
    width = max(map(len, LINES))
    lines = [f"{f'of {len(rows)} answers':<{width}}  {'model':>7}  {'teacher':>7}"]
    for name, value in LINES.items():
        shares = [sum(map(value, found)) / len(found) for found in (verdicts, teachers)]
        lines.append(f"{name:<{width}}  " + "  ".join(f"{share:>7.1%}" for share in shares))
    return "\n".join(lines)
