import torch

from tokenlearn.losses import latent_reconstruction


def test_mean_squared_error_of_each_sample():
    predicted, latents = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.nn.functional.mse_loss(p, z) for p, z in zip(predicted, latents, strict=True)])
    torch.testing.assert_close(latent_reconstruction(predicted, latents), expected)
    weights = torch.tensor([0.5, 2.0, 0.0])
    torch.testing.assert_close(latent_reconstruction(predicted, latents, weights), expected * weights)


def test_masked_samples_have_neither_loss_nor_gradient():
    predicted = torch.ones(2, 4, 2, 2, requires_grad=True)
    losses = latent_reconstruction(predicted, torch.zeros(2, 4, 2, 2), torch.tensor([True, False]))
    assert losses.tolist() == [1, 0]
    losses.sum().backward()
    assert predicted.grad is not None
    assert predicted.grad[0].all()
    assert not predicted.grad[1].any()
