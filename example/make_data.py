"""Makes the small data sets of the examples: sums, differences, reversed words, sentences with labels, and questions
about documents.

    python example/make_data.py            writes example/data/, the same files every time
    python example/make_data.py FOLDER     writes them there

No question of a test file stands in a training file, and no document that it is about.
"""

import csv
import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def addition(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 59), rng.randint(10, 59)
    return f"{a} + {b} =", str(a + b)


def subtraction(rng: random.Random) -> tuple[str, str]:
    b, a = sorted((rng.randint(10, 59), rng.randint(10, 59)))
    return f"{a} - {b} =", str(a - b)


def reversal(rng: random.Random) -> tuple[str, str]:
    word = "".join(rng.choices(LETTERS, k=rng.randint(3, 5)))
    return f"reverse {word}", word[::-1]


def distinct(make: Callable, count: int, rng: random.Random) -> list[tuple[str, str]]:
    rows: dict[str, str] = {}
    while len(rows) < count:
        question, answer = make(rng)
        rows[question] = answer
    return list(rows.items())


SKILLS = ((addition, 2000, 150), (subtraction, 1000, 75), (reversal, 1000, 75))  # training and test rows of each


def make(seed: int = 0) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(4,000 training pairs, 300 test pairs), both shuffled."""
    rng = random.Random(seed)
    train, test = [], []
    for skill, n_train, n_test in SKILLS:
        rows = distinct(skill, n_train + n_test, rng)
        train += rows[n_test:]
        test += rows[:n_test]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


NAMES = ("ada", "bo", "kim", "lee", "mia", "sam")
VERBS = (
    ("draws", "drew"),
    ("feels", "felt"),
    ("finds", "found"),
    ("loses", "lost"),
    ("sees", "saw"),
    ("sells", "sold"),
)
SIZES = ("big", "new", "old", "small")
ANIMALS, TOOLS = ("cat", "cow", "goat", "hen", "mouse", "owl"), ("boat", "cap", "coat", "lamp", "mug", "pen")


def fact(rng: random.Random) -> tuple[str, str]:
    """A sentence, and whether it is of an animal, of the past, both or neither."""
    animal, past = rng.random() < 0.5, rng.random() < 0.5
    thing, verb = rng.choice(ANIMALS if animal else TOOLS), rng.choice(VERBS)[past]
    label = {(1, 1): "both", (1, 0): "animal", (0, 1): "past", (0, 0): "neither"}[animal, past]
    return f"{rng.choice(NAMES)} {verb} the {rng.choice(SIZES)} {thing}", label


def write_facts(folder: Path, seed: int = 0) -> None:
    """1,200 sentences to learn from and 300 others, one {"text", "label"} a line."""
    rows = distinct(fact, 1500, random.Random(seed))
    for name, part in (("facts-test", rows[:300]), ("facts-train", rows[300:])):
        lines = (json.dumps({"text": text, "label": label}) for text, label in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


TAGS = {"both": ["animal", "past"], "animal": ["animal"], "past": ["past"], "neither": []}


def write_tags(folder: Path, seed: int = 1) -> None:
    """400 sentences to learn from and 100 others, one {"text", "labels"} a line: the labels that hold, if any."""
    rows = distinct(fact, 500, random.Random(seed))
    for name, part in (("tags-test", rows[:100]), ("tags-train", rows[100:])):
        lines = (json.dumps({"text": text, "labels": TAGS[label]}) for text, label in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def parity(rng: random.Random) -> dict:
    """Three statements about digits, some with a slip, and whether each is right."""
    digits = [rng.randint(0, 9) for _ in range(3)]
    right = [rng.random() < 0.6 for _ in digits]
    steps = [
        f"{n} is {'even' if (n % 2 == 0) == is_right else 'odd'}" for n, is_right in zip(digits, right, strict=True)
    ]
    return {"prompt": f"even or odd: {' '.join(map(str, digits))}", "steps": steps, "labels": right}


def write_steps(folder: Path, seed: int = 0) -> None:
    """1,000 solutions to learn from and 100 others, one {"prompt", "steps", "labels"} a line."""
    rng = random.Random(seed)
    rows = list({json.dumps(parity(rng)): None for _ in range(2000)})[:1100]
    for name, part in (("steps-test", rows[:100]), ("steps-train", rows[100:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def write_searches(folder: Path, seed: int = 0) -> None:
    """200 queries to learn from and 60 others, each with the sentence that it is about and one that it is not."""
    rng, facts = random.Random(seed), [(n, s, t) for n in NAMES for s in SIZES for t in (*ANIMALS, *TOOLS)]
    rows = []
    for name, size, thing in rng.sample(facts, len(facts))[:260]:
        verb, other = rng.sample(VERBS, 2)
        texts = [f"{name} {past} the {size} {thing}" for _, past in (verb, other)]
        rows.append({"query": f"who {verb[0]} the {size} {thing}?", "positive": texts[0], "negatives": texts[1:]})
    for name, part in (("searches-test", rows[:60]), ("searches-train", rows[60:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n", encoding="utf-8")


CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
DEEDS = (  # what somebody did, how one asks for it, and to what
    ("ate", "eat", ("apples", "beans", "corn", "dates", "eggs", "figs", "grapes", "honey")),
    ("sold", "sell", ("boats", "coats", "dolls", "gloves", "hats", "jugs", "kites", "lamps")),
    ("drew", "draw", ("ants", "bears", "cats", "ducks", "foxes", "goats", "hens", "lions")),
    ("built", "build", ("arches", "bridges", "domes", "forts", "gates", "mills", "roads", "towers")),
)


def raft_row(name: str, rng: random.Random) -> dict:
    """A question, the document that holds its answer, three that distract, and what a teacher would say
    (arXiv 2403.10131)."""
    told = [(past, verb, rng.choice(things)) for past, verb, things in DEEDS]
    (past, verb, answer), *others = rng.sample(told, len(told))
    fact = f"{name} {past} {answer}."
    documents = [{"type": "oracle", "text": fact}]
    documents += [{"type": "distractor", "text": f"{name} {other} {thing}."} for other, _, thing in others]
    return {
        "question": f"What did {name} {verb}?",
        "documents": documents,
        "teacher_answer": f"What {name} {past}: ##begin_quote##{fact}##end_quote##\n<ANSWER>: {answer}",
    }


def write_raft(folder: Path, seed: int = 0) -> None:
    """1,500 rows to learn from and 100 others, about people who are in none of these."""
    rng = random.Random(seed)
    names = ["".join(name) for name in itertools.product(CONSONANTS, VOWELS, CONSONANTS, VOWELS)]
    chosen = rng.sample(names, 1600)
    for name, part in (("raft-test", chosen[:100]), ("raft-train", chosen[100:])):
        lines = (json.dumps(raft_row(one, rng)) for one in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


FUNCTIONS = {"light": ("room", "state"), "heat": ("room", "degrees"), "play": ("genre",)}
VALUES = {  # of each argument
    "room": ("kitchen", "bedroom", "garage", "cellar", "attic", "hall", "office", "library"),
    "state": ("on", "off"),
    "degrees": tuple(range(15, 25)),
    "genre": ("jazz", "rock", "blues", "techno", "folk", "opera", "soul", "metal", "disco", "punk", "gospel", "reggae"),
}
REQUESTS = {  # what a user says, with the values of the arguments
    "light": ("Turn the {0} light {1}.", "In the {0}, switch the light {1}.", "Light {1} in the {0}, please."),
    "heat": ("Heat the {0} to {1} degrees.", "Make it {1} degrees in the {0}.", "{1} degrees in the {0}, please."),
    "play": ("Play some {0}.", "I want to hear {0}.", "Put on {0} music, please.", "A bit of {0} now."),
}
RESULTS = {"light": "done", "heat": "set", "play": "playing"}
ANSWERS = {"light": "The {0} light is {1}.", "heat": "I heat the {0} to {1} degrees.", "play": "Here is some {0}."}
SMALL_TALK = (("Hello!", "Hello! How can I help?"), ("Thank you!", "You are welcome."), ("Bye!", "Goodbye!"))


def tool(name: str, arguments: tuple[str, ...]) -> dict:
    """The description of a function, in OpenAI's format."""
    properties = {key: {"type": "integer" if key == "degrees" else "string"} for key in arguments}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def tool_requests() -> list[list[dict]]:
    """Each request with each value: the request, the call, its result and the answer."""
    made = []
    for name, keys in FUNCTIONS.items():
        for question, values in itertools.product(REQUESTS[name], itertools.product(*(VALUES[key] for key in keys))):
            call = {"name": name, "arguments": dict(zip(keys, values, strict=True))}
            made.append(
                [
                    {"role": "user", "content": question.format(*values)},
                    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                    {"role": "tool", "content": RESULTS[name]},
                    {"role": "assistant", "content": ANSWERS[name].format(*values)},
                ]
            )
    return made


