"""Lightning's files are whole or not there, and nothing lies in the folder of temporary files."""

import stat
import tempfile

import pytest
import torch
import yaml
from lightning.pytorch.plugins import TorchCheckpointIO

import tokenlearn.callbacks.whole_files
from tokenlearn.callbacks import RunLogger, WholeCheckpoints
from tokenlearn.errors import UserError
from tokenlearn.main import main


class OwnCheckpoints(TorchCheckpointIO):
    """A user's way to write checkpoints."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint | {"own": True}, path, storage_options)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The system's folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def killed_in_the_middle(state, file):
    """``torch.save`` of a process that ends in the middle."""
    file.write(b"PK half a checkpoint")
    raise KeyboardInterrupt


def test_a_checkpoint_is_whole_or_the_earlier_one(tmp_path, elsewhere, monkeypatch):
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            WholeCheckpoints().save_checkpoint({"step": 2}, path)
    assert WholeCheckpoints().load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [path.name for path in path.parent.iterdir()] == ["last.ckpt"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o044  # others may read it, as other files
    assert not list(elsewhere.iterdir())


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"cannot write to .*checkpoints"):
        WholeCheckpoints().save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")


def test_an_address_is_written_as_by_lightning(tmp_path):
    WholeCheckpoints().save_checkpoint({"step": 1}, f"file://{tmp_path}/last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"step": 1}


def test_a_cut_file_of_settings_is_impossible(tmp_path, monkeypatch):
    def half(path, settings):
        path.write_text("model:\n  class_pa")
        raise KeyboardInterrupt

    logger = RunLogger(str(tmp_path), name="", version="")
    logger.log_hyperparams({"model": {"class_path": "ClassTokens"}})
    with monkeypatch.context() as patch:
        patch.setattr(tokenlearn.callbacks.whole_files, "save_hparams_to_yaml", half)
        with pytest.raises(KeyboardInterrupt):
            logger.save()
    assert not (tmp_path / "hparams.yaml").exists()
    logger.save()
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text()) == {"model": {"class_path": "ClassTokens"}}


@pytest.mark.parametrize("own", [False, True])
def test_fits_use_it_unless_the_user_has_another(tiny_config, tmp_path, elsewhere, own):
    changes = {"model.init_args.judge": None, "trainer.max_steps": 1, "trainer.logger": False}
    if own:
        changes["trainer.plugins"] = [{"class_path": f"{__name__}.OwnCheckpoints"}]
    main(["fit", "--config", tiny_config(changes)])
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last.get("own", False) is own
    assert not list(elsewhere.iterdir())
