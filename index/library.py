"""The library: uploaded files, vector stores, and the files attached to them. What the routes read and write.

Knows nothing of HTTP, and nothing about how files become passages.

Invariant: whoever asks gives their name, and gets nothing that is somebody else's; see the modules of the parts.
"""

from __future__ import annotations

from index.attached_files import AttachedFiles
from index.catalogue import Catalogue
from index.data_dir import DataDir
from index.files import Files
from index.vector_stores import VectorStores


class Library:
    """Its parts, over one catalogue and one data directory. Safe to use from many threads."""

    def __init__(self, catalogue: Catalogue, data_dir: DataDir, max_owner_bytes: int = 0) -> None:
        self.files = Files(catalogue, data_dir, max_owner_bytes)
        self.vector_stores = VectorStores(catalogue, data_dir)
        self.attached = AttachedFiles(catalogue)

    def sweep(self) -> None:
        """Removes what has expired, and what crashes have left behind."""
        self.files.sweep()
        self.vector_stores.sweep()
