"""Downloads: the hub's own client against a small hub on this machine, whole, refused and broken off."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from llava_jax.convert.checkpoint import open_checkpoint
from tests.convert.llavas import make_huggingface

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few addresses that a download asks for; the repository's name says what goes wrong."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        Hub.asked.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        files = {file.name: file.read_bytes() for file in sorted(self.folder.iterdir())}
        if path.startswith("/api/models/"):
            name = words[3]
            if name == "gone":
                self._refuse(404, "RepoNotFound")
            elif "tree" in words:
                self._send(
                    json.dumps(
                        [
                            {"type": "file", "path": n, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                            for n, data in files.items()
                        ]
                    ).encode()
                )
            else:
                siblings = [{"rfilename": n} for n in files]
                self._send(json.dumps({"id": f"tiny/{name}", "sha": COMMIT, "siblings": siblings}).encode())
            return
        name, file = words[1], words[-1]
        if name == "gated":
            self._refuse(401, "GatedRepo")
        elif name == "broken" and file == "model.safetensors" and self.command == "GET":
            self._send(files[file], sent=len(files[file]) // 2)
        else:
            self._send(files[file])

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, data: bytes, *, sent: int | None = None) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:sent])
        if sent is not None:
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        del format, arguments


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    Hub.folder, Hub.asked = tmp_path_factory.mktemp("tiny"), []
    make_huggingface(Hub.folder)
    (Hub.folder / "pytorch_model.bin").write_bytes(b"the same again, not wanted")
    (Hub.folder / "README.md").write_text("not wanted either")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run(name: str, folder: Path, endpoint: str, **more: str) -> subprocess.CompletedProcess:
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "llava_jax.cli", "convert", f"tiny/{name}", str(folder / name), "--to", "jax"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        env=os.environ | settings | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2"} | more,
    )


def test_a_name_is_downloaded_and_serves_again_without_the_hub(hub: str, tmp_path: Path):
    done = run("good", tmp_path, hub)
    assert done.returncode == 0, done.stderr
    found, wanted = (open_checkpoint(str(folder)).params for folder in (tmp_path / "good", Hub.folder))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[key]), np.asarray(value))
    fetched = {line.rpartition("/")[2] for line in Hub.asked if line.startswith("GET /tiny/good/resolve")}
    assert fetched == {"config.json", "generation_config.json", "model.safetensors"}
    (tmp_path / "good").rename(tmp_path / "first")
    done = run("good", tmp_path, hub, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "the hub did not answer for 'tiny/good'; taking" in done.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone", "Check the name; if it is private or gated"),
        ("gated", "ask for access on its page and run `hf auth login`"),
        ("broken", "run the same command again; files that are complete are kept"),
    ],
)
def test_a_refusal_and_a_broken_download_are_one_line(hub: str, tmp_path: Path, name: str, says: str):
    done = run(name, tmp_path, hub)
    assert done.returncode == 74, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("llava-jax: ")]
    assert f"'tiny/{name}' is no local path, and the hub did not give it: " in line
    assert says in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / name).exists()
