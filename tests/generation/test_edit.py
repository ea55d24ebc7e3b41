from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tokenlearn.data.images_to_edit import EditableImage
from tokenlearn.diffusion import EDICT
from tokenlearn.editing import Editing
from tokenlearn.errors import UserError
from tokenlearn.generation import Edit
from tokenlearn.generation.edit import edit_name
from tokenlearn.generation.results import ResultStore
from tokenlearn.models import StableDiffusion
from tokenlearn.pipeline import Sampling
from tokenlearn.tokens import save_embedding

TOKENS = ("<smile>", "<hat-2>")
STEPS, TIMESTEP = 10, 601  # seven of the ten steps


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "images"
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
        arguments = {"edits": [{"<smile>": 3}], "editing": Editing(TIMESTEP, STEPS)}
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
        empty = backbone(latents, timestep, task.pipeline.encode([""]))
        output = empty
        for token, scale in scales.items():
            output = output + scale * (backbone(latents, timestep, task.pipeline.encode([token])) - empty)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return backbone.decode_latents(latents).clamp(0, 1)


def inverted(task, latents):
    return task.editor.invert(latents, task.pipeline.unconditional())


def edit(task, index):
    (result,) = task.predict_step([task.images[index]])
    return result


@torch.no_grad()
def test_scale_zero_reproduces_sampling_from_the_inverted_latents(make):
    task = make(edits=[{"<smile>": 0.0}, {"<smile>": 3.0}])
    nothing = denoised(task, inverted(task, task.backbone.encode_images(task.images[1].image)), {})
    zero, three = edit(task, 1).edits
    torch.testing.assert_close(zero, nothing[0])
    assert not torch.allclose(three, nothing[0], atol=1e-3)


