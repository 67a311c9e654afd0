"""Puts one object in processes that run into trouble. Run by test_disk_durability.py in a process of its own.

    put_in_trouble.py killed FOLDER     one store FOLDER/<step>-<n> each, whose process is killed at the nth such step
    put_in_trouble.py plain FOLDER      a put (on a disk too small for it); prints the error
    put_in_trouble.py limited FOLDER    a put where files may not grow beyond half an object; prints the error
    put_in_trouble.py forbidden FOLDER  a put without permission to write; prints the error

The object is always SPEC and KV.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import torch

from fusionrag.errors import StoreError
from fusionrag.store import DiskStore
from fusionrag.types import ChunkKV, KVSpec

SPEC = KVSpec("model", "float32", "none", (1,), tuple(range(64)), "raw")
KV = ChunkKV(*torch.randn(2, 4, 2, 64, 32, generator=torch.Generator().manual_seed(1)))
KILL_POINTS = ["created-1", "written-1", "written-2", "synced-1", "renamed-1", "durable-1"]
NOBODY = 65534


def put_and_be_killed(root: Path) -> None:
    step, count = root.name.split("-")
    seen = []

    def kill_at(reached: str) -> None:
        seen.append(reached)
        if seen.count(step) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    DiskStore(root, on_step=kill_at).put(SPEC, KV)


def killed(folder: Path) -> None:
    for point in KILL_POINTS:
        child = os.fork()
        if child == 0:
            put_and_be_killed(folder / point)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{point}: status {status}"


def put_and_report(store: DiskStore) -> None:
    try:
        store.put(SPEC, KV)
    except StoreError as error:
        sys.stdout.write(f"{error}\n")


def plain(folder: Path) -> None:
    put_and_report(DiskStore(folder))


def limited(folder: Path) -> None:
    store = DiskStore(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (KV.num_bytes // 2, resource.RLIM_INFINITY))
    put_and_report(store)


def forbidden(folder: Path) -> None:
    store = DiskStore(folder)
    objects = folder / "objects"
    objects.chmod(0o500)
    if os.geteuid() == 0:  # permissions do not hold for root
        for path in (folder, objects):
            os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    put_and_report(store)


if __name__ == "__main__":
    commands = {"killed": killed, "plain": plain, "limited": limited, "forbidden": forbidden}
    commands[sys.argv[1]](Path(sys.argv[2]))
