import csv
import json

import pytest
import torch
import yaml

from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.guidance import ConceptSettings
from tokenlearn.main import main
from tokenlearn.methods import SegaTest, sega_test
from tokenlearn.methods.concepts import SemanticEdit
from tokenlearn.methods.sega_test import Arithmetic, AttributeWords, Suppression
from tokenlearn.models import StableDiffusion, TimmClassifier

LABELS = ["smile", "hat", "beard"]
EARLY = ConceptSettings(scale=4.0, warmup_steps=1)


class Judge(TimmClassifier):
    """A judge for whom a picture is three logits."""

    def forward(self, images):
        return images[:, :, 0, 0]


class World(SegaTest):
    """Pictures are three logits: that of a label is 1 or -1 by a bit of the seed; edits add to them."""

    def _plain(self, prompt, seeds):
        logits = torch.tensor([[1.0 if seed >> bit & 1 else -1.0 for bit in range(3)] for seed in seeds])
        if prompt in LABELS:
            logits[:, LABELS.index(prompt)] = 5
        return logits[:, :, None, None]

    def _guided(self, prompt, edits, seeds, sample_scales=None):
        images = self._plain(prompt, seeds)
        for number, edit in enumerate(edits):
            scales = torch.tensor(edit.scale) if sample_scales is None else sample_scales[number][:, None, None]
            images[:, LABELS.index(edit.concept)] += scales
        if edits[0].concept == "hat":  # never comes without a smile
            images[:, 0] = 1
        return images

    def _composed(self, concept, scale, seeds):
        images = self._plain(self.prompt, seeds)
        images[:, LABELS.index(concept)] += scale
        return images

    def _safe(self, prompt, concept, seeds):
        return self._plain(prompt, seeds)

    def log_dict(self, *args, **kwargs):
        pass


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    tiny_classifier(folder, LABELS, multi_label=True)
    return str(folder)


@pytest.fixture
def make(tiny_models, judge, monkeypatch):
    def task(kind=World, **options):
        if issubclass(kind, World):
            monkeypatch.setattr(sega_test, "TimmClassifier", Judge)
        settings = {
            "attributes": [AttributeWords(label=label, concept=label, prompt=label) for label in LABELS],
            "prompt": "a portrait",
            "edit": EARLY,
            "num_inference_steps": 4,
            "first_seed": 0,
            "num_seeds": 8,
            "compared_seeds": 4,
            "style_seeds": 0,
            "monotonicity_seeds": 0,
        }
        return kind(StableDiffusion(str(tiny_models / "pipeline")), judge, **(settings | options))

    return task


def report_of(task):
    for first in (0, 3, 6):
        task.test_step(list(range(first, min(first + 3, task.num_seeds))))
    task.on_test_epoch_end()
    return task.report


def row(report, name):
    (found,) = (dict(zip(report.columns, cells, strict=True)) for cells in report.rows if cells[0] == name)
    return found


def test_attributes_are_added_where_they_lack_and_removed_where_they_show(make):
    report = report_of(make())
    smile, hat = row(report, "smile"), row(report, "hat")
    assert [smile["add"], smile["add_images"], smile["remove"], smile["remove_images"]] == [1, 4, 1, 4]
    assert smile["untouched_kept"] == 1
    assert hat["untouched_kept"] == 12 / 16  # of four pictures without a hat two lack a smile; removing is the same
    assert report.summary["add_success"] == report.summary["remove_success"] == 1
    assert report.summary["untouched_kept"] == pytest.approx((1 + 12 / 16 + 1) / 3)
    assert report.summary["add_untouched_kept"] == pytest.approx((1 + 6 / 8 + 1) / 3)
    assert report.summary["remove_untouched_kept"] == pytest.approx((1 + 6 / 8 + 1) / 3)


def test_what_is_itself_a_lack_is_not_removed(make):
    own = [AttributeWords(label=label, concept=label, removable=label != "hat") for label in LABELS]
    report = report_of(make(attributes=own))
    assert [row(report, "hat")["add"], row(report, "hat")["remove"]] == [1, None]
    assert row(report, "smile")["remove"] == 1


