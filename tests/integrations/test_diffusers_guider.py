"""The guider in diffusers' own modular pipelines: equal to classifier-free guidance, and to tokenlearn's SEGA."""

import json

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")  # modular pipelines of Stable Diffusion 3

from diffusers import StableDiffusionXLPipeline
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks, StableDiffusionXLModularPipeline
from diffusers.modular_pipelines.stable_diffusion_3.encoders import encode_prompt

import tokenlearn as tl
from tests.integrations.tiny_sd3 import tiny_sd3_pipeline
from tests.tiny_xl import WIDTHS, tiny_xl_pipeline
from tokenlearn.errors import UserError
from tokenlearn.guidance import SEGA, GuidanceRule, SemanticEdit, SemanticGuidance
from tokenlearn.integrations import diffusers as integration
from tokenlearn.tokens.files import load_embedding, save_embedding

STEPS, SCALE, SEEDS = 4, 5.0, [3, 4]
PROMPTS = ["a portrait of a man", "a woman with long curls"]
MOVED = {"warmup_steps": 1, "threshold": 0.71, "momentum_scale": 0.3}


def edits(scale):
    """Two concepts, one of them of two terms, with other warm-ups and momentum."""
    return [
        {"concept": "glasses", "scale": scale} | MOVED,
        {"concept": "king - man", "scale": -scale / 2, "warmup_steps": 2, "threshold": None},
    ]


def latents_of(pipe, guider, prompts=PROMPTS, **arguments):
    """(B, C, h, w) latents that a modular pipeline samples with a guider; SDXL's empty negative prompt is zeros."""
    pipe.update_components(guider=guider)
    if isinstance(guider, integration.SemanticGuidance):
        guider.encode(pipe)
    negative = None if isinstance(pipe, StableDiffusionXLModularPipeline) else ""
    settings = {"negative_prompt": negative, "num_inference_steps": STEPS, "height": 16, "width": 16} | arguments
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(prompt=prompts, generator=generators, output="latents", **settings)


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return tiny_xl_pipeline(tmp_path_factory.mktemp("xl"))


def modular_xl(folder):
    """A folder's pipeline as a modular one."""
    parts = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False).components
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if part is not None})
    return pipe


@pytest.fixture(scope="module")
def xl(xl_folder):
    return modular_xl(xl_folder)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return tiny_sd3_pipeline(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(params=["xl", "sd3"])
def pipe(request):
    return request.getfixturevalue(request.param)


def test_scale_0_is_classifier_free_guidance_exactly(pipe):
    plain = latents_of(pipe, ClassifierFreeGuidance(SCALE))
    assert torch.equal(latents_of(pipe, integration.SemanticGuidance(edits(0), SCALE)), plain)
    steered = latents_of(pipe, integration.SemanticGuidance(edits(8), SCALE))
    assert (steered - plain).abs().mean() > 0.05 * plain.abs().mean()


def test_sdxl_equals_tokenlearns_pipeline(xl, xl_folder):
    ours = tl.Pipeline.from_pretrained(str(xl_folder), sampling=tl.Sampling(steps=STEPS))
    rule = SEGA([SemanticEdit(**edit) for edit in edits(8)], SCALE)
    with torch.no_grad():
        expected = ours.sample_latents(SEEDS, ours.guided_model(ours.encode(PROMPTS), rule))
    found = latents_of(xl, integration.SemanticGuidance(edits(8), SCALE))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class _Loop:
    """Euler steps of a flow model with tokenlearn's rule, written out, from embeddings that the test itself makes.

    tokenlearn has no pipeline of Stable Diffusion 3 to compare with.
    """

    def __init__(self, pipe, rule):
        self.pipe, self.rule = pipe, rule.fresh()

    def embeddings(self, prompts):
        states, _, pooled, _ = encode_prompt(self.pipe, prompts)
        return states.expand(len(SEEDS), -1, -1), pooled.expand(len(SEEDS), -1)

    @torch.no_grad()
    def run(self, terms):
        scheduler, transformer = self.pipe.scheduler, self.pipe.transformer
        scheduler.set_timesteps(STEPS)
        conditionings = [self.embeddings(texts) for texts in ([""], PROMPTS, *([term] for term in terms))]
        noises = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
        latents = torch.cat(noises)
        for step, timestep in enumerate(scheduler.timesteps):
            velocities = [
                transformer(latents, states, pooled, timestep.expand(len(SEEDS)), return_dict=False)[0]
                for states, pooled in (conditionings[index] for index in self.rule.needed(step))
            ]
            sigma, following = scheduler.sigmas[step : step + 2]
            latents = latents + (following - sigma) * self.rule(velocities, step)
        return latents


def test_flow_family_equals_a_written_out_loop(sd3):
    rule = SEGA([SemanticEdit(**edit) for edit in edits(8)], SCALE)
    expected = _Loop(sd3, rule).run(["glasses", "king", "man"])
    found = latents_of(sd3, integration.SemanticGuidance(edits(8), SCALE))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_learned_tokens_are_concepts(xl_folder, tmp_path):
    """Loaded as diffusers loads them, a token of two vectors for each encoder guides as it does in tokenlearn."""
    generator = torch.Generator().manual_seed(5)
    vectors = [torch.randn(2, width, generator=generator) for width in WIDTHS]
    path = save_embedding(tmp_path / "robot.safetensors", "<robot>", vectors, {})
    pipe = modular_xl(xl_folder)
    for part, stored in zip(("", "_2"), load_embedding(path).vectors, strict=True):
        encoder, tokenizer = getattr(pipe, f"text_encoder{part}"), getattr(pipe, f"tokenizer{part}")
        pipe.load_textual_inversion({"<robot>": stored}, text_encoder=encoder, tokenizer=tokenizer)
    # Without this, their pooled row is the state at the placeholder.
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    robot = {"concept": "a <robot>", "scale": 8} | MOVED
    ours = tl.Pipeline.from_pretrained(str(xl_folder), tokens=str(path), sampling=tl.Sampling(steps=STEPS))
    with torch.no_grad():
        expected = ours.sample_latents(
            SEEDS, ours.guided_model(ours.encode(PROMPTS), SEGA([SemanticEdit(**robot)], SCALE))
        )
    found = latents_of(pipe, integration.SemanticGuidance([robot], SCALE))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_second_image_does_not_remember_the_first(xl):
    guider = integration.SemanticGuidance(edits(8), SCALE)
    first = latents_of(xl, guider)
    assert torch.equal(latents_of(xl, guider), first)


def test_images_per_prompt_share_an_encoded_concept(sd3):
    guider = integration.SemanticGuidance(edits(8), SCALE)
    found = latents_of(sd3, guider, [PROMPTS[0]], num_images_per_prompt=2)
    one_by_one = latents_of(sd3, guider, [PROMPTS[0]] * 2)
    torch.testing.assert_close(found, one_by_one)


def test_other_sizes_reach_the_network_for_concepts_too(xl):
    """SDXL's size is an input beside the text's: concepts have that of the image, not of their encoding."""
    guider = integration.SemanticGuidance(edits(8), SCALE)
    seen = []
    hook = xl.unet.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    latents_of(xl, guider, height=32, width=16)
    hook.remove()
    sizes = torch.cat(seen)
    assert len(sizes) > 2 * len(SEEDS) * STEPS
    assert (sizes[:, :2] == torch.tensor([32, 16])).all()


def test_no_concept_is_evaluated_where_none_acts(sd3):
    calls = []
    hook = sd3.transformer.register_forward_hook(lambda *_: calls.append(1))
    late = [{"concept": "glasses", "warmup_steps": 3, "momentum_scale": 0.0}]
    latents_of(sd3, integration.SemanticGuidance(late, SCALE))
    assert len(calls) == 3 * 2 + 3
    calls.clear()
    latents_of(sd3, integration.SemanticGuidance(late, 1.0))  # without guidance, the prompt alone until the last step
    assert len(calls) == 3 * 1 + 3
    calls.clear()
    latents_of(sd3, integration.SemanticGuidance(late, SCALE, enabled=False))
    hook.remove()
    assert len(calls) == STEPS


def test_saved_and_loaded_as_json(xl, tmp_path):
    guider = integration.SemanticGuidance(
        ["a hat", edits(8)[0], SemanticEdit(concept="king - man", weight=0.5)],
        SCALE,
        scale=6.0,
        threshold_over="channel",
    )
    guider.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "guider_config.json").read_text())
    assert [concept["scale"] for concept in saved["concepts"]] == [6.0, 8, 5.0]
    loaded = integration.SemanticGuidance.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(guider.config)
    steps = {"num_inference_steps": 12}  # the default warm-up is 10
    assert torch.equal(latents_of(xl, loaded, **steps), latents_of(xl, guider, **steps))
    stronger = guider.new(guidance_scale=9.0)
    assert stronger.guidance_scale == 9.0
    assert stronger.config.concepts == guider.config.concepts


