"""Malformed model folders and images: one short line each, and one bad image does not stop the others."""

import io
import json
import re
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.command_line import error_of
from tests.edges.model_folders import WEIGHTS, copied
from tests.tiny import tiny_classifier
from tests.tiny_clip import tiny_aesthetic_head, tiny_clip
from tokenlearn.data.images_to_edit import FolderImages
from tokenlearn.data.pixels import read_image
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion
from tokenlearn.models.aesthetic import AestheticHead
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.models.clip import ClipModel
from tokenlearn.pipeline import Pipeline
from tokenlearn.tokens import save_embedding

BROKEN_JSON = {
    "empty": b"",
    "cut": b'{"_class_name": "UNet',
    "null": b"null",
    "a list": b"[1, 2]",
    "a number": b"7",
    "text": b'"text"',
    "bytes": b"\xff\xfe\x00\x01",
    "an empty object": b"{}",
}
BROKEN_WEIGHTS = {"empty": b"", "text": b"oid sha256:0", "header": struct.pack("<Q", 2**40) + b"{}"}


def line_of(load, folder):
    """Why loading does not end in one short line, None if it does."""
    started = time.process_time()
    try:
        load(str(folder))
    except UserError as error:
        if "\n" in str(error) or len(str(error)) >= 700:
            return f"a line of {len(str(error))}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    else:
        return "loaded"
    return "too slow" if time.process_time() - started > 10 else None


