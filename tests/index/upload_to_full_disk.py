"""Uploads to a data directory on a file system that is too small. Run by test_library.py in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from index import Catalogue, DataDir, StorageFull
from index.library import Library

if __name__ == "__main__":
    data_dir = DataDir(Path(sys.argv[1]) / "data")
    with Catalogue(data_dir.catalogue) as catalogue:
        files = Library(catalogue, data_dir).files
        incoming = files.begin()
        try:
            for _ in range(100):
                incoming.write(b"x" * 50_000)
            files.keep(incoming, "", "large.txt", "assistants")
        except StorageFull:
            sys.stdout.write("StorageFull\n")
        incoming.discard()
        sys.stdout.write(f"{len(list(data_dir.files.iterdir()))} files\n")
        incoming = files.begin()
        incoming.write(b"x" * 1000)
        kept = files.keep(incoming, "", "small.txt", "assistants")
        sys.stdout.write(f"kept {kept.num_bytes} bytes\n")
