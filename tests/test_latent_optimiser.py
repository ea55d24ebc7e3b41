import pytest
import torch
from PIL import Image

from tokenlearn.diffusion import EDICT, OBELM, Checkpointed, Detached, LastK, Leapfrog, Reversible, Stored, sample
from tokenlearn.diffusion.latent_optimisation import LatentOptimisation
from tokenlearn.errors import UserError
from tokenlearn.guidance import (
    SEGA,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ComposableGuidance,
    GuidedModel,
    SafeGuidance,
    SafetySettings,
    SemanticEdit,
)
from tokenlearn.image_functions import optimise_latents
from tokenlearn.latent_optimiser import LatentOptimiser
from tokenlearn.losses.objective import Objective
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss, SymmetryLoss
from tokenlearn.pipeline import Pipeline, Sampling

STEPS, SCALE = 3, 3.0
TIMESTEPS = [667, 334, 1]
WARM = {"warmup_steps": 1, "momentum_scale": 0.3, "threshold": None}
SEMANTIC = SEGA([SemanticEdit(concept="a hat", scale=4.0, **WARM)], SCALE)


@pytest.fixture(scope="module")
def backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


@pytest.fixture
def make(backbone):
    def optimiser(guidance=SCALE, solver=None, objective=None, gradient=None, judge=None, **options):
        settings = {"steps": 3, "grad_scale": 500.0, "clip": 0.05}
        sampling = Sampling(STEPS, guidance, solver)
        return LatentOptimiser(
            Pipeline(backbone, sampling=sampling),
            objective or SymmetryLoss(),
            LatentOptimisation(**(settings | options)),
            gradient=gradient,
            judge=judge,
        )

    return optimiser


def optimise(optimiser, prompts=("a king",), seeds=(5,), **options):
    return optimiser.optimise(optimiser.from_prompts(prompts, seeds), **options)


def symmetry(images):
    return (images - images.flip(-1)).square().mean()


def plain_loop(backbone, latents, rule, *prompts):
    """A loop over diffusers' DDIM with everything in the graph, and a fresh rule."""
    scheduler = backbone.make_scheduler("DDIM")
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == TIMESTEPS
    rule = rule.fresh()
    encoded = rule.conditionings(*(backbone.encode_prompts([prompt]) for prompt in ("", *prompts)))
    for step, timestep in enumerate(scheduler.timesteps):
        needed = rule.needed(step)
        indices = range(len(encoded)) if needed is None else needed
        outputs = [backbone(latents, timestep, encoded[index]) for index in indices]
        latents = scheduler.step(rule(outputs, step), timestep, latents).prev_sample
    return backbone.decode_latents(latents)


