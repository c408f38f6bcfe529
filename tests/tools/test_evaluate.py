"""`minitrain evaluate`: the numbers of a training's evaluation, answers, another model, and paired differences."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minitrain.cli.main import main
from minitrain.inference.generate import load_generator
from minitrain.tools.evaluation.differences import paired_differences
from tests.conftest import write
from tests.messages import reports

pytestmark = pytest.mark.numeric

ROWS = [{"prompt": f"say {i}", "response": "ab" * (1 + i % 4)} for i in range(12)]
PAIRS = [{"prompt": f"say {i}", "chosen": "a" * (1 + i % 3), "rejected": "bb"} for i in range(10)]
LABELS = [{"text": f"say {i}", "label": "ba"[i % 3 == 0]} for i in range(12)]
RATED = [{"prompt": f"say {i}", "completion": "a" * (1 + i % 3), "label": i % 2 == 0} for i in range(12)]
SUMS = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(8)]
ROLLOUT = {"num_generations": 2, "prompts_per_round": 8, "rewards": ["length"], "max_new_tokens": 3}


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """``train(rows, **options)``: a run of three steps on rows, some of them for evaluation; returns its metrics."""
    monkeypatch.chdir(tmp_path)

    def train(rows: list[dict], name: str = "c", **options) -> dict:
        write("rows.jsonl", *rows)
        options = {"validation_split": 0.4, "model": {"name_or_path": "tiny"}, "cache_dir": "cache"} | options
        options = {"datasets": "rows.jsonl", "total_batch_size": 8, "n_steps": 3, "lr": 1e-2} | options
        Path(f"{name}.yml").write_text(json.dumps(options))
        assert main(["train", f"{name}.yml", "--quiet"]) == 0, capsys.readouterr().err
        lines = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "eval"][-1]
        return {name: value for name, value in last.items() if name not in ("step", "kind", "seconds")}

    return train


@pytest.fixture
def evaluate(capsys):
    """``evaluate("runs/c", "c.yml")``: what the command prints as JSON."""

    def evaluate(*arguments: str) -> dict:
        capsys.readouterr()
        code = main(["evaluate", *arguments, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return evaluate


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


CASES = {
    "sft": (ROWS, {"eval_generate": {"n_examples": 3, "num_generations": 2, "max_new_tokens": 4}}),
    "packed lora": (ROWS, {"lora": {"rank": 4}, "packing": True, "loss": "dft"}),
    "soft prompt": (ROWS, {"soft_prompt": {"num_virtual_tokens": 3}}),
    "dpo": (PAIRS, {"loss": {"name": "dpo", "reference": "precomputed"}}),
    "dpo of an adapter": (PAIRS, {"loss": "dpo", "lora": {"rank": 4}}),
    "kto": (RATED, {"loss": "kto"}),
    "kd": (ROWS, {"loss": {"name": "kd", "teacher": "tiny"}}),
    "classify": (LABELS, {"loss": "classify", "lora": {"rank": 4}}),
    "pairwise": (PAIRS, {"loss": "pairwise"}),
    "sampled answers": (SUMS, {"loss": "policy", "rollout": ROLLOUT}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_the_training(train, evaluate, case):
    """All metrics of its last evaluation, for the model that it saved; in batches, and one example at a time."""
    rows, options = CASES[case]
    expected = train(rows, **options)
    for arguments in ([], ["--output", "o.jsonl"]):
        (result,) = evaluate("runs/c", "c.yml", *arguments)["results"]
        assert result["metrics"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    examples = read("o.jsonl")
    assert len(examples) == result["n_examples"] and {one["data"] for one in examples} == {"rows.jsonl"}
    means = {name: [one for one in examples if name in one["weights"]] for name in expected}
    assert any(means.values())
    for name, rows in means.items():
        if rows:
            mean = np.average([one[name] for one in rows], weights=[one["weights"][name] for one in rows])
            assert mean == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_several_data_sets_and_files(train, evaluate):
    """Each is a column, and of a config all together; plain files are evaluated with sft."""
    write("more.jsonl", *ROWS[:5])
    expected = train(ROWS, validation_split=0, eval_datasets=["rows.jsonl", "more.jsonl"])
    results = {one["data"]: one for one in evaluate("runs/c", "c.yml", "more.jsonl")["results"][:3]}
    assert results["c.yml"]["metrics"] == pytest.approx(expected, rel=1e-6)
    assert [one["n_examples"] for one in results.values()] == [12, 5, 17]
    files = evaluate("runs/c", "rows.jsonl", "more.jsonl", "--rows", "5")["results"]
    assert [one["data"] for one in files] == ["rows.jsonl", "more.jsonl"] and files[0]["n_examples"] == 5
    assert files[0]["metrics"] == pytest.approx(files[1]["metrics"])
    assert files[1]["metrics"] == pytest.approx(results["more.jsonl"]["metrics"])


def test_the_base_and_another_model(train, evaluate):
    """kl against a plain loop in float64, for the adapter from the base; 0 for the base from itself."""
    train(ROWS, "base")
    train(ROWS, model={"name_or_path": "runs/base/final"}, lora={"rank": 4}, lr=0.1)
    ours, base = (evaluate(name, "c.yml", "--reference", "runs/base") for name in ("runs/c", "runs/base"))
    assert base["results"][0]["metrics"]["kl_to_reference"] == pytest.approx(0, abs=1e-6)
    evaluate("runs/c", "c.yml", "--reference", "runs/base", "--output", "o.jsonl")
    models = [load_generator(name).model.float() for name in ("runs/c", "runs/base")]
    generator, total, n = load_generator("runs/base"), 0.0, 0
    for example in read("o.jsonl"):
        row = ROWS[example["line"] - 1]
        prompt = generator.encode([{"role": "user", "content": row["prompt"]}])
        answer = generator.tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer, *generator.end_ids[:1]]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in models)
        kl = (p.exp() * (p - q)).sum(1)
        assert example["kl_to_reference"] == pytest.approx(float(kl.mean()), rel=1e-3)
        assert example["weights"]["kl_to_reference"] == len(kl)
        total, n = total + float(kl.sum()), n + len(kl)
    assert ours["results"][0]["metrics"]["kl_to_reference"] == pytest.approx(total / n, rel=1e-4) and total > 0


def test_rows_that_are_truncated_are_reported(train, capsys):
    """On stderr, of the evaluation data alone."""
    train(ROWS)
    write("long.jsonl", {"prompt": "a" * 40, "response": "b"}, {"prompt": "a", "response": "b"})
    assert main(["evaluate", "runs/c", "long.jsonl", "--overrides", "max_length=30"]) == 0
    out, err = capsys.readouterr()
    assert "long.jsonl: " in err and "truncated" in err and "truncated" not in out


def test_answers_by_number_and_expression(train, evaluate):
    """All examples are answered when --match is given, and --output has the answers."""
    train(ROWS)
    write("sums.jsonl", {"prompt": "a", "response": "it is 3"}, {"prompt": "b", "response": "it is 4"})
    for match in ("number", r"is (\d)"):
        result = evaluate(
            "runs/c", "sums.jsonl", "--match", match, "--max-new-tokens", "3", "--output", "o.jsonl", "--force"
        )
        assert result["results"][0]["metrics"]["exact_match"] == 0.0
        assert [one["expected"] for one in read("o.jsonl")] == ["3", "4"] and "answer" in read("o.jsonl")[0]


def rows_of(values, weights, name="loss", data="d"):
    return [
        {"data": data, "line": i, name: float(v), "weights": {name: float(w)}}
        for i, (v, w) in enumerate(zip(values, weights, strict=True))
    ]


def test_differences_are_those_of_weighted_means():
    """Their interval is that of a loop over resamples; without a difference it is empty."""
    pytest.importorskip("scipy")
    rng = np.random.default_rng(1)
    a, noise, weights = rng.normal(size=60), rng.normal(size=60), rng.integers(1, 9, size=60)
    b = a - 0.3 + 0.2 * noise
    (one,) = paired_differences(rows_of(a, weights), rows_of(b, weights))
    means = [(values * weights).sum() / weights.sum() for values in (a, b)]
    assert (one.a, one.b, one.n) == (pytest.approx(means[0]), pytest.approx(means[1]), 60)
    assert (one.higher, one.lower) == ((b > a).sum(), (b < a).sum()) and one.p_value < 1e-6
    draws = []
    for _ in range(4000):
        i = rng.integers(60, size=60)
        draws.append(np.average((b - a)[i], weights=weights[i]))
    assert (one.low, one.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.01)
    (constant,) = paired_differences(rows_of([1, 1], [1, 2]), rows_of([3, 3], [5, 9]))  # the weights differ, too
    assert (constant.low, constant.high) == pytest.approx((2, 2))
    (same,) = paired_differences(rows_of(a, weights), rows_of(a, weights))
    assert (same.low, same.high, same.p_value) == (0, 0, 1)
    (single,) = paired_differences(rows_of(a[:1], weights[:1]), rows_of(b, weights))
    assert single.n == 1 and single.low is None


def test_an_interval_covers_the_truth():
    """In about 95 of 100 samples, here at least 85 of 100."""
    pytest.importorskip("scipy")
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        a, weights = rng.normal(size=40), np.ones(40)
        (one,) = paired_differences(rows_of(a, weights), rows_of(a + 0.5 + rng.normal(size=40), weights))
        covered += one.low <= 0.5 <= one.high
    assert covered >= 85


def test_compare_models_and_files(train, evaluate, capsys):
    """The same differences from the models and from their files; the table has both models."""
    pytest.importorskip("scipy")
    train(ROWS)
    for name, model in (("a.jsonl", "tiny"), ("b.jsonl", "runs/c")):
        evaluate(model, "c.yml", "--output", name)
    both = evaluate("--compare", "tiny", "runs/c", "c.yml")
    files = evaluate("--compare", "a.jsonl", "b.jsonl")
    assert files["differences"] == both["differences"] and files["results"] == [] and len(both["results"]) == 2
    loss = both["differences"][0]
    assert loss["metric"] == "loss" and loss["high"] < 0 and loss["b"] < loss["a"]
    assert loss["b"] == pytest.approx(both["results"][1]["metrics"]["loss"], rel=1e-5)
    assert main(["evaluate", "--compare", "tiny", "b.jsonl", "c.yml"]) == 0
    out = capsys.readouterr().out
    assert "A: tiny\nB: b.jsonl" in out and "95% interval" in out and "avg_p_correct" in out


def test_an_adapter_without_its_base(train, capsys):
    train(ROWS, lora={"rank": 2})
    config = Path("runs/c/final/adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "./gone"}))
    assert main(["evaluate", "runs/c", "rows.jsonl"]) == 2
    assert reports(capsys.readouterr().err, "not-found", "'./gone'")


@pytest.mark.parametrize(
    "arguments, code, about",
    [
        ([], "usage", "MODEL"),
        (["tiny"], "usage", "CONFIG|FILE"),
        (["./nowhere", "rows.jsonl"], "not-found", "./nowhere"),
        (["tiny", "row.jsonl"], "not-found", "rows.jsonl"),
        (["tiny", "no.yml"], "not-found", "no.yml"),
        (["tiny", "empty.jsonl"], "no-data", "empty.jsonl"),
        (["tiny", "c.yml"], "no-data", "c.yml"),
        (["tiny", "rows.jsonl", "--overrides", "max_lenght=3"], "unknown-option", "max_lenght"),
        (["tiny", "rows.jsonl", "--match", "(a"], "invalid-value", "eval_generate.match"),
        (["tiny", "rows.jsonl", "--temperature", "0.5"], "no-effect", "eval_generate.temperature"),
        (["tiny", "rows.jsonl", "--num-fewshot", "2"], "no-effect", "--num-fewshot"),
        (["tiny", "rows.jsonl", "--reference", "./nowhere"], "not-found", "./nowhere"),
        (["tiny", "rows.jsonl", "--output", "rows.jsonl"], "already-exists", "rows.jsonl"),
        (["rows.jsonl", "rows.jsonl"], "wrong-path", "rows.jsonl"),
        (["--compare", "rows.jsonl", "tiny", "rows.jsonl"], "wrong-format", "rows.jsonl"),
        (["--compare", "tiny", "tiny", "rows.jsonl"], "usage", "tiny"),
        (["--compare", "good.jsonl", "good2.jsonl", "rows.jsonl"], "no-effect", "rows.jsonl"),
        (["--compare", "good.jsonl", "good2.jsonl"], "mismatch", "--compare"),
        (["tiny", "pairs.jsonl", "--overrides", "loss.name=dpo"], "missing-option", "--reference"),
    ],
)
def test_what_is_refused(folder, capsys, wording, arguments, code, about):
    """Exit code 2, one message, and nothing is written."""
    pytest.importorskip("scipy")
    write("empty.jsonl"), write("pairs.jsonl", *PAIRS)
    write("good.jsonl", *rows_of([1], [1])), write("good2.jsonl", *rows_of([1], [1], data="e"))
    before = sorted(Path().rglob("*"))
    assert main(["evaluate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert reports(err, code, about) and out == "" and "Traceback" not in err
    assert sorted(Path().rglob("*")) == before
    wording(err)


@pytest.mark.parametrize("option, package", [("--compare", "scipy"), ("--tasks", "lm_eval")])
def test_a_package_that_is_not_installed(folder, capsys, monkeypatch, option, package):
    """Before a model is loaded, with the command that installs it."""
    find = "minitrain.cli.evaluate_command.find_spec"
    monkeypatch.setattr(find, lambda name: None if name == package else object())
    arguments = ["--compare", "tiny", "./model", "rows.jsonl"] if option == "--compare" else ["tiny", "--tasks", "x"]
    assert main(["evaluate", *arguments]) == 2
    assert reports(capsys.readouterr().err, "not-installed", option, package, "pip install minitrain[")


def test_what_a_config_cannot_do(train, capsys):
    """Answers without a right one, and a reference of sampled answers."""
    train(SUMS, "sampled", loss="policy", rollout=ROLLOUT)
    write("sums.jsonl", *SUMS)
    Path("sums.yml").write_text(Path("sampled.yml").read_text().replace("rows.jsonl", "sums.jsonl"))
    train(RATED, "kto", loss="kto")
    for model, arguments, code, about in (
        ("tiny", ["kto.yml", "--match", "text"], "conflict", "eval_generate"),
        ("runs/sampled", ["sums.yml", "--reference", "tiny"], "no-effect", "--reference"),
    ):
        assert main(["evaluate", model, *arguments]) == 2
        assert reports(capsys.readouterr().err, code, about)


def test_scores_need_a_loss_of_scores(train, capsys):
    """A classifier is not evaluated as a text model; with its loss, its own labels count."""
    expected = train(LABELS, loss="classify", validation_split=0, eval_datasets=["rows.jsonl"])
    assert main(["evaluate", "runs/c", "rows.jsonl"]) == 2
    assert reports(capsys.readouterr().err, "unsupported-model", "runs/c")
    assert main(["evaluate", "runs/c", "rows.jsonl", "--json", "--overrides", "loss.name=classify"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["metrics"] == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------------------- lm-evaluation-harness

TASK = """\
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [a, b, c]
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_task_of_the_harness(folder, evaluate):
    """One without network: its accuracy is that of the likeliest letter by the logits of transformers."""
    pytest.importorskip("lm_eval")
    Path("tasks").mkdir()
    Path("tasks/letters.yaml").write_text(TASK)
    write("letters.jsonl", *({"question": f"say {i} ", "label": i % 3} for i in range(9)))
    (result,) = evaluate("./model", "--tasks", "letters", "--include-path", "tasks")["results"]
    generator = load_generator("./model")
    model, right = AutoModelForCausalLM.from_pretrained("model"), 0
    choices = [generator.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abc"]
    for i in range(9):
        ids = generator.tokenizer(f"say {i} ", add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        right += int(logits[choices].argmax()) == i % 3
    assert (result["data"], result["n_examples"]) == ("letters", 9)
    assert result["metrics"]["acc"] == pytest.approx(right / 9) and "acc_stderr" in result["metrics"]


def test_the_harness_gets_our_model(folder, evaluate, monkeypatch):
    """With its tokenizer and the options of the command; a stand-in for the package answers."""
    seen = {}

    class Manager:
        def __init__(self, include_path):
            seen["include_path"] = include_path

        def match_tasks(self, names):
            return [name for name in names if name == "known"]

    def simple_evaluate(**options):
        seen.update(options)
        numbers = {"alias": "known", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 0.25}
        return {"results": {"known": numbers | {"sample_len": 4}}, "n-samples": {"known": {"effective": 4}}}

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.tasks": {"TaskManager": Manager},
    }
    modules["lm_eval.models.huggingface"] = {"HFLM": lambda **options: seen.update(options) or "model"}
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("minitrain.cli.evaluate_command.find_spec", lambda name: object())
    arguments = ["--tasks", "known", "--include-path", "mine", "--num-fewshot", "3", "--rows", "4"]
    (result,) = evaluate("./model", *arguments)["results"]
    assert (
        result["metrics"] == {"acc": 0.5, "acc_stderr": 0.1, "exact_match,strict": 0.25} and result["n_examples"] == 4
    )
    assert (seen["model"], seen["num_fewshot"], seen["limit"], seen["include_path"]) == ("model", 3, 4, "mine")
    assert type(seen["pretrained"]).__name__ == "LlamaForCausalLM" and seen["tokenizer"].eos_token
    assert main(["evaluate", "./model", "--tasks", "other"]) == 2
