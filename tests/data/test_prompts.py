from collections import Counter
from itertools import chain, islice

import pytest

from tests.data.stand_ins import ClassTask, ImageTask, trainer_with
from tokenlearn.data import PromptDataModule, PromptList
from tokenlearn.data.prompts import prompt_stream
from tokenlearn.errors import UserError

TEMPLATES = ["a photo of a {}", "a portrait of a {}", "{}"]


def rows(*batches):
    return [row for batch in batches for row in zip(*batch, strict=True)]


def on_rank(module, rank=0, world_size=1, classes=None):
    """The module as Lightning attaches it on one process."""
    task = ClassTask(classes or {"wizard": "man with a hat", "pirate": None, "chef": "cook"})
    module.trainer = trainer_with(task, rank, world_size)
    return module


def stream(batch_size=4, length=3, **options):
    return prompt_stream(TEMPLATES, 3, batch_size=batch_size, length=length, **options)


def test_two_ranks_together_equal_one_process():
    whole = list(stream(batch_size=4))
    parts = [list(stream(batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 3
    for batch, first, second in zip(whole, *parts, strict=True):
        assert rows(batch) == rows(first, second)


def test_no_seed_comes_twice():
    seeds = []
    for rank in range(3):
        part = stream(batch_size=2, rank=rank, world_size=3, first_seed=100)
        seeds += [seed for _ in range(4) for batch in part for seed in batch.seeds]
    assert sorted(seeds) == list(range(100, 100 + 3 * 4 * 3 * 2))


def test_classes_and_templates_are_balanced():
    part = stream(batch_size=6, length=6)
    samples = rows(*part)
    assert Counter(index for _, _, index, _ in samples) == {0: 12, 1: 12, 2: 12}
    assert set(Counter((template, index) for template, _, index, _ in samples).values()) == {4}
    assert {kind for *_, kind in samples} == {"token"}


def test_resumes_in_the_middle_and_at_the_end_of_an_epoch():
    uninterrupted = stream()
    epochs = [list(uninterrupted) for _ in range(3)]
    for taken in (1, 2, 3):
        first = stream()
        assert list(islice(first, taken)) == epochs[0][:taken]
        resumed = stream()
        resumed.load_state_dict(first.state_dict())
        rest = epochs[0][taken:] or epochs[1]
        assert list(resumed) == rest
        assert list(resumed) == (epochs[1] if taken < 3 else epochs[2])


def test_data_module_hands_ranks_their_part_of_the_stream():
    options = {"batch_size": 2, "batches_per_epoch": 5, "seed": 7}
    parts = [on_rank(PromptDataModule(TEMPLATES, **options), rank, 2).train_dataloader() for rank in range(2)]
    assert len(parts[0]) == 5
    first, second = (next(iter(part)) for part in parts)
    assert first.seeds + second.seeds == [7, 8, 9, 10]
    assert first.class_indices + second.class_indices == [0, 1, 2, 0]


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
def test_evaluation_is_split_without_overlap(loader):
    def part(rank, world_size):
        module = PromptDataModule(TEMPLATES, validation_images=5, test_images=5, eval_batch_size=4)
        batches = getattr(on_rank(module, rank, world_size), loader)()
        taken = list(batches)
        assert len(batches) == len(taken)
        assert all(len(batch.seeds) == 4 for batch in taken[:-1])
        return rows(*taken)

    whole = part(0, 1)
    assert len(set(whole)) == len(whole)
    parts = [part(rank, 4) for rank in range(4)]
    assert sorted(chain.from_iterable(parts)) == sorted(whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_every_kind_and_class_is_tested_with_the_same_seeds():
    module = on_rank(PromptDataModule(TEMPLATES, test_images=5, validation_images=4))
    samples = rows(*module.test_dataloader())
    drawn = {}
    for template, seed, index, kind in samples:
        drawn.setdefault((index, kind), []).append((template, seed))
    described = {(0, "described"), (2, "described")}  # the pirate has no description
    assert set(drawn) == {(index, kind) for index in range(3) for kind in ("name", "start", "token")} | described
    assert len({tuple(pairs) for pairs in drawn.values()}) == 1
    assert len({seed for _, seed in drawn[0, "name"]}) == 5

    validated = {seed for _, seed, _, _ in rows(*module.val_dataloader())}
    trained = {seed for _, seed, _, _ in rows(*module.train_dataloader())}
    assert not validated & trained
    assert not validated & {seed for _, seed, _, _ in samples}
    assert {kind for *_, kind in rows(*module.val_dataloader())} == {"token"}
    assert rows(*module.val_dataloader()) == rows(*module.val_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": []}, "data.templates"),
        ({"templates": ["a photo"]}, "'a photo'"),
        ({"templates": ["{} and {}"]}, "'{} and {}'"),
        ({"batch_size": 0}, "data.batch_size .* 1, got 0"),
        ({"batches_per_epoch": 0}, "data.batches_per_epoch"),
        ({"validation_images": -1}, "data.validation_images .* 1, got -1"),
        ({"test_images": 0}, "data.test_images"),
        ({"eval_batch_size": 0}, "data.eval_batch_size"),
        ({"seed": -1}, "data.seed .* 0 .* 999999999, got -1"),
        ({"seed": 10**9}, "data.seed"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(UserError, match=message) as raised:
        PromptDataModule(**({"templates": TEMPLATES} | options))
    assert "\n" not in str(raised.value)


def test_more_devices_than_images_are_refused():
    module = PromptDataModule(TEMPLATES, validation_images=1)
    for rank in range(4):
        with pytest.raises(UserError, match=r"3 .* 4 "):
            on_rank(module, rank, 4).val_dataloader()
    with pytest.raises(UserError, match=r"1 .* 2 "):
        on_rank(PromptList(["a"]), 1, 2).predict_dataloader()


def test_data_module_needs_a_task_with_classes():
    module = PromptDataModule(TEMPLATES)
    module.trainer = trainer_with(ImageTask())
    with pytest.raises(UserError, match=r"ImageTask.*data\.class_path"):
        module.train_dataloader()


def test_data_module_needs_its_trainer():
    with pytest.raises(RuntimeError, match="Trainer"):
        PromptDataModule(TEMPLATES).train_dataloader()


def test_prompt_list_has_every_prompt_with_every_seed():
    prompts, seeds = ["a <wizard> wizard", "a pirate"], [3, 1, 2]
    batches = list(PromptList(prompts, seeds, batch_size=4).predict_dataloader())
    assert [len(batch.seeds) for batch in batches] == [4, 2]
    assert [row[:3] for row in rows(*batches)] == [
        (prompt, seed, index) for index, prompt in enumerate(prompts) for seed in seeds
    ]
    parts = [rows(*on_rank(PromptList(prompts, seeds), rank, 2).predict_dataloader()) for rank in range(2)]
    assert sorted(chain.from_iterable(parts)) == sorted(rows(*batches))


@pytest.mark.parametrize(("prompts", "seeds", "message"), [([], [0], "data.prompts"), (["a"], [], "data.seeds")])
def test_prompt_list_needs_prompts_and_seeds(prompts, seeds, message):
    with pytest.raises(UserError, match=message):
        PromptList(prompts, seeds)
