import pytest
import torch
from PIL import Image

from tests.tiny import tiny_classifier
from tests.tiny_clip import tiny_aesthetic_head, tiny_clip
from tokenlearn.errors import UserError
from tokenlearn.models.aesthetic import AestheticHead
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.models.clip import ClipModel
from tokenlearn.objectives import AestheticLoss, ClassifierLoss, CLIPImageLoss, CLIPTextLoss, SymmetryLoss


@pytest.fixture
def images():
    return torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_one_class_or_all_of_several_labels(tmp_path, images):
    one = str(tiny_classifier(tmp_path / "one", ["cat", "dog"]))
    logits = TimmClassifier(one)(images)
    judge = ClassifierLoss(one, "dog")
    assert judge.score_kind == "share"
    assert judge.score(images).tolist() == logits.argmax(dim=1).float().tolist()
    assert ClassifierLoss(one).score(images, ["dog"] * 16).tolist() == judge.score(images).tolist()
    assert torch.equal(judge.confidence(images), logits.softmax(dim=1)[:, 1])
    several = str(tiny_classifier(tmp_path / "several", ["hat", "beard", "smile"], multi_label=True))
    logits = TimmClassifier(several)(images)
    expected = (logits[:, 0] > 0) & (logits[:, 2] > 0)
    judge = ClassifierLoss(several, ["hat", "smile"])
    assert judge.score(images).tolist() == expected.float().tolist()
    assert torch.equal(judge.confidence(images), logits[:, [0, 2]].sigmoid().amin(dim=1))
    torch.testing.assert_close(judge.loss(images), -logits[:, [0, 2]].sigmoid().prod(dim=1).log())


def test_clips_score_cosines(tmp_path, images):
    folder = str(tiny_clip(tmp_path / "clip"))
    model = ClipModel(folder)
    cosines = model.image_features(images) @ model.text_features(["a king"])[0]
    judge = CLIPTextLoss(folder, "a king")
    assert judge.score_kind == "similarity"
    torch.testing.assert_close(judge.score(images), cosines)
    assert torch.equal(judge.confidence(images), judge.score(images))
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    found = CLIPImageLoss(folder, [str(tmp_path / "red.png")]).score(images)
    assert found.shape == (16,)
    assert (found <= 1).all()


def test_an_aesthetic_head_scores_whatever_the_target(tmp_path, images):
    clip = str(tiny_clip(tmp_path / "clip"))
    head = str(tiny_aesthetic_head(tmp_path / "head", clip))
    for target in (None, 3.0):
        judge = AestheticLoss(head, target=target)
        assert judge.score_kind == "score"
        assert torch.equal(judge.score(images), AestheticHead(head)(images))


def test_score_is_minus_the_loss_by_default(images):
    assert torch.equal(SymmetryLoss(weight=3).score(images), -SymmetryLoss().loss(images))


@pytest.mark.parametrize(
    ("labels", "message"),
    [([], "labels of ClassifierLoss"), (["cow"], "cow"), (["cat", "dog"], "cat, dog")],
)
def test_labels_without_a_score_are_refused(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        ClassifierLoss(str(tiny_classifier(tmp_path / "one", ["cat", "dog"])), labels)
