import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.nn import functional

import tokenlearn.progress
from tests.tiny import write_image_config
from tests.training.caso_tasks import (
    ATTRIBUTES,
    TOKENS,
    Faces,
    OfCleanImages,
    image_batch,
    labelled_batches,
    log_probabilities,
    one_step_edits,
    targets_of,
    tokens_of,
)
from tests.training.runs import Recorder, fit, no_change, one_step
from tokenlearn.diffusion import Checkpointed, LastK, Reversible
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierGuidance, ComposableGuidance
from tokenlearn.losses import CasoObjective
from tokenlearn.main import main
from tokenlearn.objectives import SymmetryLoss
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens import load_embedding, save_embedding
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training import Caso, Initialisation, TrainingEdit, adamw
from tokenlearn.training.caso_targets import named_noise


@pytest.fixture
def make(backbone, faces):
    """Make a task; unless told otherwise, its optimizer changes nothing."""

    def task(attributes=None, **settings):
        settings = {"judge": str(faces / "judge"), "optimizer": no_change} | settings
        return Caso(backbone, str(faces / "guide"), ATTRIBUTES if attributes is None else attributes, **settings)

    return task


def gradient_of(task, loss):
    return torch.autograd.grad(loss, task.bank.vectors[0])[0]


def assert_same_gradient(ours, expected):
    assert expected.abs().max() > 0
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_token_gradient_equals_a_plain_loop(make):
    task, batch = make(objective=CasoObjective(reconstruction_weight=0.3)), image_batch(8)
    targets = targets_of(task, batch)
    assert set(targets.attributes) == {0, 1}
    loss, gradient, logged = one_step(task, batch)

    clean, edited = one_step_edits(task, batch, targets)
    editing = -log_probabilities(task, task.backbone.decode_latents(edited), targets)
    expected = (editing + 0.3 * (edited - clean).square().mean(dim=(1, 2, 3))).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert logged["train/loss"] == pytest.approx(loss)
    assert_same_gradient(gradient, gradient_of(task, expected))
    learned = {TOKENS[row] for row in gradient.any(dim=1).nonzero().flatten()}
    assert learned == set(tokens_of(targets))


def test_a_rule_that_calls_the_model_itself_teaches_tokens(make):
    (loss, gradient, _), (expected_loss, expected, _) = (
        one_step(make(edit=TrainingEdit(guidance=guidance)), image_batch(8))
        for guidance in (OfCleanImages(10.0), 10.0)
    )
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert_same_gradient(gradient, expected)


def sampled_edits(task, batch, targets, steps, last):
    """Edits by DDIM from the noise level of each image on, of which the last steps are differentiated."""
    backbone, scheduler, edits = task.backbone, task.backbone.make_scheduler("DDIM"), []
    scheduler.set_timesteps(steps)
    clean = backbone.encode_images(batch.images)
    for row, token in enumerate(tokens_of(targets)):
        start = targets.timesteps[row]
        latents = scheduler.add_noise(clean[row, None], targets.noise[row, None], start[None])
        timesteps = scheduler.timesteps[scheduler.timesteps <= start]
        for index, timestep in enumerate(timesteps):
            if index == len(timesteps) - last:
                latents = latents.detach()
            empty, prompted = (backbone(latents, timestep, task.pipeline.encode([prompt])) for prompt in ("", token))
            latents = scheduler.step(empty + 3 * (prompted - empty), timestep, latents).prev_sample
        edits.append(latents)
    return clean, torch.cat(edits)


