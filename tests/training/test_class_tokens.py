import json

import pytest
import torch
from torch.nn import functional

from tests.tiny_clip import tiny_clip
from tests.training.runs import fit, no_change, one_step, validate
from tokenlearn.data.batches import PromptBatch
from tokenlearn.diffusion import EDICT, OBELM, Checkpointed, Detached, LastK, Leapfrog, Reversible, Stored
from tokenlearn.errors import UserError
from tokenlearn.guidance import SEGA, ClassifierGuidance, SemanticEdit
from tokenlearn.models import ClipModel
from tokenlearn.objectives import ClassifierLoss, CLIPTextLoss, SymmetryLoss
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens.checkpoint import CHECKPOINT_KEY
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training import ClassTokens

BATCH = PromptBatch(["a photo of a {}", "a portrait of a {}"], [3, 4], [0, 1], ["token", "token"])
PROMPTS = ["a photo of a <wizard> wizard", "a portrait of a <pirate> pirate"]
CLASSES = {"wizard": "man with a hat", "pirate": None}


@pytest.fixture(scope="session")
def guide(tiny_models):
    return ClassifierLoss(str(tiny_models / "guide"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return ClipModel(str(tiny_clip(tmp_path_factory.mktemp("clip"))))


@pytest.fixture
def make(backbone, guide):
    """Make a task that takes the classes of its batches and whose optimizer changes nothing, unless a test asks."""

    def task(objective=guide, classes=CLASSES, guidance=3.0, **options):
        settings = {"sampling": Sampling(steps=4, guidance=guidance), "gradient": LastK(2), "optimizer": no_change}
        settings["hard_classes"] = 0.0
        return ClassTokens(backbone, classes, objective, **(settings | options))

    return task


def assert_close(found, reference):
    assert reference.abs().max() > 0
    torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


def sampled(task, last_steps, detach_inputs=False):
    """Images of the batch by a plain loop over DDIM's steps."""
    backbone, scheduler = task.backbone, task.backbone.make_scheduler(None, 4)
    scheduler.set_timesteps(4)
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    for index, timestep in enumerate(scheduler.timesteps):
        if index == 4 - last_steps:
            latents = latents.detach()
        inputs = latents.detach() if detach_inputs else latents
        empty = backbone(inputs, timestep, backbone.encode_prompts(["", ""]))
        prompt = backbone(inputs, timestep, backbone.encode_prompts(PROMPTS, task.bank))
        latents = scheduler.step(empty + 3.0 * (prompt - empty), timestep, latents).prev_sample
    return backbone.decode_latents(latents)


@pytest.mark.parametrize(
    ("gradient", "last_steps", "detach_inputs"),
    [
        (LastK(2), 2, False),
        (LastK(2, checkpointing=False), 2, False),
        (LastK(1), 1, False),
        (Checkpointed(), 4, False),
        (Stored(), 4, False),
        (Detached(), 4, True),
        (Detached(3, checkpointing=False), 3, True),
    ],
    ids=str,
)
def test_token_gradient_equals_a_plain_loop(make, gradient, last_steps, detach_inputs):
    task = make(gradient=gradient)
    loss, found, logged = one_step(task, BATCH)

    logits = task.objective.classifier(sampled(task, last_steps, detach_inputs))
    expected = functional.cross_entropy(logits, torch.tensor([1, 2]))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert logged == {
        "train/loss": pytest.approx(loss),
        "train/guided_accuracy": (logits.argmax(dim=1) == torch.tensor([1, 2])).float().mean().item(),
        "train/gradient_norm": pytest.approx(float(found.norm())),
        "train/learning_rate": 0.0,
    }
    (reference,) = torch.autograd.grad(expected, task.bank.vectors[0])
    assert_close(found, reference)


def test_the_full_gradient_is_that_of_all_last_steps(make):
    full, four, one = (
        one_step(make(gradient=gradient), BATCH)[1] for gradient in (Checkpointed(), LastK(4), LastK(1))
    )
    assert torch.equal(full, four)
    assert not torch.equal(full, one)


@pytest.mark.parametrize("solver", [EDICT(), Leapfrog(), OBELM()], ids=lambda solver: type(solver).__name__)
def test_tokens_learn_through_reversible_solvers(make, solver):
    rebuilt, stored = (one_step(make(gradient=way, solver=solver), BATCH)[1] for way in (Reversible(), Stored()))
    assert stored.abs().max() > 0
    # The rebuilt states are as far off as a round trip in float32.
    assert (rebuilt - stored).norm() < 0.01 * stored.norm()
    of_scheduler = one_step(make(gradient=Stored()), BATCH)[1]
    assert not torch.equal(stored, of_scheduler)


def test_the_solver_of_sampling_serves_training_too(make):
    leapfrog = Sampling(steps=4, guidance=3.0, solver=Leapfrog())
    ours = one_step(make(sampling=leapfrog, gradient=Reversible()), BATCH)[1]
    assert torch.equal(ours, one_step(make(solver=Leapfrog(), gradient=Reversible()), BATCH)[1])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"solver": EDICT(), "gradient": LastK(2)}, "LastK.*EDICT.*Reversible"),
        ({"gradient": Reversible()}, "Reversible.*EDICT.*Checkpointed"),
        (
            {
                "gradient": Reversible(),
                "solver": Leapfrog(),
                "sampling": Sampling(steps=4, guidance=SEGA([SemanticEdit(concept="hat", warmup_steps=1)])),
            },
            "Reversible.*SEGA.*Stored",
        ),
        (
            {"sampling": Sampling(steps=4, guidance=ClassifierGuidance(SymmetryLoss()))},
            r"model\.sampling\.guidance ClassifierGuidance",
        ),
    ],
)
def test_gradients_that_do_not_go_with_solver_or_guidance(make, options, names):
    with pytest.raises(UserError, match=names):
        make(**options)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_tokens_learn_under_semantic_guidance_and_as_its_concepts(make, checkpointing):
    edit = SemanticEdit(concept="hat - <wizard>", scale=4.0, threshold=None, warmup_steps=1, momentum_scale=0.5)
    task = make(guidance=SEGA([edit], guidance_scale=3.0), gradient=LastK(2, checkpointing))
    batch = PromptBatch(["a photo"], [3], [0], ["token"])  # only the concept contains the token
    found = one_step(task, batch)[1]

    backbone, scheduler = task.backbone, task.backbone.make_scheduler(None, 4)
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    momentum = torch.zeros_like(latents)
    for index, timestep in enumerate(scheduler.timesteps):
        if index == 2:
            latents, momentum = latents.detach(), momentum.detach()
        empty, prompt, plus, minus = (
            backbone(latents, timestep, backbone.encode_prompts([text], task.bank))
            for text in ("", "a photo", "hat", "<wizard>")
        )
        guidance = 4.0 * (plus - minus) + 0.5 * momentum
        momentum = 0.4 * momentum + 0.6 * guidance
        guided = empty + 3.0 * (prompt - empty) + (guidance if index >= 1 else 0)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    logits = task.objective.classifier(backbone.decode_latents(latents))
    (reference,) = torch.autograd.grad(functional.cross_entropy(logits, torch.tensor([1])), task.bank.vectors[0])
    assert_close(found, reference)


