"""Rounds that a vLLM server samples, against a stand-in that speaks its HTTP interface."""

import queue
import socket
import time

import pytest
import torch

from minitrain import ConfigError, RunError
from minitrain.inference.choice import Chooser, Request
from minitrain.model.tiny import tiny_model, tiny_tokenizer
from minitrain.rl import vllm
from minitrain.rl.vllm import Server, VLLMOptions
from tests.messages import raises
from tests.rl.test_rounds import online  # noqa: F401 (a fixture)
from tests.rl.vllm_server import VLLMServer

pytestmark = pytest.mark.numeric
ADAPTERS = {
    "full": {},
    "lora": {"lora": {"rank": 4}},
    "dora": {"lora": {"rank": 4, "use_dora": True}},
    "pissa": {"lora": {"rank": 4, "init": "pissa"}},
    "4bit": {"lora": {"rank": 4}, "model": {"name_or_path": "tiny", "quantization": "4bit"}},
}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(vllm, "FIRST_WAIT", 0.01)
    tokenizer = tiny_tokenizer()
    model = tiny_model(99, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)  # not the policy's weights
    server = VLLMServer(model, tokenizer)
    yield server
    server.close()


@pytest.fixture
def make(online, server):  # noqa: F811
    """Return a function that makes a trainer whose answers the server samples."""

    def trainer(rollout=None, engine_args=None, **options):
        args = {"url": server.url, "timeout": 20.0, "retries": 2} | (engine_args or {})
        return online(rollout={"engine": "vllm", "engine_args": args} | (rollout or {}), **options)

    return trainer


def differences(trainer):
    """Return how far the log-probabilities of the round are from those of the policy, at each sampled token."""
    cache = trainer.train_loader.examples.caches[0]
    old, sampled = (cache.token_features[name][cache.mask.bool()] for name in ("old_logps", "sample_logps"))
    return (old - sampled).abs()


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_server_samples_from_the_weights_after_each_step(make, server, name):
    """After steps with a large learning rate, its log-probabilities are the policy's (silent RL bug R37)."""
    correction = {"importance_correction": "tis", "num_iterations": 2}  # which needs old_logps
    trainer = make(correction, n_steps=5, lr=0.05, lr_scheduler="constant", max_grad_norm=0.0, **ADAPTERS[name])
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.train()
    assert max((p - q).detach().abs().max().item() for p, q in zip(before, trainer.parameters, strict=True)) > 0.05
    assert differences(trainer).max() < 1e-5
    assert len(server.loaded_from) == 4  # at the start and for each round
    assert not any(folder.exists() for folder in server.loaded_from)


def test_answers_are_complete(make, server):
    """The end token is in an answer, and each answer has its own random numbers (silent RL bugs R33, R38)."""
    trainer = make({"num_generations": 8, "max_new_tokens": 12}, n_steps=1)
    trainer.template.end_ids = lambda: list(range(3, 60))
    episodes = []
    judge = trainer.train_loader.judge
    trainer.train_loader.judge = lambda groups: episodes.extend(one for g in groups for one in g) or judge(groups)
    trainer.train()
    assert all((episode.ids[-1] in range(3, 60)) == episode.ended for episode in episodes)
    assert {episode.ended for episode in episodes} == {True, False}
    assert len({tuple(episode.ids) for episode in episodes}) > 20
    seeds = [body["seed"] for path, body in server.requests if path == "/v1/completions"]
    assert len(set(seeds)) == len(seeds) - 1  # the two prompts of the check have one key


def test_strings_and_greedy_answers(make):
    engine = make().train_loader.engine
    request = Request([5, 6], [(0,), (1,)], 40)
    engine.refresh(is_updated=True)
    first, second = engine.sample([request], Chooser(0.0), [])[0]
    assert first.ids == second.ids and len(first.ids) == 40 and not first.ended
    text = engine.trainer.tokenizer.decode(engine.sample([request], Chooser(1.0), [])[0][0].ids)
    stopped = engine.sample([request], Chooser(1.0), [], stop=[text[5]])[0][0]
    assert stopped.ended and text.startswith(engine.trainer.tokenizer.decode(stopped.ids)) and len(stopped.ids) <= 6


