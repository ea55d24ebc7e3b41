import csv
import dataclasses
import json

import datasets
import lightning as L
import pytest
import torch
import yaml
from PIL import Image

from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.evaluation.realism import Realism
from tokenlearn.evaluation.sega import SegaEvaluation
from tokenlearn.evaluation.sega_methods import edit_requests
from tokenlearn.evaluation.sega_settings import (
    Arithmetic,
    AttributeWords,
    Monotonicity,
    Seeds,
    SegaMethods,
    SegaVariant,
    Styles,
    Suppression,
)
from tokenlearn.guidance import SEGA, ComposableGuidance, ConceptSettings, SemanticEdit
from tokenlearn.main import main
from tokenlearn.metrics import kernel_distance
from tokenlearn.models import StableDiffusion, TimmClassifier
from tokenlearn.pipeline import Sampling

LABELS = ["smile", "hat", "beard"]
EARLY = ConceptSettings(scale=4.0, warmup_steps=1)
NO_RANKS = Monotonicity(seeds=0)


class Judge(TimmClassifier):
    """A judge for whom an image is three logits between -20 and 20."""

    def forward(self, images):
        return 40 * (images[:, :, 0, 0] - 0.5)


class World:
    """A pipeline whose images are three logits: of a label 1 or -1 by a bit of the seed; guidance adds to them."""

    def __init__(self):
        self.backbone = self
        self.sampling = Sampling(size=(16, 16))

    def encode(self, prompts):
        return prompts[0]

    def guided_model(self, prompt, rule):
        return prompt, rule

    def sample_latents(self, seeds, model):
        prompt, rule = model
        logits = torch.tensor([[1.0 if seed >> bit & 1 else -1.0 for bit in range(3)] for seed in seeds])
        if prompt in LABELS:
            logits[:, LABELS.index(prompt)] = 5
        if isinstance(rule, SEGA):
            for edit, concept in zip(rule.edits, rule.concepts, strict=True):
                logits = self.edited(logits, edit, concept.scales)
            if rule.edits[0].concept == "hat":  # never comes without a smile
                logits[:, 0] = 1
        elif isinstance(rule, ComposableGuidance):
            logits[:, LABELS.index(rule.concepts[0])] += rule.scales[1]
        return logits

    def edited(self, logits, edit, scales):
        logits = logits.clone()
        logits[:, LABELS.index(edit.concept)] += scales
        return logits

    def decode_latents(self, latents):
        return 0.5 + latents[:, :, None, None] / 40


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    tiny_classifier(folder, LABELS, multi_label=True)
    return str(folder)


@pytest.fixture
def make(tiny_models, judge):
    def evaluation(**options):
        settings = {
            "attributes": [AttributeWords(label=label, concept=label, prompt=label) for label in LABELS],
            "prompt": "a portrait",
            "methods": SegaMethods(add=EARLY),
            "sampling": Sampling(steps=4),
            "seeds": Seeds(first=0, number=8, compared=4, choosing=0),
            "styles": Styles(seeds=0),
            "monotonicity": NO_RANKS,
            "batch_size": 3,
        }
        return SegaEvaluation(StableDiffusion(str(tiny_models / "pipeline")), Judge(judge), **(settings | options))

    return evaluation


def table_of(evaluation, world=None):
    evaluation.task.pipeline = world or World()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.test(evaluation, verbose=False)
    return evaluation.table


def row(table, name):
    """Value of each column, and its number of images."""
    (cells,) = (row.cells for row in table.rows if row.name == name)
    values = {column: cell.value for column, cell in cells.items()}
    return values | {f"{column}_images": cell.images for column, cell in cells.items()}


def summary(table):
    return {name: figure.value for name, figure in table.summary.items()}


def test_realism_is_the_distance_of_the_edits_of_the_compared_seeds(make, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "real").mkdir()
    for index in range(5):
        Image.new("RGB", (16, 16), (40 * index, 200 - 30 * index, 90)).save(tmp_path / "real" / f"{index}.png")
    realism = Realism(judge=judge, reference=str(tmp_path / "real"))
    table = table_of(make(realism=realism, batch_size=8))
    classifier, world = TimmClassifier(judge), World()
    with torch.no_grad():
        real = realism.features(classifier, 16)
        assert len(real) == 5
        plain = world.decode_latents(world.sample_latents(range(4), ("a portrait", None)))
        # Of seeds 0 to 3, two lack a smile and two show it: SEGA adds 4 to its logit or takes 4 away.
        edited = plain.clone()
        edited[:, 0] += torch.tensor([4.0, -4.0, 4.0, -4.0])[:, None, None] / 40
        expected = kernel_distance(classifier.features(edited), real).item()
        before = kernel_distance(classifier.features(plain), real).item()
    assert row(table, "smile")["realism_distance"] == pytest.approx(expected, rel=1e-3)
    found = summary(table)
    assert found["plain_realism_distance"] == pytest.approx(before, rel=1e-3)
    distances = [row(table, label)["realism_distance"] for label in LABELS]
    assert found["realism_distance"] == pytest.approx(sum(distances) / 3)
    assert "prompt_editing_realism_distance" in found
    assert "realism_distance" not in summary(table_of(make()))