@pytest.mark.parametrize(("gradient", "last"), [(LastK(2), 2), (LastK(1), 1), (Checkpointed(), 10)])
def test_gradient_through_the_sampler_equals_a_plain_loop(make, gradient, last):
    edit = TrainingEdit(timesteps=(200, 620), guidance=3.0, gradient=gradient)
    task, batch = make(edit=edit, sampling=Sampling(steps=10)), image_batch(6)
    assert task.editor.timesteps == [201, 301, 401, 501, 601]
    targets = targets_of(task, batch)
    assert len(set(targets.timesteps.tolist())) > 2
    loss, found, _ = one_step(task, batch)

    clean, edited = sampled_edits(task, batch, targets, 10, last)
    editing = -log_probabilities(task, task.backbone.decode_latents(edited), targets)
    expected = (editing + 0.1 * (edited - clean).square().mean(dim=(1, 2, 3))).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert_same_gradient(found, gradient_of(task, expected))


@pytest.mark.parametrize("gradient", [None, LastK(2), Checkpointed()])
def test_training_lowers_the_loss(make, gradient):
    """On other images than those of the training; the tiny network hardly listens to its prompt."""
    edit = TrainingEdit(timesteps=601, guidance=3.0, gradient=gradient)
    task = make({"smile": None}, edit=edit, sampling=Sampling(steps=5))
    before = one_step(task, image_batch(32, seed=9))[0]
    task.optimizer = adamw
    fit(task, [image_batch(8, seed=seed) for seed in range(4)], max_steps=8)
    task.optimizer = no_change
    after = one_step(task, image_batch(32, seed=9))[0]
    assert after < before - 1e-4


def test_a_step_evaluates_the_network_once_with_gradient_and_once_without(make, backbone):
    task, calls = make(objective=CasoObjective(preservation_weight=0.5)), []
    hook = backbone.register_forward_hook(
        lambda backbone, inputs, output: calls.append((len(inputs[0]), output.requires_grad))
    )
    one_step(task, image_batch())
    hook.remove()
    assert calls == [(4, False), (4, True)]


def test_edits_under_another_rule(make):
    rule = ComposableGuidance([3.0, 2.0], concepts=["hat"])
    task, batch = make(edit=TrainingEdit(guidance=rule)), image_batch(6)
    targets = targets_of(task, batch)
    loss, gradient, _ = one_step(task, batch)
    clean, edited = one_step_edits(task, batch, targets, scale=3.0, concept_scale=2.0)
    editing = -log_probabilities(task, task.backbone.decode_latents(edited), targets)
    expected = (editing + 0.1 * (edited - clean).square().mean(dim=(1, 2, 3))).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert_same_gradient(gradient, gradient_of(task, expected))


@pytest.mark.parametrize("form", ["cross_entropy", "probability_error", "class_mean"])
def test_editing_losses(make, form):
    task, batch = make(objective=CasoObjective(form), edit=TrainingEdit(guidance=3.0)), image_batch(6)
    targets = targets_of(task, batch)
    _, _, logged = one_step(task, batch)
    with torch.no_grad():
        clean, edited = one_step_edits(task, batch, targets, scale=3.0)
        images = task.backbone.decode_latents(edited)
        values = log_probabilities(task, images, targets)
        if form == "cross_entropy":
            expected = -values
        elif form == "probability_error":
            expected = (1 - values.exp()) ** 2
        else:  # without labelled data, the head's rows are the directions
            weight = task.classifier.head_weight
            hair = weight[2:5] - weight[2:5].mean(dim=0)
            directions = [[-weight[0], weight[0]], hair]
            chosen = [directions[index][k] for index, k in zip(targets.attributes, targets.classes, strict=True)]
            expected = 1 - functional.cosine_similarity(task.classifier.features(images), torch.stack(chosen))
    assert logged["train/editing"] == pytest.approx(float(expected.mean()), rel=1e-3)
    assert logged["train/reconstruction"] == pytest.approx(float((edited - clean).square().mean()), rel=1e-3)


