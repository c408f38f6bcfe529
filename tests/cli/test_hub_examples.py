"""Examples whose data and models are on the hub: the same keys on copies that are here, for two steps."""

import pytest

from minitrain import Trainer, load_config
from minitrain.cli.main import main
from minitrain.config.sections import DatasetConfig
from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import to_example
from minitrain.data.template import make_template
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import ROOT, metrics
from tests.messages import reports
from tests.scorers import random_base

pytest.importorskip("datasets")

SHORT = ["n_steps=2", "eval_every_steps=2", "save_every_steps=0", "log_every_steps=1", "model.policy_dtype=float32"]


@pytest.fixture
def shared(shared, monkeypatch, tmp_path):
    """The same, with runs in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    return shared


def test_mrpc_with_roberta(shared, tmp_path):
    """A LoRA on a random RoBERTa over the files of MRPC: all figures of GLUE, and the head is trained, too."""
    columns = "columns: {text: '#1 String', text_pair: '#2 String', label: Quality}"
    train, test = shared("data/mrpc/glue_train.tsv"), shared("data/mrpc/glue_dev.tsv")
    overrides = [
        *SHORT,
        f"datasets=[{{path: {train}, n_examples: 64, {columns}}}]",
        f"eval_datasets=[{{path: {test}, n_examples: 50, {columns}}}]",
        f"model.name_or_path={random_base('roberta', tmp_path / 'roberta')}",
        "loss.labels=[0, 1]",
        "max_length=90",
    ]
    trainer = Trainer(load_config(ROOT / "example" / "mrpc-roberta.yml", overrides))
    ended = trainer.train()
    assert {"accuracy", "f1", "precision", "recall"} <= ended.keys()
    assert [line["step"] for line in metrics(trainer)] == [1, 2]
    trained = {name.partition(".lora")[0] for name, p in trainer.policy.named_parameters() if p.requires_grad}
    assert any(name.endswith("query") for name in trained) and any("classifier" in name for name in trained)
    assert not any("key" in name or "embeddings" in name for name in trained)
    assert (trainer.run.final / "adapter_config.json").is_file()


def test_the_tokens_of_the_benchmark_of_peft():
    """Text and EOS as its data.py makes them, in one piece; all but "Question:" is trained on. Prompts end alike."""
    config, tokenizer = load_config(ROOT / "example" / "peft-metamath.yml"), tiny_tokenizer()
    template = make_template(tokenizer, config, "conversation")

    def encoded(row: dict, dataset: DatasetConfig):
        (document,) = encode(to_example(row, dataset, "conversation"), template, TruncationConfig(config.max_length))
        return list(document.ids), list(document.mask)

    query, response = "What is 2 + 2?", "2 + 2 = 4.\n#### 4\nThe answer is: 4"
    prompt = f"Question: {query} Think step by step.\nAnswer:"
    ids, mask = encoded({"type": "GSM_Rephrased", "query": query, "response": response}, config.datasets[0])
    assert ids == [*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]
    assert mask == [i >= len(tokenizer("Question:")["input_ids"]) for i in range(len(ids))]
    ids, mask = encoded({"question": query, "answer": "4\n#### 4"}, config.eval_datasets[0])
    assert ids[: mask.index(True)] == tokenizer(prompt)["input_ids"]


def test_validate_without_the_model(capsys, monkeypatch, wording):
    """It names the model and the command that fetches it."""
    monkeypatch.chdir(ROOT)
    assert main(["validate", "example/peft-metamath.yml"]) == 3
    output = "".join(capsys.readouterr())
    assert reports(output, "unreachable", "meta-llama/Llama-3.2-3B", "hf download meta-llama/Llama-3.2-3B")
    wording(output)


def test_gsm8k_with_a_small_model(shared, tmp_path, capsys):
    """Questions and answers of GSM8K, packed, in 4 bits where that can be; exact_match looks at the final numbers."""
    quantization = "4bit"
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        quantization = "none"
    train, test = shared("data/gsm8k/train.jsonl"), shared("data/gsm8k/test.jsonl")
    overrides = [
        *SHORT,
        f"datasets=[{{path: {train}, n_examples: 64}}]",
        f"eval_datasets=[{{path: {test}, n_examples: 8}}]",
        f"model.name_or_path={shared('models/stories260K')}",
        f"model.quantization={quantization}",
        "max_length=512",
        "eval_generate={n_examples: 2, max_new_tokens: 8, match: number}",
    ]
    trainer = Trainer(load_config(ROOT / "example" / "gsm8k-qlora.yml", overrides))
    ended = trainer.train()
    assert 0 <= ended["exact_match"] <= 1 and ended["loss"] > 0
    assert metrics(trainer)[-1]["padding"] == 0
    assert "expected '18'" in capsys.readouterr().out  # the first question's answer ends in #### 18
