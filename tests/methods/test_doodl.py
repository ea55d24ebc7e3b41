import csv

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.test_main import error_of
from tokenlearn.diffusion.schedule import x0_from_noise
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.methods import Doodl
from tokenlearn.methods.image_guidance import ClassGuidance, ImageGuidance, SymmetryGuidance
from tokenlearn.methods.one_step_guidance import OneStepGuidance
from tokenlearn.models import StableDiffusion

PROMPTS, SEEDS, STEPS, SCALE = ["a portrait", "a king"], [3, 5], 3, 3.0
TIMESTEPS = [667, 334, 1]


@pytest.fixture
def make(tiny_models):
    def task(**options):
        settings = {
            "guidances": [SymmetryGuidance()],
            "prompts": PROMPTS,
            "seeds": SEEDS,
            "num_inference_steps": STEPS,
            "guidance_scale": SCALE,
            "optimisation_steps": 3,
            "grad_scale": 500.0,
            "clip": 0.05,
            "strip_images": 2,
        }
        return Doodl(StableDiffusion(str(tiny_models / "pipeline")), **(settings | options))

    return task


def edit(task, *indices):
    return task.predict_step([task.pictures[index] for index in indices])


def drawn(backbone, latents, prompt, timesteps=TIMESTEPS):
    """A plain loop over diffusers' DDIM, with everything in the graph."""
    scheduler = backbone.make_scheduler("DDIM")
    scheduler.set_timesteps(STEPS)
    assert set(timesteps) <= set(scheduler.timesteps.tolist())
    empty, wanted = backbone.encode_prompts([""]), backbone.encode_prompts([prompt])
    for timestep in torch.tensor(timesteps):
        plain, prompted = backbone(latents, timestep, empty), backbone(latents, timestep, wanted)
        latents = scheduler.step(plain + SCALE * (prompted - plain), timestep, latents).prev_sample
    return backbone.decode_latents(latents)


def symmetry(images):
    return (images - images.flip(-1)).square().mean()


