import math

import pytest
import torch

from tokenlearn.diffusion.latent_optimisation import (
    clip_elements,
    keep_band_norms,
    keep_norm,
    latent_norms,
    optimisation_step,
)


def ones(value=1.0, samples=2):
    return torch.full((samples, 1, 2, 2), value)


def test_elements_are_clipped_one_by_one():
    gradient = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])
    torch.testing.assert_close(clip_elements(gradient, 1.0), torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]))
    assert clip_elements(gradient, None) is gradient


def test_the_clip_comes_after_the_scale_and_before_momentum():
    # b_n = c (1 - m^n) / (1 - m): the sum passes the limit, up to ten times, which it could not if it were clipped.
    latents, buffer = ones(0.0), ones(0.0)
    for step in range(1, 60):
        before = latents
        latents, buffer = optimisation_step(latents, ones(2.0), buffer, grad_scale=3.0, clip=0.5)
        expected = 0.5 * (1 - 0.9**step) / (1 - 0.9)
        torch.testing.assert_close(before - latents, ones(expected))
    assert (before - latents).min() > 4.9


def test_without_a_limit_it_is_descent_with_momentum():
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    parameter = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.7)
    latents, buffer = start, torch.zeros_like(start)
    for _ in range(4):
        optimizer.zero_grad()
        (0.2 * parameter.square().sum() / 2).backward()
        optimizer.step()
        latents, buffer = optimisation_step(latents, latents, buffer, grad_scale=0.2, clip=None, momentum=0.7)
    torch.testing.assert_close(latents, parameter.detach())


def test_a_perturbation_is_neither_scaled_nor_clipped_nor_remembered():
    latents, buffer = optimisation_step(
        ones(0.0), ones(0.0), ones(0.0), grad_scale=0.1, clip=1e-3, momentum=0.9, perturbation=ones(5.0)
    )
    torch.testing.assert_close(latents, ones(5.0))
    torch.testing.assert_close(buffer, ones(0.0))


def test_every_sample_keeps_its_first_norm():
    start = torch.stack([torch.full((4, 2, 2), 3.0), torch.full((4, 2, 2), 0.5)])
    norms = latent_norms(start)
    torch.testing.assert_close(norms.flatten(), torch.tensor([12.0, 2.0]))
    latents, buffer = start, torch.zeros_like(start)
    for seed in range(3):
        gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        latents, buffer = optimisation_step(latents, gradient, buffer, clip=None, renormalise=keep_norm(start))
        torch.testing.assert_close(latent_norms(latents), norms)
    assert not torch.allclose(latents, start)
    # The norm is kept after all else: a step from (6, 8) by (6, 0), back at norm 10.
    two = torch.tensor([6.0, 8.0]).reshape(1, 2, 1, 1)
    gradient = torch.tensor([6.0, 0.0]).reshape(1, 2, 1, 1)
    moved, _ = optimisation_step(two, gradient, torch.zeros_like(two), clip=None, renormalise=keep_norm(two))
    torch.testing.assert_close(moved.flatten(), torch.tensor([0.0, 10.0]))


@pytest.mark.parametrize("norm", [1.0, 7.0])
def test_pairs_have_a_norm_for_each_of_the_two(norm):
    pairs = torch.randn(3, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert latent_norms(pairs).shape == (3, 2, 1, 1, 1)
    scaled = keep_norm(norm * pairs / latent_norms(pairs))(pairs)
    for sample in scaled.flatten(0, 1):
        assert math.isclose(sample.norm().item(), norm, rel_tol=1e-5)


def test_bands_keep_their_norms_and_phases():
    generator = torch.Generator().manual_seed(0)
    first, moved = torch.randn(2, 2, 3, 4, 8, 8, generator=generator)
    kept = keep_band_norms(first)(moved + 3)
    before, strange, after = (torch.fft.fft2(latents, norm="ortho") for latents in (first, moved + 3, kept))
    down = right = torch.fft.fftfreq(8) * 8
    waves = torch.hypot(down[:, None], right[None])
    for low, high in ((0, 0), (0.5, 1), (1, 2), (2, 4), (4, 8)):
        band = (waves >= low) & (waves <= high) if low in (0, 0.5) else (waves > low) & (waves <= high)
        expected = before[..., band].abs().square().sum(dim=-1)
        torch.testing.assert_close(after[..., band].abs().square().sum(dim=-1), expected)
        ratio = after[..., band] / strange[..., band]
        torch.testing.assert_close(
            ratio, ratio[..., :1].real.expand(ratio.shape).to(ratio.dtype), rtol=1e-3, atol=1e-3
        )
    torch.testing.assert_close(latent_norms(kept), latent_norms(first))
    torch.testing.assert_close(keep_band_norms(first)(first), first)


def test_bands_of_latents_that_are_zero_stay_finite():
    first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert keep_band_norms(first)(torch.zeros_like(first)).isfinite().all()


def test_bands_of_half_precision_latents_and_of_odd_sizes():
    first = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    kept = keep_band_norms(first)(first.to(torch.bfloat16))
    assert kept.dtype == torch.bfloat16
    assert kept.shape == first.shape
    torch.testing.assert_close(kept.float(), first, rtol=0.02, atol=0.02)
