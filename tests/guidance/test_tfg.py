"""Training-free guidance against loops that are written out, on a network whose best predictions are known."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.diffusion.networks import DDIM, EMPTY, FunctionNetwork, conditioning, gaussian
from tokenlearn.diffusion import EDICT, FlowProcess, SchedulerSolver, sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import TFG, GuidedModel, TFGSettings
from tokenlearn.guidance.tfg import climb, smoothed, strengths
from tokenlearn.losses import Objective
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import SymmetryLoss
from tokenlearn.pipeline import Pipeline, Sampling

STEPS, SCALE, SEEDS = 4, 3.0, [5, 6]
PROMPT = conditioning(0.5)
SOLVER = SchedulerSolver(DDIM, STEPS)
TIMESTEPS = SOLVER.timesteps


class Toward(Objective):
    """A loss with a minimum and a changing curvature."""

    def loss(self, images, targets=None):
        return (0.5 * (images - 1).square() + torch.cos(images)).flatten(1).sum(dim=1)


class Decoding(FunctionNetwork):
    """A network whose images are its latents."""

    def decode_latents(self, latents):
        return latents


def curved(latents, timestep, rows):
    """The predictions for a normal distribution, bent, so that a network's gradient depends on the latents."""
    return gaussian(latents, timestep, rows) + 0.1 * torch.sin(latents)


def start():
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return torch.stack([torch.randn(3, 2, 2, generator=generator) for generator in generators]), generators


def by_rule(rule, function=curved):
    latents, generators = start()
    model = GuidedModel(Decoding(function), rule, rule.conditionings(EMPTY, PROMPT))
    with torch.no_grad():
        return sample(model, latents, solver=SOLVER, generators=generators)


def predicted_noise(latents, timestep):
    plain, prompted = (curved(latents, timestep, rows.expand(len(latents))) for rows in (EMPTY, PROMPT))
    return plain + SCALE * (prompted - plain)


def cumulative(index):
    """Cumulative product of the alphas at a step, and at the next."""
    after = DDIM.alphas_cumprod[TIMESTEPS[index + 1]].item() if index + 1 < STEPS else 1.0
    return DDIM.alphas_cumprod[TIMESTEPS[index]].item(), after


def of_last_step(latents, x0):
    """DDIM ends a hair before clean latents here: what the scheduler makes of the prediction that leads to x0."""
    here, end = DDIM.alphas_cumprod[TIMESTEPS[-1]].item(), DDIM.final_alpha_cumprod.item()
    noise = (latents - math.sqrt(here) * x0) / math.sqrt(1 - here)
    return math.sqrt(end) * x0 + math.sqrt(1 - end) * noise


def written_out(step):
    """A sampler's loop around one method's step: (latents, timestep, a, next a, step, draw) to the next latents."""
    latents, generators = start()

    def draw():
        return torch.stack([torch.randn(3, 2, 2, generator=generator) for generator in generators])

    for index, timestep in enumerate(TIMESTEPS):
        before = latents
        latents = step(latents, timestep, *cumulative(index), index, draw)
    return of_last_step(before, latents)


def gradients(latents, timestep, a, offsets=(0.0,)):
    """x0, noise, and the gradients of the smoothed log density by the latents and by x0."""
    latents = latents.detach().requires_grad_()
    noise = predicted_noise(latents, timestep)
    x0 = (latents - math.sqrt(1 - a) * noise) / math.sqrt(a)
    densities = torch.stack([torch.exp(-Toward()(x0 + offset)) for offset in offsets])
    log_density = densities.mean(dim=0).log().sum()
    through, direct = torch.autograd.grad(log_density, [latents, x0])
    return x0.detach(), noise.detach(), through, direct


def ddim(x0, noise, a_next):
    return math.sqrt(a_next) * x0 + math.sqrt(1 - a_next) * noise


def back(latents, a, a_next, noise):
    return math.sqrt(a / a_next) * latents + math.sqrt(1 - a / a_next) * noise


def test_dps():
    def step(latents, timestep, a, a_next, index, draw):
        x0, noise, through, _ = gradients(latents, timestep, a)
        return ddim(x0, noise, a_next) + 0.05 * through / math.sqrt(a / a_next)

    rule = TFG(Toward(), TFGSettings.dps(0.05), SCALE)
    torch.testing.assert_close(by_rule(rule), written_out(step), rtol=1e-4, atol=1e-5)


def test_lgd():
    def step(latents, timestep, a, a_next, index, draw):
        offsets = [0.3 * math.sqrt(1 - a) * draw() for _ in range(3)]
        x0, noise, through, _ = gradients(latents, timestep, a, offsets)
        return ddim(x0, noise, a_next) + 0.05 * through / math.sqrt(a / a_next)

    rule = TFG(Toward(), TFGSettings.lgd(0.05, smoothing=0.3, samples=3), SCALE)
    torch.testing.assert_close(by_rule(rule), written_out(step), rtol=1e-4, atol=1e-5)


