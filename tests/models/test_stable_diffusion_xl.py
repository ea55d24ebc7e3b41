import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_pipeline
from tests.tiny_xl import POOLED_WIDTH, WIDTHS, tiny_xl_pipeline
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.models import StableDiffusion, StableDiffusionXL
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.tokens import TokenBank, load_bank, load_embedding, save_embedding

PROMPTS = ["a photo of a wizard with beard!", "a king"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_xl_pipeline(tmp_path_factory.mktemp("xl"))


@pytest.fixture
def backbone(folder):
    return StableDiffusionXL(str(folder))


@pytest.fixture
def bank():
    bank = TokenBank({"<robot>": 2, "<elf>": 1}, WIDTHS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for vectors in bank.vectors:
            vectors.normal_(generator=generator)
    return bank


def load_theirs(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(backbone, prompts, seeds, negative_prompt, tokens=None):
    sampling = Sampling(steps=4, guidance=5.0, negative_prompt=negative_prompt)
    with torch.no_grad():
        return Pipeline(backbone, tokens=tokens, sampling=sampling).generate_latents(prompts, seeds)


def generate_by_diffusers(pipeline, prompts, seeds, negative_prompt, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    negative = None if negative_prompt is None else [negative_prompt] * len(prompts)
    return pipeline(
        prompts,
        negative_prompt=negative,
        generator=generators,
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="latent",
        **options,
    ).images


def test_describes_the_pipeline(backbone):
    assert backbone.embedding_widths == WIDTHS
    assert (backbone.max_prompt_length, backbone.process.kind) == (77, "noise")
    assert (backbone.latent_channels, backbone.latent_size, backbone.vae_scale_factor) == (4, 8, 2)
    assert backbone.tokenize(["a king"])[0, -1] == backbone.tokenizers[0].eos_token_id
    assert backbone.tokenize(["a king"], None, 1)[0, -1] == 0  # padded with "!"


def test_prompts_are_encoded_as_by_diffusers(folder, backbone):
    embeds, _, pooled, _ = load_theirs(folder).encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    conditioning = backbone.encode_prompts(PROMPTS)
    assert conditioning.prompt_embeds.shape == (2, 77, sum(WIDTHS))
    assert conditioning.pooled_prompt_embeds.shape == (2, POOLED_WIDTH)
    torch.testing.assert_close(conditioning.prompt_embeds, embeds)
    torch.testing.assert_close(conditioning.pooled_prompt_embeds, pooled)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("force_zeros", "negative"), [(True, ""), (True, "old hat"), (False, ""), (False, "old hat")])
def test_generates_what_diffusers_generates(tmp_path, prediction_type, force_zeros, negative):
    folder = tiny_xl_pipeline(tmp_path, prediction_type, force_zeros)
    backbone, pipeline = StableDiffusionXL(str(folder)), load_theirs(folder)
    ours = generate(backbone, PROMPTS, [5, 6], negative)
    theirs = generate_by_diffusers(pipeline, PROMPTS, [5, 6], negative or None)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    images = pipeline.image_processor.postprocess(
        pipeline.vae.decode(theirs / 0.13025).sample.detach(), output_type="pt"
    )
    torch.testing.assert_close(backbone.decode_latents(ours).clamp(0, 1), images, rtol=1e-4, atol=1e-4)


def test_an_empty_prompt_is_zero_where_the_pipeline_says_so(tmp_path, backbone):
    zero = backbone.encode_prompts(["", "a king"])
    assert not zero.prompt_embeds[0].any()
    assert not zero.pooled_prompt_embeds[0].any()
    assert torch.equal(zero.extra["time_ids"][0], zero.extra["time_ids"][1])
    torch.testing.assert_close(zero.prompt_embeds[1:], backbone.encode_prompts(["a king"]).prompt_embeds)
    encoded = StableDiffusionXL(str(tiny_xl_pipeline(tmp_path, force_zeros=False))).encode_prompts([""])
    assert encoded.prompt_embeds.any()
    assert encoded.pooled_prompt_embeds.any()


def test_sizes_and_cropping_reach_the_network(folder, backbone):
    sized = StableDiffusionXL(str(folder), original_size=(300, 200), crop_top_left=(7, 3), target_size=(40, 60))
    conditioning = sized.encode_prompts(PROMPTS)
    assert conditioning.extra["time_ids"].tolist() == [[300, 200, 7, 3, 40, 60]] * 2
    assert backbone.encode_prompts([""]).extra["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    sizes = {"original_size": (300, 200), "crops_coords_top_left": (7, 3), "target_size": (40, 60)}
    theirs = generate_by_diffusers(load_theirs(folder), PROMPTS, [5, 6], None, **sizes)
    ours = generate(sized, PROMPTS, [5, 6], "")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - generate(backbone, PROMPTS, [5, 6], "")).abs().max() > 1e-2


def test_gradient_reaches_the_used_vectors_of_both_encoders(backbone, bank):
    conditioning = backbone.encode_prompts(["a photo of a <robot>"], bank)
    output = backbone(backbone.initial_latents([0]), torch.tensor(500), conditioning)
    output.square().sum().backward()
    for vectors in bank.vectors:
        assert (vectors.grad.abs().sum(dim=1) > 0).tolist() == [True, True, False]
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.encode_prompts(["a photo of a king"], bank).requires_grad


def test_only_the_second_encoder_gives_the_pooled_row(backbone, bank):
    backbone.encode_prompts(["a <elf>"], bank).pooled_prompt_embeds.square().sum().backward()
    assert bank.vectors[0].grad is None
    assert bank.vectors[1].grad[bank.rows("<elf>")].any()


def test_pooled_row_is_at_the_end_of_the_text_after_a_placeholder(backbone, bank):
    prompts, encoder = ["a <elf> king", "a <robot>", "a king"], backbone.text_encoders[1]
    ids = backbone.tokenize(prompts, bank, 1)
    pooled = backbone.encode_prompts(prompts, bank).pooled_prompt_embeds
    output = backbone.run_text_encoder(ids, bank, 1)
    for row, end in enumerate([4, 4, 3]):
        assert ids[row, end] == backbone.tokenizers[1].eos_token_id
        expected = encoder.text_projection(output.last_hidden_state[row, end])
        torch.testing.assert_close(pooled[row], expected)


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("clip_g", "clip_l")])
def test_embedding_files_of_two_encoders_in_either_order(tmp_path, folder, backbone, bank, keys):
    tensors = dict(zip(("clip_l", "clip_g"), bank.get("<robot>"), strict=True))
    torch.save({key: tensors[key].detach().clone() for key in keys}, tmp_path / "robot.pt")
    save_file({key: tensors[key].detach().clone() for key in keys}, tmp_path / "robot.safetensors")
    for suffix in (".pt", ".safetensors"):
        loaded, _ = load_bank([str(tmp_path / f"robot{suffix}")], backbone.embedding_widths)
        for vectors, stored in zip(loaded.get("<robot>"), bank.get("<robot>"), strict=True):
            assert torch.equal(vectors, stored)


def test_an_exported_token_gives_the_same_image_in_diffusers(tmp_path, folder, backbone, bank):
    path = save_embedding(tmp_path / "robot.safetensors", "<robot>", bank.get("<robot>"), {})
    loaded, _ = load_bank([str(path)], backbone.embedding_widths)
    pipeline, tensors = load_theirs(folder), load_file(path)
    for key, part in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            {"<robot>": tensors[key]},
            text_encoder=getattr(pipeline, f"text_encoder{part}"),
            tokenizer=getattr(pipeline, f"tokenizer{part}"),
        )
    # Without this, their pooled row is the state at the placeholder.
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    prompts = ["a photo of a <robot> king"]
    theirs = generate_by_diffusers(pipeline, prompts, [5], None)
    torch.testing.assert_close(generate(backbone, prompts, [5], "", loaded), theirs, rtol=1e-4, atol=1e-4)


