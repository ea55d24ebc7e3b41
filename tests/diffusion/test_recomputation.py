import pytest
import torch

from tokenlearn.diffusion.recomputation import recomputed
from tokenlearn.models import Conditioning


def evaluate(latents, timestep, rows):
    """Something that uses one tensor of each row twice and its mapping, and not all of its inputs."""
    return tuple(latents * row.prompt_embeds.sum() + row.prompt_embeds[0, 0, 0] ** 2 for row in rows)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    embeds = [torch.randn(1, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    embeds[1].requires_grad_()
    return latents, torch.tensor(5), [Conditioning(prompt_embeds=own) for own in embeds]


def test_outputs_and_gradients_are_those_of_the_function(inputs):
    latents, _, rows = inputs
    leaves = [latents, rows[1].prompt_embeds]
    gradients = []
    for outputs in (evaluate(*inputs), recomputed(evaluate, *inputs)):
        gradients.append([*outputs, *torch.autograd.grad(sum(output.sin().sum() for output in outputs), leaves)])
    torch.testing.assert_close(*gradients)


def test_the_function_records_a_graph_in_the_backward_pass_alone(inputs):
    recorded = []

    def noted(*items):
        recorded.append(torch.is_grad_enabled())
        return evaluate(*items)

    outputs = recomputed(noted, *inputs)
    assert recorded == [False]
    outputs[0].sum().backward()
    assert recorded == [False, True]
    assert inputs[2][1].prompt_embeds.grad.abs().sum() == 0  # of the other output alone


def test_nothing_is_recorded_where_nothing_needs_a_gradient(inputs):
    latents, timestep, rows = inputs
    outputs = recomputed(evaluate, latents.detach(), timestep, rows[:1])
    assert not any(output.requires_grad for output in outputs)
