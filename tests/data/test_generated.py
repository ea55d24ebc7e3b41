from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from tokenlearn.data import GeneratedDataModule
from tokenlearn.errors import UserError
from tokenlearn.methods import TokenTask
from tokenlearn.models import StableDiffusion
from tokenlearn.tokens import TokenBank

PROMPTS = ["a photo of a man", "a photo of a woman", "a portrait of a king"]
LABELS = {PROMPTS[0]: {"female": 0, "old": 1}, PROMPTS[1]: {"female": 1}}


@pytest.fixture(scope="module")
def backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


def module(task=None, rank=0, world_size=1, **options):
    """A data module as Lightning attaches it on one process."""
    defaults = {"num_images": 10, "batch_size": 4, "validation_images": 5, "test_images": 5, "eval_batch_size": 3}
    made = GeneratedDataModule(PROMPTS, LABELS, **(defaults | options))
    made.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        lightning_module=task,
        precision="32-true",
        precision_plugin=Precision(),
        strategy=SimpleNamespace(barrier=lambda name: None),
    )
    return made


def seeds(batches):
    return list(chain.from_iterable(batch.seeds for batch in batches))


def epochs(loader, count):
    return list(chain.from_iterable(list(loader) for _ in range(count)))


def test_new_images_all_the_time():
    loader = module(num_images=None, batches_per_epoch=3, seed=100).train_dataloader()
    batches = epochs(loader, 2)
    assert seeds(batches) == list(range(100, 124))
    assert batches[0].prompts == [*PROMPTS, PROMPTS[0]]
    assert batches[0].names == ["seed100", "seed101", "seed102", "seed103"]
    assert batches[0].images is None
    assert batches[0].latents is None


def test_a_number_of_images_in_passes():
    loader = module(seed=100).train_dataloader()
    assert len(loader) == 3
    taken = seeds(epochs(loader, 5))
    assert all(sorted(taken[start : start + 10]) == list(range(100, 110)) for start in range(0, 60, 10))
    for batch in loader:
        assert batch.prompts == [PROMPTS[(seed - 100) % 3] for seed in batch.seeds]
    assert seeds(module(seed=100).single_pass()) == list(range(100, 110))


def test_labels_are_those_of_the_prompt():
    for batch in module().train_dataloader():
        assert batch.labels["female"].tolist() == [{0: 0, 1: 1, 2: -1}[PROMPTS.index(one)] for one in batch.prompts]
        assert batch.labels["old"].tolist() == [1 if one == PROMPTS[0] else -1 for one in batch.prompts]


@pytest.mark.parametrize("num_images", [None, 10])
def test_two_ranks_together_equal_one_process_and_resume(num_images):
    options = {"num_images": num_images, "batches_per_epoch": 3}
    whole = epochs(module(**options).train_dataloader(), 3)
    parts = [module(None, rank, 2, batch_size=2, **options).train_dataloader() for rank in range(2)]
    first = next(iter(parts[0]))
    assert first.seeds + next(iter(parts[1])).seeds == whole[0].seeds
    resumed = module(**options).train_dataloader()
    resumed.load_state_dict(parts[0].state_dict())
    assert seeds(epochs(resumed, 3)) == seeds(whole[1:])


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
def test_evaluation_has_seeds_of_its_own(loader):
    whole = seeds(getattr(module(), loader)())
    assert len(whole) == 5
    assert min(whole) >= 10**9
    assert sorted(chain(*(seeds(getattr(module(None, rank, 2), loader)()) for rank in range(2)))) == whole
    assert not set(seeds(module().val_dataloader())) & set(seeds(module().test_dataloader()))
    assert getattr(module(validation_images=0, test_images=0), loader)() == []


def test_cached_latents_equal_those_made_on_the_fly(tmp_path, backbone):
    task = TokenTask(backbone, 2, 3.0)
    made = module(task, cache_dir=str(tmp_path), cache_shard_size=4)
    for batch in made.train_dataloader():
        assert torch.equal(batch.latents, task.generate_latents(batch.prompts, batch.seeds))
    for batch in made.val_dataloader():
        torch.testing.assert_close(batch.latents, task.generate_latents(batch.prompts, batch.seeds))
    assert len(list(tmp_path.iterdir())) == 2


def test_another_sampler_is_another_cache(tmp_path, backbone):
    tasks = [
        TokenTask(backbone, 2, 3.0),
        TokenTask(backbone, 1, 3.0),
        TokenTask(backbone, 2, 1.0),
        TokenTask(backbone, 2, 3.0, scheduler="Euler"),
        TokenTask(backbone, 2, 3.0, negative_prompt="beard"),
        TokenTask(backbone, 2, 3.0),
    ]
    counts = []
    for task in tasks:
        module(task, num_images=2, cache_dir=str(tmp_path)).train_dataloader()
        counts.append(len(list(tmp_path.iterdir())))
    assert counts == [1, 2, 3, 4, 5, 5]


def test_images_of_learned_tokens_are_not_cached(tmp_path, backbone):
    task = SimpleNamespace(bank=TokenBank({"<king>": 1}, backbone.embedding_widths), backbone=backbone)
    made = module(task, cache_dir=str(tmp_path))
    made.prompts = ["a photo of a <king> king"]
    with pytest.raises(UserError, match="'a photo of a <king> king' has a token that is learned"):
        made.train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "data.prompts is empty"),
        ({"labels": {"a man": {"female": 0}}}, "data.labels has 'a man'"),
        ({"num_images": 0}, "data.num_images must be at least 1, got 0"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"test_images": -1}, "data.test_images must be at least 0, got -1"),
        ({"seed": 10**9}, "data.seed must be from 0 to 999999999"),
        ({"num_images": None}, "set data.batches_per_epoch or num_images"),
        ({"num_images": None, "batches_per_epoch": 3, "cache_dir": "x"}, "set data.num_images, which a cache needs"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(UserError, match=message) as raised:
        GeneratedDataModule(**({"prompts": PROMPTS, "num_images": 4} | options))
    assert "\n" not in str(raised.value)