def test_images_that_show_the_class_already(make):
    plain, batch = make(), image_batch(6)
    targets = targets_of(plain, batch)
    with torch.no_grad():
        clean, edited = one_step_edits(plain, batch, targets)
        editing = -log_probabilities(plain, plain.backbone.decode_latents(edited), targets)
        errors = (edited - clean).square().mean(dim=(1, 2, 3))
        logits = plain.classifier(batch.images)
    predicted = [int(logits[row, 0] > 0) if attribute == 0 else int(logits[row, 2:5].argmax())
                 for row, attribute in enumerate(targets.attributes)]  # fmt: skip
    # The first two images are labelled, with the target and with another class; the classifier decides for the others.
    chosen = targets.classes.tolist()
    classes = [chosen[0], 1 - min(chosen[1], 1), -1, -1, -1, -1]
    labels = {"smile": torch.tensor(classes), "hair": torch.tensor(classes)}
    present = torch.tensor([True, False, *(predicted[row] == chosen[row] for row in range(2, 6))])
    labelled = batch._replace(labels=labels)
    _, _, logged = one_step(make(objective=CasoObjective(skip_present=True)), labelled)
    assert logged["train/editing"] == pytest.approx(float((editing * ~present).mean()), rel=1e-3)
    assert logged["train/reconstruction"] == pytest.approx(float(errors.mean()), rel=1e-3)
    _, _, logged = one_step(make(objective=CasoObjective(reconstruct_present_only=True)), labelled)
    assert logged["train/editing"] == pytest.approx(float(editing.mean()), rel=1e-3)
    assert logged["train/reconstruction"] == pytest.approx(float((errors * present).mean()), rel=1e-3)


def test_each_step_has_choices_of_its_own(make):
    task, batches, recorder = (
        make(edit=TrainingEdit(timesteps=(301, 305))),
        [image_batch(3), image_batch(3)],
        Recorder(),
    )
    fit(task, batches, max_steps=2, callbacks=[recorder])
    for step, gradient in enumerate(recorder.gradients):
        targets = targets_of(task, batches[step], first=3 * step)
        clean, edited = one_step_edits(task, batches[step], targets)
        editing = -log_probabilities(task, task.backbone.decode_latents(edited), targets)
        expected = (editing + 0.1 * (edited - clean).square().mean(dim=(1, 2, 3))).mean()
        assert_same_gradient(gradient, gradient_of(task, expected))
    assert not torch.allclose(*recorder.gradients)


def test_missing_targets_are_what_the_labels_of_images_lack(make):
    labels = {"smile": torch.tensor([1, 0, 1, 0]), "hair": torch.tensor([0, 1, 0, 1])}
    task, batch = make(targets="missing"), image_batch(4, labels)
    targets = targets_of(task, batch)
    assert not targets.present.any()
    _, gradient, _ = one_step(task, batch)
    learned = {TOKENS[row] for row in gradient.any(dim=1).nonzero().flatten()}
    assert learned == set(tokens_of(targets))


@pytest.mark.parametrize("every", [1, 3])
def test_preservation_is_how_far_labels_move_that_were_not_edited(make, every):
    batch = image_batch(6)
    objective = CasoObjective(reconstruction_weight=0.0, preservation_weight=0.5, preservation_every=every)
    task = make(objective=objective)
    targets = targets_of(task, batch)
    with torch.no_grad():
        _, edited = one_step_edits(task, batch, targets)
        images = task.backbone.decode_latents(edited)
        editing = -log_probabilities(task, images, targets).mean()
        _, unedited = one_step_edits(task, batch, targets, scale=0.0)
        before, after = (task.classifier(task.backbone.decode_latents(latents)) for latents in (unedited, edited))
    others = [[label for label in range(5) if label not in ([2, 3, 4] if index else [0])]
              for index in targets.attributes]  # fmt: skip
    moved = [float((after[row, other].sigmoid() - before[row, other].sigmoid()).abs().mean())
             for row, other in enumerate(others)]  # fmt: skip
    loss, _, logged = one_step(task, batch)
    preservation = sum(moved[::every]) * every / 6
    assert preservation > 1e-6
    assert logged["train/preservation"] == pytest.approx(preservation, rel=1e-2)
    assert loss == pytest.approx(float(editing) + 0.5 * preservation, rel=1e-3)


