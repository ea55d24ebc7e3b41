"""Images and figures that are not finite stop a run with the cause, and unknown tokens before its first image."""

import json
import warnings

import pytest
import torch
import yaml

from tests.command_line import error_of
from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.guidance import SEGA, check_tokens
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.objectives import ClassifierLoss, require_judge_differs
from tokenlearn.pipeline import Pipeline, Sampling, finished
from tokenlearn.tokens import TokenBank, save_embedding

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


@pytest.fixture
def task_of(tiny_models, tmp_path):
    """Write the config of a prediction by the tiny models."""

    def write(name, model, data=None):
        backbone = {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}}
        config = {
            "model": {"class_path": name, "init_args": {"backbone": backbone, "sampling": {"steps": 2}} | model},
            "trainer": QUIET,
            "output_dir": str(tmp_path / "run"),
        }
        if data is not None:
            config["data"] = {"class_path": "PromptList", "init_args": data}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return ["predict", "--config", str(path)]

    return write


@pytest.fixture
def pirate(tmp_path):
    return str(save_embedding(tmp_path / "pirate.safetensors", "<pirate>", [torch.full((1, 16), 0.1)], {}))


def test_images_that_are_not_finite_are_refused():
    images = torch.tensor([-0.5, 0.25, 1.5]).reshape(1, 3, 1, 1)
    assert finished(images).flatten().tolist() == [0.0, 0.25, 1.0]
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="not finite and would be black"):
            finished(torch.full((1, 3, 2, 2), value))


