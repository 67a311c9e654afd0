"""A put that is killed, or finds no space, or has no permission, leaves a whole object or none."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fusionrag.store import DiskStore
from fusionrag.store.disk import STALE_TEMPORARY_S

HERE = Path(__file__).resolve().parent
TROUBLE = runpy.run_path(str(HERE / "put_in_trouble.py"))
KILL_POINTS, SPEC, KV = TROUBLE["KILL_POINTS"], TROUBLE["SPEC"], TROUBLE["KV"]


def run(*command: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def assert_takes_the_object(root: Path) -> None:
    store = DiskStore(root)
    store.put(SPEC, KV)
    hit = store.get(SPEC)
    assert hit.kv.keys.equal(KV.keys) and hit.kv.values.equal(KV.values)


@pytest.fixture(scope="module")
def killed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    run(sys.executable, HERE / "put_in_trouble.py", "killed", folder)
    return folder


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_put_killed_at_any_step_leaves_the_whole_object_or_none(point, killed_folder):
    root = killed_folder / point
    store = DiskStore(root)
    renamed = point in ("renamed-1", "durable-1")
    assert store.contains(SPEC) is renamed
    assert (store.get(SPEC) is not None) is renamed
    assert store.stats.quarantined == 0
    for left in root.glob("objects/*/*.tmp"):
        os.utime(left, (time.time() - 2 * STALE_TEMPORARY_S,) * 2)
    assert_takes_the_object(root)
    assert [path.stem for path in files(root)] == [SPEC.digest]


def test_a_put_that_may_not_grow_its_file_names_path_and_remedy_and_leaves_nothing(tmp_path):
    message = run(sys.executable, HERE / "put_in_trouble.py", "limited", tmp_path)
    assert SPEC.digest in message and "free space" in message
    assert files(tmp_path) == []
    assert_takes_the_object(tmp_path)


def test_a_put_on_a_full_disk_names_path_and_remedy_and_leaves_nothing(tmp_path):
    unshare = shutil.which("unshare")
    mounted = f"mount -t tmpfs -o size={KV.num_bytes // 2} tmpfs {tmp_path}"  # gone with its namespace
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here (needs unshare and user namespaces)")
    script = f"{mounted} && '{sys.executable}' '{HERE}/put_in_trouble.py' plain {tmp_path} && find {tmp_path} -type f"
    output = run(unshare, "-rm", "sh", "-c", script)
    assert "No space left on device" in output and "free space" in output
    assert len(output.splitlines()) == 1  # find lists no file


def test_a_put_without_permission_names_path_and_remedy():
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which another user cannot enter
        os.chmod(folder, 0o755)
        message = run(sys.executable, HERE / "put_in_trouble.py", "forbidden", Path(folder) / "kv")
        assert "Permission denied" in message and "write permission" in message
        assert files(Path(folder)) == []
