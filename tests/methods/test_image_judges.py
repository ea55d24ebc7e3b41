import pytest
import torch
from PIL import Image

from tests.tiny import tiny_classifier
from tests.tiny_clip import tiny_aesthetic_head, tiny_clip
from tokenlearn.errors import UserError
from tokenlearn.methods.image_judges import AestheticJudge, ClassJudge, ClipImageJudge, ClipTextJudge
from tokenlearn.models import TimmClassifier
from tokenlearn.models.aesthetic import AestheticHead
from tokenlearn.models.clip import ClipModel


@pytest.fixture
def images():
    return torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_one_class_or_all_of_several_labels(tmp_path, images):
    one = str(tiny_classifier(tmp_path / "one", ["cat", "dog"]))
    seen = TimmClassifier(one)(images).argmax(dim=1)
    assert ClassJudge(one, ["dog"])(images).tolist() == seen.float().tolist()
    several = str(tiny_classifier(tmp_path / "several", ["hat", "beard", "smile"], multi_label=True))
    logits = TimmClassifier(several)(images)
    expected = (logits[:, 0] > 0) & (logits[:, 2] > 0)
    assert ClassJudge(several, ["hat", "smile"])(images).tolist() == expected.float().tolist()


def test_clip_judges_give_cosines(tmp_path, images):
    folder = str(tiny_clip(tmp_path / "clip"))
    model = ClipModel(folder)
    cosines = model.image_features(images) @ model.text_features(["a king"])[0]
    torch.testing.assert_close(ClipTextJudge(folder, "a king")(images), cosines)
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    found = ClipImageJudge(folder, [str(tmp_path / "red.png")])(images)
    assert found.shape == (16,)
    assert (found <= 1).all()


def test_an_aesthetic_judge_gives_the_score(tmp_path, images):
    clip = str(tiny_clip(tmp_path / "clip"))
    head = str(tiny_aesthetic_head(tmp_path / "head", clip))
    assert torch.equal(AestheticJudge(head)(images), AestheticHead(head)(images))


@pytest.mark.parametrize(
    ("labels", "message"),
    [([], "labels of ClassJudge is empty"), (["cow"], "cow"), (["cat", "dog"], "one class, not cat, dog; name one")],
)
def test_what_cannot_be_judged_is_refused(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        ClassJudge(str(tiny_classifier(tmp_path / "one", ["cat", "dog"])), labels)
