"""Example images of an evaluation, of one process and of several."""

import torch
from torch import multiprocessing

from tokenlearn.evaluation.image_rows import ImageRows, interleave


def image(value):
    return torch.full((3, 1, 1), float(value))


def values(rows):
    return {caption: [int(image[0, 0, 0]) for image in images] for caption, images in rows}


def test_a_row_takes_the_first_images():
    rows = ImageRows(length=3)
    for first in (0, 2):
        rows.add("plain", torch.stack([image(first), image(first + 1)]))
    rows.gather()  # nothing to do in one process
    assert values(rows.rows()) == {"plain": [0, 1, 2]}


def test_processes_take_turns():
    parts = [{"plain": [image(0), image(2)], "hat": [image(0)]}, {"plain": [image(1)], "beard": [image(1)]}]
    assert values(interleave(parts, 8).items()) == {"plain": [0, 1, 2], "hat": [0], "beard": [1]}
    assert values(interleave(parts, 2).items())["plain"] == [0, 1]


def gather(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = ImageRows(length=4)
    rows.add("plain", torch.stack([image(rank), image(rank + 2)]))
    rows.gather()
    torch.save(rows.rows(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_show_the_images_of_both(tmp_path):
    multiprocessing.spawn(gather, (tmp_path,), nprocs=2)
    for rank in range(2):
        assert values(torch.load(tmp_path / f"{rank}.pt")) == {"plain": [0, 1, 2, 3]}
