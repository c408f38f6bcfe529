"""The decode loop: log-probabilities of the model itself, and responses that do not depend on their batch."""

import itertools

import numpy as np
import pytest
import torch
import transformers as tf

from minitrain.inference.choice import LARGE_VOCABULARY, VOCABULARY_BLOCK, Chooser, Request, TokenChoice, uniforms_of
from minitrain.inference.plain_loop import PlainLoop
from minitrain.inference.sampler import Sampler, by_own_logits, one_at_a_time
from minitrain.inference.slots import SLOT_BYTES, SlotLoop, fitting_slots
from minitrain.model import attention
from minitrain.model.sequence_head import make_policy
from tests.conftest import random_llama
from tests.shapes import SHAPE as TINY

pytestmark = pytest.mark.numeric

SHAPE = TINY | {"vocab_size": 96}
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE)),
    "qwen3-tied": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True)),
    "mistral-window": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SHAPE, sliding_window=4)),
    "gemma2-softcap": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, final_logit_softcapping=2.0)
    ),
    "granite-scaling": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "gpt2-positions": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "bloom-alibi": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
}
RECURRENT = {
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)),
    "lfm2-hybrid": lambda: tf.Lfm2ForCausalLM(tf.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])),
    "rwkv": lambda: tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)),
}
SLOWER = {"rwkv": one_at_a_time}  # a batch mixes its rows in transformers 5.23
LENGTHS = (5, 17, 9, 1)


def random_model(name):
    torch.manual_seed(0)
    model = (MODELS | RECURRENT)[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def requests(n=3, limit=12):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Request(prompt, [(7, i, j) for j in range(n)], limit) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def sample(model, asked, choose, n_slots=64, end_ids=(2,), **options):
    return Sampler(make_policy(model).eval(), end_ids, n_slots).sample(asked, choose, **options)


@torch.no_grad()
def logps_of(model, prompt, ids, temperature):
    """Return the log-probabilities of a response in one forward pass of transformers, in float64."""
    tokens = torch.tensor([prompt + ids])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS | RECURRENT)
def test_log_probabilities_are_those_of_the_model(name):
    model, asked = random_model(name), requests()
    sampler = Sampler(make_policy(model).eval(), (2,), 5)
    assert sampler.make_loop is (SlotLoop if name in MODELS else SLOWER.get(name, PlainLoop))
    for request, samples in zip(asked, sampler.sample(asked, Chooser(0.7)), strict=True):
        for one in samples:
            want = logps_of(model, request.prompt, one.ids, 0.7)
            torch.testing.assert_close(torch.tensor(one.logps).double(), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "makes_masks"), [("llama", True), ("mistral-window", False)])
def test_masks_of_padded_rows(name, makes_masks):
    """The loop makes the mask of a model whose attention takes it, but not that of a sliding window."""
    model, shapes = random_model(name), set()
    want = sample(model, requests(), Chooser(0.7))
    attention.attend_by_document(model)
    hook = model.model.register_forward_pre_hook(
        lambda module, args, options: shapes.add(options["attention_mask"].ndim), with_kwargs=True
    )
    sampler = Sampler(make_policy(model).eval(), (2,))
    sampler.make_loop = SlotLoop
    found = sampler.sample(requests(), Chooser(0.7))
    hook.remove()
    assert shapes == ({2, 4} if makes_masks else {2})
    assert [[one.ids for one in samples] for samples in found] == [[one.ids for one in samples] for samples in want]


@torch.no_grad()
def test_rows_of_one_length_have_no_mask():
    """Attention is faster without one, in the prompts and in each step."""
    model, masks = random_model("llama"), []
    policy = make_policy(model).eval()
    model.model.register_forward_pre_hook(
        lambda module, args, options: masks.append(options["attention_mask"]), with_kwargs=True
    )
    choice = TokenChoice(policy, Chooser(1.0), set())
    rows = choice.rows([Request([3, 4, 5 + i], [(i, 0), (i, 1)], 6) for i in range(3)])
    SlotLoop(policy, 64).run([row for of_request in rows for row in of_request], choice)
    assert masks == [None] * 6  # the prompts, and 5 of 6 tokens


