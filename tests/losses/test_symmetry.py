import torch

from tokenlearn.losses import mirror_error


def test_is_zero_for_mirrored_images_only():
    half = torch.rand(2, 3, 4, 3, generator=torch.Generator().manual_seed(0))
    symmetric = torch.cat([half, half.flip(-1)], dim=-1)
    upside_down = torch.cat([half, half.flip(-2)], dim=-2)
    assert mirror_error(symmetric).tolist() == [0, 0]
    assert (mirror_error(upside_down) > 0).all()


def test_known_error_of_each_sample():
    images = torch.zeros(2, 1, 1, 4)
    images[1, 0, 0] = torch.tensor([1.0, 0.5, 0.5, 0.0])
    assert mirror_error(images).tolist() == [0, 0.5]


def test_following_the_gradient_makes_an_image_symmetric():
    images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(mirror_error(images).sum(), images)
    stepped = images - gradient * images.numel() / 8  # half of the difference from each side
    torch.testing.assert_close(stepped, (images + images.flip(-1)) / 2)
