import io
from itertools import chain, islice
from types import SimpleNamespace

import datasets
import lightning as L
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins.precision import Precision
from PIL import Image

from tokenlearn.data import ImageBatch, ImageDataModule
from tokenlearn.data.images import square_pixels, to_rgb
from tokenlearn.data.portraits import ATTRIBUTES, portrait
from tokenlearn.errors import UserError
from tokenlearn.models import StableDiffusion

COUNT = 13
BACKBONE = SimpleNamespace(latent_size=8, vae_scale_factor=2)  # images of 16x16 pixels


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def picture(index, mode="RGB"):
    return Image.new("RGB", (24, 20), (10 * index + 5, 100, 200)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "pictures"
    (target / "deeper").mkdir(parents=True)
    for index in range(COUNT):
        # Words such as 'test' in a name must not make it another split.
        picture(index).save(target / ("deeper" if index % 2 else "") / f"face-test-{index:02d}.png")
    return target


@pytest.fixture
def labelled(tmp_path):
    """A saved data set with labels of every kind, unknown ones among them."""
    rows = {
        "image": [picture(index) for index in range(COUNT)],
        "smile": [None if index == 4 else index % 2 == 0 for index in range(COUNT)],
        "hair": [None if index == 4 else ("red", "black", "brown")[index % 3] for index in range(COUNT)],
        "style": [index % 2 for index in range(COUNT)],
        "age": [-1 if index == 4 else index % 4 for index in range(COUNT)],
        "shown": [[index % 2 == 1, index > 5] for index in range(COUNT)],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "smile": datasets.Value("bool"),
            "hair": datasets.Value("string"),
            "style": datasets.ClassLabel(names=["photo", "sketch"]),
            "age": datasets.Value("int64"),
            "shown": datasets.Sequence(datasets.Value("bool"), length=2),
        }
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "labelled")
    data.to_parquet(tmp_path / "parquet" / "part.parquet")
    return tmp_path / "labelled"


def module(source, rank=0, world_size=1, backbone=BACKBONE, **options):
    """A data module as Lightning attaches it on one process and sets it up."""
    defaults = {"validation_images": 0, "test_images": 0, "num_workers": 0, "batch_size": 4}
    if options.get("streaming"):
        defaults |= {"batches_per_epoch": 3, "shuffle_buffer": 5}
    made = ImageDataModule(str(source), **(defaults | options))
    made.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        lightning_module=SimpleNamespace(backbone=backbone),
        precision="32-true",
        precision_plugin=Precision(),
        strategy=SimpleNamespace(barrier=lambda name: None),
    )
    made.prepare_data()
    made.setup("fit")
    return made


def names(batches):
    return list(chain.from_iterable(batch.names for batch in batches))


def numbers(batches):
    """Which pictures, by their colour."""
    return [int(round(float(one) * 255 - 5) / 10) for batch in batches for one in batch.images[:, 0, 0, 0]]


def epochs(loader, count):
    return list(chain.from_iterable(list(loader) for _ in range(count)))


@pytest.mark.parametrize("streaming", [False, True])
def test_all_sources_give_the_same_pictures(folder, labelled, tmp_path, streaming):
    parquet = tmp_path / "parquet"
    for source in (folder, labelled, parquet, parquet / "part.parquet", parquet / "*.parquet"):
        made = module(source, streaming=streaming)
        once = list(made.single_pass())
        assert sorted(numbers(once)) == list(range(COUNT))
        assert once[0].images.shape[1:] == (3, 16, 16)
        assert once[0].latents is None
        trained = epochs(made.train_dataloader(), 3)
        assert all(len(batch.names) == 4 for batch in trained)
        assert sorted(set(numbers(trained))) == list(range(COUNT))
    assert set(names(module(folder, streaming=streaming).single_pass())) == {
        f"{'deeper/' if index % 2 else ''}face-test-{index:02d}.png" for index in range(COUNT)
    }


def test_a_subfolder_may_be_a_split(folder):
    (folder / "deeper").rename(folder / "train")
    assert sorted(numbers(module(folder).single_pass())) == list(range(1, COUNT, 2))
    with pytest.raises(UserError, match=r"cannot load split 'train\[5:9.5\]'"):
        module(folder, split="train[5:9.5]")