def test_attributes_are_added_where_they_lack_and_removed_where_they_show(make):
    table = table_of(make())
    smile, hat = row(table, "smile"), row(table, "hat")
    assert [smile["add"], smile["add_images"], smile["remove"], smile["remove_images"]] == [1, 4, 1, 4]
    assert smile["untouched_kept"] == 1
    assert hat["untouched_kept"] == 12 / 16  # of four images without a hat two lack a smile; removing is the same
    found = summary(table)
    assert found["add_success"] == found["remove_success"] == 1
    assert found["untouched_kept"] == pytest.approx((1 + 12 / 16 + 1) / 3)
    assert found["add_untouched_kept"] == pytest.approx((1 + 6 / 8 + 1) / 3)
    assert found["remove_untouched_kept"] == pytest.approx((1 + 6 / 8 + 1) / 3)
    assert {caption for caption, _ in table.images["edits"]} >= {"plain", "smile", "no smile"}


def test_records_tell_which_other_attribute_an_edit_took_along(make):
    records = table_of(make()).records
    taken = {
        (record.seed, record.label)
        for record in records
        if (record.method, record.item, record.side) == ("semantic guidance", "hat", "add")
        and record.measure == "kept"
        and not record.value
    }
    assert taken == {(0, "smile"), (4, "smile")}
    assert {record.method for record in records if record.measure == "seconds"} == {
        "plain",
        "semantic guidance",
        "prompt editing",
        "composable",
        "safe",
    }


def test_an_absence_is_not_removed(make):
    attributes = [AttributeWords(label=label, concept=label, removable=label != "hat") for label in LABELS]
    table = table_of(make(attributes=attributes))
    assert [row(table, "hat")["add"], row(table, "hat")["remove"]] == [1, None]
    assert row(table, "smile")["remove"] == 1


def test_removal_may_have_other_settings(make):
    weak = ConceptSettings(scale=0.5, warmup_steps=1)
    table = table_of(make(methods=SegaMethods(add=EARLY, remove=weak)))
    assert [row(table, "smile")["add"], row(table, "smile")["remove"]] == [1, 0]


def test_an_attribute_may_have_other_scales(make):
    attributes = [AttributeWords(label=label, concept=label) for label in LABELS]
    attributes[0] = AttributeWords(label=LABELS[0], concept=LABELS[0], scale=0.5)
    attributes[1] = AttributeWords(label=LABELS[1], concept=LABELS[1], removal_scale=0.5)
    table = table_of(make(attributes=attributes))
    first, second, third = (row(table, label) for label in LABELS)
    assert [first["add"], first["remove"]] == [0, 1]
    assert [second["add"], second["remove"]] == [1, 0]
    assert [third["add"], third["remove"]] == [1, 1]


def test_other_methods_are_counted_on_fewer_seeds_and_where_they_can(make):
    table = table_of(make(methods=SegaMethods(add=EARLY, composable_scale=0.5)))
    smile = row(table, "smile")
    assert [smile["prompt_editing_add"], smile["prompt_editing_add_images"]] == [1, 2]
    assert smile["prompt_editing_remove"] is None  # there is no prompt for it
    assert [smile["composable_add"], smile["composable_remove"]] == [0, 0]
    assert [smile["safe_add"], smile["safe_remove"], smile["safe_remove_images"]] == [None, 0, 2]
    assert not any(name.startswith("learned_tokens") for name in table.summary)
    assert {"plain_seconds", "seconds", "prompt_editing_seconds", "safe_seconds"} <= table.summary.keys()


def test_composable_diffusion_has_the_concepts_and_scales_of_semantic_guidance():
    methods = SegaMethods(add=EARLY, remove=ConceptSettings(scale=3.0, warmup_steps=1))
    words = AttributeWords(label="smile", concept="a smile", opposite="frown - smile", scale=6.0)
    for side, scales, concepts in (("add", [7.5, 6], ["a smile"]), ("remove", [7.5, 3, -3], ["frown", "smile"])):
        requests = edit_requests(words, side, prompt="p", guidance_scale=7.5, methods=methods)
        rule = requests["composable"].rule
        assert [float(scale) for scale in rule.scales] == scales
        assert list(rule.concept_prompts) == concepts == list(requests["semantic guidance"].rule.concept_prompts)
    without = AttributeWords(label="smile", concept="a smile", removal_scale=2.0)
    for composable, scale in ((None, -2), (5.0, -5)):
        given = SegaMethods(add=EARLY, composable_scale=composable)
        rule = edit_requests(without, "remove", prompt="p", guidance_scale=7.5, methods=given)["composable"].rule
        assert [float(scale) for scale in rule.scales] == [7.5, scale]