def test_removal_has_settings_of_its_own(make):
    report = report_of(make(removal=ConceptSettings(scale=0.5, warmup_steps=1)))
    assert [row(report, "smile")["add"], row(report, "smile")["remove"]] == [1, 0]


def test_an_attribute_may_have_scales_of_its_own(make):
    own = [AttributeWords(label=label, concept=label) for label in LABELS]
    own[0] = AttributeWords(label=LABELS[0], concept=LABELS[0], scale=0.5)
    own[1] = AttributeWords(label=LABELS[1], concept=LABELS[1], removal_scale=0.5)
    first, second, third = (row(report_of(make(attributes=own)), label) for label in LABELS)
    assert [first["add"], first["remove"]] == [0, 1]
    assert [second["add"], second["remove"]] == [1, 0]
    assert [third["add"], third["remove"]] == [1, 1]


def test_other_methods_are_counted_on_fewer_seeds_and_where_they_can(make):
    report = report_of(make(composable_scale=0.5))
    smile = row(report, "smile")
    assert [smile["prompt_editing_add"], smile["prompt_editing_add_images"]] == [1, 2]
    assert smile["prompt_editing_remove"] is None  # nobody said how
    assert [smile["composable_add"], smile["composable_remove"]] == [0, 0]
    assert [smile["safe_add"], smile["safe_remove"], smile["safe_remove_images"]] == [None, 0, 2]
    assert not any(name.startswith("learned_tokens") for name in report.summary)
    assert {"plain_seconds", "seconds", "prompt_editing_seconds", "safe_seconds"} <= report.summary.keys()


def test_combinations_count_pictures_that_lack_all_of_them(make):
    report = report_of(
        make(combinations=[dict.fromkeys(["smile", "no hat", "beard"]), dict.fromkeys(["beard", "smile"])])
    )
    assert row(report, "smile + no hat + beard: at least 3")["add_images"] == 1
    assert row(report, "beard + smile: at least 1")["add_images"] == 2
    assert report.summary["combination_1_all"] == 1
    assert row(report, "smile + no hat + beard: no hat")["add"] == 1


def test_a_part_of_a_combination_may_have_an_edit_of_its_own(make):
    weak = SemanticEdit(concept="beard", scale=0.5, warmup_steps=1)
    report = report_of(make(combinations=[{"smile": None, "beard": weak}]))
    assert [row(report, f"smile + beard: {name}")["add"] for name in ("smile", "beard")] == [1, 0]
    assert report.summary["add_success"] == 1


