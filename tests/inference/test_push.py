"""`minitrain merge --push` uploads the merged model, against a stand-in for the Hub."""

import base64
import http.server
import json
import threading

import pytest
from huggingface_hub import constants

from minitrain.cli.main import main
from minitrain.io.hub import is_hub_reachable
from tests.messages import reports


class Hub:
    """Repositories by name, with their files. `status` is what it answers to requests below a path."""

    def __init__(self):
        self.files, self.private, self.tokens, self.status = {}, None, set(), {}
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path, body):
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.private = asked.get("private") or asked.get("visibility") == "private"  # by the version of the library
            return {"url": f"{self.url}/me/model", "name": "me/model"}
        if "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return {"files": modes}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {
                "commitUrl": f"{self.url}/me/model/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "commitMessage": "m",
                "success": True,
            }
        return {"id": "me/model", "sha": "0" * 40, "private": True, "siblings": []}


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.tokens.add(self.headers.get("Authorization"))
        status = next((status for path, status in self.hub.status.items() if path in self.path), 200)
        answer = self.hub.answer(self.path, body) if status == 200 else {"error": "not allowed"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_POST = do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_tests")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    is_hub_reachable.cache_clear()
    yield hub
    is_hub_reachable.cache_clear()
    hub.http.shutdown()
    hub.http.server_close()


@pytest.fixture
def adapter(make_trainer):
    trainer = make_trainer("n_steps=1", "lora.rank=2")
    trainer.train()
    return str(trainer.run.path)


def test_a_merged_model_is_uploaded(hub, adapter, tmp_path, capsys):
    """All its files, to a repository that is private if it is new."""
    output = tmp_path / "merged"
    assert main(["merge", adapter, "--output", str(output), "--dtype", "bfloat16", "--push", "me/model"]) == 0
    assert f"uploaded to {hub.url}/me/model" in capsys.readouterr().out
    assert hub.private and hub.tokens & {"Bearer hf_secret_of_tests"}
    assert hub.files == {file.name: file.read_bytes() for file in output.iterdir()} and "model.safetensors" in hub.files
    assert json.loads(hub.files["config.json"])["dtype"] == "bfloat16"


def test_what_cannot_be_pushed_is_refused_before_the_work(hub, adapter, tmp_path, capsys, monkeypatch):
    output = tmp_path / "merged"
    arguments = ["merge", adapter, "--output", str(output), "--push"]
    assert main([*arguments, "a/b/c"]) == 2
    assert reports(capsys.readouterr().err, "invalid-value", "--push: ", "a/b/c")
    hub.status = {"/api/": 403}
    assert main([*arguments, "me/model"]) == 2
    assert reports(capsys.readouterr().err, "process-failed", "--push: ", "me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    is_hub_reachable.cache_clear()
    assert main([*arguments, "me/model"]) == 2
    assert reports(capsys.readouterr().err, "unreachable", "--push: ")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main([*arguments, "me/model"]) == 2
    assert reports(capsys.readouterr().err, "missing-option", "--push: ", "HF_TOKEN")
    assert not output.exists()


def test_a_failed_upload_leaves_the_model(hub, adapter, tmp_path, capsys):
    output = tmp_path / "merged"
    hub.status = {"/commit/": 403}
    assert main(["merge", adapter, "--output", str(output), "--push", "me/model"]) == 2
    assert reports(capsys.readouterr().err, "process-failed", "--push: ", f"hf upload me/model {output}")
    assert (output / "model.safetensors").is_file()