@torch.no_grad()
def test_the_default_number_of_rows_is_what_fits(monkeypatch):
    policy, numbers = make_policy(random_model("llama")).eval(), []
    monkeypatch.setattr("minitrain.inference.sampler.fitting_slots", lambda policy, length: 100 + length)
    for n_slots in (None, 7):
        sampler = Sampler(policy, (2,), n_slots)
        sampler.make_loop = lambda policy, n: numbers.append(n) or SlotLoop(policy, n)
        sampler.sample([Request([3, 4, 5], [(0,)], 2), Request([3], [(1,)], 1)], Chooser(1.0))
    assert set(numbers[:2]) == {100 + 3 + 2} and set(numbers[2:]) == {7}


def test_rows_that_fit_by_default():
    """2 layers of 2 x 2 heads of 8 float32 a token, and 96 logits: from 64 to 512 rows, by the memory of a row."""
    policy = make_policy(random_model("qwen3-tied"))
    of_token, of_logits = 2 * 2 * policy.model.config.num_key_value_heads * 8 * 4, 96 * 4
    length = 4 * SLOT_BYTES // 1000 // of_token  # about 250 rows
    assert fitting_slots(policy, length) == SLOT_BYTES // (of_token * length + of_logits) in range(200, 300)
    assert fitting_slots(policy, 10) == 512 and fitting_slots(policy, 10**8) == 64


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2-positions"])
def test_a_response_does_not_depend_on_its_batch(name):
    """One slot, five, enough for all, and another order of the prompts: the same tokens (silent RL bug R32)."""
    model, asked = random_model(name), requests()
    want = [[one.ids for one in samples] for samples in sample(model, asked, Chooser(0.8))]
    for n_slots in (1, 5):
        assert [[one.ids for one in samples] for samples in sample(model, asked, Chooser(0.8), n_slots)] == want
    turned = sample(model, asked[::-1], Chooser(0.8), 2)
    assert [[one.ids for one in samples] for samples in turned[::-1]] == want
    assert len({tuple(ids) for samples in want for ids in samples}) > len(want)  # keys make a difference


@torch.no_grad()
def test_a_response_does_not_depend_on_the_loop():
    """Ended by a stop, an end token or its own limit, with the same log-probabilities."""
    asked = [request._replace(limit=5 + i) for i, request in enumerate(requests())]
    found = []
    for make_loop in (SlotLoop, PlainLoop, one_at_a_time, by_own_logits):
        sampler, counts = Sampler(make_policy(random_model("llama")).eval(), (2, 3, 4), 5), []
        sampler.make_loop = make_loop
        samples = sampler.sample(asked, Chooser(1.2, 0.95), lambda ids: sum(ids) % 7 == 0, counts.append)
        found.append([one for of_request in samples for one in of_request])
        assert sum(counts) == 12
    assert len({len(one.ids) for one in found[0]}) > 3
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert (one.ids, one.ended) == (other.ids, other.ended)
            assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_greedy_decoding_equals_an_argmax_loop():
    model, asked = random_model("llama"), requests(n=1)
    for request, (one,) in zip(asked, sample(model, asked, Chooser()), strict=True):
        ids = list(request.prompt)
        while len(ids) < len(request.prompt) + request.limit and (len(ids) == len(request.prompt) or ids[-1] != 2):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert one.ids == ids[len(request.prompt) :]
        assert one.ended == (one.ids[-1] == 2)


def computed_shapes(n_slots: int, given: list[Request]) -> list[torch.Size]:
    """Return (rows, columns) of each forward pass that samples for these requests."""
    model, shapes = random_model("llama"), []
    sampler = Sampler(make_policy(model).eval(), (), n_slots)
    assert sampler.make_loop is SlotLoop
    hook = model.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[:2]))
    sampler.sample(given, Chooser(1.0))
    hook.remove()
    return shapes