@torch.no_grad()
def test_validation_counts_edits_that_are_needed(make):
    task, batch = make(), image_batch(6)
    sheet = task.validation_step(batch, 0)
    correct, total = task.guided_accuracy.compute().unbind(dim=1)
    # Each image has one class of each attribute, and is counted for the others.
    assert total[:2].sum() == 6
    assert total[2:].sum() == 2 * 6
    before = task.backbone.decode_latents(task.clean_latents(batch)).clamp(0, 1)
    for classifier, accuracy in ((task.classifier, task.guided_accuracy), (task.judge, task.judged_accuracy)):
        logits = classifier(before)
        assert accuracy.compute()[:, 1].tolist() == [
            *(int((logits[:, 0] > 0).sum()), int((logits[:, 0] <= 0).sum())),
            *(6 - int((logits[:, 2:5].argmax(dim=1) == k).sum()) for k in range(3)),
        ]
    assert sheet["rows"] == [row for row in ("image", *TOKENS) for _ in range(4)]
    assert sheet["images"].shape == (6 * 4, 3, 16, 16)
    assert task.validation_step(batch, 1) is None
    logged = {}
    task.log = lambda name, value, **options: logged.update({name: float(value)})
    counted = total > 0
    task.on_validation_epoch_end()
    assert logged["val/guided_accuracy"] == pytest.approx(float((correct[counted] / total[counted]).mean()))


@torch.no_grad()
def test_validation_evaluates_the_network_once_for_each_token_and_once_without(make, backbone):
    task, calls = make(), []
    hook = backbone.register_forward_hook(lambda backbone, inputs, output: calls.append(len(inputs[0])))
    task.validation_step(image_batch(3), 0)
    hook.remove()
    assert calls == [3] * (1 + len(TOKENS))


def test_class_means_are_measured_before_the_training(make):
    task, batches = make(), labelled_batches()
    fit(task, Faces(batches))
    smile, hair = task.class_means
    assert smile.counts.tolist() == [3, 4]
    assert torch.equal(hair.directions, task.attributes[1].directions)  # no labels of hair

    first_only = make(initialisation=Initialisation(collapse_batches=1))
    fit(first_only, Faces(batches))
    assert first_only.class_means[0].counts.tolist() == [1, 2]
    assert not torch.allclose(first_only.class_means[0].global_mean, smile.global_mean)
    for initialisation, data in ((Initialisation(collapse_batches=0), batches), (Initialisation(), [image_batch()])):
        other = make(initialisation=initialisation)
        fit(other, Faces(data))
        assert torch.equal(other.class_means[0].directions, other.attributes[0].directions)


@pytest.mark.parametrize(
    ("options", "data", "words"),
    [
        ({}, Faces([], {"hair": ("brown", "black", "red")}), r"'hair' are brown, black, red .* data\.labels\.classes"),
        ({}, Faces([], {"smile": ("a", "b", "c")}), r"'smile' are a, b, c .* no smile, smile"),
        ({}, Faces([image_batch(2, {"smile": torch.tensor([0, 2])})]), r"class 2 of 'smile', whose 2"),
        ({"initialisation": Initialisation("pull_back")}, [image_batch()], r"'pull_back' .* images"),
    ],
    ids=["order", "number", "index", "no-images"],
)
def test_data_that_do_not_fit(make, options, data, words):
    with pytest.raises(UserError, match=words):
        fit(make(**options), data)


def test_other_names_of_the_same_classes_are_fine(make):
    names = {"hair": ("Noir", "Brun", "Roux"), "smile": ("no", "yes")}
    fit(make(), Faces([image_batch()], names))


