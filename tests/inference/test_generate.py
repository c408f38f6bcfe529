"""Answers: the same in batches, alone and from transformers, with the saved template, dtype and end tokens."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitrain.data.template import Template
from minitrain.errors import ConfigError, DataError
from minitrain.inference.generate import Generator, Sampling, load_generator
from minitrain.model.save import save_model
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import chain_model, random_llama
from tests.messages import raises

PROMPTS = ["a", "what is 1 + 1?", "a prompt that is longer than the others by far", "ünï ☃", "b"]
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture
def generator(llama_folder) -> Generator:
    """The random Llama, loaded as the commands load it."""
    return load_generator(str(llama_folder))


def asked(*texts: str) -> list[list[dict]]:
    """One conversation for each text."""
    return [[{"role": "user", "content": text}] for text in texts]


def test_batches_equal_one_by_one(generator):
    """Left padding and the order of batches change no greedy answer."""
    alone = [generator.generate([messages], GREEDY)[0] for messages in asked(*PROMPTS)]
    assert len(set(alone)) > 2
    for batch_size in (2, 3, 16):
        assert generator.generate(asked(*PROMPTS), GREEDY, batch_size=batch_size) == alone


def test_equal_to_transformers(generator, llama_folder):
    """A single prompt gives what transformers alone gives for the folder's own chat template."""
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template = generator.tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    for messages in asked(*PROMPTS):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert generator.generate([messages], GREEDY) == [expected]


def test_answers_end_at_the_end_of_the_turn():
    """Generation stops at the token that the template closes a turn with, also when it is not EOS.

    The oracle is a model that says x, y, <|im_end|>, z, z, ... by construction.
    """
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.eos_token = "<|pad|>"
    x, y, z = tokenizer("xyz")["input_ids"]
    model = chain_model(tokenizer, x, y, end, z).eval()
    generator = Generator(model, Template(tokenizer, "chatml"))
    assert generator.end_ids == sorted({tokenizer.pad_token_id, end})
    assert generator.generate(asked("hi", "a longer question"), GREEDY) == ["xy", "xy"]
    plain = Generator(model, Template(tokenizer, "none"))  # where only EOS ends an answer
    ids = plain._generate([tokenizer("hi")["input_ids"]], Sampling(max_new_tokens=6))
    assert ids == [[x, y, end, z, z, z]]


def test_the_saved_template_is_used(tmp_path):
    """A folder's own chat template makes the prompt, unless another one is asked for."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} =>"
    save_model(random_llama(), tokenizer, tmp_path, torch.float32)
    saved, chatml = load_generator(str(tmp_path)), load_generator(str(tmp_path), chat_template="chatml")
    assert saved.tokenizer.decode(saved.encode(*asked("hi"))) == "[user] hi =>"
    assert chatml.tokenizer.decode(chatml.encode(*asked("hi"))) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [True, False])
def test_the_saved_dtype_where_the_processor_has_it(tmp_path, monkeypatch, dtype, native):
    """bfloat16 stays so on a CPU that multiplies it; what the CPU would only emulate becomes float32."""
    save_model(random_llama(), tiny_tokenizer(), tmp_path, dtype)
    monkeypatch.setattr("minitrain.inference.generate.cpu_has_bfloat16", lambda: native)
    expected = torch.bfloat16 if native and dtype == torch.bfloat16 else torch.float32
    assert load_generator(str(tmp_path), device="cpu").model.dtype == expected


def test_the_embedded_model_is_not_looked_for(monkeypatch):
    """`tiny` is built on the spot: no hub is asked for a model of that name."""
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("asked for"))
    assert load_generator("tiny", device="cpu").model.dtype == torch.float32


def test_places_of_the_model(tmp_path):
    """A prompt without a place left is an error; an answer ends where the places do."""
    save_model(random_llama(max_position_embeddings=40), tiny_tokenizer(), tmp_path, torch.float32)
    generator = load_generator(str(tmp_path))
    overhead = len(generator.encode(*asked("")))
    with raises(DataError, "too-large", "40 tokens"):
        generator.encode(*asked("x" * (40 - overhead)))
    generator.end_ids = [258]  # which the model does not say
    prompt = generator.encode(*asked("x" * (37 - overhead)))
    assert len(generator._generate([prompt], GREEDY)[0]) == 3


def test_sampling(generator):
    """The same seed repeats itself, each call draws anew, and temperature 0 draws nothing."""
    hot = Sampling(8, temperature=0.7, seed=3)
    state = torch.get_rng_state()
    first, second = (generator.generate(asked("a", "b"), hot) for _ in range(2))
    assert first != second and torch.equal(state, torch.get_rng_state())
    generator.calls = 0
    assert generator.generate(asked("a", "b"), hot) == first
    greedy = [generator.generate(asked("a"), Sampling(8, seed=seed)) for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_run_folders(tmp_path, llama_folder):
    """final/ comes before best/; a run without either says what to do."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with raises(ConfigError, "unfinished-run", str(run)):
        load_generator(str(run))
    for name in ("best", "final"):
        (run / name).symlink_to(llama_folder)
        assert load_generator(str(run)).model.config._name_or_path == str(run / name)


def test_from_training_to_answers(make_trainer):
    """The model in final/ answers as the trainer did at its end."""
    trainer = make_trainer("lr=0.1", "model.policy_dtype=float32")
    trainer.train()
    before = trainer.predict(PROMPTS[:2], max_new_tokens=8)
    after = load_generator(str(trainer.run.path)).generate(asked(*PROMPTS[:2]), Sampling(8))
    assert before == after
    assert json.loads((trainer.run.final / "config.json").read_text())["dtype"] == "float32"
