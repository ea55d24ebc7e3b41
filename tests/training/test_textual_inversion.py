import json
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors import safe_open

from tests.tiny import tiny_pipeline, write_image_config
from tokenlearn.data import ImageBatch
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.methods import TextualInversion
from tokenlearn.models import StableDiffusion

ATTRIBUTES = {"smile": None, "hair": ["black", "brown", "red"]}
TOKENS = ["<no-smile>", "<smile>", "<black>", "<brown>", "<red>"]
LABELS = {"smile": torch.tensor([1, 0, -1, -1]), "hair": torch.tensor([-1, 2, 0, -1])}  # the last has none
CLASSES = list(zip(*(labels.tolist() for labels in LABELS.values()), strict=True))


@pytest.fixture(scope="module")
def shared_backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


@pytest.fixture
def make(shared_backbone):
    """Make a module, which takes the backbone's prompts from the one made before."""

    def task(total_batch_idx=0, rank=0, world_size=1, others=0, class_names=None, **options):
        """``others`` is the number of labelled pictures of the other processes."""
        module = TextualInversion(**({"backbone": shared_backbone, "attributes": ATTRIBUTES} | options))
        module.logged = {}
        module.log = lambda name, value, **options: module.logged.update({name: float(value)})
        module.trainer = SimpleNamespace(
            fit_loop=SimpleNamespace(total_batch_idx=total_batch_idx),
            global_rank=rank,
            world_size=world_size,
            global_step=0,
            datamodule=None if class_names is None else SimpleNamespace(class_names=class_names),
            strategy=SimpleNamespace(
                reduce_boolean_decision=lambda decision: decision,
                reduce=lambda count, reduce_op: {"sum": count + others}[reduce_op],
            ),
        )
        return module

    return task


def pictures(labels=None, count=4):
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return ImageBatch(images, None, LABELS if labels is None else labels, [f"{index}.png" for index in range(count)])


def draws_of(module, classes, start=0):
    rngs = [np.random.default_rng([module.seed, start + place]) for place in range(len(classes))]
    return [module._draw(rng, own, (4, 8, 8)) for rng, own in zip(rngs, classes, strict=True)]


def token_of(prompt):
    (token,) = (token for token in TOKENS if token in prompt)
    return token


def noise_errors(module, images, draws):
    """Squared errors of the predicted noise, written out one by one."""
    backbone, errors = module.backbone, []
    alphas_cumprod = DDPMScheduler.from_config(module.scheduler.config).alphas_cumprod
    for latents, draw in zip(backbone.encode_images(images), draws, strict=True):
        alpha_bar = alphas_cumprod[draw.timestep]
        noisy = alpha_bar.sqrt() * latents[None] + (1 - alpha_bar).sqrt() * draw.noise[None]
        output = backbone(noisy, torch.tensor(draw.timestep), backbone.encode_prompts([draw.prompt]))
        if backbone.prediction_type == "v_prediction":
            output = (1 - alpha_bar).sqrt() * noisy + alpha_bar.sqrt() * output
        errors.append(((output[0] - draw.noise) ** 2).mean())
    return torch.stack(errors)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_token_gradient_equals_a_plain_loop(make, shared_backbone, tmp_path, prediction_type):
    backbone = shared_backbone
    if prediction_type != "epsilon":
        backbone = StableDiffusion(str(tiny_pipeline(tmp_path / "pipeline", prediction_type)))
    module, batch = make(backbone=backbone, templates=["a photo of {}", "{}"], num_vectors=2), pictures()
    draws = draws_of(module, CLASSES)
    loss = module.training_step(batch)
    loss.backward()
    ours = module.bank.vectors[0].grad.clone()

    module.bank.zero_grad()
    expected = noise_errors(module, batch.images, draws)[:3].mean()  # the last picture has no label
    expected.backward()
    reference = module.bank.vectors[0].grad
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))
    drawn = [token_of(draw.prompt) for draw in draws[:3]]
    assert drawn[0] == "<smile>"
    assert drawn[1] in ("<no-smile>", "<red>")
    assert drawn[2] == "<black>"
    assert {token for token in TOKENS if ours[module.bank.rows(token)].any()} == set(drawn)
    assert module.logged == {"train/loss": pytest.approx(loss.item())}