@pytest.mark.parametrize("kind", ["words", "pull_back", "vocabulary", "ridge"])
def test_initialisers(make, kind):
    task = make(initialisation=Initialisation(kind, step=0.5, words=3))
    word = task.bank.vectors[0].detach().clone()
    fit(task, Faces(labelled_batches()))
    moved = task.bank.vectors[0].detach() - word
    table = task.backbone.text_encoders[0].get_input_embeddings().weight
    if kind == "words":
        assert not moved.any()
    elif kind == "pull_back":
        median = table.norm(dim=1).median()
        torch.testing.assert_close(moved.norm(dim=1), (0.5 * median).expand(5), rtol=1e-3, atol=1e-5)
        assert len({tuple(vector.tolist()) for vector in moved}) == 5
    elif kind == "vocabulary":
        assert all((table == vector).all(dim=1).any() for vector in task.bank.vectors[0])
    else:
        assert moved.any(dim=1).all()
    assert task.bank.vectors[0].requires_grad


def test_the_start_shows_progress(make, capsys, monkeypatch):
    monkeypatch.setattr(tokenlearn.progress, "INTERVAL", 0.0)
    initialisation = Initialisation("ridge", words=3)
    fit(make(initialisation=initialisation), Faces(labelled_batches()), enable_progress_bar=True)
    assert "Starting tokens" in capsys.readouterr().err
    fit(make(initialisation=initialisation), Faces(labelled_batches()))
    assert "Starting tokens" not in capsys.readouterr().err


def test_pull_back_goes_up_the_class_directions(make):
    batch = labelled_batches()[0]
    task = make(initialisation=Initialisation("pull_back", step=1e-2))
    unmoved = make()
    fit(task, Faces([batch]))
    directions = torch.cat([means.directions for means in task.class_means])

    @torch.no_grad()
    def components(of):
        """Mean component of edits with each token along the direction of its class."""
        latents, timesteps = of.clean_latents(batch), torch.full((4,), 401)
        noisy = of.editor.noised(latents, named_noise(batch.names, latents.shape[1:]), timesteps)
        edits, found = of.editor.edits(noisy, timesteps), []
        for token, direction in zip(of.placeholders, directions, strict=True):
            features = of.classifier.features(of.backbone.decode_latents(edits.edited([token] * 4)))
            found.append((features @ direction).mean())
        return torch.stack(found)

    assert (components(task) > components(unmoved)).all()


def test_a_resumed_run_keeps_its_tokens(make):
    task = make(initialisation=Initialisation("pull_back"))
    checkpoint = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    task.on_load_checkpoint(checkpoint)
    word = task.bank.vectors[0].detach().clone()
    fit(task, Faces(labelled_batches()))
    assert torch.equal(task.bank.vectors[0], word)
    assert task.class_means[0].counts is not None


def test_tokens_start_from_words_and_files(make, tmp_path):
    task = make(tokens=TokenSettings(initial_words="a {}"))
    assert torch.equal(task.bank.get("<smile>")[0], task.vectors_of("a smile")[0])
    assert torch.equal(task.bank.get("<red>")[0], task.vectors_of("a red")[0])
    vectors = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    file = str(save_embedding(tmp_path / "red.safetensors", "<red>", [vectors], {}))
    task = make(tokens=TokenSettings(initial_embeddings=file), initialisation=Initialisation("pull_back"))
    fit(task, Faces(labelled_batches()))
    assert torch.equal(task.bank.get("<red>")[0], vectors)
    assert not torch.equal(task.bank.get("<smile>")[0], task.vectors_of("a")[0])


