"""Tokens pushed to and loaded from a local stand-in of the Hub, by the real client over HTTP."""

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard

import tokenlearn as tl
from tests.hub_stand_in import READ, WRITE, running_hub
from tokenlearn.errors import UserError
from tokenlearn.tokens import LearnedTokens, TokenBank
from tokenlearn.tokens.files import save_embedding

REPO = "me/personas"


@pytest.fixture(autouse=True)
def _local_network_alone(monkeypatch, tmp_path, _no_network):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.utils.disable_progress_bars()


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def tokens():
    bank = TokenBank({"<pirate>": 2, "<queen>": 1}, [768])
    with torch.no_grad():
        bank.vectors[0].normal_(generator=torch.Generator().manual_seed(0))
    common = {"base_model": "owner/base", "judge": "owner/judge"}
    return LearnedTokens(
        bank,
        {
            "<pirate>": common | {"class": "pirate", "prompt": "<pirate> pirate", "judged_accuracy": "0.9375"},
            "<queen>": common | {"class": "queen | king", "prompt": "<queen>"},
        },
    )


def test_what_is_pushed_is_what_is_loaded(hub, tokens, tmp_path):
    address = tokens.push_to_hub(REPO, token=WRITE, private=True, commit_message="two", endpoint=hub.address)
    assert address == f"{hub.address}/{REPO}"
    assert hub.private == {REPO: True}
    assert hub.commits == ["two"]
    stored = hub.repositories[REPO]
    assert stored.keys() == {
        *(f"{name}-tl{suffix}" for name in ("pirate", "queen") for suffix in (".safetensors", ".json")),
        "README.md",
    }
    stored["notes.txt"] = stored["deeper/x.safetensors"] = b"something else"
    loaded = tl.load_tokens(REPO, endpoint=hub.address)
    assert sorted(hub.downloads) == ["pirate-tl.safetensors", "queen-tl.safetensors"]  # and nothing else
    assert loaded.placeholders == tokens.placeholders
    for token in tokens.placeholders:
        assert torch.equal(loaded.bank.get(token)[0], tokens.bank.get(token)[0])
        assert loaded.metadata[token].items() >= tokens.metadata[token].items()
    tokens.save(tmp_path / "local")
    assert (tmp_path / "local" / "pirate-tl.safetensors").read_bytes() == stored["pirate-tl.safetensors"]
    assert tl.load_tokens(str(tmp_path / "local")).placeholders == tokens.placeholders


