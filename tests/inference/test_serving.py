"""`minitrain check` compares responses with transformers and with servers, and names the cause of a difference."""

import json
import re
import shlex
import shutil
import socket
import time
from pathlib import Path

import pytest
import transformers as tf
from tokenizers.processors import TemplateProcessing

from minitrain import ConfigError, Trainer, load_config
from minitrain.cli.main import main
from minitrain.data.messages import assistant, user
from minitrain.data.template import CHATML, Template
from minitrain.inference.check import check_model
from minitrain.inference.served import Server
from minitrain.inference.serving import _turns_of, modelfile
from minitrain.model.tiny import tiny_model, tiny_tokenizer
from tests.commands import PARSERS
from tests.conftest import ROOT
from tests.inference.openai_server import STYLES, OpenAIServer
from tests.messages import raises, reports
from tests.small_templates import GLM4, LLAMA31, MISTRAL, PHI3, QWEN3, R1

pytestmark = pytest.mark.numeric
FEW = {"n_prompts": 4, "max_new_tokens": 12}


def base_with_bos(folder: Path) -> Path:
    """A random model whose tokenizer begins every text with BOS, and has no chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    tiny_model(0, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose model ends its responses, with a BOS in its prompts."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"prompt": f"say {a}{b}", "response": f"{a} {b} {a}"} for a in "abcd" for b in "efgh"]
    for name, chosen in {"train": rows[:12], "eval": rows[12:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    config = {
        "model": {"name_or_path": str(base_with_bos(folder / "base"))},
        "datasets": [str(folder / "train.jsonl")],
        "eval_datasets": [str(folder / "eval.jsonl")],
        "output_dir": str(folder),
        "exp_name": "served",
        "n_steps": 60,
        "lr": 1e-2,
        "total_batch_size": 8,
        "quiet": True,
    }
    Trainer(load_config(config)).train()
    return folder / "served"


def checked(run, style="vllm", faults=(), **options):
    """Return the report of a check against a server with faults."""
    with OpenAIServer(str(run / "final"), style, faults) as server:
        return check_model(str(run), server=Server(server.url, seconds=20), **FEW, **options)


# ------------------------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("style", STYLES)
def test_the_same_model_passes(run, style):
    """Prompts have one BOS; responses end; where a server reports ids and log-probabilities, they are equal."""
    report = checked(run, style)
    assert report.passed and report.difference is None, report
    assert report.lines["responses of the server"].startswith("4 of 4 equal")
    kind = "equal ids" if style in ("vllm", "llama.cpp") else "as many tokens"
    assert report.lines["prompts of the server"] == f"4 of 4 have {kind}"
    assert report.lines["log-probs of the server"].startswith("not" if style == "transformers" else "equal")


CAUSES = {
    "bos": "BOS: ",
    "no bos": "BOS: ",
    "template": "chat template: ",
    "no end": "end token: ",
    "early end": "end token: ",
    "cut": "context length: ",
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("fault", CAUSES)
def test_a_fault_of_a_server_is_named(run, fault, style):
    report = checked(run, style, (fault,))
    assert not report.passed and report.cause.startswith(CAUSES[fault]), report


@pytest.mark.parametrize("style", STYLES[:3])
@pytest.mark.parametrize(
    ("fault", "cause"),
    {"float16": "dtype: ", "bfloat16": "dtype: ", "weights": "weights: ", "penalty": "sampling: "}.items(),
)
def test_a_fault_in_the_numbers_is_named(run, fault, cause, style):
    report = checked(run, style, (fault,))
    assert not report.passed and report.cause.startswith(cause), report
    if cause == "dtype: ":
        assert f"as in {fault}" in report.cause
        assert checked(run, style, (fault,), dtype=fault).passed


@pytest.mark.parametrize("style", STYLES)
def test_another_model_is_a_possible_cause(run, style, tmp_path):
    """The report does not say that the weights are quantized, which nobody has seen."""
    shutil.copytree(run / "final", tmp_path / "final")
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "final")
    sizes = (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    tiny_model(7, *sizes).save_pretrained(tmp_path / "final")
    with OpenAIServer(str(tmp_path / "final"), style) as server:
        report = check_model(str(run), server=Server(server.url, seconds=20), **FEW)
    kind = "unknown" if style == "transformers" else "weights"
    assert not report.passed and report.cause.startswith(kind) and "another model" in report.cause


def test_rounding_of_the_saved_dtype_is_no_difference(run, tmp_path):
    """A model that is saved in bfloat16 may be served in it."""
    shutil.copytree(run / "final", tmp_path / "final")
    file = tmp_path / "final" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    report = checked(tmp_path, "vllm", ("bfloat16",))
    assert report.passed and "in bfloat16" in report.lines["log-probs of the server"]


def test_prompts(run, tmp_path):
    """They are the run's evaluation rows, a file, or built in; those that are too long are left out."""
    with OpenAIServer(str(run / "final")) as server:

        def asked(source, **options):
            server.requests.clear()
            check_model(str(source), server=Server(server.url), max_new_tokens=1, **options)
            return [body["messages"][-1]["content"] for path, body in server.requests if path.endswith("completions")]

        assert asked(run) == asked(run / "final") == ["say de", "say df", "say dg", "say dh"]
        (tmp_path / "p.txt").write_text("one\ntwo\n")
        assert asked(run, prompts=str(tmp_path / "p.txt")) == ["one", "two"]
        alone = tmp_path / "alone"
        shutil.copytree(run / "final", alone)
        assert len(asked(alone, n_prompts=3)) == 3 and len(asked(alone)) == 20
        tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
        messages = [user("a"), assistant("") | {"tool_calls": [call]}, {"role": "tool", "content": "1", "name": "f"}]
        row = {"messages": [*messages, assistant("b")], "tools": tools}
        (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
        assert asked(run, prompts=str(tmp_path / "r.jsonl")) == ["1"]
        body = server.requests[-1][1]
        assert body["tools"][0]["function"]["name"] == "f"
        assert json.loads(body["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"x": 1}


def test_a_template_without_the_bos_of_training(run):
    """What 0.1.0 saved: servers would add no BOS, which the model was trained with."""
    final = run / "final"
    template = final / "chat_template.jinja"
    source = template.read_text()
    assert source.startswith("{{- bos_token }}")
    try:
        template.write_text(source.removeprefix("{{- bos_token }}"))
        report = check_model(str(run), **FEW)
    finally:
        template.write_text(source)
    assert not report.passed and report.cause.startswith("BOS: the prompt lacks")


def test_generation_defaults_that_change_a_response(run):
    """`generate` and vLLM take a repetition penalty from generation_config.json."""
    file = run / "final" / "generation_config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | {"repetition_penalty": 50.0}))
        report = check_model(str(run), **FEW)
    finally:
        file.write_text(before)
    assert not report.passed and report.cause.startswith("sampling: ")


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_and_its_json(run, capsys):
    with OpenAIServer(str(run / "final"), "vllm", ("no end",)) as server:
        few = ["--n-prompts", "2", "--max-new-tokens", "12"]
        assert main(["check", str(run), "--url", f"{server.url}/v1/", "--json", *few]) == 1
        report = json.loads(capsys.readouterr().out)
        assert not report["passed"] and report["cause"].startswith("end token")
        assert main(["check", str(run), "--url", server.url, *few]) == 1
        out = capsys.readouterr().out
        assert "first difference: response 1 of the server: " in out and "likely cause: end token" in out
    assert main(["check", str(run), *few]) == 0
    assert "Serve it with vLLM:" in capsys.readouterr().out


def test_the_key_and_the_names_of_a_server(run, monkeypatch):
    with OpenAIServer(str(run / "final")) as server:
        server.names = ["base", "adapter"]
        with raises(ConfigError, "missing-option", "--model: ", "base, adapter"):
            Server(server.url)
        with raises(ConfigError, "not-a-choice", "--model: ", "'other'", "base, adapter"):
            Server(server.url, "other")
        assert Server(server.url, "adapter").model == "adapter"
        server.key = "secret-key"
        with raises(ConfigError, "process-failed", "401", "OPENAI_API_KEY"):
            Server(server.url, "base")
        monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
        assert Server(server.url, "base").model == "base"


def test_servers_that_fail(run, capsys):
    """Each failure is one line with the address, and ends with exit code 2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert main(["check", str(run), "--url", nobody]) == 2
        assert reports(capsys.readouterr().err, "unreachable", "--url: ", nobody)
    for url in ("localhost:8000", "ftp://localhost", "http://"):
        with raises(ConfigError, "usage", "--url: ", repr(url)):
            Server(url)
    with OpenAIServer(str(run / "final")) as server:
        chat = {
            "not-json": (lambda body: (200, b"<html>"), "process-failed", "<html>"),
            "error": (lambda body: (500, {"error": "no memory"}), "process-failed", "no memory"),
            "refused": (lambda body: (400, {"error": "no such role"}), "process-failed", "no such role"),
            "empty": (lambda body: (200, {"choices": []}), "process-failed", "lacks a part"),
            "slow": (lambda body: time.sleep(1) or (200, {}), "unreachable", "0.3 seconds"),
        }
        for route, code, part in chat.values():
            server.routes = {"/v1/chat/completions": route}
            arguments = ["check", str(run), "--url", server.url, "--n-prompts", "1", "--timeout", "0.3"]
            assert main(arguments) == 2
            assert reports(capsys.readouterr().err, code, "--url: ", f"{server.url}/v1/chat/completions", part)
        server.routes = {"/v1/models": lambda body: (200, {"models": []})}
        with raises(ConfigError, "process-failed", "--url: ", "/v1/models"):
            Server(server.url)
        server.routes = {"/v1/models": lambda body: (404, {"detail": "Not Found"})}
        with raises(ConfigError, "process-failed", "--url: ", "404"):
            Server(server.url)


def test_options_without_effect(run, capsys, make_trainer):
    for option in ("--model", "--dtype"):
        assert main(["check", str(run), option, "float16"]) == 2
        assert reports(capsys.readouterr().err, "no-effect", f"{option}: ")
    base = run.parent / "base"
    with raises(ConfigError, "unsupported-model", "has no chat template"):
        check_model(str(base), prompts="p.txt")


# ------------------------------------------------------------------------------------------------ serving commands


def test_commands_name_files_and_options_that_exist(run):
    """Those of minitrain and transformers are parsed; the files of others exist."""
    report = check_model(str(run), **FEW)
    assert {*report.commands} == {"vLLM", "llama.cpp", "Ollama", "TGI", "transformers"}
    lines = [line for lines in report.commands.values() for line in lines]
    for line in lines:
        if line.startswith("minitrain check"):
            PARSERS["check"].parse_args(shlex.split(line)[2:])
        elif line.startswith(("vllm", "python")):
            assert shlex.split(line)[2] == str(run / "final")
    assert sum("--dtype float32" in line for line in lines) == 2
    transformers_help = (Path(tf.__file__).parent / "cli" / "serve.py").read_text()
    assert "force_model: Annotated" in transformers_help and "dtype: Annotated" in transformers_help


def test_adapters_are_served_as_they_are_or_merged(run, make_trainer, capsys):
    """vLLM knows the end tokens of the base model alone, so an adapter with others is merged."""
    base = make_trainer("n_steps=1", "exp_name=base")
    base.train()
    same = [f"model.name_or_path={base.run.final}", "n_steps=1", "lora.rank=12"]
    for name, options, direct in (("plain", (), True), ("dora", ("lora.use_dora=true",), False)):
        trainer = make_trainer(*same, *options, f"exp_name={name}")
        trainer.train()
        commands = check_model(str(trainer.run.path), **FEW).commands
        vllm = shlex.split(commands["vLLM"][0])
        if direct:
            assert vllm[vllm.index("--max-lora-rank") + 1] == "16" and f"{name}={trainer.run.final}" in vllm
            assert Path(vllm[vllm.index("--chat-template") + 1]).is_file() and Path(vllm[2]).is_dir()
        for lines in commands.values() if not direct else [commands["llama.cpp"]]:
            assert lines[0].startswith("minitrain merge ")
            PARSERS["merge"].parse_args(shlex.split(lines[0])[2:])
    trainer = make_trainer(f"model.name_or_path={run.parent / 'base'}", "n_steps=1", "lora.rank=2", "exp_name=ends")
    trainer.train()
    file = run.parent / "base" / "generation_config.json"
    for end, first in ((trainer.template.end_ids(), "vllm serve "), (5, "minitrain merge ")):
        file.write_text(json.dumps({"eos_token_id": end}))
        assert check_model(str(trainer.run.path), **FEW).commands["vLLM"][0].startswith(first)


TEMPLATES = {"chatml": CHATML, "llama": LLAMA31, "mistral": MISTRAL, "phi": PHI3, "qwen": QWEN3, "glm": GLM4, "r1": R1}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_modelfile_has_the_prompts_of_the_template(name):
    """The turns that it is made of give the same text, or none is written."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    template = Template(tokenizer)
    turns, text = _turns_of(template), modelfile(template, "m.gguf")
    assert (turns is None) == (name == "phi")  # which writes another end after a conversation
    assert text.startswith("FROM ./m.gguf\n") and "PARAMETER stop" in text
    if turns is None:
        assert "# TEMPLATE" in text
        return
    conversation = [user("a"), assistant("b"), user("c")]
    for messages in (conversation[:1], conversation, [{"role": "system", "content": "s"}, *conversation]):
        assert turns.text(messages) == template.renderer.bind({}).prompt(messages)
    assert re.search(r'TEMPLATE """(.*)"""', text, re.DOTALL)[1] == turns.in_go()


def test_the_page_has_commands_that_parse_and_the_modelfile():
    page = (ROOT / "docs" / "serving.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = [
        shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if "minitrain" in line
    ]
    for _, name, *arguments in commands:
        PARSERS[name].parse_args(arguments)
    assert {name for _, name, *_ in commands} == {"check", "merge"}
    assert modelfile(Template(tiny_tokenizer(), "chatml"), "NAME.gguf") in page
