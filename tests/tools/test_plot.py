"""`minitrain plot`: what is in the picture, and where it may be written."""

import json
import math
import sys

import pytest

from minitrain.cli.main import main
from minitrain.training.metrics_log import read_history
from tests.messages import reports


@pytest.fixture
def picture():
    """``picture(folder, ...)``: the matplotlib figure and its panels by name."""
    pytest.importorskip("matplotlib")
    from minitrain.tools.analysis.plot import make_figure

    def make(*folders):
        drawn = make_figure([read_history(folder) for folder in folders])
        return drawn, {axis.get_title(loc="left"): axis for axis in drawn.axes}

    return make


@pytest.fixture
def make_run(tmp_path):
    """``make_run("name", train=[{...}], evals=[{...}])``: a run directory with a line every 10 steps."""

    def make(name, train, evals=()):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [{"step": 10 * i, "kind": "eval"} | row for i, row in enumerate(evals)]
        lines += [{"step": 10 * (i + 1), "kind": "train"} | row for i, row in enumerate(train)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


@pytest.fixture
def run(make_run):
    train = [{"loss": 3.0 - i, "rewards/margins": 0.1 * i, "lr": 1e-3, "grad_norm": 1.0, "epoch": i} for i in range(3)]
    return make_run("run", train, [{"loss": 3.5 - i, "rewards/margins": 0.0, "seconds": 1.0} for i in range(2)])


def data_of(axis) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]


def test_only_the_figures_that_are_asked_for(picture, run, capsys):
    """`--metrics` gives panels in its order; one that no run has is refused with the names of those there are."""
    from minitrain.tools.analysis.plot import make_figure

    drawn = make_figure([read_history(run)], ["lr", "loss"])
    assert [axis.get_title(loc="left") for axis in drawn.axes] == ["lr", "loss"]
    assert main(["plot", str(run), "--metrics", "loss", "los"]) == 2
    assert reports(capsys.readouterr().err, "not-a-choice", "--metrics: ", "loss, rewards/margins, lr, grad_norm")
    assert not (run / "metrics.png").exists()


def test_train_and_eval_of_a_figure_share_a_panel(picture, run):
    """The loss first, the loss's own figures, then what all have; counters have none; axes and kinds are named."""
    drawn, panels = picture(run)
    assert list(panels) == ["loss", "rewards/margins", "lr", "grad_norm"]
    assert data_of(panels["loss"]) == [([10, 20, 30], [3.0, 2.0, 1.0]), ([0, 10], [3.5, 2.5])]
    assert data_of(panels["lr"])[0] == ([10, 20, 30], [1e-3] * 3)
    assert all(axis.get_xlabel() == "step" for axis in panels.values())
    assert len({axis.get_xlim() for axis in panels.values()}) == 1
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["train", "eval"]
    train, evals = panels["loss"].get_lines()[:2]
    assert train.get_color() != evals.get_color() and train.get_linestyle() != evals.get_linestyle()


def test_several_runs_lie_over_one_another(picture, make_run, run):
    """A colour for each in the legend; a figure that only one has gets a panel too; equal names become paths."""
    other = make_run("other", [{"loss": 9.0, "accuracy": 0.5}])
    drawn, panels = picture(run, other)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["run", "other", "train", "eval"]
    assert list(panels) == ["loss", "rewards/margins", "accuracy", "lr", "grad_norm"]
    lines = [line for line in panels["loss"].get_lines() if len(line.get_xdata())]
    assert [line.get_color() for line in lines] == ["C0", "C0", "C1"]
    again = make_run("deeper/run", [{"loss": 1.0}])
    drawn, _ = picture(run, again)
    assert [text.get_text() for text in drawn.legends[0].get_texts()][:2] == [str(run), str(again)]


def test_what_is_not_finite_is_a_gap_with_a_cross(picture, make_run):
    """nan in the curve, and a cross at its step at the foot of the panel."""
    folder = make_run("gaps", [{"loss": value} for value in (2.0, "nan", "inf", 1.0)])
    drawn, panels = picture(folder)
    curve, crosses = panels["loss"].get_lines()[0], panels["loss"].get_lines()[1]
    assert [math.isnan(value) for value in curve.get_ydata()] == [False, True, True, False]
    assert crosses.get_marker() == "x" and list(crosses.get_xdata()) == [20, 30]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["train", "infinite or undefined"]