def test_the_card_says_what_to_type_and_what_was_judged(hub, tokens):
    tokens.push_to_hub(REPO, token=WRITE, license="mit", endpoint=hub.address)
    card = ModelCard(hub.repositories[REPO]["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.library_name) == (["owner/base"], "mit", "diffusers")
    assert {"textual_inversion", "tokenlearn"} <= set(card.data.tags)
    for line in (
        "| `pirate-tl.safetensors` | `<pirate> pirate` |",
        "`embedding:pirate-tl pirate`",
        "| `<pirate>` | pirate | 0.9375 | owner/judge |",
        r"| `<queen>` | queen \| king | - | owner/judge |",
        f'tl.load_tokens("{REPO}")',
        f'pipe.load_textual_inversion("{REPO}", weight_name="pirate-tl.safetensors", token="<pirate>")',
    ):
        assert line in card.text, card.text


def test_a_later_push_replaces_its_own_card_and_no_other(hub, tokens, capsys):
    tokens.push_to_hub(REPO, token=WRITE, license="mit", endpoint=hub.address)
    first = hub.repositories[REPO]["README.md"]
    tokens.metadata["<queen>"]["judged_accuracy"] = "0.5000"
    tokens.push_to_hub(REPO, token=WRITE, endpoint=hub.address)
    second = hub.repositories[REPO]["README.md"]
    assert b"0.5000" in second
    assert b"0.5000" not in first
    assert b"license: mit" in second  # as chosen before
    hub.repositories[REPO]["README.md"] = b"my own words"
    tokens.push_to_hub(REPO, token=WRITE, endpoint=hub.address)
    assert hub.repositories[REPO]["README.md"] == b"my own words"
    assert "was not written by tokenlearn and is left" in capsys.readouterr().err


def test_a_repository_without_its_owner_is_the_users_own(hub, tokens):
    assert tokens.push_to_hub("mine", token=WRITE, endpoint=hub.address) == f"{hub.address}/me/mine"
    assert "README.md" in hub.repositories["me/mine"]


def test_repositories_of_others(hub, tmp_path):
    """One token in two forms, a whole model beside it, and a pickle of the early days."""
    vectors = torch.ones(1, 768)
    path = save_embedding(tmp_path / "cat.safetensors", "<cat>", [vectors], {})
    torch.save({"<dog>": vectors}, tmp_path / "learned_embeds.bin")
    hub.repositories["else/pets"] = {
        "cat.safetensors": path.read_bytes(),
        "cat.bin": b"not read",
        "learned_embeds.bin": (tmp_path / "learned_embeds.bin").read_bytes(),
    }
    assert tl.load_tokens("else/pets", endpoint=hub.address).placeholders == ("<cat>", "<dog>")
    assert "cat.bin" not in hub.downloads


def test_offline_uses_the_cache(hub, tokens, monkeypatch):
    tokens.push_to_hub(REPO, token=WRITE, endpoint=hub.address)
    tl.load_tokens(REPO, endpoint=hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.downloads.clear()
    assert tl.load_tokens(REPO, endpoint=hub.address).placeholders == tokens.placeholders
    assert hub.downloads == []
    with pytest.raises(UserError, match=r"'me/other' is not in the cache and .* cannot be reached"):
        tl.load_tokens("me/other", endpoint=hub.address)


def test_nobody_answers(tokens, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    with running_hub() as hub:
        address = hub.address
    for call in (lambda: tl.load_tokens(REPO, endpoint=address), lambda: tokens.push_to_hub(REPO, endpoint=address)):
        with pytest.raises(UserError, match=r"cannot be reached.*check the connection") as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("access", "message"),
    [
        (None, r"wants an access token; log in by 'hf auth login', set HF_TOKEN, or pass token="),
        (READ, r"may not write to 'me/personas'; use one with write access to me"),
    ],
)
def test_refused_pushes_are_one_line(hub, tokens, access, message):
    with pytest.raises(UserError, match=message) as raised:
        tokens.push_to_hub(REPO, token=access, endpoint=hub.address)
    assert "\n" not in str(raised.value)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("repo", "settings", "message"),
    [
        ("me/missing", {}, "no repository 'me/missing' at .*, or it is private"),
        ("me/empty", {}, r"'me/empty' has no embedding files \(.safetensors, .pt, .bin\) at its top"),
        ("me/empty", {"revision": "v9"}, "'me/empty' has no such revision"),
        ("a..b/c--d", {}, "is no id of a repository"),
        ("nowhere", {}, "no folder or file 'nowhere', and it is no id of a repository, such as owner/name"),
        ("me/mixed", {}, r"b.safetensors' is for text encoders of widths \[1024\], '.*a.safetensors' of \[768\]"),
    ],
)
def test_wrong_repositories_are_one_line(hub, tmp_path, repo, settings, message):
    hub.repositories["me/empty"] = {"README.md": b""}
    parts = {name: torch.ones(1, width) for name, width in (("a", 768), ("b", 1024))}
    hub.repositories["me/mixed"] = {
        f"{name}.safetensors": save_embedding(tmp_path / f"{name}.safetensors", f"<{name}>", [part], {}).read_bytes()
        for name, part in parts.items()
    }
    with pytest.raises(UserError, match=message) as raised:
        tl.load_tokens(repo, endpoint=hub.address, **settings)
    assert "\n" not in str(raised.value)
