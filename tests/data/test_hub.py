"""Data and models of the hub, by the real libraries against a stand-in of the hub on this machine."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.conftest import ROOT

datasets = pytest.importorskip("datasets")

COMMIT = "a" * 40
ROWS = [{"question": f"say {i}", "answer": "ab" * (1 + i % 5)} for i in range(20)]


@pytest.fixture
def stand_in(tmp_path, llama_folder):
    """The address of a server with the data set me/sums and the model me/llama, and how to stop it."""
    sums = tmp_path / "hub" / "datasets" / "me" / "sums"
    for split, rows in (("train", ROWS), ("test", ROWS[:5])):
        (sums / "main").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(sums / "main" / f"{split}-00000-of-00001.parquet")
    shutil.copytree(llama_folder, tmp_path / "hub" / "models" / "me" / "llama")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, code: int, body: bytes = b"", **headers) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlparse(self.path).path)
            api = re.fullmatch(
                r"/api/(datasets|models)/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+(?P<under>/.*)?)?", path
            )
            file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.*)", path)
            kind, name = (api[1], api[2]) if api else ("datasets" if file and file[1] else "models", file and file[2])
            folder = tmp_path / "hub" / kind / (name or "")
            if path == "/":
                self.answer(200)
            elif not name or not folder.is_dir():
                self.answer(404, X_Error_Code="RepoNotFound")
            elif api:
                self.answer(200, json.dumps(about(folder, name, api)).encode(), Content_Type="application/json")
            elif not (folder / file[3]).is_file():
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                body = (folder / file[3]).read_bytes()
                self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server.server_close
    server.shutdown()


def about(folder: Path, name: str, asked: re.Match):
    """What the hub tells of a repository, or of a folder in it."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    if "/tree/" not in (asked[3] or ""):
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
        return {"id": name, "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": siblings}
    top = folder / (asked["under"] or "").strip("/")
    inside = list(top.iterdir()) if top.is_dir() else []
    return [
        {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": COMMIT}
        if file.is_file()
        else {"type": "directory", "path": str(file.relative_to(folder)), "oid": COMMIT}
        for file in inside
    ]


@pytest.mark.slow
def test_from_the_hub_and_then_without_it(stand_in, tmp_path):
    """A data set and a model come from the hub, and afterwards out of its cache, to the same tokens; what the
    hub has not is told as such."""
    address, stop = stand_in
    entry = "{path: me/sums, name: default, split: train}"
    config = tmp_path / "c.yml"
    config.write_text(f"datasets: [{entry}]\nmodel: {{name_or_path: me/llama}}\nmax_length: 200\n")
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def validate(*overrides: str) -> subprocess.CompletedProcess:
        options = ["--overrides", *overrides] if overrides else []
        command = [sys.executable, "-m", "minitrain", "validate", str(config), *options]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    first = validate()
    assert first.returncode == 0 and re.search(r"examples +20 to train on", first.stdout) and first.stderr == "", first
    absent = validate("datasets.0.path=me/sumz")
    assert absent.returncode == 2 and absent.stderr.endswith("[unreadable]\n") and "me/sumz" in absent.stderr
    stop()
    again = validate()
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert len(list((tmp_path / "cache" / "minitrain").iterdir())) == 1
    silent = validate("datasets.0.path=me/sumz")
    assert silent.returncode == 3 and f"({address})" in silent.stdout
