"""`minitrain plot --html` and `--watch`: what is in the page, and when it is written."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from minitrain.cli.main import main
from minitrain.tools.analysis import watch as watching
from tests.commands import SAVED_ANSWER
from tests.messages import reports

pytest.importorskip("matplotlib")


def log(folder, *steps: int) -> None:
    """Append train lines, with an evaluation at every other step."""
    folder.mkdir(exist_ok=True)
    rows = [{"step": step, "kind": "train", "loss": 3 - step / 10, "lr": 1e-3, "eta_seconds": 90.4} for step in steps]
    rows += [{"step": step, "kind": "eval", "loss": 3 - step / 10, "exact_match": 0.5} for step in steps[::2]]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log(tmp_path / "run", 1, 2, 3)
    (tmp_path / "run" / "config.yml").write_text("loss: {name: sft}\nlr: 0.001\n")
    return tmp_path / "run"


class Page(HTMLParser):
    """The tags with their attributes, the cells of each table by row, and all text."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.tables, self.text, self.in_cell = [], [], "", False
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data.strip()


def refreshes(page: Page) -> list[str]:
    return [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "refresh"]


def test_the_page_of_a_run(run, capsys):
    """One file with the picture, where the run stands, its options, and the metrics over time."""
    assert main(["plot", "run", "--html"]) == 0
    assert capsys.readouterr().out == "plot saved to run/metrics.png and run/metrics.html\n"
    page = Page(run / "metrics.html")
    assert "Step 3, 0:01:30 remaining. loss.name sft, lr 0.001" in page.text and refreshes(page) == []
    assert page.tables[0] == [
        ["metric", "train, last", "eval, step 1", "eval, step 3"],
        ["loss", "2.7", "2.9", "2.7"],
        ["exact_match", "", "0.5", "0.5"],
        ["lr", "0.001", "", ""],
    ]
    assert "The run has not finished. [unfinished]" in page.text
    (image,) = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert image.startswith("data:image/png;base64,iVBOR")


def test_the_page_loads_and_runs_nothing(run):
    """No script, no link, and a policy that forbids both; markup in the texts of a run is shown as it is."""
    sample = {"step": 1, "prompt": "<script>x</script>", "answer": "\x1b[2J<b>", "expected": "&", "right": False}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    assert main(["plot", "run", "--html"]) == 0
    page = Page(run / "metrics.html")
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "b"} == set()
    assert page.tables[1] == [["prompt", "expected", "step 1"], ["<script>x</script>", "&", "\\x1b[2J<b>"]]
    assert re.findall(r"https?://[^\"']*", (run / "metrics.html").read_text()) == []
    assert any("default-src 'none'" in attrs.get("content", "") for _, attrs in page.tags)


def test_samples_stand_side_by_side_over_time(run):
    """The last answer of a step counts, a damaged line does not, and of many steps the first and the last are shown."""
    rows = [{"step": step, "prompt": p, "answer": f"{p}{step}", "expected": "x", "right": step == 9}
            for step in range(10) for p in "ab"]  # fmt: skip
    rows.append(rows[-1] | {"answer": "again"})
    lines = [json.dumps(row) for row in rows] + ['{"step": 3', '{"step": 4, "prompt": 5}']
    (run / "samples.jsonl").write_text("\n".join(lines))
    assert main(["plot", "run", "--html"]) == 0
    page = Page(run / "metrics.html")
    assert page.tables[1] == [
        ["prompt", "expected", *(f"step {n}" for n in (0, 1, 3, 5, 7, 9))],
        ["a", "x", "a0", "a1", "a3", "a5", "a7", "a9"],
        ["b", "x", "b0", "b1", "b3", "b5", "b7", "again"],
    ]
    classes = [attrs["class"] for tag, attrs in page.tags if tag == "pre" and "class" in attrs]
    assert classes.count("right") == 2 and classes.count("wrong") == 10


