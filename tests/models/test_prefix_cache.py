import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.tiny import tiny_pipeline
from tokenlearn.models import StableDiffusion


def unet(*blocks):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16)[: len(blocks)],
        down_block_types=blocks,
        up_block_types=[block.replace("Down", "Up") for block in reversed(blocks)],
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()


class Rows:
    """Counts the rows that a module computes."""

    def __init__(self, module):
        self.rows = []
        module.register_forward_hook(lambda module, inputs, output: self.rows.append(len(output)))


@pytest.fixture(params=[("CrossAttnDownBlock2D", "DownBlock2D"), ("DownBlock2D", "CrossAttnDownBlock2D")])
def backbone(tmp_path, request):
    folder = tiny_pipeline(tmp_path)
    unet(*request.param).save_pretrained(folder / "unet")
    return StableDiffusion(str(folder))


@pytest.mark.parametrize("timesteps", [torch.tensor(601), torch.tensor([601, 21])])
def test_several_prompts_for_the_same_latents_are_as_one_after_another(backbone, timesteps):
    latents = backbone.initial_latents([1, 2]).requires_grad_()
    prompts = [backbone.encode_prompts([text]).expand(2) for text in ("a king", "", "a cat")]
    together = backbone(latents, timesteps, prompts[0].cat(prompts))
    apart = torch.cat([backbone(latents, timesteps, prompt) for prompt in prompts])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    weights = torch.randn(apart.shape, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad((output * weights).sum(), latents)[0] for output in (together, apart)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_what_comes_before_the_prompt_is_computed_once(backbone):
    first = next(block for block in backbone.unet.down_blocks if hasattr(block, "attentions"))
    before, after = Rows(first.resnets[0].conv2), Rows(first.attentions[0].proj_in)
    latents, prompts = backbone.initial_latents([1, 2]), backbone.encode_prompts(["a king", "a cat"] * 3)
    with torch.no_grad():
        assert len(backbone(latents, torch.tensor(601), prompts)) == 6
        backbone(latents, torch.tensor(601), prompts[:2])
    assert before.rows == [2, 2]
    assert after.rows == [6, 2]


def test_a_failed_evaluation_leaves_nothing_behind(backbone):
    latents, prompts = backbone.initial_latents([1, 2]), backbone.encode_prompts(["a king", "a cat"])
    expected = backbone(latents, torch.tensor(601), prompts)
    with pytest.raises(RuntimeError):
        backbone(latents[:, :3], torch.tensor(601), prompts.cat([prompts] * 2))
    assert torch.equal(backbone(latents, torch.tensor(601), prompts), expected)


def test_recomputation_evaluates_all_rows(tmp_path):
    folder = tiny_pipeline(tmp_path)
    plain, recomputing = StableDiffusion(str(folder)), StableDiffusion(str(folder), gradient_checkpointing=True)
    assert (plain.takes_shared_latents, recomputing.takes_shared_latents) == (True, False)


def test_evaluations_one_after_another_at_the_same_latents_compute_it_once(backbone):
    first = next(block for block in backbone.unet.down_blocks if hasattr(block, "attentions"))
    latents, timesteps = backbone.initial_latents([1, 2]), torch.tensor([601, 21])
    plain, wanted = (backbone.encode_prompts([text]).expand(2) for text in ("", "a king"))
    wanted.prompt_embeds.requires_grad_()

    def gradient():
        with torch.no_grad():
            unconditional = backbone(latents, timesteps, plain)
        conditional = backbone(latents, timesteps, wanted)
        several = backbone(latents, timesteps, plain.cat([plain, wanted]))
        return torch.autograd.grad(((conditional - unconditional) * several[2:]).sum(), wanted.prompt_embeds)[0]

    expected, before = gradient(), Rows(first.resnets[0].conv2)
    with backbone.same_latents():
        kept = gradient()
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-6)
    assert before.rows == [2, 0, 0]
    backbone(latents, timesteps, plain)
    assert before.rows[3:] == [2]


def test_what_latents_need_a_gradient_of_is_computed_again(backbone):
    latents, timestep = backbone.initial_latents([1, 2]).requires_grad_(), torch.tensor(601)
    prompt = backbone.encode_prompts(["a king"]).expand(2)
    expected = torch.autograd.grad(backbone(latents, timestep, prompt).square().sum(), latents)[0]
    with backbone.same_latents():
        with torch.no_grad():
            backbone(latents, timestep, prompt)
        found = torch.autograd.grad(backbone(latents, timestep, prompt).square().sum(), latents)[0]
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_evaluations_within_evaluations_at_the_same_latents_share_what_comes_first(backbone):
    first = next(block for block in backbone.unet.down_blocks if hasattr(block, "attentions"))
    before = Rows(first.resnets[0].conv2)
    latents, prompts = backbone.initial_latents([1, 2]), backbone.encode_prompts(["a king", "a cat"])
    with backbone.same_latents():
        expected = backbone(latents, torch.tensor(601), prompts)
        with backbone.same_latents():
            assert torch.equal(backbone(latents, torch.tensor(601), prompts), expected)
        assert torch.equal(backbone(latents, torch.tensor(601), prompts), expected)
    backbone(latents, torch.tensor(601), prompts)
    assert before.rows == [2, 0, 0, 2]
