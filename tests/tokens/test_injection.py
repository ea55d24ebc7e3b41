from pathlib import Path

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.tiny import tiny_text_encoder, tiny_tokenizer
from tokenlearn.errors import UserError
from tokenlearn.tokens import TokenBank, TokenInjection, input_embedding, save_embedding

PROMPTS = ["a portrait of a <wizard> with glasses", "a <viking> and a <wizard>", "a portrait of a king"]


def random_bank(num_vectors: dict[str, int], width: int = 16) -> TokenBank:
    bank = TokenBank(num_vectors, [width])
    bank.vectors[0].data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return bank


def encode(prompts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> Tensor:
    ids = tokenizer(prompts, padding="max_length", max_length=20, return_tensors="pt").input_ids
    return text_encoder(ids).last_hidden_state


def test_same_hidden_states_as_diffusers_loading_the_saved_files(tokenizer, text_encoder, tmp_path: Path):
    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None
        components: dict[str, torch.nn.Module] = {}  # noqa: RUF012

    pipeline = Pipeline()
    pipeline.tokenizer = tiny_tokenizer(tmp_path / "theirs")
    pipeline.text_encoder = tiny_text_encoder(len(tokenizer)).requires_grad_(False)
    bank = random_bank({"<wizard>": 3, "<viking>": 1})
    for placeholder, format in (("<wizard>", "a1111"), ("<viking>", "diffusers")):
        path = save_embedding(tmp_path / f"{format}.safetensors", placeholder, bank.get(placeholder), {}, format)
        pipeline.load_textual_inversion(str(path), token="<wizard>" if format == "a1111" else None)
    prompts = [*PROMPTS, "<wizard>", "<wizard>, a <wizard>", "a<viking>s hat"]
    theirs = encode(
        pipeline.maybe_convert_prompt(prompts, pipeline.tokenizer), pipeline.tokenizer, pipeline.text_encoder
    )

    injection = TokenInjection(bank, [tokenizer], [text_encoder])
    ours = encode([injection.expand(prompt) for prompt in prompts], tokenizer, text_encoder)
    assert torch.equal(ours, theirs)


def test_prompts_without_placeholders_are_encoded_as_before(tokenizer, text_encoder):
    before = encode(PROMPTS[2:], tokenizer, text_encoder)
    injection = TokenInjection(random_bank({"<wizard>": 2}), [tokenizer], [text_encoder])
    assert injection.expand(PROMPTS[2]) == PROMPTS[2]
    assert torch.equal(encode(PROMPTS[2:], tokenizer, text_encoder), before)


def test_every_vector_gets_a_gradient_and_nothing_else_does(tokenizer, text_encoder):
    bank = random_bank({"<wizard>": 3, "<viking>": 1})
    injection = TokenInjection(bank, [tokenizer], [text_encoder])
    encode([injection.expand(PROMPTS[1])], tokenizer, text_encoder).square().sum().backward()
    assert (bank.vectors[0].grad.norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in text_encoder.parameters())


def test_tokens_absent_from_the_prompts_get_no_gradient(tokenizer, text_encoder):
    bank = random_bank({"<wizard>": 2, "<viking>": 1})
    injection = TokenInjection(bank, [tokenizer], [text_encoder])
    encode([injection.expand(PROMPTS[0])], tokenizer, text_encoder).square().sum().backward()
    assert (bank.vectors[0].grad.norm(dim=1) > 0).tolist() == [True, True, False]


def test_gradient_equals_that_of_a_resized_table(tokenizer, text_encoder, tmp_path: Path):
    bank = random_bank({"<wizard>": 2})
    injection = TokenInjection(bank, [tokenizer], [text_encoder])
    prompt = [injection.expand("<wizard> and a <wizard>")]
    encode(prompt, tokenizer, text_encoder).square().sum().backward()

    whole = tiny_text_encoder(len(tokenizer) - 2)
    whole.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    whole.get_input_embeddings().weight.data[-2:] = bank.vectors[0].data
    encode(prompt, tokenizer, whole).square().sum().backward()
    assert torch.allclose(bank.vectors[0].grad, whole.get_input_embeddings().weight.grad[-2:], rtol=1e-4, atol=1e-6)


def test_old_rows_stay_bit_identical_under_weight_decay(tokenizer, text_encoder):
    state = {name: tensor.clone() for name, tensor in text_encoder.state_dict().items()}
    bank = random_bank({"<wizard>": 2, "<viking>": 1})
    start = bank.vectors[0].detach().clone()
    injection = TokenInjection(bank, [tokenizer], [text_encoder])
    optimizer = torch.optim.AdamW([*bank.parameters(), *text_encoder.parameters()], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        encode([injection.expand(prompt) for prompt in PROMPTS], tokenizer, text_encoder).square().sum().backward()
        optimizer.step()
    assert (bank.vectors[0] != start).any(dim=1).all()
    after = text_encoder.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_bank_is_no_part_of_the_text_encoder(tokenizer, text_encoder):
    names = dict(text_encoder.named_parameters()).keys()
    shape = text_encoder.get_input_embeddings().weight.shape
    bank = random_bank({"<wizard>": 2})
    TokenInjection(bank, [tokenizer], [text_encoder])
    assert dict(text_encoder.named_parameters()).keys() == names
    assert text_encoder.get_input_embeddings().weight.shape == shape
    assert not any(parameter is bank.vectors[0] for parameter in text_encoder.parameters())


def test_changes_of_the_bank_are_seen_at_once(tokenizer, text_encoder):
    bank = random_bank({"<wizard>": 1})
    TokenInjection(bank, [tokenizer], [text_encoder])
    ids = torch.tensor([[tokenizer.convert_tokens_to_ids("<wizard>")]])
    bank.set("<wizard>", [torch.full((1, 16), 7.0)])
    assert input_embedding(text_encoder)(ids).eq(7).all()


def test_half_precision_encoder_reads_a_float32_bank(tokenizer, text_encoder):
    bank = random_bank({"<wizard>": 2})
    injection = TokenInjection(bank, [tokenizer], [text_encoder])
    text_encoder.to(torch.bfloat16)
    hidden = encode([injection.expand(PROMPTS[0])], tokenizer, text_encoder)
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    assert bank.vectors[0].grad.dtype == torch.float32
    assert (bank.vectors[0].grad.norm(dim=1) > 0).all()


def test_two_encoders_read_their_own_vectors(tmp_path: Path):
    tokenizers = [tiny_tokenizer(tmp_path / name) for name in ("l", "g")]
    small = tiny_text_encoder(len(tokenizers[0])).requires_grad_(False)
    config = tiny_text_encoder(len(tokenizers[1]), width=24).config
    large = CLIPTextModelWithProjection(config).requires_grad_(False)
    bank = TokenBank({"<wizard>": 2}, [16, 24])
    injection = TokenInjection(bank, tokenizers, [small, large])
    for tokenizer, encoder, vectors in zip(tokenizers, (small, large), bank.vectors, strict=True):
        encode([injection.expand(PROMPTS[0])], tokenizer, encoder).square().sum().backward()
        assert (vectors.grad.norm(dim=1) > 0).all()


def test_table_with_spare_rows_still_reads_the_bank(tokenizer):
    text_encoder = tiny_text_encoder(len(tokenizer) + 8).requires_grad_(False)  # ids of placeholders lie in the table
    bank = random_bank({"<wizard>": 2})
    TokenInjection(bank, [tokenizer], [text_encoder])
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(["a</w>", "<wizard>_1"]))
    embedded = input_embedding(text_encoder)(ids)
    assert torch.equal(embedded[0], input_embedding(text_encoder).weight[ids[0]])
    assert torch.equal(embedded[1], bank.vectors[0][1])


@pytest.mark.parametrize(
    ("prompt", "expanded"),
    [
        ("a <wizard>", "a <wizard> <wizard>_1 <wizard>_2"),
        ("<wizard><wizard>", "<wizard> <wizard>_1 <wizard>_2<wizard> <wizard>_1 <wizard>_2"),
        ("A <WIZARD> hat", "A <wizard> <wizard>_1 <wizard>_2 hat"),
        ("a <wizard>_1 hat", "a <wizard>_1 hat"),
        ("a <viking>, a <wizard>", "a <viking>, a <wizard> <wizard>_1 <wizard>_2"),
        ("a (red) wizard > a hat", "a (red) wizard > a hat"),
        ("", ""),
    ],
)
def test_expansion(tokenizer, text_encoder, prompt: str, expanded: str):
    injection = TokenInjection(random_bank({"<wizard>": 3, "<viking>": 1}), [tokenizer], [text_encoder])
    assert injection.expand(prompt) == expanded
    assert injection.expand(expanded) == expanded


def test_expansion_gives_one_id_per_vector(tokenizer, text_encoder):
    injection = TokenInjection(random_bank({"<wizard>": 3}), [tokenizer], [text_encoder])
    units = tokenizer.tokenize(injection.expand("a <Wizard>, smiling"))
    assert units == ["a</w>", "<wizard>", "<wizard>_1", "<wizard>_2", ",</w>", "smiling</w>"]


@pytest.mark.parametrize("placeholder", ["wizard", "wizard</w>", "Wizard", "<|endoftext|>", "a"])
def test_placeholder_that_is_a_word_already(tokenizer, text_encoder, placeholder: str):
    size = len(tokenizer)
    with pytest.raises(UserError, match="already in the text encoder's vocabulary"):
        TokenInjection(random_bank({placeholder: 1}), [tokenizer], [text_encoder])
    assert len(tokenizer) == size


def test_placeholder_that_a_special_token_splits_leaves_everything_as_it_was(tokenizer, text_encoder):
    if not tokenizer.is_fast:
        pytest.skip("CLIP's tokenizer before transformers 5 takes the longest added token, special or not")
    tokenizer.add_tokens(["<vik"], special_tokens=True)
    table, size = text_encoder.get_input_embeddings(), len(tokenizer)
    with pytest.raises(UserError, match="'<viking>' is split into 3 units"):
        TokenInjection(random_bank({"<wizard>": 2, "<viking>": 1}), [tokenizer], [text_encoder])
    assert len(tokenizer) == size
    assert text_encoder.get_input_embeddings() is table


def test_width_of_another_model_family(tokenizer, text_encoder):
    with pytest.raises(UserError, match="embedding has width 24, this backbone's text encoder has 16"):
        TokenInjection(random_bank({"<wizard>": 1}, width=24), [tokenizer], [text_encoder])


def test_bank_for_two_encoders_on_one(tokenizer, text_encoder):
    with pytest.raises(UserError, match="for 2 text encoder"):
        TokenInjection(TokenBank({"<wizard>": 1}, [16, 16]), [tokenizer], [text_encoder])


def test_second_injection_needs_the_first_removed(tokenizer, text_encoder):
    first = TokenInjection(random_bank({"<wizard>": 2}), [tokenizer], [text_encoder])
    with pytest.raises(ValueError, match="remove"):
        TokenInjection(random_bank({"<viking>": 1}), [tokenizer], [text_encoder])
    first.remove()
    bank = random_bank({"<viking>": 1})
    second = TokenInjection(bank, [tokenizer], [text_encoder])
    first.remove()  # late, and without effect on the second
    assert tokenizer.tokenize(second.expand("<viking>")) == ["<viking>"]
    assert torch.equal(
        input_embedding(text_encoder)(torch.tensor(tokenizer.convert_tokens_to_ids("<viking>"))), bank.vectors[0][0]
    )


def test_remove_restores_tokenizer_and_encoder(tokenizer, text_encoder):
    table, vocabulary = text_encoder.get_input_embeddings(), tokenizer.get_vocab()
    units, before = tokenizer.tokenize(PROMPTS[0]), encode(PROMPTS, tokenizer, text_encoder)
    text = tokenizer.decode(tokenizer("a wizard").input_ids)
    injection = TokenInjection(random_bank({"<wizard>": 2, "<viking>": 1}), [tokenizer], [text_encoder])
    assert tokenizer.tokenize(PROMPTS[0]) != units
    injection.remove()
    assert text_encoder.get_input_embeddings() is table
    assert tokenizer.get_vocab() == vocabulary
    assert tokenizer.tokenize(PROMPTS[0]) == units
    assert tokenizer.decode(tokenizer("a wizard").input_ids) == text
    assert torch.equal(encode(PROMPTS, tokenizer, text_encoder), before)


def test_remove_after_a_conversion_gives_the_converted_table(tokenizer, text_encoder):
    injection = TokenInjection(random_bank({"<wizard>": 1}), [tokenizer], [text_encoder])
    text_encoder.to(torch.float16)
    injection.remove()
    assert text_encoder.get_input_embeddings().weight.dtype == torch.float16
