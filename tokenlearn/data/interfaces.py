"""What data modules and tasks know of each other.

Neither reads the other by the names of its attributes. A data module asks its trainer for the task by
:func:`consumer_of`, a task asks for the data by :func:`data_of` or :func:`find_data`, each naming one of the abstract
classes below, and uses nothing but that class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from tokenlearn.data.batches import ImageBatch
from tokenlearn.errors import UserError

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from tokenlearn.data.portraits import Scene

T = TypeVar("T")


class ImageConsumer(ABC):
    """A task that turns images, or prompts and seeds, into latents with its frozen backbone."""

    description: ClassVar[str] = "a task with a diffusion model"

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Height and width in pixels of the images that the backbone was trained for."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Number of which an image's height and width must be multiples."""

    @property
    @abstractmethod
    def learned_placeholders(self) -> Sequence[str]:
        """Placeholder tokens of the task's bank; empty without a bank."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w), scaled as the network expects them, of images (B, 3, H, W) in [0, 1] on any device."""

    @abstractmethod
    def generate_latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Latents (B, C, h, w) of B prompts and seeds, under the task's sampling settings."""

    @abstractmethod
    def encoder_key(self) -> dict[str, Any]:
        """Everything besides the image that :meth:`encode_images` depends on, as JSON types: names a cache."""

    @abstractmethod
    def sampling_key(self) -> dict[str, Any]:
        """Everything besides prompt and seed that :meth:`generate_latents` depends on, as JSON types: names a cache.

        Among it are the weights of the model, the solver, the number of steps, the guidance rule with its settings and
        prompts, the negative prompt and the size.
        """


class ClassConsumer(ABC):
    """A task that learns a token for each of its classes from prompts."""

    description: ClassVar[str] = "a task with classes, such as ClassTokens"

    @property
    @abstractmethod
    def class_descriptions(self) -> Mapping[str, str | None]:
        """Class name to a description of the class, or None, in the order of class indices."""


class LabelledImages(ABC):
    """Data of images with class indices of attributes."""

    description: ClassVar[str] = "images with labels, such as ImageDataModule"

    @property
    @abstractmethod
    def class_names(self) -> Mapping[str, tuple[str, ...]]:
        """Attribute to its class names in the order of class indices; empty for numbers and booleans."""

    @abstractmethod
    def train_dataloader(self) -> Iterable[ImageBatch]:
        """The training stream from its beginning, this rank's part."""


class DrawnImages(ABC):
    """Data of images whose scenes may be known."""

    description: ClassVar[str] = "images, such as ImageDataModule"

    @abstractmethod
    def scenes(self, names: Sequence[str]) -> Sequence[Scene]:
        """The scenes of images by their names in batches; none if the images are not of the bundled world."""


class PromptTemplates(ABC):
    """Data of prompts that are made from templates."""

    description: ClassVar[str] = "templates of prompts, such as PromptDataModule"

    @property
    @abstractmethod
    def templates(self) -> Sequence[str]:
        """Prompts with ``{}`` where the class goes."""


class WholePrompts(ABC):
    """Data of prompts that are generated as they are."""

    description: ClassVar[str] = "whole prompts, such as PromptList"

    prompts: Sequence[str]


class TaskWrapper(ABC):
    """A module that runs another task, such as an evaluation; data modules look through it at the task."""

    @abstractmethod
    def wrapped_task(self) -> object:
        """The task."""


# An abstract class is no `type[T]` to mypy, but a callable that returns T.
def consumer_of(trainer: L.Trainer, interface: Callable[..., T]) -> T:
    """The task of a trainer, for a data module.

    Args:
        trainer: trainer of the data module.
        interface: :class:`ImageConsumer` or :class:`ClassConsumer`.

    Raises:
        UserError: if the task is of another kind.
    """
    task: object = trainer.lightning_module
    while not isinstance(task, _type(interface)) and isinstance(task, TaskWrapper):
        task = task.wrapped_task()
    if not isinstance(task, _type(interface)):
        raise UserError(
            f"these data need {_description(interface)}, but the model is {type(task).__name__}; set model.class_path "
            "or data.class_path to another class"
        )
    return task


def find_data(trainer: L.Trainer, interface: Callable[..., T]) -> T | None:
    """The data module of a trainer, for a task; None if there is none, or one of another kind.

    Args:
        trainer: trainer of the task.
        interface: :class:`LabelledImages` or :class:`PromptTemplates`.
    """
    data = getattr(trainer, "datamodule", None)  # the trainer has the attribute once it was handed a data module
    return data if isinstance(data, _type(interface)) else None


def data_of(trainer: L.Trainer, interface: Callable[..., T]) -> T:
    """The data module of a trainer, for a task that needs one; arguments as :func:`find_data`.

    Raises:
        UserError: if there is none, or one of another kind.
    """
    data = find_data(trainer, interface)
    if data is None:
        found = getattr(trainer, "datamodule", None)
        kind = "there is no data module" if found is None else f"the data are {type(found).__name__}"
        raise UserError(f"the model needs {_description(interface)}, but {kind}; set data.class_path")
    return data


def trainer_of(data: L.LightningDataModule) -> L.Trainer:
    """The trainer that a data module was handed to.

    Raises:
        RuntimeError: if there is none yet.
    """
    if data.trainer is None:
        raise RuntimeError(
            f"{type(data).__name__} reads ranks and the task from its trainer; hand it to Trainer.fit, test or predict"
        )
    return data.trainer


def _type(interface: Callable[..., T]) -> type[T]:
    return cast(type[T], interface)


def _description(interface: Callable[..., object]) -> str:
    return str(getattr(interface, "description", getattr(interface, "__name__", interface)))