def test_a_pass_takes_everything_once(folder):
    loader = module(folder, batch_size=5).train_dataloader()
    assert len(loader) == 3
    taken = numbers(epochs(loader, 13))
    passes = [taken[start : start + COUNT] for start in range(0, 15 * COUNT, COUNT)]
    assert all(sorted(one) == list(range(COUNT)) for one in passes)
    assert len({tuple(one) for one in passes}) > 10
    other = module(folder, batch_size=5, seed=1).train_dataloader()
    assert numbers(other) != taken[:15]


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_of_other_kinds_are_a_second_part_of_the_test(labelled, streaming):
    options = {
        "keep": {"style": ["photo"]},
        "transfer_keep": {"style": ["sketch"]},
        "label_columns": {"style": "style"},
    }
    made = module(labelled, streaming=streaming, test_images=2, transfer_images=5, **options)
    test, transfer = made.test_dataloader()
    assert sum(len(batch.names) for batch in test) == 2
    assert sum(len(batch.names) for batch in transfer) == 5
    assert all((batch.labels["style"] == 1).all() for batch in transfer)
    assert all(number % 2 == 0 for number in [*numbers(test), *numbers(made.single_pass())])
    assert len(module(labelled, streaming=streaming, test_images=2, **options).test_dataloader()) == 1


def test_pictures_of_other_kinds_are_never_learned_from(labelled):
    made = module(labelled, test_images=2, transfer_images=4)
    parts = [numbers(part) for part in (*made.test_dataloader(), made.single_pass())]
    assert sorted(chain.from_iterable(parts)) == list(range(COUNT))
    with pytest.raises(UserError, match=r"has 6 usable pictures of data.transfer_keep, fewer than .* 7; lower that"):
        module(labelled, transfer_keep={"style": ["sketch"]}, transfer_images=7)
    with pytest.raises(UserError, match=r"data.transfer_keep: column 'style' has no class 'oil'"):
        module(labelled, transfer_keep={"style": ["oil"]}, transfer_images=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_two_ranks_together_equal_one_process_whatever_the_workers(folder, streaming):
    one = epochs(module(folder, streaming=streaming).train_dataloader(), 4)
    parts = [
        epochs(module(folder, rank, 2, streaming=streaming, batch_size=2, num_workers=rank).train_dataloader(), 4)
        for rank in range(2)
    ]
    if not streaming:
        assert len(parts[0]) == len(one)
    for whole, first, second in zip(one, *parts, strict=True):
        assert whole.names == first.names + second.names
        assert torch.equal(whole.images, torch.cat([first.images, second.images]))


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_pictures_are_never_trained_on(folder, streaming):
    options = {"streaming": streaming, "validation_images": 3, "test_images": 4, "eval_batch_size": 2}
    made = module(folder, **options)
    validated, tested = names(made.val_dataloader()), names(made.test_dataloader()[0])
    trained = names(epochs(made.train_dataloader(), 4))
    assert (len(validated), len(tested), len(set(trained))) == (3, 4, COUNT - 7)
    assert len({*validated, *tested, *trained}) == COUNT
    again = module(folder, seed=5, **options)
    assert (names(again.val_dataloader()), names(again.test_dataloader()[0])) == (validated, tested)
    parts = [names(module(folder, rank, 2, **options).test_dataloader()[0]) for rank in range(2)]
    assert sorted(chain(*parts)) == sorted(tested)
    assert module(folder, streaming=streaming).val_dataloader() == []


def spoil(folder):
    """Three files that cannot be used."""
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, format="PNG")
    (folder / "cut.png").write_bytes(whole.getvalue()[:2000])
    (folder / "words.jpg").write_text("not a picture")
    Image.new("RGB", (3, 90)).save(folder / "tiny.png")


def test_broken_pictures_are_skipped_and_nothing_else(folder, monkeypatch):
    spoil(folder)
    with pytest.warns(UserWarning, match=r"skipped 3 of the pictures .* such as '(cut|words|tiny)\.") as seen:
        made = module(folder, num_workers=2)
    assert len([one for one in seen if "skipped" in str(one.message)]) == 1
    assert sorted(numbers(made.single_pass())) == list(range(COUNT))

    def not_again(*arguments):
        raise AssertionError("checked twice")

    monkeypatch.setattr("tokenlearn.data.images.read_image", not_again)
    with pytest.warns(UserWarning, match="skipped 3"):
        module(folder)


