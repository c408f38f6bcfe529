"""Several files -> the micro-batches of each step: fused, split, weighted, resumed, evaluated."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from minitrain.batch import IGNORE_INDEX
from minitrain.config.sections import DatasetConfig
from minitrain.data.loader import MicrobatchLoader, load_data
from minitrain.errors import ConfigError
from tests.messages import raises

PAD = 0


@pytest.fixture
def entry(jsonl):
    """A file of rows of different lengths, each of which can be told by its answer."""
    rng = np.random.default_rng(0)

    def write(n: int, name: str, **options) -> DatasetConfig:
        rows = [{"prompt": "x" * int(rng.integers(1, 40)), "response": f"{name} {i};"} for i in range(n)]
        return jsonl(rows, f"{name}.jsonl", **options)

    return write


def answers(batches, template) -> Counter:
    """The learned texts of some batches."""
    texts = Counter()
    for batch in batches:
        for document in range(batch.n_docs):
            ids = batch.input_ids[(batch.doc_ids == document) & (batch.labels != IGNORE_INDEX)]
            texts[template.tokenizer.decode(ids)] += 1
    return texts


def expected(name: str, n: int, times: int = 1) -> Counter:
    return Counter({f"{name} {i};<|im_end|>": times for i in range(n)})


def test_files_of_differing_schemas(tmp_path, config, template):
    """Files of different formats and schemas are fused into one sequence."""
    (tmp_path / "a.csv").write_text("question,answer\nq,from csv\n")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "from json"}]
    (tmp_path / "b.json").write_text(json.dumps({"data": [{"conversations": turns}]}))
    (tmp_path / "c.jsonl").write_text('{"text": "from jsonl"}\n{"instruction": "q", "output": "alpaca"}\n')
    (tmp_path / "d.jsonl").write_text('{"q": "q", "a": "columns"}\n')
    config.datasets = [DatasetConfig(path=str(tmp_path / name)) for name in ("a.csv", "b.json", "c.jsonl")]
    config.datasets.append(DatasetConfig(path=str(tmp_path / "d.jsonl"), columns={"prompt": "q", "response": "a"}))
    data = load_data(config, template)
    learned = [template.tokenizer.decode(d.ids[d.mask.bool()]) for (d,) in map(data.train.__getitem__, range(5))]
    texts = ("from csv", "from json", "rom jsonl", "alpaca", "columns")  # a text's first token is never learned
    assert learned == [text + "<|im_end|>" for text in texts]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("world_size", "n_micro"), [(1, 1), (1, 4), (2, 2), (3, 1)])
def test_an_epoch_sees_every_example_once(entry, config, template, world_size, n_micro, packing):
    """Over all ranks and micro-batches, packed or padded, the short last step included; the steps hold the same
    examples however they are laid out."""
    config.datasets = [entry(11, "a"), entry(6, "b", weight=2)]
    config.total_batch_size, config.gradient_accumulation_steps, config.packing = 4, n_micro, packing
    train = load_data(config, template).train
    loaders = [MicrobatchLoader(train, config, PAD, rank, world_size) for rank in range(world_size)]
    assert (loaders[0].epoch_size, loaders[0].steps_per_epoch) == (23, 6)
    plain = [indices for indices, _ in itertools.islice(MicrobatchLoader(train, config, PAD).steps(), 6)]
    seen = Counter()
    for step, shares in enumerate(itertools.islice(zip(*(loader.steps() for loader in loaders)), 6)):
        assert all(indices == plain[step] for indices, _ in shares)
        assert len(plain[step]) == (4 if step < 5 else 3)
        assert len({len(batches) for _, batches in shares}) == 1
        of_step = answers((batch for _, batches in shares for batch in batches), template)
        assert of_step.total() == len(plain[step])
        seen += of_step
    assert seen == expected("a", 11) + expected("b", 6, 2)


@pytest.mark.parametrize("order", ["shuffled", "group_by_length", "packing"])
def test_resuming_at_any_point(entry, config, template, order):
    """From any number of consumed examples on, the steps are those of the run that was not interrupted, over the
    borders of epochs (accelerate#4203)."""
    config.datasets = [entry(10, "a", weight=1.5)]
    config.total_batch_size = 4
    if order != "shuffled":
        setattr(config, order, True)
    loader = MicrobatchLoader(load_data(config, template).train, config, PAD)
    whole = list(itertools.islice(loader.steps(), 12))
    assert [i for i, _ in whole[:4]] != [i for i, _ in whole[4:8]]  # epochs of 15 differ
    consumed = 0
    for done, (indices, _) in enumerate(whole):
        resumed = list(itertools.islice(loader.steps(consumed), 12 - done))
        for (ids, batches), (other_ids, other_batches) in zip(resumed, whole[done:], strict=True):
            assert ids == other_ids
            assert [b.input_ids.tolist() for b in batches] == [b.input_ids.tolist() for b in other_batches]
        consumed += len(indices)


def test_consumed_in_the_middle_of_a_step(entry, config, template):
    """Resuming with another batch size goes on with the next example, none lost or repeated."""
    config.datasets, config.total_batch_size = [entry(10, "a")], 3
    loader = MicrobatchLoader(load_data(config, template).train, config, PAD)
    first = [i for indices, _ in itertools.islice(loader.steps(), 1) for i in indices]
    config.total_batch_size = 4
    rest = [i for indices, _ in itertools.islice(loader.steps(3), 2) for i in indices]
    assert sorted(first + rest) == list(range(10)) and len(rest) == 7


def test_number_of_steps(entry, config, template):
    """n_epochs may be broken, and n_steps goes before it."""
    config.datasets, config.total_batch_size = [entry(10, "a")], 4
    loader = MicrobatchLoader(load_data(config, template).train, config, PAD)
    steps = []
    for config.n_epochs, config.n_steps in ((1, None), (2, None), (0.5, None), (0.01, None), (1, 7)):
        steps.append(loader.total_steps)
    assert steps == [3, 6, 2, 1, 7]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_evaluation_counts_every_row_once(entry, config, template, batch_size, world_size, packing):
    """5 rows over two ranks are 5 rows: none is repeated to fill a rank (pytorch#25162), and each rank has as many
    batches, so that none waits."""
    config.datasets = config.eval_datasets = [entry(5, "a")]
    config.eval_batch_size, config.packing = batch_size, packing
    evaluation = load_data(config, template).eval
    shares = [
        list(MicrobatchLoader(evaluation, config, PAD, rank, world_size).eval_batches()) for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert answers(itertools.chain(*shares), template) == expected("a", 5)
    assert all(batch.n_docs <= batch_size for share in shares for batch in share)


def test_n_eval_examples(entry, config, template):
    """Only the first so many are evaluated, over the files in turn."""
    config.datasets, config.eval_datasets = [entry(3, "a")], [entry(3, "b"), entry(4, "c")]
    for n, counts in ((2, expected("b", 2)), (5, expected("b", 3) + expected("c", 2)), (99, None)):
        config.n_eval_examples = n
        evaluation = load_data(config, template).eval
        counts = counts or expected("b", 3) + expected("c", 4)
        assert answers(MicrobatchLoader(evaluation, config, PAD).eval_batches(), template) == counts


@pytest.mark.parametrize(("held_out", "count"), [(0.2, 4), (0.001, 1), (1, 1), (7, 7), (12, 12)])
def test_validation_split(entry, config, template, held_out, count):
    """A share or a number of examples is held out, the same for the same seed; the rest is trained on."""
    config.datasets, config.validation_split = [entry(11, "a"), entry(9, "b", weight=2)], held_out
    data = load_data(config, template)
    assert (len(data.train), len(data.eval)) == (20 - count, count)

    def held(data) -> Counter:
        return answers(MicrobatchLoader(data.eval, config, PAD).eval_batches(), template)

    trained = answers((MicrobatchLoader(data.train, config, PAD).micro_batches(np.arange(20 - count))), template)
    assert trained + held(data) == expected("a", 11) + expected("b", 9)
    assert held(load_data(config, template)) == held(data)
    config.seed = 1
    assert count == 1 or held(load_data(config, template)) != held(data)


def test_validation_split_of_everything(entry, config, template):
    """A split that leaves nothing to train on is an error."""
    config.datasets, config.validation_split = [entry(5, "a")], 5
    with raises(ConfigError, "no-data", "validation_split: ", "5 of 5"):
        load_data(config, template)


def test_split_that_empties_a_file(entry, config, template):
    """A small file that is held out whole is no trouble."""
    config.datasets, config.validation_split = [entry(1, "a"), entry(1, "b")], 1
    data = load_data(config, template)
    loader = MicrobatchLoader(data.train, config, PAD)
    assert loader.epoch_size == 1 and len(next(loader.steps())[1]) == 1


def test_padding_is_saved(jsonl, config, template):
    """Packing and grouping by length do what they are for."""

    def places(**options) -> int:
        for name in ("packing", "group_by_length"):
            setattr(config, name, options.get(name, False))
        loader = MicrobatchLoader(train, config, PAD)
        steps = itertools.islice(loader.steps(), loader.steps_per_epoch)
        return sum(batch.input_ids.numel() for _, batches in steps for batch in batches)

    rows = [{"prompt": "x" * (1 + 37 * i % 300), "response": "y"} for i in range(200)]
    config.datasets, config.total_batch_size = [jsonl(rows)], 10
    train = load_data(config, template).train
    assert places(packing=True) < 0.8 * places() and places(group_by_length=True) < 0.8 * places()
    assert int(train.lengths.sum()) <= places(packing=True)


def test_the_digest_of_a_step(jsonl, config, template):
    """It tells tokens, their order and which of them are learned, and not what else an example holds."""
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd")]

    def digest(indices, train_on="all_turns", rows=({"prompt": "a", "response": "b"}, {"messages": turns})):
        config.datasets, template.targets = [jsonl(rows)], template.targets._replace(train_on=train_on)
        return load_data(config, template).train.digest(indices)

    assert (
        digest([0, 1])
        == digest([0, 1])
        == digest([0, 1], rows=({"prompt": "a", "response": "b"}, {"messages": turns}, {"text": "c"}))
    )
    assert len({digest([0, 1]), digest([1, 0]), digest([0]), digest([0, 1], "last_turn")}) == 4


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_of_a_budget_of_tokens(entry, config, template, world_size, packing):
    """In training and evaluation: the same examples, and no batch has more tokens unless it has one example."""
    config.datasets, config.total_batch_size = [entry(50, "a")], 12
    config.packing, config.eval_batch_size = packing, 5
    train = load_data(config, template).train
    plain = MicrobatchLoader(train, config, PAD, 0, 1)
    wanted = [indices for indices, _ in itertools.islice(plain.steps(), 4)]
    config.max_tokens_per_micro_batch = 120
    loaders = [MicrobatchLoader(train, config, PAD, rank, world_size) for rank in range(world_size)]
    batches = []
    for step, shares in enumerate(itertools.islice(zip(*(loader.steps() for loader in loaders)), 4)):
        assert all(indices == wanted[step] for indices, _ in shares)
        assert len({len(mine) for _, mine in shares}) == 1
        of_step = [batch for _, mine in shares for batch in mine]
        assert answers(of_step, template).total() == 12
        batches += of_step
    evaluated = [list(loader.eval_batches()) for loader in loaders]
    assert len(set(map(len, evaluated))) == 1
    batches += [batch for mine in evaluated for batch in mine]
    assert answers((batch for mine in evaluated for batch in mine), template) == expected("a", 50)
    assert all(batch.input_ids.numel() <= 120 or batch.n_docs <= 1 for batch in batches)
    assert max(batch.n_docs for mine in evaluated for batch in mine) <= 5
    assert max(batch.input_ids.numel() for batch in batches) > 60


@pytest.mark.parametrize(("budget", "warned"), [(10_000, False), (50, True)])
def test_examples_above_the_budget_are_counted(entry, config, template, budget, warned, wording):
    config.datasets, config.max_tokens_per_micro_batch = [entry(50, "a")], budget
    message = MicrobatchLoader(load_data(config, template).train, config, PAD).describe_too_long()
    assert (message is not None) == warned
    if warned:
        wording(message)
