from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tokenlearn.data.pictures import Picture
from tokenlearn.errors import UserError
from tokenlearn.methods import Edit
from tokenlearn.methods.edit import edit_name
from tokenlearn.models import StableDiffusion
from tokenlearn.tokens import save_embedding

TOKENS = ("<smile>", "<hat-2>")
STEPS, TIMESTEP = 10, 601  # seven of the ten steps


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "pictures"
    target.mkdir()
    for index in range(3):
        Image.new("RGB", (24, 16), (80 * index, 100, 200)).save(target / f"{index}.png")
    return target


@pytest.fixture
def make(tiny_models, folder, tmp_path):
    def task(**options):
        generator = torch.Generator().manual_seed(0)
        files = [
            save_embedding(tmp_path / f"{index}.safetensors", token, [torch.randn(1, 16, generator=generator)], {})
            for index, token in enumerate(TOKENS)
        ]
        arguments = {"edits": [{"<smile>": 3}], "num_inference_steps": STEPS, "timestep": TIMESTEP}
        if "prompts" not in options:
            arguments["images"] = str(folder)
        arguments |= {"embeddings": [str(file) for file in files]} | options
        return Edit(StableDiffusion(str(tiny_models / "pipeline")), **arguments)

    return task


def denoised(task, noisy, scales):
    """Plain loop of diffusers from the timestep on, with guidance written out."""
    scheduler, backbone, latents = task.backbone.make_scheduler("DDIM"), task.backbone, noisy.latents
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps[scheduler.timesteps <= TIMESTEP]:
        empty = backbone(latents, timestep, backbone.encode_prompts([""]))
        output = empty
        for token, scale in scales.items():
            output = output + scale * (backbone(latents, timestep, backbone.encode_prompts([token])) - empty)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return backbone.decode_latents(latents).clamp(0, 1)


@torch.no_grad()
def test_scale_zero_reproduces_sampling_from_the_inverted_latents(make):
    task = make()
    noisy = task.invert(task.backbone.encode_images(task.pictures[1].image))
    nothing = denoised(task, noisy, {})
    torch.testing.assert_close(task.denoise(noisy, [{"<smile>": 0.0}]), nothing)
    assert not torch.allclose(task.denoise(noisy, [{"<smile>": 3.0}]), nothing, atol=1e-3)