@torch.no_grad()
def test_edits_of_one_and_several_tokens_equal_the_plain_loop(make):
    edits = [{"<smile>": 3.0}, {"<smile>": 2.0, "<hat-2>": -1.5}, {"<smile>": -4.0}, {"<hat-2>": 1.0}]
    for batch_size in (8, 1):
        task = make(batch_size=batch_size, edits=edits)
        noisy = inverted(task, task.backbone.encode_images(task.images[0].image))
        for scales, image in zip(edits, edit(task, 0).edits, strict=True):
            torch.testing.assert_close(image, denoised(task, noisy, scales)[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_an_image_is_inverted_once_for_all_its_edits(make):
    interpolations = {"<smile>": [-2.0, 0.0, 2.0], "<hat-2>": [1.0]}
    task = make(edits=[{"<smile>": 3.0}, {"<smile>": 1.0, "<hat-2>": 2.0}], interpolations=interpolations)
    calls = []
    task.backbone.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    result = edit(task, 2)
    # Inversion, then the four edits with <smile> alone, the one with both and the one with <hat-2> alone.
    assert calls == [1] * 7 + [8] * 7 + [3] * 7 + [2] * 7
    assert result.image.name == "2"
    assert result.edits.shape == (2, 3, 16, 24)
    assert {token: len(strip) for token, strip in result.strips.items()} == {"<smile>": 3, "<hat-2>": 1}
    assert task.plan.strips == {"<smile>": ["-2", "0", "+2"], "<hat-2>": ["+1"]}
    noisy = inverted(task, task.backbone.encode_images(task.images[2].image))
    for image, scales in ((result.edits[1], task.edits[1]), (result.strips["<smile>"][2], {"<smile>": 2.0})):
        torch.testing.assert_close(image, denoised(task, noisy, scales)[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [901, 601, 1])
def test_edit_friendly_inversion_returns_to_the_image(make, timestep):
    editing = Editing(timestep, STEPS, "edit_friendly")
    task = make(editing=editing, edits=[{"<smile>": 0}, {"<smile>": 3}, {"<hat-2>": -3}])
    same, *others = edit(task, 0).edits
    backbone = task.backbone
    roundtrip = backbone.decode_latents(backbone.encode_images(task.images[0].image)).clamp(0, 1)[0]
    torch.testing.assert_close(same, roundtrip, rtol=0, atol=1e-4)
    for other in others:
        assert (other - roundtrip).abs().max() > 1e-3


@torch.no_grad()
def test_edit_friendly_edits_of_a_folder_that_is_resumed(make):
    options = {
        "editing": Editing(TIMESTEP, STEPS, "edit_friendly"),
        "edits": [{"<smile>": 3, "<hat-2>": 1}],
        "interpolations": {"<smile>": [2]},
    }
    task = make(**options)
    whole = task.predict_step([task.images[0], task.images[1]])
    again = edit(make(**options), 1)
    assert torch.equal(again.edits, whole[1].edits)
    assert torch.equal(again.strips["<smile>"], whole[1].strips["<smile>"])


@torch.no_grad()
def test_generated_images_are_edited_by_seed(make):
    task = make(prompts=["a portrait of a king"], seeds=[5], sampling=Sampling(STEPS, 3.0, "DDIM"))
    result = edit(task, 0)
    latents = task.generate_latents(["a portrait of a king"], [5])
    torch.testing.assert_close(result.before, task.backbone.decode_latents(latents).clamp(0, 1)[0])
    torch.testing.assert_close(
        result.edits[0], denoised(task, inverted(task, latents), {"<smile>": 3})[0], rtol=1e-3, atol=1e-4
    )


@torch.no_grad()
def test_images_take_the_place_of_prompts_and_have_the_size_of_the_settings(make, folder):
    assert make(images=str(folder), prompts=["a king"]).images.names == ["0", "1", "2"]
    task = make(prompts=["a king"], sampling=Sampling(2, size=(16, 32)))
    assert task.images[0].size == (32, 16)
    assert edit(task, 0).edits.shape == (1, 3, 16, 32)


@torch.no_grad()
def test_a_source_prompt_is_the_origin_of_edits(make):
    plain, described = (
        make(editing=Editing(TIMESTEP, STEPS, EDICT(), source_prompt=prompt), edits=[{"<smile>": 0}, {"<smile>": 3}])
        for prompt in ("", "a king")
    )
    before, after = edit(plain, 0).edits, edit(described, 0).edits
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=1e-3)  # both lead back
    assert not torch.allclose(before[1], after[1], atol=1e-3)


class Stored(ResultStore):
    """Results that are stored already."""

    def __init__(self, *names):
        self.names = names

    def is_done(self, plan, name):
        return name in self.names


def test_ranks_share_the_images_and_leave_out_stored_ones(make):
    task = make()
    parts = []
    for rank in range(2):
        task.trainer = SimpleNamespace(global_rank=rank, world_size=2, callbacks=[])
        parts.append([image.name for batch in task.predict_dataloader() for image in batch])
    assert parts == [["0", "2"], ["1"]]
    task.trainer = SimpleNamespace(global_rank=0, world_size=1, callbacks=[Stored(), Stored("2")])
    loader = task.predict_dataloader()
    assert len(loader) == 3
    assert [[type(image) for image in batch] for batch in loader] == [[EditableImage], [EditableImage], [str]]
    assert task.predict_step(["2"]) == []
    task.trainer = SimpleNamespace(global_rank=0, world_size=4, callbacks=[])
    with pytest.raises(UserError, match=r"3 images .* 4 devices"):
        task.predict_dataloader()


def test_names_of_edits():
    assert edit_name({"<smile>": 3, "<no-hat>": -2.5}) == "smile+3_no-hat-2.5"
    assert edit_name({"<a/b>": 0.25}) == "a-b+0.25"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"edits": []}, r"model.edits.* model.interpolations.*empty"),
        ({"edits": [{}, {"<smile>": 1}]}, r"without a token"),
        ({"edits": [{"<smile>": 1}, {"<smile>": 1.0}]}, r"'smile\+1' twice"),
        ({"edits": [{"<smile>": float("inf")}]}, r"'<smile>'.* inf"),
        ({"interpolations": {"<smile>": []}}, r"model.interpolations .*'<smile>'"),
        ({"editing": Editing(600, STEPS)}, r"model.editing.timestep 600 .*10 steps.* 501 or 601"),
        ({"template": "smile"}, r"model.template 'smile'"),
        ({"batch_size": 0}, r"model.batch_size .* 0"),
        ({"images": None}, r"model.images.* model.prompts"),
        ({"images": "no/such/folder"}, r"'no/such/folder'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings(make, options, words):
    with pytest.raises(UserError, match=words) as raised:
        make(**options)
    assert "\n" not in str(raised.value)


def test_tokens_that_are_not_known(make):
    with pytest.raises(UserError, match=r"'<beard>'.* <smile>, <hat-2>"):
        make(edits=[{"<smile>": 1, "<beard>": 1}]).on_predict_start()
    with pytest.raises(UserError, match=r"'<smile>'.* none"):
        make(embeddings=[]).on_predict_start()
    with pytest.raises(UserError, match=r"'<beard>'"):
        make(interpolations={"<beard>": [1.0]}).on_predict_start()
    make().on_predict_start()
