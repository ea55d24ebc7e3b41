import datasets
import pytest
from PIL import Image

from data_prep.celeba_attributes import main
from tokenlearn.errors import UserError

PUBLISHED = "3\nSmiling Wavy_Hair \n000001.jpg  1 -1\n000002.jpg -1 -1\n000003.jpg -1  1\n"
AS_CSV = "image_id,Smiling,Wavy_Hair\n000001.jpg,1,-1\n000002.jpg,-1,-1\n000003.jpg,-1,1\n"


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in (1, 3):
        Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(folder / f"{number:06d}.jpg")
    return folder


@pytest.mark.parametrize("text", [PUBLISHED, AS_CSV], ids=["published", "csv"])
def test_the_imagefolder_loader_reads_the_metadata(images, tmp_path, text, capsys):
    (tmp_path / "list.txt").write_text(text)
    main(tmp_path / "list.txt", images)
    assert "2 images, 1 not in the folder left out" in capsys.readouterr().out
    rows = datasets.load_dataset("imagefolder", data_dir=str(images), split="train")
    assert [(row["Smiling"], row["Wavy_Hair"]) for row in rows] == [(True, False), (False, True)]
    assert [row["image"].getpixel((0, 0))[0] // 10 for row in rows] == [1, 3]


def test_chosen_attributes(images, tmp_path):
    (tmp_path / "list.txt").write_text(PUBLISHED)
    main(tmp_path / "list.txt", images, ["Wavy_Hair"])
    assert "Smiling" not in (images / "metadata.jsonl").read_text()
    with pytest.raises(UserError, match=r"no attribute 'Grin'.*Smiling, Wavy_Hair"):
        main(tmp_path / "list.txt", images, ["Grin"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no attributes"),
        (PUBLISHED.replace("3\n", "4\n", 1), "should have 4 images but has 3"),
        (PUBLISHED.replace("-1  1", "-1"), "not '000003.jpg -1'"),
        (PUBLISHED.replace("-1  1", "-1 yes"), "not '000003.jpg -1 yes'"),
        (PUBLISHED.replace(".jpg", ".gif"), "none of the images"),
    ],
)
def test_bad_files_are_named(images, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        main(tmp_path / "list.txt", images)
    assert not (images / "metadata.jsonl").exists()


def test_a_missing_file_is_named(images, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.txt"):
        main(tmp_path / "none.txt", images)
