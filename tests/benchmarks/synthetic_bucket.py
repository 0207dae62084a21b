"""A server with enough of S3's interface to read a corpus of any size, of which only the index and the table exist.

Every shard has the same bytes, so a corpus of 20 million samples needs no more disk than its index and its table.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa

from components.images import encode_png
from pipelines.corpus.shards import TABLE, Sample, write_shard

PER_SHARD = 128


def write(folder: Path, samples: int) -> bytes:
    """Write index.json and train.arrow of a corpus of about `samples` samples; returns the bytes of its shards."""
    pictures = {f"p{n:03d}": encode_png(np.full((16, 16, 3), n, np.uint8)) for n in range(PER_SHARD)}
    members = [Sample(key=key, ext="png", info={}) for key in pictures]
    shard = write_shard(folder / "one", "train", members, lambda sample: pictures[sample.key])
    data = (folder / "one" / shard["name"]).read_bytes()
    count = max(1, samples // PER_SHARD)
    fixed = {"ext": "png", "width": 16, "height": 16, "caption": "a plain square of one grey level", "print": b"p" * 16}
    rows = [
        {**fixed, **entry, "sha256": hashlib.sha256(pictures[entry["key"]]).hexdigest()} for entry in shard["samples"]
    ]
    columns = [pa.array([row[name] for row in rows], TABLE.field(name).type) for name in TABLE.names]
    batch = pa.RecordBatch.from_arrays(columns, schema=TABLE)
    with (folder / "train.arrow").open("wb") as target, pa.ipc.new_file(target, TABLE) as writer:
        for _ in range(count):
            writer.write_batch(batch)
    with (folder / "train.arrow").open("rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    with (folder / "index.json").open("w") as target:
        document = {"format": 2, "name": "synthetic", "digest": "0" * 64, "splits": {}}
        lists = {"samples": count * PER_SHARD, "bytes": count * len(data), "shards": []}
        lists["table"] = {"name": "train.arrow", "sha256": digest}
        document["splits"] = {"train": lists}
        head, tail = json.dumps(document).split('"shards": []')
        target.write(f'{head}"shards": [')
        for n in range(count):
            row = {"name": f"train-{n:06d}-{shard['sha256'][:8]}.tar", "bytes": len(data), "sha256": shard["sha256"]}
            target.write(("" if n == 0 else ", ") + json.dumps({**row, "samples": PER_SHARD}))
        target.write(f"]{tail}\n")
    return data


@contextmanager
def serve(folder: Path, shard: bytes) -> Iterator[str]:
    """Run the server; yields its endpoint. Its bucket is called `bucket`, and the corpus is at its prefix `corpus`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def answer(self, body: bool) -> None:
            if "list-type" in self.path:
                text = "<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"
                self.send(200, text.encode(), len(text), body)
                return
            name = self.path.partition("?")[0].rpartition("/")[2]
            is_shard = name.endswith(".tar")
            if not is_shard and not (folder / name).is_file():
                self.send(404, b"<Error><Code>NoSuchKey</Code></Error>", 37, body)
                return
            size = len(shard) if is_shard else (folder / name).stat().st_size
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(span[1]), min(size, int(span[2] or size) + 1)) if span else (0, size)
            with io.BytesIO(shard) if is_shard else (folder / name).open("rb") as source:
                source.seek(first)
                data = source.read(last - first) if body else b""
            self.send(206 if span else 200, data, last - first, body)

        def send(self, status: int, data: bytes, size: int, body: bool) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
