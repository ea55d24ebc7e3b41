import shutil

import pytest
import torch
from diffusers import IFPipeline
from torch import nn

from tests.tiny_if import tiny_if_pipeline
from tokenlearn.diffusion import sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, GuidedModel
from tokenlearn.models import DeepFloydIF
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.tokens import TokenBank, save_embedding, vectors_from_words, vocabulary_hash

PROMPTS = ["a photo of a King with beard", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_if_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def pipeline(folder):
    pipeline = IFPipeline.from_pretrained(folder, safety_checker=None, watermarker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def backbone(folder):
    return DeepFloydIF(str(folder))


@pytest.fixture
def bank():
    bank = TokenBank({"<Robot>": 2, "<elf>": 1}, [16])
    bank.vectors[0].data.normal_(generator=torch.Generator().manual_seed(3))
    return bank


def test_describes_the_pipeline(backbone, pipeline):
    assert backbone.process.kind == "noise"
    assert (backbone.latent_channels, backbone.latent_size, backbone.vae_scale_factor) == (3, 8, 1)
    assert (backbone.max_prompt_length, backbone.embedding_widths) == (77, (16,))
    torch.testing.assert_close(backbone.process.alphas.square(), pipeline.scheduler.alphas_cumprod)
    assert backbone.initial_latents([0]).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("length", [6, 90])
@pytest.mark.filterwarnings("ignore:prompt .* is longer than 77 tokens")
def test_prompts_are_encoded_as_by_diffusers(backbone, pipeline, length):
    prompts = [*PROMPTS, "  " + "KING, " * length]
    expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(backbone.encode_prompts(prompts).prompt_embeds, expected)


def test_images_are_their_own_latents(backbone):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    latents = backbone.encode_images(images)
    torch.testing.assert_close(latents, (images - 0.5) / 0.5)
    torch.testing.assert_close(backbone.decode_latents(latents), images)
    decoded = backbone.decode_latents(3 * latents)
    assert decoded.min() < 0  # no clamp that would cut the gradient
    (gradient,) = torch.autograd.grad(decoded.sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 3))


@torch.no_grad()
def test_guided_noise_is_that_of_the_pipeline_at_every_step(backbone, pipeline, monkeypatch):
    """The pipeline samples with the variance that it predicts, and we look at the noise beside it."""
    steps = []
    own = pipeline.scheduler.step

    def step(output, timestep, sample, **options):
        steps.append((output, timestep, sample))
        return own(output, timestep, sample, **options)

    monkeypatch.setattr(pipeline.scheduler, "step", step)
    pipeline(
        PROMPTS[0], num_inference_steps=4, guidance_scale=5.0, generator=torch.manual_seed(0), clean_caption=False
    )
    conditional, unconditional = (backbone.encode_prompts([prompt]) for prompt in PROMPTS)
    assert len(steps) == 4
    for output, timestep, image in steps:
        assert output.shape == (1, 6, 8, 8)
        outputs = [backbone(image, timestep, conditioning) for conditioning in (unconditional, conditional)]
        assert not torch.allclose(*outputs, rtol=1e-2)
        guided = ClassifierFreeGuidance(5.0)(outputs, 0)
        torch.testing.assert_close(guided, output[:, :3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [None, "DDIM", "DPMSolverMultistep"])
def test_images_are_those_of_the_pipeline(backbone, pipeline, name):
    pipeline.scheduler = backbone.make_scheduler(name)
    theirs = pipeline(
        PROMPTS[:1],
        num_inference_steps=5,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(7)],
        clean_caption=False,
        output_type="pt",
    ).images
    generators = [torch.Generator().manual_seed(7)]
    conditional, unconditional = (backbone.encode_prompts([prompt]) for prompt in PROMPTS)
    ours = sample(
        GuidedModel(backbone, ClassifierFreeGuidance(5.0), [unconditional, conditional]),
        backbone.initial_latents(generators),
        solver=backbone.make_solver(name, 5),
        generators=generators,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_schedulers_expect_no_variance_and_keep_the_thresholding(folder, backbone, tmp_path):
    ddim = backbone.make_scheduler("DDIM")
    assert [type(scheduler).__name__ for scheduler in (backbone.make_scheduler(), ddim)] == [
        "DDPMScheduler",
        "DDIMScheduler",
    ]
    # A pipeline that was saved with another scheduler still carries the kind of variance.
    copy = shutil.copytree(folder, tmp_path / "copy")
    ddim.from_config({**ddim.config, "variance_type": "learned_range"}).save_pretrained(copy / "scheduler")
    for model in (backbone, DeepFloydIF(str(copy))):
        scheduler = model.make_scheduler("DDPM")
        assert scheduler.config.variance_type == "fixed_small"
        assert scheduler.config.thresholding
        assert scheduler.config.sample_max_value == 1.5


@pytest.mark.parametrize(
    ("prompt", "units"),
    [
        ("a photo of an <elf>", "▁a ▁photo ▁of ▁an <elf> </s>"),
        ("A <robot> King", "▁a <robot> <robot>_1 ▁king </s>"),
        ("<ROBOT><elf>", "<robot> <robot>_1 <elf> </s>"),
        ("  <robot>_1 with hat ", "<robot>_1 ▁with ▁hat </s>"),
    ],
)
def test_placeholders_survive_lowering_and_are_one_unit_for_each_vector(backbone, bank, prompt, units):
    before = backbone.tokenize([prompt])
    ids = backbone.tokenize([prompt], bank)[0].tolist()
    end = ids.index(backbone.tokenizers[0].eos_token_id) + 1
    vocabulary = backbone.vocabulary(bank)
    assert vocabulary.tokenizers[0].convert_ids_to_tokens(ids[:end]) == units.split()
    assert set(ids[end:]) == {backbone.tokenizers[0].pad_token_id}
    assert (vocabulary.rows(torch.tensor(ids), 0) >= 0).any()
    assert torch.equal(backbone.tokenize([prompt]), before)


def test_words_to_start_from_are_lowered_like_prompts(backbone):
    encoder = (backbone.tokenizers[0], backbone.text_encoders[0])
    assert torch.equal(vectors_from_words("King", *encoder), vectors_from_words("king", *encoder))


def test_gradient_reaches_every_used_vector_of_the_bank(backbone, bank):
    conditioning = backbone.encode_prompts(["a photo of a <robot>"], bank)
    assert conditioning.requires_grad
    backbone(backbone.initial_latents([0]), torch.tensor(500), conditioning).square().sum().backward()
    used = bank.vectors[0].grad.abs().sum(dim=1) > 0
    assert used.tolist() == [True, True, False]
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.encode_prompts(["a photo of a king"], bank).requires_grad


def test_the_same_vector_under_a_placeholder_is_the_word(backbone):
    bank = TokenBank({"<monarch>": 1}, [16])
    bank.set("<monarch>", [vectors_from_words("king", backbone.tokenizers[0], backbone.text_encoders[0])])
    ours, word = backbone.encode_prompts(["a photo of a <monarch>", "a photo of a king"], bank).prompt_embeds
    torch.testing.assert_close(ours, word)


def test_generation_with_embedding_files(folder, backbone, bank, tmp_path):
    metadata = {"vocabulary_hash": vocabulary_hash(backbone.text_encoders[0])}
    files = [
        str(save_embedding(tmp_path / f"{name}.safetensors", f"<{name}>", bank.get(token), metadata))
        for name, token in (("robot", "<Robot>"), ("elf", "<elf>"))
    ]
    sampling = Sampling(steps=4, guidance=5.0, solver="DDIM")
    pipeline = Pipeline(backbone, sampling=sampling).with_tokens(files)
    prompts = ["a photo of a <robot>", "a photo of a <elf>", "a photo of a king"]
    with torch.inference_mode():
        images = pipeline.generate(prompts, [3] * 3).clamp(0, 1)
    assert images.shape == (3, 3, 8, 8)
    assert 0 <= images.min() < images.max() <= 1
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(images[first], images[second], atol=1e-3)

    other = save_embedding(tmp_path / "other.safetensors", "<elf>", bank.get("<elf>"), {"vocabulary_hash": "0" * 16})
    with pytest.warns(UserWarning, match="text encoder differs from this model's: nothing says how much"):
        pipeline.with_tokens([str(other)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_network_with_float32_around_it(folder, backbone, bank, dtype):
    half = DeepFloydIF(str(folder), dtype=dtype)
    assert half.unet.dtype == half.text_encoders[0].shared.weight.dtype == getattr(torch, dtype)
    kept = {name for name, value in half.text_encoders.named_parameters() if value.dtype == torch.float32}
    assert all("DenseReluDense.wo" in name for name in kept)
    assert bool(kept) is (dtype == "float16")
    outputs = []
    for model in (half, backbone):
        output = model(model.initial_latents([0]), torch.tensor(500), model.encode_prompts(["a <elf>"], bank))
        assert output.dtype == torch.float32
        outputs.append(output)
    torch.testing.assert_close(*outputs, rtol=0.1, atol=0.1)
    outputs[0].sum().backward()
    assert bank.vectors[0].grad.dtype == torch.float32


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(folder, backbone, bank):
    gradients, evaluations = [], []
    for model in (backbone, DeepFloydIF(str(folder), gradient_checkpointing=True)):
        count = []
        model.unet.up_blocks[1].resnets[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        output = model(model.initial_latents([0]), torch.tensor(500), model.encode_prompts(["a <elf>"], bank))
        gradients.append(torch.autograd.grad(output.square().sum(), bank.vectors[0])[0])
        evaluations.append(len(count))
    torch.testing.assert_close(*gradients)
    assert evaluations == [1, 2]


def test_compile_is_asked_of_the_network_alone(folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, *_, **__: compiled.append(type(module).__name__))
    DeepFloydIF(str(folder), compile=True)
    assert compiled == ["UNet2DConditionModel"]


@pytest.mark.parametrize("missing", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/config.json"])
def test_half_downloaded_folder_names_the_missing_file(folder, tmp_path, missing):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / missing).unlink()
    with pytest.raises(UserError, match=f"copy' is incomplete: no '{missing}'"):
        DeepFloydIF(str(copy))


def test_unknown_folder():
    with pytest.raises(UserError, match=r"model folder '\./nowhere' does not exist"):
        DeepFloydIF("./nowhere")


def test_model_that_does_not_work_on_pixels(tiny_models):
    with pytest.raises(UserError, match="4 channels, not the 3"):
        DeepFloydIF(str(tiny_models / "pipeline"))


def test_tokenizer_that_needs_a_missing_package(folder, tmp_path, monkeypatch):
    """What transformers says without sentencepiece; the hub's models have only that file."""

    def from_pretrained(*_, **__):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")

    monkeypatch.setattr(IFPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr("tokenlearn.models.backbones.deepfloyd_if.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"is a sentencepiece model; .* uv pip install sentencepiece$"):
        DeepFloydIF(str(folder))


def test_slow_tokenizer_is_refused(folder, monkeypatch):
    monkeypatch.setattr("transformers.T5TokenizerFast.is_fast", False)
    with pytest.raises(UserError, match="install transformers 5"):
        DeepFloydIF(str(folder))
