"""A small hub on this machine: what the clients of the Hugging Face hub and of ModelScope ask for."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "tiny/model"


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_or_lfs(path):
    """sha256 of a weight file, as of LFS; git's blob hash of any other."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return sha256_of(path)
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves one model's folder.

    digests: file name -> checksum that is told. `cut`: bytes after which notes.txt, asked for from its beginning,
    ends. `ranges`: first bytes that were asked for, but 0.
    """

    def __init__(self, folder, answers):
        super().__init__(("127.0.0.1", 0), answers)
        self.folder, self.cut, self.ranges, self.digest_of = folder, 0, [], answers.digest_of
        self.digests = {path.name: self.digest_of(path) for path in folder.iterdir()}
        self.environment = {answers.endpoint: f"http://127.0.0.1:{self.server_port}"}
        self.says = f"every file is what the hub has at {answers.revision}"
        self.flag = f"--from={answers.name}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def files(self):
        return sorted(self.folder.iterdir())


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def answer_file(self, file, headers):
        content = file.read_bytes()
        headers = headers | {"Accept-Ranges": "bytes"}
        begin = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        if begin and int(begin[1]):
            self.server.ranges.append(int(begin[1]))
            headers["Content-Range"] = f"bytes {begin[1]}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[int(begin[1]) :], headers)
        is_cut = self.server.cut and file.name == "notes.txt" and self.command == "GET"
        return self.answer(200, content, headers, self.server.cut if is_cut else None)

    def answer_json(self, content, code=200):
        self.answer(code, json.dumps(content).encode(), {"Content-Type": "application/json"})

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


class HuggingFace(Answers):
    name, endpoint, revision, digest_of = "hf", "HF_ENDPOINT", COMMIT, staticmethod(git_or_lfs)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{NAME}/tree/"):
            self.answer_json([self.entry(file) for file in self.server.files])
        elif re.fullmatch(rf"/api/models/{NAME}(/revision/(main|{COMMIT}))?", path):
            siblings = [{"rfilename": file.name} for file in self.server.files]
            self.answer_json({"id": NAME, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            file = self.server.folder / path.rpartition("/")[2]
            headers = {"ETag": f'"{self.server.digests[file.name]}"', "X-Repo-Commit": COMMIT}
            self.answer_file(file, headers)
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def entry(self, file):
        digest, size = self.server.digests[file.name], file.stat().st_size
        entry = {"type": "file", "path": file.name, "size": size, "oid": digest[:40]}
        lfs = {"lfs": {"oid": digest, "size": size, "pointerSize": 134}}
        return entry | (lfs if len(digest) == 64 else {})


class ModelScope(Answers):
    name, endpoint, revision, digest_of = (
        "modelscope",
        "MODELSCOPE_ENDPOINT",
        "master",
        staticmethod(sha256_of),
    )
    extra_files = ()
    """Entries of files that are not there."""

    def do_GET(self):
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == f"/api/v1/models/{NAME}/repo/files" and query["Revision"] == "master":
            files = [self.entry(file) for file in self.server.files]
            self.answer_json({"Code": 200, "Data": {"Files": [*files, *self.extra_files]}})
        elif url.path == f"/api/v1/models/{NAME}/repo" and query["Revision"] == "master":
            self.answer_file(self.server.folder / query["FilePath"], {})
        else:
            self.answer_json({"Code": 10010205001, "Message": "record not found"}, code=404)

    def entry(self, file):
        size, digest = file.stat().st_size, self.server.digests[file.name]
        return {"Path": file.name, "Name": file.name, "Type": "blob", "Size": size, "Sha256": digest}


class OutsideOfTheFolder(ModelScope):
    extra_files = ({"Path": "../config.json", "Type": "blob", "Size": 3, "Sha256": "0" * 64},)
