from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from benchmarks.memory import peak_bytes
from tests.diffusion.networks import DDIM, EMPTY, PROCESS, SPREAD, UNGUIDED, conditioning, constant, guided
from tests.tiny import tiny_pipeline
from tokenlearn.diffusion import (
    EDICT,
    OBELM,
    DiscreteProcess,
    GridSolver,
    Leapfrog,
    Reversible,
    SchedulerSolver,
    Stored,
    invert,
    sample,
)
from tokenlearn.diffusion.solvers.grid import leading_grid
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, GuidanceRule, GuidedModel
from tokenlearn.models import Conditioning, StableDiffusion

ALPHAS, SIGMAS = PROCESS.alphas.double(), PROCESS.sigmas.double()
SOLVERS = {"edict": EDICT(), "leapfrog": Leapfrog(), "o_belm": OBELM()}
EVALUATIONS = {"edict": lambda steps: 2 * steps, "leapfrog": lambda steps: steps + 1, "o_belm": lambda steps: steps}
BATCH = 2
CFG = ClassifierFreeGuidance(3.0)
BUNDLED = Path(__file__).parents[2] / "checkpoints" / "portraits"


class Gaussian:
    """The best prediction of noise where images are normal with deviation SPREAD about a mean that the prompt says."""

    process = PROCESS

    def __init__(self):
        self.calls = []

    def __call__(self, latents, timestep, conditioning):
        self.calls.append((len(latents), torch.is_grad_enabled()))
        alpha, sigma = ALPHAS[timestep].to(latents), SIGMAS[timestep].to(latents)
        mean = self.mean(latents, conditioning.prompt_embeds.mean(dim=1))
        return sigma / (alpha**2 * SPREAD**2 + sigma**2) * (latents - alpha * mean)

    def mean(self, latents, embeds):
        return embeds.mean(dim=1).reshape(-1, 1, 1, 1)


class Network(Gaussian):
    """As Gaussian, but with a mean that two convolutions, in a precision of their own, make of latents and prompt."""

    def __init__(self, dtype, width=8):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = (width, 4, 3, 3), (4, width, 3, 3), (3, width)
        self.into, self.out_of, self.project = (
            0.2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
        )

    def mean(self, latents, embeds):
        prompt = (embeds.to(self.project) @ self.project)[..., None, None]
        hidden = torch.tanh(torch.nn.functional.conv2d(latents.to(self.into), self.into, padding=1) + prompt)
        return torch.nn.functional.conv2d(hidden, self.out_of, padding=1)


def grid_of(steps, **options):
    return leading_grid(PROCESS, steps, **options)


def noise(dtype=torch.float64, size=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 4, size, size, generator=generator, dtype=torch.float64).to(dtype)


