"""The losses embed and rerank against float64, in-batch negatives over micro-batches, and runs to `minitrain score`."""

import json
import math

import pytest
import torch

from minitrain import ConfigError, create_loss
from minitrain.batch import Document, PolicyOutput, collate
from minitrain.cli.main import main
from minitrain.losses import Models
from tests.conftest import metrics, weights
from tests.examples import N, collated, policy_for, prepared, step
from tests.messages import raises

pytestmark = pytest.mark.numeric
ALL = [[i] for i in range(N)]


class Table:
    """A policy that gives the documents these embeddings or scores."""

    def __init__(self, embeddings: torch.Tensor | None = None, scores: torch.Tensor | None = None):
        self.embeddings, self.scores = embeddings, scores

    def __call__(self, batch, pooling: str | None = None) -> PolicyOutput:
        return PolicyOutput(None, batch.target_docs, batch.n_docs, embeddings=self.embeddings, scores=self.scores)


def features(made) -> list[tuple[float, float, float]]:
    """(role, text, query) of each document."""
    documents = [document for example in made for document in example]
    return [tuple(d.doc_features[name] for name in ("role", "text", "query")) for d in documents]


def info_nce(states: torch.Tensor, documents: list[tuple[float, float, float]], temperature: float) -> torch.Tensor:
    """The loss of each query, by a plain loop."""
    losses = []
    for i, (role, _, query) in enumerate(documents):
        if role != 0:
            continue
        terms = []
        for j, (other, text, of) in enumerate(documents):
            is_own = j == i + 1
            is_same = text == documents[i + 1][1] or (other == 1 and of == query)
            if other != 0 and (is_own or not is_same):
                terms.append(torch.cosine_similarity(states[i], states[j], 0) / temperature)
        own = torch.cosine_similarity(states[i], states[i + 1], 0) / temperature
        losses.append(torch.stack(terms).logsumexp(0) - own)
    return torch.stack(losses)


@pytest.fixture
def loss():
    return create_loss("embed", temperature=0.3)


def test_the_loss_is_info_nce(loss):
    """Over the positives and negatives of all queries, without texts that are the positive or another positive of the
    same query. The gradient is right, too."""
    made = prepared(loss)
    batch, documents = collated(made, ALL), features(made)
    states = torch.randn(batch.n_docs, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = info_nce(states, documents, 0.3)
    output = loss(batch, Models(Table(states.requires_grad_())))
    assert output.loss_sum.item() == pytest.approx(wanted.sum().item(), rel=1e-6) and output.num_items == N
    assert torch.autograd.gradcheck(lambda x: loss(batch, Models(Table(x))).loss_sum, (states,), atol=1e-4)
    texts = [text for role, text, _ in documents if role > 0]
    assert len(set(texts)) < len(texts)  # some are left out


def test_equal_texts_are_no_negatives(loss):
    """Without the exclusion the loss of two queries with one answer could not be below ln 2."""
    states = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.9, 0.1], [1.0, 0.0]])
    made = [Document(torch.tensor([5, 6]), torch.zeros(2, dtype=torch.uint8)) for _ in range(4)]
    for document, role, text in zip(made, (0.0, 1.0, 0.0, 1.0), (1.0, 2.0, 3.0, 2.0)):
        document.doc_features = {"role": role, "text": text, "query": text}
    batch = collate([[document] for document in made], 0)
    assert loss(batch, Models(Table(states))).loss_sum.item() == pytest.approx(0, abs=1e-6)


