from itertools import chain

import pytest
import torch

from tests.data.stand_ins import ImageTask, trainer_with
from tokenlearn.data import GeneratedDataModule, LatentCaching
from tokenlearn.errors import UserError

PROMPTS = ["a photo of a man", "a photo of a woman", "a portrait of a king"]
LABELS = {PROMPTS[0]: {"female": 0, "old": 1}, PROMPTS[1]: {"female": 1}}


def module(task=None, rank=0, world_size=1, **options):
    """A data module as Lightning attaches it on one process."""
    defaults = {"num_images": 10, "batch_size": 4, "validation_images": 5, "test_images": 5, "eval_batch_size": 3}
    made = GeneratedDataModule(PROMPTS, LABELS, **(defaults | options))
    made.trainer = trainer_with(task or ImageTask(), rank, world_size)
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


def test_cached_latents_equal_those_made_on_the_fly(tmp_path):
    task = ImageTask()
    made = module(task, cache=LatentCaching(str(tmp_path), shard_size=4))
    for batch in (*made.train_dataloader(), *made.val_dataloader()):
        assert torch.equal(batch.latents, task.generate_latents(batch.prompts, batch.seeds))
    assert len(list(tmp_path.iterdir())) == 2


def test_another_sampler_is_another_cache(tmp_path):
    counts = []
    for sampling in ({}, {"steps": 1}, {"scale": 2.0}, {"weights": 0.5}, {}):
        module(ImageTask(**sampling), num_images=2, cache=LatentCaching(str(tmp_path))).train_dataloader()
        counts.append(len(list(tmp_path.iterdir())))
    assert counts == [1, 2, 3, 4, 4]


@pytest.mark.parametrize(("prompt", "negative"), [("a photo of a <King> king", ""), (PROMPTS[0], "<king>")])
def test_images_of_learned_tokens_are_not_cached(tmp_path, prompt, negative):
    task = ImageTask(learned_placeholders=["<king>"], negative_prompt=negative)
    made = module(task, cache=LatentCaching(str(tmp_path)))
    made.prompts = [prompt]
    with pytest.raises(UserError, match=r"'<king>'.*data\.cache"):
        made.train_dataloader()


def test_attributes_have_no_class_names():
    assert module().class_names == {"female": (), "old": ()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "data.prompts"),
        ({"labels": {"a man": {"female": 0}}}, "data.labels .*'a man'"),
        ({"num_images": 0}, "data.num_images .* 1, got 0"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"test_images": -1}, "data.test_images .* 0, got -1"),
        ({"seed": 10**9}, "data.seed .* 0 .* 999999999"),
        ({"num_images": None}, "data.batches_per_epoch or num_images"),
        ({"num_images": None, "batches_per_epoch": 3, "cache": LatentCaching("x")}, "data.num_images"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(UserError, match=message) as raised:
        GeneratedDataModule(**({"prompts": PROMPTS, "num_images": 4} | options))
    assert "\n" not in str(raised.value)