def test_concepts_may_only_have_the_tokens_of_the_task(make):
    with pytest.raises(UserError, match=r"<nurse>.*<wizard>, <pirate>"):
        make(guidance=SEGA([SemanticEdit(concept="<nurse>", warmup_steps=1)]))


def test_each_class_has_its_own_token(make):
    task = make()
    gradient = one_step(task, PromptBatch(["a photo of a {}"], [0], [0], ["token"]))[1]
    assert gradient[task.bank.rows("<wizard>")].abs().max() > 0
    assert gradient[task.bank.rows("<pirate>")].abs().max() == 0


def test_tasks_on_one_backbone_do_not_disturb_each_other(make):
    first = make(tokens=TokenSettings(initial_words="king"))
    alone = one_step(first, BATCH)
    second = make(classes=["pirate", "wizard"], tokens=TokenSettings(placeholder="<my-{}>", num_vectors=2))
    other = one_step(second, BATCH)
    assert first.pipeline.backbone is second.pipeline.backbone
    again = one_step(first, BATCH)
    assert (again[0], again[2]) == (alone[0], alone[2])
    assert torch.equal(again[1], alone[1])
    assert other[1].shape == (4, 16)
    assert torch.equal(one_step(second, BATCH)[1], other[1])


def adam(params):
    return torch.optim.Adam(params, lr=0.3)


