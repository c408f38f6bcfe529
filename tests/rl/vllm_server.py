"""A stand-in for `vllm serve`: its HTTP interface, with minitrain's sampler on the weights that it is sent.

Like vLLM, it has some routes only with VLLM_SERVER_DEV_MODE, reads the weights at the path that it gets, keeps its
prefix cache until it is reset, takes missing sampling options from generation_config.json, samples once for greedy
requests, and returns the end token.
"""

import copy
import http.server
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from minitrain.inference.choice import Chooser, Request
from minitrain.inference.sampler import Sampler
from minitrain.model.policy import Policy
from minitrain.training.step import inference

LEAKING = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "top_p", "top_k", "temperature")


class VLLMServer:
    """Runs in threads of this process.

    Attributes:
        requests: (path, body) of each request.
        faults: Path -> function of the handler and the body. What it returns is the answer; None: the usual one.
        logps: Changes the log-probabilities of a response.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, dev_mode: bool = True):
        self.current, self.cached = Policy(model.eval()), None  # cached: the weights behind the prefix cache
        self.tokenizer, self.dev_mode, self.is_asleep, self.key = tokenizer, dev_mode, False, None
        self.requests: list[tuple[str, Any]] = []
        self.faults: dict[str, Callable] = {}
        self.logps: Callable[[list[float]], list[float]] = lambda logps: logps
        self.loaded_from: list[Path] = []
        self.lock = threading.Lock()
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"server_of": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Return the status and the JSON of a request."""
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "served-model", "object": "model", "max_model_len": 1024}]}
        if path == "/v1/completions":
            return self.complete(body)
        if not self.dev_mode:
            return 404, {"detail": "Not Found"}
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            return self.reload(Path(body["kwargs"]["weights_path"]))
        if path == "/reset_prefix_cache":
            self.cached = None
            return 200, None
        if path.startswith("/sleep") or path == "/wake_up":
            self.is_asleep = path != "/wake_up"
            return 200, None
        return 404, {"detail": "Not Found"}

    def reload(self, folder: Path) -> tuple[int, Any]:
        if self.is_asleep:
            return 500, {"error": "asleep"}
        tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        model = copy.deepcopy(self.current.model)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if unexpected or set(missing) - set(model.all_tied_weights_keys):
            return 500, {"error": {"message": f"missing {missing}, unexpected {unexpected}"}}
        self.current, self.cached = Policy(model), self.cached or self.current
        self.loaded_from.append(folder)
        return 200, {"results": [None]}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.is_asleep or (self.key and body["authorization"] != f"Bearer {self.key}"):
            return 401, {"error": {"message": "Unauthorized or asleep"}}
        assert body["model"] == "served-model" and body["ignore_eos"] and body["return_token_ids"]
        assert not [key for key in LEAKING if key not in body]
        n, limit, prompt = body["n"], body["max_tokens"], body["prompt"]
        if n > 1 and not body["temperature"]:
            return 400, {"error": {"message": "n must be 1 when using greedy sampling"}}
        stop = [string for string in body["stop"] if string]
        stopping = (lambda ids: any(string in self.tokenizer.decode(ids) for string in stop)) if stop else None
        policy = self.cached or self.current
        with self.lock, inference(policy):
            sampler = Sampler(policy, body["stop_token_ids"])
            keys = [(body["seed"], i) for i in range(n)]
            choose = Chooser(body["temperature"], body["top_p"], body["top_k"])
            (samples,) = sampler.sample([Request(prompt, keys, limit)], choose, stopping)
        choices = [
            {
                "index": index,
                "text": self.tokenizer.decode(sample.ids),
                "logprobs": {"token_logprobs": self.logps(sample.logps)},
                "finish_reason": "stop" if sample.ended else "length",
                "stop_reason": None,
                "token_ids": sample.ids,
                "prompt_token_ids": prompt,
            }
            for index, sample in enumerate(samples)
        ]
        return 200, {"object": "text_completion", "choices": choices[::-1]}


class _Handler(http.server.BaseHTTPRequestHandler):
    server_of: VLLMServer

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        server = self.server_of
        server.requests.append((self.path, body))
        answered = server.faults[self.path](self, body) if self.path in server.faults else None
        if answered is False:  # the fault has written the response itself
            return
        if body is not None and self.path == "/v1/completions":
            body = body | {"authorization": self.headers.get("Authorization")}
        status, content = server.answer(self.path, body) if answered is None else answered
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Write nothing."""
