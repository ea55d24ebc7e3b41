from itertools import product

import pytest
import torch

from tests.diffusion.networks import DDIM
from tokenlearn.diffusion import DiscreteProcess, FlowProcess
from tokenlearn.diffusion.process import (
    add_noise,
    change_of_prediction,
    convert,
    noise_from_flow,
    noise_from_velocity,
    noise_from_x0,
    target,
    velocity,
    x0_from_flow,
    x0_from_noise,
    x0_from_velocity,
)
from tokenlearn.errors import UserError

KINDS = ("noise", "velocity", "x0")


@pytest.fixture
def known():
    """One consistent set of quantities, in double precision, at a different timestep for each sample."""
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = torch.tensor([0.2, 0.8, 1.4], dtype=torch.float64)
    alpha, sigma = angles.cos(), angles.sin()
    column = (3, 1, 1, 1)
    latents = alpha.reshape(column) * x0 + sigma.reshape(column) * noise
    v = alpha.reshape(column) * noise - sigma.reshape(column) * x0
    return {"noise": noise, "x0": x0, "velocity": v, "latents": latents, "alpha": alpha, "sigma": sigma}


def test_closed_forms(known):
    x0, noise, v, z = known["x0"], known["noise"], known["velocity"], known["latents"]
    alpha, sigma = known["alpha"], known["sigma"]
    torch.testing.assert_close(add_noise(x0, noise, alpha, sigma), z)
    torch.testing.assert_close(velocity(x0, noise, alpha, sigma), v)
    torch.testing.assert_close(x0_from_noise(z, noise, alpha, sigma), x0)
    torch.testing.assert_close(noise_from_x0(z, x0, alpha, sigma), noise)
    torch.testing.assert_close(x0_from_velocity(z, v, alpha, sigma), x0)
    torch.testing.assert_close(noise_from_velocity(z, v, alpha, sigma), noise)


@pytest.mark.parametrize(("source", "target"), list(product(KINDS, KINDS)))
def test_convert_between_all_kinds(known, source, target):
    converted = convert(known[source], known["latents"], known["alpha"], known["sigma"], source=source, target=target)
    torch.testing.assert_close(converted, known[target])


@pytest.mark.parametrize(("source", "target"), list(product(KINDS, KINDS)))
def test_there_and_back_for_any_network_output(source, target):
    output, latents = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha, sigma = torch.tensor([0.6, 0.8], dtype=torch.float64)
    there = convert(output, latents, alpha, sigma, source=source, target=target)
    torch.testing.assert_close(convert(there, latents, alpha, sigma, source=target, target=source), output)


def test_velocity_gives_finite_x0_where_no_signal_is_left():
    v = torch.ones(1, 1, 2, 2)
    x0 = convert(v, torch.zeros(1, 1, 2, 2), torch.tensor(0.0), torch.tensor(1.0), source="velocity", target="x0")
    torch.testing.assert_close(x0, -v)


@pytest.mark.parametrize("kind", KINDS)
def test_target_of_a_network(known, kind):
    torch.testing.assert_close(
        target(known["x0"], known["noise"], known["alpha"], known["sigma"], kind), known[kind], rtol=0, atol=0
    )


def test_target_of_a_flow():
    x0, noise, alpha, sigma = flow()
    torch.testing.assert_close(target(x0, noise, alpha, sigma, "flow"), noise - x0, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*KINDS, "flow"])
def test_a_change_of_the_noise_changes_the_prediction_as_a_conversion_does(kind):
    x0, noise, alpha, sigma = flow()
    if kind == "velocity":
        sigma = (1 - alpha**2).sqrt()
    latents, change = add_noise(x0, noise, alpha, sigma), torch.full_like(noise, 0.3)
    before, after = (
        convert(given, latents, alpha, sigma, source="noise", target=kind) for given in (noise, noise + change)
    )
    torch.testing.assert_close(change_of_prediction(change, alpha, sigma, kind), after - before)


@pytest.mark.parametrize("kind", ["velocity", "x0", "flow"])
def test_latents_of_noise_alone_fix_the_noise(kind):
    change = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    alpha, sigma = torch.tensor([0.0, 0.6], dtype=torch.float64), torch.tensor([1.0, 0.8], dtype=torch.float64)
    first, second = change_of_prediction(change, alpha, sigma, kind).flatten().tolist()
    assert first == 0
    assert second == pytest.approx(-0.8 / 0.6 if kind == "x0" else 1 / 0.6)


def flow():
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return x0, noise, 1 - sigma, sigma


def test_closed_forms_of_a_flow():
    x0, noise, alpha, sigma = flow()
    z = add_noise(x0, noise, alpha, sigma)
    torch.testing.assert_close(x0_from_flow(z, noise - x0, sigma), x0)
    torch.testing.assert_close(noise_from_flow(z, noise - x0, alpha), noise)


@pytest.mark.parametrize(("source", "target"), list(product(("noise", "x0", "flow"), repeat=2)))
def test_convert_between_kinds_of_a_flow(source, target):
    x0, noise, alpha, sigma = flow()
    known = {"noise": noise, "x0": x0, "flow": noise - x0}
    z = add_noise(x0, noise, alpha, sigma)
    converted = convert(known[source], z, alpha, sigma, source=source, target=target)
    torch.testing.assert_close(converted, known[target])


@pytest.mark.parametrize("kind", KINDS)
def test_a_discrete_process_looks_timesteps_up(kind):
    process = DiscreteProcess(DDIM.alphas_cumprod, kind)
    timesteps = torch.tensor([1, 500, 999])
    torch.testing.assert_close(process.alpha(timesteps) ** 2, DDIM.alphas_cumprod[timesteps])
    torch.testing.assert_close(process.alpha(timesteps) ** 2 + process.sigma(timesteps) ** 2, torch.ones(3))
    assert process.alpha(torch.tensor(3)).ndim == 0
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = process.add_noise(x0, noise, timesteps)
    prediction = process.prediction(latents, noise, timesteps)
    torch.testing.assert_close(process.noise(latents, prediction, timesteps), noise, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(process.x0(latents, prediction, timesteps), x0, rtol=1e-2, atol=1e-2)


def test_a_flow_process_is_a_straight_line():
    process = FlowProcess()
    timesteps = torch.tensor([0.0, 250.0, 1000.0])
    torch.testing.assert_close(process.sigma(timesteps), torch.tensor([0.0, 0.25, 1.0]))
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = process.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(latents, x0 + timesteps.reshape(3, 1, 1, 1) / 1000 * (noise - x0))
    torch.testing.assert_close(process.x0(latents, noise - x0, timesteps), x0)
    torch.testing.assert_close(process.noise(latents, noise - x0, timesteps), noise)


@pytest.mark.parametrize("process", [DiscreteProcess(DDIM.alphas_cumprod, "noise"), FlowProcess()])
def test_the_timestep_of_a_noise_ratio(process):
    for timestep in (1, 400, 998):
        at = torch.tensor(timestep)
        assert process.timestep_of_ratio(float(process.sigma(at) / process.alpha(at))) == timestep


def test_a_discrete_process_cannot_predict_flow():
    with pytest.raises(UserError, match="FlowProcess"):
        DiscreteProcess(DDIM.alphas_cumprod, "flow")