@torch.no_grad()
def test_edits_of_one_and_several_tokens_equal_the_plain_loop(make):
    edits = [{"<smile>": 3.0}, {"<smile>": 2.0, "<hat-2>": -1.5}, {"<smile>": -4.0}, {"<hat-2>": 1.0}]
    for batch_size in (8, 1):
        task = make(batch_size=batch_size)
        noisy = task.invert(task.backbone.encode_images(task.pictures[0].image))
        for edit, image in zip(edits, task.denoise(noisy, edits), strict=True):
            torch.testing.assert_close(image, denoised(task, noisy, edit)[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_picture_is_inverted_once_for_all_its_edits(make):
    interpolations = {"<smile>": [-2.0, 0.0, 2.0], "<hat-2>": [1.0]}
    task = make(edits=[{"<smile>": 3.0}, {"<smile>": 1.0, "<hat-2>": 2.0}], interpolations=interpolations)
    calls = []
    task.backbone.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    (edited,) = task.predict_step([task.pictures[2]])
    # Inversion, then the four edits with <smile> alone, the one with both and that with <hat-2> alone.
    assert calls == [1] * 7 + [8] * 7 + [3] * 7 + [2] * 7
    assert edited.picture.name == "2"
    assert edited.edits.shape == (2, 3, 16, 24)
    assert {token: len(strip) for token, strip in edited.strips.items()} == {"<smile>": 3, "<hat-2>": 1}
    noisy = task.invert(task.backbone.encode_images(task.pictures[2].image))
    for image, edit in ((edited.edits[1], task.edits[1]), (edited.strips["<smile>"][2], {"<smile>": 2.0})):
        torch.testing.assert_close(image, denoised(task, noisy, edit)[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [901, 601, 1])
def test_edit_friendly_inversion_comes_back_to_the_picture(make, timestep):
    task = make(inversion="edit_friendly", timestep=timestep, edits=[{"<smile>": 0}, {"<smile>": 3}, {"<hat-2>": -3}])
    (edited,) = task.predict_step([task.pictures[0]])
    backbone = task.backbone
    roundtrip = backbone.decode_latents(backbone.encode_images(task.pictures[0].image)).clamp(0, 1)[0]
    torch.testing.assert_close(edited.edits[0], roundtrip, rtol=0, atol=1e-4)
    for edit in edited.edits[1:]:
        assert (edit - roundtrip).abs().max() > 1e-3


@torch.no_grad()
def test_edit_friendly_edits_of_a_folder_that_is_resumed(make):
    options = {
        "inversion": "edit_friendly",
        "edits": [{"<smile>": 3, "<hat-2>": 1}],
        "interpolations": {"<smile>": [2]},
    }
    task = make(**options)
    whole = task.predict_step([task.pictures[0], task.pictures[1]])
    resumed = make(**options)
    (again,) = resumed.predict_step([resumed.pictures[1]])
    assert torch.equal(again.edits, whole[1].edits)
    assert torch.equal(again.strips["<smile>"], whole[1].strips["<smile>"])


@torch.no_grad()
def test_generated_pictures_are_edited_by_seed(make):
    task = make(prompts=["a portrait of a king"], seeds=[5], guidance_scale=3.0)
    (edited,) = task.predict_step([task.pictures[0]])
    latents = task.generate_latents(["a portrait of a king"], [5])
    torch.testing.assert_close(edited.before, task.backbone.decode_latents(latents).clamp(0, 1)[0])
    torch.testing.assert_close(
        edited.edits[0], denoised(task, task.invert(latents), {"<smile>": 3})[0], rtol=1e-3, atol=1e-4
    )


def test_ranks_share_the_pictures_and_skip_those_that_are_done(make):
    task = make()
    parts = []
    for rank in range(2):
        task.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        parts.append([picture.name for batch in task.predict_dataloader() for picture in batch])
    assert parts == [["0", "2"], ["1"]]
    task.is_done = lambda name: name == "2"
    task.trainer = SimpleNamespace(global_rank=0, world_size=1)
    loader = task.predict_dataloader()
    assert len(loader) == 3
    assert [[type(picture) for picture in batch] for batch in loader] == [[Picture], [Picture], [str]]
    assert task.predict_step(["2"]) == []
    task.trainer = SimpleNamespace(global_rank=0, world_size=4)
    with pytest.raises(UserError, match="3 images cannot be split among 4 devices"):
        task.predict_dataloader()


def test_names_of_edits():
    assert edit_name({"<smile>": 3, "<no-hat>": -2.5}) == "smile+3_no-hat-2.5"
    assert edit_name({"<a/b>": 0.25}) == "a-b+0.25"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"edits": []}, r"model.edits and model.interpolations are empty; give an edit"),
        ({"edits": [{}, {"<smile>": 1}]}, r"an edit without a token"),
        ({"edits": [{"<smile>": 1}, {"<smile>": 1.0}]}, r"'smile\+1' twice"),
        ({"edits": [{"<smile>": float("inf")}]}, r"scale of '<smile>' must be a finite number, got inf"),
        ({"interpolations": {"<smile>": []}}, r"model.interpolations has no scale for '<smile>'"),
        ({"timestep": 600}, r"model.timestep 600 is not among the 10 steps; take 501 or 601"),
        ({"template": "smile"}, r"model.template 'smile' must have exactly one"),
        ({"batch_size": 0}, r"model.batch_size must be at least 1, got 0"),
        ({"images": None}, r"set either model.images"),
        ({"images": "pictures", "prompts": ["a king"]}, r"set either model.images"),
        ({"images": "no/such/folder"}, r"'no/such/folder' does not exist"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings(make, options, words):
    with pytest.raises(UserError, match=words) as raised:
        make(**options)
    assert "\n" not in str(raised.value)


def test_tokens_that_are_not_known(make):
    with pytest.raises(UserError, match=r"no token '<beard>' to edit with, only <smile>, <hat-2>; give its file"):
        make(edits=[{"<smile>": 1, "<beard>": 1}]).on_predict_start()
    with pytest.raises(UserError, match=r"no token '<smile>' to edit with, only none at all"):
        make(embeddings=[]).on_predict_start()
    with pytest.raises(UserError, match=r"no token '<beard>'"):
        make(interpolations={"<beard>": [1.0]}).on_predict_start()
    make().on_predict_start()
