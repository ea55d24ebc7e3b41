import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTextModelWithProjection

from tests.tiny import tiny_text_encoder, tiny_tokenizer
from tokenlearn.errors import UserError
from tokenlearn.tokens import PlaceholderVocabulary, TokenBank, input_embedding, save_embedding
from tokenlearn.tokens.injection import accept_learned_embeddings, learned_embeddings

PROMPTS = ["a portrait of a <wizard> with glasses", "a <viking> and a <wizard>", "a portrait of a king"]


def random_bank(num_vectors: dict[str, int], width: int = 16) -> TokenBank:
    bank = TokenBank(num_vectors, [width])
    bank.vectors[0].data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return bank


def prepared(bank, tokenizers, text_encoders):
    """A vocabulary, and encoders that accept the bank's vectors."""
    for text_encoder in text_encoders:
        accept_learned_embeddings(text_encoder)
    return PlaceholderVocabulary(bank, tokenizers)


def encode(prompts, vocabulary, text_encoder, bank, index=0):
    """Hidden states of prompts with the bank's placeholders."""
    tokenizer = vocabulary.tokenizers[index]
    texts = [vocabulary.expand(prompt) for prompt in prompts]
    ids = tokenizer(texts, padding="max_length", max_length=20, return_tensors="pt").input_ids
    rows = vocabulary.rows(ids, index)
    with learned_embeddings(rows, bank.vectors[index]):
        return text_encoder(ids.masked_fill(rows >= 0, 0)).last_hidden_state


def encode_words(prompts, tokenizer, text_encoder):
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
    theirs = encode_words(
        pipeline.maybe_convert_prompt(prompts, pipeline.tokenizer), pipeline.tokenizer, pipeline.text_encoder
    )
    vocabulary = prepared(bank, [tokenizer], [text_encoder])
    assert torch.equal(encode(prompts, vocabulary, text_encoder, bank), theirs)


def test_prompts_without_placeholders_are_encoded_as_before(tokenizer, text_encoder):
    before, bank = encode_words(PROMPTS[2:], tokenizer, text_encoder), random_bank({"<wizard>": 2})
    vocabulary = prepared(bank, [tokenizer], [text_encoder])
    assert vocabulary.expand(PROMPTS[2]) == PROMPTS[2]
    assert torch.equal(encode(PROMPTS[2:], vocabulary, text_encoder, bank), before)
    assert torch.equal(encode_words(PROMPTS[2:], tokenizer, text_encoder), before)


def test_every_vector_gets_a_gradient_and_nothing_else_does(tokenizer, text_encoder):
    bank = random_bank({"<wizard>": 3, "<viking>": 1})
    vocabulary = prepared(bank, [tokenizer], [text_encoder])
    encode([PROMPTS[1]], vocabulary, text_encoder, bank).square().sum().backward()
    assert (bank.vectors[0].grad.norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in text_encoder.parameters())


def test_tokens_absent_from_the_prompts_get_no_gradient(tokenizer, text_encoder):
    bank = random_bank({"<wizard>": 2, "<viking>": 1})
    vocabulary = prepared(bank, [tokenizer], [text_encoder])
    encode([PROMPTS[0]], vocabulary, text_encoder, bank).square().sum().backward()
    assert (bank.vectors[0].grad.norm(dim=1) > 0).tolist() == [True, True, False]


def test_gradient_equals_that_of_a_resized_table(tokenizer, text_encoder):
    bank = random_bank({"<wizard>": 2})
    vocabulary = prepared(bank, [tokenizer], [text_encoder])
    encode(["<wizard> and a <wizard>"], vocabulary, text_encoder, bank).square().sum().backward()

    known = vocabulary.tokenizers[0]
    whole = tiny_text_encoder(len(tokenizer))
    whole.resize_token_embeddings(len(known), mean_resizing=False)
    whole.get_input_embeddings().weight.data[-2:] = bank.vectors[0].data
    encode_words([vocabulary.expand("<wizard> and a <wizard>")], known, whole).square().sum().backward()
    assert torch.allclose(bank.vectors[0].grad, whole.get_input_embeddings().weight.grad[-2:], rtol=1e-4, atol=1e-6)