RULES = {
    "classifier-free": (ClassifierFreeGuidance(SCALE), []),
    "semantic": (SEMANTIC, ["a hat"]),
    "composable": (ComposableGuidance([SCALE, -2.0], ["a hat"]), ["a hat"]),
    "safe": (SafeGuidance(SCALE, SafetySettings(50.0, 0.01, 1), "a hat"), ["a hat"]),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("gradient", [Checkpointed(), Stored(), LastK(STEPS)], ids=str)
def test_updates_descend_the_gradient_of_a_plain_loop_under_any_rule(make, backbone, name, gradient):
    rule, concepts = RULES[name]
    options = {"steps": 2, "clip": None, "grad_scale": 200.0, "noise": 0.0, "renormalise": None}
    found = optimise(make(rule, gradient=gradient, **options))
    latents, buffer, losses = backbone.initial_latents([5]), 0.0, []
    start = plain_loop(backbone, latents, rule, "a king", *concepts).detach().clamp(0, 1)
    for _ in range(2):
        leaf = latents.requires_grad_()
        loss = symmetry(plain_loop(backbone, leaf, rule, "a king", *concepts))
        losses.append(loss.item())
        (gradient_of_loop,) = torch.autograd.grad(loss, leaf)
        buffer = 0.9 * buffer + 200.0 * gradient_of_loop
        latents = (leaf - buffer).detach()
    final = plain_loop(backbone, latents, rule, "a king", *concepts).detach()
    moved = (latents - backbone.initial_latents([5])).abs().max()
    assert moved > 0.01  # otherwise the rest says nothing
    torch.testing.assert_close(found.latents, latents, rtol=0, atol=0.01 * moved.item())
    torch.testing.assert_close(found.before, start, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.after, final.clamp(0, 1), rtol=1e-3, atol=1e-3)
    (history,) = found.history
    assert [row["loss"] for row in history] == pytest.approx([*losses, symmetry(final).item()], rel=1e-3)
    assert [row["step"] for row in history] == [0, 1, 2]
    assert all(set(row) == {"step", "loss"} for row in history)


def test_rules_give_different_latents(make):
    found = [optimise(make(rule, noise=0.0)).latents for rule, _ in RULES.values()]
    for index, latents in enumerate(found):
        assert all(not torch.allclose(latents, other, atol=1e-3) for other in found[:index])


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [
        (None, Checkpointed()),
        ("DPMSolverMultistep", Checkpointed()),
        ("EulerAncestral", Stored()),
        (None, Detached()),
        (EDICT(), Reversible()),
        (Leapfrog(), Reversible()),
        (OBELM(), Reversible()),
    ],
    ids=str,
)
def test_the_loss_falls_at_the_norm_of_the_first_latents(make, backbone, solver, gradient):
    optimiser = make(solver=solver, gradient=gradient, steps=6)
    if not isinstance(gradient, Detached | Stored):
        assert make(solver=solver).gradient == gradient  # the default
    found = optimise(optimiser, ["a portrait"], [3], snapshots=[3])
    losses = [row["loss"] for row in found.history[0]]
    assert losses[-1] < 0.8 * losses[0]
    first = backbone.initial_latents([3])
    assert found.latents.norm().item() == pytest.approx(first.norm().item(), rel=1e-5)
    assert not torch.allclose(found.latents, first, atol=0.01)
    assert set(found.snapshots) == {0, 3, 6}
    assert torch.equal(found.snapshots[6], found.after)


@torch.no_grad()
def test_a_scheduler_that_adds_noise_adds_the_same_noise_every_time(make, backbone):
    optimiser = make(solver="EulerAncestral")
    start = optimiser.from_prompts(["a king", "a hat"], [5, 6])
    image = optimiser.generate(start, start.latents)
    assert torch.equal(optimiser.generate(start, start.latents), image)
    usual = Pipeline(backbone, sampling=Sampling(STEPS, SCALE, "EulerAncestral")).generate(["a king", "a hat"], [5, 6])
    torch.testing.assert_close(image, usual)