def prompts(dtype=torch.float64):
    """A constant row for all samples, and one row for each as a leaf."""
    rows = torch.randn(BATCH + 1, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return [Conditioning(rows[:1].clone()), Conditioning(rows[1:].clone().requires_grad_())]


def bound(method, steps, dtype=torch.float64, **options):
    return GridSolver(method, PROCESS, steps, dtype=dtype, **options)


def noisy_latents(pairs, method):
    """Latents at the noise level of pairs (B, 2, C, h, w)."""
    return method.noisy[0] * pairs[:, 0] + method.noisy[1] * pairs[:, 1]


@pytest.fixture(params=SOLVERS)
def name(request):
    return request.param


@pytest.fixture
def solver(name):
    return SOLVERS[name]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def gradients(how, network, start, conditionings, solver, rule=CFG, **timesteps):
    """Gradients by the start and by the prompt, and the latents."""
    start = start.detach().requires_grad_()
    latents = sample(GuidedModel(network, rule, conditionings), start, solver=solver, gradient=how, **timesteps)
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)).to(latents)
    leaves = [start, conditionings[1].prompt_embeds]
    return [*torch.autograd.grad((latents * weights).sum(), leaves), latents.detach()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_gradient_equals_plain_autograd(solver, dtype, tolerance):
    arguments = Network(dtype), noise(dtype), prompts(dtype), bound(solver, 20, dtype)
    for found, expected in zip(gradients(Reversible(), *arguments), gradients(Stored(), *arguments), strict=True):
        assert found.dtype == dtype
        assert expected.abs().max() > 0.01
        assert relative(found, expected) < tolerance


def test_gradient_reaches_both_tensors_of_a_pair(solver):
    network, conditionings, ten = Network(torch.float64), prompts(), bound(solver, 10)
    with torch.no_grad():
        pairs = invert(GuidedModel(network, UNGUIDED, conditionings[1:]), noise(), solver=ten, to_timestep=501)
    arguments = network, pairs, conditionings, ten
    plain = gradients(Stored(), *arguments, from_timestep=501)
    for found, expected in zip(gradients(Reversible(), *arguments, from_timestep=501), plain, strict=True):
        assert expected.abs().max() > 0.01
        assert relative(found, expected) < 1e-9
    assert (plain[0].flatten(2).norm(dim=2) > 0).all()


def test_gradient_of_an_inversion_is_its_difference_quotient(solver):
    conditionings, latents = prompts(), (SPREAD * noise()).requires_grad_()
    model, ten = GuidedModel(Network(torch.float64), CFG, conditionings), bound(solver, 10)

    def loss():
        return noisy_latents(invert(model, latents, solver=ten), solver).square().sum()

    leaves = [latents, conditionings[1].prompt_embeds]
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss(), leaves), strict=True):
        with torch.no_grad():
            step = 1e-4 * gradient / gradient.norm()
            leaf += step
            after = loss()
            leaf -= 2 * step
            before = loss()
            leaf += step
        assert gradient.abs().max() > 0.01
        assert ((after - before) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=1e-4)


def test_evaluations_are_counted_exactly(name, solver):
    network, steps = Network(torch.float64), 7
    start, model = noise().requires_grad_(), GuidedModel(network, CFG, prompts())
    latents = sample(model, start, solver=bound(solver, steps, torch.float32), gradient=Reversible())
    once = EVALUATIONS[name](steps)
    assert network.calls == [(2 * BATCH, False)] * once  # both branches in one call
    network.calls.clear()
    latents.sum().backward()
    assert network.calls == [(2 * BATCH, True)] * once


def test_nothing_has_a_gradient_when_no_input_or_the_caller_wants_none(solver):
    network, conditionings = Network(torch.float64), prompts()
    constants = [constant(item) for item in conditionings]
    found = []
    for items, enabled in ((constants, True), (conditionings, False)):
        with torch.set_grad_enabled(enabled):
            model = GuidedModel(network, CFG, items)
            found.append(sample(model, noise(), solver=bound(solver, 5, torch.float32), gradient=Reversible()))
    assert not any(latents.requires_grad for latents in found)
    assert not any(grad for _, grad in network.calls)
    assert torch.equal(*found)


def test_memory_does_not_grow_with_the_steps(solver):
    """By all tensors alive at once in forward and backward together, weights and inputs left out."""
    start, conditionings = noise(torch.float32, 16).requires_grad_(), prompts(torch.float32)
    network = Network(torch.float32, width=32)

    def peak(steps, gradient):
        def step():
            model = GuidedModel(network, CFG, conditionings)
            latents = sample(model, start, solver=bound(solver, steps, torch.float32), gradient=gradient)
            torch.autograd.grad(latents.sum(), [start, conditionings[1].prompt_embeds])

        step()  # whatever libraries allocate once
        return peak_bytes(step, torch.device("cpu"))

    assert peak(50, Reversible()) < 1.05 * peak(10, Reversible())
    assert 4 < peak(50, Stored()) / peak(10, Stored()) < 6


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 1e-10)])
def test_inversion_is_exact_under_guidance(solver, dtype, tolerance, scale):
    rule, latents, fifty = ClassifierFreeGuidance(scale), SPREAD * noise(dtype), bound(solver, 50, dtype)
    model = GuidedModel(Network(dtype), rule, rule.conditionings(*prompts(dtype)))
    with torch.no_grad():
        pairs = invert(model, latents, solver=fifty)
        back = sample(model, pairs, solver=fifty)
    assert relative(back, latents) < tolerance
    assert relative(noisy_latents(pairs, solver), latents) > 0.1


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
def test_inversion_is_exact_on_the_bundled_model(bundled, solver, scale):
    backbone, latents, conditionings = bundled
    rule, ten = ClassifierFreeGuidance(scale), backbone.make_solver(solver, 10)
    model = GuidedModel(backbone, rule, rule.conditionings(*conditionings))
    with torch.no_grad():
        back = sample(model, invert(model, latents, solver=ten), solver=ten)
    assert relative(back, latents) < 1e-3