def learned(task, steps=15):
    """Loss of the batch before and after training on it."""

    def loss():
        with torch.no_grad():
            images = task.pipeline.generate(task.prompts(BATCH), BATCH.seeds)
            return float(task.objective(images, targets=task.targets(BATCH)).mean())

    before = loss()
    fit(task, [BATCH], max_steps=steps)
    return before, loss()


def test_a_token_learns_from_a_clip(make, clip):
    task = make(CLIPTextLoss(clip, "a {}"), optimizer=adam)
    before, after = learned(task)
    assert after < 0.997 * before  # the images of a random model hardly change
    logged = validate(task, [BATCH])
    with torch.no_grad():
        images = task.pipeline.generate(PROMPTS, BATCH.seeds).clamp(0, 1)
        texts = clip.text_features(["a wizard", "a pirate"])
        cosine = (clip.image_features(images) * texts).sum(dim=1).mean()
        loss = task.objective(images, targets=["wizard", "pirate"]).mean()
    assert logged == {
        "val/guided_clip_similarity": pytest.approx(cosine.item(), abs=1e-5),
        "val/loss": pytest.approx(loss.item(), abs=1e-5),
    }
    assert task.monitor == ("val/loss", "min")


def test_a_token_learns_from_a_sum(make, guide, clip, tiny_models):
    judge = ClassifierLoss(str(tiny_models / "judge"))
    task = make([guide, 8 * CLIPTextLoss(clip, "a {}")], judge=judge, optimizer=adam)
    before, after = learned(task)
    assert after < 0.997 * before  # the images of a random model hardly change
    # The terms have no common score, so the loss alone is logged.
    logged = validate(task, [BATCH])
    with torch.no_grad():
        images = task.pipeline.generate(PROMPTS, BATCH.seeds).clamp(0, 1)
        terms = (
            guide(images, targets=["wizard", "pirate"]),
            CLIPTextLoss(clip, "a {}")(images, targets=["wizard", "pirate"]),
        )
    assert logged["val/loss"] == pytest.approx(float((terms[0] + 8 * terms[1]).mean()), rel=1e-4)
    assert logged.keys() == {"val/loss", "val/judged_accuracy"}
    assert task.monitor == ("val/loss", "min")


def test_validation_counts_classes_apart(make, tiny_models):
    task = make(judge=ClassifierLoss(str(tiny_models / "judge")))
    more = PromptBatch(["a {}"] * 3, [5, 6, 7], [0, 0, 0], ["token"] * 3)
    logged = validate(task, [BATCH, more])
    with torch.no_grad():
        images = [task.pipeline.generate(task.prompts(batch), batch.seeds).clamp(0, 1) for batch in (BATCH, more)]
        logits = torch.cat([task.objective.classifier(part) for part in images])

    def mean_over_classes(of_wizard, of_pirate):
        return float((of_wizard[[0, 2, 3, 4]].mean() + of_pirate[1]) / 2)

    accuracy = mean_over_classes(*((logits.argmax(dim=1) == index).float() for index in (1, 2)))
    loss = mean_over_classes(*(-logits.log_softmax(dim=1)[:, index] for index in (1, 2)))
    assert logged == {
        "val/guided_accuracy": accuracy,
        "val/judged_accuracy": accuracy,  # twins here
        "val/loss": pytest.approx(loss, rel=1e-5),
    }
    assert task.monitor == ("val/loss", "min")