def test_the_best_and_the_worst_answers_of_rounds(run):
    (run / "rollouts").mkdir()
    for number in (1, 2, 10):
        answers = [SAVED_ANSWER | {"reward": float(i), "parts": {}, "round": number, "group": i} for i in range(3)]
        (run / "rollouts" / f"round-{number}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    (run / "rollouts" / "round-2.jsonl").write_text("broken")
    assert main(["plot", "run", "--html"]) == 0
    header, best, worst = Page(run / "metrics.html").tables[1]
    assert header == ["", "round 1", "round 10"]
    assert best[0] == "best" and best[1].startswith("reward 2;") and best[1].endswith("\na\nb")
    assert worst[0] == "worst" and worst[2].startswith("reward 0;")


def test_the_page_of_several_runs(run, tmp_path):
    """A section each, next to the picture in the current folder; their order and names mark the page as theirs."""
    log(tmp_path / "other", 1)
    assert main(["plot", "run", "other", "--html", "--metrics", "loss"]) == 0
    page = Page(tmp_path / "metrics.html")
    assert [tag for tag, _ in page.tags].count("h2") == 2 and "other: Step 1" in page.text
    assert not (run / "metrics.html").exists()


def test_only_a_page_of_the_same_runs_is_written_over(run, capsys):
    assert main(["plot", "run", "--html"]) == 0 == main(["plot", "run", "--html"])
    (run / "metrics.html").write_text("my notes")
    assert main(["plot", "run", "--html"]) == 2
    assert reports(capsys.readouterr().err, "already-exists", "--html: ")
    assert (run / "metrics.html").read_text() == "my notes"
    assert main(["plot", "run", "--html", "--force"]) == 0
    (run / "metrics.html").unlink()
    (run / "metrics.html").mkdir()
    assert main(["plot", "run", "--html"]) == 2
    assert "--html: " in capsys.readouterr().err


def test_watching_ends_with_the_run(run, tmp_path, monkeypatch, capsys):
    """It waits for a log, draws when it has changed, lets a browser reload, and stops both at the end."""
    folder, pages, acts = tmp_path / "new", [], []
    folder.mkdir()

    def finish() -> None:
        (folder / "run.json").write_text(json.dumps({"finished_step": 2, "total_steps": 2}))

    acts += [lambda: None, lambda: log(folder, 1), lambda: None, lambda: log(folder, 2), finish]

    def sleep(seconds: float) -> None:
        assert seconds == 2.5
        pages.append((folder / "metrics.html").read_text() if (folder / "metrics.html").exists() else None)
        acts.pop(0)()

    monkeypatch.setattr(watching.time, "sleep", sleep)
    assert main(["plot", "new", "--watch", "2.5"]) == 0
    assert pages[:2] == [None, None] and pages[2] == pages[3] and "Step 1" in pages[2] and "Step 2" in pages[4]
    last = Page(folder / "metrics.html")
    assert "Finished at step 2." in last.text and refreshes(last) == []
    assert 'http-equiv="refresh" content="2.5"' in pages[2]
    out, err = capsys.readouterr()
    assert out.count("new/metrics.html") == 1 and err == "minitrain: waiting for the first metrics of new\n"


def test_a_run_that_is_continued_has_not_finished(run):
    """Its run.json is that of the shorter run."""
    (run / "run.json").write_text(json.dumps({"finished_step": 2, "total_steps": 2}))
    assert main(["plot", "run", "--html"]) == 0
    assert "Step 3, 0:01:30 remaining." in Page(run / "metrics.html").text


def test_watching_ends_with_ctrl_c(run, monkeypatch, capsys):
    """Without an error; a folder that does not exist is one."""

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupt)
    assert main(["plot", "run", "--watch"]) == 0
    assert refreshes(Page(run / "metrics.html")) == ["10"]
    assert main(["plot", "nowhere", "--watch"]) == 2
    assert reports(capsys.readouterr().err, "not-found", "nowhere: ")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium"))), None)


@pytest.mark.slow(minutes=1)
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_page(run, tmp_path):
    """Chromium runs it under its policy: the picture has a size, and nothing is refused."""
    assert main(["plot", "run", "--html"]) == 0
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=800,600", "--enable-logging=stderr"]
    options += [f"--screenshot={tmp_path / 'page.png'}", f"file://{run / 'metrics.html'}"]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=120)
    assert (tmp_path / "page.png").stat().st_size > 10_000, done.stderr
    assert "Content Security Policy" not in done.stderr
