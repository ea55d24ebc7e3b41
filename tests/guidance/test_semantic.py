import dataclasses
import re

import pytest
import torch

from tests.diffusion.networks import Recorder, constant
from tokenlearn.diffusion import Checkpointed, sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import (
    ClassifierFreeGuidance,
    ComposableGuidance,
    Concept,
    ConceptSettings,
    GuidedModel,
    RecordedGuidance,
    SemanticGuidance,
    concept_guidance,
    semantic_direction,
    semantically_guided,
    tail_mask,
    total_guidance,
    update_momentum,
    with_momentum,
)
from tokenlearn.models import StableDiffusion

STEPS, BATCH, SHAPE = 7, 3, (4, 4, 5)
EQUATIONS = {
    semantically_guided: 3,
    semantic_direction: 5,
    tail_mask: 6,
    with_momentum: 8,
    update_momentum: 9,
    total_guidance: 10,
}
"""Function to its equation in arXiv:2301.12247; equation 7 there is the sum that no momentum changes."""
PLAIN = ConceptSettings(3.0, None, 0, momentum_scale=0.0)  # nothing but a scaled direction


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predictions(terms, steps=STEPS, batch=BATCH, seed=0):
    """(T, 2 + terms, B, C, h, w): what a network might say at each step to empty prompt, prompt and terms."""
    return random(steps, 2 + terms, batch, *SHAPE, seed=seed)


def guided(rule, outputs):
    """(T, B, C, h, w) results of a rule that is given what it needs."""
    return torch.stack([rule([output[index] for index in rule.needed(i)], i) for i, output in enumerate(outputs)])


def plain(guidance_scale, outputs):
    return outputs[:, 0] + guidance_scale * (outputs[:, 1] - outputs[:, 0])


@pytest.fixture(scope="module")
def backbone(tiny_models):
    return StableDiffusion(str(tiny_models / "pipeline"))


@pytest.fixture(scope="module")
def conditionings(backbone):
    with torch.no_grad():
        return [backbone.encode_prompts([text]) for text in ("", "a photo of a man", "hat", "king", "man")]