def test_a_server_that_computes_otherwise_is_refused(make, server):
    """A small difference, as of bfloat16, is corrected; a large one is another model (silent RL bug R1)."""
    server.logps = lambda logps: [logp - 0.1 for logp in logps]
    with raises(ConfigError, "mismatch", "rollout.engine: ", server.url, "0.1 ", "0.05"):
        make()
    trainer = make({"importance_correction": "icepop", "correction_low": 0.9}, n_steps=1)
    trainer.train()
    weights = trainer.train_loader.examples.caches[0].token_features["importance_weights"]
    torch.testing.assert_close(
        weights[trainer.train_loader.examples.caches[0].mask.bool()].mean().item(), 1.105, atol=2e-3, rtol=0
    )
    make(exp_name="other", loss={"name": "dpo"})
    server.logps = lambda logps: [logp - 1 for logp in logps]
    with raises(ConfigError, "mismatch", "rollout.engine: ", "0.5"):
        make({"importance_correction": "tis"}, exp_name="wrong")


def test_a_server_that_keeps_its_weights_is_noticed(make, server, capsys):
    """In rounds of one step without a correction, too: the mismatch is logged, and a warning names it."""
    trainer = make(n_steps=1)
    trainer.train()
    assert trainer.train_metrics["mismatch"] < 1e-5
    for lr, least, advice in ((0.01, 0.05, "rollout.importance_correction"), (0.3, 0.5, "rollout.engine=local")):
        trainer = make(exp_name=f"stale-{lr}", n_steps=3, lr=lr, lr_scheduler="constant")
        server.faults["/collective_rpc"] = lambda handler, body: (200, None)
        trainer.train()
        assert trainer.train_metrics["mismatch"] > least
        assert advice in capsys.readouterr().out
        server.faults.clear()


def test_a_round_sends_its_weights_once(make, server):
    """Each draw of a round wakes up the server; only the first one sends weights. So does an evaluation."""
    rollout = {"zero_variance_groups": "resample", "max_draws": 4, "rewards": [{"name": "regex", "pattern": ".*a.*"}]}
    evaluation = {"validation_split": 2, "eval_every_steps": 2, "eval_generate": {"n_examples": 2}}
    trainer = make(rollout | {"num_iterations": 2}, {"sleep": True}, n_steps=2, **evaluation)
    rounds, n_draws = trainer.train_loader, []
    draw = rounds.draw
    rounds.draw = lambda n: n_draws.append(n) or draw(n)
    trainer.train()
    n_rounds, n_evaluations, paths = rounds.number + 1, 2, [path for path, _ in server.requests]
    n_sampled = len(n_draws) + 2 * n_evaluations  # rewards, and greedy answers
    assert len(n_draws) > n_rounds
    assert paths.count("/collective_rpc") == 1 + n_rounds + n_evaluations  # the first one is a check
    assert paths.count("/wake_up") == n_sampled and paths.count("/sleep?level=1") == n_sampled + 1


def test_the_server_sleeps_while_the_policy_is_trained(make, server):
    trainer = make(engine_args={"sleep": True}, hooks={"on_step_end": lambda trainer: states.append(server.is_asleep)})
    states = [server.is_asleep]
    trainer.train()
    assert states == [True, True, True]


def test_the_key_of_the_server(make, server, monkeypatch):
    server.key = "secret-of-the-server"
    with raises(RunError, "process-failed", f"{server.url}/v1/completions", "401"):
        make()
    monkeypatch.setenv("VLLM_API_KEY", server.key)
    make()


def test_adapted_embeddings_are_refused(make):
    with raises(ConfigError, "conflict", "rollout.engine: "):
        make(lora={"rank": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]})


# ------------------------------------------------------------------------------------------------------ failures


def test_a_server_without_its_routes_is_named(make, server):
    server.dev_mode = False
    with raises(RunError, "process-failed", f"{server.url}/collective_rpc", "404", "VLLM_SERVER_DEV_MODE=1"):
        make()


def test_a_busy_server_is_asked_again(make, server):
    answers = [(503, b"loading"), (429, None)]
    server.faults["/v1/models"] = lambda handler, body: answers.pop(0) if answers else None
    make()
    server.faults["/v1/models"] = lambda handler, body: (503, b"loading")
    with raises(RunError, "unreachable", f"{server.url}/v1/models", "503 loading", "3 attempts"):
        make()


