import io
from itertools import chain, islice

import datasets
import lightning as L
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image

from tests.data.stand_ins import ClassTask, ImageTask, trainer_with
from tokenlearn.data import HeldOut, ImageBatch, ImageDataModule, ImageReading, LabelColumns, LatentCaching
from tokenlearn.data.portraits import ATTRIBUTES, PERSONAS, portrait
from tokenlearn.errors import UserError

COUNT = 13


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def image(index, mode="RGB"):
    return Image.new("RGB", (24, 20), (10 * index + 5, 100, 200)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "faces"
    (target / "deeper").mkdir(parents=True)
    for index in range(COUNT):
        # Words such as 'test' in a name must not make it another split.
        image(index).save(target / ("deeper" if index % 2 else "") / f"face-test-{index:02d}.png")
    return target


@pytest.fixture
def labelled(tmp_path):
    """A saved data set with labels of every kind, unknown ones among them."""
    rows = {
        "image": [image(index) for index in range(COUNT)],
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


def module(source, rank=0, world_size=1, task=None, precision="32-true", **options):
    """A data module as Lightning attaches it on one process and sets it up."""
    defaults = {"held_out": HeldOut(0, 0), "num_workers": 0, "batch_size": 4}
    if options.get("streaming"):
        defaults |= {"batches_per_epoch": 3, "shuffle_buffer": 5}
    made = ImageDataModule(str(source), **(defaults | options))
    made.trainer = trainer_with(task or ImageTask(), rank, world_size, precision)
    made.prepare_data()
    made.setup("fit")
    return made


def in_order(made):
    """All training images once, in order, as pixels."""
    return made._evaluation(made._ready()[0].train)


def names(batches):
    return list(chain.from_iterable(batch.names for batch in batches))


def numbers(batches):
    """Which images, by their colour."""
    return [int(round(float(one) * 255 - 5) / 10) for batch in batches for one in batch.images[:, 0, 0, 0]]


def epochs(loader, count):
    return list(chain.from_iterable(list(loader) for _ in range(count)))


@pytest.mark.parametrize("streaming", [False, True])
def test_all_sources_give_the_same_images(folder, labelled, tmp_path, streaming):
    parquet = tmp_path / "parquet"
    for source in (folder, labelled, parquet, parquet / "part.parquet", parquet / "*.parquet"):
        made = module(source, streaming=streaming)
        once = list(in_order(made))
        assert sorted(numbers(once)) == list(range(COUNT))
        assert once[0].images.shape[1:] == (3, 16, 16)
        assert once[0].latents is None
        trained = epochs(made.train_dataloader(), 3)
        assert all(len(batch.names) == 4 for batch in trained)
        assert sorted(set(numbers(trained))) == list(range(COUNT))
    assert set(names(in_order(module(folder, streaming=streaming)))) == {
        f"{'deeper/' if index % 2 else ''}face-test-{index:02d}.png" for index in range(COUNT)
    }


def test_a_subfolder_may_be_a_split(folder):
    (folder / "deeper").rename(folder / "train")
    assert sorted(numbers(in_order(module(folder)))) == list(range(1, COUNT, 2))
    with pytest.raises(UserError, match=r"'train\[5:9.5\]'"):
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
def test_images_of_other_kinds_are_a_second_part_of_the_test(labelled, streaming):
    options = {"keep": {"style": ["photo"]}, "labels": LabelColumns({"style": "style"})}
    sketches = {"style": ["sketch"]}
    made = module(labelled, streaming=streaming, held_out=HeldOut(0, 2, 5, sketches), **options)
    test, transfer = made.test_dataloader()
    assert sum(len(batch.names) for batch in test) == 2
    assert sum(len(batch.names) for batch in transfer) == 5
    assert all((batch.labels["style"] == 1).all() for batch in transfer)
    assert all(number % 2 == 0 for number in [*numbers(test), *numbers(in_order(made))])
    assert (
        len(module(labelled, streaming=streaming, held_out=HeldOut(0, 2, 0, sketches), **options).test_dataloader())
        == 1
    )


def test_images_of_other_kinds_are_never_learned_from(labelled):
    made = module(labelled, held_out=HeldOut(0, 2, 4))
    parts = [numbers(part) for part in (*made.test_dataloader(), in_order(made))]
    assert sorted(chain.from_iterable(parts)) == list(range(COUNT))
    with pytest.raises(UserError, match=r" 6 .*data.held_out.transfer 7"):
        module(labelled, held_out=HeldOut(0, 0, 7, {"style": ["sketch"]}))
    with pytest.raises(UserError, match=r"data.held_out.transfer_keep.*'style'.*'oil'.*photo, sketch"):
        module(labelled, held_out=HeldOut(0, 0, 1, {"style": ["oil"]}))


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
def test_held_out_images_are_never_trained_on(folder, streaming):
    options = {"streaming": streaming, "held_out": HeldOut(3, 4), "eval_batch_size": 2}
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
    (folder / "words.jpg").write_text("not an image")
    Image.new("RGB", (3, 90)).save(folder / "tiny.png")


def test_broken_images_are_skipped_and_nothing_else(folder, monkeypatch):
    spoil(folder)
    with pytest.warns(UserWarning, match=r"skipped 3 .*'(cut|words|tiny)\.") as seen:
        made = module(folder, num_workers=2)
    assert len([one for one in seen if str(one.message).startswith("skipped")]) == 1
    assert sorted(numbers(in_order(made))) == list(range(COUNT))

    def not_again(*arguments):
        raise AssertionError("checked twice")

    monkeypatch.setattr("tokenlearn.data.broken_images.read_image", not_again)
    with pytest.warns(UserWarning, match="skipped 3"):
        module(folder)


def test_broken_images_of_a_stream_are_skipped_on_all_ranks_alike(folder):
    spoil(folder)
    options = {"streaming": True, "batches_per_epoch": 4}
    with pytest.warns(UserWarning, match=r"skipped [3-6] "):
        one = list(module(folder, **options).train_dataloader())
    assert sorted(set(numbers(one))) == list(range(COUNT))
    with pytest.warns(UserWarning, match="skipped"):
        first = list(module(folder, 0, 2, batch_size=2, **options).train_dataloader())
    second = list(module(folder, 1, 2, batch_size=2, **options).train_dataloader())
    assert [batch.names for batch in one] == [a.names + b.names for a, b in zip(first, second, strict=True)]
    with pytest.warns(UserWarning, match="skipped 3 "):
        assert sorted(numbers(in_order(module(folder, streaming=True)))) == list(range(COUNT))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["cut.png", "words.jpg", "tiny.png"])
def test_a_broken_image_is_an_error_if_wanted(folder, tmp_path, streaming, name):
    spoil(folder)
    for other in {"cut.png", "words.jpg", "tiny.png"} - {name}:
        (folder / other).unlink()
    made = module(folder, streaming=streaming, images=ImageReading(broken="error"))
    with pytest.raises(UserError, match=rf"'{name}' .*data.images.broken to skip") as raised:
        list(in_order(made))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_every_kind(labelled, streaming):
    made = module(
        labelled,
        streaming=streaming,
        labels=LabelColumns(
            {"smile": "smile", "hair": "hair", "style": "style", "flipped": "style", "age": "age"},
            {"hair": ["brown", "black", "red"], "flipped": ["sketch", "photo"]},
            list_column="shown",
            list_attributes=["odd", "late"],
        ),
    )
    assert made.class_names["hair"] == ("brown", "black", "red")
    assert made.class_names["style"] == ("photo", "sketch")
    batches = list(in_order(made))
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
    assert module(labelled, labels=LabelColumns({"hair": "hair"})).class_names == {"hair": ("black", "brown", "red")}


@pytest.mark.parametrize("streaming", [False, True])
def test_keep(labelled, streaming):
    made = module(labelled, streaming=streaming, keep={"style": ["sketch"], "hair": ["red", "brown"]})
    expected = [row for row in range(COUNT) if row % 2 and row % 3 != 1 and row != 4]
    assert numbers(in_order(made)) == expected
    assert set(numbers(epochs(made.train_dataloader(), 2))) == set(expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_portraits_know_their_attributes(streaming):
    options = {"images": ImageReading(size=64), "labels": LabelColumns({"style": "style"})}
    made = module("portraits:6:3", streaming=streaming, eval_batch_size=6, **options)
    batches = list(in_order(made))
    images = torch.cat([batch.images for batch in batches])
    for index in range(6):
        scene, expected, _ = portrait(3, index)
        assert np.array_equal((images[index] * 255).round().byte().permute(1, 2, 0), np.asarray(expected))
        assert [int(batches[0].labels[name][index]) for name in ATTRIBUTES] == [scene.has(name) for name in ATTRIBUTES]


def test_scenes_of_portraits_are_known_by_name():
    made = ImageDataModule("portraits:6:3")
    scenes = made.scenes(["00000004", "00000001"])
    assert scenes == [portrait(3, 4)[0], portrait(3, 1)[0]]
    assert not ImageDataModule("folder").scenes(["00000004"])
    (persona,) = ImageDataModule("portraits:6:3:personas").scenes(["00000002"])
    assert persona.persona == list(PERSONAS)[2]


def test_flips_are_half_of_all_and_always_the_same_ones(tmp_path):
    half = Image.new("RGB", (16, 16))
    half.paste("white", (0, 0, 8, 16))
    for index in range(20):
        half.save(tmp_path / f"{index}.png")
    options = {"images": ImageReading(flips=True), "batch_size": 20}

    def images(batches):
        return torch.cat([batch.images for batch in batches])

    taken = images(epochs(module(tmp_path, **options).train_dataloader(), 5))
    flipped = taken[:, 0, 0, 0] == 0
    assert 30 < int(flipped.sum()) < 70
    assert torch.equal(taken[flipped].flip(3), taken[~flipped][:1].expand_as(taken[flipped]))
    assert torch.equal(images(epochs(module(tmp_path, num_workers=2, **options).train_dataloader(), 5)), taken)
    assert (images(in_order(module(tmp_path, **options)))[:, 0, 0, 0] == 1).all()


def test_a_batch_moves_to_the_device():
    batch = ImageBatch(torch.zeros(2, 3, 4, 4), None, {"smile": torch.zeros(2, dtype=torch.int64)}, ["a", "b"])
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, ImageBatch)
    assert moved.images.device.type == moved.labels["smile"].device.type == "meta"
    assert (moved.latents, moved.names) == (None, ["a", "b"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:skipped")
def test_cached_latents_equal_those_encoded_on_the_fly(folder, tmp_path, streaming):
    spoil(folder)
    task = ImageTask()
    options = {"streaming": streaming, "task": task, "held_out": HeldOut(2, 1)}
    cached = {"cache": LatentCaching(str(tmp_path / "latents"), shard_size=6)}
    made = module(folder, **options, **cached)
    from_cache = epochs(made.train_dataloader(), 3)
    on_the_fly = epochs(module(folder, **options).train_dataloader(), 3)
    for latent_batch, image_batch in zip(from_cache, on_the_fly, strict=True):
        assert latent_batch.images is None
        assert latent_batch.names == image_batch.names
        assert torch.equal(latent_batch.latents, task.encode_images(image_batch.images))
    assert all(batch.latents is None for batch in made.val_dataloader())

    (made_folder,) = (tmp_path / "latents").iterdir()
    times = {path: path.stat().st_mtime_ns for path in made_folder.iterdir()}
    next(iter(module(folder, **options, **cached).train_dataloader()))
    assert {path: path.stat().st_mtime_ns for path in made_folder.iterdir()} == times


@pytest.mark.parametrize(
    "change", ["size", "min_size", "images", "weights", "split", "keep", "transfer", "dtype", "precision"]
)
def test_a_cache_of_anything_else_is_not_read(labelled, tmp_path, change):
    folder = str(tmp_path / "latents")
    options = {
        "size": {"images": ImageReading(size=8)},
        "min_size": {"images": ImageReading(min_size=4)},
        "weights": {"task": ImageTask(weights=0.5)},
        "split": {"held_out": HeldOut(1, 0)},
        "keep": {"keep": {"style": ["photo"]}},
        "transfer": {"held_out": HeldOut(0, 0, 2)},
        "dtype": {"cache": LatentCaching(folder, dtype="float16")},
        "precision": {"precision": "bf16-mixed"},
    }.get(change, {})
    same = {"cache": LatentCaching(folder)}
    module(labelled, **same).train_dataloader()
    module(labelled, **same).train_dataloader()
    if change == "images":
        data = datasets.load_from_disk(str(labelled)).select(range(COUNT - 1))
        data.save_to_disk(tmp_path / "other")
        labelled = tmp_path / "other"
    module(labelled, **(same | options)).train_dataloader()
    assert len(list((tmp_path / "latents").iterdir())) == 2


class Recorder(L.LightningModule, ImageTask):
    """Notes what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
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
            held_out=HeldOut(0, 0),
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


def test_ten_thousand_streamed_images_take_no_more_memory_than_a_few(tmp_path):
    def encoded(seed):
        file = io.BytesIO()
        noise = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, format="PNG", compress_level=0)
        return {"bytes": file.getvalue(), "path": None}

    images = [encoded(seed) for seed in range(20)]
    table = pyarrow.table({"image": images * 500})
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


HAIR = {"hair": "hair"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"source": "no/such/folder"}, "'no/such/folder'"),
        (lambda: {"source": "portraits:many"}, "'portraits:many'"),
        (lambda: {"source": "portraits:5:many"}, "'portraits:5:many'"),
        (lambda: {"source": "portraits:0"}, "'portraits:0'"),
        (lambda: {"source": "portraits:5:1:people"}, "'portraits:5:1:people'.*portraits:2000:1:personas"),
        (lambda: {"split": "test"}, "data.split .*'test'"),
        (lambda: {"images": ImageReading(column="photo")}, r"'photo'.*data.images.column .*image"),
        (lambda: {"images": ImageReading(column="age")}, "'age'.*data.images.column"),
        (lambda: {"labels": LabelColumns({"smile": "Smiling"})}, r"data.labels.columns .*'Smiling'.*smile"),
        (lambda: {"labels": LabelColumns({}, {"hair": ["red"]})}, "data.labels.classes .*'hair'.*data.labels.columns"),
        (lambda: {"labels": LabelColumns(HAIR), "streaming": True}, "'hair'.*data.labels.classes"),
        (lambda: {"labels": LabelColumns(list_column="shown", list_attributes=["odd"])}, " 2 .*list_attributes 1"),
        (lambda: {"labels": LabelColumns(list_column="shown")}, "list_column is shown.*list_attributes"),
        (lambda: {"keep": {"color": ["red"]}}, "data.keep .*'color'"),
        (lambda: {"keep": {"style": ["oil"]}}, "data.keep.*'style'.*'oil'.* photo, sketch"),
        (lambda: {"keep": {"hair": ["green"]}}, " 0 usable"),
        (lambda: {"images": ImageReading(size=15)}, "data.images.size 15 .* 2 .* 16"),
        (lambda: {"images": ImageReading(size=0)}, "data.images.size .* 1, got 0"),
        (lambda: {"images": ImageReading(min_size=500)}, "none of the 13 images"),
        (lambda: {"batch_size": 0}, "data.batch_size .* 1, got 0"),
        (lambda: {"num_workers": -1}, "data.num_workers .* 0, got -1"),
        (lambda: {"held_out": HeldOut(0, COUNT)}, f" {COUNT} usable"),
        (lambda: {"held_out": HeldOut(validation=-1)}, "data.held_out.validation .* 0, got -1"),
        (lambda: {"streaming": True, "batches_per_epoch": None}, "data.batches_per_epoch"),
        (
            lambda: {"images": ImageReading(flips=True), "cache": LatentCaching("x")},
            "data.images.flips .*data.cache",
        ),
        (lambda: {"cache": LatentCaching("x", shard_size=0)}, "data.cache.shard_size .* 1, got 0"),
        (lambda: {"task": ClassTask({})}, "ClassTask.*data.class_path"),
    ],
)
@pytest.mark.filterwarnings("ignore:skipped")
def test_bad_settings_are_named(labelled, options, message):
    with pytest.raises(UserError, match=message) as raised:
        module(**({"source": labelled} | options()))
    assert "\n" not in str(raised.value)


def test_a_label_that_is_no_class_is_named(labelled):
    for labels, message in (
        (LabelColumns(HAIR, {"hair": ["red", "black"]}), "'brown' in column"),
        (LabelColumns({"age": "age"}, {"age": ["young", "old"]}), "'2' in column 'age'"),
        (LabelColumns({"all": "shown"}), r"'\[False, False\]' in column 'shown'"),
    ):
        with pytest.raises(UserError, match=message):
            list(in_order(module(labelled, labels=labels)))


@pytest.mark.parametrize("name", [None, "notes.txt"])
def test_a_folder_without_images_is_named(tmp_path, name):
    target = tmp_path / "empty"
    target.mkdir()
    if name:
        (target / name).write_text("no image")
    with pytest.raises(UserError, match=str(target)):
        module(target)


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_folder_of_broken_images_is_an_error(tmp_path):
    (tmp_path / "faces").mkdir()
    spoil(tmp_path / "faces")
    with pytest.raises(UserError, match=r"none of the 3 images in .* can be used"):
        module(tmp_path / "faces")


def test_data_module_needs_its_trainer():
    with pytest.raises(RuntimeError, match="Trainer"):
        ImageDataModule("portraits:4").setup()


def test_a_revision_of_a_hub_data_set(monkeypatch):
    asked = []

    def builder(source, revision=None):
        asked.append((source, revision))
        raise FileNotFoundError("nothing is downloaded here")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    for source in ("owner/name", "owner/name@v2"):
        with pytest.raises(UserError, match=source):
            module(source)
    assert asked == [("owner/name", None), ("owner/name", "v2")]
