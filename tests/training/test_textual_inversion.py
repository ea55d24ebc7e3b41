import json
import zlib
from types import SimpleNamespace

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors import safe_open

from tests.tiny import tiny_pipeline, write_image_config
from tests.training.runs import Batches, fit, no_change, one_step, validate
from tokenlearn.data.batches import ImageBatch
from tokenlearn.data.interfaces import LabelledImages
from tokenlearn.errors import UserError
from tokenlearn.losses import MinSNR
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training import TextualInversion

ATTRIBUTES = {"smile": None, "hair": ["black", "brown", "red"]}
TOKENS = ["<no-smile>", "<smile>", "<black>", "<brown>", "<red>"]
LABELS = {"smile": torch.tensor([1, 0, -1, -1]), "hair": torch.tensor([-1, 2, 0, -1])}  # the last has none
UNLABELLED = {name: torch.full((4,), -1) for name in ATTRIBUTES}
CLASSES = list(zip(*(labels.tolist() for labels in LABELS.values()), strict=True))


@pytest.fixture
def make(backbone):
    """Make a task whose optimizer changes nothing."""

    def task(attributes=ATTRIBUTES, backbone=backbone, **options):
        settings = {"sampling": Sampling(steps=2, guidance=4.0), "optimizer": no_change}
        return TextualInversion(backbone, attributes, **(settings | options))

    return task


def image_batch(labels=None, count=4):
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return ImageBatch(images, None, LABELS if labels is None else labels, [f"{index}.png" for index in range(count)])


def samples_of(task, classes, start=0):
    rngs = [np.random.default_rng([task.seed, start + place]) for place in range(len(classes))]
    return [task.sample(rng, row, (4, 8, 8)) for rng, row in zip(rngs, classes, strict=True)]


def token_of(prompt):
    (token,) = (token for token in TOKENS if token in prompt)
    return token


def denoising_errors(task, images, samples):
    """Squared errors of what the network predicts, written out one by one, with the task's weights."""
    backbone, errors = task.backbone, []
    alphas_cumprod = DDPMScheduler.from_config(backbone.make_scheduler().config).alphas_cumprod
    for latents, sample in zip(backbone.encode_images(images), samples, strict=True):
        alpha_bar = alphas_cumprod[sample.timestep]
        noisy = alpha_bar.sqrt() * latents[None] + (1 - alpha_bar).sqrt() * sample.noise[None]
        conditioning = backbone.encode_prompts([sample.prompt], task.bank)
        output = backbone(noisy, torch.tensor(sample.timestep), conditioning)
        target, of_kind = sample.noise, 0
        if backbone.process.kind == "velocity":
            target, of_kind = alpha_bar.sqrt() * sample.noise - (1 - alpha_bar).sqrt() * latents, 1
        ratio = alpha_bar / (1 - alpha_bar)
        weight = 1 if task.weighting is None else min(ratio, task.weighting.gamma) / (ratio + of_kind)
        errors.append(weight * ((output[0] - target) ** 2).mean())
    return torch.stack(errors)


@pytest.mark.parametrize("weighting", [None, MinSNR(2.0)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_token_gradient_equals_a_plain_loop(make, backbone, tmp_path, prediction_type, weighting):
    if prediction_type != "epsilon":
        backbone = StableDiffusion(str(tiny_pipeline(tmp_path / "pipeline", prediction_type)))
    tokens = TokenSettings(num_vectors=2)
    task = make(backbone=backbone, templates=["a photo of {}", "{}"], tokens=tokens, weighting=weighting)
    batch, samples = image_batch(), samples_of(task, CLASSES)
    loss, found, logged = one_step(task, batch)

    expected = denoising_errors(task, batch.images, samples)[:3].mean()  # the last image has no label
    (reference,) = torch.autograd.grad(expected, task.bank.vectors[0])
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))
    chosen = [token_of(sample.prompt) for sample in samples[:3]]
    assert chosen[0] == "<smile>"
    assert chosen[1] in ("<no-smile>", "<red>")
    assert chosen[2] == "<black>"
    assert {token for token in TOKENS if found[task.bank.rows(token)].any()} == set(chosen)
    assert logged == {
        "train/loss": pytest.approx(loss),
        "train/gradient_norm": pytest.approx(float(found.norm())),
        "train/learning_rate": 0.0,
    }


