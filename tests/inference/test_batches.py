"""Answers and scores near the end of what a model can read: the same in batches and alone."""

import pytest
import torch
import transformers as tf

from minitrain.cli.main import main
from minitrain.data.examples import ClassificationExample
from minitrain.data.template import Template
from minitrain.inference.choice import Chooser, Request
from minitrain.inference.generate import Generator, Sampling
from minitrain.inference.plain_loop import PlainLoop
from minitrain.inference.sampler import Sampler, one_at_a_time
from minitrain.inference.score import ScoringRequest, load_scorer
from minitrain.inference.slots import SlotLoop
from minitrain.model.positions import batches_by_length
from minitrain.model.sequence_head import make_policy, name_outputs
from minitrain.model.tiny import tiny_tokenizer
from tests.tools.test_validate_refusals import MODELS, ROTARY, WIDE

PHI3 = WIDE | {"pad_token_id": 0, "original_max_position_embeddings": 32, "attn_implementation": "eager"}
KINDS = MODELS | {
    "dynamic": lambda: tf.LlamaConfig(**WIDE | rotary("dynamic")),
    "longrope": lambda: tf.LlamaConfig(**WIDE | rotary("longrope")),
    "phi3": lambda: tf.Phi3Config(**PHI3 | rotary("longrope")),
}
ROOM = 12  # tokens of an answer


def rotary(kind: str) -> dict:
    return {"rope_parameters": ROTARY[kind] | {"rope_theta": 1e4}, "initializer_range": 0.2}


