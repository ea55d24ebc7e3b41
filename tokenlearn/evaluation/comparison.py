"""The command ``tokenlearn compare``: ways to draw classes, judged on the same seeds, with their cost."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenlearn.callbacks.images import save_image, sheet
from tokenlearn.data.latent_cache import json_hash
from tokenlearn.data.pixels import rgb_pixels, unit_range
from tokenlearn.data.prompts import TEST_SEEDS
from tokenlearn.errors import UserError, check_at_least, check_seeds
from tokenlearn.evaluation.compared_methods import METHODS, ComparedMethods, Method, MethodSettings
from tokenlearn.evaluation.network_cost import NetworkCost
from tokenlearn.evaluation.records import Record
from tokenlearn.evaluation.table import Cell, Column, Row, Table
from tokenlearn.files import atomic_write, check_writable, refuse_remote
from tokenlearn.generation.results import file_stem
from tokenlearn.latent_optimiser import sampling_for
from tokenlearn.metrics import bootstrap_interval, pairwise_distance, timed, wilson_interval
from tokenlearn.models import TimmClassifier
from tokenlearn.models.frozen import Precision
from tokenlearn.objectives import ClassifierLoss, require_judge_differs
from tokenlearn.pipeline import Pipeline, Sampling, finished, to_images
from tokenlearn.progress import Meter
from tokenlearn.quiet import quiet
from tokenlearn.stopping import Stopped
from tokenlearn.tokens import Embeddings

ACCURACY, EVALUATIONS, COST, SECONDS = "accuracy", "evaluations", "cost", "seconds"
_COSTS = (EVALUATIONS, COST, SECONDS)
_SHEET_COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """Images of one class by one method, made together.

    Attributes:
        method: the method.
        class_index: place of the class.
        name: class.
        templates: B prompts with ``{}``.
        seeds: B seeds.
    """

    method: Method
    class_index: int
    name: str
    templates: list[str]
    seeds: list[int]

    def image_paths(self, folder: Path) -> list[Path]:
        """Files of the images below the folder of the comparison."""
        stem = f"{self.class_index:02d}-{file_stem(self.name)}"
        return [folder / "images" / self.method / f"{stem}-seed{seed}.png" for seed in self.seeds]

    def record_path(self, folder: Path) -> Path:
        """File of the measurements below the folder of the comparison."""
        stem = f"{self.class_index:02d}-{file_stem(self.name)}"
        return folder / "parts" / self.method / f"{stem}-seed{self.seeds[0]}.json"


def compare(
    classes: dict[str, str | None] | list[str],
    judge: str | TimmClassifier,
    *,
    pretrained: str = "checkpoints/portraits",
    guide: str | TimmClassifier | None = None,
    methods: list[Method] = list(METHODS),  # noqa: B006 - read only
    prompts: list[str] = ["a photo of a {}"],  # noqa: B006 - read only; a list is what YAML shows
    embeddings: Embeddings = [],  # noqa: B006 - read only
    images: int = 8,
    first_seed: int = TEST_SEEDS,
    sampling: Sampling = Sampling(steps=20, guidance=7.5),  # noqa: B008 - frozen
    settings: MethodSettings = MethodSettings(),  # noqa: B008 - frozen
    batch_size: int = 8,
    dtype: Precision | None = None,
    device: str | None = None,
    output_dir: str = "comparison",
) -> Table:
    """Compare ways to draw classes: prompts, tokens, guidance and searches, judged on the same seeds.

    Every method makes the same number of images of each class from the same seeds and prompts. The judge only reports.
    Costs are of one image; what is done once for a class, such as the search for a word, is said below the table, and
    the training of tokens is not counted. Images that were made with the same settings are not made again.

    Args:
        classes: names of the classes, labels of judge and guide; or each name with a phrase that describes the class
            without its article, or null.
        judge: timm name or folder of the classifier that judges, or a TimmClassifier with its settings.
        pretrained: model: folder of a diffusers pipeline, or hub id.
        guide: another classifier, which searches and optimises; null where no method needs one.
        methods: compared methods.
        prompts: prompts with ``{}`` where the class goes; the images of a class take them in turn.
        embeddings: embedding files of the classes' tokens, or their folder.
        images: images of each class and method.
        first_seed: seed of the first of them, the same for every class and method; far from the seeds that tokens are
            learned on.
        sampling: settings of the sampler, the same for all methods, with the scale of classifier-free guidance. A null
            solver is DDIM, by which latents are optimised.
        settings: settings of single methods.
        batch_size: images at once.
        dtype: precision of the model; null for its default.
        device: where to compute, such as ``cuda:1``; null for a GPU if there is one.
        output_dir: folder of the results: ``table.csv``, ``records.csv``, ``summary.json``, ``contact_sheet.png`` and
            ``images``.

    Returns:
        The table.

    Raises:
        UserError: if a method lacks a setting, a classifier lacks a class, guide and judge are the same model, or a
            setting is out of range.
    """
    check_at_least("compare", 1, images=images, batch_size=batch_size)
    check_seeds("first_seed", [first_seed, first_seed + images])
    refuse_remote(output_dir)
    folder = Path(output_dir).expanduser()
    check_writable(folder)
    described = classes if isinstance(classes, dict) else dict.fromkeys(classes)
    _check_lists(described, methods, prompts, sampling)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with quiet():
        judging = ClassifierLoss(judge).to(where)
        guiding = None if guide is None else ClassifierLoss(guide).to(where)
        judging.check(list(described))
        if guiding is not None:
            require_judge_differs(judging, guiding)
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        backbone = Pipeline.from_pretrained(pretrained, **options).backbone.to(where)
    pipeline = Pipeline(backbone, sampling=sampling_for(sampling, inverts=False))
    compared = ComparedMethods(
        pipeline,
        described,
        methods,
        settings,
        prompts=prompts,
        guide=None if guiding is None else guiding.classifier,
        embeddings=embeddings,
    )
    parts = _parts(methods, list(described), prompts, first_seed, images, batch_size)
    comparison = _Comparison(folder, compared, judging)
    try:
        with quiet():
            comparison.make(parts)
    except Stopped as stopped:
        done, total = comparison.number_done(parts), images * len(methods) * len(described)
        message = f"{done} of {total} images are done; the same command makes the others"
        raise Stopped(stopped.received, message) from None
    table = comparison.table(parts, methods, list(described))
    whole = json_hash([comparison.key(part) for part in parts])
    table.write(folder, whole)
    save_image(_sheet(parts, folder), folder / "contact_sheet.png")
    with atomic_write(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(_summary(table) | {"settings": whole}, indent=2) + "\n")
    print(f"{table}\n{folder}")
    return table


class _Comparison:
    """Makes and judges the parts of a comparison, each once.

    Args:
        folder: folder of the results.
        methods: makes the images.
        judge: reports.
    """

    def __init__(self, folder: Path, methods: ComparedMethods, judge: ClassifierLoss) -> None:
        self.folder, self.methods, self.judge = folder, methods, judge
        self.notes: list[str] = []
        backbone = methods.pipeline.backbone
        self._model = [
            version("tokenlearn-diffusion"),
            backbone.pretrained,
            methods.pipeline.vocabulary_hash,
            str(backbone.precision),
            dataclasses.asdict(methods.pipeline.sampling),
            json_hash(judge),
        ]

    def key(self, part: Part) -> str:
        """Hash of what the measurements of a part depend on."""
        return json_hash([self._model, self.methods.key(part.method, part.name), part.templates, part.seeds])

    def number_done(self, parts: Sequence[Part]) -> int:
        """Images that were made with these settings."""
        return sum(len(part.seeds) for part in parts if self._records(part) is not None)

    def make(self, parts: Sequence[Part]) -> None:
        """Make and judge the parts that are not there yet."""
        if any(part.method == "word" for part in parts):
            self._find_words()
        missing = [part for part in parts if self._records(part) is None]
        total, done = sum(len(part.seeds) for part in parts), self.number_done(parts)
        with Meter("Comparing", total, unit="image", done=done, shown=bool(missing)) as meter:
            backbone = self.methods.pipeline.backbone
            with NetworkCost(backbone, partial(meter.beat, "network evaluation")) as cost:
                for part in missing:
                    self._make(part, cost)
                    meter.update(len(part.seeds), figures=f"{part.method}, {part.name}")

    def table(self, parts: Sequence[Part], methods: Sequence[Method], classes: Sequence[str]) -> Table:
        """The table of all parts, a row per method."""
        records = [record for part in parts for record in self._records(part) or ()]
        diversity = self._diversity(parts)
        table = comparison_table(
            records, methods, classes, judge=self.judge.classifier.pretrained, diversity=diversity
        )
        if "word" in methods:
            listed = ", ".join(f"{name}: {self.methods.words[name]}" for name in classes)
            table.notes.append(f"words: {listed}")
        table.notes += self.notes
        if "token" in methods:
            table.notes.append("token: the training of the tokens is not counted")
        return table

    def _make(self, part: Part, cost: NetworkCost) -> None:
        """Make, judge and keep a part."""
        with torch.inference_mode(False), torch.no_grad():
            make = self.methods.maker(part.method, part.name)
            device = self.methods.pipeline.backbone.device
            cost.reset()
            images, seconds = timed(partial(make, part.templates, part.seeds), device)
            images = finished(images.float()).to(device)
            scores = self.judge.score(images, [part.name] * len(images))
        number = len(part.seeds)
        costs = {EVALUATIONS: cost.evaluations / number, COST: cost.total / number, SECONDS: seconds / number}
        records = []
        for seed, score in zip(part.seeds, scores.tolist(), strict=True):
            for measure, value in {ACCURACY: score, **costs}.items():
                records.append(Record(part.method, part.name, "", measure, seed, value))
        for path, image in zip(part.image_paths(self.folder), to_images(images), strict=True):
            save_image(image, path)
        with atomic_write(part.record_path(self.folder)) as temporary:
            temporary.write_text(json.dumps({"settings": self.key(part), "records": records}))

    def _records(self, part: Part) -> list[Record] | None:
        """Measurements of a part that was made with these settings; None if it was not."""
        if part.method == "word" and part.name not in self.methods.words:
            return None
        try:
            content = json.loads(part.record_path(self.folder).read_text())
            if content["settings"] != self.key(part):
                return None
            records = [Record(*record) for record in content["records"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return records if all(path.is_file() for path in part.image_paths(self.folder)) else None

    def _find_words(self) -> None:
        """Find the words that no setting gives, once for the same settings, and say what the search costs."""
        methods = self.methods
        file = self.folder / "parts" / "words.json"
        given = [methods.settings.words, methods.settings.search]
        key = json_hash([self._model, json_hash(methods.guide), list(methods.classes), given, methods.prompts[0]])
        try:
            kept = json.loads(file.read_text())
        except (OSError, ValueError):
            kept = {}
        if kept.get("settings") != key:
            backbone = methods.pipeline.backbone
            with NetworkCost(backbone) as cost:
                found, seconds = timed(methods.find_words, backbone.device)
            kept = {"settings": key, "words": found, EVALUATIONS: cost.total, SECONDS: seconds}
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(kept))
        methods.words |= kept["words"]
        if kept["words"]:
            self.notes.append(
                f"word: the search cost {kept[EVALUATIONS]} network evaluations and {kept[SECONDS]:.0f} s once"
            )

    def _diversity(self, parts: Sequence[Part]) -> dict[tuple[str, str], float]:
        """Mean distance of two images of a class by a method, in the judge's features, by method and class."""
        features: dict[tuple[str, str], list[Tensor]] = {}
        device = self.methods.pipeline.backbone.device
        with torch.no_grad():
            for part in parts:
                pixels = [rgb_pixels(image) for image in _read(part.image_paths(self.folder))]
                found = self.judge.classifier.features(unit_range(pixels).to(device)).cpu()
                features.setdefault((part.method, part.name), []).append(found)
        return {key: float(pairwise_distance(torch.cat(of_key))) for key, of_key in features.items()}