def test_variants_are_rows_over_all_attributes(make):
    weak = SegaVariant(name="too weak", add=ConceptSettings(scale=0.5, warmup_steps=1), remove=EARLY)
    nothing = ConceptSettings(scale=4.0, threshold=None, warmup_steps=0, momentum_scale=0)
    table = table_of(make(variants=[SegaVariant(name="same", add=EARLY), weak, SegaVariant(name="none", add=nothing)]))
    same, other = row(table, "variant: same"), row(table, "variant: too weak")
    # Of four seeds two lack each of the first two labels and all lack the third.
    assert [same["add"], same["add_images"], same["remove"], same["remove_images"]] == [1, 8, 1, 4]
    assert [other["add"], other["remove"]] == [0, 1]
    assert same["untouched_kept"] < 1  # a hat never comes without a smile
    assert summary(table)["variant_too_weak_remove"] == 1
    assert row(table, "variant: none")["add"] == 1
    assert summary(table)["add_success"] == 1
    with pytest.raises(UserError, match=r"variants has a name twice among too weak, too weak"):
        make(variants=[weak, weak])


def test_composable_diffusion_is_not_called_semantic_guidance():
    nothing = ConceptSettings(threshold=None, warmup_steps=0, momentum_scale=0)
    for name in ("add", "remove"):
        with pytest.raises(UserError, match=rf"methods\.{name}.*composable diffusion"):
            SegaMethods(**({"add": EARLY} | {name: nothing}))
    assert SegaVariant(name="none of them", add=nothing).add.is_composable
    for changes in ({"threshold": 0.9}, {"warmup_steps": 1}, {"momentum_scale": 0.1}):
        assert not dataclasses.replace(nothing, **changes).is_composable


def test_settings_are_not_reported_on_the_seeds_that_chose_them(make):
    with pytest.raises(UserError, match=r"seeds\.first 50 is one of the 100.*purpose to choose"):
        Seeds(first=50)
    with pytest.raises(UserError, match=r"seeds\.number 250 is more than the 100"):
        Seeds(purpose="choose")
    with pytest.raises(UserError, match=r"purpose.*'tune'"):
        Seeds(purpose="tune")
    chosen = table_of(make(seeds=Seeds(first=100, number=2, compared=1, purpose="choose")))
    assert {record.seed for record in chosen.records} == {0, 1}
    assert "not to be reported" in str(chosen)
    reported = table_of(make(seeds=Seeds(first=100, number=2, compared=1)))
    assert {record.seed for record in reported.records} == {100, 101}
    assert "not to be reported" not in str(reported)


def test_combinations_count_images_that_lack_all_of_them(make):
    combinations = [dict.fromkeys(["smile", "no hat", "beard"]), dict.fromkeys(["beard", "smile"])]
    table = table_of(make(combinations=combinations))
    assert row(table, "smile + no hat + beard: at least 3")["add_images"] == 1
    assert row(table, "beard + smile: at least 1")["add_images"] == 2
    assert summary(table)["combination_1_all"] == 1
    assert row(table, "smile + no hat + beard: no hat")["add"] == 1
    assert [row.name for row in table.rows[3:]][:4] == [
        "smile + no hat + beard: at least 1",
        "smile + no hat + beard: at least 2",
        "smile + no hat + beard: at least 3",
        "smile + no hat + beard: smile",
    ]


def test_a_part_of_a_combination_may_have_its_own_edit(make):
    weak = SemanticEdit(concept="beard", scale=0.5, warmup_steps=1)
    table = table_of(make(combinations=[{"smile": None, "beard": weak}]))
    assert [row(table, f"smile + beard: {name}")["add"] for name in ("smile", "beard")] == [1, 0]
    assert summary(table)["add_success"] == 1


