from tests.tiny import tiny_text_encoder
from tokenlearn.tokens.vocabulary import vocabulary_hash


def test_vocabulary_hash_tells_tables_apart_but_not_precisions(tokenizer, text_encoder):
    text_encoder.half()
    expected = vocabulary_hash(text_encoder)
    assert len(expected) == 16
    assert int(expected, 16) >= 0
    assert vocabulary_hash(text_encoder.float()) == expected
    assert vocabulary_hash(text_encoder.bfloat16()) == expected
    text_encoder.get_input_embeddings().weight[5, 3] += 1
    assert vocabulary_hash(text_encoder) != expected
    assert vocabulary_hash(tiny_text_encoder(len(tokenizer) - 2)) != expected
