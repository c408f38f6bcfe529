"""The commands that serve a saved model, and compare what each server says with minitrain."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import jinja2

from minitrain.config.sections import ModelConfig
from minitrain.data.messages import Message, Messages, assistant, user
from minitrain.data.template import Template
from minitrain.model.adapter_config import read_config

TGI_IMAGE = "ghcr.io/huggingface/text-generation-inference:latest"
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # choices of vLLM's --max-lora-rank
UNSUPPORTED = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")  # by vLLM's adapters


def serve_commands(
    source: str, config: ModelConfig, template: Template, dtype: str, end_ids: Sequence[int]
) -> dict[str, list[str]]:
    """Return the shell commands that serve a model, by the name of the server.

    Args:
        source: The run directory, or the folder of a model or an adapter.
        config: The model, with its adapter.
        template: Its chat template with the tokenizer.
        dtype: The dtype of the saved weights.
        end_ids: The tokens that end a response of the model, or of an adapter's base model, in transformers.
    """
    folder, name = config.adapter or config.name_or_path, _name_of(source)
    check = f"minitrain check {shlex.quote(source)} --url http://localhost"
    if config.adapter is None:
        return _of_model(folder, name, template, dtype, check)
    merged = f"{folder.rstrip('/')}-merged"
    merge = shlex.join(["minitrain", "merge", source, "--output", merged])
    commands = {key: [merge, *lines] for key, lines in _of_model(merged, name, template, dtype, check).items()}
    if rank := _rank_in_vllm(config, set(template.end_ids()) <= set(end_ids)):
        serve = ["vllm", "serve", config.name_or_path, "--dtype", dtype, "--enable-lora", "--max-lora-rank", str(rank)]
        serve += ["--lora-modules", f"{name}={folder}", "--chat-template", f"{folder}/chat_template.jinja"]
        commands["vLLM"] = [shlex.join(serve), f"{check}:8000 --model {shlex.quote(name)}"]
    return commands


def _of_model(folder: str, name: str, template: Template, dtype: str, check: str) -> dict[str, list[str]]:
    """Return the commands for the folder of a model; `check` is the beginning of those that compare."""
    gguf, outtype = f"{name}.gguf", OUTTYPES[dtype]
    convert = shlex.join(
        ["python3", "llama.cpp/convert_hf_to_gguf.py", folder, "--outfile", gguf, "--outtype", outtype]
    )
    tgi_dtype = "bfloat16" if dtype == "float32" else dtype  # it has no float32
    tgi = ["docker", "run", "--gpus", "all", "--shm-size", "1g", "-p", "8080:80"]
    tgi += ["-v", f"{os.path.abspath(folder)}:/model", TGI_IMAGE, "--model-id", "/model", "--dtype", tgi_dtype]
    return {
        "vLLM": [shlex.join(["vllm", "serve", folder, "--dtype", dtype, "--served-model-name", name]), f"{check}:8000"],
        "llama.cpp": [convert, shlex.join(["llama-server", "-m", gguf, "--port", "8080"]), f"{check}:8080"],
        "Ollama": [
            convert,
            f"cat > Modelfile <<'END'\n{modelfile(template, gguf)}END",
            shlex.join(["ollama", "create", name, "-f", "Modelfile"]),
            f"{check}:11434 --model {shlex.quote(name + ':latest')}",
        ],
        "TGI": [shlex.join(tgi), f"{check}:8080" + (f" --dtype {tgi_dtype}" if tgi_dtype != dtype else "")],
        "transformers": [
            shlex.join(["transformers", "serve", folder, "--dtype", dtype]),
            f"{check}:8000 --model {shlex.quote(folder)}",  # it does not list a folder among its models
        ],
    }


def _name_of(source: str) -> str:
    path = Path(source)
    return path.absolute().parent.name if path.name in ("final", "best") else path.absolute().name


def _rank_in_vllm(config: ModelConfig, has_end_ids: bool) -> int | None:
    """Return vLLM's rank for an adapter; None if the adapter must be merged to be served as it was trained.

    vLLM takes the end tokens and the embeddings of the base model, and ignores or refuses other parts of an adapter.
    """
    adapter = read_config(Path(config.adapter))
    rank = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
    has_more = any(adapter.get(key) for key in UNSUPPORTED) or adapter.get("bias", "none") != "none"
    if has_more or config.quantization != "none" or not has_end_ids:
        return None
    return next((limit for limit in LORA_RANKS if limit >= rank), None)


def modelfile(template: Template, gguf: str) -> str:
    """Return a Modelfile of Ollama, which does not run chat templates of transformers."""
    tokenizer, turns = template.tokenizer, _turns_of(template)
    lines = [f"FROM ./{gguf}"]
    if turns is None:
        lines.append(
            "# TEMPLATE: this chat template has no equivalent that minitrain can write. Write one in Go's syntax."
        )
    else:
        lines.append(f'TEMPLATE """{turns.in_go()}"""')
    stops = tokenizer.convert_ids_to_tokens(template.end_ids())
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join([*lines, "PARAMETER repeat_penalty 1"]) + "\n"


class Turns:
    """A chat template as text before and after the content of each role.

    Args:
        parts: Role -> (text before, text after) its content.
        default: What a conversation without a system message begins with.
        header: What opens a response.
    """

    def __init__(self, parts: dict[str, tuple[str, str]], default: str, header: str):
        self.parts, self.default, self.header = parts, default, header

    def text(self, messages: Messages) -> str:
        """Return the prompt of a conversation."""
        turns = [f"{self.parts[m['role']][0]}{m['content']}{self.parts[m['role']][1]}" for m in messages]
        return ("" if messages[0]["role"] == "system" else self.default) + "".join(turns) + self.header

    def in_go(self) -> str:
        """Return the template in the syntax of Go."""
        roles = [f'if eq .Role "{role}" }}}}{a}{{{{ .Content }}}}{b}' for role, (a, b) in self.parts.items()]
        turns = "{{ range .Messages }}{{ " + "{{ else ".join(roles) + "{{ end }}{{ end }}"
        default = '{{ if ne (index .Messages 0).Role "system" }}' + self.default + "{{ end }}" if self.default else ""
        return default + turns + self.header


def _turns_of(template: Template) -> Turns | None:
    """Return a chat template as turns; None if it cannot be written so."""
    rendering, bos = template.renderer.bind({}), template.tokenizer.bos_token or ""
    system = {"role": "system", "content": "qqsystemqq"}
    ask, tell, again = user("qquserqq"), assistant("qqanswerqq"), user("qqagainqq")

    def prompt(*messages: Message) -> str:
        return rendering.prompt(list(messages)).removeprefix(bos)

    try:
        begin, question = prompt(ask).split(ask["content"])
        header = prompt(ask).removeprefix(rendering.text([ask]).removeprefix(bos))
        opening, rest = prompt(system, ask, tell, again).split(system["content"])
        before_user, rest = rest.split(ask["content"])
        before_answer, rest = rest.split(tell["content"])
        before_again, _ = rest.split(again["content"])
        starts = [
            n for n in range(len(begin) + 1) if before_user.endswith(begin[n:]) and before_again.endswith(begin[n:])
        ]
        open_user = begin[starts[0] :]
        close_user = question.removesuffix(header)
        parts = {
            "system": (opening, before_user.removesuffix(open_user)),
            "user": (open_user, close_user),
            "assistant": (before_answer.removeprefix(close_user), before_again.removesuffix(open_user)),
        }
        turns = Turns(parts, begin.removesuffix(open_user), header)
        conversations = [ask], [system, ask], [ask, tell, again], [system, ask, tell, again, tell, ask]
        is_same = all(turns.text(one) == prompt(*one) for one in conversations)
    except (ValueError, jinja2.TemplateError):
        return None
    is_plain = not any(mark in turns.text(conversations[-1]) for mark in ('"""', "{{"))
    return turns if is_same and is_plain else None
