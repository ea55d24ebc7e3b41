from types import SimpleNamespace

import pytest

from tests.data.stand_ins import ClassTask, ImageTask, trainer_with
from tokenlearn.data import GeneratedDataModule, ImageDataModule, PromptDataModule
from tokenlearn.data.interfaces import (
    ClassConsumer,
    ImageConsumer,
    LabelledImages,
    PromptTemplates,
    TaskWrapper,
    consumer_of,
    data_of,
    find_data,
    trainer_of,
)
from tokenlearn.errors import UserError

TEMPLATES = ["a photo of a {}"]


class Evaluation(TaskWrapper):
    def __init__(self, task):
        self._task = task

    def wrapped_task(self):
        return self._task


def test_the_task_is_found_by_its_interface():
    task = ImageTask()
    assert consumer_of(trainer_with(task), ImageConsumer) is task
    assert consumer_of(trainer_with(Evaluation(Evaluation(task))), ImageConsumer) is task
    for module in (ClassTask({}), Evaluation(ClassTask({})), object()):
        with pytest.raises(UserError, match=r"(ClassTask|object).*model\.class_path"):
            consumer_of(trainer_with(module), ImageConsumer)
    with pytest.raises(UserError, match=r"ClassTokens.*ImageTask"):
        consumer_of(trainer_with(task), ClassConsumer)


def test_the_data_are_found_by_their_interface():
    prompts = PromptDataModule(TEMPLATES)
    trainer = SimpleNamespace(datamodule=prompts)
    assert data_of(trainer, PromptTemplates) is find_data(trainer, PromptTemplates) is prompts
    assert data_of(trainer, PromptTemplates).templates == TEMPLATES
    assert find_data(trainer, LabelledImages) is None
    with pytest.raises(UserError, match=r"ImageDataModule.*PromptDataModule.*data\.class_path"):
        data_of(trainer, LabelledImages)
    for nothing in (SimpleNamespace(datamodule=None), SimpleNamespace()):
        assert find_data(nothing, PromptTemplates) is None
        with pytest.raises(UserError, match=r"PromptDataModule.*data\.class_path"):
            data_of(nothing, PromptTemplates)
    assert isinstance(ImageDataModule("portraits:4"), LabelledImages)
    assert isinstance(GeneratedDataModule(["a man"], num_images=2), LabelledImages)


def test_a_data_module_without_a_trainer_says_so():
    with pytest.raises(RuntimeError, match=r"PromptDataModule.*Trainer"):
        trainer_of(PromptDataModule(TEMPLATES))