def comparison_table(
    records: Sequence[Record],
    methods: Sequence[str],
    classes: Sequence[str],
    *,
    judge: str,
    diversity: Mapping[tuple[str, str], float],
) -> Table:
    """The table of a comparison: a row per method.

    Differences from the first method are of the same classes and seeds, and their intervals by the bootstrap over the
    seeds of each class.

    Args:
        records: accuracies and costs of every image, with the class as item.
        methods: rows.
        classes: columns of single classes.
        judge: name of the judge.
        diversity: mean distance of two images, by method and class.
    """
    first = methods[0]
    columns = [
        Column(name=ACCURACY, kind="share", measure=ACCURACY, interval=True, bar=True),
        Column(name=f"over_{first}", kind="difference", measure=ACCURACY, interval=True),
        *(
            Column(name=name, kind="share", measure=ACCURACY, interval=True, printed=len(classes) < 7)
            for name in classes
        ),
        Column(name="diversity", kind="score", measure="diversity"),
        Column(name=EVALUATIONS, kind="count", measure=EVALUATIONS),
        Column(name=COST, kind="count", measure=COST),
        Column(name=SECONDS, kind="seconds", measure=SECONDS),
    ]
    values: dict[tuple[str, str, str], list[float]] = {}
    for record in records:
        values.setdefault((record.method, record.item, record.measure), []).append(record.value)
    rows = []
    for method in methods:
        correct = {name: values[method, name, ACCURACY] for name in classes}
        everything = [value for of_class in correct.values() for value in of_class]
        cells = {ACCURACY: _share(everything)} | {name: _share(of_class) for name, of_class in correct.items()}
        differences = [torch.tensor(correct[name]) - torch.tensor(values[first, name, ACCURACY]) for name in classes]
        differences = [part.float() for part in differences]
        mean = float(torch.stack([part.mean() for part in differences]).mean())
        cells[f"over_{first}"] = Cell(mean, *bootstrap_interval(differences), len(everything))
        ratios = [diversity[method, name] / diversity[first, name] for name in classes]
        cells["diversity"] = Cell(float(np.nanmean(ratios)) if len(everything) > len(classes) else None, None, None, 0)
        for measure in _COSTS:
            costs = [value for name in classes for value in values[method, name, measure]]
            cells[measure] = Cell(sum(costs) / len(costs), None, None, len(costs))
        rows.append(Row(method, cells))
    return Table(
        title=f"judged by {judge}",
        heading="method",
        columns=columns,
        rows=rows,
        summary={},  # the printed table has all figures
        notes=[
            f"over_{first}: difference on the same classes and seeds; diversity: distance of two images over that of "
            f"{first}; of one image: network evaluations, the same with a backward pass counted as two, and seconds"
        ],
        records=list(records),
    )


