import pytest

from tests.tiny import tiny_classifier
from tests.training.caso_tasks import LABELS
from tokenlearn.models import StableDiffusion


@pytest.fixture(scope="session")
def backbone(tiny_models):
    """One backbone for all tasks: none of them changes it."""
    return StableDiffusion(str(tiny_models / "pipeline"))


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """Folders of two classifiers of attributes, one to guide and one to judge."""
    folder = tmp_path_factory.mktemp("faces")
    for name in ("guide", "judge"):
        tiny_classifier(folder / name, LABELS, multi_label=True)
    return folder