def test_mpgd():
    def step(latents, timestep, a, a_next, index, draw):
        x0, noise, _, direct = gradients(latents, timestep, a)
        return ddim(x0 + 0.1 * direct, noise, a_next)

    rule = TFG(Toward(), TFGSettings.mpgd(0.1), SCALE)
    torch.testing.assert_close(by_rule(rule), written_out(step), rtol=1e-4, atol=1e-5)


def test_freedom():
    def step(latents, timestep, a, a_next, index, draw):
        arrived = latents
        for recurrence in range(3):
            if recurrence:
                latents = back(arrived, a, a_next, draw())
            x0, noise, through, _ = gradients(latents, timestep, a)
            arrived = ddim(x0, noise, a_next) + 0.05 * through / math.sqrt(a / a_next)
        return arrived

    rule = TFG(Toward(), TFGSettings.freedom(0.05, recurrence=3), SCALE)
    # The last step's prediction starts from the latents before it, whatever its recurrences did in between.
    torch.testing.assert_close(by_rule(rule), written_out(step), rtol=1e-4, atol=1e-5)


def test_ugd():
    def step(latents, timestep, a, a_next, index, draw):
        arrived = latents
        for recurrence in range(2):
            if recurrence:
                latents = back(arrived, a, a_next, draw())
            x0, noise, _, _ = gradients(latents, timestep, a)
            for _ in range(3):
                leaf = x0.requires_grad_()
                x0 = (leaf - 0.1 * torch.autograd.grad(Toward()(leaf).sum(), leaf)[0]).detach()
            arrived = ddim(x0, noise, a_next)
        return arrived

    rule = TFG(Toward(), TFGSettings.ugd(0.1, iterations=3, recurrence=2), SCALE)
    torch.testing.assert_close(by_rule(rule), written_out(step), rtol=1e-4, atol=1e-5)


def test_everything_at_once_with_schedules():
    kept = [a / a_next for a, a_next in map(cumulative, range(STEPS))]
    rising, falling = [part / sum(kept) for part in kept], [(1 - part) / sum(1 - p for p in kept) for part in kept]

    def step(latents, timestep, a, a_next, index, draw):
        arrived = latents
        rho, mu = 0.02 * STEPS * rising[index], 0.1 * STEPS * falling[index]
        for recurrence in range(2):
            if recurrence:
                latents = back(arrived, a, a_next, draw())
            offsets = [0.3 * draw() for _ in range(2)]
            x0, noise, through, _ = gradients(latents, timestep, a, offsets)
            for _ in range(2):
                leaf = x0.requires_grad_()
                densities = torch.stack([torch.exp(-Toward()(leaf + offset)) for offset in offsets])
                x0 = (leaf + mu * torch.autograd.grad(densities.mean(dim=0).log().sum(), leaf)[0]).detach()
            arrived = ddim(x0, noise, a_next) + rho * through / math.sqrt(a / a_next)
        return arrived

    settings = TFGSettings(
        rho=0.02,
        mu=0.1,
        recurrence=2,
        iterations=2,
        samples=2,
        smoothing=0.3,
        mu_schedule="decrease",
        smoothing_schedule="constant",
    )
    torch.testing.assert_close(by_rule(TFG(Toward(), settings, SCALE)), written_out(step), rtol=1e-4, atol=1e-5)


def test_without_strength_it_is_classifier_free_guidance():
    def step(latents, timestep, a, a_next, index, draw):
        x0, noise, _, _ = gradients(latents, timestep, a)
        return ddim(x0, noise, a_next)

    rule = TFG(Toward(), TFGSettings(rho=0.0, mu=0.0), SCALE)
    torch.testing.assert_close(by_rule(rule), written_out(step), rtol=1e-4, atol=1e-5)


def test_more_recurrence_meets_the_objective_better():
    losses = [
        Toward()(by_rule(TFG(Toward(), TFGSettings.freedom(0.05, recurrence=recurrence), 1.0))).mean()
        for recurrence in (1, 4)
    ]
    plain = Toward()(by_rule(TFG(Toward(), TFGSettings(rho=0.0, mu=0.0), 1.0))).mean()
    assert losses[1] < losses[0] < plain


def test_an_image_does_not_depend_on_its_batch():
    rule = TFG(Toward(), TFGSettings(rho=0.02, mu=0.05, recurrence=2, iterations=1, samples=2, smoothing=0.2))
    together = by_rule(rule)
    latents, generators = start()
    model = GuidedModel(Decoding(curved), rule, rule.conditionings(EMPTY, PROMPT))
    with torch.no_grad():
        alone = sample(model, latents[1:], solver=SOLVER, generators=generators[1:])
    torch.testing.assert_close(alone, together[1:])


