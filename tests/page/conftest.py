import pytest
import torch

import tokenlearn as tl
from tokenlearn.models import TimmClassifier
from tokenlearn.page.studio import Studio
from tokenlearn.tokens import save_embedding
from tokenlearn.tokens.calibration import CALIBRATION, Calibration

EVEN = Calibration((-4.0, 0.0, 2.1), (-1.0, 0.0, 0.63), 0.5)


@pytest.fixture(scope="session")
def token_files(tmp_path_factory):
    """A token of two vectors, and one with a calibration."""
    folder = tmp_path_factory.mktemp("tokens")
    generator = torch.Generator().manual_seed(0)
    save_embedding(folder / "hat-tl.safetensors", "<hat>", [torch.randn(2, 16, generator=generator)], {})
    about = {CALIBRATION: EVEN.to_json()}
    save_embedding(folder / "smile-tl.safetensors", "<smile>", [torch.randn(1, 16, generator=generator)], about)
    return folder


@pytest.fixture(scope="session")
def studio(tiny_models, token_files):
    pipeline = tl.Pipeline.from_pretrained(str(tiny_models / "pipeline"))
    judge = TimmClassifier(str(tiny_models / "judge"))
    return Studio(pipeline, embeddings=str(token_files), judge=judge, preview_interval=0)
