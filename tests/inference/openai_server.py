"""A stand-in for servers with OpenAI's HTTP interface, which runs a saved model with transformers alone.

It speaks like vLLM (token ids of prompt and response), llama.cpp (ids of the response, and routes for the prompt),
Ollama (neither, but log-probabilities) or transformers (text alone; it refuses options that it does not know).
"""

import http.server
import json
import threading
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

STYLES = ("vllm", "llama.cpp", "ollama", "transformers")
OTHER_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "


class OpenAIServer:
    """Runs in threads of this process.

    Attributes:
        faults: What it does wrong: bos, no bos, template, no end, early end, cut, float16, bfloat16, weights, penalty.
        routes: Path -> function of the body that returns the status and the JSON (or bytes) of an answer.
        names: The names of its models.
        requests: (path, body) of each request.
    """

    def __init__(self, folder: str, style: str = "vllm", faults: tuple[str, ...] = ()):
        self.tokenizer, self.style, self.faults = tf.AutoTokenizer.from_pretrained(folder), style, faults
        self.model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for parameter in self.model.parameters():
            if "weights" in faults:
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            for name in {"float16", "bfloat16"} & {*faults}:
                parameter.data = parameter.data.to(getattr(torch, name))
        self.names, self.key, self.requests = ["served"], None, []
        self.routes: dict[str, Callable[[Any], tuple[int, Any]]] = {}
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"server_of": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Return the status and the JSON of a request."""
        if path in self.routes:
            return self.routes[path](body)
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.names]}
        if path == "/v1/chat/completions" and body["model"] in self.names:
            return self.chat(body)
        if self.style == "llama.cpp" and path == "/apply-template":
            return 200, {"prompt": self.render(body)}
        if self.style == "llama.cpp" and path == "/tokenize" and body["add_special"] and body["parse_special"]:
            return 200, {"tokens": self.encode(body["content"])}
        return 404, {"detail": "Not Found"}

    def render(self, body: Any) -> str:
        template = OTHER_TEMPLATE if "template" in self.faults else self.tokenizer.chat_template
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(body["messages"], tools=body.get("tools"), **options)

    def encode(self, text: str) -> list[int]:
        ids, bos = self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.bos_token_id
        ids = ids[1:] if "no bos" in self.faults and ids[0] == bos else ids
        return [bos, *ids] if "bos" in self.faults else ids

    @torch.no_grad()
    def generate(self, prompt: list[int], limit: int) -> tuple[list[int], list[float], str]:
        """Return the ids of a greedy response, their log-probabilities, and why it ends."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) if "no end" not in self.faults else set()
        ids, logps = [], []
        for _ in range(limit if "cut" not in self.faults else 1):
            logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].float()
            seen = torch.tensor([*prompt, *ids])
            ids.append(int(logits.index_fill(0, seen, -9).argmax() if "penalty" in self.faults else logits.argmax()))
            logps.append(logits.log_softmax(-1)[ids[-1]].item())
            if ids[-1] in ends or ("early end" in self.faults and len(ids) == 2):
                return ids, logps, "stop"
        return ids, logps, "length"

    def chat(self, body: Any) -> tuple[int, Any]:
        if self.style == "transformers" and (extra := {"logprobs", "top_logprobs", "return_token_ids"} & body.keys()):
            return 422, {"detail": f"Unsupported fields in the request: {extra}"}
        prompt = self.encode(self.render(body))
        ids, logps, reason = self.generate(prompt, body["max_tokens"])
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        response = {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}}
        if body.get("logprobs"):
            tokens = [{"token": self.tokenizer.decode([i]), "logprob": logp} for i, logp in zip(ids, logps)]
            if self.style == "llama.cpp":
                tokens = [token | {"id": i} for token, i in zip(tokens, ids)]
            choice["logprobs"] = {"content": tokens}
        if self.style == "vllm" and body.get("return_token_ids"):
            choice["token_ids"], response["prompt_token_ids"] = ids, prompt
        return 200, response


class _Handler(http.server.BaseHTTPRequestHandler):
    server_of: OpenAIServer

    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: Any) -> None:
        server = self.server_of
        server.requests.append((self.path, body))
        status, answer = server.answer(self.path, body)
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            status, answer = 401, {"error": "no key"}
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
