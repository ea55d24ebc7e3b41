import pytest
import torch
from torch.optim import SGD

from tests.training.runs import no_change
from tokenlearn.data.batches import ImageBatch
from tokenlearn.errors import UserError
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens import save_embedding
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training import TokenTraining


@pytest.fixture
def make(backbone):
    """Make a task with the tokens <wizard> and <pirate>."""

    def task(words=("a", "a"), **settings):
        tokens = TokenSettings(**settings)
        module = TokenTraining(
            backbone, tokens=tokens, sampling=Sampling(steps=2), optimizer=no_change, lr_scheduler=None
        )
        module.use_bank(module.make_bank(dict(zip(("<wizard>", "<pirate>"), words, strict=True))))
        return module

    return task


def test_tokens_start_from_words(make):
    task = make(("king", "man with a hat"), num_vectors=1)
    for token, words in (("<wizard>", "king"), ("<pirate>", "man with a hat")):
        assert torch.equal(task.bank.get(token)[0], task.vectors_of(words)[0])
    assert not torch.equal(*(task.bank.get(token)[0] for token in task.bank.placeholders))
    assert make(num_vectors=3).bank.get("<pirate>")[0].shape == (3, 16)


def test_embedding_files_come_before_words(make, tmp_path):
    vectors = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    file = str(save_embedding(tmp_path / "old.safetensors", "<pirate>", [vectors], {}))
    task = make(initial_embeddings=file)
    assert torch.equal(task.bank.get("<pirate>")[0], vectors)
    assert torch.equal(task.bank.get("<wizard>")[0], task.vectors_of("a")[0])
    assert task.loaded == {"<pirate>"}
    assert make(initial_embeddings={"<wizard>": file}).loaded == {"<wizard>"}
    with pytest.raises(UserError, match=r"<nurse>.*<wizard>, <pirate>"):
        make(initial_embeddings={"<nurse>": file})


def test_hold_norms_keeps_the_vocabularys_range(make):
    far = [100 * vectors for vectors in make().bank.get("<wizard>")]
    for hold_norms in (False, True):
        task = make(hold_norms=hold_norms)
        task.bank.set("<wizard>", far)
        task.optimizer_step(0, 0, SGD(task.bank.parameters(), lr=0.0), lambda: None)
        (low, high), norms = task._norm_ranges[0], task.bank.vectors[0].norm(dim=1)
        assert norms.min() >= low * 0.999
        assert (norms.max() <= high * 1.001) == hold_norms


def test_clipping_treats_tokens_apart(make):
    task = make()
    gradient = torch.zeros_like(task.bank.vectors[0])
    gradient[task.bank.rows("<wizard>"), 0] = 1e6
    gradient[task.bank.rows("<pirate>"), 0] = 0.5
    task.bank.vectors[0].grad = gradient
    task.configure_gradient_clipping(task.configure_optimizers(), 1.0, "norm")
    assert task.bank.vectors[0].grad[:, 0].tolist() == pytest.approx([1.0, 0.5], rel=1e-3)


def test_latents_come_from_wherever_the_batch_has_them(make, backbone):
    task = make()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = backbone.encode_images(images)
    of_pixels = ImageBatch(images, None, {}, ["a", "b"])
    assert torch.equal(task.clean_latents(of_pixels), latents)
    assert task.clean_latents(of_pixels._replace(images=None, latents=latents)) is latents
    specified = ImageBatch(None, None, {}, ["a", "b"], ["a king", "a queen"], [3, 4])
    assert torch.equal(task.clean_latents(specified), task.generate_latents(["a king", "a queen"], [3, 4]))