class TestEquations:
    @pytest.mark.parametrize(
        ("function", "number"), EQUATIONS.items(), ids=lambda value: getattr(value, "__name__", "")
    )
    def test_each_says_which_it_is(self, function, number):
        first_line = function.__doc__.splitlines()[0]
        assert re.findall(r"equations? (\d+)", first_line) == [str(number)]

    def test_direction_is_the_signed_sum_of_differences(self):
        empty, king, male, female = random(4, BATCH, *SHAPE)
        assert torch.equal(semantic_direction(empty, [king], [1]), king - empty)
        assert torch.equal(semantic_direction(empty, [king], [-1]), empty - king)
        queen = semantic_direction(empty, [king, male, female], [1, -1, 1])
        torch.testing.assert_close(queen, (king - empty) - (male - empty) + (female - empty))

    def test_tails_of_known_numbers(self):
        direction = torch.tensor([[[[1.0, -8.0, 3.0]], [[-40.0, 20.0, 60.0]]]])  # (1, 2, 1, 3)
        # Magnitudes 1 3 8 20 40 60: the quantile 0.75 is 35; of each three, the quantile 0.5 is the second.
        assert tail_mask(direction, 0.75).int().tolist() == [[[[0, 0, 0]], [[1, 0, 1]]]]
        assert tail_mask(direction, 0.5, "channel").int().tolist() == [[[[0, 1, 1]], [[1, 0, 1]]]]
        assert tail_mask(direction, 0.81).int().tolist() == [[[[0, 0, 0]], [[0, 0, 1]]]]

    @pytest.mark.parametrize("threshold", [0.07, 0.29, 0.9, 0.99])
    @pytest.mark.parametrize("side", [3, 8])
    def test_each_sample_has_its_own_tails(self, threshold, side):
        direction = random(BATCH, 4, side, side) * torch.tensor([1.0, 100.0, 0.01]).reshape(-1, 1, 1, 1)
        whole, channel = (tail_mask(direction, threshold, over) for over in ("tensor", "channel"))
        for index, sample_direction in enumerate(direction.abs()):
            for mask, populations in ((whole, [sample_direction]), (channel, sample_direction)):
                expected = []
                for population in populations:
                    ordered = population.flatten().sort().values
                    rank = threshold * (len(ordered) - 1)  # never whole for these sizes
                    expected.append(population > ordered[int(rank)])
                assert torch.equal(mask[index].flatten(), torch.cat([item.flatten() for item in expected]))

    def test_the_two_kinds_of_quantile_differ(self):
        direction = random(1, 4, 16, 16) * torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(-1, 1, 1)
        whole, channel = (tail_mask(direction, 0.9, over) for over in ("tensor", "channel"))
        assert channel.sum(dim=(0, 2, 3)).tolist() == [26] * 4
        assert whole[:, 0].sum() < whole[:, 3].sum()
        assert whole.sum() == 103  # a tenth of 1024, rounded up

    def test_scale_inside_of_the_mask_and_nothing_outside(self):
        direction = random(BATCH, *SHAPE)
        mask = tail_mask(direction, 0.8)
        guidance = concept_guidance(direction, torch.tensor([2.0, -3.0, 0.0]), 0.8)
        torch.testing.assert_close(guidance[0], 2 * direction[0] * mask[0])
        torch.testing.assert_close(guidance[1], -3 * direction[1] * mask[1])
        assert not guidance[2].any()
        torch.testing.assert_close(concept_guidance(direction, 4.0, None), 4 * direction)

    def test_momentum(self):
        guidance, momentum = torch.tensor([2.0]), torch.tensor([10.0])
        torch.testing.assert_close(with_momentum(guidance, momentum, 0.3), torch.tensor([5.0]))
        torch.testing.assert_close(update_momentum(momentum, guidance, 0.6), torch.tensor([6.8]))

    def test_sum_and_guided_prediction(self):
        empty, prompt, one, two = random(4, BATCH, *SHAPE)
        total = total_guidance([one, two], [1.0, 0.5])
        torch.testing.assert_close(total, one + two / 2)
        torch.testing.assert_close(
            semantically_guided(empty, prompt, 7.0, total), empty + 7 * (prompt - empty) + one + two / 2
        )


def reference(guidance_scale, concepts, outputs, over="tensor"):
    """The paper's equations for one sample, number by number, with one momentum of all concepts.

    Args:
        guidance_scale: of the prompt.
        concepts: settings, all of one warm-up and momentum, each of one term.
        outputs: (T, 2 + concepts, C, h, w).
    """
    warmup, momentum_scale, beta = concepts[0].warmup_steps, concepts[0].momentum_scale, concepts[0].momentum_beta
    momentum, results = torch.zeros(SHAPE), []
    for step, (empty, prompt, *terms) in enumerate(outputs):
        guidance = torch.zeros(SHAPE)
        for settings, term in zip(concepts, terms, strict=True):
            difference = term - empty
            for channel in range(SHAPE[0]):
                population = difference if over == "tensor" else difference[channel]
                least = torch.quantile(population.abs().flatten(), settings.threshold)
                chosen = difference[channel].abs() >= least
                guidance[channel] += settings.weight * settings.scale * difference[channel] * chosen
        guidance = guidance + momentum_scale * momentum
        momentum = beta * momentum + (1 - beta) * guidance
        results.append(empty + guidance_scale * (prompt - empty) + (guidance if step >= warmup else 0))
    return torch.stack(results)