def test_old_rows_stay_bit_identical_under_weight_decay(tokenizer, text_encoder):
    state = {name: tensor.clone() for name, tensor in text_encoder.state_dict().items()}
    bank = random_bank({"<wizard>": 2, "<viking>": 1})
    start = bank.vectors[0].detach().clone()
    vocabulary = prepared(bank, [tokenizer], [text_encoder])
    optimizer = torch.optim.AdamW([*bank.parameters(), *text_encoder.parameters()], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        encode(PROMPTS, vocabulary, text_encoder, bank).square().sum().backward()
        optimizer.step()
    assert (bank.vectors[0] != start).any(dim=1).all()
    after = text_encoder.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_tokenizer_and_encoder_stay_as_they_were(tokenizer, text_encoder):
    names, table = dict(text_encoder.named_parameters()).keys(), text_encoder.get_input_embeddings()
    vocabulary_before, units = tokenizer.get_vocab(), tokenizer.tokenize(PROMPTS[0])
    bank = random_bank({"<wizard>": 2})
    vocabulary = prepared(bank, [tokenizer], [text_encoder])
    encode(PROMPTS, vocabulary, text_encoder, bank)
    assert dict(text_encoder.named_parameters()).keys() == names
    assert text_encoder.get_input_embeddings() is table
    assert not any(parameter is bank.vectors[0] for parameter in text_encoder.parameters())
    assert tokenizer.get_vocab() == vocabulary_before
    assert tokenizer.tokenize(PROMPTS[0]) == units


def test_changes_of_the_bank_are_seen_at_once(tokenizer, text_encoder):
    bank = random_bank({"<wizard>": 1})
    prepared(bank, [tokenizer], [text_encoder])
    bank.set("<wizard>", [torch.full((1, 16), 7.0)])
    with learned_embeddings(torch.tensor([[0, -1]]), bank.vectors[0]):
        embedded = input_embedding(text_encoder)(torch.tensor([[0, 0]]))
    assert embedded[0, 0].eq(7).all()
    assert torch.equal(embedded[0, 1], input_embedding(text_encoder).weight[0])


def test_half_precision_encoder_reads_a_float32_bank(tokenizer, text_encoder):
    bank = random_bank({"<wizard>": 2})
    vocabulary = prepared(bank, [tokenizer], [text_encoder])
    text_encoder.to(torch.bfloat16)
    hidden = encode([PROMPTS[0]], vocabulary, text_encoder, bank)
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
    vocabulary = prepared(bank, tokenizers, [small, large])
    for index, (encoder, vectors) in enumerate(zip((small, large), bank.vectors, strict=True)):
        encode([PROMPTS[0]], vocabulary, encoder, bank, index).square().sum().backward()
        assert (vectors.grad.norm(dim=1) > 0).all()


def test_an_embedding_that_scales_words_keeps_doing_so(text_encoder):
    """As Gemma's does; the bank's vectors come as they are."""

    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    table = input_embedding(text_encoder)
    scaled = Scaled(*table.weight.shape, _weight=table.weight.data)
    text_encoder.set_input_embeddings(scaled)
    accept_learned_embeddings(text_encoder)
    vectors = torch.full((1, 16), 7.0)
    with learned_embeddings(torch.tensor([[-1, 0]]), vectors):
        embedded = input_embedding(text_encoder)(torch.tensor([[5, 0]]))
    assert torch.equal(embedded[0, 0], 3 * table.weight[5])
    assert torch.equal(embedded[0, 1], vectors[0])


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
def test_expansion(tokenizer, prompt: str, expanded: str):
    vocabulary = PlaceholderVocabulary(random_bank({"<wizard>": 3, "<viking>": 1}), [tokenizer])
    assert vocabulary.expand(prompt) == expanded
    assert vocabulary.expand(expanded) == expanded


def test_expansion_gives_one_id_per_vector(tokenizer):
    vocabulary = PlaceholderVocabulary(random_bank({"<wizard>": 3}), [tokenizer])
    known = vocabulary.tokenizers[0]
    units = known.tokenize(vocabulary.expand("a <Wizard>, smiling"))
    assert units == ["a</w>", "<wizard>", "<wizard>_1", "<wizard>_2", ",</w>", "smiling</w>"]
    ids = torch.tensor(known.convert_tokens_to_ids(units))
    assert vocabulary.rows(ids, 0).tolist() == [-1, 0, 1, 2, -1, -1]


def test_a_token_without_brackets_is_found_as_a_whole_word_alone(tokenizer):
    vocabulary = PlaceholderVocabulary(random_bank({"ngd": 2}), [tokenizer])
    assert vocabulary.expand("a kingdom, NGD, ngds") == "a kingdom, ngd ngd_1, ngds"
    known = vocabulary.tokenizers[0]
    assert known("a kingdom")["input_ids"] == tokenizer("a kingdom")["input_ids"]
    assert {"ngd", "ngd_1"} <= set(known.tokenize(vocabulary.expand("a ngd man")))


@pytest.mark.parametrize("placeholder", ["wizard", "wizard</w>", "Wizard", "<|endoftext|>", "a"])
def test_placeholder_that_is_a_word_already(tokenizer, placeholder: str):
    size = len(tokenizer)
    with pytest.raises(UserError, match=re.escape(f"'{placeholder}'")):
        PlaceholderVocabulary(random_bank({placeholder: 1}), [tokenizer])
    assert len(tokenizer) == size


def test_placeholder_that_a_special_token_splits(tokenizer):
    if not tokenizer.is_fast:
        pytest.skip("CLIP's tokenizer before transformers 5 takes the longest added token, special or not")
    tokenizer.add_tokens(["<vik"], special_tokens=True)
    with pytest.raises(UserError, match=r"'<viking>' .* 3"):
        PlaceholderVocabulary(random_bank({"<wizard>": 2, "<viking>": 1}), [tokenizer])


def test_bank_for_two_encoders_on_one(tokenizer):
    with pytest.raises(UserError, match="2 text encoder"):
        PlaceholderVocabulary(TokenBank({"<wizard>": 1}, [16, 16]), [tokenizer])
