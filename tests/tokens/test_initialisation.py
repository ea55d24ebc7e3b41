import pytest
import torch

from tokenlearn.errors import UserError
from tokenlearn.tokens import vectors_from_words, vocabulary_norm_range


def table_rows(words: list[str], tokenizer, text_encoder) -> torch.Tensor:
    return text_encoder.get_input_embeddings().weight[
        tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in words])
    ]


def test_one_vector_per_unit(tokenizer, text_encoder):
    vectors = vectors_from_words("old man smiling", tokenizer, text_encoder)
    assert torch.equal(vectors, table_rows(["old", "man", "smiling"], tokenizer, text_encoder))
    assert torch.equal(vectors, vectors_from_words("old man smiling", tokenizer, text_encoder, 3))


def test_single_vector_is_the_mean(tokenizer, text_encoder):
    vectors = vectors_from_words("old man", tokenizer, text_encoder, 1)
    assert torch.allclose(vectors, table_rows(["old", "man"], tokenizer, text_encoder).mean(0, keepdim=True))


def test_more_vectors_repeat_in_turn(tokenizer, text_encoder):
    vectors = vectors_from_words("old man", tokenizer, text_encoder, 5)
    assert torch.equal(vectors, table_rows(["old", "man", "old", "man", "old"], tokenizer, text_encoder))


@pytest.mark.parametrize("num_vectors", [None, 1, 2, 4])
def test_result_is_a_float32_copy_without_gradient(tokenizer, text_encoder, num_vectors: int | None):
    text_encoder.requires_grad_(True).half()
    before = text_encoder.get_input_embeddings().weight.clone()
    vectors = vectors_from_words("old man", tokenizer, text_encoder, num_vectors)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    vectors.fill_(9)
    assert torch.equal(text_encoder.get_input_embeddings().weight, before)


@pytest.mark.parametrize(
    ("words", "num_vectors", "message"),
    [
        ("", None, "''"),
        ("  ", 1, "'  '"),
        ("old man smiling", 2, "among 2 vectors"),
        ("old man", 0, "among 0 vectors"),
    ],
)
def test_refusals(tokenizer, text_encoder, words: str, num_vectors: int | None, message: str):
    with pytest.raises(UserError, match=message):
        vectors_from_words(words, tokenizer, text_encoder, num_vectors)


def test_vocabulary_norm_range_leaves_out_the_tails(text_encoder):
    weight = text_encoder.get_input_embeddings().weight
    weight.copy_(torch.nn.functional.normalize(torch.randn_like(weight)) * torch.linspace(1, 2, len(weight))[:, None])
    weight[0] = 100
    low, high = vocabulary_norm_range(text_encoder)
    assert low == pytest.approx(1.01, abs=5e-3)
    assert high == pytest.approx(1.99, abs=5e-3)
    assert vocabulary_norm_range(text_encoder, (0.0, 1.0))[1] == pytest.approx(400)
