import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokenlearn.errors import UserError
from tokenlearn.files import atomic_write, check_writable, new_folder, remove_leftovers


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
    with atomic_write(tmp_path / "tensors.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    names = ("ordinary", "atomic", "tensors.safetensors")
    assert len({stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names}) == 1


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


def test_a_full_disk_is_one_line(tmp_path: Path):
    target = Path("/dev/full")
    if not target.exists():
        pytest.skip("no /dev/full here")

    def write(folder: Path) -> None:
        with atomic_write(folder / "file.txt"), target.open("w") as full:
            full.write("x" * 100_000)

    with pytest.raises(UserError, match=r"file.txt' .*No space left on device.* make room") as caught:
        write(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["s3://bucket/run/image.png", "gs:/bucket/run"])
def test_addresses_are_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not a local folder"), atomic_write(target):
        pass
    with pytest.raises(UserError, match="not a local folder"):
        new_folder(Path(target))
    assert not list(tmp_path.iterdir())


def test_new_folders_are_of_one_run_alone(tmp_path: Path):
    made = [new_folder(tmp_path / "outputs" / "edit" / "2026-01-01_00-00-00") for _ in range(3)]
    assert [folder.name[19:] for folder in made] == ["", "-2", "-3"]
    assert all(folder.is_dir() for folder in made)


def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path: Path):
    check_writable(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        check_writable(tmp_path / "file")


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path):
    (tmp_path / "images").mkdir()
    names = [".a-seed1-0123456789ab.png", ".last-0123456789ab.ckpt", ".mine-0123456789.png", "b-0123456789ab.png"]
    for name in names:
        (tmp_path / "images" / name).touch()
        os.utime(tmp_path / "images" / name, (0, 0))
    young = tmp_path / ".c-0123456789ab.png"
    young.touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(names[2:])
    assert young.exists()