@pytest.fixture(scope="module")
def bundled():
    """The bundled model, clean latents of random colours, and an empty and another prompt."""
    backbone = StableDiffusion(str(BUNDLED))
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = backbone.encode_images(torch.nn.functional.interpolate(images, (64, 64), mode="bilinear"))
        return backbone, latents, (backbone.encode_prompts([""]), backbone.encode_prompts(["a man with a hat"]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_any_backbone_and_kind_of_prediction(tmp_path, solver, prediction_type):
    backbone = StableDiffusion(str(tiny_pipeline(tmp_path, prediction_type)))
    start = backbone.initial_latents([1, 2])
    with torch.no_grad():
        conditionings = [backbone.encode_prompts([""]), backbone.encode_prompts(["a king", "a wizard"])]
    conditionings[1].prompt_embeds.requires_grad_()
    # Networks that give no use to a part of their conditioning leave it without a gradient.
    conditionings[1].pooled_prompt_embeds.requires_grad_()
    # In float64 around a float32 network: few steps to a last that is short make O-BELM's rounding grow 6e4 times.
    four = GridSolver(solver, backbone.process, 4, dtype=torch.float64)
    arguments = backbone, start, conditionings, four
    for found, expected in zip(gradients(Reversible(), *arguments), gradients(Stored(), *arguments), strict=True):
        assert expected.abs().max() > 0
        assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("steps", [50, 100])
@pytest.mark.parametrize("from_timestep", [501, None])
def test_follows_the_exact_flow_better_than_ddim(name, solver, from_timestep, steps):
    """The flow of normal images only rescales them, so that each stays as many deviations from the mean."""
    mean, grid = Conditioning(torch.zeros(1, 1, 1)), grid_of(steps, from_timestep=from_timestep)
    first, last = ((level.alpha**2 * SPREAD**2 + level.sigma**2) ** 0.5 for level in (grid.levels[0], grid.levels[-1]))
    exact = last * noise()
    model = GuidedModel(Gaussian(), UNGUIDED, [mean])
    found = sample(model, first * noise(), solver=bound(solver, steps), from_timestep=from_timestep)
    ddim = first * noise() / grid.levels[0].alpha
    for before, after in pairwise(grid.levels):
        prediction = Gaussian()(before.alpha * ddim, torch.tensor(before.timestep), mean)
        ddim = ddim + (after.ratio - before.ratio) * prediction
    better = {"edict": 1, "leapfrog": 0.05, "o_belm": 0.5}[name]
    assert relative(found, exact) < better * relative(ddim * grid.levels[-1].alpha, exact)


class TestAgainstPlainFormulas:
    """Each solver beside its paper's update, written for raw latents one step at a time."""

    def setup_method(self):
        self.network, self.grid, self.prompt = Network(torch.float64), grid_of(10), constant(prompts()[1])

    def noise_of(self, latents, timestep):
        return self.network(latents, torch.tensor(timestep), self.prompt)

    def sampled(self, solver):
        return sample(GuidedModel(self.network, UNGUIDED, [self.prompt]), noise(), solver=bound(solver, 10))

    @pytest.mark.parametrize("p", [0.93, 0.8])
    def test_edict(self, p):
        x, y = noise(), noise()
        for step, (before, after) in enumerate(pairwise(self.grid.levels)):
            a = after.alpha / before.alpha
            b = after.sigma - a * before.sigma
            if step % 2 == 0:
                x = a * x + b * self.noise_of(y, before.timestep)
                y = a * y + b * self.noise_of(x, before.timestep)
            else:
                y = a * y + b * self.noise_of(x, before.timestep)
                x = a * x + b * self.noise_of(y, before.timestep)
            x = p * x + (1 - p) * y
            y = p * y + (1 - p) * x
        torch.testing.assert_close(self.sampled(EDICT(p)), (x + y) / 2)

    def test_asynchronous_leapfrog(self):
        levels = self.grid.levels
        velocity = self.noise_of(noise(), levels[0].timestep)
        x = noise() / levels[0].alpha
        for before, middle, after in zip(levels[:-1], self.grid.middles, levels[1:], strict=True):
            x = x + (middle.ratio - before.ratio) * velocity
            velocity = 2 * self.noise_of(middle.alpha * x, middle.timestep) - velocity
            x = x + (after.ratio - middle.ratio) * velocity
        torch.testing.assert_close(self.sampled(Leapfrog()), levels[-1].alpha * x)

    def test_o_belm(self):
        levels = self.grid.levels
        x = [noise() / levels[0].alpha]
        change = levels[1].ratio - levels[0].ratio
        x.append(x[0] + change * self.noise_of(noise(), levels[0].timestep))
        for step in range(1, len(levels) - 1):
            previous, change = change, levels[step + 1].ratio - levels[step].ratio
            r = change / previous
            prediction = self.noise_of(levels[step].alpha * x[step], levels[step].timestep)
            x.append(r**2 * x[step - 1] + (1 - r**2) * x[step] + change * (1 + r) * prediction)
        torch.testing.assert_close(self.sampled(OBELM()), levels[-1].alpha * x[-1])


def test_a_stage_evaluates_at_a_point_that_both_of_its_ends_give(solver):
    grid = grid_of(10)
    for stage in [*solver.start(grid), *solver.start_inverse(grid), *solver.steps(grid)]:
        inverse, pair = stage.inverse(), torch.tensor([0.3, -1.2], dtype=torch.float64)
        matrix, weights = (torch.tensor(value, dtype=torch.float64) for value in (stage.matrix, stage.weights))
        for output in (0.0, 5.0):
            after = matrix @ pair + weights * output
            torch.testing.assert_close(
                torch.tensor(inverse.point, dtype=torch.float64) @ after,
                torch.tensor(stage.point, dtype=torch.float64) @ pair,
            )
            back = torch.tensor(inverse.matrix, dtype=torch.float64) @ after
            back = back + output * torch.tensor(inverse.weights, dtype=torch.float64)
            torch.testing.assert_close(back, pair)


def test_an_edit_from_the_middle_keeps_the_rest_of_the_path(solver):
    network, twenty = Network(torch.float64), bound(solver, 20)
    empty, prompt = (constant(item) for item in prompts())
    latents, plain = SPREAD * noise(), GuidedModel(network, UNGUIDED, [empty])
    guided = GuidedModel(network, ClassifierFreeGuidance(5.0), [empty, prompt])
    assert {level.timestep for level in twenty.grid(from_timestep=401).levels} == {*range(1, 402, 50), 0}
    pairs = invert(plain, latents, solver=twenty, to_timestep=401)
    same, edited = (sample(model, pairs, solver=twenty, from_timestep=401) for model in (plain, guided))
    assert relative(same, latents) < 1e-10
    assert relative(edited, latents) > 0.1


def test_parts_of_sampling_go_on_from_each_others_latents(solver):
    model, many = GuidedModel(Gaussian(), UNGUIDED, [constant(prompts()[1])]), bound(solver, 200)
    whole = sample(model, noise(), solver=many)
    middle = sample(model, noise(), solver=many, to_timestep=501)
    end = sample(model, middle, solver=many, from_timestep=501)
    assert relative(end, whole) < 0.01
    assert relative(middle, whole) > 0.1


class EverySecond(GuidanceRule):
    """A rule that needs the prompt at even steps alone, and notes the steps of its calls."""

    def __init__(self):
        self.steps = []

    def needed(self, step):
        return [0, 1] if step % 2 == 0 else [0]

    def __call__(self, predictions, step):
        self.steps.append(step)
        assert len(predictions) == len(self.needed(step))
        return predictions[0] if len(predictions) == 1 else predictions[0] + 3 * (predictions[1] - predictions[0])


def test_rules_are_asked_for_what_they_need_at_each_step(name, solver):
    network, rule = Network(torch.float64), EverySecond()
    arguments = network, noise(), prompts(), bound(solver, 5), rule
    expected = gradients(Stored(), *arguments)
    network.calls.clear()
    rule.steps.clear()
    for found, plain in zip(gradients(Reversible(), *arguments), expected, strict=True):
        assert relative(found, plain) < 1e-9
    steps = {"edict": sorted([*range(5)] * 2), "leapfrog": [0, *range(5)], "o_belm": [*range(5)]}[name]
    assert rule.steps == steps + steps[::-1]
    assert [rows for rows, _ in network.calls] == [BATCH * len(rule.needed(step)) for step in rule.steps]


def test_the_backward_sweep_keeps_the_autocast_of_the_forward_one(solver):
    model, found = GuidedModel(Network(torch.float32), CFG, prompts(torch.float32)), []
    for leave in (False, True):
        start = noise(torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            five = bound(solver, 5, torch.float32)
            loss = sample(model, start, solver=five, gradient=Reversible()).sum()
            if not leave:
                loss.backward()
        if leave:
            loss.backward()
        found.append(start.grad)
    assert torch.equal(*found)


def test_half_precision_networks_leave_inversion_exact(solver):
    model = GuidedModel(Network(torch.bfloat16), UNGUIDED, [constant(prompts(torch.float32)[1])])
    latents, twenty = SPREAD * noise(torch.float32), bound(solver, 20, torch.float32)
    back = sample(model, invert(model, latents, solver=twenty), solver=twenty)
    assert back.dtype == torch.float32
    assert relative(back, latents) < 0.05  # a bfloat16 step of an input moves its output by up to 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_refused(solver, dtype):
    with pytest.raises(UserError, match=rf"{dtype} .* float32"):
        bound(solver, 5, dtype)


def test_wrong_numbers_of_rows_are_refused(solver):
    with pytest.raises(ValueError, match="2 rows for 3 latents"):
        sample(GuidedModel(Gaussian(), UNGUIDED, prompts()[1:]), torch.zeros(3, 4, 2, 2), solver=bound(solver, 5))


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_grid_is_that_of_the_ddim_scheduler(steps, set_alpha_to_one):
    scheduler = DDIMScheduler.from_config(DDIM.config, set_alpha_to_one=set_alpha_to_one)
    scheduler.set_timesteps(steps)
    grid = grid_of(steps, set_alpha_to_one=set_alpha_to_one)
    assert [level.timestep for level in grid.levels] == [*scheduler.timesteps.tolist(), 0]
    # One of the scheduler's own steps of known noise, from each level to the next.
    x0, prediction = torch.full((1,), 0.3), torch.full((1,), -1.1)
    for before, after in pairwise(grid.levels):
        latents = before.alpha * x0 + before.sigma * prediction
        found = scheduler.step(prediction, before.timestep, latents).prev_sample
        torch.testing.assert_close(found, after.alpha * x0 + after.sigma * prediction)


def test_middles_are_the_nearest_timesteps_between_the_levels():
    grid = grid_of(20)
    ratios = (SIGMAS / ALPHAS).tolist()
    for before, middle, after in zip(grid.levels, grid.middles, grid.levels[1:], strict=False):
        wanted = (before.ratio + after.ratio) / 2
        assert after.timestep <= middle.timestep <= before.timestep
        assert abs(middle.ratio - wanted) <= min(abs(ratio - wanted) for ratio in ratios)


def test_a_step_that_would_do_nothing_is_left_out():
    grid = grid_of(10, steps_offset=0)
    assert [level.timestep for level in grid.levels] == [*range(900, -1, -100)]
    assert max(grid.changes) < 0
    assert grid_of(10, steps_offset=0, set_alpha_to_one=True).levels[-2:][0].timestep == 0


def test_sampling_to_no_noise_at_all(solver):
    fifty = bound(solver, 50, torch.float32, set_alpha_to_one=True)
    grid = fifty.grid()
    latents = sample(GuidedModel(Gaussian(), UNGUIDED, [constant(prompts()[1])]), noise(), solver=fifty)
    assert latents.isfinite().all()
    assert (grid.levels[-1].ratio, grid.levels[-1].alpha) == (0, 1)


@pytest.mark.parametrize(
    ("steps", "options", "words"),
    [
        (0, {}, "steps .* 1000, got 0"),
        (1001, {}, "steps .* 1000, got 1001"),
        (1000, {}, "1000 steps .* steps_offset 1 .* 1000"),
        (20, {"from_timestep": 400}, "timestep 400 .* 20; .* 351 or 401"),
        (20, {"to_timestep": 70}, "timestep 70 .* 20; .* 51 or 101"),
        (20, {"from_timestep": 401, "to_timestep": 401}, "timestep 401 to 401.* to_timestep"),
    ],
)
def test_impossible_grids_are_refused(steps, options, words):
    with pytest.raises(UserError, match=words):
        grid_of(steps, **options)


def test_levels_without_any_image_are_refused():
    alphas_cumprod = DDIM.alphas_cumprod.clone()
    alphas_cumprod[901] = 0
    process = DiscreteProcess(alphas_cumprod, "noise")
    with pytest.raises(UserError, match="alpha is 0 at timestep 901"):
        leading_grid(process, 10)
    assert leading_grid(process, 10, from_timestep=801).levels[0].timestep == 801


@pytest.mark.parametrize("mixing", [0.0, 1.1])
def test_impossible_mixing_is_refused(mixing):
    with pytest.raises(UserError, match=rf"EDICT.*mixing.* {mixing}"):
        EDICT(mixing)


def test_in_few_guided_steps_leapfrog_is_worse_than_ddim_and_in_more_better():
    """As docs/doodl.md says: it does not damp what the first steps overshoot."""
    modes, spread = torch.tensor([-1.0, 1.0]), 0.05

    def mixture(latents, timestep, conditioning):
        """The best prediction where images are near one of two modes; a prompt names the second one alone."""
        alpha, sigma = ALPHAS[timestep].to(latents), SIGMAS[timestep].to(latents)
        variance = alpha**2 * spread**2 + sigma**2
        offsets = latents[..., None] - alpha * modes
        named = conditioning.prompt_embeds.reshape(-1, 1, 1, 1, 1) > 0
        logits = (-(offsets**2) / (2 * variance)).masked_fill(named & (modes < 0), -torch.inf)
        return sigma / variance * (offsets * logits.softmax(dim=-1)).sum(dim=-1)

    rule = ClassifierFreeGuidance(7.5)
    model = guided(mixture, rule.conditionings(EMPTY, conditioning(1.0)), rule)
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = sample(model, noise, solver=SchedulerSolver(DDIM, 500))

    def error(solver):
        return (sample(model, noise, solver=solver) - exact).abs().mean()

    assert error(GridSolver(Leapfrog(), PROCESS, 10)) > 2 * error(SchedulerSolver(DDIM, 10))
    assert error(GridSolver(Leapfrog(), PROCESS, 20)) < error(SchedulerSolver(DDIM, 20)) / 2