def test_logarithms_where_they_fit(picture, make_run):
    """Over more than two decades, and never for what may be negative or is a schedule."""
    wide = {name: [0.01, 1.0, 2.0] for name in ("loss", "lr", "rewards/margins", "grad_norm")}
    rows = [{name: values[i] for name, values in wide.items()} | {"kl": 0.5 * i, "value_loss": 1.0} for i in range(3)]
    _, panels = picture(make_run("wide", rows))
    logarithmic = {name for name, axis in panels.items() if axis.get_yscale() == "log"}
    assert logarithmic == {"loss", "grad_norm"}


def test_the_picture_is_a_png_in_the_run(run, capsys, monkeypatch, tmp_path):
    """RUN/metrics.png, of several runs metrics.png in the current folder; nothing else is left there."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "run"]) == 0
    assert capsys.readouterr().out == "plot saved to run/metrics.png\n"
    assert (run / "metrics.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert main(["plot", "run", "run"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.png", "run"]
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "metrics.png"]


def test_only_a_plot_of_the_same_runs_is_written_over(run, make_run, capsys, tmp_path):
    """Another file, another picture and a plot of other runs stay, but for --force."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    other, output = make_run("other", [{"loss": 9.0}]), tmp_path / "out.png"

    def plot(*words) -> int:
        return main(["plot", *map(str, words), "--output", str(output)])

    assert plot(run) == 0 == plot(run)  # renewed
    first = output.read_bytes()
    assert plot(other) == 2 == plot(run, other)
    assert reports(capsys.readouterr().err, "already-exists", "--output: ")
    assert output.read_bytes() == first
    assert plot(other, "--force") == 0
    Image.new("RGB", (2, 2)).save(output)
    assert plot(run) == 2
    output.write_text("my notes")
    assert plot(run) == 2 and output.read_text() == "my notes"
    assert plot(run, "--force") == 0


def test_places_where_no_picture_can_be(run, capsys, tmp_path):
    """Exit code 2, in one line."""
    for name, code in {"plot.pdf": "wrong-format", "no/a.png": "not-found"}.items():
        assert main(["plot", str(run), "--output", str(tmp_path / name)]) == 2
        assert reports(capsys.readouterr().err, code, "--output: ")


def test_without_matplotlib_it_says_what_to_install(run, capsys, monkeypatch):
    """A ConfigError, not a traceback."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(run)]) == 2
    assert reports(capsys.readouterr().err, "not-installed", "pip install minitrain[plot]")
    assert not (run / "metrics.png").exists()


def test_broken_lines_are_said(run, capsys):
    """And the others are drawn."""
    pytest.importorskip("matplotlib")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "ki')
    assert main(["plot", str(run)]) == 0
    assert "metrics.jsonl:6: an unreadable line is skipped" in capsys.readouterr().err


def test_the_answers_of_an_online_run_come_first(picture, tmp_path):
    """Rounds, evaluations and steps share the panels; times, zeros and what is there twice are left out."""
    step = {"loss": 0.1, "reward": 0.5, "entropy": 1.0, "lr": 1e-3, "tokens_per_second": 9.0}
    of_round = {"round": 1, "reward": 0.25, "reward/exact_match": 0.25, "ended": 0.5, "unjudged": 0.0, "drawn": 4}
    of_round |= {"seconds/judge": 1.0, "tokens_per_second": 99.0, "zero_variance": 0.5, "turns": 1.0}
    lines = [{"step": 10, "kind": "train"} | step, {"step": 5, "kind": "rollout"} | of_round]
    lines += [{"step": 10, "kind": "eval", "reward": 0.75, "reward/exact_match": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn, panels = picture(tmp_path)
    assert list(panels) == ["reward", "zero_variance", "ended", "entropy", "turns", "loss", "lr", "tokens_per_second"]
    assert data_of(panels["reward"]) == [([5], [0.25]), ([10], [0.75])]
    assert data_of(panels["tokens_per_second"]) == [([10], [9.0]), ([5], [99.0])]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["train", "rollout", "eval"]