def test_a_token_of_one_encoder_is_refused(tmp_path, backbone):
    path = save_embedding(tmp_path / "robot.safetensors", "<robot>", [torch.ones(1, WIDTHS[0])], {})
    with pytest.raises(UserError, match=r"is for 1 text encoder\(s\), this backbone has 2"):
        load_bank([str(path)], backbone.embedding_widths)


def test_the_vae_is_in_float32_whatever_surrounds_it(folder, backbone):
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = backbone.encode_images(images)
    decoded = backbone.decode_latents(latents)
    half = StableDiffusionXL(str(folder), dtype="float16")
    assert half.unet.dtype == half.text_encoders[1].dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.encode_images(images), latents)
        assert torch.equal(half.decode_latents(latents.half()), backbone.decode_latents(latents.half().float()))
    assert decoded.dtype == torch.float32


def test_half_precision_network_with_float32_around_it(folder, backbone, bank):
    outputs = []
    for model in (StableDiffusionXL(str(folder), dtype="bfloat16"), backbone):
        output = model(model.initial_latents([0]), torch.tensor(500), model.encode_prompts(["a <elf>"], bank))
        assert output.dtype == torch.float32
        outputs.append(output)
    torch.testing.assert_close(*outputs, rtol=0.1, atol=0.1)
    outputs[0].sum().backward()
    assert [vectors.grad.dtype for vectors in bank.vectors] == [torch.float32] * 2