def test_the_maths_is_the_packages_own(monkeypatch, xl):
    """There is no second implementation: what the rule returns is what the pipeline steps with."""
    plain = latents_of(xl, ClassifierFreeGuidance(SCALE))
    monkeypatch.setattr(SemanticGuidance, "__call__", lambda self, predictions, step: 0 * predictions[0])
    assert not torch.allclose(latents_of(xl, integration.SemanticGuidance(edits(8), SCALE)), plain)
    assert issubclass(SEGA, GuidanceRule)


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ("glasses", r"not a list; write them like \['glasses'\]"),
        ([], "has no edits"),
        ([{"scale": 3}], "lacks its words"),
        ([{"concept": "hat", "scael": 3}], "has no setting 'scael'"),
        ([{"concept": "hat", "threshold": 3}], r"threshold must be in \(0, 1\), got 3"),
    ],
)
def test_wrong_concepts_are_one_line(concepts, message):
    with pytest.raises(UserError, match=message) as raised:
        integration.SemanticGuidance(concepts)
    assert "\n" not in str(raised.value)


def test_wrong_use_is_one_line(sd3, xl):
    guider = integration.SemanticGuidance(edits(8), SCALE)
    xl.update_components(guider=ClassifierFreeGuidance(SCALE))
    with pytest.raises(UserError, match=r"guider is ClassifierFreeGuidance.*update_components"):
        guider.encode(xl)
    xl.update_components(guider=guider)
    with pytest.raises(UserError, match=r"not encoded; call guider.encode\(pipe\)"):
        xl(prompt="a man", num_inference_steps=STEPS, height=16, width=16)
    with pytest.raises(UserError, match=r"warmup_steps 2 .* leaves no step of 2"):
        latents_of(sd3, guider, num_inference_steps=2)
    with pytest.raises(UserError, match="negative_prompt=''"):
        latents_of(sd3, guider, negative_prompt=None)


def test_thresholds_over_channels_need_channels():
    guider = integration.SemanticGuidance(["hat"], threshold_over="channel")
    tokens = torch.zeros(1, 16, 4)
    with pytest.raises(UserError, match=r"\(1, 16, 4\) have no channels; set threshold_over to 'tensor'"):
        guider.forward(tokens, tokens)