@pytest.mark.parametrize("over", ["tensor", "channel"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_equals_the_papers_common_momentum_where_concepts_share_warm_up_and_momentum(over, warmup):
    settings = [
        ConceptSettings(scale, threshold, warmup, weight=weight, momentum_scale=0.4, momentum_beta=0.7)
        for scale, threshold, weight in ((5.0, 0.9, 1.0), (-3.0, 0.6, 1.0), (2.0, 0.2, 0.25))
    ]
    outputs = predictions(3)
    rule = SemanticGuidance(4.0, [Concept(item) for item in settings], over)
    expected = [reference(4.0, settings, outputs[:, :, index], over) for index in range(BATCH)]
    torch.testing.assert_close(guided(rule, outputs), torch.stack(expected, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("warmups", [(2, 5), (5, 0)])
def test_momentum_that_waits_for_all_warm_ups_is_the_papers(warmups):
    """One momentum of all concepts, gathered from the first step, and added to their sum from the last warm-up on."""
    settings = [
        ConceptSettings(scale, threshold, warmup, weight=weight, momentum_scale=0.4, momentum_beta=0.7)
        for scale, threshold, weight, warmup in zip((5.0, -3.0), (0.9, 0.6), (1.0, 0.5), warmups, strict=True)
    ]
    outputs = predictions(2)
    concepts = [Concept(item) for item in settings]
    found = guided(SemanticGuidance(4.0, concepts, momentum_after="all_warmups"), outputs)
    for index in range(BATCH):
        momentum = torch.zeros(SHAPE)
        for step, (empty, prompt, *terms) in enumerate(outputs[:, :, index]):
            guidances = []
            for item, term in zip(settings, terms, strict=True):
                difference = term - empty
                least = torch.quantile(difference.abs().flatten(), item.threshold)
                guidances.append(item.weight * item.scale * difference * (difference.abs() >= least))
            everything = sum(guidances) + 0.4 * momentum
            applied = [item for item, warmup in zip(guidances, warmups, strict=True) if step >= warmup]
            added = everything if len(applied) == 2 else sum(applied)
            momentum = 0.7 * momentum + 0.3 * everything
            expected = empty + 4 * (prompt - empty) + added
            torch.testing.assert_close(found[step, index], expected, rtol=1e-4, atol=1e-5)
    own = guided(SemanticGuidance(4.0, concepts), outputs)
    differs = [not torch.allclose(one, other) for one, other in zip(found, own, strict=True)]
    assert differs == [min(warmups) <= step < 5 and step > 0 for step in range(STEPS)]


def test_momentum_at_another_time():
    with pytest.raises(UserError, match="own_warmup or all_warmups, got 'never'"):
        SemanticGuidance(4.0, [Concept()], momentum_after="never")


def test_momentum_by_hand():
    """A direction of 1 at every step: gamma 3, 3 + s nu, ..., from a momentum that starts in the warm-up."""
    outputs = torch.zeros(3, 3, 1, *SHAPE)
    outputs[:, 2] = 1
    settings = ConceptSettings(3.0, None, 1, momentum_scale=0.5, momentum_beta=0.2)
    first = 3.0
    momentum = 0.8 * first
    second = 3 + 0.5 * momentum
    momentum = 0.2 * momentum + 0.8 * second
    third = 3 + 0.5 * momentum
    results = guided(SemanticGuidance(4.0, [Concept(settings)]), outputs)
    torch.testing.assert_close(results[:, 0, 0, 0, 0], torch.tensor([0.0, second, third]))


def test_unmasked_concepts_without_momentum_are_composable_guidance():
    outputs = predictions(2)
    rule = SemanticGuidance(4.0, [Concept(PLAIN), Concept(dataclasses.replace(PLAIN, scale=-2.0))])
    expected = [ComposableGuidance([4.0, 3.0, -2.0])(list(output), 0) for output in outputs]
    torch.testing.assert_close(guided(rule, outputs), torch.stack(expected))


def test_a_sum_of_terms_is_masked_as_one_direction():
    outputs = predictions(3)
    settings = ConceptSettings(3.0, 0.8, 0, momentum_scale=0.0)
    direction = outputs[:, 2] - outputs[:, 3] + outputs[:, 4] - outputs[:, 0]
    expected = torch.stack([concept_guidance(item, 3.0, 0.8) for item in direction]) + plain(4.0, outputs)
    torch.testing.assert_close(guided(SemanticGuidance(4.0, [Concept(settings, (1, -1, 1))]), outputs), expected)


def test_a_negative_scale_is_the_negative_direction():
    outputs, settings = predictions(1), ConceptSettings(warmup_steps=1)
    removed = SemanticGuidance(4.0, [Concept(dataclasses.replace(settings, scale=-settings.scale))])
    negated = SemanticGuidance(4.0, [Concept(settings, (-1,))])
    added = SemanticGuidance(4.0, [Concept(settings)])
    torch.testing.assert_close(guided(removed, outputs), guided(negated, outputs))
    mean = (guided(removed, outputs) + guided(added, outputs)) / 2
    torch.testing.assert_close(mean, plain(4.0, outputs))


@pytest.mark.parametrize("over", ["tensor", "channel"])
def test_a_batch_of_plain_and_edited_samples_equals_them_one_by_one(over):
    """The columns of a contact sheet: plain, each edit, both."""
    columns = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, -3.0], [5.0, -3.0]])
    settings = [ConceptSettings(warmup_steps=1), ConceptSettings(threshold=0.5, momentum_beta=0.9, warmup_steps=2)]
    outputs = predictions(2, batch=len(columns))

    def rule(scales):
        return SemanticGuidance(
            4.0, [Concept(item, sample_scales=scale) for item, scale in zip(settings, scales, strict=True)], over
        )

    together = guided(rule(columns.T), outputs)
    for index, scales in enumerate(columns):
        part = outputs[:, :, index : index + 1]
        alone = guided(rule(scales.reshape(2, 1)), part)
        torch.testing.assert_close(together[:, index : index + 1], alone)
        numbers = zip(settings, scales.tolist(), strict=True)
        same = SemanticGuidance(
            4.0, [Concept(dataclasses.replace(item, scale=scale)) for item, scale in numbers], over
        )
        torch.testing.assert_close(alone, guided(same, part))
    assert torch.equal(together[:, 0], plain(4.0, outputs)[:, 0])


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 4.0])
def test_scale_0_is_classifier_free_guidance(guidance_scale):
    outputs = predictions(2)
    concepts = [Concept(ConceptSettings(0.0, warmup_steps=0)), Concept(sample_scales=torch.zeros(BATCH))]
    rule = SemanticGuidance(guidance_scale, concepts)
    expected = ClassifierFreeGuidance(guidance_scale)
    for step, output in enumerate(outputs):
        needed = [1] if guidance_scale == 1 else [0, 1]
        assert rule.needed(step) == needed
        chosen = [output[index] for index in needed]
        assert torch.equal(rule(chosen, step), expected(chosen, step))


