from itertools import chain

import datasets
import numpy as np
import pytest
from PIL import Image

from tokenlearn.data.portraits import ATTRIBUTES, PERSONA_LABELS, STYLES, export_folder, portrait, portraits_dataset
from tokenlearn.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def comparable(row):
    return {key: value.tobytes() if key == "image" else value for key, value in row.items()}


def test_portrait_depends_on_seed_and_index_alone():
    for place in ((0, 0), (0, 1), (1, 0)):
        (scene, image, text), (scene2, image2, text2) = portrait(*place), portrait(*place)
        assert (scene, image.tobytes(), text) == (scene2, image2.tobytes(), text2)
    assert len({portrait(*place)[1].tobytes() for place in ((0, 0), (0, 1), (1, 0))}) == 3


def test_columns():
    rows = portraits_dataset(12, seed=2)
    assert set(rows.column_names) == {
        "image", "caption", "attributes", "persona", "parts", "style", "pipe", "hair_color", "rating"
    }  # fmt: skip
    assert rows.features["persona"].names == list(PERSONA_LABELS)
    for index, row in enumerate(rows):
        scene, image, text = portrait(2, index)
        assert np.array_equal(np.asarray(row["image"]), np.asarray(image))
        assert row["caption"] == text
        assert [name for name, present in zip(ATTRIBUTES, row["attributes"], strict=True) if present] == [
            name for name in ATTRIBUTES if scene.has(name)
        ]
        assert PERSONA_LABELS[row["persona"]] == (scene.persona or "ordinary person")
        assert row["parts"] == len(scene.parts)
        assert STYLES[row["style"]] == scene.style
        assert row["pipe"] == scene.pipe
        assert row["hair_color"] == ("gray" if scene.has("gray hair") else scene.hair_color)
        assert row["rating"] == pytest.approx(scene.rating)


def test_streaming_equals_cached():
    cached = [comparable(row) for row in portraits_dataset(9, seed=1)]
    for num_shards in (1, 4):
        streamed = portraits_dataset(9, seed=1, streaming=True, num_shards=num_shards)
        assert [comparable(row) for row in streamed] == cached


def test_personas_take_turns():
    rows = portraits_dataset(24, seed=3, personas=True)
    assert [PERSONA_LABELS[row["persona"]] for row in rows] == 2 * list(PERSONA_LABELS[1:])
    assert len({row["image"].tobytes() for row in rows}) == 24


def test_shards_cover_everything_once():
    whole = portraits_dataset(10, seed=1, streaming=True, num_shards=3)
    assert whole.num_shards == 3
    parts = [[row["image"].tobytes() for row in whole.shard(3, index)] for index in range(3)]
    assert all(parts)
    everything = [portrait(1, index)[1].tobytes() for index in range(10)]
    assert len(set(everything)) == 10
    assert sorted(chain.from_iterable(parts)) == sorted(everything)


def test_export_folder_goes_on_where_it_stopped(tmp_path, monkeypatch):
    folder = tmp_path / "portraits"
    real = Image.Image.save

    def full_disk(self, path, **options):
        if len(list(folder.glob("[!.]*.png"))) == 2:
            path.write_bytes(b"half a")
            raise OSError("disk full")
        real(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match="disk full"):
        export_folder(folder, 5, seed=3)
    assert sorted(path.name for path in folder.iterdir()) == ["000000.png", "000001.png"]
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    monkeypatch.setattr(Image.Image, "save", real)
    assert export_folder(folder, 5, seed=3) == folder
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(list(folder.iterdir())) == 6
    for index in range(5):
        assert np.array_equal(np.asarray(Image.open(folder / f"{index:06d}.png")), np.asarray(portrait(3, index)[1]))


def test_imagefolder_reads_the_export(tmp_path):
    folder = export_folder(tmp_path / "portraits", 6, seed=3)
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert len(rows) == 6
    for index, row in enumerate(rows):
        scene, image, text = portrait(3, index)
        assert np.array_equal(np.asarray(row["image"].convert("RGB")), np.asarray(image))
        assert (row["caption"], row["style"], row["pipe"]) == (text, scene.style, scene.pipe)
        assert row["persona"] == (scene.persona or "ordinary person")
        assert row["attributes"] == [scene.has(name) for name in ATTRIBUTES]
        assert row["rating"] == pytest.approx(scene.rating)