@torch.no_grad()
def test_a_prompt_is_computed_once():
    """Its n responses share its keys and values, also if they do not fit into the slots at once."""
    widths = computed_shapes(4, requests(n=6))
    assert sum(rows for rows, width in widths if width > 1) + sum(1 for n in LENGTHS if n == 1) <= len(LENGTHS) + 1


@torch.no_grad()
def test_prompts_of_the_next_rows_are_computed_with_those_of_new_rows():
    widths = computed_shapes(8, [Request([3, 4, 5, i], [(i,)], 3 + i % 5) for i in range(6, 38)])
    batches = [rows for rows, width in widths if width > 1]
    assert batches[0] == 8 + 2 and sum(batches) == 32 and len(batches) < 12


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "gpt2-positions"])
def test_rows_that_are_exchanged_have_their_own_keys_and_values(name, monkeypatch):
    """Those of a new row are its prompt's; those of a row that stays or moves are of its prompt and its tokens."""
    model, counts = random_model(name), {"_exchange": 0, "_rebuild": 0, "moved": 0}

    def checked(method):
        change = getattr(SlotLoop, method)

        def run(loop, slots, active, new):
            slots, rows = change(loop, slots, active, new)
            counts[method] += 1
            counts["moved"] += sum(row in active and rows.index(row) < active.index(row) for row in rows)
            assert len(rows) == len(new) + sum(not row.done for row in active) == len(slots.hidden)
            for i, row in enumerate(rows):
                ids = torch.tensor([row.prompt + row.sample.ids])
                cache = tf.DynamicCache()
                states = model.base_model(input_ids=ids, past_key_values=cache).last_hidden_state[0, -1]
                torch.testing.assert_close(slots.hidden[i], states, rtol=1e-3, atol=1e-4)
                assert slots.columns - slots.starts[i] == ids.numel()
                for layer, want in zip(slots.cache.layers, cache.layers, strict=True):
                    for found, value in ((layer.keys, want.keys), (layer.values, want.values)):
                        found = found[i, :, slots.starts[i] : slots.columns]
                        torch.testing.assert_close(found, value[0], rtol=1e-3, atol=1e-4)
            return slots, rows

        monkeypatch.setattr(SlotLoop, method, run)

    sampler = Sampler(make_policy(model).eval(), range(3, 12), 6)
    assert sampler.make_loop is SlotLoop
    checked("_exchange"), checked("_rebuild")
    sampler.sample(requests(n=5, limit=40), Chooser(1.5))
    assert counts["_exchange"] > 5 and counts["_rebuild"] < 5 and counts["moved"] > 0


def test_responses_end_at_an_end_token_a_stop_or_the_limit():
    model, asked = random_model("llama"), requests(n=8, limit=10)
    for samples in sample(model, asked, Chooser(1.5), end_ids=(2, 3, 4, 5, 6, 7, 8, 9)):
        for one in samples:
            ends = [token in range(2, 10) for token in one.ids]
            assert not any(ends[:-1]) and one.ended == ends[-1] and (one.ended or len(one.ids) == 10)
    stopped = sample(model, asked, Chooser(1.5), end_ids=(), is_stopped=lambda ids: len(ids) == 3)
    assert all(one.ended and len(one.ids) == 3 for samples in stopped for one in samples)