def test_samples_depend_on_the_position_in_the_training_alone(make):
    task = make(templates=["a photo of {}", "{}"])
    many = samples_of(task, [[0, 2]] * 400)
    assert {sample.prompt for sample in many} == {"a photo of <no-smile>", "<no-smile>", "a photo of <red>", "<red>"}
    assert {token_of(sample.prompt) for sample in samples_of(task, [[-1, 1]] * 20)} == {"<brown>"}
    timesteps = np.array([sample.timestep for sample in many])
    assert timesteps.min() < 20
    assert timesteps.max() >= 980
    assert timesteps.mean() == pytest.approx(499.5, abs=50)
    assert torch.stack([sample.noise for sample in many]).std() == pytest.approx(1, abs=0.02)
    (again,), (other,) = samples_of(task, [[0, 2]], start=7), samples_of(make(seed=1), [[0, 2]], start=7)
    assert again.prompt == many[7].prompt
    assert torch.equal(again.noise, many[7].noise)
    assert not torch.equal(other.noise, many[7].noise)


class Positions(L.Callback):
    """Positions of the samples of each batch."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.found.append(list(pl_module.sample_positions(4)))


def attached(task, total_batch_idx=0, rank=0, world_size=1, others=0):
    """Attach the part of a trainer that processes differ in; the other processes have ``others`` labelled images."""
    task.logged = {}
    task.log = lambda name, value, **options: task.logged.update({name: float(value)})
    task.trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(total_batch_idx=total_batch_idx),
        global_rank=rank,
        world_size=world_size,
        global_step=0,
        strategy=SimpleNamespace(
            reduce_boolean_decision=lambda decision: decision,
            reduce=lambda count, reduce_op: {"sum": count + others}[reduce_op],
        ),
    )
    return task


def test_positions_count_the_samples_of_all_processes(make):
    positions = Positions()
    fit(make(), [image_batch()] * 2, max_steps=4, callbacks=[positions])
    assert positions.found == [list(range(start, start + 4)) for start in (0, 4, 8, 12)]
    ranks = [list(attached(make(), 3, rank, 2).sample_positions(2)) for rank in range(2)]
    assert ranks == [[12, 13], [14, 15]]


def test_processes_count_images_together(make):
    batch = image_batch()
    alone = attached(make()).training_step(batch)
    # Gradients are averaged: of twice 3 of 8 images, and of 3 where the other process has none.
    torch.testing.assert_close(attached(make(), world_size=2, others=3).training_step(batch), alone)
    torch.testing.assert_close(attached(make(), world_size=2).training_step(batch), 2 * alone)
    task = attached(make(), rank=1, world_size=2, others=3)
    task.training_step(image_batch(UNLABELLED)).backward()
    assert task.logged == {"train/loss": 0}
    assert not task.bank.vectors[0].grad.any()


def test_validation_is_always_the_same_but_for_the_tokens(make):
    batch = image_batch()
    backwards = ImageBatch(
        batch.images.flip(0), None, {name: labels.flip(0) for name, labels in LABELS.items()}, batch.names[::-1]
    )
    losses = []
    for seed, batches, start in ((0, [batch], 0.0), (1, [backwards], 0.0), (0, [batch], 10.0)):
        task = make(seed=seed)
        with torch.no_grad():
            task.bank.vectors[0].add_(start * torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
        logged = validate(task, batches)
        assert logged.keys() == {"val/loss"}
        losses.append(logged["val/loss"])
    task = make()
    rngs = [np.random.default_rng(zlib.crc32(name.encode())) for name in batch.names]
    samples = [task.sample(rng, row, (4, 8, 8)) for rng, row in zip(rngs, CLASSES, strict=True)]
    with torch.no_grad():
        expected = float(denoising_errors(task, batch.images, samples)[:3].mean())
    assert losses[:2] == pytest.approx([expected, expected], rel=1e-5)
    assert losses[2] != pytest.approx(expected, rel=1e-5)


def test_validation_shows_images_of_each_token(make, monkeypatch):
    task, batch = make(templates=["a photo of {}", "{}"]), image_batch()
    with torch.no_grad():
        task.bank.vectors[0].copy_(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
        expected = task.pipeline.generate(["a photo of <brown>"], [1]).clamp(0, 1)
    shown = task.validation_step(batch, 0)
    assert shown["rows"] == [token for token in TOKENS for _ in range(2)]
    assert shown["images"].shape == (5 * 2, 3, 16, 16)
    same = [torch.allclose(image[None], expected, rtol=1e-4, atol=1e-5) for image in shown["images"]]
    assert same == [place == 3 * 2 + 1 for place in range(5 * 2)]
    assert task.validation_step(batch, 1) is None
    monkeypatch.setattr(TextualInversion, "global_rank", 1)
    assert task.validation_step(batch, 0) is None


def test_cached_latents_give_the_same_loss(make):
    task, batch = make(), image_batch()
    latents = task.backbone.encode_images(batch.images)
    cached = one_step(task, batch._replace(images=None, latents=latents))
    assert cached[0] == pytest.approx(one_step(task, batch)[0])


def test_a_loss_that_is_not_finite(make):
    task = make()
    with torch.no_grad():
        task.bank.vectors[0].fill_(torch.inf)
    with pytest.raises(UserError, match="not finite at step 0"):
        one_step(task, image_batch())


def test_tokens_say_where_they_come_from(make):
    task = make({"gray hair": None}, templates=["a photo of {}", "{}"], tokens=TokenSettings(placeholder="<ti-{}>"))
    assert task.placeholders == ["<ti-no-gray-hair>", "<ti-gray-hair>"]
    word = task.vectors_of("a")[0]
    assert all(torch.equal(task.bank.get(token)[0], word) for token in task.placeholders)
    about = task.token_metadata()["<ti-no-gray-hair>"]
    assert about["base_model"] == task.backbone.pretrained
    assert (about["method"], about["attribute"], about["class"], about["prompt"]) == (
        "textual_inversion",
        "gray hair",
        "no gray hair",
        "a photo of <ti-no-gray-hair>",
    )
    settings = {"templates": ["a photo of {}", "{}"], "initial_words": "a", "negative_prompt": ""}
    assert json.loads(about["config"]) == settings


def test_tokens_can_start_from_the_names_of_their_classes(make):
    task = make({"hair": ["king", "queen"]}, tokens=TokenSettings(initial_words="{}"))
    assert torch.equal(task.bank.get("<queen>")[0], task.vectors_of("queen")[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attributes": {}}, r"model\.attributes"),
        ({"attributes": {"hair": ["black"]}}, r"hair.*black"),
        ({"attributes": {"hair": ["black", "red", "black"]}}, r"hair.*black.*red"),
        ({"attributes": {"hair": ["black", "red"], "hat": ["red", "no"]}}, r"hair.*hat.*<red>"),
        ({"tokens": TokenSettings(placeholder="<token>")}, r"smile.*smile.*<token>.*tokens\.placeholder"),
        ({"tokens": TokenSettings(initial_words=None)}, r"model\.tokens\.initial_words"),
        ({"templates": []}, r"model\.templates"),
        ({"templates": ["{}", "a smile"]}, r"model\.templates.*a smile"),
        ({"seed": -1}, r"model\.seed.*0.*-1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


class Labelled(L.LightningDataModule, LabelledImages):
    """Data with a batch of images."""

    def __init__(self, class_names):
        super().__init__()
        self._class_names = class_names

    @property
    def class_names(self):
        return self._class_names

    def train_dataloader(self):
        return Batches([image_batch()])


@pytest.mark.parametrize(
    ("class_names", "words"),
    [
        ({"smile": (), "age": ()}, r"age, smile.*hair.*data\.labels\.columns"),
        ({}, r"nothing.*smile"),
        ({"smile": (), "hair": ("brown", "black", "red")}, r"hair.*brown, black, red.*black, brown, red"),
        ({"smile": ("a", "b", "c"), "hair": ()}, r"smile.*a, b, c.*no smile, smile"),
    ],
    ids=["absent", "no-labels", "order", "number"],
)
def test_data_that_do_not_fit(make, class_names, words):
    with pytest.raises(UserError, match=words):
        fit(make(), Labelled(class_names))
    fit(make(), Labelled({"smile": ("no", "yes"), "hair": ("Noir", "Brun", "Roux"), "age": ()}))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"smile": torch.tensor([1, 0, 1, 1])}, r"smile.*hair"),
        (LABELS | {"hair": torch.tensor([0, 3, 1, 0])}, r"class 3.*hair.*3 classes"),
        (UNLABELLED, r"smile, hair.*data\.labels\.columns"),
    ],
    ids=["absent", "index", "unknown"],
)
def test_labels_that_do_not_match(make, labels, words):
    with pytest.raises(UserError, match=words):
        one_step(make(), image_batch(labels))


def test_validation_without_labels(make):
    with pytest.raises(UserError, match=r"smile, hair.*data\.held_out\.validation"):
        validate(make(), [image_batch(UNLABELLED)])


@pytest.fixture
def config(tiny_models, tmp_path, monkeypatch):
    """Write a config of images, some of which are labelled, with changes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(rng.integers(0, 255, (20, 18, 3), dtype=np.uint8)) for _ in range(16)],
            "smile": [None, None, *(index % 2 == 0 for index in range(14))],
        },
        features=datasets.Features({"image": datasets.Image(), "smile": datasets.Value("bool")}),
    ).save_to_disk(tmp_path / "faces")

    def write(name, data=None, trainer=None, **sections):
        options = {
            "backbone": {"class_path": "StableDiffusion", "init_args": {"pretrained": str(tiny_models / "pipeline")}},
            "attributes": {"smile": None},
            "tokens": {"placeholder": "<ti-{}>"},
            "sampling": {"steps": 2},
        }
        model = {"class_path": "TextualInversion", "init_args": options}
        return write_image_config(tmp_path, name, model, data, trainer, **sections)

    return write


