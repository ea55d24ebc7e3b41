import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import tokenlearn as tl
from tests.tiny_if import tiny_if_pipeline
from tests.tiny_xl import WIDTHS, tiny_xl_pipeline
from tokenlearn.editing import Editing, ImageEditor
from tokenlearn.errors import UserError
from tokenlearn.export import export
from tokenlearn.guidance import ComposableGuidance
from tokenlearn.image_functions import read_images
from tokenlearn.pipeline import Pipeline, Sampling, to_images
from tokenlearn.tokens import LearnedTokens, TokenBank, load_bank, load_embedding, save_embedding
from tokenlearn.tokens.directions import PairTemplates, difference_of_means, find_direction

POSITIVE = ["a person with glasses", "a photo of a man with glasses", "a king with glasses"]
NEGATIVE = ["a person", "a photo of a man", "a king"]
PROMPTS = ["a portrait of a king", "a photo of a woman with a hat"]


@pytest.fixture(scope="module")
def folders(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {
        "sd": tiny_models / "pipeline",
        "xl": tiny_xl_pipeline(folder / "xl"),
        "if": tiny_if_pipeline(folder / "if"),
    }


@pytest.fixture(scope="module", params=["sd", "xl", "if"])
def pipe(request, folders):
    return Pipeline.from_pretrained(str(folders[request.param]), sampling=Sampling(2, 3.0))


@pytest.fixture(scope="module")
def sd(folders):
    return Pipeline.from_pretrained(str(folders["sd"]), sampling=Sampling(2, 3.0))


def glasses(pipe, **options):
    return tl.direction(pipe, positive=POSITIVE, negative=NEGATIVE, token="<glasses>", **options)


def whole(tokens, token="<glasses>"):
    return torch.cat(tokens.bank.get(token), dim=1)[0].detach()


def test_the_mathematics_by_hand():
    # Means (3, 1) and (0, -3): the difference is (3, 4), of length 5.
    found = difference_of_means(torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.tensor([[0.0, -2.0], [0.0, -4.0]]))
    torch.testing.assert_close(found.vector, torch.tensor([0.6, 0.8]))
    # Projections of the positives: 2, 3.2; of the negatives: -1.6, -3.2.
    assert found.projections == pytest.approx((-2.4, 2.6))
    assert found.unit == pytest.approx(5)
    assert found.strengths == pytest.approx(((-3.2 - 2.6) / 5, (3.2 + 2.4) / 5))
    assert found.pairs == 2
    with pytest.raises(UserError, match="no direction"):
        difference_of_means(torch.ones(2, 3), torch.ones(2, 3))


def test_a_direction_is_the_difference_of_mean_outputs(pipe):
    positive, negative = (pipe.encode(prompts).prompt_embeds.mean(dim=(0, 1)) for prompts in (POSITIVE, NEGATIVE))
    torch.testing.assert_close(whole(glasses(pipe)), positive - negative, rtol=1e-4, atol=1e-6)
    assert find_direction(pipe, POSITIVE, NEGATIVE).vector.norm().item() == pytest.approx(1)


def test_outputs_move_by_the_vector_and_pooled_states_stay(pipe):
    tokens = glasses(pipe)
    known, vector = pipe.with_tokens(tokens), whole(tokens)
    plain = pipe.encode(PROMPTS)
    for prompts, times in (
        (PROMPTS, (0, 0)),
        (["a portrait of a <glasses> king", PROMPTS[1]], (1, 0)),
        (["a portrait <Glasses> of a king <glasses>", "<glasses> a photo of a woman with a hat"], (2, 1)),
    ):
        moved = known.encode(prompts)
        expected = plain.prompt_embeds + torch.tensor(times)[:, None, None] * vector
        torch.testing.assert_close(moved.prompt_embeds, expected, rtol=1e-4, atol=1e-5)
        if plain.pooled_prompt_embeds is not None:
            assert torch.equal(moved.pooled_prompt_embeds, plain.pooled_prompt_embeds)
        assert moved.extra.keys() == plain.extra.keys()
        assert moved.requires_grad == any(times)
    alone, empty = known.encode(["<glasses>"]), pipe.encode([""])
    torch.testing.assert_close(alone.prompt_embeds, empty.prompt_embeds + vector)


def test_content_positions_leave_out_the_begin_of_the_text(pipe):
    first = 0 if type(pipe.backbone).__name__ == "DeepFloydIF" else 1
    tokens = glasses(pipe, positions="content")
    states = [pipe.encode(prompts).prompt_embeds[:, first:].mean(dim=(0, 1)) for prompts in (POSITIVE, NEGATIVE)]
    torch.testing.assert_close(whole(tokens), states[0] - states[1], rtol=1e-4, atol=1e-6)
    change = pipe.with_tokens(tokens).encode(["<glasses>"]).prompt_embeds - pipe.encode([""]).prompt_embeds
    expected = whole(tokens).expand_as(change).clone()
    expected[:, :first] = 0
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)