def test_samples_follow_the_distribution():
    """Chi-square of 20,000 tokens against the probabilities at temperature 0.7."""
    logits = torch.linspace(-2, 2, 12)[None].expand(20_000, -1)
    uniforms = torch.tensor(np.random.Generator(np.random.PCG64(0)).random(20_000))
    ids, logps = Chooser(0.7)(logits, uniforms)
    probs = (logits[0].double() / 0.7).softmax(-1)
    counts = torch.bincount(ids, minlength=12).double()
    chi_square = float(((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum())
    assert chi_square < 31.3  # 99.9% quantile with 11 degrees of freedom
    torch.testing.assert_close(logps.double(), probs.log()[ids], rtol=1e-5, atol=1e-5)


N_LARGE = LARGE_VOCABULARY + 100  # the last block is not full


def large_logits(n):
    """Return logits [n, V] that differ a lot between blocks of a large vocabulary, and some probabilities of 0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, N_LARGE, generator=generator) * 3 + torch.linspace(-4, 4, N_LARGE).sin() * 3
    logits[:, ::3], logits[:, :VOCABULARY_BLOCK] = -torch.inf, -torch.inf
    return logits


def test_samples_of_a_large_vocabulary_follow_the_distribution():
    """Chi-square of 20,000 tokens, in 39 bins of tokens, among them the last block, which is not full."""
    generator = np.random.Generator(np.random.PCG64(0))
    logits = large_logits(1)
    probs = (logits[0].double() / 2).softmax(-1)
    bins = torch.arange(N_LARGE) % 38
    bins[LARGE_VOCABULARY:] = 38
    counts = torch.zeros(39)
    for _ in range(20):
        ids, logps = Chooser(2.0)(logits.repeat(1000, 1), torch.tensor(generator.random(1000)))
        counts += torch.bincount(bins[ids], minlength=39)
        torch.testing.assert_close(logps.double(), probs.log()[ids], rtol=1e-5, atol=1e-5)
    want = 20_000 * torch.zeros(39, dtype=torch.float64).index_add(0, bins, probs)
    assert want.min() > 5 and float(((counts - want) ** 2 / want).sum()) < 70.7  # 99.9%, 38 degrees of freedom


@pytest.mark.parametrize("choose", [Chooser(1.0), Chooser(0.7, top_p=0.8), Chooser(1.3, top_k=700)])
def test_tokens_of_a_large_vocabulary_are_those_of_one_sum_over_all(choose, monkeypatch):
    """A token without probability is never chosen, also by the smallest and the largest random numbers."""
    uniforms = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniforms[:4] = torch.tensor([0.0, 1 - 2**-53, 1 - 1e-9, 1e-12], dtype=torch.float64)
    uniforms[250:] = 1 - 0.02 * uniforms[250:]  # in the last block
    ids, logps = choose(large_logits(500), uniforms)
    assert large_logits(500).gather(1, ids[:, None]).isfinite().all()
    monkeypatch.setattr("minitrain.inference.choice.LARGE_VOCABULARY", N_LARGE + 1)
    want, want_logps = choose(large_logits(500), uniforms)
    assert ids[0] == want[0] and (ids == want).float().mean() > 0.99  # others are at a border, within rounding
    torch.testing.assert_close(logps[ids == want], want_logps[ids == want], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("choose", "allowed"),
    [(Chooser(1.0, top_k=2), {3, 1}), (Chooser(1.0, top_p=0.7), {3, 1}), (Chooser(1.0, 0.4), {3})],
)
def test_top_p_and_top_k_keep_the_most_likely_tokens(choose, allowed):
    """Probabilities 0.1, 0.3, 0.05, 0.5, 0.05. The log-probabilities stay those of the full distribution."""
    probs = torch.tensor([0.1, 0.3, 0.05, 0.5, 0.05])
    uniforms = torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64)
    ids, logps = choose(probs.log()[None].expand(500, -1), uniforms)
    assert set(ids.tolist()) == allowed
    torch.testing.assert_close(logps, probs.log()[ids], rtol=1e-5, atol=1e-5)


def test_random_numbers_are_a_function_of_the_key():
    first, again, other = (list(itertools.islice(uniforms_of(key), 201)) for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert first == again and len(set(first)) == 201
    assert not set(first) & set(other) and all(0 <= u < 1 for u in first)


def test_training_modes_are_left_alone():
    model = random_llama().train()
    policy = make_policy(model)
    with torch.no_grad():
        Sampler(policy, [2]).sample([Request([3, 4], [(0,)], 4)], Chooser(1.0))
    assert model.training