def test_nothing_else_can_learn(make):
    task = make()
    trainable = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert trainable == {"bank.vectors.0"}
    assert {key.split(".")[0] for key in task.state_dict()} == {"bank"}
    optimized = task.configure_optimizers().param_groups[0]["params"]
    assert [id(parameter) for parameter in optimized] == [id(task.bank.vectors[0])]


@pytest.mark.parametrize("guiding", ["guide", "sum"])
def test_a_model_cannot_judge_itself(make, guide, tiny_models, guiding):
    objective = guide if guiding == "guide" else SymmetryLoss() + 2 * guide
    with pytest.raises(UserError, match=r"judge.*guide"):
        make(objective, judge=ClassifierLoss(f"{tiny_models}/../{tiny_models.name}/guide"))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"classes": {}}, r"model\.classes"),
        ({"classes": ["wizard", "nurse"]}, "nurse"),
        ({"tokens": TokenSettings(placeholder="<it>")}, r"wizard.*pirate.*<it>.*tokens\.placeholder"),
    ],
)
def test_bad_settings(make, options, names):
    with pytest.raises(UserError, match=names):
        make(**options)


def test_subject__kinds(make):
    task = make()
    assert task.subject("wizard", "name") == "wizard"
    assert task.subject("wizard", "token") == "<wizard> wizard"
    assert task.subject("wizard", "described") == "man with a hat"
    with pytest.raises(UserError, match=r"pirate.*description"):
        task.subject("pirate", "described")
    assert make(classes=["wizard"]).class_descriptions == {"wizard": None}


def test_embedding_files_say_how_the_token_was_learned(make, guide, clip, tiny_models):
    task = make(guide + CLIPTextLoss(clip, "a {}"), judge=ClassifierLoss(str(tiny_models / "judge")))
    about = task.token_metadata()["<wizard>"]
    assert about["objective"] == "ClassifierLoss + CLIPTextLoss"
    assert about["classifier"] == str(tiny_models / "guide")
    assert "judge" not in about
    assert (about["method"], about["class"], about["prompt"]) == ("class_tokens", "wizard", "<wizard> wizard")
    assert json.loads(about["config"]) == {
        "steps": 4,
        "guidance": 3.0,
        "solver": "DDIMScheduler",
        "negative_prompt": "",
        "training_solver": None,
        "training_guidance": 3.0,
        "gradient": "LastK(steps=2, checkpointing=True)",
        "initial_words": "a",
    }
    task.judged_accuracies["<wizard>"] = 0.5
    about = task.token_metadata()["<wizard>"]
    assert (about["judge"], about["judged_accuracy"]) == (str(tiny_models / "judge"), "0.5000")


def test_checkpoints_restore_tokens_and_their_words(make, tmp_path):
    task = make(tokens=TokenSettings(initial_words=None), optimizer=adam)
    task.started_from |= {"wizard": "king"}
    task.resumed = True  # no search
    fit(task, [BATCH], folder=tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {key for key in checkpoint["state_dict"] if key.startswith("bank.vectors")} == {"bank.vectors.0"}
    # An older version wrote other settings beside the words.
    old = {"num_inference_steps": 4, "guidance_scale": 3.0, "chain": "last_k", "initial_words": "king"}
    checkpoint[CHECKPOINT_KEY]["metadata"]["<wizard>"]["config"] = json.dumps(old)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for name in ("last", "old"):
        resumed = make(tokens=TokenSettings(initial_words=None), optimizer=adam)
        fit(resumed, [BATCH], max_steps=2, ckpt_path=str(tmp_path / f"{name}.ckpt"))
        assert resumed.started_from == {"wizard": "king", "pirate": "a"}
        assert not torch.equal(resumed.bank.vectors[0], make().bank.vectors[0])