def test_the_mask_of_each_encoder_is_its_own(folders):
    backbone = Pipeline.from_pretrained(str(folders["xl"])).backbone
    backbone.tokenizers[1].bos_token = None
    mask = backbone.output_mask(4, "output_content")
    assert mask.sum(dim=0).tolist() == [3] * WIDTHS[0] + [4] * WIDTHS[1]


def test_files_return_what_was_saved(pipe, tmp_path):
    tokens = glasses(pipe, positions="content")
    (path,) = tokens.save(tmp_path)
    assert path.name == "glasses-tl.safetensors"
    file = load_embedding(path)
    assert (file.token, file.space) == ("<glasses>", "output_content")
    for found, expected in zip(file.vectors, tokens.bank.get("<glasses>"), strict=True):
        assert torch.equal(found, expected)
    assert file.metadata["kind"] == "direction"
    assert file.metadata["vocabulary_hash"] == pipe.vocabulary_hash
    assert file.metadata["base_model"] == Path(pipe.backbone.pretrained).name
    assert file.metadata["pairs"] == "3"
    low, high = json.loads(file.metadata["strengths"])
    assert low <= -1 < 1 <= high
    again = pipe.with_tokens(str(path)).encode(["a king <glasses>"])
    assert torch.equal(again.prompt_embeds, pipe.with_tokens(tokens).encode(["a king <glasses>"]).prompt_embeds)
    (copy,) = export(embedding=str(path), output_dir=str(tmp_path / "copy"), scale=2.0)
    assert load_embedding(copy).space == "output_content"
    torch.testing.assert_close(load_embedding(copy).vectors[0], 2 * file.vectors[0])


def test_programs_for_input_embeddings_do_not_take_the_file_for_one(sd, tmp_path):
    (path,) = glasses(sd).save(tmp_path)
    stored = load_file(path)
    assert len(stored) > 1  # AUTOMATIC1111 and diffusers take any single tensor
    assert not stored.keys() & {"emb_params", "emp_params", "clip_l", "clip_g", "string_to_param"}
    first = next(iter(stored.values()))  # ComfyUI and kohya take the first
    assert first.shape[-1] not in sd.backbone.embedding_widths
    theirs = StableDiffusionPipeline.from_pretrained(sd.backbone.pretrained)
    with pytest.raises(ValueError, match="Loaded state dictionary is incorrect"):
        theirs.load_textual_inversion(str(path), token="<glasses>")


def test_damaged_and_newer_files_are_refused(sd, tmp_path):
    about = {"token": "<a>", "space": "output"}
    cases = {
        "version": ({"format": torch.tensor([2]), "output_0": torch.ones(1, 16)}, about),
        "space None": ({"format": torch.tensor([1]), "output_0": torch.ones(1, 16)}, {"token": "<a>"}),
        "lacks": ({"format": torch.tensor([1]), "output_1": torch.ones(1, 16)}, about),
        "has the keys": ({"output_0": torch.ones(1, 16), "output_1": torch.ones(1, 16)}, about),
    }
    for message, (tensors, metadata) in cases.items():
        save_file(tensors, tmp_path / "file.safetensors", metadata=metadata)
        with pytest.raises(UserError, match=message):
            load_embedding(tmp_path / "file.safetensors")
    save_file(cases["version"][0] | {"format": torch.tensor([1])}, tmp_path / "file.safetensors", metadata=about)
    assert load_embedding(tmp_path / "file.safetensors").space == "output"


def test_both_kinds_of_tokens_in_one_bank(sd, tmp_path):
    generator = torch.Generator().manual_seed(0)
    save_embedding(tmp_path / "elf.safetensors", "<elf>", [torch.randn(2, 16, generator=generator)], {})
    glasses(sd).save(tmp_path)
    save_embedding(tmp_path / "hat.safetensors", "<hat-2>", [torch.randn(1, 16, generator=generator)], {})
    bank, files = load_bank(str(tmp_path), sd.backbone.embedding_widths, sd.backbone.word_tables)
    assert [file.token for file in files] == ["<elf>", "<glasses>", "<hat-2>"]
    pipe = sd.with_tokens(bank)
    inputs = sd.with_tokens([str(tmp_path / "elf.safetensors"), str(tmp_path / "hat.safetensors")])
    both = pipe.encode(["a <elf> king with <glasses> a <hat-2>"]).prompt_embeds
    expected = inputs.encode(["a <elf> king with a <hat-2>"]).prompt_embeds + torch.cat(bank.get("<glasses>"), dim=1)
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pipe.encode(["a king"]).prompt_embeds, sd.encode(["a king"]).prompt_embeds)