def test_a_signal_ends_the_requests(make, server):
    """Long before the answers: the connections are closed, by which a server knows that nobody waits."""
    trainer, closed = make({"num_generations": 2}, n_steps=1), queue.SimpleQueue()

    def hang(handler, body):
        time.sleep(0.2)  # until the other requests wait, too
        trainer._receive(15)
        handler.connection.settimeout(10)
        try:
            closed.put(handler.connection.recv(1) == b"")
        except TimeoutError:
            closed.put(False)
        return False

    server.faults["/v1/completions"] = hang
    trainer.train()
    assert (trainer.signal, trainer.step) == (15, 0)
    assert closed.get(timeout=15)


def test_the_watchdog_waits_for_a_slow_server(server):
    """For the time limit of each request and the wait after it, whatever fsdp.timeout_seconds is."""
    beats, faults = [], [(503, b"loading")]
    server.faults["/v1/models"] = lambda handler, body: faults.pop() if faults else None
    Server(VLLMOptions(url=server.url, timeout=50.0), beats.append).model_name()
    assert len(beats) == 2 and min(beats) > 50


def test_an_address_can_end_in_v1(server):
    assert Server(VLLMOptions(url=f"{server.url}/v1/")).model_name() == "served-model"


def cut(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    return False


def trickle(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("fault", "code", "part"),
    [
        (lambda handler, body: (500, {"error": {"message": "no such file"}}), "process-failed", "no such file"),
        (lambda handler, body: (200, b"<html>"), "process-failed", "<html>"),
        (lambda handler, body: time.sleep(1) or (200, None), "unreachable", "0.5 seconds"),
        (trickle, "unreachable", "0.5 seconds"),
        (cut, "unreachable", "3 attempts"),
    ],
)
def test_failures_end_soon_with_the_address(server, fault, code, part):
    server.faults["/collective_rpc"] = fault
    began = time.monotonic()
    with raises(RunError, code, f"{server.url}/collective_rpc", part):
        Server(VLLMOptions(url=server.url, timeout=0.5, retries=2)).call("/collective_rpc", {"method": "x"})
    assert time.monotonic() - began < 10


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with raises(RunError, "unreachable", f"http://127.0.0.1:{port}/v1/models", "1 attempts"):
            Server(VLLMOptions(url=f"http://127.0.0.1:{port}/", timeout=1, retries=0)).model_name()


GOOD = {
    "index": 0,
    "token_ids": [7, 2],
    "logprobs": {"token_logprobs": [-1.0, -2.0]},
    "finish_reason": "stop",
    "prompt_token_ids": [5, 6],
}
WRONG = {
    "another vocabulary": {"token_ids": [7, 100_000]},
    "not ids": {"token_ids": ["7", "2"]},
    "no ids, as of an old vLLM": {"token_ids": None},
    "an empty answer": {"token_ids": [], "logprobs": {"token_logprobs": []}},
    "a longer answer": {"token_ids": [7] * 5, "logprobs": {"token_logprobs": [-1.0] * 5}},
    "too few log-probabilities": {"logprobs": {"token_logprobs": [-1.0]}},
    "no log-probabilities": {"logprobs": None},
    "probabilities": {"logprobs": {"token_logprobs": [0.5, 0.5]}},
    "NaN": {"logprobs": {"token_logprobs": [float("nan"), -1.0]}},
    "an aborted answer": {"finish_reason": "abort"},
    "an end without its token": {"token_ids": [7, 7]},
    "another prompt": {"prompt_token_ids": [0, 5, 6]},
}


@pytest.fixture
def engine(make):
    return make().train_loader.engine


def test_wrong_responses_are_refused(engine, server):
    """Ids of another vocabulary, missing parts, a prompt with a BOS: nothing of it is trained on."""
    requests = [Request([5, 6], [(0,)], 4)]

    def sample(*choices):
        server.faults["/v1/completions"] = lambda handler, body: (200, {"choices": choices})
        return engine.sample(requests, Chooser(1.0), [2])

    assert sample(GOOD)[0][0].ids == [7, 2]
    for name, change in WRONG.items():
        with raises(RunError, "process-failed", f"{server.url}/v1/completions"):
            print(name, sample(GOOD | change))
    with raises(RunError, "process-failed", "2 responses"):
        sample(GOOD, GOOD)
    server.faults["/v1/completions"] = lambda handler, body: (200, [])
    with raises(RunError, "process-failed", f"{server.url}/v1/completions"):
        engine.sample(requests, Chooser(1.0), [2])
    server.faults["/v1/models"] = lambda handler, body: (200, {"data": []})
    with raises(RunError, "process-failed", f"{server.url}/v1/models"):
        engine.server.model_name()
