"""The command ``tokenlearn classifier``: a guide and a judge from labelled images."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.classification import MulticlassConfusionMatrix

from tokenlearn.classifier_training import TrainingSettings, train_classifier
from tokenlearn.data.image_arrays import ImageArrays, Parts, read_arrays, split_parts
from tokenlearn.data.image_source import open_images
from tokenlearn.data.latent_cache import json_hash
from tokenlearn.data.pixels import unit_range
from tokenlearn.errors import UserError, check_at_least
from tokenlearn.files import atomic_write, check_writable, refuse_remote
from tokenlearn.metrics.class_accuracy import wilson_interval
from tokenlearn.models.classifier import TimmClassifier, save_classifier
from tokenlearn.notices import notice, warn_once
from tokenlearn.quiet import quiet
from tokenlearn.stopping import Stopped

GUIDE, JUDGE = ROLES = ("guide", "judge")
_WORK = "work"
_SUMMARY = "summary.json"
_FEWEST = 10
"""Images of a class: with fewer, neither training has a handful, or the accuracy no image to be measured on."""

_BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy of a classifier.

    Attributes:
        correct: (K,) correctly classified images of each class.
        images: (K,) images of each class.
    """

    correct: NDArray[np.int64]
    images: NDArray[np.int64]

    @property
    def share(self) -> float:
        """Share of all images."""
        return float(self.correct.sum() / self.images.sum())

    @property
    def mean_of_classes(self) -> float:
        """Mean of the classes' shares, in which rare classes count as much as common ones."""
        return float((self.correct / self.images).mean())

    def interval(self) -> tuple[float, float]:
        """95 % interval of :attr:`share`."""
        return wilson_interval(int(self.correct.sum()), int(self.images.sum()))


