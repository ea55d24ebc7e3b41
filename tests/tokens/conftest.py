from pathlib import Path

import pytest
from transformers import CLIPTextModel, CLIPTokenizer

from tests.tiny import tiny_text_encoder, tiny_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> CLIPTokenizer:
    return tiny_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return tiny_text_encoder(len(tokenizer)).requires_grad_(False)