def test_draws_depend_on_the_place_in_the_training_alone(make):
    module = make(templates=["a photo of {}", "{}"])
    assert list(make(total_batch_idx=3).sample_positions(4)) == [12, 13, 14, 15]
    ranks = [list(make(total_batch_idx=3, rank=rank, world_size=2).sample_positions(2)) for rank in range(2)]
    assert ranks == [[12, 13], [14, 15]]
    many = draws_of(module, [[0, 2]] * 400)
    assert {draw.prompt for draw in many} == {"a photo of <no-smile>", "<no-smile>", "a photo of <red>", "<red>"}
    assert {token_of(draw.prompt) for draw in draws_of(module, [[-1, 1]] * 20)} == {"<brown>"}
    timesteps = np.array([draw.timestep for draw in many])
    assert timesteps.min() < 20
    assert timesteps.max() >= 980
    assert timesteps.mean() == pytest.approx(499.5, abs=50)
    assert torch.stack([draw.noise for draw in many]).std() == pytest.approx(1, abs=0.02)
    (again,), (other,) = draws_of(module, [[0, 2]], start=7), draws_of(make(seed=1), [[0, 2]], start=7)
    assert again.prompt == many[7].prompt
    assert torch.equal(again.noise, many[7].noise)
    assert not torch.equal(other.noise, many[7].noise)


def test_processes_count_pictures_together(make):
    batch = pictures()
    alone = make().training_step(batch)
    # Gradients are averaged: of twice 3 of 8 pictures, and of 3 where the other process has none.
    torch.testing.assert_close(make(world_size=2, others=3).training_step(batch), alone)
    torch.testing.assert_close(make(world_size=2).training_step(batch), 2 * alone)
    none = pictures({name: torch.full((4,), -1) for name in ATTRIBUTES})
    module = make(world_size=2, rank=1, others=3)
    module.training_step(none).backward()
    assert module.logged == {"train/loss": 0}
    assert not module.bank.vectors[0].grad.any()


