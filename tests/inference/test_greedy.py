"""Only minitrain's own options choose tokens: defaults in a base model's generation_config.json never act."""

import builtins
import io
import json
import shutil
from contextlib import redirect_stdout

import pytest
import torch

from minitrain.inference.choice import Sample
from minitrain.inference.generate import Generator, Sampling, load_generator
from minitrain.inference.parse import THINK
from minitrain.inference.plain_loop import PlainLoop

PROMPTS = ["a", "what is 1 + 1?", "a prompt that is longer than the others by far", "b"]
N_NEW = 12
A = 68  # the id of a letter that greedy answers hold
KNOBS = {
    "repetition_penalty": 1.3,
    "encoder_repetition_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 200)),
    "begin_suppress_tokens": list(range(3, 200)),
    "bad_words_ids": [[token] for token in range(3, 200)],
    "sequence_bias": [[[A], 100.0]],
    "forced_bos_token_id": A,
    "forced_eos_token_id": A,
    "exponential_decay_length_penalty": [1, 50.0],
    "min_length": 200,
    "min_new_tokens": 100,
    "max_length": 3,
    "max_time": 0.0,
    "stop_strings": ["a", "b", "c", "d", "e"],
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.99,
    "top_h": 0.01,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "num_beams": 3,
    "length_penalty": 5.0,
    "early_stopping": True,
    "num_return_sequences": 2,
    "guidance_scale": 3.0,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "watermarking_config": {"bias": 50.0},
    "token_healing": True,
    "return_dict_in_generate": True,
    "output_scores": True,
    "prompt_lookup_num_tokens": 3,
    "use_cache": False,
    "cache_implementation": "static",
    "eos_token_id": list(range(3, 200)),
    "pad_token_id": A,
    "bos_token_id": A,
    "decoder_start_token_id": A,
}
NEED_BEAMS = ("num_return_sequences", "early_stopping", "length_penalty")  # transformers refuses them alone


def conversations(*texts: str) -> list[list[dict]]:
    return [[{"role": "user", "content": text}] for text in texts]


def write_defaults(folder, defaults: dict) -> None:
    (folder / "generation_config.json").write_text(json.dumps(defaults))


@pytest.fixture
def base(llama_folder, tmp_path):
    """The random Llama in a folder whose generation_config.json may be changed."""
    return shutil.copytree(llama_folder, tmp_path / "base")


@torch.no_grad()
def argmax_answers(generator: Generator) -> list[str]:
    """Answers made of the likeliest token each time, by whole forward passes without a cache."""
    answers = []
    for messages in conversations(*PROMPTS):
        ids = generator.encode(messages)
        start = len(ids)
        while len(ids) < start + N_NEW and (len(ids) == start or ids[-1] not in generator.end_ids):
            ids.append(int(generator.model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(generator.tokenizer.decode(ids[start:], skip_special_tokens=True))
    return answers


@pytest.fixture(scope="module")
def greedy(llama_folder) -> list[str]:
    return argmax_answers(load_generator(str(llama_folder), device="cpu"))


@pytest.mark.parametrize("knob", KNOBS)
def test_greedy_answers_are_those_of_an_argmax_loop(knob, base, greedy):
    """Each default of the base, set by itself, changes no answer, in batches and streamed."""
    write_defaults(base, {knob: KNOBS[knob]} | ({"num_beams": 3} if knob in NEED_BEAMS else {}))
    generator = load_generator(str(base), device="cpu")
    assert generator.generate(conversations(*PROMPTS), Sampling(N_NEW)) == greedy
    with redirect_stdout(io.StringIO()) as printed:
        assert generator.stream(conversations(PROMPTS[1])[0], Sampling(N_NEW)).text == greedy[1]
    assert printed.getvalue().strip("\n") == greedy[1].strip("\n")
    generator.sampler.make_loop = PlainLoop  # which calls `generate` of transformers
    assert generator.generate(conversations(*PROMPTS), Sampling(N_NEW)) == greedy


def test_a_stop_string_ends_a_streamed_answer(base, greedy):
    """What is printed ends with the string, as the answer does."""
    generator, stop = load_generator(str(base), device="cpu"), greedy[1][3:5]
    wanted = greedy[1][: greedy[1].index(stop) + 2]
    assert wanted != greedy[1]
    with redirect_stdout(io.StringIO()) as printed:
        response = generator.stream(conversations(PROMPTS[1])[0], Sampling(N_NEW, stop=[stop]))
    assert response.text == wanted == generator.generate(conversations(PROMPTS[1]), Sampling(N_NEW, stop=[stop]))[0]
    assert printed.getvalue().strip("\n") == wanted.strip("\n")


@pytest.mark.parametrize("opens_thought", [False, True])
def test_a_streamed_answer_is_printed_in_whole_characters(base, opens_thought, monkeypatch):
    """Each byte is a token: a character is printed with its last one, and special tokens are not."""
    generator, written = load_generator(str(base), device="cpu"), []
    monkeypatch.setattr(generator.parser, "opens_thought", lambda prompt: opens_thought)
    text = "Grüße, 日本 🙂 done"
    ids = generator.tokenizer(f"<|im_start|>{text}", add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)

    def sample(requests, choose, is_stopped, on_step):
        for n in range(1, len(ids) + 1):
            is_stopped(ids[:n])
        return [[Sample(ids, [0.0] * len(ids))]]

    def show(text, end=None, flush=False):
        written.append(text + ("\n" if end is None else end))

    generator.sampler.sample = sample
    monkeypatch.setattr(builtins, "print", show)
    generator.stream(conversations("a")[0], Sampling(N_NEW))
    assert "".join(written) == f"{THINK}\n" * opens_thought + f"{text}\n"
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in written)


def test_a_repository_does_not_bring_its_own_generate(base, greedy):
    """transformers puts custom_generate/generate.py of a trusted repository in the place of the model's `generate`."""
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text("def generate(model, input_ids, **kwargs): return input_ids")
    generator = load_generator(str(base), device="cpu", trust_remote_code=True)
    assert generator.generate(conversations(*PROMPTS), Sampling(N_NEW)) == greedy


def test_sampled_answers_are_those_without_defaults(base):
    """All defaults at once change no sampled answer either."""
    sampling = Sampling(N_NEW, temperature=0.7, top_p=0.9, seed=3)
    answers = []
    refused = {"forced_bos_token_id": None, "forced_eos_token_id": None}  # with suppress_tokens that hold them
    for defaults in ({}, KNOBS | refused):
        write_defaults(base, defaults)
        answers.append(load_generator(str(base), device="cpu").generate(conversations(*PROMPTS), sampling))
    assert answers[0] == answers[1]


def test_a_trainer_answers_greedily(base, make_trainer, greedy):
    """A trainer's answers are those of an argmax loop, and its final/ keeps the base's defaults."""
    defaults = {"repetition_penalty": 1.3, "min_new_tokens": 100, "do_sample": True, "top_p": 0.8, "temperature": 0.6}
    write_defaults(base, defaults)
    trainer = make_trainer(f"model.name_or_path={base}", "model.policy_dtype=float32", "n_steps=1")
    assert trainer.predict(PROMPTS, max_new_tokens=N_NEW) == greedy
    trainer.train()
    assert json.loads((trainer.run.final / "generation_config.json").read_text()).items() >= defaults.items()
