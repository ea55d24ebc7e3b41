"""Edits of a folder as users make them, through the command line."""

import pytest
import torch
import yaml
from PIL import Image

from tests.command_line import error_of
from tokenlearn.editing import ImageEditor
from tokenlearn.main import main
from tokenlearn.tokens import save_embedding

SIZES = {"a.png": (20, 30), "deeper/b.jpg": (50, 20), "deeper/c.png": (16, 16)}
EDITS = ["smile+3", "smile-2_hat+1"]


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "faces"
    for name, size in SIZES.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10, 100, 200)).save(target / name)
    return target


@pytest.fixture
def config(tiny_models, tmp_path):
    generator = torch.Generator().manual_seed(0)
    files = [
        save_embedding(tmp_path / f"{token}.safetensors", f"<{token}>", [torch.randn(1, 16, generator=generator)], {})
        for token in ("smile", "hat")
    ]
    settings = {
        "model": {
            "class_path": "Edit",
            "init_args": {
                "backbone": {
                    "class_path": "StableDiffusion",
                    "init_args": {"pretrained": str(tiny_models / "pipeline")},
                },
                "embeddings": [str(file) for file in files],
                "edits": [{"<smile>": 3}, {"<smile>": -2, "<hat>": 1}],
                "interpolations": {"<smile>": [-1, 0, 1], "<hat>": [2, 4]},
                "sampling": {"steps": 5},
                "editing": {"steps": 5, "timestep": 401},
            },
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "edit.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture
def edited(monkeypatch):
    """Sizes of the latents of images that were edited, not left out."""
    sizes = []
    real = ImageEditor.invert

    def counted(self, latents, source):
        sizes.append(tuple(latents.shape[2:]))
        return real(self, latents, source)

    monkeypatch.setattr(ImageEditor, "invert", counted)
    return sizes


def files(run):
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*.png"))


def test_a_folder_of_images(config, folder, edited, tmp_path, recwarn):
    run = tmp_path / "run"
    command = ["predict", "--config", str(config), "--model.images", str(folder)]
    main(command)
    stems = ["a", "deeper/b", "deeper/c"]
    written = [f"images/{edit}/{stem}.png" for edit in EDITS for stem in stems]
    assert files(run) == sorted([*written, *(f"strips/{stem}.png" for stem in stems), "before_after.png"])
    assert len(edited) == 3
    for stem, size in zip(stems, SIZES.values(), strict=True):
        for edit in EDITS:
            with Image.open(run / "images" / edit / f"{stem}.png") as image:
                assert image.size == size
        with Image.open(run / "strips" / f"{stem}.png") as strip:
            assert strip.height == 2 * (18 + 160 + 4) + 4  # a row per token, with the scales above it
            second = strip.crop((strip.width - 164, 18 + 164 + 18 + 4, strip.width, strip.height)).convert("L")
            assert second.getextrema() == (255, 255)  # one scale less than in the first row
    with Image.open(run / "before_after.png") as sheet:
        assert sheet.height == 2 * 18 + 3 * (160 + 4) + 4  # the second edit's caption has two lines
        columns = [sheet.getpixel((sheet.width - 164 * column + 80, 36 + 4 + 80)) for column in (3, 2, 1)]
    assert columns[0] == (10, 100, 200)
    assert len(set(columns)) == 3
    assert not [warning for warning in recwarn if "batch indices" in str(warning.message)]

    # An interrupted run makes what is missing, and leaves the rest as it is.
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.png")}
    lost = run / "images" / EDITS[1] / "deeper" / "b.png"
    lost.unlink()
    edited.clear()
    main(command)
    assert edited == [(8, 20)]
    assert lost.is_file()
    changed = {path for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {lost, run / "before_after.png"}

    edited.clear()
    main([*command, "--results.overwrite=true"])
    assert len(edited) == 3
    assert all(path.stat().st_mtime_ns != when for path, when in before.items())
    assert not list(run.rglob(".*-*"))


def test_generated_images_and_their_edits(config, tmp_path):
    run = tmp_path / "run"
    main(
        [
            "predict",
            "--config",
            str(config),
            "--model.prompts=[a king]",
            "--model.seeds=[1, 2]",
            "--model.interpolations={}",
            "--results.rows=1",
        ]
    )
    names = [f"000-a-king-seed{seed}.png" for seed in (1, 2)]
    assert files(run) == sorted(
        ["before_after.png", *(f"images/{edit}/{name}" for edit in ("before", *EDITS) for name in names)]
    )
    with Image.open(run / "before_after.png") as sheet:
        assert sheet.height == 2 * 18 + 160 + 4 + 4


def test_errors_give_one_line(config, folder, tmp_path, capsys):
    command = ["predict", "--config", str(config), "--model.images", str(folder)]
    assert "'<beard>'" in error_of([*command, "--model.edits=[{<beard>: 1}]"], capsys)
    assert "model.editing.timestep 400" in error_of([*command, "--model.editing.timestep=400"], capsys)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in error_of([*command[:-1], str(tmp_path / "empty")], capsys)
    assert "model.images" in error_of(command[:3], capsys)


def test_a_broken_image_does_not_stop_the_others(config, folder, tmp_path):
    (folder / "deeper" / "broken.png").write_text("not an image")
    with pytest.warns(UserWarning, match=r"skipped 1 images that cannot be used, such as 'deeper/broken'"):
        main(["predict", "--config", str(config), "--model.images", str(folder)])
    assert len(list((tmp_path / "run" / "images").rglob("*.png"))) == 3 * len(EDITS)
