from itertools import product

import pytest
import torch

from tokenlearn.diffusion.schedule import (
    add_noise,
    convert,
    noise_from_velocity,
    noise_from_x0,
    velocity,
    x0_from_noise,
    x0_from_velocity,
)

KINDS = ("epsilon", "v_prediction", "sample")


@pytest.fixture
def known():
    """One consistent set of quantities, in double precision, at a different timestep for each sample."""
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = torch.tensor([0.2, 0.8, 1.4], dtype=torch.float64)
    alpha, sigma = angles.cos(), angles.sin()
    column = (3, 1, 1, 1)
    latents = alpha.reshape(column) * x0 + sigma.reshape(column) * noise
    v = alpha.reshape(column) * noise - sigma.reshape(column) * x0
    return {"epsilon": noise, "sample": x0, "v_prediction": v, "latents": latents, "alpha": alpha, "sigma": sigma}


def test_closed_forms(known):
    x0, noise, v, z = known["sample"], known["epsilon"], known["v_prediction"], known["latents"]
    alpha, sigma = known["alpha"], known["sigma"]
    torch.testing.assert_close(add_noise(x0, noise, alpha, sigma), z)
    torch.testing.assert_close(velocity(x0, noise, alpha, sigma), v)
    torch.testing.assert_close(x0_from_noise(z, noise, alpha, sigma), x0)
    torch.testing.assert_close(noise_from_x0(z, x0, alpha, sigma), noise)
    torch.testing.assert_close(x0_from_velocity(z, v, alpha, sigma), x0)
    torch.testing.assert_close(noise_from_velocity(z, v, alpha, sigma), noise)


@pytest.mark.parametrize(("from_", "to"), list(product(KINDS, KINDS)))
def test_convert_between_all_kinds(known, from_, to):
    converted = convert(known[from_], known["latents"], known["alpha"], known["sigma"], from_, to)
    torch.testing.assert_close(converted, known[to])


@pytest.mark.parametrize(("from_", "to"), list(product(KINDS, KINDS)))
def test_there_and_back_for_any_network_output(from_, to):
    output, latents = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha, sigma = torch.tensor([0.6, 0.8], dtype=torch.float64)
    there = convert(output, latents, alpha, sigma, from_, to)
    torch.testing.assert_close(convert(there, latents, alpha, sigma, to, from_), output)


def test_velocity_gives_finite_x0_where_no_signal_is_left():
    v = torch.ones(1, 1, 2, 2)
    x0 = convert(v, torch.zeros(1, 1, 2, 2), torch.tensor(0.0), torch.tensor(1.0), "v_prediction", "sample")
    torch.testing.assert_close(x0, -v)