def test_validation_is_always_the_same_but_for_the_tokens(make):
    batch = pictures()
    backwards = ImageBatch(
        batch.images.flip(0), None, {name: labels.flip(0) for name, labels in LABELS.items()}, batch.names[::-1]
    )
    losses = []
    for seed, seen, start in ((0, batch, 0.0), (1, backwards, 0.0), (0, batch, 10.0)):
        module = make(seed=seed, total_batch_idx=5 * seed)
        with torch.no_grad():
            module.bank.vectors[0].add_(start * torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
        assert module.validation_step(seen, 1) is None
        module.on_validation_epoch_end()
        losses.append(module.logged["val/loss"])
    module = make()
    rngs = [np.random.default_rng(zlib.crc32(name.encode())) for name in batch.names]
    draws = [module._draw(rng, own, (4, 8, 8)) for rng, own in zip(rngs, CLASSES, strict=True)]
    with torch.no_grad():
        expected = float(noise_errors(module, batch.images, draws)[:3].mean())
    assert losses[:2] == pytest.approx([expected, expected], rel=1e-5)
    assert losses[2] != pytest.approx(expected, rel=1e-5)


def test_validation_shows_pictures_of_each_token(make):
    module, batch = make(num_inference_steps=2, templates=["a photo of {}", "{}"]), pictures()
    with torch.no_grad():
        module.bank.vectors[0].copy_(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
        expected = module.generate(["a photo of <brown>"], [1]).clamp(0, 1)
    shown = module.validation_step(batch, 0)
    assert shown["rows"] == [token for token in TOKENS for _ in range(2)]
    assert shown["images"].shape == (5 * 2, 3, 16, 16)
    same = [torch.allclose(image[None], expected, rtol=1e-4, atol=1e-5) for image in shown["images"]]
    assert same == [place == 3 * 2 + 1 for place in range(5 * 2)]
    module.trainer.global_rank = 1
    assert module.validation_step(batch, 0) is None


def test_latents_come_from_wherever_the_batch_has_them(make):
    module, batch = make(), pictures()
    latents = module.backbone.encode_images(batch.images)
    torch.testing.assert_close(
        module.training_step(batch._replace(images=None, latents=latents)), module.training_step(batch)
    )
    specified = ImageBatch(None, None, LABELS, batch.names, ["a king", "a queen"] * 2, [3, 4, 5, 6])
    torch.testing.assert_close(
        module.clean_latents(specified), module.generate_latents(specified.prompts, specified.seeds)
    )


def test_a_loss_that_is_not_finite(make):
    module = make()
    with torch.no_grad():
        module.bank.vectors[0].fill_(torch.inf)
    with pytest.raises(UserError, match="the loss is not finite at step 0"):
        module.training_step(pictures())


def test_tokens_say_where_they_come_from(make):
    module = make(templates=["a photo of {}", "{}"], placeholder="<ti-{}>", attributes={"gray hair": None})
    assert module.tokens == ["<ti-no-gray-hair>", "<ti-gray-hair>"]
    word = module.vectors_of("a", 1)[0]
    assert all(torch.equal(module.bank.get(token)[0], word) for token in module.tokens)
    about = module.token_metadata()["<ti-no-gray-hair>"]
    assert about["base_model"] == module.backbone.pretrained
    assert (about["method"], about["attribute"], about["class"], about["prompt"]) == (
        "textual_inversion",
        "gray hair",
        "no gray hair",
        "a photo of <ti-no-gray-hair>",
    )
    settings = {"templates": ["a photo of {}", "{}"], "initial_words": "a", "negative_prompt": ""}
    assert json.loads(about["config"]) == settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attributes": {}}, r"model.attributes is empty"),
        ({"attributes": {"hair": ["black"]}}, r"attribute 'hair' has classes \['black'\]; name two or more"),
        ({"attributes": {"hair": ["black", "red", "black"]}}, r"attribute 'hair' has classes .* each once"),
        ({"attributes": {"hair": ["black", "red"], "hat": ["red", "no"]}}, r"'hair' and 'hat' both have .* '<red>'"),
        ({"placeholder": "<token>"}, r"attributes 'smile' and 'smile' both have the token '<token>'; let model.place"),
        ({"templates": []}, r"model.templates is empty"),
        ({"templates": ["{}", "a smile"]}, r"model.templates: 'a smile' must have exactly one '{}'"),
        ({"seed": -1}, r"model.seed must be at least 0, got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings(make, options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("class_names", "words"),
    [
        (
            {"smile": (), "age": ()},
            r"the data have labels of age, smile, not of 'hair'; name its column in data.label",
        ),
        ({}, r"the data have labels of nothing, not of 'smile';"),
        (
            {"smile": (), "hair": ("brown", "black", "red")},
            r"classes of 'hair' are brown, black, red in the data and ",
        ),
        ({"smile": ("a", "b", "c"), "hair": ()}, r"classes of 'smile' are a, b, c in the data and no smile, smile in"),
    ],
    ids=["absent", "no-labels", "order", "number"],
)
def test_data_that_do_not_fit(make, class_names, words):
    with pytest.raises(UserError, match=words):
        make(class_names=class_names).setup("fit")
    make(class_names={"smile": ("no", "yes"), "hair": ("Noir", "Brun", "Roux"), "age": ()}).setup("fit")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"smile": torch.tensor([1, 0, 1, 1])}, r"the data have labels of smile, not of 'hair';"),
        (
            LABELS | {"hair": torch.tensor([0, 3, 1, 0])},
            r"the data have class 3 of 'hair', whose 3 classes in the mod",
        ),
        ({name: torch.full((4,), -1) for name in ATTRIBUTES}, r"no picture .* known class of smile, hair; name the"),
    ],
    ids=["absent", "index", "unknown"],
)
def test_labels_that_do_not_match(make, labels, words):
    with pytest.raises(UserError, match=words):
        make().training_step(pictures(labels))


def test_validation_without_labels(make):
    module = make()
    module.validation_step(pictures({name: torch.full((4,), -1) for name in ATTRIBUTES}), 1)
    with pytest.raises(
        UserError, match=r"no held-out picture has a known class of smile, hair; raise data.validation"
    ):
        module.on_validation_epoch_end()


@pytest.fixture
def config(tiny_models, tmp_path, monkeypatch):
    """Write a config of pictures some of which are labelled, with changes."""
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
            "placeholder": "<ti-{}>",
            "num_inference_steps": 2,
        }
        model = {"class_path": "TextualInversion", "init_args": options}
        best = {"monitor": "val/loss", "mode": "min"}
        monitors = {"checkpoint": best, "embedding_export": dict(best)}
        return write_image_config(tmp_path, name, model, data, trainer, **(monitors | sections))

    return write


def last_tokens(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["bank.vectors.0"]


def test_fit_leaves_embedding_files(config, tmp_path):
    main(["fit", "--config", config("run")])
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() == {"loss", "minutes", "embeddings"}
    names = ("ti-no-smile", "ti-smile")
    assert summary["embeddings"] == [str(run / "embeddings" / f"{name}.safetensors") for name in names]
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
    assert {path.name for path in (run / "pictures").iterdir()} == {
        "step-000002.png",
        "step-000004.png",
        "validation.png",
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
