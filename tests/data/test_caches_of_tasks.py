"""Caches of latents that a real backbone makes."""

import pytest
import torch
from PIL import Image

from tests.data.stand_ins import trainer_with
from tokenlearn.data import GeneratedDataModule, HeldOut, ImageDataModule, LatentCaching
from tokenlearn.errors import UserError
from tokenlearn.models import StableDiffusion
from tokenlearn.pipeline import Sampling
from tokenlearn.token_task import TokenTask
from tokenlearn.tokens import TokenBank

PROMPTS = ["a photo of a man", "a photo of a woman", "a portrait of a king"]


@pytest.fixture(scope="module")
def backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


def generated(task, folder, **options):
    made = GeneratedDataModule(PROMPTS, cache=LatentCaching(str(folder), shard_size=4), **options)
    made.trainer = trainer_with(task)
    return made


def test_cached_generated_latents_equal_those_made_on_the_fly(tmp_path, backbone):
    task = TokenTask(backbone, Sampling(steps=2, guidance=3.0))
    made = generated(task, tmp_path, num_images=10, batch_size=4, validation_images=5, eval_batch_size=3)
    for batch in made.train_dataloader():
        assert torch.equal(batch.latents, task.generate_latents(batch.prompts, batch.seeds))
    for batch in made.val_dataloader():
        torch.testing.assert_close(batch.latents, task.generate_latents(batch.prompts, batch.seeds))
    assert len(list(tmp_path.iterdir())) == 2


def test_another_sampler_is_another_cache(tmp_path, backbone):
    counts = []
    for changes in (
        {},
        {"steps": 1},
        {"guidance": 1.0},
        {"solver": "EulerDiscreteScheduler"},
        {"negative_prompt": "beard"},
        {},
    ):
        task = TokenTask(backbone, Sampling(**({"steps": 2, "guidance": 3.0} | changes)))
        generated(task, tmp_path, num_images=2).train_dataloader()
        counts.append(len(list(tmp_path.iterdir())))
    assert counts == [1, 2, 3, 4, 5, 5]


def test_images_of_learned_tokens_are_not_cached(tmp_path, backbone):
    bank = TokenBank({"<beard>": 1}, backbone.embedding_widths)
    for sampling in (Sampling(steps=2, negative_prompt="a <beard>"), Sampling(steps=2)):
        task = TokenTask(backbone, sampling)
        task.use_bank(bank)
        made = generated(task, tmp_path, num_images=2)
        if not sampling.negative_prompt:
            made.prompts = ["a man with a <beard> beard"]
        with pytest.raises(UserError, match=r"'<beard>'.*data\.cache"):
            made.train_dataloader()


def test_cached_images_equal_those_encoded_on_the_fly(tmp_path, backbone):
    for index in range(13):
        Image.new("RGB", (24, 20), (10 * index + 5, 100, 200)).save(tmp_path / f"{index:02d}.png")
    task = TokenTask(backbone, Sampling(steps=2))

    def batches(**options):
        made = ImageDataModule(str(tmp_path), batch_size=4, held_out=HeldOut(2, 1), num_workers=0, **options)
        made.trainer = trainer_with(task)
        made.setup("fit")
        loader = made.train_dataloader()
        return [batch for _ in range(3) for batch in loader]

    cached = batches(cache=LatentCaching(str(tmp_path / "latents"), shard_size=6))
    for latent_batch, image_batch in zip(cached, batches(), strict=True):
        assert latent_batch.names == image_batch.names
        with torch.no_grad():
            assert torch.equal(latent_batch.latents, task.encode_images(image_batch.images))
    with torch.no_grad():
        next(backbone.vae.encoder.parameters()).add_(1e-3)
    batches(cache=LatentCaching(str(tmp_path / "latents"), shard_size=6))
    assert len(list((tmp_path / "latents").iterdir())) == 2