def test_images_do_not_depend_on_the_rest_of_the_batch(make):
    optimiser = make(noise=0.05)
    prompts, seeds = ["a portrait", "a portrait", "a king", "a king"], [3, 5, 3, 5]
    together = optimise(optimiser, prompts, seeds)
    for index in (1, 2):
        alone = optimise(optimiser, [prompts[index]], [seeds[index]])
        torch.testing.assert_close(together.latents[index], alone.latents[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.after[index], alone.after[0], rtol=1e-2, atol=1e-2)
        again = optimise(optimiser, [prompts[index]], [seeds[index]])
        assert torch.equal(again.latents, alone.latents)
    # The perturbation is there: without it the latents are others.
    unperturbed = optimise(make(noise=0.0), ["a portrait"], [5])
    assert (unperturbed.latents[0] - together.latents[1]).std() > 0.02


@torch.no_grad()
def test_later_latents_can_be_optimised(make, backbone):
    optimiser = make(from_timestep=334, steps=1, noise=0.0, renormalise=None, clip=0.01)
    found = optimise(optimiser, ["a portrait"], [3])
    rule = ClassifierFreeGuidance(SCALE)
    whole = plain_loop(backbone, backbone.initial_latents([3]), rule, "a portrait").clamp(0, 1)
    torch.testing.assert_close(found.before, whole, rtol=1e-3, atol=1e-3)
    prompts = [backbone.encode_prompts([prompt]) for prompt in ("", "a portrait")]
    solver = backbone.make_solver("DDIM", STEPS)
    latents = sample(GuidedModel(backbone, rule, prompts), found.latents, solver=solver, from_timestep=334)
    rest = backbone.decode_latents(latents).clamp(0, 1)
    torch.testing.assert_close(found.after, rest, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(rest, whole, atol=1e-4)
    assert make(from_timestep=667).from_timestep is None


def photo(size=(30, 20)):
    pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.byte().numpy())


@pytest.mark.parametrize("options", [{}, {"solver": Leapfrog(), "from_timestep": 334}], ids=["EDICT", "Leapfrog"])
def test_photos_are_inverted_exactly_and_optimised(backbone, options):
    small = {"renormalise": None, "noise": 0.0, "clip": 1e-5, "momentum": 0.0, "grad_scale": 500.0, "steps": 3}
    pipeline = Pipeline(backbone, sampling=Sampling(STEPS, SCALE, options.pop("solver", None)))
    found = optimise_latents(pipeline, objective=SymmetryLoss(), images=photo(), progress=False, **(small | options))
    (history,) = found.history
    losses = [row["loss"] for row in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.995 * losses[0]
    assert found.latents[0].shape == (2, 4, 8, 12)
    assert found.images[0].size == found.before[0].size == (30, 20)


@pytest.mark.parametrize("solver", [EDICT(), OBELM()], ids=str)
def test_both_latents_of_a_pair_are_perturbed_alike(make, solver):
    optimiser = make(solver=solver, steps=2, grad_scale=0.0, noise=0.3, renormalise=None)
    start = optimiser.from_images(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), [4, 5])
    moved = optimiser.optimise(start).latents - start.latents
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    noise = [torch.randn(2, 4, 8, 8, generator=generator).sum(dim=0) for generator in generators]
    torch.testing.assert_close(moved, 0.3 * torch.stack(noise)[:, None].expand_as(moved), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_step_zero_of_a_photo_is_the_autoencoder_of_it_unless_a_rule_guides(make, backbone):
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    round_trip = backbone.decode_latents(backbone.encode_images(image))
    for guidance, comes_back in ((SCALE, True), (SEMANTIC, False), (ClassifierFreeGuidance(SCALE), False)):
        optimiser = make(guidance, solver=Leapfrog())
        start = optimiser.from_images(image, [0], "a king")
        found = optimiser.generate(start, start.latents)
        assert torch.allclose(found, round_trip, atol=1e-3) == comes_back


def test_generated_images_come_as_pil_images_with_their_history(backbone):
    pipeline = Pipeline(backbone, sampling=Sampling(STEPS, SCALE))
    options = {"objective": [SymmetryLoss(weight=2.0), SymmetryLoss()], "progress": False, "steps": 2}
    found = pipeline.optimise("a king", seeds=[1, 2], batch_size=2, **options)
    assert [image.size for image in found.images] == [(16, 16)] * 2
    one = optimise_latents(pipeline, ["a king"], seeds=[2], **options)
    assert one.history[0][0]["loss"] == pytest.approx(found.history[1][0]["loss"], rel=1e-4)
    (usual,) = pipeline("a king", seeds=[2], solver="DDIM")
    assert one.before[0].tobytes() == usual.tobytes()


def test_a_judge_reports_its_confidence(make, tiny_models):
    guide, judge = (str(tiny_models / name) for name in ("guide", "judge"))
    objective = 2.0 * SymmetryLoss() + 0.5 * ClassifierLoss(guide, "pirate")
    judge = ClassifierLoss(judge, "wizard")
    optimiser = make(objective=objective, judge=judge, steps=1)
    images = torch.rand(2, 3, 16, 16)
    expected = 2 * SymmetryLoss().loss(images) + 0.5 * ClassifierLoss(guide, "pirate").loss(images)
    torch.testing.assert_close(optimiser.objective(images, 0), expected)
    found = optimise(optimiser)
    shares = judge.classifier(torch.cat([found.before, found.after])).softmax(dim=1)[:, 1]
    assert [row["judge"] for row in found.history[0]] == pytest.approx(shares.tolist(), rel=1e-3)
    with pytest.raises(UserError, match=r"judge .*guide"):
        make(objective=objective, judge=ClassifierLoss(f"{guide}/", "pirate"))
    with pytest.raises(UserError, match="ClassifierLoss"):
        make(objective=objective, judge=ClassifierLoss(str(tiny_models / "judge")))


class BreaksAt(Objective):
    """A loss that is not a number for one image of two, at one step."""

    def forward(self, images, step=0, targets=None):
        factors = torch.ones(len(images))
        factors[-1] = torch.nan if step == 2 else 1.0
        return factors * images.flatten(1).mean(dim=1)

    def loss(self, images, targets=None):
        raise NotImplementedError


def test_a_loss_that_is_not_a_number_names_image_and_step(make):
    with pytest.raises(UserError, match=r"'second' is nan at step 2"):
        optimise(make(objective=BreaksAt()), ["a king"] * 2, [1, 2], names=["first", "second"])


class Constant(Objective):
    """A loss that does not depend on the images."""

    def loss(self, images, targets=None):
        return torch.ones(len(images))


def test_a_loss_without_gradient_is_refused(make):
    with pytest.raises(UserError, match="no gradient"):
        optimise(make(objective=Constant()))


def test_gradients_that_do_not_reach_the_latents_are_refused(make):
    with pytest.raises(UserError, match=r"LastK .* 2 of 3 steps"):
        make(gradient=LastK(2))
    assert make(gradient=LastK(2), from_timestep=334).gradient == LastK(2)
    with pytest.raises(UserError, match=r"Checkpointed .* EDICT"):
        optimise(make(solver=EDICT(), gradient=Checkpointed()))
    with pytest.raises(UserError, match=r"sampling\.guidance ClassifierGuidance"):
        make(ClassifierGuidance(SymmetryLoss()))


def test_a_reversible_gradient_under_guidance_with_momentum_is_refused(make):
    with pytest.raises(UserError, match=r"Reversible .* momentum"):
        optimise(make(SEMANTIC, solver=Leapfrog()))
    without = SEGA([SemanticEdit(concept="a hat", warmup_steps=1, momentum_scale=0.0)], SCALE)
    for rule, gradient in ((SEMANTIC, Stored()), (without, None)):
        losses = [row["loss"] for row in optimise(make(rule, solver=Leapfrog(), gradient=gradient)).history[0]]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, r"steps .* 0"),
        ({"noise": -0.1}, r"noise .* -0.1"),
        ({"clip": 0.0}, r"clip .* 0.0"),
        ({"momentum": 1.0}, r"momentum .* 1.0"),
        ({"grad_scale": float("nan")}, r"grad_scale .* nan"),
        ({"renormalise": "norms"}, r"renormalise .*'norms'"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(UserError, match=rf"optimisation\.{words}"):
        LatentOptimisation(**options)


def test_bad_uses(make, backbone):
    with pytest.raises(UserError, match=r"optimisation.from_timestep 500 .*3 steps.* 334 or 667"):
        make(from_timestep=500)
    pipeline = Pipeline(backbone, sampling=Sampling(STEPS, SCALE, "DDIM"))
    with pytest.raises(UserError, match=r"'DDIM' .*EDICT"):
        optimise_latents(pipeline, objective=SymmetryLoss(), images=photo())
    with pytest.raises(UserError, match="nothing to optimise"):
        optimise_latents(pipeline, objective=SymmetryLoss())
