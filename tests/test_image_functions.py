import pytest
import torch
from PIL import Image

from tokenlearn.data.images_to_edit import FolderImages
from tokenlearn.diffusion import EDICT, OBELM
from tokenlearn.editing import Editing
from tokenlearn.errors import UserError
from tokenlearn.generation import Edit, Sega
from tokenlearn.guidance import SEGA, SemanticEdit
from tokenlearn.image_functions import edit_images, read_images
from tokenlearn.pasting import pasted_image
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.tokens import TokenBank

EXACT = {"inversion": "edit_friendly", "steps": 5, "timestep": 601}


@pytest.fixture(scope="module")
def bank():
    bank = TokenBank({"<smile>": 1, "<hat>": 1}, [16])
    for token in bank.placeholders:
        bank.set(token, [torch.randn(1, 16, generator=torch.Generator().manual_seed(len(token)))])
    return bank


@pytest.fixture(scope="module")
def pipe(tiny_models, bank):
    return Pipeline.from_pretrained(str(tiny_models / "pipeline"), tokens=bank, sampling=Sampling(4, 3.0, "DDIM"))


def photo(size=(30, 20), seed=0):
    pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


@pytest.fixture
def files(tmp_path):
    for index, size in enumerate([(30, 20), (40, 64)]):
        photo(size, index).save(tmp_path / f"{index}.png")
    return [tmp_path / "0.png", tmp_path / "1.png"]


@torch.no_grad()
def test_a_photo_is_edited_as_by_the_task_at_its_size(pipe, bank, files):
    edit = {"<smile>": 3, "<hat>": -1}
    task = Edit(pipe.backbone, images=str(files[0]), edits=[edit], editing=Editing(**EXACT))
    task.use_bank(bank)
    (result,) = task.edit_images([task.images[0]])
    expected = pasted_image(photo(), result.edits[0], result.unedited)
    for image in (photo(), files[0], str(files[0])):
        edited = pipe.edit(image, edit, **EXACT)
        assert edited.size == (30, 20)
        assert edited.tobytes() == expected.tobytes()
    edited = pipe.edit([files[1], files[0]], edit, **EXACT)
    assert [image.size for image in edited] == [(40, 64), (30, 20)]
    assert edited[1].tobytes() == expected.tobytes()
    assert pipe.edit(photo(), {}, **EXACT).tobytes() != expected.tobytes()


@torch.no_grad()
def test_a_guidance_rule_edits_as_semantic_guidance_of_photos_does(pipe, files):
    concepts = [SemanticEdit(concept="a hat", scale=5.0, warmup_steps=1)]
    task = Sega(pipe.backbone, images=str(files[0]), edits=concepts, editing=Editing(**EXACT))
    (result,) = task.edit_images([task.images[0]])
    expected = pasted_image(photo(), result.edits[0], result.unedited)
    assert pipe.edit(photo(), SEGA(concepts, guidance_scale=1), **EXACT).tobytes() == expected.tobytes()
    assert pipe.edit(photo(), SEGA(concepts, 1), **(EXACT | {"inversion": OBELM()})).size == (30, 20)


def test_generated_images_are_edited(pipe):
    plain = pipe(["a king", "a hat"], seeds=[1, 2])
    same = pipe.edit(None, {"<smile>": 0}, prompts=["a king", "a hat"], seeds=[1, 2], **EXACT)
    edited = pipe.edit(None, {"<smile>": 5}, prompts=["a king", "a hat"], seeds=[1, 2], **EXACT)
    assert len(plain) == len(same) == len(edited) == 4
    for before, zero, after in zip(plain, same, edited, strict=True):
        differences = [abs(a - b) for a, b in zip(before.tobytes(), zero.tobytes(), strict=True)]
        assert max(differences) <= 1
        assert after.tobytes() != zero.tobytes()


def test_words_and_templates_edit_too(pipe):
    settings = {"inversion": EDICT(), "steps": 5, "timestep": 601}
    words = pipe.edit(photo(), {"a man with a hat": 3}, **settings)
    template = pipe.edit(photo(), {"hat": 3}, template="a man with a {}", **settings)
    assert words.tobytes() == template.tobytes()
    assert pipe.edit(photo(), {"hat": 3}, **settings).tobytes() != words.tobytes()


def test_images_are_read_with_their_names(pipe, files):
    read = read_images([files[1], photo((8, 8))], pipe.backbone)
    assert [(image.name, image.size) for image in read] == [("1", (40, 64)), ("image-000", (8, 8))]
    folder = FolderImages(files[0].parent, 16, 2)
    for image, index in zip(read_images(files[0].parent, pipe.backbone), (0, 1), strict=True):
        assert torch.equal(image.image, folder[index].image)
    larger = FolderImages(files[0].parent, 32, 2)
    for image, index in zip(read_images(files[0].parent, pipe.backbone, (48, 32)), (0, 1), strict=True):
        assert torch.equal(image.image, larger[index].image)


def test_bad_uses(pipe, files):
    with pytest.raises(UserError, match="'<beard>'"):
        pipe.edit(photo(), {"<beard>": 1})
    with pytest.raises(UserError, match=r"'.*' is a folder"):
        pipe.edit(files[0].parent, {"<smile>": 1})
    with pytest.raises(UserError, match=r"editing.timestep 600 .*50 steps.* 581 or 601"):
        pipe.edit(photo(), {"<smile>": 1}, timestep=600)
    with pytest.raises(UserError, match="template 'a smile'"):
        pipe.edit(photo(), {"<smile>": 1}, template="a smile")
    with pytest.raises(UserError, match="nothing to edit"):
        edit_images(pipe, None, {"<smile>": 1})
    with pytest.raises(UserError, match="empty"):
        pipe.edit([], {"<smile>": 1})