def random_model(kind: str, auto=tf.AutoModelForCausalLM, **changes):
    torch.manual_seed(0)
    config = KINDS[kind]()
    config.update(changes)
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    """Token ids, no two of one length alike."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


def test_batches_have_one_length_beyond_the_limit():
    """Below it they are filled, the longest texts first."""
    lengths = [3, 9, 5, 12, 9, 4, 9]
    assert batches_by_length(lengths, 2, 8) == [[3], [1, 4], [6], [2, 5], [0]]
    assert batches_by_length(lengths, 4, 12) == [[3, 1, 4, 6], [2, 5, 0]]
    assert batches_by_length([], 4, 12) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mpt", "mamba", "dynamic", "longrope", "phi3"])
def test_answers_near_the_end_of_what_a_model_reads(kind):
    """A prompt that leaves little room shortens no other answer, and rotary frequencies are those of the text alone."""
    generator = Generator(random_model(kind), Template(tiny_tokenizer(), "chatml"))
    generator.end_ids = [258]  # none of these models says it first
    asked = prompts(10, 20, 28, 40, 40, 58)
    alone = [generator.generate_from_ids([ids], Sampling(ROOM))[0] for ids in asked]
    assert generator.generate_from_ids(asked, Sampling(ROOM)) == alone
    expected = generator.model.generate(
        torch.tensor([asked[0]]), max_new_tokens=ROOM, do_sample=False, eos_token_id=258, pad_token_id=0
    )[0, len(asked[0]) :]
    assert generator.tokenizer.decode(expected, skip_special_tokens=True) == alone[0].text


BART = dict(decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, d_model=32, bos_token_id=1, eos_token_id=2)
RNN = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2}
PADDED = {
    "llama": (tf.LlamaConfig, WIDE, SlotLoop),
    "bloom": (tf.BloomConfig, {"vocab_size": 259, "hidden_size": 32, "n_layer": 2, "n_head": 4}, SlotLoop),
    "mamba": (tf.MambaConfig, {**RNN, "state_size": 8}, PlainLoop),
    "bart": (tf.BartConfig, {"vocab_size": 259, "max_position_embeddings": 64, "pad_token_id": 0, **BART}, PlainLoop),
    "rwkv": (tf.RwkvConfig, {**RNN, "context_length": 64}, one_at_a_time),
}


@pytest.mark.parametrize("kind", PADDED)
def test_the_fastest_loop_that_gives_the_responses_of_the_model(kind):
    """BART counts positions from the first token, padding or not; Mamba has no keys; a batch of RWKV mixes its rows."""
    make, options, loop = PADDED[kind]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(make(**options)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    model.generation_config = tf.GenerationConfig()  # BART's forces the last token
    generator = Generator(model, Template(tiny_tokenizer(), "chatml"))
    generator.end_ids = [258]
    asked = prompts(10, 7, 15, 7)
    found = [response.text for response in generator.generate_from_ids(asked, Sampling(8))]
    for ids, text in zip(asked, found, strict=True):
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=258, pad_token_id=0, use_cache=True
        )[0, len(ids) :]
        assert generator.tokenizer.decode(expected, skip_special_tokens=True) == text
    assert generator.sampler.make_loop is loop


def test_trained_vectors_take_room(tmp_path, make_trainer):
    """GPT-2 looks up the positions of soft prompts, too: an answer ends where its table does."""
    random_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    for method in ("prompt", "prefix"):
        options = [f"model.name_or_path={tmp_path / 'gpt2'}", f"soft_prompt.method={method}", f"exp_name={method}"]
        trainer = make_trainer("soft_prompt.num_virtual_tokens=10", "max_length=54", *options)
        for generator in (trainer.generator, Generator(trainer.policy.model, trainer.template)):
            generator.end_ids = [258]
            assert len(generator._generate(prompts(50), Sampling(ROOM))[0]) == 64 - 10 - 50


def test_answers_while_training_reach_as_far_as_training(tmp_path, make_trainer):
    """A model that can be trained beyond max_position_embeddings also answers there, as transformers does."""
    model = random_model("llama")
    model.save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    trainer = make_trainer(f"model.name_or_path={tmp_path / 'llama'}", "max_length=100")
    (ids,) = prompts(70)
    trainer.generator.end_ids = [258]
    expected = model.generate(
        torch.tensor([ids]), max_new_tokens=ROOM, do_sample=False, eos_token_id=258, pad_token_id=0
    )[0, 70:]
    assert trainer.generator._generate([ids], Sampling(ROOM))[0] == expected.tolist()
    assert len(expected) == ROOM


def test_a_long_answer_changes_no_later_text(tmp_path, make_trainer):
    """Dynamic frequencies go back to what they were: logits of a text of 64 tokens are those before."""
    random_model("dynamic").save_pretrained(tmp_path / "dynamic")
    tiny_tokenizer().save_pretrained(tmp_path / "dynamic")
    trainer = make_trainer(f"model.name_or_path={tmp_path / 'dynamic'}", "max_length=64")
    trainer.generator.end_ids = [258]
    model, (text, prompt) = trainer.policy.model.eval(), prompts(64, 60)
    with torch.no_grad():
        before = model(torch.tensor([text])).logits
        assert len(trainer.generator._generate([prompt], Sampling(ROOM))[0]) == ROOM  # 8 tokens beyond
        torch.testing.assert_close(model(torch.tensor([text])).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_an_answer_that_has_ended_changes_no_other(kind):
    """It stays in the batch for a while, but not at positions from which on all rows have other frequencies."""
    policy = make_policy(random_model(kind)).eval()
    limit = policy.rotary_limit
    (long, *others) = prompts(limit - 2, *[5] * 11)
    requests = [Request(long, [(0,)], 2), *(Request(ids, [(i,)], 20) for i, ids in enumerate(others, 1))]
    alone = [sample_all(policy, [request], 1) for request in requests]
    assert sample_all(policy, requests, len(requests)) == [ids for (ids,) in alone]


def sample_all(policy, requests: list[Request], n_slots: int) -> list[list[int]]:
    sampler = Sampler(policy, (), n_slots)
    sampler.make_loop = SlotLoop
    return [one.ids for (one,) in sampler.sample(requests, Chooser(1.0))]


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "gpt2"])
def test_scores_of_long_texts(kind, tmp_path, capsys):
    """A batch gives what transformers gives for each text alone; a text that is cut is counted."""
    tokenizer = tiny_tokenizer()
    model = random_model(kind, tf.AutoModelForSequenceClassification, num_labels=3, pad_token_id=0)
    name_outputs(model, ["a", "b", "c"], tokenizer.pad_token_id, [])
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    asked = [
        ScoringRequest("--text", {}, ClassificationExample("ab" * (n // 2), None, "")) for n in (8, 20, 40, 40, 60)
    ]
    judge = load_scorer(str(tmp_path / "m"), asked, "cpu")
    found = judge.scores(asked)
    for i, one in enumerate(asked):
        ids = torch.tensor([tokenizer(one.example.text)["input_ids"]])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0]
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-4)
    capsys.readouterr()
    assert main(["score", str(tmp_path / "m"), "--text", "short", "x" * 70, "--quiet"]) == 0
    assert capsys.readouterr().err == "warning: 1 of 2 texts were truncated to 64 tokens, the model's limit\n"
