"""Embeddings inside of LoRA files: ``bundle_emb.NAME.`` before the keys of the token ``<NAME>``."""

from __future__ import annotations

from pathlib import Path

from tokenlearn.tokens.files import a1111, encoder_keys, onetrainer
from tokenlearn.tokens.files.family import Found, wrapped

PREFIX = "bundle_emb."
_TRAINING = "string_to_param."


def find(keys: frozenset[str], source: Path) -> list[Found]:
    """See :class:`tokenlearn.tokens.files.family.Reader`; the weights of the LoRA stay unread."""
    inner: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        if key.startswith(PREFIX):
            name, _, rest = key.removeprefix(PREFIX).partition(f".{_TRAINING}")
            if rest:
                rest = a1111.KEY
            else:
                name, _, rest = name.rpartition(".")
            inner.setdefault(name, {})[rest] = key
    tokens = []
    for name, by_key in inner.items():
        for find_inner in (onetrainer.find, encoder_keys.find, a1111.find):
            if found := find_inner(frozenset(by_key), source):
                keys_of_file = tuple(by_key[key] for key in found[0].keys)
                ignored = tuple(by_key[key] for key in found[0].ignored)
                tokens.append(found[0]._replace(keys=keys_of_file, token=wrapped(name), ignored=ignored))
                break
    return tokens
