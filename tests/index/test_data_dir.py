"""The data directory: private, and locked by the operating system."""

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import index
from index import DataDir, DataDirError, DataDirLocked

HOLD = """
    import sys
    from index import DataDir
    sys.argv = ["/usr/bin/fusionrag", sys.argv[2], "--api-key", "secret"]
    with DataDir({path!r}).lock(exclusive={exclusive}):
        print("held", flush=True)
        sys.stdin.read()
"""


class Holder:
    """Another process that holds the lock until it is told to end, or killed."""

    def __init__(self, path: Path, exclusive: bool, command: str = "ingest") -> None:
        code = textwrap.dedent(HOLD.format(path=str(path), exclusive=exclusive))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "-", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(index.__file__).parents[1],
        )

    def __enter__(self) -> subprocess.Popen:
        assert self.process.stdout.readline() == "held\n"
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.communicate("")


def test_a_data_dir_is_made_for_its_owner_only(tmp_path):
    data_dir = DataDir(tmp_path / "a" / "b")
    for folder in (data_dir.path, data_dir.kv, data_dir.faiss):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert DataDir(data_dir.path).catalogue.parent == data_dir.path


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirError, match="file cannot be used"):
        DataDir(tmp_path / "file")


def test_a_lock_that_cannot_be_taken_for_another_reason_is_refused_with_it(data_dir):
    (data_dir.path / "lock").mkdir()
    with pytest.raises(DataDirError, match="Is a directory"), data_dir.lock(exclusive=True):
        pass


@pytest.mark.parametrize("mine", [True, False])
def test_beside_an_exclusive_holder_nobody_gets_in_and_the_holder_is_named_without_its_secrets(data_dir, mine):
    with Holder(data_dir.path, exclusive=True) as process:
        with pytest.raises(DataDirLocked) as caught, data_dir.lock(exclusive=mine):
            pass
        assert caught.value.holders == (f"{process.pid} fusionrag ingest",)
        assert str(process.pid) in str(caught.value) and "secret" not in (data_dir.path / "lock").read_text()
    with data_dir.lock(exclusive=mine):
        pass


def test_shared_holders_share_and_keep_an_exclusive_one_out(data_dir):
    with Holder(data_dir.path, exclusive=False, command="preprocess") as process, data_dir.lock(exclusive=False):
        with pytest.raises(DataDirLocked) as caught, data_dir.lock(exclusive=True):
            pass
        assert [int(line.split()[0]) for line in caught.value.holders] == [process.pid, os.getpid()]


def test_a_holder_that_is_killed_holds_no_longer(data_dir):
    with Holder(data_dir.path, exclusive=True) as process:
        process.kill()
        process.wait()
        with data_dir.lock(exclusive=True):
            assert (data_dir.path / "lock").read_text().startswith(f"{os.getpid()} ")


def test_ended_holders_are_not_named(data_dir):
    with Holder(data_dir.path, exclusive=False):
        pass
    with data_dir.lock(exclusive=False), pytest.raises(DataDirLocked) as caught, data_dir.lock(exclusive=True):
        pass
    assert [int(line.split()[0]) for line in caught.value.holders] == [os.getpid()]