def test_guidance_scale_1_with_concepts():
    outputs = predictions(1)
    rule = SemanticGuidance(1.0, [Concept(dataclasses.replace(PLAIN, warmup_steps=2, cooldown_step=4))])
    assert [rule.needed(step) for step in range(STEPS)] == [[1], [1], [0, 1, 2], [0, 1, 2], [1], [1], [1]]
    expected = outputs[:, 1].clone()
    expected[2:4] += 3 * (outputs[2:4, 2] - outputs[2:4, 0])
    torch.testing.assert_close(guided(rule, outputs), expected)


def test_terms_that_cannot_matter_are_not_needed():
    concepts = [
        Concept(dataclasses.replace(PLAIN, warmup_steps=3), (1, -1)),
        Concept(ConceptSettings(warmup_steps=2, cooldown_step=4)),  # momentum is gathered from step 0
        Concept(dataclasses.replace(PLAIN, scale=0.0)),
        Concept(dataclasses.replace(PLAIN, weight=0.0)),
        Concept(dataclasses.replace(PLAIN, scale=0.0), sample_scales=torch.tensor([0.0, 1.0, 0.0])),
    ]
    rule = SemanticGuidance(4.0, concepts)
    assert rule.conditionings("empty", "prompt", *"abcdef") == ["empty", "prompt", *"abcdef"]
    assert [rule.needed(step) for step in range(5)] == [[0, 1, 4, 7]] * 3 + [[0, 1, 2, 3, 4, 7], [0, 1, 2, 3, 7]]
    outputs = predictions(6, steps=5)
    expected = plain(4.0, outputs)
    expected[:, 1] += outputs[:, 7, 1] - outputs[:, 0, 1]
    expected[3:] += 3 * (outputs[3:, 2] - outputs[3:, 3])
    expected[2:4] += guided(SemanticGuidance(0.0, [concepts[1]]), outputs[:, [0, 1, 4]])[2:4] - outputs[2:4, 0]
    torch.testing.assert_close(guided(rule, outputs), expected)


