import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDPMScheduler
from lightning.pytorch.plugins.precision import Precision
from PIL import Image
from safetensors import safe_open
from torch.nn import functional

from tests.tiny import tiny_classifier, write_image_config
from tokenlearn.data import ImageBatch
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.methods import Caso
from tokenlearn.methods.attributes import resolve_attributes
from tokenlearn.methods.edit_test import EditTest
from tokenlearn.models import StableDiffusion, TimmClassifier
from tokenlearn.tokens import load_embedding, save_embedding

LABELS = ["smile", "hat", "black", "brown", "red"]
TOKENS = ["<no-smile>", "<smile>", "<black>", "<brown>", "<red>"]
ATTRIBUTES = {"smile": None, "hair": ["black", "brown", "red"]}


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Classifiers of attributes, one to guide and one to judge."""
    folder = tmp_path_factory.mktemp("faces")
    for name in ("guide", "judge"):
        tiny_classifier(folder / name, LABELS, multi_label=True)
    return folder


@pytest.fixture
def make(tiny_models, faces):
    def task(total_batch_idx=0, rank=0, world_size=1, batches=(), class_names=None, **options):
        module = Caso(
            StableDiffusion(str(tiny_models / "pipeline")),
            str(faces / "guide"),
            **({"attributes": ATTRIBUTES, "judge": str(faces / "judge")} | options),
        )
        module.logged = {}
        module.log = lambda name, value, **options: module.logged.update({name: float(value)})
        module.trainer = SimpleNamespace(
            fit_loop=SimpleNamespace(total_batch_idx=total_batch_idx),
            global_rank=rank,
            world_size=world_size,
            global_step=0,
            loggers=[SimpleNamespace(log_metrics=lambda metrics, step: module.logged.update(metrics))],
            datamodule=SimpleNamespace(train_dataloader=lambda: list(batches), class_names=class_names or {}),
            precision_plugin=Precision(),
            strategy=SimpleNamespace(
                reduce_boolean_decision=lambda decision: decision,
                broadcast=lambda thing: thing,
                all_gather=lambda tensor, **options: tensor,
            ),
        )
        return module

    return task


def pictures(count=4, labels=None, seed=0):
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return ImageBatch(images, None, labels or {}, [f"{seed}-{index}.png" for index in range(count)])


def draws_of(module, count, shown=(-1, -1)):
    return [module._draw(position, shown, (4, 8, 8)) for position in range(count)]


def one_step(module, batch, draws, scale=10.0):
    """Clean latents, and those of one step written out."""
    backbone = module.backbone
    clean, predicted = backbone.encode_images(batch.images), []
    alphas_cumprod = DDPMScheduler.from_config(module.scheduler.config).alphas_cumprod
    for latents, draw in zip(clean, draws, strict=True):
        alpha_bar, timestep = alphas_cumprod[draw.timestep], torch.tensor(draw.timestep)
        token = module.attributes[draw.attribute].placeholders[draw.target]
        noisy = alpha_bar.sqrt() * latents[None] + (1 - alpha_bar).sqrt() * draw.noise[None]
        empty = backbone(noisy, timestep, backbone.encode_prompts([""]))
        wanted = backbone(noisy, timestep, backbone.encode_prompts([token]))
        noise = empty + scale * (wanted - empty)
        predicted.append((noisy - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt())
    return clean, torch.cat(predicted)


def log_probabilities(module, images, draws):
    """Of the class that was drawn for each picture."""
    outputs = module.classifier(images)
    chances = []
    for output, draw in zip(outputs, draws, strict=True):
        if draw.attribute == 0:  # no smile or smile
            chances.append(functional.logsigmoid(output[0] if draw.target == 1 else -output[0]))
        else:
            chances.append(output[2:5].log_softmax(dim=0)[draw.target])
    return torch.stack(chances)


def test_token_gradient_equals_a_plain_loop(make):
    module, batch = make(reconstruction_weight=0.3), pictures(8)
    draws = draws_of(module, 8)
    assert {draw.attribute for draw in draws} == {0, 1}
    loss = module.training_step(batch)
    loss.backward()
    ours = module.bank.vectors[0].grad.clone()

    module.bank.zero_grad()
    clean, predicted = one_step(module, batch, draws)
    editing = -log_probabilities(module, module.backbone.decode_latents(predicted), draws)
    expected = (editing + 0.3 * (predicted - clean).square().mean(dim=(1, 2, 3))).mean()
    expected.backward()
    reference = module.bank.vectors[0].grad
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert reference.abs().max() > 0
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))
    drawn = {draw.target + 2 * draw.attribute for draw in draws}
    assert set(ours.any(dim=1).nonzero().flatten().tolist()) == drawn
    assert module.logged["train/loss"] == pytest.approx(float(loss))


def test_a_step_evaluates_the_network_once_with_gradient_and_once_without(make):
    module, calls = make(), []
    module.backbone.register_forward_hook(
        lambda backbone, inputs, output: calls.append((len(inputs[0]), output.requires_grad))
    )
    module.training_step(pictures()).backward()
    assert calls == [(4, False), (4, True)]


@pytest.mark.parametrize("editing_loss", ["cross_entropy", "probability_error", "class_mean"])
def test_editing_losses(make, editing_loss):
    module, batch = make(editing_loss=editing_loss, training_guidance_scale=3.0), pictures(6)
    draws = draws_of(module, 6)
    module.training_step(batch)
    with torch.no_grad():
        clean, predicted = one_step(module, batch, draws, scale=3.0)
        images = module.backbone.decode_latents(predicted)
        chances = log_probabilities(module, images, draws)
        if editing_loss == "cross_entropy":
            expected = -chances
        elif editing_loss == "probability_error":
            expected = (1 - chances.exp()) ** 2
        else:  # without labelled data, the head's rows are the directions
            weight = module.classifier.head_weight
            hair = weight[2:5] - weight[2:5].mean(dim=0)
            directions = [[-weight[0], weight[0]], hair]
            wanted = torch.stack([directions[draw.attribute][draw.target] for draw in draws])
            expected = 1 - functional.cosine_similarity(module.classifier.features(images), wanted)
    assert module.logged["train/editing"] == pytest.approx(float(expected.mean()), rel=1e-3)
    assert module.logged["train/reconstruction"] == pytest.approx(float((predicted - clean).square().mean()), rel=1e-3)


def test_pictures_that_show_the_class_already(make):
    plain = make()
    draws = draws_of(plain, 6)
    batch = pictures(6)
    with torch.no_grad():
        clean, predicted = one_step(plain, batch, draws)
        editing = -log_probabilities(plain, plain.backbone.decode_latents(predicted), draws)
        errors = (predicted - clean).square().mean(dim=(1, 2, 3))
        outputs = plain.classifier(batch.images)
    said = [int(outputs[row, 0] > 0) if draw.attribute == 0 else int(outputs[row, 2:5].argmax()) for row, draw in
            enumerate(draws)]  # fmt: skip
    # The first two pictures are labelled, with the target and with another class; the guide is asked about the rest.
    classes = [draws[0].target, 1 - min(draws[1].target, 1), -1, -1, -1, -1]
    labels = {"smile": torch.tensor(classes), "hair": torch.tensor(classes)}
    present = torch.tensor([True, False, *(said[row] == draws[row].target for row in range(2, 6))])
    module = make(skip_present=True)
    module.training_step(batch._replace(labels=labels))
    assert module.logged["train/editing"] == pytest.approx(float((editing * ~present).mean()), rel=1e-3)
    assert module.logged["train/reconstruction"] == pytest.approx(float(errors.mean()), rel=1e-3)
    module = make(reconstruct_present_only=True)
    module.training_step(batch._replace(labels=labels))
    assert module.logged["train/editing"] == pytest.approx(float(editing.mean()), rel=1e-3)
    assert module.logged["train/reconstruction"] == pytest.approx(float((errors * present).mean()), rel=1e-3)


def test_draws_depend_on_the_place_in_the_training_alone(make):
    module = make(timesteps=(301, 305))
    assert list(make(total_batch_idx=3).sample_positions(4)) == [12, 13, 14, 15]
    ranks = [list(make(total_batch_idx=3, rank=rank, world_size=2).sample_positions(2)) for rank in range(2)]
    assert ranks == [[12, 13], [14, 15]]
    many = draws_of(module, 300)
    assert {(draw.attribute, draw.target) for draw in many} == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}
    assert {draw.timestep for draw in many} == set(range(301, 306))
    noise = torch.stack([draw.noise for draw in many])
    assert noise.std() == pytest.approx(1, abs=0.02)
    again, other = draws_of(module, 8)[7], draws_of(make(seed=1), 8)[7]
    assert torch.equal(again.noise, many[7].noise)
    assert not torch.equal(other.noise, many[7].noise)


def test_missing_targets_are_classes_that_the_picture_lacks_and_rare_classes_are_drawn_more(make):
    smile, hair = [0] * 9 + [1], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    labels = {"smile": torch.tensor(smile), "hair": torch.tensor(hair)}
    module = make(targets="missing", batches=[pictures(10, labels)])
    module.on_fit_start()
    smiling = draws_of(module, 400, (1, 2))
    assert {(draw.attribute, draw.target) for draw in smiling} == {(0, 0), (1, 0), (1, 1)}
    # One picture of ten smiles, which makes it five times as rare as one of two; three of ten have hair 2.
    weights = 10 / (2 * 1), 10 / (3 * 3)
    share = sum(draw.attribute == 0 for draw in smiling) / 400
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.06)
    serious = draws_of(module, 400, (0, 2))
    assert {(draw.attribute, draw.target) for draw in serious} == {(0, 1), (1, 0), (1, 1)}
    assert sum(draw.attribute == 0 for draw in serious) / 400 == pytest.approx(1 / 3, abs=0.06)
    unknown = draws_of(module, 400)
    assert {(draw.attribute, draw.target) for draw in unknown} == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}
    assert sum(draw.attribute == 0 for draw in unknown) / 400 == pytest.approx(1 / 2, abs=0.07)


def test_training_draws_what_the_labels_of_its_pictures_lack(make):
    labels = {"smile": torch.tensor([1, 0, 1, 0]), "hair": torch.tensor([0, 1, 2, 0])}
    module = make(targets="missing", editing_loss="cross_entropy")
    seen = []
    one_step_edit = module.one_step_edit
    module.one_step_edit = lambda noisy, steps, tokens, rest: (
        seen.extend(tokens) or one_step_edit(noisy, steps, tokens, rest)
    )
    module.training_step(pictures(4, labels))
    for row, token in enumerate(seen):
        shown = {TOKENS[int(labels["smile"][row])], TOKENS[2 + int(labels["hair"][row])]}
        assert token not in shown


@pytest.mark.parametrize("every", [1, 3])
def test_preservation_is_how_far_labels_move_that_were_not_drawn(make, every):
    batch = pictures(6)
    module = make(preservation_weight=0.5, reconstruction_weight=0.0, preservation_every=every)
    draws = draws_of(module, 6)
    with torch.no_grad():
        _, predicted = one_step(module, batch, draws)
        images = module.backbone.decode_latents(predicted)
        editing = -log_probabilities(module, images, draws).mean()
        _, unedited = one_step(module, batch, draws, scale=0.0)
        before, after = (module.classifier(module.backbone.decode_latents(x0)) for x0 in (unedited, predicted))
    own = [[label for label in range(5) if label not in ([2, 3, 4] if draw.attribute else [0])] for draw in draws]
    moved = [
        float((after[row, kept].sigmoid() - before[row, kept].sigmoid()).abs().mean()) for row, kept in enumerate(own)
    ]
    loss = module.training_step(batch)
    preservation = sum(moved[::every]) * every / 6
    assert preservation > 1e-6
    assert module.logged["train/preservation"] == pytest.approx(preservation, rel=1e-2)
    assert float(loss) == pytest.approx(float(editing) + 0.5 * preservation, rel=1e-3)


@torch.no_grad()
def test_inversion_takes_each_picture_to_its_own_timestep(make):
    module = make(noising="inversion", timesteps=(200, 420), num_inference_steps=10)
    assert module.timesteps == [201, 301, 401]
    latents = module.backbone.encode_images(pictures(3).images)
    noisy = module.noisy_latents(latents, torch.zeros_like(latents), torch.tensor([401, 201, 301]))
    scheduler = DDIMInverseScheduler.from_config(module.scheduler.config)
    scheduler.set_timesteps(10)
    for row, last in enumerate((401, 201, 301)):
        expected = latents[row : row + 1]
        for timestep in scheduler.timesteps[scheduler.timesteps <= last]:
            output = module.backbone(expected, timestep, module.backbone.encode_prompts([""]))
            expected = scheduler.step(output, timestep, expected).prev_sample
        torch.testing.assert_close(noisy[row], expected[0], rtol=1e-4, atol=1e-4)


def test_latents_come_from_wherever_the_batch_has_them(make):
    module, batch = make(), pictures(2)
    encoded = module.backbone.encode_images(batch.images)
    torch.testing.assert_close(module.clean_latents(batch), encoded)
    assert module.clean_latents(batch._replace(images=None, latents=encoded)) is encoded
    specified = ImageBatch(None, None, {}, ["a", "b"], ["a king", "a queen"], [3, 4])
    torch.testing.assert_close(module.clean_latents(specified), module.generate_latents(["a king", "a queen"], [3, 4]))


@torch.no_grad()
def test_validation_counts_edits_that_are_needed(make):
    module, batch = make(), pictures(6)
    shown = module.validation_step(batch, 0)
    correct, total = module.guided_accuracy.compute().unbind(dim=1)
    # Each picture has one class of each attribute, and is counted for the others.
    assert total[:2].sum() == 6
    assert total[2:].sum() == 2 * 6
    outputs = module.classifier(module.backbone.decode_latents(module.clean_latents(batch)).clamp(0, 1))
    assert total.tolist() == [
        *(int((outputs[:, 0] > 0).sum()), int((outputs[:, 0] <= 0).sum())),
        *(6 - int((outputs[:, 2:5].argmax(dim=1) == k).sum()) for k in range(3)),
    ]
    assert torch.equal(module.judged_accuracy.compute(), module.guided_accuracy.compute())  # twins here
    assert shown["rows"] == [row for row in ("picture", *TOKENS) for _ in range(4)]
    assert shown["images"].shape == (6 * 4, 3, 16, 16)
    assert module.validation_step(batch, 1) is None
    noisy = [module._always_the_same_noise(names, torch.zeros(2, 4, 8, 8))[0] for names in (["a", "b"], ["b", "c"])]
    assert torch.equal(noisy[0][1], noisy[1][0])
    module.on_validation_epoch_end()
    counted = total > 0
    assert module.logged["val/guided_accuracy"] == pytest.approx(float((correct[counted] / total[counted]).mean()))


def labelled_batches():
    smiles = [torch.tensor([0, 1, 1, -1]), torch.tensor([1, 0, 0, 1])]
    return [pictures(4, {"smile": smile, "age": smile}, seed) for seed, smile in enumerate(smiles)]


def test_class_means_of_labelled_pictures_are_the_directions(make):
    batches = labelled_batches()
    module = make(batches=batches)
    module.on_fit_start()
    features = module.classifier.features(torch.cat([batch.images for batch in batches]))
    smile = torch.cat([batch.labels["smile"] for batch in batches])
    means = torch.stack([features[smile == k].mean(dim=0) for k in (0, 1)])
    centre = features[smile >= 0].mean(dim=0)
    torch.testing.assert_close(module.directions[0], means - centre, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(module.centres[0], centre, rtol=1e-3, atol=1e-5)
    assert torch.equal(module.directions[1], module.attributes[1].directions)  # no labels of hair
    measures = ("within_class_variability", "equiangularity", "self_duality")
    assert set(module.logged) == {f"collapse/{measure}/smile" for measure in measures}
    assert 0 <= module.logged["collapse/self_duality/smile"] <= 2

    first_only = make(batches=batches, collapse_batches=1)
    first_only.on_fit_start()
    assert not torch.allclose(first_only.centres[0], module.centres[0])
    for other in (make(batches=batches, collapse_batches=0), make(batches=[pictures()])):
        other.on_fit_start()
        assert not other.logged
        assert torch.equal(other.directions[0], other.attributes[0].directions)


def test_a_class_without_pictures_leaves_the_head(make):
    module = make(batches=[pictures(2, {"smile": torch.tensor([1, 1])})])
    with pytest.warns(UserWarning, match="the guide's head stands in for the class means of 'smile': no image of cla"):
        module.on_fit_start()
    assert torch.equal(module.directions[0], module.attributes[0].directions)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_names": {"hair": ("brown", "black", "red")}}, r"classes of 'hair' are brown, black, red in the data"),
        ({"class_names": {"smile": ("a", "b", "c")}}, r"classes of 'smile' are a, b, c in the data and no smile, smi"),
        ({"batches": [pictures(2, {"smile": torch.tensor([0, 2])})]}, r"the data have class 2 of 'smile', whose 2"),
        ({"initialiser": "pull_back"}, r"initialiser 'pull_back' needs pictures, got none"),
    ],
    ids=["order", "number", "index", "no-pictures"],
)
def test_data_that_do_not_fit(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options).on_fit_start()


def test_other_names_of_the_same_classes_are_fine(make):
    make(class_names={"hair": ("Noir", "Brun", "Roux"), "smile": ("no", "yes")}).on_fit_start()


@pytest.mark.parametrize("initialiser", ["words", "pull_back", "vocabulary", "ridge"])
def test_initialisers(make, initialiser):
    module = make(batches=labelled_batches(), initialiser=initialiser, initialiser_step=0.5, initialiser_words=3)
    word = module.bank.vectors[0].detach().clone()
    module.on_fit_start()
    moved = module.bank.vectors[0].detach() - word
    table = module.backbone.text_encoders[0].get_input_embeddings().weight
    if initialiser == "words":
        assert not moved.any()
    elif initialiser == "pull_back":
        median = table.norm(dim=1).median()
        torch.testing.assert_close(moved.norm(dim=1), (0.5 * median).expand(5), rtol=1e-3, atol=1e-5)
        assert len({tuple(vector.tolist()) for vector in moved}) == 5
    elif initialiser == "vocabulary":
        assert all((table == vector).all(dim=1).any() for vector in module.bank.vectors[0])
    else:
        assert moved.any(dim=1).all()
    assert module.bank.vectors[0].requires_grad


def test_pull_back_goes_up_the_class_directions(make):
    batch = labelled_batches()[0]
    module = make(batches=[batch], initialiser="pull_back", initialiser_step=1e-2)

    @torch.no_grad()
    def components():
        """Mean component of edits with each token along its own direction."""
        noisy, timesteps = module._always_the_same_noise(batch.names, module.clean_latents(batch))
        empty, directions, found = module.unconditional_noise(noisy, timesteps), torch.cat(module.directions), []
        for token, direction in zip(module.tokens, directions, strict=True):
            predicted = module.one_step_edit(noisy, timesteps, [token] * 4, empty)
            features = module.classifier.features(module.backbone.decode_latents(predicted))
            found.append((features @ direction).mean())
        return torch.stack(found)

    with torch.no_grad():
        module._measure_collapse()
    before = components()
    module.on_fit_start()
    assert (components() > before).all()


def test_a_resumed_run_keeps_its_tokens(make):
    module = make(batches=labelled_batches(), initialiser="pull_back")
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    word = module.bank.vectors[0].detach().clone()
    module.on_fit_start()
    assert torch.equal(module.bank.vectors[0], word)
    assert module.logged


def test_attributes_of_a_classifier(faces):
    classifier = TimmClassifier(str(faces / "guide"))
    smile, hair = resolve_attributes({"smile": None, "hair": ["red", "black"]}, classifier, "<my-{}>")
    assert (smile.class_names, smile.placeholders) == (("no smile", "smile"), ("<my-no-smile>", "<my-smile>"))
    assert (hair.class_names, hair.placeholders) == (("red", "black"), ("<my-red>", "<my-black>"))
    outputs = torch.tensor([[-1.0, 0, 3, 0, 2], [1.0, 0, 1, 9, 2]])
    assert smile.class_index(outputs).tolist() == [0, 1]
    assert hair.class_index(outputs).tolist() == [1, 0]
    torch.testing.assert_close(smile.logits(outputs), torch.tensor([[0.0, -1], [0, 1]]))


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"smyle": None}, r"no class 'smyle'; did you mean 'smile'"),
        ({"hair": ["black", "blond"]}, r"no class 'blond'"),
        ({"hair": ["black"]}, r"attribute 'hair' has classes \['black'\]; name two or more"),
        ({"hair": ["black", "red", "black"]}, r"attribute 'hair' has classes .* each once"),
        (
            {"hair": ["black", "red"], "hat": ["hat", "red"]},
            r"attributes 'hair' and 'hat' both have the token '<red>'",
        ),
    ],
)
def test_attributes_that_a_classifier_does_not_have(faces, attributes, words):
    with pytest.raises(UserError, match=words) as raised:
        resolve_attributes(attributes, TimmClassifier(str(faces / "guide")))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attributes": {}}, r"model.attributes is empty"),
        ({"attributes": {"smile": None}, "placeholder": "<token>"}, r"both have the token '<token>'; let model.pla"),
        ({"template": "a smile"}, r"model.template 'a smile' must have exactly one"),
        ({"timesteps": 0}, r"model.timesteps must be from 1 to 999, .* got 0"),
        ({"timesteps": (500, 400)}, r"got \(500, 400\)"),
        ({"timesteps": 1000}, r"got 1000"),
        ({"timesteps": 410, "noising": "inversion"}, r"timesteps 410 has none .* 20 steps passes; take 401 or 451"),
        ({"collapse_batches": -1}, r"model.collapse_batches must be at least 0, got -1"),
        ({"reconstruction_weight": -0.1}, r"model.reconstruction_weight must be at least 0, got -0.1"),
        ({"reconstruction_weight": float("nan")}, r"got nan"),
        ({"initialiser_batches": 0}, r"model.initialiser_batches must be at least 1, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


@pytest.fixture
def config(tiny_models, faces, tmp_path, monkeypatch):
    """Write a config of labelled pictures, with changes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    smiles = [index % 2 == 0 for index in range(16)]
    # Bright ones smile: between classes that look alike, class means and what follows from them are mere rounding.
    pixels = [rng.integers(150 * smile, 150 * smile + 100, (20, 18, 3), dtype=np.uint8) for smile in smiles]
    datasets.Dataset.from_dict(
        {"image": [Image.fromarray(picture) for picture in pixels], "smile": smiles},
        features=datasets.Features({"image": datasets.Image(), "smile": datasets.Value("bool")}),
    ).save_to_disk(tmp_path / "faces")

    def write(name, model=None, data=None, trainer=None, **sections):
        options = {
            "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}},
            "classifier": str(faces / "guide"),
            "judge": str(faces / "judge"),
            "attributes": {"smile": None},
            "initialiser": "pull_back",
            "timesteps": [301, 501],
            "collapse_batches": 2,
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
    assert summary["embeddings"] == [str(run / "embeddings" / f"{name}.safetensors") for name in ("no-smile", "smile")]
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    kept = torch.load(best, weights_only=True)["state_dict"]["bank.vectors.0"]
    for row, path in enumerate(summary["embeddings"]):
        assert path in out
        with safe_open(path, "pt") as file:
            (key,) = file.keys()
            assert torch.equal(file.get_tensor(key), kept[row : row + 1])
            about = file.metadata()
        assert (about["method"], about["attribute"], about["class"]) == (
            "caso",
            "smile",
            ("no smile", "smile")[row],
        )
    pictures = {path.name for path in (run / "pictures").iterdir()}
    assert pictures == {"step-000002.png", "step-000004.png", "validation.png"}
    assert str(run / "pictures" / "validation.png") in out
    assert list(run.glob("events.out.tfevents*"))
    # A resumed run that improves on nothing still leaves files.
    main(["fit", "--config", config("more", trainer={"max_steps": 4}), "--ckpt_path", str(best)])
    assert (tmp_path / "more" / "embeddings" / "smile.safetensors").is_file()


def test_test_leaves_a_table_and_pictures(config, tmp_path, capsys):
    test = {
        "num_inference_steps": 5,
        "strengths": [1.0, 3.0],
        "strength": 3.0,
        "prompts": {"smile": "a smiling king", "hat": "a king"},
        "watched": ["black", "smile"],
        "combinations": [["smile", "hat"]],
    }
    model = {"attributes": {"smile": None, "hat": None}}
    data = {"test_images": 3, "transfer_images": 2}
    main(["fit", "--config", config("run", model | {"test": test}, data)])
    theirs = []
    for name in ("smile", "hat"):
        vectors = load_embedding(tmp_path / "run" / "embeddings" / f"{name}.safetensors").vectors
        about = {"class": name, "prompt": f"a <ti-{name}>"}
        theirs.append(str(save_embedding(tmp_path / f"{name}.safetensors", f"<ti-{name}>", vectors, about)))
    again = config("test", model | {"test": test | {"embeddings": theirs}}, data)
    main(["test", "--config", again, "--ckpt_path", str(tmp_path / "run" / "checkpoints" / "last.ckpt")])
    out, run = capsys.readouterr().out, tmp_path / "test"
    summary = json.loads((run / "summary.json").read_text())
    assert {"untouched_kept", "rank_correlation", "transfer_other_pictures", "combination_1_all"} <= summary.keys()
    for method in ("prompt_editing", "textual_inversion", "random_token"):
        assert 0 <= summary[f"{method}_untouched_kept"] <= 1
    with (run / "table.csv").open() as file:
        rows = {row["direction"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["smile", "hat", "other pictures", "smile + hat"]
    counted = {name: sum(int(row[f"{side}_images"] or 0) for side in ("add", "remove")) for name, row in rows.items()}
    assert counted == {"smile": 3, "hat": 3, "other pictures": 4, "smile + hat": 3}
    assert (run / "edits.png").is_file()
    assert (run / "table.png").is_file()
    assert "rank_correlation" in out
    wrong = model | {"test": test | {"prompts": {"hat": "a hat"}}}
    with pytest.raises(SystemExit):
        main(
            [
                "test",
                "--config",
                config("wrong", wrong, data),
                "--ckpt_path",
                str(run.parent / "run/checkpoints/last.ckpt"),
            ]
        )
    assert "model.test.prompts has nothing for class 'smile', only for hat; add it" in capsys.readouterr().err


def test_a_test_needs_a_judge_and_a_known_group(make):
    with pytest.raises(UserError, match=r"set model\.judge"):
        make(judge=None).on_test_start()
    with pytest.raises(UserError, match=r"no label 'style' \(model\.test\.group_column\), only none"):
        make(test=EditTest(group_column="style")).on_test_start()


def test_random_tokens_are_as_long_as_words_and_leave_the_learned_ones(make):
    module = make()
    learned = {token: module.bank.get(token)[0].clone() for token in TOKENS}
    conditions = module._test_conditions(EditTest())
    assert list(conditions) == ["caso", "random token"]
    assert [len(rows) for rows in conditions.values()] == [4, 4]
    ours, random = (conditions[method][0].present.prompt_embeds for method in conditions)
    assert not torch.allclose(ours, random)
    torch.testing.assert_close(module.backbone.encode_prompts(["<smile>"]).prompt_embeds, ours)
    for token, vectors in learned.items():
        assert torch.equal(module.bank.get(token)[0], vectors)
    for vectors in module._random_bank().vectors:
        low, high = module._norm_ranges[0]
        torch.testing.assert_close(vectors.norm(dim=1), torch.full((5,), (low + high) / 2))


def test_a_fit_without_validation_leaves_its_tokens(config, tmp_path):
    main(["fit", "--config", config("run", data={"validation_images": 0})])
    kept = load_embedding(tmp_path / "run" / "embeddings" / "smile.safetensors").vectors[0]
    assert torch.equal(kept, last_tokens(tmp_path / "run")[1:])


def test_killed_and_resumed_equals_uninterrupted(config, tmp_path):
    always = {"checkpoint": {"every_n_train_steps": 1, "monitor": None}}
    model = {"judge": None, "editing_loss": "class_mean"}
    data = {"batches_per_epoch": 3, "validation_images": 0}
    main(["fit", "--config", config("whole", model, data, {"max_steps": 5}, **always)])
    main(["fit", "--config", config("part", model, data, {"max_steps": 2}, **always)])
    last = str(tmp_path / "part" / "checkpoints" / "last.ckpt")
    main(["fit", "--config", config("rest", model, data, {"max_steps": 5}, **always), "--ckpt_path", last])
    assert not torch.equal(last_tokens(tmp_path / "part"), last_tokens(tmp_path / "whole"))
    assert torch.equal(last_tokens(tmp_path / "rest"), last_tokens(tmp_path / "whole"))


def test_two_processes_equal_one(config, tmp_path):
    data, trainer = {"validation_images": 2}, {"max_steps": 2}
    two = config("two", data=data | {"batch_size": 2}, trainer=trainer | {"devices": 2, "strategy": "ddp"})
    run = [sys.executable, "-m", "tokenlearn", "fit", "--config", two]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    main(["fit", "--config", config("one", data=data, trainer=trainer)])
    torch.testing.assert_close(last_tokens(tmp_path / "two"), last_tokens(tmp_path / "one"), rtol=0, atol=1e-4)
    figures = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert figures[0]["guided_accuracy"] == figures[1]["guided_accuracy"]
    assert len(list((Path(tmp_path) / "two" / "embeddings").iterdir())) == 2
