"""Responses of an inference server with OpenAI's HTTP interface: vLLM, llama.cpp, Ollama, TGI, transformers."""

import json
import os
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from minitrain.data.messages import Message
from minitrain.errors import ConfigError, UnreachableError, short
from minitrain.io.http import HTTPError, call_json

from .prompts import Prompt

# What not every server accepts. One that refuses the first is asked with the next.
EXTRAS = ({"logprobs": True, "top_logprobs": 1, "return_token_ids": True}, {"logprobs": True, "top_logprobs": 1}, {})
CHAT = "/v1/chat/completions"
REFUSED = (400, 422)
ENDED = ("stop", "tool_calls", "eos_token", "stop_sequence")  # values of finish_reason


class Answer(NamedTuple):
    """A greedy response to a prompt. What a program does not report is None.

    Attributes:
        text: The response without special tokens; None if the server took it apart (reasoning, tool calls).
        ended: Whether it ended by itself, not by the limit of tokens.
        prompt: Token ids of the prompt.
        n_prompt: Their number.
        ids: Token ids of the response, with or without its end token.
        logps: Their log-probabilities.
    """

    text: str | None
    ended: bool
    prompt: list[int] | None = None
    n_prompt: int | None = None
    ids: list[int] | None = None
    logps: list[float] | None = None


class Server:
    """A server and the name of a model on it.

    Args:
        url: Its address, with or without /v1.
        model: The name of the model (default: the only one).
        seconds: Time limit of a request.

    Raises:
        ConfigError: The address is not one, or the server does not have the model.
    """

    def __init__(self, url: str, model: str | None = None, seconds: float = 60.0):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ConfigError(f"--url: expected http://HOST:PORT, got {url!r}. Write the full address.", "usage")
        self.url, self.seconds = url.rstrip("/").removesuffix("/v1"), seconds
        key = os.environ.get("OPENAI_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.extras, self.has_template_route = list(EXTRAS), True
        self.model = self._find_model(model)

    def _find_model(self, model: str | None) -> str:
        if model is None:
            names = self._names()
            if len(names) != 1:
                raise ConfigError(
                    f"--model: the server has {', '.join(names) or 'no model'}. Name one.", "missing-option"
                )
            return names[0]
        # Not every server lists its models, so it is asked for a token.
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stream": False}
        try:
            self._request(CHAT, body)
        except HTTPError as error:
            if error.status not in (*REFUSED, 404):
                raise self._failed(CHAT, error) from None
            served = f"Name one of {', '.join(self._names())}."
            message = f"--model: the server refuses {model!r}: {error.text[:300]}. {served}"
            raise ConfigError(message, "not-a-choice") from None
        return model

    def _names(self) -> list[str]:
        listed = self._call("/v1/models")
        try:
            return [entry["id"] for entry in listed["data"]]
        except (KeyError, TypeError):
            raise self._wrong("/v1/models", f"expected a list of models, got {short(listed)!r}") from None

    def answer(self, prompt: Prompt, max_new_tokens: int) -> Answer:
        """Return the greedy response to a prompt."""
        body = {
            "model": self.model,
            "messages": list(map(_in_openai_format, prompt.messages)),
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "stream": False,
        }
        variables = dict(prompt.variables)
        body |= {key: variables.pop(key) for key in ("tools", "documents") if key in variables}
        body |= {"chat_template_kwargs": variables} if variables else {}
        while True:
            try:
                response = self._request(CHAT, body | self.extras[0])
                break
            except HTTPError as error:
                if error.status not in REFUSED or len(self.extras) == 1:
                    raise self._failed(CHAT, error) from None
                del self.extras[0]
        try:
            answer = _parse_response(response)
        except (KeyError, TypeError, AttributeError, LookupError, ValueError) as error:
            reason = f"the response lacks a part ({type(error).__name__}: {error})"
            raise self._wrong(CHAT, reason) from None
        return answer if answer.prompt is not None else answer._replace(prompt=self._prompt_ids(body))

    def _prompt_ids(self, body: dict[str, Any]) -> list[int] | None:
        """Return the ids of a prompt from the routes of llama.cpp; None without them."""
        if not self.has_template_route:
            return None
        keys = ("messages", "tools", "chat_template_kwargs")
        try:
            text = self._request("/apply-template", {key: body[key] for key in keys if key in body})["prompt"]
            options = {"content": text, "add_special": True, "parse_special": True}
            return list(self._request("/tokenize", options)["tokens"])
        except (HTTPError, KeyError, TypeError):
            self.has_template_route = False
            return None

    def _request(self, path: str, body: Any = None) -> Any:
        return call_json(self.url + path, body, self.headers, self.seconds)

    def _call(self, path: str, body: Any = None) -> Any:
        try:
            return self._request(path, body)
        except HTTPError as error:
            raise self._failed(path, error) from None

    def _failed(self, path: str, error: HTTPError) -> ConfigError:
        where = f"--url: {self.url}{path}"
        if error.problem == "unreached":
            return UnreachableError(f"{where}: cannot be reached ({error.text}). Start the server, or correct the URL.")
        if error.problem == "slow":
            return UnreachableError(f"{where}: no answer after {self.seconds:g} seconds. Raise --timeout.")
        if error.problem == "not-json":
            return self._wrong(path, f"the answer is not JSON, got {error.text!r}")
        advice = {401: "Set OPENAI_API_KEY to its key.", 404: "Name an OpenAI-compatible server."}
        message = f"{where}: the server answered {error.status}: {error.text[:300] or 'nothing'}."
        return ConfigError(f"{message} {advice.get(error.status, 'See its log.')}", "process-failed")

    def _wrong(self, path: str, problem: str) -> ConfigError:
        message = f"--url: {self.url}{path}: {problem}. Name an OpenAI-compatible server."
        return ConfigError(message, "process-failed")


def _parse_response(response: dict[str, Any]) -> Answer:
    choice = response["choices"][0]
    message, tokens = choice["message"], (choice.get("logprobs") or {}).get("content") or []
    ids = choice.get("token_ids") or [token["id"] for token in tokens if "id" in token]
    is_split = any(message.get(key) for key in ("reasoning", "reasoning_content", "tool_calls"))
    prompt = response.get("prompt_token_ids")
    return Answer(
        None if is_split else message.get("content") or "",
        choice["finish_reason"] in ENDED,
        prompt,
        len(prompt) if prompt else (response.get("usage") or {}).get("prompt_tokens"),
        ids or None,
        [float(token["logprob"]) for token in tokens] or None,
    )


def _in_openai_format(message: Message) -> dict[str, Any]:
    """Return a message whose calls have their arguments in JSON."""
    message = {key: value for key, value in message.items() if key != "weight"}
    if "tool_calls" in message:
        calls = [(call, call["function"]) for call in message["tool_calls"]]
        message["tool_calls"] = [
            call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
            for call, function in calls
        ]
    return message