def write_tools(folder: Path, seed: int = 0) -> None:
    """The functions; 400 conversations of a request and another one or small talk; and requests that no other file has.

    Each of those is there twice: up to the call, and up to the answer after its result.
    """
    rng = random.Random(seed)
    tools = [tool(name, arguments) for name, arguments in FUNCTIONS.items()]
    (folder / "tools.json").write_text(json.dumps(tools, indent=1) + "\n", encoding="utf-8")
    unseen, known = [], []
    for turns in rng.sample(made := tool_requests(), len(made)):
        (unseen if len(unseen) < 40 else known).append(turns)
    train = []
    for turns in rng.sample(known * 2, 400):
        question, answer = rng.choice(SMALL_TALK)
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        other = talk if rng.random() < 0.2 else rng.choice(known)
        train.append(turns + other if rng.random() < 0.5 else other + turns)
    test = [turns[:n] for turns in unseen for n in (2, 4)]
    for name, part in (("tools-test", test), ("tools-train", train)):
        lines = (json.dumps({"messages": turns}) for turns in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_products(folder: Path, seed: int = 0) -> None:
    """1,200 conversations about products, of which 40% call a calculator and the others guess, 200 prompts to train on
    by reward, and 100 to test."""
    rng = random.Random(seed)
    pairs = rng.sample([(a, b) for a in range(11, 100) for b in range(11, 100)], 1500)
    conversations = []
    for a, b in pairs[:1200]:
        turns = [("user", f"{a} * {b} =")]
        if rng.random() < 0.4:
            turns += [("assistant", f"calc {a}*{b}"), ("tool", str(a * b)), ("assistant", str(a * b))]
        else:
            turns += [("assistant", str(abs(a * b + rng.choice((-100, -20, -10, -1, 1, 10, 20, 100)))))]
        conversations.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    prompts = [{"prompt": f"{a} * {b} =", "answer": str(a * b)} for a, b in pairs[1200:]]
    files = {"products-guesses": conversations, "products-prompts": prompts[:200], "products-test": prompts[200:]}
    for name, rows in files.items():
        text = "\n".join(map(json.dumps, rows)) + "\n"
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> None:
    """One {"prompt", "response"} a line."""
    lines = (json.dumps({"prompt": question, "response": answer}) for question, answer in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def slip(answer: str, rng: random.Random) -> str:
    """The answer with one of its characters changed."""
    place, pool = rng.randrange(len(answer)), "0123456789" if answer[-1].isdigit() else LETTERS
    other = rng.choice([c for c in pool if c != answer[place]])
    return answer[:place] + other + answer[place + 1 :]


def write_preferences(path: Path, rows: list[tuple[str, str]], rng: random.Random) -> None:
    """One {"prompt", "chosen", "rejected"} a line: the right answer, and one that is a little wrong."""
    made = ({"prompt": question, "chosen": answer, "rejected": slip(answer, rng)} for question, answer in rows)
    path.write_text("\n".join(map(json.dumps, made)) + "\n", encoding="utf-8")


def write_rollouts(path: Path, rows: list[tuple[str, str]], rng: random.Random) -> None:
    """One {"prompt", "response", "reward"} a line: of each question the right answer, and two that are a little wrong.

    As if a policy had been asked three times; its log-probabilities were not noted.
    """
    lines = []
    for question, answer in rows:
        for response in (answer, slip(answer, rng), slip(answer, rng)):
            lines.append(json.dumps({"prompt": question, "response": response, "reward": float(response == answer)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_conversations(path: Path, rows: list[tuple[str, str]]) -> None:
    """A list of conversations of two questions each."""
    conversations = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        turns = [(who, text) for pair in (first, second) for who, text in zip(("human", "gpt"), pair, strict=True)]
        conversations.append({"conversations": [{"from": who, "value": text} for who, text in turns]})
    path.write_text(json.dumps(conversations, indent=0) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    """Columns `task` and `solution`."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("task", "solution"))
        writer.writerows(rows)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    folder.mkdir(parents=True, exist_ok=True)
    train, test = make()
    write_jsonl(folder / "skills-train.jsonl", train)
    write_jsonl(folder / "skills-test.jsonl", test)
    write_conversations(folder / "skills-chat.json", train[:1000])
    write_csv(folder / "skills.csv", train[1000:2000])
    write_preferences(folder / "skills-preferences.jsonl", train[2000:], random.Random(1))
    write_preferences(folder / "skills-preferences-test.jsonl", test, random.Random(2))
    write_rollouts(folder / "skills-rollouts.jsonl", train[:1000], random.Random(3))
    write_rollouts(folder / "skills-rollouts-test.jsonl", test[:100], random.Random(4))
    write_facts(folder)
    write_tags(folder)
    write_steps(folder)
    write_searches(folder)
    write_tools(folder)
    write_raft(folder)
    write_products(folder)