def test_the_judge_is_ranked_against_the_scale(make):
    table = table_of(make(monotonicity=Monotonicity(seeds=2)))
    assert row(table, "smile")["rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert torch.tensor(row(table, "hat")["rank_correlation"]).isfinite()
    table = table_of(make(monotonicity=Monotonicity(seeds=2, scales=[8.0, -8.0, 0.0])))
    assert summary(table)["rank_correlation"] == pytest.approx(1, abs=1e-4)


def test_rank_correlation_is_of_the_side_that_an_image_needs(make):
    class Saturated(World):
        """More of an attribute that is present makes the judge less sure, and so does less of an absent one."""

        def edited(self, logits, edit, scales):
            return -logits * (super().edited(logits, edit, scales) - logits).abs()

    table = table_of(make(monotonicity=Monotonicity(seeds=2)), Saturated())
    smile = row(table, "smile")
    assert smile["rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert smile["both_sides_rank_correlation"] < 0.9


def test_ranks_may_have_their_own_edit(make):
    class CompleteAtOnce(World):
        """A concept that changes many elements is complete at any scale."""

        def edited(self, logits, edit, scales):
            complete = scales.ndim and edit.threshold < 0.95
            return super().edited(logits, edit, scales.sign() if complete else scales)

    table = table_of(make(monotonicity=Monotonicity(seeds=2)), CompleteAtOnce())
    assert summary(table)["rank_correlation"] < 0.9
    fewer = ConceptSettings(threshold=0.98, warmup_steps=1)
    table = table_of(make(monotonicity=Monotonicity(seeds=2, edit=fewer)), CompleteAtOnce())
    assert row(table, "smile")["rank_correlation"] == pytest.approx(1, abs=1e-4)


def test_styles_arithmetic_and_suppression(make, judge):
    sums = Arithmetic(prompt="a portrait", concept="smile", judge=judge, label="smile")
    unwanted = Suppression(prompt="beard", concept="beard", label="beard")
    styles = Styles(prompts=["a sketch", "a hat"], seeds=4)
    evaluation = make(styles=styles, arithmetic=sums, suppression=unwanted)
    evaluation.arithmetic_judge = Judge(judge)
    table = table_of(evaluation)
    assert row(table, "a sketch")["add_images"] == 2 + 2 + 4
    found = summary(table)
    assert found["styles_add_success"] == 1
    assert [found["arithmetic_plain"], found["arithmetic"]] == [0.5, 1]
    assert [found[f"suppression{kind}"] for kind in ("_plain", "", "_safe")] == [1, 1, 1]
    assert row(table, "smile: plain")["add_images"] == 4
    assert row(table, "beard shown: safe")["add"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attributes": []}, "attributes"),
        ({"attributes": [AttributeWords(label="nose", concept="nose")]}, "nose"),
        ({"combinations": [{"smile": None, "nose": None}]}, "'nose'.*no smile, smile"),
        ({"methods": SegaMethods(add=ConceptSettings(warmup_steps=4))}, "warmup_steps 4"),
        ({"methods": SegaMethods(add=EARLY, remove=ConceptSettings(warmup_steps=4))}, "warmup_steps 4"),
        ({"sampling": Sampling(steps=4, guidance=ComposableGuidance([7.5]))}, "sampling.guidance.*ComposableGuidance"),
    ],
)
def test_impossible_settings_are_refused(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


def test_impossible_numbers_are_refused():
    with pytest.raises(UserError, match="number"):
        Seeds(number=0)
    with pytest.raises(UserError, match=r"monotonicity.scales.*\[2.0\]"):
        Monotonicity(seeds=1, scales=[2.0])


@pytest.mark.parametrize(
    "options",
    [
        {"attributes": [AttributeWords(label="smile", concept="<grin>")]},
        {"attributes": [AttributeWords(label="smile", concept="smile", opposite="hat - <grin>")]},
        {
            "attributes": [AttributeWords(label="smile", concept="smile", token="<grin>")],
            "methods": SegaMethods(add=EARLY, tokens=EARLY),
        },
        {"suppression": Suppression(prompt="a portrait", concept="<grin>", label="smile")},
    ],
)
def test_tokens_that_are_not_loaded_are_named(make, options):
    with pytest.raises(UserError, match="<grin>"):
        make(**options).on_test_start()


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
        "methods": {"add": {"scale": 4.0, "warmup_steps": 1}, "safety": {"warmup_steps": 1}},
        "combinations": [{"smile": None, "hat": None}],
        "styles": {"prompts": ["a sketch"], "seeds": 1},
        "suppression": {"prompt": "a king", "concept": "hat", "label": "beard"},
        "seeds": {"number": 3, "compared": 2},
        "monotonicity": {"seeds": 1, "scales": [-4, 0, 4]},
        "sampling": {"steps": 4},
        "batch_size": 2,
    }
    config = {
        "model": {"class_path": "SegaEvaluation", "init_args": settings},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["seconds"] > 0
    with (tmp_path / "run" / "table.csv").open() as file:
        rows = {cells["attribute"]: cells for cells in csv.DictReader(file)}
    assert int(rows["smile"]["add_images"]) + int(rows["smile"]["remove_images"]) == 3
    with (tmp_path / "run" / "records.csv").open() as file:
        seeds = {record["seed"] for record in csv.DictReader(file)}
    assert seeds == {"100", "101", "102"}
    assert (tmp_path / "run" / "edits.png").is_file()
    assert "untouched_kept" in capsys.readouterr().out
