import os
import stat
from pathlib import Path

import pytest

from tokenlearn.errors import UserError
from tokenlearn.files import atomic_write


def test_writes_in_a_new_folder_and_leaves_nothing_else(tmp_path: Path):
    target = tmp_path / "new" / "folder" / "file.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent
        assert temporary.suffix == ".txt"
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_failure_keeps_the_old_file(tmp_path: Path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_file_is_as_readable_as_an_ordinary_one(tmp_path: Path):
    (tmp_path / "ordinary").touch()
    with atomic_write(tmp_path / "atomic"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "atomic")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("target", ["file/below/a/file.txt", "folder"])
def test_impossible_targets(tmp_path: Path, target: str):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write") as caught, atomic_write(tmp_path / target):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="choose another output folder"), atomic_write(tmp_path / "file.txt"):
        pass
