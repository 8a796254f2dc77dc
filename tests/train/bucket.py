"""A bucket for tests: the part of Google Cloud Storage's JSON API that TensorStore, gcsfs and its own client speak.

Objects live in memory, each write gives a new generation, and preconditions are kept: without them two writers of one
object would not notice each other, and neither would a test.
"""

import email.parser
import email.policy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NOW = "2020-01-01T00:00:00.000Z"


class Bucket:
    """One server with one bucket, `gs://bucket`, for as long as the context lasts."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self.lock = threading.RLock()
        self._generation = 0

    def __enter__(self) -> "Bucket":
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What sends the clients of Google Cloud Storage here, without credentials."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
            "FSSPEC_GCS_TOKEN": "anon",
            # What kind of bucket it is would be asked over gRPC.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def names(self, prefix: str) -> list[str]:
        """Names under a prefix, which is taken away."""
        return sorted(name.removeprefix(prefix) for name in self.objects if name.startswith(prefix))

    def put(self, name: str, content: bytes, conditions: dict[str, str]) -> dict | None:
        """Writes an object unless another generation than the one that is expected is there; its description."""
        with self.lock:
            if not self.holds(name, conditions):
                return None
            self._generation += 1
            self.objects[name] = content, self._generation
            return self.describe(name)

    def holds(self, name: str, conditions: dict[str, str]) -> bool:
        generation = self.objects[name][1] if name in self.objects else 0
        return (
            int(conditions.get("ifGenerationMatch", generation)) == generation
            and int(conditions.get("ifGenerationNotMatch", -1)) != generation
        )

    def describe(self, name: str) -> dict:
        content, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "id": f"bucket/{name}/{generation}",
            "bucket": "bucket",
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "timeCreated": NOW,
            "updated": NOW,
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, address: object) -> None:
        """Clients that were killed leave in the middle of an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body leave together; apart, the second waits for the first to be acknowledged.
    wbufsize = 1 << 16
    bucket: Bucket

    def log_message(self, format: str, *words: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802, the names that http.server calls
        self._dispatch("GET")

    def do_POST(self) -> None:  # noqa: N802
        self._dispatch("POST")

    def do_PUT(self) -> None:  # noqa: N802
        self._dispatch("PUT")

    def do_DELETE(self) -> None:  # noqa: N802
        self._dispatch("DELETE")

    def _dispatch(self, method: str) -> None:
        body = self._body()
        with self.bucket.lock:
            answer = self._answer(method, self.path, body)
        self._send(*answer)

    def _answer(self, method: str, url: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        parts = urlsplit(url)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        path = parts.path
        if path.startswith("/batch/"):
            return self._batch(body)
        uploads = path.startswith("/upload/")
        words = path[path.index("/storage/v1/") + len("/storage/v1/") :].split("/")
        if words[:2] != ["b", "bucket"]:
            return _error(404, "no such bucket")
        if len(words) == 2:
            return _json({"kind": "storage#bucket", "name": "bucket", "id": "bucket"})
        if uploads:
            return self._upload(method, query, body)
        if len(words) == 3:
            return self._list(query)
        name = unquote(words[3])
        if "copyTo" in words or "rewriteTo" in words:
            target = unquote(words[-1])
            if name not in self.bucket.objects:
                return _error(404, "no such object")
            self.bucket.put(target, self.bucket.objects[name][0], query)
            size = str(len(self.bucket.objects[name][0]))
            done = {"done": True, "resource": self.bucket.describe(target), "objectSize": size}
            return _json(done | {"totalBytesRewritten": size} if "rewriteTo" in words else done["resource"])
        return self._object(method, name, query)

    def _object(self, method: str, name: str, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        if name not in self.bucket.objects:
            return _error(404, "no such object")
        if not self.bucket.holds(name, query):
            return _error(304 if "ifGenerationNotMatch" in query else 412, "another generation")
        content, generation = self.bucket.objects[name]
        if method == "DELETE":
            del self.bucket.objects[name]
            return 204, b"", {}
        if query.get("alt") != "media":
            return _json(self.bucket.describe(name))
        headers = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(len(content))}
        wanted = self.headers.get("Range")
        if not wanted:
            return 200, content, headers
        first, last = wanted.removeprefix("bytes=").split("-")
        begin = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if begin >= len(content):
            return _error(416, "no such range")
        return 206, content[begin:end], headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}

    def _list(self, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], []
        for name in sorted(self.bucket.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes.append(prefix + head + delimiter)
            else:
                items.append(self.bucket.describe(name))
        return _json({"kind": "storage#objects", "items": items, "prefixes": sorted(set(prefixes))})

    def _upload(self, method: str, query: dict[str, str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        uploads = self.bucket.uploads
        if "upload_id" in query and query["upload_id"] in uploads:
            name, conditions, received = uploads[query["upload_id"]]
            received += body
            if self.headers.get("Content-Range", "").endswith("/*"):
                return 308, b"", {"Range": f"bytes=0-{len(received) - 1}"} if received else {}
            return self._put(name, bytes(received), conditions)
        match query.get("uploadType"):
            case "media":
                return self._put(query["name"], body, query)
            case "multipart":
                kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                parser = email.parser.BytesParser(policy=email.policy.HTTP)
                described, content = parser.parsebytes(kind + body).iter_parts()
                # Parsed as mail, binary content loses its line ends: it is cut out of the body as it came.
                boundary = body[: body.index(b"\r\n")]
                raw = body.split(boundary)[2].split(b"\r\n\r\n", 1)[1][:-2]
                del content
                return self._put(json.loads(described.get_payload(decode=True))["name"], raw, query)
            case "resumable":
                name = query.get("name") or json.loads(body)["name"]
                number = str(len(uploads))
                uploads[number] = name, query, bytearray()
                location = f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?upload_id={number}"
                return 200, b"", {"Location": location}
        return _error(400, f"{method} {query}")

    def _put(self, name: str, content: bytes, conditions: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        described = self.bucket.put(name, content, conditions)
        return _error(412, "another generation") if described is None else _json(described)

    def _batch(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        out = []
        for part in email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(kind + body).iter_parts():
            method, url, _ = part.get_payload(decode=True).decode().split(maxsplit=2)
            code, content, _ = self._answer(method, url, b"")
            out.append(
                "--answers\r\nContent-Type: application/http\r\n"
                f"Content-ID: <response-{part['Content-ID'] or ''}>\r\n\r\n"
                f"HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
                f"{content.decode()}\r\n"
            )
        return 200, ("".join(out) + "--answers--").encode(), {"Content-Type": "multipart/mixed; boundary=answers"}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        if code in (204, 304):
            # They have no body, by the protocol: what came would be taken for the next answer.
            content = b""
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _json(value: object) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _error(code: int, message: str) -> tuple[int, bytes, dict[str, str]]:
    return (
        code,
        json.dumps({"error": {"code": code, "message": message}}).encode(),
        {"Content-Type": "application/json"},
    )