def test_tokens_say_where_they_come_from(make):
    task = make(template="a photo of a {}", objective=CasoObjective("class_mean"))
    about = task.token_metadata()["<no-smile>"]
    assert (about["method"], about["attribute"], about["class"]) == ("caso", "smile", "no smile")
    assert about["prompt"] == "a photo of a <no-smile>"
    settings = json.loads(about["config"])
    assert (settings["editing_loss"], settings["timesteps"]) == ("class_mean", [401, 401])
    assert (settings["guidance"], settings["initialisation"]) == (10.0, "words")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: {"attributes": {}}, r"model\.attributes"),
        (lambda: {"attributes": {"smile": None}, "tokens": TokenSettings("<token>")}, r"'<token>'.*placeholder"),
        (lambda: {"template": "a smile"}, r"model\.template 'a smile'"),
        (lambda: {"seed": -1}, r"model\.seed .* -1"),
        (lambda: {"tokens": TokenSettings(initial_words=None)}, r"initial_words .*initialisation\.kind"),
        (
            lambda: {"tokens": TokenSettings(initial_words="{}"), "initialisation": Initialisation("ridge")},
            r"initial_words '\{\}' .*ridge",
        ),
        (lambda: {"edit": TrainingEdit(timesteps=0)}, r"edit\.timesteps .* 1 to 999, .* 0$"),
        (lambda: {"edit": TrainingEdit(timesteps=(500, 400))}, r"edit\.timesteps .*\(500, 400\)"),
        (lambda: {"edit": TrainingEdit(timesteps=1000)}, r"edit\.timesteps .* 1000"),
        (lambda: {"edit": TrainingEdit(410, "inversion")}, r"edit\.timesteps 410 .* 20 .* 401 or 451"),
        (lambda: {"edit": TrainingEdit(410, gradient=LastK())}, r"edit\.timesteps 410 .* 20 .* 401 or 451"),
        (lambda: {"edit": TrainingEdit(gradient=Reversible())}, r"model\.edit\.gradient Reversible .*model\.sampling"),
        (
            lambda: {"edit": TrainingEdit(guidance=ClassifierGuidance(SymmetryLoss(), scale=1.0))},
            r"edit\.guidance ClassifierGuidance",
        ),
        (
            lambda: {"edit": TrainingEdit(guidance=ComposableGuidance([3.0, 1.0], concepts=["<wink>"]))},
            r"'<wink>'.*<no-smile>",
        ),
        (lambda: {"initialisation": Initialisation(collapse_batches=-1)}, r"collapse_batches .* -1"),
        (lambda: {"initialisation": Initialisation(batches=0)}, r"initialisation\.batches .* 0"),
        (lambda: {"initialisation": Initialisation(words=0)}, r"initialisation\.words .* 0"),
    ],
)
def test_bad_settings(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options())


def test_a_judge_is_another_classifier(make, faces):
    with pytest.raises(UserError, match=r"model\.judge '.*guide' .*model\.classifier"):
        make(judge=str(faces / "guide"))


