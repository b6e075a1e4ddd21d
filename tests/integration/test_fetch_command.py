"""`python -m grpo_jax.fetch` against a small hub on this machine: the endpoints that huggingface_hub asks for."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import integration_helpers as helpers
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "tiny/model"
MB = 2**20


def etag_of(path):
    """sha256 of a weight file, as of LFS; git's blob hash of any other."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves one model's folder. `cut`: bytes after which notes.txt, asked for from its beginning, ends."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.cut, self.ranges = folder, 0, []
        self.etags = {path.name: etag_of(path) for path in folder.iterdir()}
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{NAME}/tree/"):
            self.answer_json([self.entry(file) for file in sorted(self.server.folder.iterdir())])
        elif re.fullmatch(rf"/api/models/{NAME}(/revision/(main|{COMMIT}))?", path):
            siblings = [{"rfilename": file.name} for file in sorted(self.server.folder.iterdir())]
            self.answer_json({"id": NAME, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            self.answer_file(self.server.folder / path.rpartition("/")[2])
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def entry(self, file):
        etag, size = self.server.etags[file.name], file.stat().st_size
        lfs = {"oid": etag, "size": size, "pointerSize": 134} if len(etag) == 64 else None
        return {"type": "file", "path": file.name, "size": size, "oid": etag[:40]} | (
            {"lfs": lfs} if lfs else {}
        )

    def answer_file(self, file):
        content = file.read_bytes()
        headers = {
            "ETag": f'"{self.server.etags[file.name]}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        begin = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        if begin and int(begin[1]):
            self.server.ranges.append(int(begin[1]))
            headers["Content-Range"] = f"bytes {begin[1]}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[int(begin[1]) :], headers)
        is_cut = self.server.cut and file.name == "notes.txt" and self.command == "GET"
        return self.answer(200, content, headers, self.server.cut if is_cut else None)

    def answer_json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, code, content, headers, num_sent=None):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:num_sent])
        if num_sent is not None:
            self.close_connection = True


@pytest.fixture
def hub(model_folder, tmp_path):
    served = tmp_path / "served"
    shutil.copytree(model_folder, served)
    (served / "pytorch_model.bin").write_bytes(b"not for us")
    server = Hub(served)
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub, tmp_path, *flags, name=NAME):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(helpers.ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "grpo_jax.fetch",
        name,
        f"--to={tmp_path / 'got'}",
        "--dtype=float32",
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_model_is_fetched_checked_and_speaks(hub, tmp_path):
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"every file is what the hub has at commit {COMMIT}" in done.stdout
    assert "capital of France?" in done.stdout and "answer: '" in done.stdout
    got = {path.name: path.read_bytes() for path in (tmp_path / "got").iterdir() if path.is_file()}
    served = {path.name: path.read_bytes() for path in hub.folder.iterdir()}
    served.pop("pytorch_model.bin")
    assert got == served
    weights = tmp_path / "got" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = fetch(hub, tmp_path, "--check_only")
    assert done.returncode == 2
    assert "model.safetensors: not what the hub has" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "got" / "tokenizer.json").unlink()
    weights.write_bytes(served["model.safetensors"])
    assert "lacks tokenizer.json" in fetch(hub, tmp_path, "--check_only").stderr


def test_what_was_cut_short_goes_on(hub, tmp_path):
    notes = hub.folder / "notes.txt"
    notes.write_bytes(bytes(12 * MB))
    hub.etags["notes.txt"] = etag_of(notes)
    hub.cut = 11 * MB  # the client keeps what it has in pieces of 10 MB
    done = fetch(hub, tmp_path)
    if done.returncode:  # the client gave up: the same command goes on
        *told, line = done.stderr.splitlines()  # the client tells of each attempt before
        assert line.startswith("error: ") and line.endswith("again to go on") and "Traceback" not in told
        hub.cut = 0
        done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.ranges and min(hub.ranges) >= 10 * MB
    assert (tmp_path / "got" / "notes.txt").read_bytes() == notes.read_bytes()


def test_files_that_are_not_what_the_hub_says_are_refused(hub, tmp_path):
    hub.etags["config.json"] = "0" * 40
    done = fetch(hub, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "config.json: not what the hub has" in done.stderr and done.stderr.count("\n") == 1


def test_names_that_the_hub_does_not_have_end_in_one_line(hub, tmp_path):
    for name in ("tiny/other", "no name", "a/b/c"):
        done = fetch(hub, tmp_path, name=name)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith(f"error: NAME='{name}': ") and done.stderr.count("\n") == 1
    (tmp_path / "got").write_text("")
    assert "is a file" in fetch(hub, tmp_path).stderr