def test_broken_pictures_of_a_stream_are_skipped_on_all_ranks_alike(folder):
    spoil(folder)
    options = {"streaming": True, "batches_per_epoch": 4}
    with pytest.warns(UserWarning, match="skipped [3-6] pictures"):
        one = list(module(folder, **options).train_dataloader())
    assert sorted(set(numbers(one))) == list(range(COUNT))
    with pytest.warns(UserWarning, match="skipped"):
        first = list(module(folder, 0, 2, batch_size=2, **options).train_dataloader())
    second = list(module(folder, 1, 2, batch_size=2, **options).train_dataloader())
    assert [batch.names for batch in one] == [a.names + b.names for a, b in zip(first, second, strict=True)]
    with pytest.warns(UserWarning, match="skipped 3 pictures"):
        assert sorted(numbers(module(folder, streaming=True).single_pass())) == list(range(COUNT))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["cut.png", "words.jpg", "tiny.png"])
def test_a_broken_picture_is_an_error_if_wanted(folder, tmp_path, streaming, name):
    spoil(folder)
    for other in {"cut.png", "words.jpg", "tiny.png"} - {name}:
        (folder / other).unlink()
    made = module(folder, streaming=streaming, broken_images="error")
    with pytest.raises(UserError, match=rf"picture '{name}' .* cannot be used .*data.broken_images to skip") as raised:
        list(made.single_pass())
    assert "\n" not in str(raised.value)