def test_negatives_come_from_all_micro_batches(loss):
    """Two micro-batches in a step: the loss of each has the texts of both; its value and gradient are those of one
    batch. An evaluation ranks against all texts."""
    made = prepared(loss)
    whole = step(loss, [collated(made, ALL)])
    halves = step(loss, [collated(made, ALL[:3]), collated(made, ALL[3:])])
    assert halves[0] == pytest.approx(whole[0], rel=1e-5)
    for a, b in zip(halves[1], whole[1]):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))
    alone = sum(step(loss, [collated(made, part)])[0] * len(part) for part in (ALL[:3], ALL[3:])) / N
    assert alone < 0.9 * whole[0]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_hidden_states(loss, pooling):
    """Those of transformers' backbone, of each text alone."""
    policy, made = policy_for(loss), prepared(loss)
    found = policy(collated(made, ALL, packed=True), pooling=pooling).embeddings
    for number, document in enumerate(d for example in made for d in example):
        hidden = policy.model.model(input_ids=document.ids[None].long()).last_hidden_state[0]
        wanted = hidden[-1] if pooling == "last" else hidden.mean(0)
        torch.testing.assert_close(found[number], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_rerank_is_a_softmax_over_the_texts_of_a_query(temperature):
    loss = create_loss("rerank", temperature=temperature)
    made = prepared(loss)
    batch, documents = collated(made, ALL), features(made)
    scores = torch.randn(batch.n_docs, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups: list[list[float]] = []
    for (role, *_), score in zip(documents, scores[:, 0].tolist()):
        groups += [[]] if role == 1 else []
        groups[-1].append(score)
    wanted = sum(math.log(sum(math.exp((s - g[0]) / temperature) for s in g)) for g in groups)
    output = loss(batch, Models(Table(scores=scores.requires_grad_())))
    assert output.loss_sum.item() == pytest.approx(wanted, rel=1e-6) and output.num_items == N
    assert torch.autograd.gradcheck(lambda x: loss(batch, Models(Table(scores=x))).loss_sum, (scores,), atol=1e-4)
    found = {name: (total / n).item() for name, (total, n) in output.metrics.items()}
    ranks = [1 + sum(s > g[0] for s in g) for g in groups]
    assert found == pytest.approx({"accuracy": ranks.count(1) / N, "mrr": sum(1 / rank for rank in ranks) / N})


# ------------------------------------------------------------------------------------------------ through the trainer


@pytest.fixture
def searches(tmp_path):
    rows = [{"query": f"what is {c}?", "positive": f"it is {c * 3}", "negatives": ["it is so"]} for c in "abcdefghijkl"]
    file = tmp_path / "searches.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def make(make_trainer, searches):
    def made(name: str, *overrides: str, **hooks):
        data = (f"datasets=[{searches}]", f"eval_datasets=[{searches}]", f"loss.name={name}", "total_batch_size=6")
        return make_trainer(*data, "lr=1e-2", *overrides, **hooks)

    return made


def test_micro_batches_and_packing_train_the_same(make):
    """Whatever the layout of a step is, the weights are the same; also after an interruption."""
    options = ("loss.temperature=0.5", "n_steps=4")
    whole = make("embed", *options, "exp_name=whole")
    whole.train()
    thirds = (*options, "gradient_accumulation_steps=3", "save_every_steps=2")
    split = make("embed", *thirds, "exp_name=split")
    split.train()
    packed = make("embed", *options, "packing=true", "gradient_accumulation_steps=2", "exp_name=packed")
    packed.train()
    for other in (split, packed):
        assert metrics(other, "eval")[-1]["loss"] == pytest.approx(metrics(whole, "eval")[-1]["loss"], rel=1e-3)
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(weights(other)[name], tensor, rtol=2e-3, atol=5e-5)

    def stop(trainer):
        trainer.should_stop = trainer.step == 2

    part = make("embed", *thirds, "exp_name=again", on_step_end=stop)
    part.train()
    (part.run.path / "run.json").unlink()
    again = make("embed", *thirds, "exp_name=again")
    again.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(split).values(), weights(again).values()))


@pytest.mark.parametrize("lora", [(), ("lora.rank=8", "lr=3e-2")], ids=["all", "lora"])
def test_a_run_of_embeddings(make, tmp_path, capsys, lora):
    """It learns; `score` writes vectors and similarities, which are those of transformers' hidden states."""
    trainer = make("embed", "n_steps=30", "gradient_accumulation_steps=2", *lora)
    ended = trainer.train()
    assert ended["loss"] < (0.9 if lora else 0.5) * metrics(trainer)[0]["loss"]
    assert lora or (ended["accuracy"] > 0.8 and ended["mrr"] > 0.8)
    modules = json.loads((trainer.run.final / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    capsys.readouterr()
    texts = ["what is a?", "it is aaa", "it is kkk"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--input", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["score", str(trainer.run.final), *arguments]) == 0
    vectors = torch.tensor([json.loads(line)["embedding"] for line in (tmp_path / "out.jsonl").open()])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    capsys.readouterr()
    pair = ["--text", texts[0], texts[0], "--text-pair", texts[1], texts[2]]
    assert main(["score", str(trainer.run.final), *pair]) == 0
    near, far = map(float, capsys.readouterr().out.split())
    assert near > far and near == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-3)
    if not lora:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(trainer.run.final).eval()
        ids = AutoTokenizer.from_pretrained(trainer.run.final)(texts[0], return_tensors="pt")["input_ids"]
        state = model(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(state / state.norm(), vectors[0], rtol=1e-3, atol=1e-4)
    assert main(["score", str(trainer.run.final), "--prompt", "a", "--response", "b"]) != 0
    assert "[mismatch]" in capsys.readouterr().err


def test_a_run_of_a_reranker(make, tmp_path, capsys):
    """It learns; `score` gives the score of each pair."""
    trainer = make("rerank", "n_steps=30")
    ended = trainer.train()
    assert ended["accuracy"] > 0.8 and metrics(trainer)[-1]["loss"] < metrics(trainer)[0]["loss"]
    capsys.readouterr()
    pair = ["--text", "what is a?", "what is a?", "--text-pair", "it is aaa", "it is so"]
    assert main(["score", str(trainer.run.final), *pair]) == 0
    near, far = map(float, capsys.readouterr().out.split())
    assert near > far


@pytest.mark.parametrize("name", ["embed", "rerank"])
def test_options_that_have_no_effect(make, name):
    with raises(ConfigError, "no-effect", "chat_template: "):
        make(name, "chat_template=chatml")
    with raises(ConfigError, "conflict", "eval_generate: "):
        make(name, "eval_generate.n_examples=2")
    with raises(ConfigError, "conflict", "eval_kl_to_start: "):
        make(name, "eval_kl_to_start=true")
    with raises(ConfigError, "conflict", "rollout.num_generations: "):
        make(name, "rollout.num_generations=2")