def _share(values: Sequence[float]) -> Cell:
    correct = round(sum(values))
    return Cell(correct / len(values), *wilson_interval(correct, len(values)), len(values))


def _summary(table: Table) -> dict[str, Any]:
    """Figures of all methods, flat."""
    summary: dict[str, Any] = {}
    for row in table.rows:
        for column in table.columns:
            cell = row.cells[column.name]
            name = f"{column.name}_{row.name}"
            summary[name] = cell.value
            if column.interval:
                summary |= {f"{name}_low": cell.low, f"{name}_high": cell.high}
    return summary


def _check_lists(
    classes: Mapping[str, str | None], methods: Sequence[Method], prompts: Sequence[str], sampling: Sampling
) -> None:
    for setting, given in (("classes", list(classes)), ("methods", methods), ("prompts", prompts)):
        if not given:
            raise UserError(f"{setting} is empty; give at least one")
        name, number = Counter(given).most_common(1)[0]
        if number > 1:
            raise UserError(f"{setting} has '{name}' twice; name it once")
    if not isinstance(sampling.guidance, int | float):
        raise UserError(
            "sampling.guidance must be the scale of classifier-free guidance, got "
            f"{type(sampling.guidance).__name__}; the comparison makes all rules itself"
        )


def _parts(
    methods: Sequence[Method],
    classes: Sequence[str],
    prompts: Sequence[str],
    first_seed: int,
    images: int,
    batch_size: int,
) -> list[Part]:
    """All parts, class by class, so that the first results are of all methods."""
    parts = []
    for class_index, name in enumerate(classes):
        for method in methods:
            for start in range(0, images, batch_size):
                places = range(start, min(start + batch_size, images))
                templates = [prompts[place % len(prompts)] for place in places]
                parts.append(Part(method, class_index, name, templates, [first_seed + place for place in places]))
    return parts


def _sheet(parts: Sequence[Part], folder: Path) -> Image.Image:
    """A row of images for each class and method."""
    rows: dict[str, list[Image.Image]] = {}
    for part in parts:
        rows.setdefault(f"{part.name}: {part.method}", []).extend(_read(part.image_paths(folder)))
    return sheet([(caption, images[:_SHEET_COLUMNS]) for caption, images in rows.items()])


def _read(paths: Sequence[Path]) -> list[Image.Image]:
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return images