def test_every_mode_becomes_rgb():
    solid = (40, 100, 200)
    assert to_rgb(picture(0, "RGB")).getpixel((0, 0)) == (5, 100, 200)
    assert to_rgb(Image.new("RGBA", (2, 2), (*solid, 255))).getpixel((0, 0)) == solid
    assert to_rgb(Image.new("RGBA", (2, 2), (*solid, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (2, 2), (10, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 77 * 256, dtype=np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == (77, 77, 77)
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_pictures_are_cropped_in_the_middle_and_not_squeezed():
    wide = Image.new("RGB", (60, 20), "black")
    wide.paste("red", (20, 0, 40, 20))
    assert (square_pixels(wide, 20) == torch.tensor([255, 0, 0])).all()
    small = square_pixels(wide.rotate(90, expand=True), 10)  # resizing mixes neighbours into the outermost pixels
    assert (small[2:-2, 2:-2] == torch.tensor([255, 0, 0])).all()
    unchanged = portrait(0, 0)[1]
    assert np.array_equal(square_pixels(unchanged, 64), np.asarray(unchanged))


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_every_kind(labelled, streaming):
    made = module(
        labelled,
        streaming=streaming,
        label_columns={"smile": "smile", "hair": "hair", "style": "style", "flipped": "style", "age": "age"},
        label_classes={"hair": ["brown", "black", "red"], "flipped": ["sketch", "photo"]},
        attributes_column="shown",
        attribute_names=["odd", "late"],
    )
    assert made.class_names["hair"] == ("brown", "black", "red")
    assert made.class_names["style"] == ("photo", "sketch")
    batches = list(made.single_pass())
    labels = {name: torch.cat([batch.labels[name] for batch in batches]) for name in batches[0].labels}
    rows = range(COUNT)
    assert numbers(batches) == list(rows)
    assert labels["smile"].tolist() == [-1 if row == 4 else int(row % 2 == 0) for row in rows]
    assert labels["hair"].tolist() == [-1 if row == 4 else (2, 1, 0)[row % 3] for row in rows]
    assert labels["style"].tolist() == [row % 2 for row in rows]
    assert labels["flipped"].tolist() == [1 - row % 2 for row in rows]
    assert labels["age"].tolist() == [-1 if row == 4 else row % 4 for row in rows]
    assert labels["odd"].tolist() == [row % 2 for row in rows]
    assert labels["late"].tolist() == [int(row > 5) for row in rows]
    assert all(column.dtype == torch.int64 for column in labels.values())


def test_names_are_classes_in_alphabetical_order_by_default(labelled):
    assert module(labelled, label_columns={"hair": "hair"}).class_names == {"hair": ("black", "brown", "red")}


@pytest.mark.parametrize("streaming", [False, True])
def test_keep(labelled, streaming):
    made = module(labelled, streaming=streaming, keep={"style": ["sketch"], "hair": ["red", "brown"]})
    expected = [row for row in range(COUNT) if row % 2 and row % 3 != 1 and row != 4]
    assert numbers(made.single_pass()) == expected
    assert set(numbers(epochs(made.train_dataloader(), 2))) == set(expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_portraits_know_their_attributes(streaming):
    made = module("portraits:6", streaming=streaming, portraits_seed=3, size=64, label_columns={"style": "style"})
    batches = list(made.single_pass())
    images = torch.cat([batch.images for batch in batches])
    for index in range(6):
        scene, expected, _ = portrait(3, index)
        assert np.array_equal((images[index] * 255).round().byte().permute(1, 2, 0), np.asarray(expected))
        assert [int(batches[0].labels[name][index]) for name in ATTRIBUTES] == [scene.has(name) for name in ATTRIBUTES]


def test_flips_are_half_of_all_and_always_the_same_ones(tmp_path):
    half = Image.new("RGB", (16, 16))
    half.paste("white", (0, 0, 8, 16))
    for index in range(20):
        half.save(tmp_path / f"{index}.png")
    options = {"flips": True, "batch_size": 20}

    def images(batches):
        return torch.cat([batch.images for batch in batches])

    taken = images(epochs(module(tmp_path, **options).train_dataloader(), 5))
    flipped = taken[:, 0, 0, 0] == 0
    assert 30 < int(flipped.sum()) < 70
    assert torch.equal(taken[flipped].flip(3), taken[~flipped][:1].expand_as(taken[flipped]))
    assert torch.equal(images(epochs(module(tmp_path, num_workers=2, **options).train_dataloader(), 5)), taken)
    assert (images(module(tmp_path, **options).single_pass())[:, 0, 0, 0] == 1).all()


def test_a_batch_moves_to_the_device():
    batch = ImageBatch(torch.zeros(2, 3, 4, 4), None, {"smile": torch.zeros(2, dtype=torch.int64)}, ["a", "b"])
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, ImageBatch)
    assert moved.images.device.type == moved.labels["smile"].device.type == "meta"
    assert (moved.latents, moved.names) == (None, ["a", "b"])


@pytest.fixture(scope="module")
def backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:skipped")
def test_cached_latents_equal_those_encoded_on_the_fly(folder, tmp_path, backbone, streaming):
    spoil(folder)
    options = {"streaming": streaming, "backbone": backbone, "validation_images": 2, "test_images": 1}
    cached = {"cache_dir": str(tmp_path / "latents"), "cache_shard_size": 6}
    made = module(folder, **options, **cached)
    from_cache = epochs(made.train_dataloader(), 3)
    on_the_fly = epochs(module(folder, **options).train_dataloader(), 3)
    for latent_batch, image_batch in zip(from_cache, on_the_fly, strict=True):
        assert latent_batch.images is None
        assert latent_batch.names == image_batch.names
        with torch.no_grad():
            assert torch.equal(latent_batch.latents, backbone.encode_images(image_batch.images))
    assert all(batch.latents is None for batch in made.val_dataloader())

    (made_folder,) = (tmp_path / "latents").iterdir()
    times = {path: path.stat().st_mtime_ns for path in made_folder.iterdir()}
    next(iter(module(folder, **options, **cached).train_dataloader()))
    assert {path: path.stat().st_mtime_ns for path in made_folder.iterdir()} == times


@pytest.mark.parametrize("change", ["size", "pictures", "weights", "split", "precision"])
def test_a_cache_of_anything_else_is_not_read(folder, tmp_path, tiny_models, backbone, change):
    options = {"cache_dir": str(tmp_path / "latents")}
    module(folder, backbone=backbone, **options).train_dataloader()
    trained_on = backbone
    if change == "size":
        options["size"] = 8
    if change == "split":
        options["validation_images"] = 1
    if change == "pictures":
        picture(20).save(folder / "deeper" / "another.png")
    if change == "weights":
        trained_on = StableDiffusion(str(tiny_models / "pipeline"))
        with torch.no_grad():
            next(trained_on.vae.encoder.parameters()).add_(1e-3)
    made = module(folder, backbone=trained_on, **options)
    if change == "precision":
        made.trainer.precision = "bf16-mixed"
    made.train_dataloader()
    assert len(list((tmp_path / "latents").iterdir())) == 2


class Recorder(L.LightningModule):
    """Notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.backbone = BACKBONE
        self.seen = []

    def training_step(self, batch):
        self.seen.append(batch.names)
        return self.weight * batch.images.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_killed_and_resumed_equals_uninterrupted(folder, tmp_path, streaming):
    spoil(folder)

    def fit(steps, ckpt_path=None):
        task, data = Recorder(), ImageDataModule(
            str(folder), streaming=streaming, batches_per_epoch=4, batch_size=3, shuffle_buffer=5,
            validation_images=0, test_images=0,
        )  # fmt: skip
        trainer = L.Trainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return task.seen

    whole = fit(10)
    for stop in (3, 4):  # in the middle and at the end of an epoch
        assert fit(stop) == whole[:stop]
        assert fit(10, str(tmp_path / "last.ckpt")) == whole[stop:]


def test_ten_thousand_streamed_pictures_take_no_more_memory_than_a_few(tmp_path):
    def encoded(seed):
        file = io.BytesIO()
        noise = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, format="PNG", compress_level=0)
        return {"bytes": file.getvalue(), "path": None}

    pictures = [encoded(seed) for seed in range(20)]
    table = pyarrow.table({"image": pictures * 500})
    pyarrow.parquet.write_table(table, tmp_path / "many.parquet", row_group_size=200)
    del table
    options = {"streaming": True, "batch_size": 50, "batches_per_epoch": 200, "shuffle_buffer": 300}
    batches = iter(module(tmp_path / "many.parquet", num_workers=1, **options).train_dataloader())

    def megabytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    assert sum(len(batch.names) for batch in islice(batches, 40)) == 2000
    before = megabytes()
    assert sum(len(batch.names) for batch in batches) == 8000
    assert megabytes() - before < 30  # encoded they are 120, decoded as many


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "no/such/folder"}, "data folder 'no/such/folder' does not exist"),
        ({"source": "portraits:many"}, "'portraits:many' needs a number"),
        ({"split": "test"}, "was saved without splits; leave data.split at train, not 'test'"),
        ({"image_column": "photo"}, r"no column 'photo'; .*image"),
        ({"image_column": "age"}, "column 'age' holds no pictures"),
        ({"label_columns": {"smile": "Smiling"}}, r"label_columns names column 'Smiling'.*smile"),
        ({"label_classes": {"hair": ["red"]}}, "label_classes names 'hair'"),
        ({"label_columns": {"hair": "hair"}, "streaming": True}, "data.label_classes"),
        ({"attributes_column": "shown", "attribute_names": ["odd"]}, "has 2 attributes, data.attribute_names 1"),
        ({"attributes_column": "shown"}, "need each other"),
        ({"keep": {"color": ["red"]}}, "keep names column 'color'"),
        ({"keep": {"style": ["oil"]}}, "has no class 'oil'; it has photo, sketch"),
        ({"keep": {"hair": ["green"]}}, "0 usable pictures"),
        ({"size": 15}, "data.size 15 is not a multiple of 2 .* set it to 16"),
        ({"size": 0}, "data.size must be at least 1, got 0"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, got -1"),
        ({"test_images": COUNT}, f"has {COUNT} usable pictures, too few"),
        ({"min_size": 500}, "0 usable pictures"),
        ({"streaming": True, "batches_per_epoch": None}, "data.batches_per_epoch must be set"),
        ({"flips": True, "cache_dir": "x"}, "cached latents cannot be mirrored"),
    ],
)
@pytest.mark.filterwarnings("ignore:skipped")
def test_bad_settings_are_named(labelled, options, message):
    with pytest.raises(UserError, match=message) as raised:
        module(**({"source": labelled} | options))
    assert "\n" not in str(raised.value)


def test_a_label_that_is_no_class_is_named(labelled):
    for options, message in (
        ({"label_columns": {"hair": "hair"}, "label_classes": {"hair": ["red", "black"]}}, "has 'brown' in column"),
        ({"label_columns": {"age": "age"}, "label_classes": {"age": ["young", "old"]}}, "has '2' in column 'age'"),
        ({"label_columns": {"all": "shown"}}, r"has '\[False, False\]' in column 'shown'"),
    ):
        with pytest.raises(UserError, match=message):
            list(module(labelled, **options).single_pass())


@pytest.mark.parametrize("name", [None, "notes.txt"])
def test_a_folder_without_pictures_is_named(tmp_path, name):
    target = tmp_path / "empty"
    target.mkdir()
    if name:
        (target / name).write_text("no picture")
    with pytest.raises(UserError, match="no pictures in the folder"):
        module(target)


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_folder_of_broken_pictures_is_an_error(tmp_path):
    (tmp_path / "pictures").mkdir()
    spoil(tmp_path / "pictures")
    with pytest.raises(UserError, match="0 usable pictures"):
        module(tmp_path / "pictures")


def test_data_module_needs_its_trainer():
    with pytest.raises(RuntimeError, match="Trainer"):
        ImageDataModule("portraits:4").setup()