def test_the_judge_is_ranked_against_the_scale(make):
    report = report_of(make(monotonicity_seeds=2))
    assert row(report, "smile")["rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert torch.tensor(row(report, "hat")["rank_correlation"]).isfinite()
    report = report_of(make(monotonicity_seeds=2, monotonicity_scales=[8.0, -8.0, 0.0]))
    assert report.summary["rank_correlation"] == pytest.approx(1, abs=1e-4)


def test_rank_correlation_is_of_the_side_that_a_picture_needs(make):
    class Saturated(World):
        """More of what a picture shows already makes the judge less sure, as does less of what it does not show."""

        def _guided(self, prompt, edits, seeds, sample_scales=None):
            shown = self._plain(prompt, seeds)
            return -shown * (super()._guided(prompt, edits, seeds, sample_scales) - shown).abs()

    report = report_of(make(Saturated, monotonicity_seeds=2))
    smile = row(report, "smile")
    assert smile["rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert smile["both_sides_rank_correlation"] < 0.9


def test_ranks_may_have_an_edit_of_their_own(make):
    class CompleteAtOnce(World):
        """A concept that changes many elements is complete at any scale."""

        def _guided(self, prompt, edits, seeds, sample_scales=None):
            if sample_scales is not None and edits[0].threshold < 0.95:
                sample_scales = [scales.sign() for scales in sample_scales]
            return super()._guided(prompt, edits, seeds, sample_scales)

    ranks = {"monotonicity_seeds": 2, "edit": EARLY}
    assert report_of(make(CompleteAtOnce, **ranks)).summary["rank_correlation"] < 0.9
    fewer = ConceptSettings(threshold=0.98, warmup_steps=1)
    report = report_of(make(CompleteAtOnce, **ranks, monotonicity_edit=fewer))
    assert row(report, "smile")["rank_correlation"] == pytest.approx(1, abs=1e-4)


def test_styles_arithmetic_and_suppression(make, judge):
    sums = Arithmetic(prompt="a portrait", concept="smile", judge=judge, label="smile")
    unwanted = Suppression(prompt="beard", concept="beard", label="beard")
    task = make(styles=["a sketch", "a hat"], style_seeds=4, arithmetic=sums, suppression=unwanted)
    report = report_of(task)
    assert row(report, "a sketch")["add_images"] == 2 + 2 + 4
    assert report.summary["styles_add_success"] == 1
    assert [report.summary["arithmetic_plain"], report.summary["arithmetic"]] == [0.5, 1]
    assert [report.summary[f"suppression{kind}"] for kind in ("_plain", "", "_safe")] == [1, 1, 1]
    assert row(report, "smile: plain")["add_images"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": []}, "attributes is empty"),
        ({"attributes": [AttributeWords(label="nose", concept="nose")]}, "nose"),
        ({"combinations": [{"smile": None, "nose": None}]}, "'nose', which is none of no smile, smile"),
        ({"edit": ConceptSettings(warmup_steps=4)}, "warmup_steps 4"),
        ({"removal": ConceptSettings(warmup_steps=4)}, "warmup_steps 4"),
        ({"num_seeds": 0}, "num_seeds"),
        ({"monotonicity_seeds": 1, "monotonicity_scales": [2.0]}, "monotonicity_scales must be two or more"),
    ],
)
def test_impossible_settings_are_refused(make, options, message):
    with pytest.raises(UserError, match=message):
        make(SegaTest, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"attributes": [AttributeWords(label="smile", concept="<grin>")]},
        {"attributes": [AttributeWords(label="smile", concept="smile", opposite="hat - <grin>")]},
        {"attributes": [AttributeWords(label="smile", concept="smile", token="<grin>")], "token_edit": EARLY},
        {"suppression": Suppression(prompt="a portrait", concept="<grin>", label="smile")},
    ],
)
def test_tokens_that_are_not_loaded_are_named(make, options):
    with pytest.raises(UserError, match="<grin>"):
        make(SegaTest, **options).on_test_start()


def test_the_table_is_written_by_the_command(tiny_models, judge, tmp_path, capsys):
    backbone = {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}}
    settings = {
        "backbone": backbone,
        "judge": judge,
        "attributes": [
            {"label": "smile", "concept": "face - hat", "prompt": "a face"},
            {"label": "hat", "concept": "hat"},
        ],
        "prompt": "a portrait",
        "edit": {"scale": 4.0, "warmup_steps": 1},
        "safety": {"warmup_steps": 1},
        "combinations": [{"smile": None, "hat": None}],
        "styles": ["a sketch"],
        "suppression": {"prompt": "a king", "concept": "hat", "label": "beard"},
        "num_seeds": 3,
        "compared_seeds": 2,
        "style_seeds": 1,
        "monotonicity_seeds": 1,
        "monotonicity_scales": [-4, 0, 4],
        "num_inference_steps": 4,
        "batch_size": 2,
    }
    config = {
        "model": {"class_path": "SegaTest", "init_args": settings},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["seconds"] > 0
    with (tmp_path / "run" / "table.csv").open() as file:
        rows = {cells["attribute"]: cells for cells in csv.DictReader(file)}
    assert int(rows["smile"]["add_images"]) + int(rows["smile"]["remove_images"]) == 3
    assert (tmp_path / "run" / "edits.png").is_file()
    assert "untouched_kept" in capsys.readouterr().out