def test_a_step_descends_the_gradient_of_the_whole_chain(make):
    task = make(optimisation_steps=2, clip=None, grad_scale=200.0, noise=0.0, renormalise=None)
    (edited,) = edit(task, 3)
    backbone = task.backbone
    assert (task.pictures[3].prompt, task.pictures[3].seed) == ("a king", 5)
    latents, buffer, losses = backbone.initial_latents([5]), 0.0, []
    start = drawn(backbone, latents, "a king").detach().clamp(0, 1)
    for _ in range(2):
        leaf = latents.requires_grad_()
        loss = symmetry(drawn(backbone, leaf, "a king"))
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, leaf)
        buffer = 0.9 * buffer + 200.0 * gradient
        latents = (leaf - buffer).detach()
    final = drawn(backbone, latents, "a king").detach()
    moved = (latents - backbone.initial_latents([5])).abs().max()
    assert moved > 0.01  # otherwise what follows says nothing
    torch.testing.assert_close(edited.latents, latents[0], rtol=0, atol=0.01 * moved.item())
    torch.testing.assert_close(edited.before, start[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(edited.edits[0], final[0].clamp(0, 1), rtol=1e-3, atol=1e-3)
    own = [row["loss"] for row in edited.history]
    assert own == pytest.approx([*losses, symmetry(final).item()], rel=1e-3)
    assert [row["step"] for row in edited.history] == [0, 1, 2]
    assert all(set(row) == {"step", "loss"} for row in edited.history)


@pytest.mark.parametrize("chain", ["checkpointed", "edict", "leapfrog", "o_belm"])
def test_the_loss_falls_at_the_norm_of_the_first_latents(make, chain):
    task = make(chain=chain, optimisation_steps=6)
    (edited,) = edit(task, 0)
    losses = [row["loss"] for row in edited.history]
    assert losses[-1] < 0.8 * losses[0]
    first = task.backbone.initial_latents([3])
    assert edited.latents.norm().item() == pytest.approx(first.norm().item(), rel=1e-5)
    assert not torch.allclose(edited.latents, first[0], atol=0.01)
    assert edited.strips["optimisation"].shape == (2, 3, 16, 16)
    assert task.strip_scales == {"optimisation": [3, 6]}
    torch.testing.assert_close(edited.strips["optimisation"][-1], edited.edits[0])


def test_pictures_do_not_depend_on_the_others_in_the_batch(make):
    task = make(noise=0.05)
    together = edit(task, 0, 1, 2, 3)
    for index in (1, 2):
        (alone,) = edit(task, index)
        torch.testing.assert_close(together[index].latents, alone.latents, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together[index].edits, alone.edits, rtol=1e-2, atol=1e-2)
        (again,) = edit(task, index)
        assert torch.equal(again.latents, alone.latents)
    # The perturbation is there: without it the latents are others.
    (unperturbed,) = edit(make(noise=0.0), 1)
    assert (unperturbed.latents - together[1].latents).std() > 0.02


@torch.no_grad()
def test_later_latents_can_be_optimised(make):
    task = make(optimise_from=334, optimisation_steps=1, noise=0.0, renormalise=None, clip=0.01)
    (edited,) = edit(task, 0)
    backbone = task.backbone
    whole = drawn(backbone, backbone.initial_latents([3]), "a portrait").clamp(0, 1)
    torch.testing.assert_close(edited.before, whole[0], rtol=1e-3, atol=1e-3)
    rest = drawn(backbone, edited.latents[None], "a portrait", TIMESTEPS[1:]).clamp(0, 1)
    torch.testing.assert_close(edited.edits, rest, rtol=1e-3, atol=1e-3)
    # The clip is the most that one step moves any element; what came before the timestep did not move at all.
    assert not torch.allclose(rest, whole, atol=1e-4)
    assert make(optimise_from=667).optimise_from is None


@torch.no_grad()
def test_best_of_takes_the_latents_with_the_lowest_loss(make):
    task = make(method="best_of", candidates=4)
    first, second = edit(task, 0, 1)
    backbone, generator = task.backbone, torch.Generator().manual_seed(3)
    tried = [backbone.initial_latents([generator]) for _ in range(4)]
    images = [drawn(backbone, latents, "a portrait") for latents in tried]
    losses = [symmetry(image).item() for image in images]
    best = losses.index(min(losses))
    assert [row["loss"] for row in first.history] == pytest.approx(losses, rel=1e-3)
    assert torch.equal(first.latents, tried[best][0])
    torch.testing.assert_close(first.edits, images[best].clamp(0, 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first.before, images[0][0].clamp(0, 1), rtol=1e-3, atol=1e-3)
    assert second.history != first.history
    # By default as many as the evaluations of the network that the updates take.
    assert make(method="best_of", optimisation_steps=3).candidates == 12


def test_guidances_are_summed_by_weight_and_a_judge_reports(make, tiny_models):
    guide, judge = (str(tiny_models / name) for name in ("guide", "judge"))
    guidances = [SymmetryGuidance(weight=2.0), ClassGuidance(guide, "pirate", weight=0.5)]
    task = make(guidances=guidances, judge=judge, judge_label="wizard", optimisation_steps=1)
    images = torch.rand(2, 3, 16, 16)
    expected = 2 * guidances[0].loss(images) + 0.5 * guidances[1].loss(images)
    torch.testing.assert_close(task.loss(images, 0), expected)
    (edited,) = edit(task, 0)
    assert task.judge is not None
    shares = task.judge(torch.stack([edited.before, edited.edits[0]])).softmax(dim=1)[:, 1]
    assert [row["judge"] for row in edited.history] == pytest.approx(shares.tolist(), rel=1e-3)


def test_photographs_are_inverted_exactly_and_optimised(make, tmp_path):
    pixels = torch.randint(0, 255, (20, 30, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.byte().numpy()).save(tmp_path / "photo.png")
    options = {"source": str(tmp_path / "photo.png"), "renormalise": None, "noise": 0.0}
    options |= {"clip": 1e-5, "momentum": 0.0}  # steps so small that each must lower the loss
    for settings in ({}, {"chain": "leapfrog", "optimise_from": 334}):
        task = make(**options, **settings, strip_images=3)
        assert task.chain == settings.get("chain", "edict")
        (edited,) = edit(task, 0)
        picture = task.pictures[0].image
        torch.testing.assert_close(edited.before, picture[0])
        with torch.no_grad():
            round_trip = task.backbone.decode_latents(task.backbone.encode_images(picture))
        losses = [row["loss"] for row in edited.history]
        assert losses[0] == pytest.approx(symmetry(round_trip).item(), rel=1e-2)
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.995 * losses[0]
        assert edited.latents.shape == (2, 4, 8, 12)
    with pytest.raises(UserError, match="'checkpointed' cannot invert photographs exactly"):
        make(**options, chain="checkpointed")


def test_one_step_guidance_as_published(make):
    task = make(method="one_step", one_step_scale=30.0)
    backbone, latents, timestep = task.backbone, torch.randn(1, 4, 8, 8), torch.tensor(334)
    with torch.no_grad():
        empty, king = (backbone.encode_prompts([text]) for text in ("", "a king"))
    model = OneStepGuidance(backbone, empty, SCALE, lambda images, step: symmetry(images)[None], 30.0)
    guided = model.predict_noise(latents, timestep, king)
    leaf = latents.clone().requires_grad_()
    alpha, sigma = backbone.alphas[334], backbone.sigmas[334]
    plain = backbone.predict_noise(leaf, timestep, empty)
    root = (1 - backbone.alphas[334] ** 2).sqrt()  # of beta, in the notation of the paper
    torch.testing.assert_close(root, sigma)
    blended = root * x0_from_noise(leaf, plain, alpha, sigma) + (1 - root) * leaf
    (gradient,) = torch.autograd.grad(symmetry(backbone.decode_latents(blended)), leaf)
    with torch.no_grad():
        usual = plain + SCALE * (backbone.predict_noise(latents, timestep, king) - plain)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(guided, usual + 30.0 * root * gradient, rtol=1e-4, atol=1e-5)
    assert not guided.requires_grad
    (edited,) = edit(task, 0)
    assert len(edited.history) == 2
    assert edited.history[1]["loss"] < edited.history[0]["loss"]
    torch.testing.assert_close(edited.latents, backbone.initial_latents([3])[0])
    # At no strength it is plain sampling.
    (unguided,) = edit(make(method="one_step", one_step_scale=0.0), 0)
    torch.testing.assert_close(unguided.edits[0], unguided.before, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(edited.edits[0], edited.before, atol=1e-3)


def test_no_guidance_is_plain_sampling(make):
    task = make(method="none")
    (edited,) = edit(task, 0)
    assert len(edited.history) == 1
    assert torch.equal(edited.edits[0], edited.before)
    assert task.strip_scales == {}


class BreaksAt(ImageGuidance):
    """A loss that is no number for one picture of two, at one step."""

    def forward(self, images, step=0):
        factors = torch.ones(len(images))
        factors[-1] = torch.nan if step == 2 else 1.0
        return factors * images.flatten(1).mean(dim=1)

    def loss(self, images):
        raise NotImplementedError


def test_a_loss_that_is_no_number_names_picture_and_step(make):
    with pytest.raises(UserError, match="picture '000-a-portrait-seed5' is nan at optimisation step 2; lower"):
        edit(make(guidances=[BreaksAt()]), 0, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidances": []}, r"model.guidances is empty"),
        ({"method": "best_of", "optimise_from": 334}, r"chooses among first latents"),
        ({"method": "best_of", "candidates": 0}, r"candidates must be at least 1, got 0"),
        ({"prompts": []}, r"set model.prompts, to generate pictures, or model.source"),
        ({"optimisation_steps": 0}, r"model.optimisation_steps must be at least 1, got 0"),
        ({"pictures_at_once": 0}, r"model.pictures_at_once must be at least 1"),
        ({"strip_images": -1}, r"model.strip_images must be at least 0"),
        ({"noise": -0.1}, r"model.noise must be at least 0"),
        ({"clip": 0.0}, r"model.clip must be above 0"),
        ({"momentum": 1.0}, r"model.momentum must be at least 0 and less than 1"),
        ({"grad_scale": float("nan")}, r"model.grad_scale must be a finite number"),
        ({"optimise_from": 500}, r"model.optimise_from 500 is not among the 3 steps; take 334 or 667"),
        ({"judge_label": "pirate"}, r"model.judge_label is 'pirate' without a judge"),
    ],
)
def test_bad_settings(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


def test_bad_judges(make, tiny_models):
    guide, judge = (str(tiny_models / name) for name in ("guide", "judge"))
    guidances = [ClassGuidance(guide, "pirate")]
    for options, words in (
        ({"judge": judge}, "does not know what to look for; set model.judge_label"),
        ({"judge": judge, "judge_label": "pirat"}, "has no class 'pirat'"),
        ({"judge": f"{guide}/", "judge_label": "pirate"}, "a judge must be another model"),
    ):
        with pytest.raises(UserError, match=words):
            make(guidances=guidances, **options)


@pytest.fixture
def config(tiny_models, tmp_path):
    settings = {
        "model": {
            "class_path": "Doodl",
            "init_args": {
                "backbone": {
                    "class_path": "StableDiffusion",
                    "init_args": {"pretrained": str(tiny_models / "pipeline")},
                },
                "guidances": [{"class_path": "SymmetryGuidance"}],
                "prompts": ["a king"],
                "seeds": [1, 2, 3],
                "num_inference_steps": STEPS,
                "optimisation_steps": 2,
                "judge": str(tiny_models / "judge"),
                "judge_label": "wizard",
                "strip_images": 2,
            },
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "doodl.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


def test_predict_leaves_pictures_latents_and_losses(config, tmp_path, monkeypatch):
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

    # Whatever file of a picture is lost, that picture alone is made again, the same.
    optimised = []
    real = Doodl._optimise

    def counted(self, pictures, *arguments):
        optimised.extend(picture.name for picture in pictures)
        return real(self, pictures, *arguments)

    monkeypatch.setattr(Doodl, "_optimise", counted)
    before = {path: path.stat().st_mtime_ns for path in written}
    losses = (run / "losses" / f"{names[1]}.csv").read_text()
    (run / "losses" / f"{names[1]}.csv").unlink()
    (run / "latents" / f"{names[2]}.safetensors").unlink()
    main(["predict", "--config", config])
    assert optimised == names[1:]
    assert (run / "losses" / f"{names[1]}.csv").read_text() == losses
    changed = {path for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {run / "losses" / f"{names[1]}.csv", run / "latents" / f"{names[2]}.safetensors"}


def test_finished_pictures_stay_when_a_loss_is_no_number(config, tmp_path, capsys, monkeypatch):
    real = SymmetryGuidance.loss
    seen = []

    def breaks(self, images):
        seen.append(len(images))
        return real(self, images) * (torch.nan if len(seen) == 5 else 1.0)  # the second step of the second picture

    monkeypatch.setattr(SymmetryGuidance, "loss", breaks)
    error = error_of(["predict", "--config", config], capsys)
    assert "picture '000-a-king-seed2' is nan at optimisation step 1" in error
    run = tmp_path / "run"
    assert sorted(path.name for path in run.rglob("*seed*")) == sorted(
        f"000-a-king-seed1.{suffix}" for suffix in ("png", "png", "png", "csv", "safetensors")
    )
