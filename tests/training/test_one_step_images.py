"""Class tokens that learn from images predicted in one step."""

import functools

import pytest
import torch
from torch.nn import functional

from tests.training.runs import fit, no_change, one_step
from tokenlearn.data import PromptDataModule
from tokenlearn.data.batches import PromptBatch
from tokenlearn.diffusion import EDICT, OneStep
from tokenlearn.errors import UserError
from tokenlearn.guidance import SEGA, SemanticEdit
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.training import ClassTokens, TrainingEdit

BATCH = PromptBatch(["a photo of a {}", "a portrait of a {}"], [3, 4], [0, 1], ["token", "token"])


@pytest.fixture
def make(backbone, tiny_models):
    def task(gradient=OneStep(0.25, 0.75, reuse=3), guidance=2.0, **options):  # noqa: B008 - frozen
        settings = {"sampling": Sampling(steps=4, guidance=7.0), "optimizer": no_change} | options
        guide = ClassifierLoss(str(tiny_models / "guide"))
        return ClassTokens(backbone, ["wizard", "pirate"], guide, gradient=gradient, guidance=guidance, **settings)

    return task


@pytest.fixture
def sampled(monkeypatch):
    """Seeds of the trajectories that are sampled."""
    seeds = []
    original = Pipeline.sample_trajectory

    def record(self, prompts, given, **options):
        seeds.append(list(given))
        return original(self, prompts, given, **options)

    monkeypatch.setattr(Pipeline, "sample_trajectory", record)
    return seeds


def test_the_gradient_equals_a_plain_loop(make):
    task = make(hard_classes=0.0)
    loss, gradient, _ = one_step(task, BATCH)
    pipeline = Pipeline(task.backbone, tokens=task.bank, sampling=Sampling(steps=4, guidance=2.0))
    prompts = task.prompts(BATCH)
    trajectory = pipeline.sample_trajectory(prompts, BATCH.seeds)
    indices = torch.randint(1, 3, (2,), generator=torch.Generator().manual_seed(3))
    rows = torch.arange(2)
    latents, timesteps = trajectory.latents[indices, rows], trajectory.timesteps[indices]
    with torch.enable_grad():
        empty = task.backbone(latents, timesteps, task.backbone.encode_prompts(["", ""]))
        named = task.backbone(latents, timesteps, pipeline.encode(prompts))
        predicted = empty + 2.0 * (named - empty)
        alphas = task.backbone.make_scheduler(None, 4).alphas_cumprod[timesteps][:, None, None, None]
        images = task.backbone.decode_latents((latents - (1 - alphas).sqrt() * predicted) / alphas.sqrt())
        classifier = task.objective.classifier
        targets = torch.tensor([classifier.label_index(name) for name in ("wizard", "pirate")])
        expected = functional.cross_entropy(classifier(images), targets)
    (reference,) = torch.autograd.grad(expected, [task.bank.vectors[0]])
    assert loss == pytest.approx(float(expected), rel=1e-4)
    assert reference.abs().max() > 0
    torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


@pytest.mark.parametrize(("negative_prompt", "rows"), [("", [4, 2, 2, 2]), ("a <wizard>", [4, 2, 2, 2, 2, 2])])
def test_what_does_not_change_is_not_evaluated_again(make, negative_prompt, rows, monkeypatch):
    """One step of sampling, then three batches of two images: the first has the tokens of the sampling."""
    sampling = Sampling(steps=4, guidance=7.0, negative_prompt=negative_prompt)
    optimizer = functools.partial(torch.optim.Adam, lr=0.05)
    task = make(OneStep(0.0, 0.25, reuse=3), sampling=sampling, optimizer=optimizer)
    evaluated = []
    original = type(task.backbone).__call__

    def count(backbone, latents, timesteps, conditioning):
        evaluated.append(len(conditioning))
        return original(backbone, latents, timesteps, conditioning)

    monkeypatch.setattr(type(task.backbone), "__call__", count)
    fit(task, [BATCH], max_steps=3)
    assert evaluated == rows


def test_latents_serve_for_several_batches(make, sampled):
    batches = [BATCH._replace(seeds=[2 * step, 2 * step + 1]) for step in range(7)]
    fit(make(), batches, max_steps=7)
    assert sampled == [[0, 1], [6, 7], [12, 13]]


def test_hard_classes_have_more_images(make):
    """With one class at a loss of 0, all images of the next latents are of the other one."""
    task = make(OneStep(0.0, 0.25, reuse=1), hard_classes=1.0)
    task.hard_classes.restore({"losses": [0.0, 2.0], "images": [200.0, 200.0]})
    fit(task, [BATCH], max_steps=1)
    easy, hard = task.hard_classes.losses.tolist()
    assert easy == 0
    assert hard != 2
    assert task.hard_classes.images.tolist() == [200, 202]
    assert task._one_step.source.class_indices == [1, 1]


def test_a_token_learns(make):
    gradient = OneStep(0.0, 0.5, reuse=2)
    task = make(gradient, guidance=7.0, optimizer=lambda params: torch.optim.Adam(params, lr=0.5))
    before, _, _ = one_step(make(gradient, guidance=7.0), BATCH)
    fit(task, [BATCH], max_steps=20)
    after = make(gradient, guidance=7.0)
    after.bank.load_state_dict(task.bank.state_dict())
    learned, _, _ = one_step(after, BATCH)
    assert learned < before - 1e-4


def test_nothing_is_learned_at_learning_rate_0(make):
    task = make()
    start = task.bank.vectors[0].detach().clone()
    fit(task, [BATCH], max_steps=4)
    assert torch.equal(task.bank.vectors[0], start)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_killed_and_resumed_equals_uninterrupted(make, sampled, tmp_path, stop):
    def run(steps, name, **options):
        task = make(optimizer=lambda params: torch.optim.Adam(params, lr=0.05))
        data = PromptDataModule(["a photo of a {}"], batch_size=2, batches_per_epoch=4, validation_images=1)
        fit(task, data, max_steps=steps, folder=tmp_path / name, **options)
        return task.bank.vectors[0].detach().clone()

    whole = run(7, "whole")
    seeds_of_whole = list(sampled)
    part = run(stop, "part")
    assert not torch.equal(part, whole)
    sampled.clear()
    assert torch.equal(run(7, "rest", ckpt_path=str(tmp_path / "part" / "last.ckpt")), whole)
    assert all(seeds in seeds_of_whole for seeds in sampled)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"guidance": SEGA([SemanticEdit(concept="a hat", warmup_steps=1)])}, "OneStep.*depends on the steps before"),
        ({"solver": EDICT()}, "OneStep.*EDICT.*model.solver"),
    ],
)
def test_what_it_does_not_go_with(make, options, names):
    with pytest.raises(UserError, match=names):
        make(**options)


def test_edits_in_one_step_have_their_own_setting():
    with pytest.raises(UserError, match=r"edit\.gradient OneStep.*null"):
        TrainingEdit(gradient=OneStep())