@pytest.mark.parametrize("schedule", ["increase", "decrease", "constant"])
def test_strengths_have_the_mean(schedule):
    alphas = torch.tensor([0.1, 0.5, 0.9, 1.0])
    found = strengths(alphas, 0.7, schedule)
    assert found.mean().item() == pytest.approx(0.7)
    order = {"increase": found.diff() > 0, "decrease": found.diff() < 0, "constant": found.diff() == 0}
    assert order[schedule].all()


def test_smoothing_is_the_mean_density():
    normal = smoothed(lambda x: -0.5 * x.square().flatten(1).sum(dim=1), [torch.tensor(-1.0), torch.tensor(2.0)])
    x = torch.full((1, 1, 1, 1), 0.3)
    assert normal(x).item() == pytest.approx(math.log((math.exp(-0.5 * 0.49) + math.exp(-0.5 * 5.29)) / 2))


def test_climbing_a_parabola():
    # x <- x - s x, n times
    found = climb(lambda x: -0.5 * x.square().flatten(1).sum(dim=1), torch.full((2, 1, 1, 1), 3.0), 0.25, 3)
    torch.testing.assert_close(found, torch.full((2, 1, 1, 1), 3 * 0.75**3))
    assert not found.requires_grad


def test_flow_models_step_to_the_guided_latents():
    """One Euler step from noise to image: the result is the climbed x0."""
    process = FlowProcess()
    rule = TFG(Toward(), TFGSettings.mpgd(0.1), 1.0)
    model = GuidedModel(Decoding(lambda z, t, rows: z - 0.5, process), rule, [PROMPT])
    latents, _ = start()
    model.begin(torch.tensor([1000.0]))
    u = model(latents, torch.tensor(1000.0), 0)
    x0 = torch.full_like(latents, 0.5)  # z - u
    expected = climb(lambda x: -Toward()(x), x0, 0.1, 1)
    torch.testing.assert_close(latents - u, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rho": math.nan}, r"tfg\.rho"),
        ({"recurrence": 0}, r"tfg\.recurrence"),
        ({"iterations": -1}, r"tfg\.iterations"),
        ({"samples": 3}, r"tfg\.samples 3.*tfg\.smoothing"),
        ({"mu_schedule": "rising"}, r"tfg\.mu_schedule.*'rising'"),
        ({"smoothing_schedule": "increase"}, r"tfg\.smoothing_schedule.*'increase'"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        TFGSettings(**options)


def test_solvers_that_do_not_suit_are_refused(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    for solver in ("PNDM", EDICT()):
        pipeline = Pipeline(backbone, sampling=Sampling(3, TFG(SymmetryLoss()), solver))
        with pytest.raises(UserError, match=r"sampling\.solver to DDIM"):
            pipeline.generate(["a portrait"], [1])
    rule = TFG(Toward(), TFGSettings(recurrence=2))
    model = GuidedModel(Decoding(curved), rule, rule.conditionings(EMPTY, PROMPT))
    with pytest.raises(UserError, match="no generators"):
        sample(model, start()[0], solver=SOLVER)


def test_noise_alone_has_no_gradient_through_the_network():
    process = SimpleNamespace(alpha=lambda t: (1000.0 - t) / 1000, sigma=lambda t: t / 1000)
    process.kind, process.x0, process.noise = "flow", FlowProcess().x0, FlowProcess().noise
    model = GuidedModel(Decoding(lambda z, t, rows: z, process), TFG(Toward(), TFGSettings.dps(), 1.0), [PROMPT])
    model.begin(torch.tensor([1000.0, 500.0]))
    with pytest.raises(UserError, match=r"timestep 1000.*set tfg.rho to 0"):
        model(start()[0], torch.tensor(1000.0), 0)


@pytest.mark.parametrize("solver", ["DDIM", "Euler"])
def test_first_order_solvers_lower_the_objective_alike(tiny_models, solver):
    pipeline = Pipeline(StableDiffusion(str(tiny_models / "pipeline")), sampling=Sampling(3, 3.0, solver))
    plain, guided = (
        pipeline.generate(["a portrait"], [3], rule=rule)
        for rule in (None, TFG(SymmetryLoss(), TFGSettings(rho=20.0, mu=200.0), 3.0))
    )
    assert SymmetryLoss()(guided) < 0.9 * SymmetryLoss()(plain)


def test_a_trainer_in_inference_mode_can_guide(tiny_models):
    pipeline = Pipeline(StableDiffusion(str(tiny_models / "pipeline")), sampling=Sampling(3, TFG(SymmetryLoss())))
    expected = pipeline.generate(["a portrait"], [3])
    with torch.inference_mode():
        found = pipeline.generate(["a portrait"], [3])
    torch.testing.assert_close(found, expected)