@pytest.fixture
def config(tiny_models, faces, tmp_path, monkeypatch):
    """Write a config of labelled images, with changes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    smiles = [index % 2 == 0 for index in range(16)]
    # Bright images smile: between classes that look alike, class means and their consequences are mere rounding.
    pixels = [rng.integers(150 * smile, 150 * smile + 100, (20, 18, 3), dtype=np.uint8) for smile in smiles]
    datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "smile": smiles},
        features=datasets.Features({"image": datasets.Image(), "smile": datasets.Value("bool")}),
    ).save_to_disk(tmp_path / "faces")

    def write(name, model=None, data=None, trainer=None, **sections):
        options = {
            "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}},
            "classifier": str(faces / "guide"),
            "judge": str(faces / "judge"),
            "attributes": {"smile": None},
            "initialisation": {"kind": "pull_back", "collapse_batches": 2},
            "edit": {"timesteps": [301, 501]},
        }
        settings = {"class_path": "Caso", "init_args": options | (model or {})}
        return write_image_config(tmp_path, name, settings, data, trainer, **sections)

    return write


def last_tokens(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["bank.vectors.0"]


def test_fit_leaves_everything_that_it_names(config, tmp_path, capsys):
    main(["fit", "--config", config("run")])
    run, out = tmp_path / "run", capsys.readouterr().out
    assert out.strip().splitlines()[-1] == str(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() == {"guided_accuracy", "judged_accuracy", "minutes", "embeddings"}
    assert all(isinstance(summary[name], float) for name in ("guided_accuracy", "judged_accuracy", "minutes"))
    assert summary["embeddings"] == [
        str(run / "embeddings" / f"{name}-tl.safetensors") for name in ("no-smile", "smile")
    ]
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    vectors = torch.load(best, weights_only=True)["state_dict"]["bank.vectors.0"]
    for row, path in enumerate(summary["embeddings"]):
        assert path in out
        with safe_open(path, "pt") as file:
            (key,) = file.keys()
            assert torch.equal(file.get_tensor(key), vectors[row : row + 1])
            about = file.metadata()
        assert (about["method"], about["attribute"], about["class"]) == ("caso", "smile", ("no smile", "smile")[row])
    sheets = {path.name for path in (run / "validation").iterdir()}
    assert sheets == {"step-000000.png", "step-000002.png", "step-000004.png", "final.png"}
    assert str(run / "validation" / "final.png") in out
    assert list(run.glob("events.out.tfevents*"))
    # A resumed run that improves on nothing still leaves files.
    main(["fit", "--config", config("more", trainer={"max_steps": 4}), "--ckpt_path", str(best)])
    assert (tmp_path / "more" / "embeddings" / "smile-tl.safetensors").is_file()


def test_a_config_names_gradient_guidance_and_objective(config, tmp_path):
    edit = {
        "timesteps": 601,
        "guidance": {"class_path": "ComposableGuidance", "init_args": {"scales": [3.0, 1.0], "concepts": ["hat"]}},
        "gradient": {"class_path": "LastK", "init_args": {"steps": 2}},
    }
    model = {
        "edit": edit,
        "objective": {"editing": "class_mean", "preservation_weight": 0.5},
        "sampling": {"steps": 5},
    }
    main(["fit", "--config", config("run", model, {"held_out": {"validation": 0, "test": 0}}, {"max_steps": 1})])
    about = load_embedding(tmp_path / "run" / "embeddings" / "smile-tl.safetensors").metadata
    settings = json.loads(about["config"])
    assert (settings["guidance"], settings["editing_loss"]) == ("ComposableGuidance", "class_mean")
    assert settings["gradient"] == str(LastK(2))


def test_a_fit_without_validation_leaves_its_tokens(config, tmp_path):
    main(["fit", "--config", config("run", data={"held_out": {"validation": 0, "test": 0}})])
    vectors = load_embedding(tmp_path / "run" / "embeddings" / "smile-tl.safetensors").vectors[0]
    assert torch.equal(vectors, last_tokens(tmp_path / "run")[1:])


def test_killed_and_resumed_equals_uninterrupted(config, tmp_path):
    always = {"checkpoint": {"every_n_train_steps": 1, "monitor": None}}
    model = {"judge": None, "objective": {"editing": "class_mean"}}
    data = {"batches_per_epoch": 3, "held_out": {"validation": 0, "test": 0}}
    main(["fit", "--config", config("whole", model, data, {"max_steps": 5}, **always)])
    main(["fit", "--config", config("part", model, data, {"max_steps": 2}, **always)])
    last = str(tmp_path / "part" / "checkpoints" / "last.ckpt")
    main(["fit", "--config", config("rest", model, data, {"max_steps": 5}, **always), "--ckpt_path", last])
    assert not torch.equal(last_tokens(tmp_path / "part"), last_tokens(tmp_path / "whole"))
    assert torch.equal(last_tokens(tmp_path / "rest"), last_tokens(tmp_path / "whole"))


def test_two_processes_equal_one(config, tmp_path):
    data, trainer = {"held_out": {"validation": 2, "test": 0}}, {"max_steps": 2}
    two = config("two", data=data | {"batch_size": 2}, trainer=trainer | {"devices": 2, "strategy": "ddp"})
    run = [sys.executable, "-m", "tokenlearn", "fit", "--config", two]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    main(["fit", "--config", config("one", data=data, trainer=trainer)])
    torch.testing.assert_close(last_tokens(tmp_path / "two"), last_tokens(tmp_path / "one"), rtol=0, atol=1e-4)
    figures = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert figures[0]["guided_accuracy"] == figures[1]["guided_accuracy"]
    assert len(list((tmp_path / "two" / "embeddings").glob("*.safetensors"))) == 2