def classifier(
    images: str,
    *,
    output_dir: str = "classifiers",
    label_column: str = "label",
    split: str = "train",
    guide: str = "resnet10t",
    judge: str = "regnetx_002",
    pretrained: bool = False,
    size: int = 64,
    steps: int = 400,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    flips: bool = True,
    test_share: float = 0.2,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a guide and a judge from labelled images: two classifiers that share neither images nor architecture.

    A share of the images of each class is held out to measure both, and chooses nothing: there is no early stopping
    and no best checkpoint. Each classifier learns from half of the others. A command that was stopped goes on when it
    is given again.

    Args:
        images: folder with a sub-folder of images for each class; a CSV file with the columns path and label; or any
            other data that data.source of a config takes.
        output_dir: folder of the results: ``guide`` and ``judge``, which every setting of a classifier takes,
            ``summary.json``, ``table.csv`` and ``splits.csv``.
        label_column: column of the classes.
        split: split of the data.
        guide: timm architecture of the guide.
        judge: timm architecture of the judge, another one.
        pretrained: start from timm's weights, which are downloaded, instead of random ones.
        size: height and width of the classifiers' inputs in pixels.
        steps: optimizer steps of each training.
        batch_size: images per step.
        learning_rate: peak learning rate; with pretrained weights, a tenth of the default is usual.
        flips: mirror images at random; false where left and right matter.
        test_share: share of the images of each class that is held out.
        seed: of the split and the guide's training; that of the judge's is one more.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: if the images cannot be used, a setting is out of range, or the folder has other classifiers.
    """
    start = time.monotonic()
    check_at_least("classifier", 8, size=size)
    if not 0 < test_share <= 0.5:
        raise UserError(f"test_share must be above 0 and at most 0.5, got {test_share}")
    if guide.partition(".")[0] == judge.partition(".")[0]:
        raise UserError(
            f"guide and judge are both {guide}, and must be of different architectures; name another judge"
        )
    common: dict[str, Any] = {
        "pretrained": pretrained,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "flips": flips,
    }
    trainings = {
        role: TrainingSettings(architecture=name, seed=seed + offset, **common)
        for offset, (role, name) in enumerate(((GUIDE, guide), (JUDGE, judge)))
    }
    refuse_remote(output_dir)
    folder = Path(output_dir).expanduser()
    check_writable(folder)
    found = open_images(images, split=split)
    reading = [found.fingerprint, label_column, size]
    settings = json_hash([reading, test_share, seed, common, guide, judge])
    if (finished := _finished(folder, settings)) is not None:
        notice(f"'{folder}' has these classifiers already")
        print("\n".join(_lines(finished)))
        return finished
    _claim(folder / _WORK, settings)
    try:
        arrays = read_arrays(
            found, source=images, column=label_column, size=size, folder=folder / _WORK, key=json_hash(reading)
        )
        arrays = _usable(arrays, images)
        parts = split_parts(arrays.labels, test_share=test_share, seed=seed)
        accuracies = {}
        for role in ROLES:
            rows = parts.guide if role == GUIDE else parts.judge
            _train(arrays, rows, trainings[role], folder=folder, role=role)
            accuracies[role] = measure(TimmClassifier(str(folder / role)), arrays, parts.test)
    except Stopped as stopped:
        message = "the classifiers are not finished; the same command goes on"
        raise Stopped(stopped.received, message) from None
    summary: dict[str, Any] = {"settings": settings, "classes": arrays.class_names}
    for role in ROLES:
        _write_card(folder / role, role, trainings[role], accuracies[role])
        summary |= _figures(role, folder / role, accuracies[role], len(getattr(parts, role)))
    summary |= {"test_images": len(parts.test), "minutes": round((time.monotonic() - start) / 60, 2)}
    _write_table(folder / "table.csv", arrays, parts, accuracies)
    _write_splits(folder / "splits.csv", arrays, parts)
    with atomic_write(folder / _SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(folder / _WORK, ignore_errors=True)
    print("\n".join([*_table_lines(arrays, parts, accuracies), "", *_lines(summary)]))
    return summary


@torch.no_grad()
def measure(model: TimmClassifier, arrays: ImageArrays, rows: NDArray[np.int64]) -> Accuracy:
    """Accuracy of a classifier, as others load it, on images.

    Args:
        model: the classifier.
        arrays: labelled images.
        rows: (n,) rows to classify.
    """
    confusion = MulticlassConfusionMatrix(num_classes=len(arrays.class_names))
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        images = unit_range([torch.from_numpy(np.array(arrays.pixels[row])) for row in part])
        confusion.update(model(images), torch.from_numpy(arrays.labels[part]))
    counts = confusion.compute().numpy()
    return Accuracy(counts.diagonal(), counts.sum(axis=1))


def _usable(arrays: ImageArrays, source: str) -> ImageArrays:
    """The images, refused if there is one class only or a class has too few; classes without any are left out."""
    counts = arrays.counts()
    present = [index for index, count in enumerate(counts) if count]
    names = [arrays.class_names[index] for index in present]
    if len(present) < 2:
        raise UserError(
            f"all images of '{source}' are of one class, '{names[0]}', and a classifier needs two; put images of "
            "anything else into a second folder, such as 'other'"
        )
    few = [f"'{arrays.class_names[index]}' ({counts[index]})" for index in present if counts[index] < _FEWEST]
    if few:
        raise UserError(
            f"{len(few)} of {len(present)} classes of '{source}' have fewer than {_FEWEST} usable images: "
            f"{', '.join(few[:6])}; add images, or remove these classes"
        )
    if len(present) == len(counts):
        return arrays
    warn_once(f"left out of the classes of '{source}': {len(counts) - len(present)} without images")
    places = {index: place for place, index in enumerate(present)}
    labels = np.asarray([places[label] for label in arrays.labels.tolist()], np.int64)
    return ImageArrays(arrays.pixels, labels, arrays.names, names)


def _train(
    arrays: ImageArrays, rows: NDArray[np.int64], settings: TrainingSettings, *, folder: Path, role: str
) -> None:
    """Train a classifier into its folder, which is there as a whole or not at all."""
    if (folder / role).is_dir():
        return  # of this command, which was stopped later
    work = folder / _WORK
    caption = f"Training {role} ({settings.architecture})"
    with quiet():
        trained = train_classifier(arrays, rows, settings, folder=work / role, caption=caption)
    new = work / f"{role}-new"
    shutil.rmtree(new, ignore_errors=True)
    save_classifier(
        trained.model, new, arrays.class_names, data_config=trained.data_config, model_args=trained.model_args
    )
    os.replace(new, folder / role)


def _claim(work: Path, settings: str) -> None:
    """Take the folder for a command with these settings.

    Raises:
        UserError: if it has classifiers of a command with other settings, finished or not.
    """
    file, folder = work / "settings", work.parent
    try:
        if file.read_text() == settings:
            return
    except (OSError, ValueError):
        pass
    taken = [name for name in (*ROLES, _WORK) if (folder / name).exists()]
    if taken:
        raise UserError(
            f"output_dir '{folder}' has the {taken[0]} of other images or settings; give another --output_dir, or "
            "remove the folder"
        )
    with atomic_write(file) as temporary:
        temporary.write_text(settings)


def _finished(folder: Path, settings: str) -> dict[str, Any] | None:
    """The summary of a finished command with these settings; None if there is none."""
    try:
        summary = json.loads((folder / _SUMMARY).read_text())
    except (OSError, ValueError):
        return None
    is_same = isinstance(summary, dict) and summary.get("settings") == settings
    return summary if is_same and all((folder / role).is_dir() for role in ROLES) else None


def _figures(role: str, folder: Path, accuracy: Accuracy, images: int) -> dict[str, Any]:
    low, high = accuracy.interval()
    return {
        role: str(folder),
        f"{role}_accuracy": accuracy.share,
        f"{role}_accuracy_low": low,
        f"{role}_accuracy_high": high,
        f"{role}_mean_class_accuracy": accuracy.mean_of_classes,
        f"{role}_images": images,
    }


def _lines(summary: dict[str, Any]) -> list[str]:
    """Held-out figures of both classifiers, and the command that comes next."""
    lines = [
        f"{role:<6} {summary[role]}: {summary[f'{role}_accuracy']:.1%} of {summary['test_images']} held-out images "
        f"[{summary[f'{role}_accuracy_low']:.0%}, {summary[f'{role}_accuracy_high']:.0%}], mean of classes "
        f"{summary[f'{role}_mean_class_accuracy']:.1%}"
        for role in ROLES
    ]
    return [
        *lines,
        "tokens of the classes: tokenlearn fit --config backbones/sd15 --config own/class_token "
        f"--model.objective.classifier {summary[GUIDE]} --model.judge.classifier {summary[JUDGE]}",
    ]


def _table_lines(arrays: ImageArrays, parts: Parts, accuracies: dict[str, Accuracy]) -> list[str]:
    """A line for each class: images of the parts, and accuracies."""
    rows = [["class", "guide images", "judge images", "held out", *ROLES]]
    for index, name in enumerate(arrays.class_names):
        shares = [f"{accuracies[role].correct[index] / accuracies[role].images[index]:.1%}" for role in ROLES]
        rows.append([name, *(str(count) for count in _counts(arrays, parts, index)), *shares])
    widths = [max(map(len, entries)) for entries in zip(*rows, strict=True)]
    return ["  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _counts(arrays: ImageArrays, parts: Parts, index: int) -> list[int]:
    """Images of a class in each part."""
    return [int((arrays.labels[rows] == index).sum()) for rows in parts]


def _write_table(path: Path, arrays: ImageArrays, parts: Parts, accuracies: dict[str, Accuracy]) -> None:
    rows: list[Sequence[object]] = [
        ["class", *(f"{part}_images" for part in Parts._fields)]
        + [f"{role}{suffix}" for role in ROLES for suffix in ("", "_low", "_high")]
    ]
    for index, name in enumerate(arrays.class_names):
        entries: list[object] = [name, *_counts(arrays, parts, index)]
        for role in ROLES:
            correct, images = int(accuracies[role].correct[index]), int(accuracies[role].images[index])
            entries += [f"{share:.4f}" for share in (correct / images, *wilson_interval(correct, images))]
        rows.append(entries)
    _write_csv(path, rows)


def _write_splits(path: Path, arrays: ImageArrays, parts: Parts) -> None:
    """Which image is in which part."""
    of_part = {int(row): part for part, rows in zip(Parts._fields, parts, strict=True) for row in rows}
    rows = [[name, arrays.class_names[arrays.labels[row]], of_part[row]] for row, name in enumerate(arrays.names)]
    _write_csv(path, [["image", "label", "part"], *rows])


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _write_card(folder: Path, role: str, settings: TrainingSettings, accuracy: Accuracy) -> None:
    """A page about a classifier, beside its files."""
    low, high = accuracy.interval()
    only = " It only reports and must never be optimised against." if role == JUDGE else ""
    begins = "timm's weights" if settings.pretrained else "random weights"
    text = (
        f"# {role.capitalize()}\n\n"
        f"{settings.architecture}, trained from {begins} for {settings.steps} steps of {settings.batch_size} images "
        f"by `tokenlearn classifier`.{only}\n\n"
        f"{accuracy.share:.1%} of {accuracy.images.sum()} held-out images are classified correctly (95 % interval "
        f"{low:.1%} to {high:.1%}); the mean of the classes' accuracies is {accuracy.mean_of_classes:.1%}.\n"
    )
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(text)
