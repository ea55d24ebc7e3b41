import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from torch import nn

from tests.tiny import tiny_pipeline
from tokenlearn.errors import UserError
from tokenlearn.models import StableDiffusion
from tokenlearn.tokens import TokenBank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.fixture
def backbone(folder):
    return StableDiffusion(str(folder))


@pytest.fixture
def bank():
    bank = TokenBank({"<robot>": 2, "<elf>": 1}, [16])
    with torch.no_grad():
        bank.vectors[0].normal_(generator=torch.Generator().manual_seed(3))
    return bank


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_describes_the_pipeline(backbone):
    assert backbone.process.kind == "noise"
    assert (backbone.latent_channels, backbone.latent_size, backbone.vae_scale_factor) == (4, 8, 2)
    assert (backbone.max_prompt_length, backbone.embedding_widths) == (77, (16,))
    torch.testing.assert_close(backbone.process.alphas**2 + backbone.process.sigmas**2, torch.ones(1000))
    torch.testing.assert_close(
        backbone.process.alphas[400].square().item(), 0.424, rtol=0, atol=2e-3
    )  # Stable Diffusion's


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predictions_add_up_to_the_latents(tmp_path, prediction_type):
    backbone = StableDiffusion(str(tiny_pipeline(tmp_path, prediction_type)))
    assert backbone.process.kind == {"epsilon": "noise", "v_prediction": "velocity"}[prediction_type]
    latents, timesteps = backbone.initial_latents([1, 2]), torch.tensor([20, 700])
    conditioning = backbone.encode_prompts(["a king", "a cat"])
    arguments = (latents, timesteps, conditioning)
    x0, noise, output = backbone.predict_x0(*arguments), backbone.predict_noise(*arguments), backbone(*arguments)
    torch.testing.assert_close(
        DDPMScheduler.from_config(backbone.make_scheduler().config).add_noise(x0, noise, timesteps),
        latents,
        rtol=1e-3,
        atol=1e-4,
    )
    scheduler = DDIMScheduler.from_config(backbone.make_scheduler().config)
    scheduler.set_timesteps(1000)
    for row in range(2):
        step = scheduler.step(output[row], int(timesteps[row]), latents[row])
        torch.testing.assert_close(x0[row], step.pred_original_sample, rtol=1e-3, atol=1e-3)


def test_prompts_are_encoded_as_by_diffusers(backbone, pipeline):
    prompts = ["a photo of a wizard with beard", ""]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(backbone.encode_prompts(prompts).prompt_embeds, expected)


def test_gradient_reaches_every_used_vector_of_the_bank(backbone, bank):
    conditioning = backbone.encode_prompts(["a photo of a <robot>"], bank)
    assert conditioning.requires_grad
    conditioning.prompt_embeds.square().mean().backward()
    used = bank.vectors[0].grad.abs().sum(dim=1) > 0
    assert used.tolist() == [True, True, False]
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.encode_prompts(["a photo of a king"], bank).requires_grad


def test_banks_share_a_backbone_and_do_not_know_each_other(backbone, bank):
    other = TokenBank({"<knight>": 1}, [16])
    with torch.no_grad():
        other.vectors[0].fill_(0.5)
        alone = backbone.encode_prompts(["an <elf> king"], bank).prompt_embeds
    words_alone = backbone.tokenize(["<elf> king"])
    assert not torch.equal(backbone.tokenize(["<elf> king"], bank), words_alone)
    assert torch.equal(backbone.tokenize(["<elf> king"], other), words_alone)
    backbone.encode_prompts(["<knight>"], other).prompt_embeds.sum().backward()
    assert other.vectors[0].grad is not None
    with torch.no_grad():
        assert torch.equal(backbone.encode_prompts(["an <elf> king"], bank).prompt_embeds, alone)
        assert len(backbone.tokenizers[0]) == len(StableDiffusion(backbone.pretrained).tokenizers[0])