def test_gradients_reach_the_vector_alone(sd):
    pipe = sd.with_tokens(glasses(sd) | tl.direction(sd, positive=["a hat"], negative=["a king"], token="<hat>"))
    pipe.encode(["a king <glasses>", "a king"]).prompt_embeds.sum().backward()
    gradient = pipe.tokens.vectors[0].grad
    torch.testing.assert_close(gradient[0], torch.full((16,), 77.0))
    assert not gradient[1].any()


def test_edits_and_guidance_take_directions_as_they_take_learned_tokens(sd):
    tokens = glasses(sd)
    pipe, settings = sd.with_tokens(tokens), {"steps": 5, "timestep": 601, "inversion": "edit_friendly"}
    photo = pipe("a king")[0]
    zero, one = (pipe.edit(photo, {"<glasses>": scale}, **settings) for scale in (0, 3))
    assert zero.tobytes() != one.tobytes()
    # The edit written out: the unconditional prediction moved along the one with the vector added.
    backbone = pipe.backbone
    with torch.no_grad():
        editing, source = ImageEditor(backbone, Editing(**settings)), sd.unconditional()
        noisy = editing.invert(backbone.encode_images(read_images(photo, backbone)[0].image), source)
        moved = backbone.add_to_outputs(source, whole(tokens)[None], "output")
        expected = to_images(editing.denoise_towards(noisy, source, [moved], [3.0]))[0]
    assert one.tobytes() == expected.tobytes()
    plain = pipe("a king", seeds=[1])[0].tobytes()
    concept = tl.SemanticEdit(concept="<glasses>", scale=20, warmup_steps=0)
    for rule in (tl.SEGA([concept], guidance_scale=3.0), ComposableGuidance([3.0, 4.0], ["<glasses>"])):
        assert pipe("a king", seeds=[1], guidance=rule)[0].tobytes() != plain
    assert pipe("a king <glasses>", seeds=[1])[0].tobytes() != plain
    with pytest.raises(UserError, match=r"'<glasses>'.*not loaded"):
        sd("a king", guidance=tl.SEGA([concept]))


def test_templates_make_pairs():
    templates = PairTemplates(["a portrait of {}", "a photo of {}!"], "a portrait of a person")
    prompts = {
        "smile": "a portrait of a smiling person",
        "no smile": "a portrait of a serious person",
        "hat": "a portrait of a hat",
    }
    smiling = ["a portrait of a smiling person", "a photo of a smiling person!"]
    serious = ["a portrait of a serious person", "a photo of a serious person!"]
    neutral = ["a portrait of a person", "a photo of a person!"]
    assert templates.pairs("smile", ["no smile"], prompts) == (smiling, serious)
    assert templates.pairs("no smile", ["smile"], prompts) == (serious, smiling)
    assert templates.pairs("hat", ["no hat"], prompts)[1] == neutral
    assert templates.pairs("no hat", ["hat"], prompts)[0] == neutral
    positive, negative = templates.pairs("hat", ["smile", "no smile"], prompts)
    assert positive == ["a portrait of a hat"] * 2 + ["a photo of a hat!"] * 2
    assert negative == [smiling[0], serious[0], smiling[1], serious[1]]
    with pytest.raises(UserError, match=r"'hat'.*neutral"):
        PairTemplates(["a portrait of {}"]).pairs("hat", ["no hat"], prompts)
    with pytest.raises(UserError, match="'a hat' is not written like"):
        templates.pairs("hat", ["no hat"], {"hat": "a hat"})
    with pytest.raises(UserError, match="exactly one"):
        PairTemplates(["a portrait"])


def test_bad_uses(sd, folders):
    with pytest.raises(UserError, match="2 positive and 1 negative"):
        tl.direction(sd, positive=["a", "b"], negative=["a"], token="<a>")
    with pytest.raises(UserError, match="lists of prompts"):
        tl.direction(sd, positive="a hat", negative="a king", token="<a>")
    with pytest.raises(UserError, match="'hat' is already"):
        sd.with_tokens(tl.direction(sd, positive=["a hat"], negative=["a king"], token="hat"))
    with pytest.raises(UserError, match="2 vectors, but one that is added"):
        TokenBank({"<a>": 2}, [16], {"<a>": "output"})
    with pytest.raises(UserError, match="space of '<a>' is 'out'"):
        TokenBank({"<a>": 1}, [16], {"<a>": "out"})
    with pytest.raises(UserError, match="both have a token"):
        glasses(sd) | glasses(sd)
    with pytest.raises(UserError, match="text encoder"):
        Pipeline.from_pretrained(str(folders["xl"])).with_tokens(glasses(sd))
    wide = LearnedTokens(TokenBank({"<b>": 1}, [24], {"<b>": "output"}))
    with pytest.raises(UserError, match="width"):
        sd.with_tokens(wide)
    with pytest.raises(UserError, match="different models"):
        glasses(sd) | wide
