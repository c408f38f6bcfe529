"""`minitrain rollouts`: the table of rounds, and the sampled answers of one."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from minitrain.cli.main import main
from minitrain.tools.terminal import escape
from tests.conftest import ROOT
from tests.messages import reports
from tests.rl.test_rounds import online  # noqa: F401 (a fixture)

CALL = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "2*3"}}}
TOOL_TURNS = [
    {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": "6"},
    {"role": "assistant", "content": "It is 6."},
]


def answer(group: int, reward, text="yes", **more) -> dict:
    row = {"round": 3, "step": 2, "source": "p.jsonl", "line": group + 1, "group": group}
    row |= {"prompt": [{"role": "user", "content": f"question {group}"}]}
    row |= {"messages": [{"role": "assistant", "content": text}], "reward": reward}
    row |= {"parts": {} if reward is None else {"exact_match": reward}, "advantage": 0.5}
    return row | {"ended": True, "turns": 1, "tokens": 5, "logp": -0.5} | more


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a run of 3 rounds, the last with these answers."""

    def write(*answers: dict | str, metrics=()):
        folder = tmp_path / "run"
        (folder / "rollouts").mkdir(parents=True)
        rounds = [
            {"step": i, "kind": "rollout", "round": i + 1, "reward": i / 4, "reward/exact_match": i / 4}
            | {"ended": 1.0, "length": 5.5, "zero_variance": 0.25}
            for i in range(3)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*rounds, *metrics)))
        lines = [one if isinstance(one, str) else json.dumps(one) for one in answers]
        (folder / "rollouts" / "round-3.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "rollouts" / "round-1.jsonl").write_text(json.dumps(answer(0, 0.0, "early")) + "\n")
        return str(folder)

    return write


@pytest.fixture
def show(capsys):
    def show(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["rollouts", *arguments]) == code
        out, err = capsys.readouterr()
        assert bool(err) == bool(code) or "skipped" in err
        return out if code == 0 and not err else out + err

    return show


def test_the_answers_of_a_real_run(online, show):  # noqa: F811
    """The last round, with the rewards of its file and those of the metrics."""
    trainer = online(rollout={"save_samples": -1})
    trainer.train()
    out = show(str(trainer.run.path), "-n", "100")
    header, first, second = (line.split() for line in out.splitlines()[:3])
    assert header == ["round", "step", "reward", "reward/length", "reward/regex", "ended", "length", "zero_variance"]
    assert (first[:2], second[:2]) == (["1", "0"], ["2", "1"])
    rows = [json.loads(line) for line in (trainer.run.path / "rollouts" / "round-2.jsonl").read_text().splitlines()]
    for group in range(4):
        rewards = [row["reward"] for row in rows if row["group"] == group]
        names = ("best", "worst") if max(rewards) > min(rewards) else ("first", "last")
        for name, reward in zip(names, (max(rewards), min(rewards)), strict=True):
            assert f"  {name}: reward {reward:.4g} (length " in out
    assert out.count("\nprompt ") == 4 and out.count("⟦") == 1 + 8


def test_best_and_worst_of_each_prompt(run, show):
    """Those without a reward come last, equal rewards are not called best, and a single answer is once."""
    low, high, unjudged = answer(0, 0.0, "no"), answer(0, 1.0, "right"), answer(0, None, "?", advantage=None)
    out = show(run(low, unjudged, high, answer(1, 1.0, "a"), answer(1, 1.0, "b"), answer(2, 0.5, "alone")))
    blocks = out.split("\n\n")
    assert blocks[1].startswith("round 3, step 2: 6 answers to 3 prompts")
    assert blocks[2].splitlines() == [
        "prompt p.jsonl:1",
        "  user: question 0",
        "  best: reward 1 (exact_match 1), advantage 0.5; 5 tokens, ended, mean logp -0.5",
        "    ⟦right⟧",
        "  worst: not judged; 5 tokens, ended, mean logp -0.5",
        "    ⟦?⟧",
    ]
    assert [line.split(":")[0].strip() for line in blocks[3].splitlines()[2::2]] == ["first", "last"]
    assert blocks[4].count("⟦") == 1


def test_sampled_text_and_replies_are_marked(run, show, monkeypatch):
    """By brackets, and by colors on a terminal; control characters are escaped."""
    folder = run(answer(0, 1.0, messages=TOOL_TURNS), answer(1, 0.0, "a\x1b[2Jb\ud800", ended=False))
    out = show(folder)
    call = json.dumps(CALL["function"])
    assert f"    ⟦«reasoning: hm»«tool call: {call}»⟧\n    «tool result: 6»\n    ⟦It is 6.⟧\n" in out
    assert "⟦a\\x1b[2Jb\\ud800⟧" in out and "5 tokens, cut off" in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = show(folder)
    assert "\x1b[32mIt is 6.\x1b[0m" in out and "\x1b[2;34mtool result: 6\x1b[0m" in out and "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in show(folder)


def test_options_select(run, show):
    """The best or worst of a round, all answers to a prompt in full, their number, and another round."""
    answers = [answer(i % 3, i / 8, f"text-{i}") for i in range(6)]
    folder = run(*answers, answer(3, None, "x" * 2000))

    def texts(*options):
        return [line.strip(" ⟦⟧") for line in show(folder, *options).splitlines() if line.startswith("    ⟦")]

    assert texts("--best", "-n", "2") == ["text-5", "text-4"]
    assert texts("--worst", "-n", "3")[1:] == ["text-0", "text-1"]
    assert texts("--prompt", "2") == ["text-4", "text-1"]
    assert texts("--prompt", "2", "-n", "1") == ["text-4"]
    assert texts("--prompt", "2", "--worst") == ["text-1", "text-4"]
    assert texts("-n", "1") == ["text-3", "text-0"]
    assert len(texts("-n", "9")[-1]) < 1100 and texts("--prompt", "4") == ["x" * 2000]
    assert texts("--round", "1") == ["early"]


class Page(HTMLParser):
    """What a page says: its tags, the text of each class, and the rest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.classes, self.texts, self.attributes = [], [], {}, set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in ("meta",):
            self.classes.append(dict(attributes).get("class", tag))

    def handle_endtag(self, tag):
        self.classes.pop()

    def handle_data(self, data):
        self.texts.setdefault(self.classes[-1] if self.classes else "", []).append(data)


HOSTILE = ["</pre><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;b&gt; \" ' &amp;", "\x1b[2J\ud800\0"]


def test_a_page_shows_what_was_written_and_nothing_else(run, show, tmp_path):
    """Hostile text in any field stays text: the page has no tag or attribute but its own, and no address."""
    plain = run(answer(0, 1.0), answer(0, 0.0, messages=TOOL_TURNS), metrics=[])
    assert show(plain, "--html", str(tmp_path / "plain.html")) == f"page saved to {tmp_path / 'plain.html'}\n"
    wanted = Page((tmp_path / "plain.html").read_text())
    for hostile in HOSTILE:
        fields = {"source": hostile, "parts": {hostile: 1.0}}
        turn = {"content": hostile, "reasoning_content": hostile, "tool_calls": [{"function": {"name": hostile}}]}
        turns = [{"role": "assistant"} | turn, {"role": hostile, "content": hostile}, {"role": "assistant"} | turn]
        first = answer(0, 1.0, hostile, prompt=[{"role": hostile, "content": hostile}], **fields)
        (tmp_path / "run" / "rollouts" / "round-3.jsonl").write_text(
            "".join(json.dumps(one) + "\n" for one in (first, answer(0, 0.0, messages=turns)))
        )
        (tmp_path / "run" / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "kind": "rollout", "round": 1, f"reward/{hostile}": 1.0}) + "\n"
        )
        show(plain, "--html", str(tmp_path / "page.html"), "--force")
        text = (tmp_path / "page.html").read_text()
        page = Page(text)
        assert set(page.tags) == set(wanted.tags) and page.attributes == wanted.attributes
        assert escape(hostile) in page.texts["sampled"] and escape(f"{hostile}: {hostile}") in page.texts["prompt"]
        assert any(escape(hostile) in one for one in page.texts["h3"] + page.texts["td"])
        assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) == {"\n"}


def test_a_page_has_all_answers_side_by_side(run, show, tmp_path):
    """The best first, the worst last, in full; and other selections as on a terminal."""
    answers = [answer(i % 2, i / 8, f"text-{i}" + "x" * 2000) for i in range(6)]
    folder, file = run(*answers, answer(3, None, "alone")), str(tmp_path / "page.html")

    def texts(*options):
        show(folder, "--html", file, "--force", *options)
        return Page((tmp_path / "page.html").read_text()).texts

    found = texts()
    assert found["sampled"] == ["sampled", *(f"text-{i}" + "x" * 2000 for i in (4, 2, 0, 5, 3, 1)), "alone"]
    assert found["b"] == ["best", "answer 2", "worst"] * 2 + ["first"]
    assert found["th"][0] == "round" and len(found["td"]) == 3 * len(found["th"])
    assert [len(texts(*options)["b"]) for options in (["-n", "1"], ["--worst"], ["--prompt", "2"])] == [3, 4, 3]


def test_a_page_does_not_replace_a_file(run, show, tmp_path):
    folder = run(answer(0, 1.0))
    (tmp_path / "mine.html").write_text("mine")
    for name, code in (("mine.html", "already-exists"), ("run", "wrong-path"), ("no/a.html", "not-found")):
        assert reports(show(folder, "--html", str(tmp_path / name), code=2), code, "--html: ")
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert reports(show(folder, "--force", code=2), "no-effect", "--force: ", "--html")


def test_the_table_has_at_most_ten_rounds(run, show):
    """The first and the last, and infinite or missing values."""
    more = [{"step": i, "kind": "rollout", "round": i + 1, "reward": "nan"} for i in range(3, 40)]
    lines = show(run(answer(0, 1.0), metrics=more)).split("\n\n")[0].splitlines()
    assert len(lines) == 11 and lines[1].split()[0] == "1" and lines[-1].split() == ["40", "39", "nan"]


def test_what_is_not_there(run, show, tmp_path):
    """Other rounds and lines are named."""
    folder = run(answer(4, 1.0), answer(6, 1.0))
    assert reports(show(folder, "--round", "2", code=2), "not-found", "--round: ", "1, 3")
    assert reports(show(folder, "--prompt", "2", code=2), "not-found", "--prompt: ", "5, 7")
    assert reports(show(str(tmp_path), code=2), "not-found", f"{tmp_path}: ")
    assert reports(show(str(tmp_path / "no"), code=2), "not-found", f"{tmp_path / 'no'}: ")
    for file in (tmp_path / "run" / "rollouts").iterdir():
        file.unlink()
    assert reports(show(folder, code=2), "no-data", f"{folder}: ", "rollout.save_samples")


OTHER_VALUES = [
    {"reward": "x"},
    {"reward": 10**400},
    {"parts": {"a": []}},
    {"prompt": [3]},
    {"messages": {"a": 1}},
    {"messages": [{"role": "assistant", "tool_calls": 3}]},
    {"line": None},
    {"group": [1]},
    {"tokens": "x"},
]


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"step": 2}', *(json.dumps(answer(0, 1.0) | value) for value in OTHER_VALUES)]
)
def test_a_damaged_line_is_named(run, show, line):
    """It is skipped; a round without another line is refused."""
    folder = run(answer(0, 1.0), line, answer(0, 0.0))
    out = show(folder)
    assert "round-3.jsonl:2: an unreadable line is skipped" in out and "2 answers to 1 prompt\n" in out
    with open(f"{folder}/rollouts/round-3.jsonl", "w") as file:
        file.write(line)
    assert reports(show(folder, code=2), "damaged-file", f"{folder}/rollouts/round-3.jsonl: ")


def test_a_closed_pipe(run):
    """As of `| head -1`."""
    folder = run(*(answer(i, 1.0, "word " * 2000) for i in range(200)))
    command = [sys.executable, "-m", "minitrain", "rollouts", folder, "-n", "200"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0 and err == b""