def test_threads_share_a_backbone(backbone, bank):
    """Each thread encodes and evaluates with its own bank; results are as one after another."""
    other = TokenBank({"<elf>": 1}, [16])
    with torch.no_grad():
        other.vectors[0].fill_(0.5)
    latents = backbone.initial_latents([1])

    def outputs(tokens):
        with torch.no_grad():
            found = []
            for timestep in range(900, 100, -100):
                with backbone.same_latents():
                    prompts = backbone.encode_prompts(["a <elf>", "a king"], tokens)
                    found.append(backbone(latents, torch.tensor(timestep), prompts))
            return torch.cat(found)

    banks = [bank, other, bank, other]
    expected = [outputs(tokens) for tokens in banks]
    with ThreadPoolExecutor(len(banks)) as pool:
        for found, alone in zip(pool.map(outputs, banks), expected, strict=True):
            assert torch.equal(found, alone)
    assert not torch.equal(expected[0], expected[1])


def test_a_bank_of_another_width_is_refused(backbone):
    with pytest.raises(UserError, match=r"width 24.* 16"):
        backbone.encode_prompts(["a king"], TokenBank({"<wizard>": 1}, [24]))
    with pytest.raises(UserError, match=r"2 text encoder\(s\).* 1"):
        backbone.encode_prompts(["a king"], TokenBank({"<wizard>": 1}, [16, 16]))


@pytest.mark.parametrize("stale_config", [False, True])
def test_pooled_row_is_the_state_at_the_end_of_the_text(backbone, bank, stale_config):
    encoder = backbone.text_encoders[0]
    if stale_config:  # the value in Stable Diffusion's configurations, for which transformers takes the largest id
        for part in encoder.modules():
            if hasattr(part, "eos_token_id"):
                part.eos_token_id = 2
    prompts = ["a <elf> king", "a king"]
    ids = backbone.tokenize(prompts, bank)
    conditioning = backbone.encode_prompts(prompts, bank)
    for row, end in ((0, 4), (1, 3)):
        assert ids[row, end] == backbone.tokenizers[0].eos_token_id
        assert torch.equal(conditioning.pooled_prompt_embeds[row], conditioning.prompt_embeds[row, end])
    torch.testing.assert_close(backbone.run_text_encoder(ids, bank).pooler_output, conditioning.pooled_prompt_embeds)


def test_too_many_vectors_are_an_error_and_too_many_words_a_warning(backbone):
    with pytest.raises(UserError, match=r"'a <robot>'.* 79 .* 77"):
        backbone.encode_prompts(["a <robot>"], TokenBank({"<robot>": 76}, [16]))
    words = " ".join(["king"] * 75)
    with pytest.warns(UserWarning, match="dropped 'hat queen'"):
        ids = backbone.tokenize([words + " hat queen"])
    assert torch.equal(ids, backbone.tokenize([words]))


def test_images_and_latents_as_in_the_pipeline(backbone, pipeline, images):
    posterior = pipeline.vae.encode(images * 2 - 1).latent_dist
    latents = backbone.encode_images(images)
    assert latents.shape == (2, 4, 8, 8)
    torch.testing.assert_close(latents, posterior.mean * 0.18215)
    expected = pipeline.image_processor.postprocess(
        pipeline.vae.decode(latents / 0.18215).sample.detach(), output_type="pt"
    )
    torch.testing.assert_close(backbone.decode_latents(latents).clamp(0, 1), expected)


def test_encoding_and_decoding_are_differentiable_everywhere(backbone, images):
    images = images.requires_grad_()
    latents = backbone.encode_images(images)
    decoded = backbone.decode_latents(20 * latents)
    assert decoded.min() < 0 or decoded.max() > 1  # no clamp that would cut the gradient
    (gradient,) = torch.autograd.grad(decoded.square().sum(), images)
    assert (gradient != 0).all()


def test_stays_frozen_inside_of_a_parent_that_trains(backbone, images):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    nn.ModuleList([backbone]).train()
    assert not any(module.training for module in backbone.modules())
    backbone.decode_latents(backbone.encode_images(images))
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_half_precision_network_with_float32_around_it(folder, backbone, bank, images):
    half = StableDiffusion(str(folder), dtype="bfloat16")
    assert half.unet.dtype == half.text_encoders[0].dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32
    torch.testing.assert_close(half.encode_images(images), backbone.encode_images(images))
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
    for model in (backbone, StableDiffusion(str(folder), gradient_checkpointing=True)):
        block = model.unet.up_blocks[1].resnets[0]
        count = []
        block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        output = model(model.initial_latents([0]), torch.tensor(500), model.encode_prompts(["a <elf>"], bank))
        gradients.append(torch.autograd.grad(model.decode_latents(output).square().sum(), bank.vectors[0])[0])
        evaluations.append(len(count))
    torch.testing.assert_close(*gradients)
    assert evaluations == [1, 2]


