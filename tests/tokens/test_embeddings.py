from pathlib import Path

import pytest
import torch

from tokenlearn.errors import UserError
from tokenlearn.tokens.bank import TokenBank
from tokenlearn.tokens.embeddings import LearnedTokens, load_bank, load_embeddings
from tokenlearn.tokens.files import load_embedding, save_embedding


def test_bank_of_files(tmp_path: Path):
    first, second = torch.rand(1, 4), torch.rand(2, 4)
    paths = [
        str(save_embedding(tmp_path / "a.safetensors", "<a>", [first], {"vocabulary_hash": "one"})),
        str(save_embedding(tmp_path / "b.safetensors", "<b>", [second], {})),
    ]
    bank, files = load_bank(paths, [4])
    assert [file.token for file in files] == list(bank.placeholders) == ["<a>", "<b>"]
    torch.testing.assert_close(bank.vectors[0].detach(), torch.cat([first, second]))
    with pytest.raises(UserError, match=r"width 4.* 8"):
        load_bank(paths, [8])
    with pytest.raises(UserError, match=r"b\.safetensors.*'<b>'"):
        load_bank([*paths, paths[1]], [4])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of embedding files of three kinds among other files."""
    target = tmp_path / "embeddings"
    save_embedding(target / "b.safetensors", "<b>", [torch.ones(2, 4)], {})
    torch.save({"emb_params": torch.zeros(1, 4)}, target / "a.pt")
    torch.save({"<c>": torch.ones(1, 4)}, target / "c.bin")
    for other in ("preview.png", "notes.txt", "last.ckpt", "._b.safetensors"):
        (target / other).write_text("not an embedding")
    save_embedding(target / "deeper" / "d.safetensors", "<d>", [torch.ones(1, 4)], {})
    return target


def tokens(embeddings: str | list[str] | dict[str, str]) -> list[str]:
    return [file.token for file in load_embeddings(embeddings)]


def test_a_folder_means_the_embedding_files_directly_in_it(folder: Path):
    assert tokens(str(folder)) == ["<a>", "<b>", "<c>"]
    assert tokens([str(folder / "deeper"), str(folder)]) == ["<d>", "<a>", "<b>", "<c>"]
    assert tokens(str(folder / "b.safetensors")) == ["<b>"]
    assert [file.path for file in load_embeddings(str(folder))][1] == folder / "b.safetensors"
    bank, _ = load_bank(str(folder), [4])
    assert bank.num_vectors == {"<a>": 1, "<b>": 2, "<c>": 1}


def test_no_embeddings_are_none():
    assert tokens([]) == []
    assert tokens({}) == []


def test_a_token_to_a_file_renames_it(folder: Path):
    bank, files = load_bank({"<one>": str(folder / "b.safetensors"), "<two>": str(folder / "b.safetensors")}, [4])
    assert bank.placeholders == ("<one>", "<two>")
    assert torch.equal(bank.get("<two>")[0], torch.ones(2, 4))
    assert [file.token for file in files] == ["<one>", "<two>"]


def test_a_folder_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert tokens("~/embeddings") == ["<a>", "<b>", "<c>"]
    assert tokens("~/embeddings/b.safetensors") == ["<b>"]


def test_a_folder_without_embeddings_and_a_missing_one_are_named(tmp_path: Path, folder: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "preview.png").touch()
    for embeddings, message in (
        (str(tmp_path / "empty"), r"'.*empty'.*\.safetensors"),
        (str(tmp_path / "missing"), r"'.*missing'"),
        ({"<a>": str(folder)}, r"'.*embeddings'"),
        ([str(folder), str(folder / "deeper"), str(folder / "deeper" / "d.safetensors")], r"d\.safetensors.*'<d>'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_embeddings(embeddings)
        assert "\n" not in str(caught.value)


def test_learned_tokens_are_saved_with_what_is_known_of_them(tmp_path: Path):
    bank = TokenBank({"<My-Style>": 2, "<b>": 1}, [4])
    bank.set("<My-Style>", [torch.rand(2, 4)])
    learned = LearnedTokens(bank, {"<My-Style>": {"base_model": "tiny"}})
    assert learned.placeholders == ("<My-Style>", "<b>")
    paths = learned.save(tmp_path / "new")
    assert paths == [tmp_path / "new" / "my-style-tl.safetensors", tmp_path / "new" / "b-tl.safetensors"]
    loaded = load_embedding(paths[0])
    assert (loaded.token, loaded.metadata["base_model"]) == ("<My-Style>", "tiny")
    assert torch.equal(loaded.vectors[0], bank.get("<My-Style>")[0])
    (stronger, _) = learned.save(tmp_path / "onetrainer", "onetrainer", scale=2)
    assert torch.equal(load_embedding(stronger).vectors[0], 2 * bank.get("<My-Style>")[0])


def test_tokens_of_one_file_name_are_not_saved_over_each_other(tmp_path: Path):
    with pytest.raises(UserError, match=r"'<c\+\+>' and '<c#>' both .*'c-tl\.safetensors'"):
        LearnedTokens(TokenBank({"<c++>": 1, "<c#>": 1}, [4])).save(tmp_path)
    assert list(tmp_path.iterdir()) == []
