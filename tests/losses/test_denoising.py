import pytest
import torch

from tokenlearn.diffusion.process import add_noise, convert, target
from tokenlearn.errors import UserError
from tokenlearn.losses import MinSNR, denoising_error

ALPHA = torch.tensor([0.99, 0.8, 0.3, 0.02], dtype=torch.float64)


def levels(kind):
    return ALPHA, 1 - ALPHA if kind == "flow" else (1 - ALPHA**2).sqrt()


@pytest.mark.parametrize("kind", ["noise", "velocity", "x0", "flow"])
def test_weighted_errors_are_those_of_the_clean_latents_up_to_the_limit(kind):
    """min(SNR, 5) |x0 - x0'|^2, whatever the network predicts."""
    alpha, sigma = levels(kind)
    x0, noise, error = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = target(x0, noise, alpha, sigma, kind)
    latents = add_noise(x0, noise, alpha, sigma)
    predicted_x0 = convert(wanted + error, latents, alpha, sigma, source=kind, target="x0")
    found = MinSNR(5.0).weights(alpha, sigma, kind) * denoising_error(wanted + error, wanted)
    expected = ((alpha / sigma) ** 2).clamp(max=5) * (predicted_x0 - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected)


def test_forms_of_the_paper():
    alpha, sigma = levels("noise")
    ratio = (alpha / sigma) ** 2
    assert (ratio > 5).any()
    assert (ratio < 5).any()
    limited = ratio.clamp(max=5)
    torch.testing.assert_close(MinSNR().weights(alpha, sigma, "noise"), limited / ratio)
    torch.testing.assert_close(MinSNR().weights(alpha, sigma, "velocity"), limited / (ratio + 1))


@pytest.mark.parametrize(("kind", "weight"), [("noise", 1), ("velocity", 0), ("x0", 0), ("flow", 0)])
def test_weights_of_pure_noise(kind, weight):
    assert MinSNR().weights(torch.zeros(1), torch.ones(1), kind).tolist() == [weight]


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("inf"), float("nan")])
def test_gamma_out_of_range(gamma):
    with pytest.raises(UserError, match=r"gamma of MinSNR .* above 0"):
        MinSNR(gamma)