def test_compile_is_asked_of_the_network_alone(folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, *_, **__: compiled.append(type(module).__name__))
    model = StableDiffusion(str(folder), compile=True)
    assert compiled == ["UNet2DConditionModel"]
    assert not any("_orig_mod" in name for name, _ in model.named_parameters())


def test_initial_latents_depend_on_their_own_seed_alone(backbone):
    batch = backbone.initial_latents([5, 6])
    assert batch.shape == (2, 4, 8, 8)
    assert torch.equal(batch[1:], backbone.initial_latents([6]))
    assert not torch.equal(batch[0], batch[1])
    generator = torch.Generator().manual_seed(6)
    assert torch.equal(batch[1:], backbone.initial_latents([generator]))
    assert not torch.equal(batch[1:], backbone.initial_latents([generator]))  # advanced
    assert backbone.initial_latents([5], (32, 8)).shape == (1, 4, 16, 4)
    with pytest.raises(UserError, match=r"15x16 is not a multiple of 2 .*; take 16x16"):
        backbone.initial_latents([5], (15, 16))


def test_schedulers_by_name(backbone):
    assert type(backbone.make_scheduler()).__name__ == "DDIMScheduler"
    for name in ("euler", "EulerDiscrete", "EulerDiscreteScheduler"):
        scheduler = backbone.make_scheduler(name, 20)
        assert type(scheduler).__name__ == "EulerDiscreteScheduler"
        assert scheduler.config.beta_schedule == "scaled_linear"
    with pytest.raises(UserError, match=r"no scheduler 'DPMSolverMultisteps' .* did you mean DPMSolverMultistep"):
        backbone.make_scheduler("DPMSolverMultisteps")
    with pytest.raises(UserError, match="from 1 to 1000, got 1001"):
        backbone.make_scheduler("DDIM", 1001)


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_half_downloaded_folder_names_the_missing_file(folder, tmp_path, missing):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / missing).unlink()
    if missing == "tokenizer/vocab.json":
        (copy / "tokenizer/tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"copy' is incomplete: no '{missing}'") as caught:
        StableDiffusion(str(copy))
    assert "\n" not in str(caught.value)


def test_missing_shard_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(copy / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    index = '{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": "gone.safetensors"}}'
    (copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"no 'unet/gone\.safetensors'"):
        StableDiffusion(str(copy))


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_truncated_weights_are_one_line(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "copy")
    whole = (copy / part).read_bytes()
    (copy / part).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot load the model in .* download it again") as caught:
        StableDiffusion(str(copy))
    assert "\n" not in str(caught.value)


def test_unknown_models_are_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"model folder '\./nowhere' does not exist"):
        StableDiffusion("./nowhere")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'nobody/nothing' .*hub") as caught:
        StableDiffusion("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_equal_prompts_are_encoded_once(backbone, bank):
    rows = []
    backbone.text_encoders[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    prompts = ["a <elf>", "a king", "a <elf>", "a <robot>", "a king"]
    together = backbone.encode_prompts(prompts, bank)
    apart = [backbone.encode_prompts([prompt], bank) for prompt in prompts]
    assert rows == [3, 1, 1, 1, 1, 1]
    torch.testing.assert_close(together.prompt_embeds, torch.cat([row.prompt_embeds for row in apart]))
    torch.testing.assert_close(together.pooled_prompt_embeds, torch.cat([row.pooled_prompt_embeds for row in apart]))
    (gradient,) = torch.autograd.grad(together.prompt_embeds.square().sum(), bank.vectors[0])
    (expected,) = torch.autograd.grad(sum(row.prompt_embeds.square().sum() for row in apart), bank.vectors[0])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_scheduler_that_states_no_noise_process_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    FlowMatchEulerDiscreteScheduler().save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"FlowMatchEulerDiscreteScheduler .*'beta_start'"):
        StableDiffusion(str(copy))