def test_a_decoder_that_gives_nan_stops_every_task(tiny_models, task_of, pirate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(StableDiffusion, "decode_latents", lambda self, latents: torch.full((1, 3, 16, 16), torch.nan))
    tasks = {
        "Generate": ({}, {"prompts": ["a man"]}),
        "Edit": ({"embeddings": [pirate], "edits": [{"<pirate>": 1.0}], "prompts": ["a man"]}, None),
        "Sega": ({"prompts": ["a man"], "edits": [{"concept": "hat", "warmup_steps": 0}]}, None),
    }
    for name, (model, data) in tasks.items():
        assert "not finite and would be black" in error_of(task_of(name, model, data), capsys)
    assert not list((tmp_path / "run").rglob("*.png"))


def test_vectors_that_are_too_large_for_the_text_encoder(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    bank = TokenBank({"<large>": 1}, [16])
    bank.set("<large>", [torch.full((1, 16), 3e38)])
    with pytest.raises(UserError, match=r"not finite for 'a <large>'.* too large"):
        Pipeline(backbone, tokens=bank, sampling=Sampling(steps=2))(["a man", "a <large>"])


@pytest.fixture
def broken_classifier(tmp_path):
    classifier = TimmClassifier(str(tiny_classifier(tmp_path / "broken", ["hat", "beard"])))
    with torch.no_grad():
        next(classifier.parameters()).fill_(torch.nan)
    return classifier


def test_a_judge_that_gives_nan_does_not_judge(broken_classifier):
    judge, images = ClassifierLoss(broken_classifier, "hat"), torch.rand(2, 3, 32, 32)
    for figure in (judge.score, judge.confidence, broken_classifier.features):
        with torch.no_grad(), pytest.raises(UserError, match=r"broken' gives values .* not finite for finite images"):
            figure(images)
    assert judge.loss(images.requires_grad_()).isnan().all()  # the training says which step it was


def test_a_judge_says_that_images_are_the_cause(tmp_path):
    judge = ClassifierLoss(str(tiny_classifier(tmp_path / "whole", ["hat", "beard"])), "hat")
    with pytest.raises(UserError, match=r"the images that .* was given are not finite"), torch.no_grad():
        judge.score(torch.full((1, 3, 32, 32), torch.nan))


def test_a_test_with_a_judge_of_nan_ends_in_one_line(tiny_config, tiny_models, tmp_path, capsys, monkeypatch):
    real = TimmClassifier.preprocess

    def preprocess(self, images):
        return real(self, images) * (float("nan") if self.pretrained.endswith("judge") else 1)

    monkeypatch.setattr(TimmClassifier, "preprocess", preprocess)
    line = error_of(["test", "--config", tiny_config()], capsys)
    assert "judge' gives values that are not finite" in line
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_copy_of_the_guide_is_no_judge(tmp_path):
    folders = [str(tiny_classifier(tmp_path / name, ["cat", "dog"])) for name in ("guide", "copy", "judge")]
    guide, copy, judge = (ClassifierLoss(folder, "cat") for folder in folders)
    require_judge_differs(judge, guide)
    with pytest.raises(UserError, match=r"copy' has the weights of the guide '.*guide'; name another"):
        require_judge_differs(copy, 2 * guide + ClassifierLoss(folders[2], "dog"))
    with torch.no_grad():  # as rounding to half precision would
        for parameter in copy.parameters():
            parameter.mul_(1 + 1e-6)
    with pytest.raises(UserError, match="has the weights of the guide"):
        require_judge_differs(copy, guide)


def test_a_copy_of_the_guide_in_a_config(tiny_config, tiny_models, tmp_path, capsys):
    copy = tiny_classifier(tmp_path / "copy", ["ordinary person", "wizard", "pirate"])
    config = tiny_config({"model.init_args.judge.init_args.classifier": str(copy)})
    assert "has the weights of the guide" in error_of(["fit", "--config", config], capsys)


@pytest.mark.parametrize("prompt", ["a <pirat>", "(<pirat>:1.2)", "king - <pirat> + man", "a<pirat>b"])
def test_unknown_tokens_name_the_nearest(prompt):
    with pytest.raises(UserError, match=r"'<pirat>' of .* did you mean '<pirate>'\?; loaded are <hat>, <pirate>:"):
        check_tokens([prompt], ["<hat>", "<pirate>"])


def test_known_tokens_in_any_form():
    check_tokens(["a <Pirate> <pirate>_1", "x < y > z", "1<2", "(<PIRATE>:1.2)", "TOK"], ["<pirate>", "TOK"])


@pytest.mark.parametrize("where", ["prompt", "later prompt", "negative prompt", "concept", "source prompt"])
def test_a_pipeline_refuses_unknown_tokens_everywhere(tiny_models, where):
    pipe = Pipeline.from_pretrained(str(tiny_models / "pipeline"), sampling=Sampling(steps=2))
    bank = TokenBank({"<pirate>": 1}, [16])
    pipe = pipe.with_tokens(bank)
    generated = []
    pipe.backbone.register_forward_hook(lambda *_: generated.append(1))
    calls = {
        "prompt": lambda: pipe("a <pirat>"),
        "later prompt": lambda: pipe(["a man"] * 9 + ["a <pirat>"]),
        "negative prompt": lambda: pipe("a man", negative_prompt="<pirat>"),
        "concept": lambda: pipe("a man", steps=12, guidance=SEGA(["hat - <pirat>"])),
        "source prompt": lambda: pipe.edit(
            pipe("a man")[0], {"<pirate>": 1}, steps=2, timestep=1, source_prompt="a <pirat>"
        ),
    }
    with pytest.raises(UserError, match=r"did you mean '<pirate>'"):
        calls[where]()
    assert bool(generated) == (where == "source prompt")


@pytest.mark.parametrize(
    ("name", "model", "data"),
    [
        ("Generate", {}, {"prompts": ["a man", "a <pirat>"]}),
        ("Generate", {"sampling": {"steps": 2, "negative_prompt": "<bad>"}}, {"prompts": ["a man"]}),
        ("Sega", {"prompts": ["a <pirat>"], "edits": [{"concept": "hat", "warmup_steps": 0}]}, None),
        (
            "Doodl",
            {"prompts": ["a <pirat>"], "objective": {"class_path": "SymmetryLoss"}, "optimisation": {"steps": 1}},
            None,
        ),
        ("Edit", {"prompts": ["a <pirat>"], "edits": [{"<pirate>": 1.0}]}, None),
    ],
)
def test_a_prediction_refuses_unknown_tokens_before_its_first_image(
    task_of, pirate, tmp_path, capsys, name, model, data
):
    line = error_of(task_of(name, {"embeddings": [pirate]} | model, data), capsys)
    assert "is not loaded" in line
    assert "<pirate>" in line
    assert not list((tmp_path / "run").rglob("*.png"))


def unused(arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(arguments)
    return [str(warning.message) for warning in caught if "no prompt uses" in str(warning.message)]


def test_loaded_tokens_that_no_prompt_uses_are_a_warning(task_of, pirate, tmp_path):
    assert unused(task_of("Generate", {"embeddings": [pirate]}, {"prompts": ["a pirate"]})) == [
        "no prompt uses the loaded <pirate>; write a token into a prompt as it is spelled here"
    ]
    assert not unused(task_of("Generate", {"embeddings": [pirate]}, {"prompts": ["a man", "a <Pirate> man"]}))
    folder = tmp_path / "folder"
    for token in ("<crown>", "<cape>"):
        save_embedding(folder / f"{token[1:-1]}.safetensors", token, [torch.zeros(1, 16)], {})
    assert not unused(task_of("Generate", {"embeddings": str(folder)}, {"prompts": ["a <crown>"]}))
    (line,) = unused(task_of("Generate", {"embeddings": [str(folder), pirate]}, {"prompts": ["a <pirate>"]}))
    assert "<cape>, <crown>;" in line


def test_figures_of_a_run_are_json(tiny_config, tiny_models, tmp_path):
    main(["test", "--config", tiny_config()])
    summary = (tmp_path / "run" / "summary.json").read_text()
    json.loads(summary, parse_constant=lambda constant: pytest.fail(f"{constant} in summary.json"))