def test_learns_exports_and_generates_with_class_tokens(folder, tiny_config, tmp_path):
    backbone = {"class_path": "StableDiffusionXL", "init_args": {"pretrained": str(folder)}}
    settings = {
        "model.init_args.backbone": backbone,
        "model.init_args.classes": {"wizard": None},
        "model.init_args.sampling.steps": 2,
        "data.init_args.test_images": 1,
        "trainer.max_steps": 1,
    }
    main(["fit", "--config", tiny_config(settings)])
    (path,) = json.loads((tmp_path / "run" / "summary.json").read_text())["embeddings"]
    file = load_embedding(path)
    words = StableDiffusionXL(str(folder))
    for index, (vectors, width) in enumerate(zip(file.vectors, WIDTHS, strict=True)):
        assert vectors.shape == (1, width)
        table = words.text_encoders[index].get_input_embeddings().weight
        start = table[words.tokenizers[index]("a", add_special_tokens=False).input_ids]
        assert (vectors - start).abs().max() > 1e-3  # both halves have learned
    settings = {
        "model": {
            "class_path": "Generate",
            "init_args": {"backbone": backbone, "embeddings": [path], "sampling": {"steps": 2}},
        },
        "data": {"class_path": "PromptList", "init_args": {"prompts": [f"a {file.token}"], "seeds": [0]}},
        "output_dir": str(tmp_path / "drawn"),
    }
    (tmp_path / "generate.yaml").write_text(json.dumps(settings))
    main(["predict", "--config", str(tmp_path / "generate.yaml"), "--trainer.accelerator=cpu"])
    assert len(list((tmp_path / "drawn" / "images").glob("*.png"))) == 1


@pytest.mark.parametrize(
    "missing",
    [
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer_2/vocab.json",
        "unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_half_downloaded_folder_names_the_missing_file(folder, tmp_path, missing):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / missing).unlink()
    if missing == "tokenizer_2/vocab.json":
        (copy / "tokenizer_2/tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"copy' is incomplete: no '{missing}'"):
        StableDiffusionXL(str(copy))


def test_unknown_models_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"model folder '\./nowhere' does not exist"):
        StableDiffusionXL("./nowhere")
    with pytest.raises(UserError, match=r"'nobody/nothing' .*hub"):
        StableDiffusionXL("nobody/nothing")
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot load the model in .* download it again"):
        StableDiffusionXL(str(copy))


def test_other_families_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="has no 'text_encoder_2', so it is of another family"):
        StableDiffusionXL(str(tiny_pipeline(tmp_path / "sd")))
    with pytest.raises(UserError, match="is of another family than StableDiffusion; choose another"):
        StableDiffusion(str(folder))
    refiner = shutil.copytree(folder, tmp_path / "refiner")
    index = json.loads((refiner / "model_index.json").read_text())
    (refiner / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(UserError, match="has no 'text_encoder', so"):
        StableDiffusionXL(str(refiner))