def sweep(load, whole, files):
    """Failures and number of tries, of a folder each of whose files is broken in turn."""
    failures, tried = {}, 0
    for file in files:
        good = (whole / file).read_bytes()
        kinds = BROKEN_JSON if file.endswith(".json") else BROKEN_WEIGHTS
        if file.endswith(".safetensors"):
            kinds = kinds | {f"cut at {size}": good[:size] for size in (7, 100, len(good) // 2, len(good) - 1)}
        for kind, content in kinds.items():
            (whole / file).write_bytes(content)
            tried += 1
            if (found := line_of(load, whole)) is not None:
                failures[f"{file}, {kind}"] = found
        (whole / file).write_bytes(good)
    load(str(whole))
    return failures, tried


def test_every_malformed_pipeline_is_one_line(tiny_models, tmp_path, count_sweep):
    whole = copied(tiny_models / "pipeline", tmp_path / "pipeline")
    files = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"]
    failures, tried = sweep(StableDiffusion, whole, [*files, "scheduler/scheduler_config.json", *WEIGHTS.values()])
    index = (whole / "model_index.json").read_text()
    for kind, content in BROKEN_JSON.items():
        (whole / "model_index.json").write_bytes(content)
        tried += 1
        if (found := line_of(Pipeline.from_pretrained, whole)) is not None:
            failures[f"model_index.json of any family, {kind}"] = found
    (whole / "model_index.json").write_text(index)
    count_sweep("folders of pipelines", tried, failures)
    assert not failures
    assert tried >= 60


WRONG_VALUES = {
    "unet/config.json": {
        "block_out_channels": ["4", None, [], [4], {}],
        "sample_size": ["8", None, {}],
        "down_block_types": ["DownBlock2D", ["NoBlock"], None],
        "norm_num_groups": [3, "2", {}],
        "cross_attention_dim": [None, "x", -1],
        "layers_per_block": [7, "1", None],
    },
    "vae/config.json": {
        "block_out_channels": ["4", None, [], [4]],
        "latent_channels": [5, "4", None],
        "scaling_factor": ["x", None, 0, [1], float("nan"), float("inf")],
        "shift_factor": ["x", float("nan")],
    },
    "text_encoder/config.json": {
        "hidden_size": [17, "16", None, 0],
        "num_hidden_layers": [9, "2", None],
        "max_position_embeddings": [5, None, "77"],
        "vocab_size": [3, None],
    },
    "scheduler/scheduler_config.json": {
        "beta_start": ["x", None, float("nan")],
        "beta_schedule": ["nonsense", None, 3],
        "num_train_timesteps": [0, -1, "x", None],
        "prediction_type": ["nonsense", None, 3],
    },
    "tokenizer/tokenizer_config.json": {"model_max_length": ["x", 0, -5]},
}
"""Values in the files of a pipeline that are of another type, or no model has."""


def test_every_wrong_value_in_a_pipeline_is_one_line(tiny_models, tmp_path, count_sweep):
    whole = copied(tiny_models / "pipeline", tmp_path / "pipeline")
    failures, tried = {}, 0
    for file, settings in WRONG_VALUES.items():
        good = (whole / file).read_text()
        for name, values in settings.items():
            for value in values:
                (whole / file).write_text(json.dumps(json.loads(good) | {name: value}))
                tried += 1
                if (found := line_of(StableDiffusion, whole)) is not None:
                    failures[f"{file}: {name} of {value!r}"] = found
        (whole / file).write_text(good)
    count_sweep("pipelines with a wrong value", tried, failures)
    assert not failures
    assert tried >= 50


def test_every_malformed_classifier_and_clip_is_one_line(tmp_path, count_sweep):
    tried, failures = 0, {}
    classifier = tiny_classifier(tmp_path / "classifier", ["hat", "beard"])
    clip = tiny_clip(tmp_path / "clip")
    head = tiny_aesthetic_head(tmp_path / "head", str(clip))
    for load, folder, files in (
        (TimmClassifier, classifier, ["config.json", "model.safetensors"]),
        (ClipModel, clip, ["config.json", "preprocessor_config.json", "model.safetensors", "vocab.json"]),
        (AestheticHead, head, ["config.json", "model.safetensors"]),
    ):
        found, count = sweep(load, folder, [file for file in files if (folder / file).is_file()])
        failures |= found
        tried += count
    failures.pop("preprocessor_config.json, an empty object", None)  # it has defaults for everything
    count_sweep("folders of classifiers and CLIPs", tried, failures)
    assert not failures
    assert tried >= 25


def png(width, height, data=b""):
    """A PNG of a size, whatever its data are."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


FORMATS = {
    ".jpeg": "JPEG",
    ".gif": "GIF",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".ppm": "PPM",
    ".ico": "ICO",
    ".jp2": "JPEG2000",
    ".dds": "DDS",
    ".apng": "PNG",
}


def bad_images(folder):
    """Write images that cannot be edited; gives their names."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "whole.png").unlink()
    contents = {
        "empty.png": b"",
        "empty.jpg": b"",
        "words.jpg": b"not an image",
        "html.png": b"<!DOCTYPE html>",
        "pointer.webp": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "zip.tiff": b"PK\x03\x04" + bytes(30),
        "cut.png": whole[: len(whole) // 2],
        "header.png": whole[:20],
        "giant.png": png(60_000, 60_000),
        "wide.png": png(2**31 - 1, 1),
        "no-data.png": png(64, 64),
        "nothing.png": png(0, 0),
    }
    contents |= {f"cut-{size}.png": whole[:size] for size in (1, 8, 30, 100, 1000)}
    for suffix, form in FORMATS.items():
        file = io.BytesIO()
        Image.fromarray(noise).save(file, form, lossless=True)
        whole = file.getvalue()
        for part in (0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.95):
            contents[f"part-{part:g}{suffix}"] = whole[: int(part * len(whole))]
        contents[f"words{suffix}"] = b"words " * 50
        contents[f"zeros{suffix}"] = bytes(5000)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (3000, 10)).save(folder / "thin.png")
    Image.new("RGB", (1, 300)).save(folder / "tall.png")
    Image.fromarray(np.full((9, 9), 99.0, dtype=np.float32)).save(folder / "float.tiff")
    return [*contents, "thin.png", "tall.png", "float.tiff"]


def test_every_bad_image_is_one_line(tmp_path, count_sweep):
    names = bad_images(tmp_path)
    images = FolderImages(str(tmp_path), 16, 4)
    assert len(images.names) == len(names)
    failures = {}
    for index, name in enumerate(images.names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = line_of(lambda _, index=index: images[index], "")
        if found is not None:
            failures[name] = found
        try:
            read_image({"bytes": images.path(index).read_bytes(), "path": None}, min_size=2)
        except Exception as error:  # decoders raise errors of many kinds, which the caller names the image with
            if re.search(r"0x[0-9a-f]{6}", str(error)):
                failures[name] = f"an address in {error}"
        else:
            if name not in ("thin", "tall"):  # which are cropped to a square
                failures[name] = "read for training"
    count_sweep("images", len(names), failures)
    assert not failures
    assert len(names) >= 100


def test_formats_without_pixels_are_no_images(tmp_path):
    for name in ("film.mpg", "data.h5", "drawing.eps", "weather.grib"):
        (tmp_path / name).write_bytes(b"\x00\x00\x01\xb3")
    with pytest.raises(UserError, match="has no images"):
        FolderImages(str(tmp_path), 16, 4)


@pytest.fixture
def edit(tiny_models, tmp_path):
    """Command line of an edit of the images in ``photos``."""
    (tmp_path / "photos").mkdir()
    token = save_embedding(tmp_path / "smile.safetensors", "<smile>", [torch.full((1, 16), 0.1)], {})
    config = {
        "model": {
            "class_path": "Edit",
            "init_args": {
                "backbone": {
                    "class_path": "StableDiffusion",
                    "init_args": {"pretrained": str(tiny_models / "pipeline")},
                },
                "images": str(tmp_path / "photos"),
                "embeddings": [str(token)],
                "edits": [{"<smile>": 1.0}],
                "editing": {"steps": 2, "timestep": 1},
            },
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "edit.yaml").write_text(yaml.safe_dump(config))
    return ["predict", "--config", str(tmp_path / "edit.yaml")]


def test_a_bad_image_does_not_stop_the_edits_of_the_others(edit, tmp_path, capsys):
    for index in (0, 2):
        Image.new("RGB", (20, 16), (90, 100, 60 * index)).save(tmp_path / "photos" / f"{index}.png")
    names = bad_images(tmp_path / "photos")
    with pytest.warns(UserWarning, match=rf"skipped {len(names)} images that cannot be used, such as 'cut-1'"):
        main(edit)
    written = sorted(path.name for path in (tmp_path / "run" / "images").rglob("*.png"))
    assert written == ["0.png", "2.png"]
    assert (tmp_path / "run" / "before_after.png").is_file()


def test_a_folder_of_bad_images_alone_is_an_error(edit, tmp_path, capsys):
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "photos" / "b.png").write_text("words")
    assert "none of 2 images can be used, such as 'a'" in error_of(edit, capsys)


def test_index_of_shards_that_is_no_index(tiny_models, tmp_path):
    folder = copied(tiny_models / "pipeline", tmp_path / "copy")
    (folder / WEIGHTS["unet"]).unlink()
    for content in ("", "[]", json.dumps({"weight_map": [1]}), json.dumps({"weight_map": {"a": 3}})):
        (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(content)
        assert line_of(StableDiffusion, folder) is None
