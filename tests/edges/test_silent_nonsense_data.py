"""Data and names that would be learned wrongly without a word: refused, or counted in a warning."""

import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.command_line import error_of
from tests.data.stand_ins import ImageTask, trainer_with
from tests.tiny import write_image_config
from tokenlearn.data import HeldOut, ImageDataModule, LabelColumns
from tokenlearn.data.images_to_edit import FolderImages
from tokenlearn.data.pixels import to_rgb
from tokenlearn.errors import UserError
from tokenlearn.export import export
from tokenlearn.main import main
from tokenlearn.models.attributes import check_class_names, labelled_attributes
from tokenlearn.tokens.files.writing import file_names


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def image(index):
    return Image.new("RGB", (24, 20), (10 * index + 5, 100, 200))


def saved(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image(0).save(path)
    return path


def opened_as_is(source, **options):
    """Names of the training images."""
    made = ImageDataModule(str(source), held_out=HeldOut(0, 0), num_workers=0, batch_size=4, **options)
    made.trainer = trainer_with(ImageTask())
    made.prepare_data()
    made.setup("fit")
    return sorted(name for batch in made._evaluation(made._ready()[0].train) for name in batch.names)


def opened(source, **options):
    """Names of the training images, and the warnings of images that are left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = opened_as_is(source, **options)
    return names, [str(warning.message) for warning in caught if "left out" in str(warning.message)]


def test_tokens_of_one_file_are_refused_before_the_training(tiny_config, tiny_models, tmp_path, capsys):
    for token, other in (("<c++>", "<c#>"), ("<18+>", "<<18>"), ("<a.b>", "<A.B>")):
        with pytest.raises(UserError, match="both give the file"):
            file_names([token, "<x>", other])
    assert file_names(["<c++>", "<cpp>"]) == ["c-tl.safetensors", "cpp-tl.safetensors"]
    changes = {"classes": ["c++", "c#"], "objective": {"class_path": "SymmetryLoss"}, "judge": None}
    config = tiny_config({f"model.init_args.{name}": value for name, value in changes.items()})
    line = error_of(["fit", "--config", config], capsys)
    assert "'<c++>' and '<c#>' both give the file 'c-tl.safetensors'; rename one" in line
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_export_does_not_write_two_tokens_to_one_file(tmp_path):
    bank = {"num_vectors": {"<c++>": 1, "<c#>": 1}, "embedding_widths": [4], "metadata": {"<c++>": {}, "<c#>": {}}}
    bank |= {"base_model": "x", "vocabulary_hash": "y"}
    state = {"bank.vectors.0": torch.rand(2, 4), "bank._extra_state": bank["num_vectors"]}
    torch.save({"tokenlearn": bank, "state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="both give the file"):
        export(str(tmp_path / "a.ckpt"), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert len(export(str(tmp_path / "a.ckpt"), output_dir=str(tmp_path / "out"), tokens=["<c#>"])) == 1


@pytest.fixture
def faces(tmp_path):
    for index in range(12):
        saved(tmp_path / "faces" / f"{index:02d}.png")
    return tmp_path / "faces"


def with_labels(faces, labels):
    rows = "".join(f"{index:02d}.png,{label}\n" for index, label in enumerate(labels))
    (faces / "metadata.csv").write_text(f"file_name,smile\n{rows}")
    return faces


@pytest.mark.parametrize("number", ["{}", "{}.0"])
def test_labels_of_minus_one_and_one(faces, number):
    with_labels(faces, [number.format(2 * (index % 2) - 1) for index in range(12)])
    labels = LabelColumns(columns={"smile": "smile"})
    with pytest.raises(UserError, match="'smile' has -1 and 1 but no 0 for 'smile'"):
        opened(faces, labels=labels)
    with_labels(faces, [index % 3 - 1 for index in range(12)])  # unknown, absent, present
    assert len(opened(faces, labels=labels)[0]) == 12


def test_labels_of_minus_one_in_a_list(tmp_path):
    rows = {"image": [image(index) for index in range(6)], "shown": [[1, 2 * (index % 2) - 1] for index in range(6)]}
    features = datasets.Features({"image": datasets.Image(), "shown": datasets.List(datasets.Value("int64"))})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    labels = LabelColumns(list_column="shown", list_attributes=["hat", "smile"])
    with pytest.raises(UserError, match="'shown' has -1 and 1 but no 0 for 'smile'"):
        opened(tmp_path / "saved", labels=labels)


def test_a_token_that_no_image_was_for_is_named(tiny_models, tmp_path, faces):
    with_labels(faces, ["1", "1", ""] * 4)
    model = {
        "class_path": "TextualInversion",
        "init_args": {
            "backbone": {
                "class_path": "StableDiffusion",
                "init_args": {"pretrained": str(tiny_models / "pipeline")},
            },
            "attributes": {"smile": None},
            "sampling": {"steps": 2},
        },
    }
    config = write_image_config(tmp_path, "run", model, trainer={"max_steps": 2})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(["fit", "--config", config])
    (line,) = [str(warning.message) for warning in caught if "no training image was of" in str(warning.message)]
    assert "<no-smile>, which learned nothing" in line


@pytest.mark.parametrize(
    "names",
    [("smile", "without"), ("Smile", "other"), ("with_hat", "without_hat"), ("smiling", "not smiling"), ("yes", "no")],
)
def test_folders_in_the_reverse_order_of_absent_and_present(names):
    (smile,) = labelled_attributes({"smile": None})
    with pytest.raises(UserError, match=f"{', '.join(names)} in the data and no smile, smile in the model; fix it"):
        check_class_names(smile, names, "fix it")


def test_folders_of_other_names_say_what_they_are_taken_for():
    (smile,) = labelled_attributes({"smile": None})
    with pytest.warns(UserWarning, match="'grin' are taken for 'no smile', those of 'neutral' for 'smile'; .*fix it"):
        check_class_names(smile, ("grin", "neutral"), "fix it")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for names in (("no smile", "smile"), ("no_smile", "Smile"), ("without", "with"), ("other", "smile")):
            check_class_names(smile, names, "fix it")
    (hair,) = labelled_attributes({"hair": ["red", "black"]})
    with pytest.raises(UserError, match="fix it"):
        check_class_names(hair, ("black", "blond"), "fix it")


def test_a_class_named_like_the_split_is_not_taken_for_it(tmp_path):
    for name in ("car", "train", "bus"):
        for index in range(2):
            saved(tmp_path / "vehicles" / name / f"{index}.png")
    with pytest.raises(UserError, match=r"images in 'train', .* and in bus, car; set data\.source"):
        opened(tmp_path / "vehicles")
    for name in ("train", "Test", "val", ".cache", "__MACOSX"):
        saved(tmp_path / "splits" / name / "a.png")
    assert opened(tmp_path / "splits") == (["train/a.png"], [])


def test_images_that_are_left_out_are_counted(faces, tmp_path):
    for name in ("a.heic", "b.HEIC", "c.cr2", "notes.txt"):
        (faces / name).write_bytes(b"other")
    saved(tmp_path / "elsewhere" / "a.png")
    (faces / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    names, left_out = opened(faces)
    assert len(names) == 12
    assert any("1 .cr2, 2 .heic; convert them to JPEG or PNG" in line for line in left_out)
    assert any("1 links to folders, such as 'linked'" in line for line in left_out)
    with pytest.warns(UserWarning, match="convert them"):
        assert len(FolderImages(str(faces), 16, 4).names) == 12


def test_images_without_a_row_of_metadata_are_counted(faces):
    with_labels(faces, [1] * 5)
    saved(faces / ".hidden.png")
    names, left_out = opened(faces)
    assert len(names) == 5
    assert any("7 of 12 images, which have no row in the metadata" in line for line in left_out)
    with_labels(faces, [1] * 12)
    assert opened(faces)[1] == []


def test_numbers_whose_white_is_known_become_grey():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    forms = (Image.fromarray(ramp), Image.fromarray((ramp * 65535).astype(np.uint16)))
    forms += (Image.fromarray((ramp * 65535).astype(np.int32)),)
    for form in forms:
        assert np.array_equal(np.asarray(to_rgb(form))[..., 1], expected)
    black = Image.fromarray(np.zeros((4, 4), dtype=np.uint16))
    assert np.asarray(to_rgb(black)).max() == 0


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((4, 4), 200, dtype=np.int32),  # 8 bits in 32
        np.full((4, 4), 4000, dtype=np.uint16),  # 12 bits in 16
        np.full((4, 4), 2**24, dtype=np.int32),
        np.full((4, 4), -5, dtype=np.int32),
        np.full((4, 4), 128.0, dtype=np.float32),
        np.full((4, 4), -0.5, dtype=np.float32),
        np.full((4, 4), np.nan, dtype=np.float32),
    ],
)
def test_numbers_whose_white_is_not_known_are_refused(pixels):
    with pytest.raises(ValueError, match="whose white is not known; convert it to 8 bits"):
        to_rgb(Image.fromarray(pixels))


def test_deep_grey_with_a_transparent_colour_keeps_its_shades(tmp_path):
    pixels = np.full((4, 4), 128 * 256, dtype=np.uint16)
    pixels[0, 0] = 20 * 256
    deep = Image.fromarray(pixels)
    deep.info["transparency"] = 20 * 256
    grey = np.asarray(to_rgb(deep))[..., 0]
    assert grey[0, 0] == 255
    assert (grey.flatten()[1:] == 128).all()


def test_images_of_unknown_white_are_skipped_with_a_count(faces):
    Image.fromarray(np.full((24, 20), 300.0, dtype=np.float32)).save(faces / "float.tiff")
    with pytest.warns(UserWarning, match=r"skipped 1 of the images in .*float\.tiff.*convert it to 8 bits"):
        assert len(opened_as_is(faces)) == 12


@pytest.mark.parametrize("table", ["labels.csv", "annotations.jsonl"])
def test_tables_of_labels_that_are_not_read_are_named(faces, table):
    (faces / table).write_text("file,smile\n00.png,1\n")
    expected = rf"column 'smile', which the data do not have; .*; '{table}' is not read: .* metadata\.csv"
    with pytest.raises(UserError, match=expected):
        opened(faces, labels=LabelColumns(columns={"smile": "smile"}))


def test_metadata_above_the_folder_of_the_split(tmp_path):
    saved(tmp_path / "data" / "train" / "a.png")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,smile\ntrain/a.png,1\n")
    with pytest.raises(UserError, match=r"'metadata\.csv' is not read: .* beside the images"):
        opened(tmp_path / "data", labels=LabelColumns(columns={"smile": "smile"}))


def test_metadata_that_is_read_is_not_said_to_be_unread(faces):
    with_labels(faces, [1] * 12)
    with pytest.raises(UserError, match="column 'smiling', which the data do not have") as caught:
        opened(faces, labels=LabelColumns(columns={"smile": "smiling"}))
    assert "is not read" not in str(caught.value)