def test_a_concept_keeps_its_strength_when_another_one_sets_in():
    early, late = ConceptSettings(warmup_steps=1), ConceptSettings(-3.0, warmup_steps=4, momentum_beta=0.8)
    outputs = predictions(2)
    both = guided(SemanticGuidance(4.0, [Concept(early), Concept(late)]), outputs)
    one = guided(SemanticGuidance(4.0, [Concept(early)]), outputs[:, :3])
    other = guided(SemanticGuidance(4.0, [Concept(late)]), outputs[:, [0, 1, 3]])
    torch.testing.assert_close(both, one + other - plain(4.0, outputs))
    assert torch.equal(both[:4], one[:4])


@pytest.mark.parametrize("warmups", [(0, 5), (5, 0), (3, 3), (9, 9)])
@pytest.mark.parametrize("cooldown", [None, 1, 2, 5])
def test_never_nan(warmups, cooldown):
    concepts = [
        Concept(ConceptSettings(warmup_steps=warmup, cooldown_step=None if cooldown is None else warmup + cooldown))
        for warmup in warmups
    ]
    outputs = predictions(2)
    outputs[2:4] = 0  # and with all directions zero
    results = guided(SemanticGuidance(4.0, concepts), outputs)
    assert results.isfinite().all()
    for step, result in enumerate(results):
        if not any(concept.settings.is_applied(step) for concept in concepts):
            assert torch.equal(result, plain(4.0, outputs)[step])


def test_forgets_at_step_0():
    rule = SemanticGuidance(4.0, [Concept(ConceptSettings(warmup_steps=1))], record=True)
    first = guided(rule, predictions(1))
    guided(rule, predictions(1, batch=1, seed=1))  # of another size
    assert torch.equal(guided(rule, predictions(1)), first)
    assert len(rule.recorded) == STEPS


def test_gradient_reaches_earlier_steps_through_the_momentum():
    """Of unmasked guidance in closed form: d/d direction_0 of the guidance at step 1 is s_m (1 - beta) s_e."""
    outputs = predictions(1, steps=2).requires_grad_()
    settings = ConceptSettings(3.0, None, 1, momentum_scale=0.5, momentum_beta=0.2)
    guided(SemanticGuidance(4.0, [Concept(settings)]), outputs)[1].sum().backward()
    for step, factor in ((0, 0.5 * 0.8 * 3), (1, 3.0)):
        torch.testing.assert_close(outputs.grad[step, 2], torch.full((BATCH, *SHAPE), factor))


def test_gradient_equals_finite_differences_of_masked_guidance():
    outputs = predictions(2, steps=3, batch=1).double().requires_grad_()
    settings = ConceptSettings(3.0, 0.7, 1, momentum_scale=0.5, momentum_beta=0.2)
    rule = SemanticGuidance(4.0, [Concept(settings), Concept(settings, (-1,))])
    assert torch.autograd.gradcheck(
        lambda tensor: guided(rule, tensor)[1:].flatten()[::17], (outputs,), fast_mode=True
    )


def test_nothing_is_read_back_from_the_device():
    """Tensors without data: whoever looks at a value fails."""
    scales = torch.tensor([0.0, 2.0, -1.0])
    rule = SemanticGuidance(4.0, [Concept(), Concept(ConceptSettings(warmup_steps=0), (1, -1), scales)], record=True)
    results = guided(rule, predictions(3).to("meta"))
    assert results.is_meta
    assert rule.recorded.is_meta


