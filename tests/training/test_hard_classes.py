"""Images of classes with a high loss."""

import pytest
import torch

from tokenlearn.errors import UserError
from tokenlearn.training.hard_classes import HardClasses, classes_of_seeds


def counts_of(classes, number):
    return torch.bincount(torch.tensor(classes), minlength=number).tolist()


def experienced(num_classes, share):
    """Hard classes with enough images of each to go by."""
    hard = HardClasses(num_classes, share)
    hard.images[:] = 200
    return hard


def test_the_first_images_are_even():
    hard = HardClasses(2, 1.0)
    hard.update(torch.tensor([0.0, 1990.0]), torch.tensor([199.0, 199.0]))
    assert hard.assign([0, 1], [7, 8]) == [0, 1]
    hard.update(torch.tensor([0.0, 10.0]), torch.tensor([1.0, 1.0]))
    assert hard.assign([0, 1], [7, 8]) == [1, 1]


def test_classes_with_equal_losses_have_about_equal_numbers_of_images():
    classes = experienced(4, 0.5).assign([0] * 200, range(1000, 1200))
    assert all(48 <= count <= 52 for count in counts_of(classes, 4))


def test_half_of_the_images_are_in_proportion_to_the_losses():
    hard = experienced(4, 0.5)
    hard.losses = torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert hard.frequencies().tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    counts = counts_of(hard.assign([0] * 80, range(80)), 4)
    assert counts == pytest.approx([40, 20, 10, 10], abs=1)


def test_a_share_of_0_leaves_a_batch_as_it_is():
    hard = experienced(3, 0.0)
    hard.losses[1] = 100
    assert hard.assign([2, 0, 1], [7, 8, 9]) == [2, 0, 1]


def test_losses_below_zero_count_as_none():
    hard = HardClasses(3, 1.0)
    hard.losses = torch.tensor([-4.0, 1.0, 1.0], dtype=torch.float64)
    assert hard.frequencies().tolist() == [0, 0.5, 0.5]
    hard.losses = torch.tensor([-4.0, -1.0, 0.0], dtype=torch.float64)
    assert hard.frequencies().tolist() == pytest.approx([1 / 3] * 3)


def test_a_class_does_not_depend_on_the_batch_of_its_image():
    frequencies = torch.tensor([0.55, 0.3, 0.15], dtype=torch.float64)
    seeds = [10_000_000 + index for index in range(12)]
    one_by_one = [classes_of_seeds(frequencies, [seed])[0] for seed in seeds]
    assert one_by_one == classes_of_seeds(frequencies, seeds)


def test_a_moving_average_counts_every_image_of_a_step_once():
    hard = HardClasses(2, 0.5)
    for loss in (2.0, 4.0):
        hard.note(torch.tensor([loss]), [0])
    hard.update(*hard.take_step())
    image_by_image = 1.0
    for _ in range(2):
        image_by_image = 0.95 * image_by_image + 0.05 * 3
    assert hard.losses.tolist() == pytest.approx([image_by_image, 1])
    hard.update(*hard.take_step())
    assert hard.losses.tolist() == pytest.approx([image_by_image, 1])


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match="hard_classes must be a share from 0 to 1"):
        HardClasses(2, share)
