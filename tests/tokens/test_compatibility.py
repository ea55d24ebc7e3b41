"""Tokens in models whose words differ from those beside which they were learned: said with a figure, not refused."""

import copy
import json
import warnings

import pytest
import torch

from tests.tiny import tiny_text_encoder
from tokenlearn.errors import UserError
from tokenlearn.tokens import save_embedding
from tokenlearn.tokens.compatibility import VOCABULARY, WordTable, check_vocabularies, fingerprint
from tokenlearn.tokens.embeddings import load_bank

WIDTHS = (64, 96)


@pytest.fixture
def encoders(tokenizer):
    return [tiny_text_encoder(len(tokenizer), width) for width in WIDTHS]


def tables_of(tokenizer, encoders):
    return [WordTable(name, tokenizer, encoder) for name, encoder in zip(("clip_l", "clip_g"), encoders, strict=False)]


def table_of(encoder):
    return encoder.get_input_embeddings().weight.data


def moved(encoder, share):
    """The same encoder with every word moved by noise of a share of the words' norms."""
    other = copy.deepcopy(encoder)
    rows = table_of(other)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    rows += share * rows.norm(dim=1, keepdim=True) * noise / rows.shape[1] ** 0.5
    return other


@pytest.fixture
def about(tokenizer, encoders):
    """Metadata of a token near the word "wizard" in both encoders."""
    (wizard,) = tokenizer("wizard", add_special_tokens=False).input_ids
    vectors = [table_of(encoder)[[wizard]] + 0.001 for encoder in encoders]
    tables = tables_of(tokenizer, encoders)
    return {
        "base_model": "owner/base",
        "vocabulary_hash": tables[0].hash,
        VOCABULARY: fingerprint(tables, "<old-king>", vectors),
    }


def said(about, tokenizer, encoders, capsys):
    """Warnings and notices, one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_vocabularies([("a.safetensors", about)], tables_of(tokenizer, encoders))
    return [str(warning.message) for warning in caught], capsys.readouterr().err


def test_the_words_that_matter_are_the_nearest_and_those_of_the_name(about, tokenizer):
    first, second = json.loads(about[VOCABULARY])
    assert (first["encoder"], second["encoder"]) == ("clip_l", "clip_g")
    assert {"wizard</w>", "old</w>", "king</w>", "a</w>"} <= first["words"].keys()
    assert len(about[VOCABULARY]) < 4000
    assert fingerprint(tables_of(tokenizer, [tiny_text_encoder(len(tokenizer), 64)]), "<old-king>") == json.dumps(
        [first | {"words": json.loads(fingerprint_words(tokenizer))}]
    )


def fingerprint_words(tokenizer):
    """Words of the same encoder without a vector: those of the name and common ones."""
    table = WordTable("clip_l", tokenizer, tiny_text_encoder(len(tokenizer), 64))
    (entry,) = json.loads(fingerprint([table], "<old-king>"))
    assert list(entry["words"]) == ["old</w>", "king</w>", "a</w>", "photo</w>", "person</w>", "the</w>"]
    return json.dumps(entry["words"])


def test_the_same_words_say_nothing(about, tokenizer, encoders, capsys):
    assert said(about, tokenizer, encoders, capsys) == ([], "")
    assert said(about, tokenizer, [encoder.half() for encoder in encoders], capsys) == ([], "")


def test_words_that_have_hardly_moved_are_one_notice_with_the_cosine(about, tokenizer, encoders, capsys):
    tuned = [moved(encoder, 0.1) for encoder in encoders]
    found, printed = said(about, tokenizer, tuned, capsys)
    assert found == []
    assert printed.count("\n") == 1
    assert "'a.safetensors' was learned on 'owner/base'" in printed
    assert 0.98 < float(printed.split("cosine ")[1].split()[0]) < 1


def test_other_words_are_a_warning_with_the_cosine_and_the_way_out(about, tokenizer, encoders, capsys):
    others = [tiny_text_encoder(len(tokenizer), width) for width in WIDTHS]
    for other in others:
        table_of(other).copy_(torch.randn(table_of(other).shape, generator=torch.Generator().manual_seed(7)))
    (line,), printed = said(about, tokenizer, others, capsys)
    assert printed == ""
    assert "\n" not in line
    assert "set check_vocabulary to false" in line
    assert abs(float(line.split("that matter is ")[1].split()[0])) < 0.3


def test_every_encoder_counts(about, tokenizer, encoders, capsys):
    (line,), _ = said(about, tokenizer, [encoders[0], moved(encoders[1], 2.0)], capsys)
    assert "in clip_g" in line


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0, 2.0])
def test_the_sketches_cosine_is_the_rows(about, tokenizer, encoders, share):
    """Within the error that 64 projections have, averaged over words."""
    other = moved(encoders[0], share)
    units = json.loads(about[VOCABULARY])[0]["words"]
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(units)))
    expected = torch.cosine_similarity(table_of(encoders[0])[ids], table_of(other)[ids]).mean()
    here, there = (WordTable("", tokenizer, encoder).sketches(units) for encoder in (encoders[0], other))
    pairs = [(torch.tensor(here[unit]).double(), torch.tensor(there[unit]).double()) for unit in units]
    found = torch.stack([torch.cosine_similarity(*pair, dim=0) for pair in pairs]).mean()
    assert abs(found - expected) < 0.1 * (1 - expected**2) + 0.005


def test_files_from_before_the_words(tokenizer, encoders, capsys):
    hash_ = tables_of(tokenizer, encoders)[0].hash
    assert said({"vocabulary_hash": hash_}, tokenizer, encoders, capsys) == ([], "")
    assert said({}, tokenizer, encoders, capsys) == ([], "")
    (line,), _ = said({"vocabulary_hash": "0" * 16}, tokenizer, encoders, capsys)
    assert "'another model', whose text encoder differs from this model's: nothing says how much" in line


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "[",
        "{}",
        '["x", "y"]',
        '[{"words": {"a</w>": "!"}}, {}]',
        '[{"words": [1]}, {"words": {"a</w>": 3}}]',
        "[" * 9999,
    ],
)
def test_foreign_entries_are_read_as_nothing(entry, tokenizer, encoders, capsys):
    found, printed = said({VOCABULARY: entry}, tokenizer, encoders, capsys)
    assert printed == ""
    assert len(found) <= 1


def test_many_files_are_one_line_and_none_when_not_asked(tmp_path, tokenizer, encoders):
    far = tables_of(tokenizer, [moved(encoders[0], 3.0)])
    (table,) = tables_of(tokenizer, encoders[:1])
    for name in ("x", "y", "z"):
        entries = {"base_model": "owner/base", VOCABULARY: fingerprint([table], f"<{name}>", [torch.ones(1, 64)])}
        save_embedding(tmp_path / f"{name}.safetensors", f"<{name}>", [torch.ones(1, 64)], entries)
    with pytest.warns(UserWarning, match="and 2 more were learned on 'owner/base'") as caught:
        load_bank(str(tmp_path), [64], far)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_bank(str(tmp_path), [64])
    with pytest.raises(UserError, match="width 64"):
        load_bank(str(tmp_path), [96], far)