class TestRecording:
    def test_recorded_is_what_was_added(self):
        concepts = [Concept(ConceptSettings(warmup_steps=2)), Concept(dataclasses.replace(PLAIN, cooldown_step=5))]
        outputs = predictions(2)
        for guidance_scale in (1.0, 4.0):
            rule = SemanticGuidance(guidance_scale, concepts, record=True)
            results = guided(rule, outputs)
            torch.testing.assert_close(rule.recorded, results - plain(guidance_scale, outputs), rtol=1e-4, atol=1e-4)
            again = RecordedGuidance(guidance_scale, rule.recorded)
            chosen = [again.conditionings(output[0], output[1]) for output in outputs]
            assert len(chosen[0]) == (1 if guidance_scale == 1 else 2)
            torch.testing.assert_close(torch.stack([again(item, i) for i, item in enumerate(chosen)]), results)

    def test_steps_without_guidance_are_zero(self):
        settings = dataclasses.replace(PLAIN, warmup_steps=1, cooldown_step=3)
        for guidance_scale in (1.0, 4.0):
            rule = SemanticGuidance(guidance_scale, [Concept(settings)], record=True)
            guided(rule, predictions(1))
            assert rule.recorded.flatten(1).any(dim=1).tolist() == [False, True, True, False, False, False, False]

    def test_one_recorded_sample_serves_many(self):
        vectors, outputs = random(STEPS, 1, *SHAPE, seed=5), predictions(0)
        rule = RecordedGuidance(4.0, vectors)
        results = torch.stack([rule(list(output), i) for i, output in enumerate(outputs)])
        torch.testing.assert_close(results, plain(4.0, outputs) + vectors)

    def test_what_does_not_fit_is_refused(self):
        outputs = list(predictions(0)[0])
        with pytest.raises(UserError, match="recorded for 2 steps; sample with as many"):
            RecordedGuidance(4.0, random(2, BATCH, *SHAPE))(outputs, 2)
        with pytest.raises(UserError, match=r"shape \(2, 4, 4, 5\), not \(3, 4, 4, 5\)"):
            RecordedGuidance(4.0, random(2, 2, *SHAPE))(outputs, 0)
        with pytest.raises(ValueError, match=r"must be \(T, B, C, h, w\)"):
            RecordedGuidance(4.0, random(BATCH, *SHAPE))
        with pytest.raises(ValueError, match="set record"):
            _ = SemanticGuidance(4.0, [Concept()]).recorded


