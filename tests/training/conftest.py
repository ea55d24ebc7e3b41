import pytest

from tokenlearn.models import StableDiffusion


@pytest.fixture(scope="session")
def backbone(tiny_models):
    """One backbone for all tasks: none of them changes it."""
    return StableDiffusion(str(tiny_models / "pipeline"))