def last_tokens(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["bank.vectors.0"]


def test_fit_leaves_embedding_files(config, tmp_path):
    main(["fit", "--config", config("run")])
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() == {"loss", "minutes", "embeddings"}
    names = ("ti-no-smile", "ti-smile")
    assert summary["embeddings"] == [str(run / "embeddings" / f"{name}-tl.safetensors") for name in names]
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    kept = torch.load(best, weights_only=True)["state_dict"]["bank.vectors.0"]
    for row, path in enumerate(summary["embeddings"]):
        with safe_open(path, "pt") as file:
            (key,) = file.keys()
            assert torch.equal(file.get_tensor(key), kept[row : row + 1])
            about = file.metadata()
        assert (about["method"], about["attribute"], about["class"]) == (
            "textual_inversion",
            "smile",
            ("no smile", "smile")[row],
        )
    assert {path.name for path in (run / "validation").iterdir()} == {
        "step-000000.png",
        "step-000002.png",
        "step-000004.png",
        "final.png",
    }


def test_killed_and_resumed_equals_uninterrupted(config, tmp_path):
    always = {"checkpoint": {"every_n_train_steps": 1, "monitor": None}}
    data = {"batches_per_epoch": 3, "held_out": {"validation": 0, "test": 0}}
    main(["fit", "--config", config("whole", data, {"max_steps": 5}, **always)])
    main(["fit", "--config", config("part", data, {"max_steps": 2}, **always)])
    last = str(tmp_path / "part" / "checkpoints" / "last.ckpt")
    main(["fit", "--config", config("rest", data, {"max_steps": 5}, **always), "--ckpt_path", last])
    assert not torch.equal(last_tokens(tmp_path / "part"), last_tokens(tmp_path / "whole"))
    assert torch.equal(last_tokens(tmp_path / "rest"), last_tokens(tmp_path / "whole"))
