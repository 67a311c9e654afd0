"""Uploads over HTTP to a data directory on a disk that is too small. Run by test_files.py in a process of its own.

Writes, as JSON: the reply to a large file, the number of files left then, the status of a small file, and their number.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from server.config import ServerConfig
from tests.server.echo_rag import EchoRag, open_app
from tests.server.live_collections import open_live


async def main(path: Path) -> list[object]:
    with open_live(path / "data") as opened:
        async with open_app(EchoRag(), ServerConfig(drain_timeout_s=0, log_json=False), live=opened.live) as client:

            async def upload(num_bytes: int) -> tuple[int, dict[str, object]]:
                form = {"purpose": (None, "assistants"), "file": ("a.txt", b"x" * num_bytes)}
                reply = await client.post("/v1/files", files=form)
                return reply.status_code, reply.json()

            status, body = await upload(6 << 20)
            left = len(list(opened.data_dir.files.iterdir()))
            small, _ = await upload(1000)
            return [{"status": status, **body}, left, small, len(list(opened.data_dir.files.iterdir()))]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(main(Path(sys.argv[1])))))