class TestSampling:
    def run(self, backbone, rule, conditionings, seeds=(1, 2), steps=5, model=None):
        """Latents, and the model with its copy of the rule."""
        guided_model = GuidedModel(model or backbone, rule, rule.conditionings(*conditionings))
        solver = backbone.make_solver("DDIM", steps)
        latents = sample(guided_model, backbone.initial_latents(list(seeds)), solver=solver, gradient=Checkpointed())
        return latents, guided_model

    def test_the_network_is_evaluated_for_no_row_in_vain(self, backbone, conditionings):
        model = Recorder(backbone)
        concepts = [
            Concept(dataclasses.replace(PLAIN, warmup_steps=1, cooldown_step=4)),
            Concept(dataclasses.replace(PLAIN, warmup_steps=3), (1, -1)),
        ]
        with torch.no_grad():
            self.run(backbone, SemanticGuidance(4.0, concepts), conditionings, model=model)
        assert [rows for rows, _ in model.calls] == [4, 6, 6, 10, 8]

    def test_a_batch_is_its_samples(self, backbone, conditionings):
        concepts = [Concept(ConceptSettings(warmup_steps=1)), Concept(ConceptSettings(-3.0, 0.5, 2), (1, -1))]
        rule = SemanticGuidance(4.0, concepts)
        with torch.no_grad():
            together = self.run(backbone, rule, conditionings)[0]
            alone = torch.cat([self.run(backbone, rule, conditionings, seeds=[seed])[0] for seed in (1, 2)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)

    def test_recorded_guidance_repeats_the_image(self, backbone, conditionings):
        rule = SemanticGuidance(4.0, [Concept(ConceptSettings(warmup_steps=1))], record=True)
        with torch.no_grad():
            edited, model = self.run(backbone, rule, conditionings[:3])
            repeated, _ = self.run(backbone, RecordedGuidance(4.0, model.rule.recorded), conditionings[:2])
            unedited, _ = self.run(backbone, ClassifierFreeGuidance(4.0), conditionings[:2])
        torch.testing.assert_close(repeated, edited, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(unedited, edited, atol=1e-2)

    def test_one_rule_serves_several_models_at_once(self, backbone, conditionings):
        """Steps of two models of one rule in turns give what each gives alone: the momentum is not the rule's."""
        rule = SemanticGuidance(4.0, [Concept(ConceptSettings(warmup_steps=0, momentum_scale=0.9))])
        timesteps = torch.tensor([801, 601, 401])
        inputs = {seed: backbone.initial_latents([seed]) for seed in (1, 2)}

        def model():
            return GuidedModel(backbone, rule, rule.conditionings(*conditionings[:3]))

        with torch.no_grad():
            alone = {}
            for seed, latents in inputs.items():
                single = model()
                alone[seed] = [single(latents, timestep, step) for step, timestep in enumerate(timesteps)]
            models = {seed: model() for seed in inputs}
            for step, timestep in enumerate(timesteps):
                for seed, latents in inputs.items():
                    assert torch.equal(models[seed](latents, timestep, step), alone[seed][step])

    def test_a_concept_can_be_learned_under_it(self, backbone, conditionings):
        term = constant(conditionings[2])
        term.prompt_embeds.requires_grad_()
        rule = SemanticGuidance(4.0, [Concept(ConceptSettings(warmup_steps=2))])
        self.run(backbone, rule, [*conditionings[:2], term])[0].square().sum().backward()
        assert term.prompt_embeds.grad.isfinite().all()
        assert term.prompt_embeds.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": float("inf")}, "scale of a concept must be a finite number, got inf"),
        ({"scale": float("nan")}, "finite"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\), got 0.0"),
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"warmup_steps": 5, "cooldown_step": 5}, "cooldown_step must be above warmup_steps 5, got 5"),
        ({"weight": -1.0}, "weight must be a number of at least 0, got -1.0"),
        ({"weight": float("inf")}, "weight"),
        ({"momentum_scale": 1.1}, r"momentum_scale must be in \[0, 1\], got 1.1"),
        ({"momentum_scale": -0.1}, "momentum_scale"),
        ({"momentum_beta": 1.0}, r"momentum_beta must be in \[0, 1\), got 1.0"),
        ({"momentum_beta": -0.1}, "momentum_beta"),
    ],
)
def test_impossible_settings_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        ConceptSettings(**changes)


def test_impossible_concepts_are_refused():
    for signs in ((), (1, 0), (2,)):
        with pytest.raises(UserError, match="must be 1 or -1"):
            Concept(signs=signs)
    for scales in (torch.ones(2, 2), torch.tensor(1.0), torch.tensor([1.0, float("nan")])):
        with pytest.raises(UserError, match="one per sample"):
            Concept(sample_scales=scales)
    with pytest.raises(UserError, match="guidance_scale must be a finite number, got nan"):
        SemanticGuidance(float("nan"), [])
    with pytest.raises(ValueError, match="1 terms for concepts that have 2"):
        SemanticGuidance(4.0, [Concept(signs=(1, 1))]).conditionings("empty", "prompt", "term")
    rule = SemanticGuidance(4.0, [Concept(sample_scales=torch.ones(2))])
    with pytest.raises(UserError, match="2 sample_scales for 3 samples"):
        guided(rule, predictions(1))
