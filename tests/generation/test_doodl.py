import csv

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.command_line import error_of
from tokenlearn.diffusion import EDICT, Leapfrog, Reversible
from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.errors import UserError
from tokenlearn.generation import Doodl
from tokenlearn.guidance import SEGA, SemanticEdit
from tokenlearn.latent_optimiser import LatentOptimiser
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss, SymmetryLoss
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.tokens import save_embedding

PROMPTS, SEEDS, STEPS, SCALE = ["a portrait", "a king"], [3, 5], 3, 3.0
SETTINGS = {"steps": 3, "grad_scale": 500.0, "clip": 0.05}


@pytest.fixture
def make(tiny_models):
    def task(optimisation=None, **options):
        settings = {
            "objective": SymmetryLoss(),
            "prompts": PROMPTS,
            "seeds": SEEDS,
            "sampling": Sampling(STEPS, SCALE),
            "optimisation": LatentOptimisation(**(SETTINGS | (optimisation or {}))),
            "strip_images": 2,
        }
        return Doodl(StableDiffusion(str(tiny_models / "pipeline")), **(settings | options))

    return task


def edit(task, *indices):
    return task.predict_step([task.images[index] for index in indices])


def photo(folder):
    pixels = torch.randint(0, 255, (20, 30, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.byte().numpy()).save(folder / "photo.png")
    return str(folder / "photo.png")


@pytest.mark.parametrize("solver", [None, EDICT()], ids=str)
def test_results_are_those_of_the_optimiser(make, solver):
    task = make({"steps": 6}, sampling=Sampling(STEPS, SCALE, solver))
    first, last = edit(task, 0, 3)
    assert (first.image.prompt, first.image.seed) == ("a portrait", 3)
    optimiser = LatentOptimiser(
        Pipeline(task.backbone, sampling=Sampling(STEPS, SCALE, solver)), SymmetryLoss(), task.optimisation
    )
    found = optimiser.optimise(optimiser.from_prompts(["a portrait", "a king"], SEEDS), snapshots=[3])
    for index, result in enumerate((first, last)):
        assert torch.equal(result.before, found.before[index])
        assert torch.equal(result.edits, found.after[index, None])
        assert torch.equal(result.latents, found.latents[index])
        assert result.history == found.history[index]
        assert torch.equal(result.strips["optimisation"], torch.stack([found.snapshots[3], found.after])[:, index])
    assert task.plan.strips == {"optimisation": ["step 3", "step 6"]}
    assert make(strip_images=0).plan.strips == {}


def test_any_guidance_rule(make):
    rule = SEGA([SemanticEdit(concept="a hat", scale=4.0, warmup_steps=1)], SCALE)
    (plain,), (guided,) = edit(make(), 0), edit(make(sampling=Sampling(STEPS, rule)), 0)
    assert not torch.allclose(plain.before, guided.before, atol=1e-3)
    losses = [row["loss"] for row in guided.history]
    assert losses[-1] < losses[0]


def test_tokens_of_embedding_files_and_checkpoints(make, tmp_path):
    save_embedding(tmp_path / "hat.safetensors", "<hat>", [torch.ones(1, 16)], {})
    task = make(prompts=["a <hat>"], embeddings=str(tmp_path))
    other = make(prompts=["a <hat>"])
    (first,), (second,) = edit(task, 0), edit(make(prompts=["a hat"]), 0)
    assert not torch.allclose(first.before, second.before, atol=1e-4)
    with pytest.raises(UserError, match="'<hat>' of 'a <hat>' is not loaded"):
        edit(other, 0)
    checkpoint = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"], strict=other.strict_loading)
    (second,) = edit(other, 0)
    assert torch.equal(first.edits, second.edits)


def test_several_objectives_and_a_judge(make, tiny_models):
    guide, judge = (str(tiny_models / name) for name in ("guide", "judge"))
    objectives = [SymmetryLoss(weight=2.0), ClassifierLoss(guide, "pirate", weight=0.5)]
    task = make({"steps": 1}, objective=objectives, judge=ClassifierLoss(judge, "wizard"))
    images = torch.rand(2, 3, 16, 16)
    expected = 2 * objectives[0].loss(images) + 0.5 * objectives[1].loss(images)
    torch.testing.assert_close(task.objective(images, 0), expected)
    (result,) = edit(task, 0)
    assert isinstance(task.judge, ClassifierLoss)
    shares = task.judge.classifier(torch.stack([result.before, result.edits[0]])).softmax(dim=1)[:, 1]
    assert [row["judge"] for row in result.history] == pytest.approx(shares.tolist(), rel=1e-3)


def test_photos_are_inverted_exactly_and_optimised(make, tmp_path):
    # Steps so small that each must lower the loss.
    small = {"renormalise": None, "noise": 0.0, "clip": 1e-5, "momentum": 0.0}
    for solver, options in ((None, {}), (Leapfrog(), {"from_timestep": 334})):
        task = make(small | options, images=photo(tmp_path), sampling=Sampling(STEPS, SCALE, solver))
        assert task.sampling.solver == (solver or EDICT())
        assert task.optimiser().gradient == Reversible()
        (result,) = edit(task, 0)
        image = task.images[0].image
        torch.testing.assert_close(result.before, image[0])
        with torch.no_grad():
            round_trip = task.backbone.decode_latents(task.backbone.encode_images(image))
        losses = [row["loss"] for row in result.history]
        assert losses[0] == pytest.approx(SymmetryLoss()(round_trip).item(), rel=1e-2)
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.995 * losses[0]
        assert result.latents.shape == (2, 4, 8, 12)
    with pytest.raises(UserError, match=r"'DDIM' .*EDICT"):
        make(images=photo(tmp_path), sampling=Sampling(STEPS, SCALE, "DDIM"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": []}, r"objectives is empty"),
        ({"prompts": []}, r"model.images.* model.prompts"),
        ({"batch_size": 0}, r"model.batch_size .* 0"),
        ({"strip_images": -1}, r"model.strip_images .* -1"),
        ({"optimisation": {"from_timestep": 500}}, r"optimisation.from_timestep 500 .*3 steps.* 334 or 667"),
    ],
)
def test_bad_settings(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


def test_bad_judges(make, tiny_models):
    guide, judge = (str(tiny_models / name) for name in ("guide", "judge"))
    objective = ClassifierLoss(guide, "pirate")
    with pytest.raises(UserError, match="ClassifierLoss"):
        make(objective=objective, judge=ClassifierLoss(judge))
    with pytest.raises(UserError, match=r"judge .*guide"):
        make(objective=objective, judge=ClassifierLoss(f"{guide}/", "pirate"))


@pytest.fixture
def config(tiny_models, tmp_path):
    pretrained = {"pretrained": str(tiny_models / "pipeline")}
    judge = {"classifier": str(tiny_models / "judge"), "labels": "wizard"}
    settings = {
        "model": {
            "class_path": "Doodl",
            "init_args": {
                "backbone": {"class_path": "StableDiffusion", "init_args": pretrained},
                "objective": [{"class_path": "SymmetryLoss"}],
                "prompts": ["a king"],
                "seeds": [1, 2, 3],
                "sampling": {"steps": STEPS},
                "optimisation": {"steps": 2},
                "judge": {"class_path": "ClassifierLoss", "init_args": judge},
                "strip_images": 2,
            },
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "doodl.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


def test_predict_leaves_images_latents_and_losses(config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    main(["predict", "--config", config])
    names = [f"000-a-king-seed{seed}" for seed in (1, 2, 3)]
    folders = {
        "images/before": "png",
        "images/doodl": "png",
        "strips": "png",
        "latents": "safetensors",
        "losses": "csv",
    }
    written = {run / folder / f"{name}.{suffix}" for folder, suffix in folders.items() for name in names}
    assert set(run.rglob("*seed*")) == written
    assert (run / "before_after.png").is_file()
    with (run / "losses" / f"{names[0]}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["loss"]) > 0 and 0 <= float(row["judge"]) <= 1 for row in rows)
    assert load_file(run / "latents" / f"{names[0]}.safetensors")["latents"].shape == (4, 8, 8)
    with Image.open(run / "strips" / f"{names[0]}.png") as strip:
        assert strip.width > 3 * 160  # the start and two steps

    # Whatever file of an image is lost, this image alone is made again, the same.
    optimised = []
    real = LatentOptimiser.optimise

    def counted(self, start, *, names, **options):
        optimised.extend(names)
        return real(self, start, names=names, **options)

    monkeypatch.setattr(LatentOptimiser, "optimise", counted)
    before = {path: path.stat().st_mtime_ns for path in written}
    losses = (run / "losses" / f"{names[1]}.csv").read_text()
    (run / "losses" / f"{names[1]}.csv").unlink()
    (run / "latents" / f"{names[2]}.safetensors").unlink()
    main(["predict", "--config", config])
    assert optimised == names[1:]
    assert (run / "losses" / f"{names[1]}.csv").read_text() == losses
    changed = {path for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {run / "losses" / f"{names[1]}.csv", run / "latents" / f"{names[2]}.safetensors"}


def test_finished_images_stay_when_a_loss_is_not_a_number(config, tmp_path, capsys, monkeypatch):
    real = SymmetryLoss.loss
    seen = []

    def breaks(self, images, targets=None):
        seen.append(len(images))
        return real(self, images) * (torch.nan if len(seen) == 5 else 1.0)  # the second step of the second image

    monkeypatch.setattr(SymmetryLoss, "loss", breaks)
    error = error_of(["predict", "--config", config], capsys)
    assert "'000-a-king-seed2' is nan at step 1" in error
    run = tmp_path / "run"
    assert sorted(path.name for path in run.rglob("*seed*")) == sorted(
        f"000-a-king-seed1.{suffix}" for suffix in ("png", "png", "png", "csv", "safetensors")
    )
