import math

import pytest
import torch
from PIL import Image
from torch.nn import functional

from tests.tiny import tiny_classifier
from tests.tiny_clip import tiny_aesthetic_head, tiny_clip
from tokenlearn.errors import UserError
from tokenlearn.losses.objective import Crops
from tokenlearn.models.aesthetic import AestheticHead
from tokenlearn.models.classifier import TimmClassifier
from tokenlearn.models.clip import ClipModel
from tokenlearn.objectives import AestheticLoss, ClassifierLoss, CLIPImageLoss, CLIPTextLoss, SymmetryLoss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP and aesthetic head, and two images."""
    folder = tmp_path_factory.mktemp("objectives")
    tiny_clip(folder / "clip")
    tiny_aesthetic_head(folder / "head", "../clip")
    Image.new("RGB", (24, 20), (250, 20, 30)).save(folder / "red.png")
    Image.new("L", (16, 18), 40).save(folder / "grey.png")
    return folder


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def objectives(folder, tiny_models):
    clip = str(folder / "clip")
    return {
        "class": ClassifierLoss(str(tiny_models / "guide"), "pirate"),
        "class mean": ClassifierLoss(str(tiny_models / "guide"), "pirate", form="class_mean"),
        "text": CLIPTextLoss(clip, "a king"),
        "images": CLIPImageLoss(clip, [str(folder / "red.png"), str(folder / "grey.png")]),
        "aesthetic": AestheticLoss(str(folder / "head")),
        "target": AestheticLoss(str(folder / "head"), target=3.0),
        "symmetry": SymmetryLoss(),
    }


def test_each_has_a_loss_per_image_and_a_gradient(folder, tiny_models, images):
    for name, objective in objectives(folder, tiny_models).items():
        objective.train()  # frozen means frozen
        assert not any(module.training for module in objective.modules())
        assert not any(parameter.requires_grad for parameter in objective.parameters())
        leaf = images.clone().requires_grad_()
        losses = objective(leaf)
        assert losses.shape == (3,)
        one_by_one = torch.cat([objective(image[None]) for image in images])
        torch.testing.assert_close(losses.detach(), one_by_one, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(losses[1], leaf)
        assert gradient[1].abs().max() > 0, name
        assert not gradient[[0, 2]].any()


def test_losses_come_from_the_models(folder, tiny_models, images):
    made = objectives(folder, tiny_models)
    classifier = TimmClassifier(str(tiny_models / "guide"))
    torch.testing.assert_close(made["class"](images), -classifier(images).log_softmax(dim=1)[:, 2])
    clip = made["text"].clip
    features = clip.image_features(images)
    angles = (features @ clip.text_features(["a king"])[0]).acos()
    torch.testing.assert_close(made["text"](images), angles.square() / 2, rtol=1e-3, atol=1e-4)
    examples = [
        torch.tensor([250, 20, 30]).reshape(1, 3, 1, 1).expand(1, 3, 20, 24) / 255,
        torch.full((1, 3, 18, 16), 40 / 255),
    ]
    target = functional.normalize(sum(clip.image_features(example)[0] for example in examples), dim=0)
    torch.testing.assert_close(made["images"](images), (features @ target).acos().square() / 2, rtol=1e-3, atol=1e-4)
    scores = made["aesthetic"].head(images)
    torch.testing.assert_close(made["aesthetic"](images), -scores)
    torch.testing.assert_close(made["target"](images), (scores - 3.0).abs())
    mirrored = torch.cat([images, images.flip(-1)], dim=-1)
    assert SymmetryLoss()(mirrored).max() < 1e-12


@pytest.mark.parametrize("crops", [None, Crops(3, 0.5)])
def test_loss_and_score_are_those_of_forward_and_score(folder, tiny_models, images, crops):
    for name, objective in objectives(folder, tiny_models).items():
        objective.weight, objective.crops = 2.5, crops
        leaf = images.clone().requires_grad_()
        losses, scores = objective.loss_and_score(leaf, step=3)
        assert torch.equal(losses, objective(leaf, 3)), name
        assert torch.equal(scores, objective.score(images)), name
        assert losses.requires_grad
        assert not scores.requires_grad


def test_class_mean_is_the_cosine_from_the_centred_row_of_the_head(tiny_models, images):
    objective = ClassifierLoss(str(tiny_models / "guide"), form="class_mean")
    classifier, names = objective.classifier, ["wizard", "ordinary person", "pirate"]
    features, rows = classifier.features(images), classifier.head_weight
    for number, name in enumerate(names):
        direction = rows[classifier.label_index(name)] - sum(rows) / len(rows)
        cosine = features[number] @ direction / (features[number].norm() * direction.norm())
        torch.testing.assert_close(objective(images, targets=names)[number], 1 - cosine)
    each = torch.stack([objective.loss(images, [name] * 3) for name in names], dim=1)
    torch.testing.assert_close(objective.losses(images, names), each)
    assert torch.equal(objective.score(images, names), ClassifierLoss(classifier).score(images, names))


def test_class_mean_of_independent_labels_does_not_depend_on_the_other_labels(tmp_path, images):
    several = str(tiny_classifier(tmp_path / "several", ["hat", "smile", "glasses"], multi_label=True))
    objective = ClassifierLoss(several, ["smile", "glasses"], form="class_mean")
    classifier = objective.classifier
    features = classifier.features(images)
    expected = sum(
        1 - functional.cosine_similarity(features, classifier.head_weight[classifier.label_index(name)][None])
        for name in ("smile", "glasses")
    )
    torch.testing.assert_close(objective(images), expected)


def test_class_mean_has_a_gradient_where_the_classifier_is_certain(tiny_models, images):
    classifier = TimmClassifier(str(tiny_models / "guide"))
    classifier.model.get_classifier().weight.data *= 1e6
    names = [classifier.label_names[index] for index in classifier(images).argmax(dim=1)]
    gradients = {}
    for form in ("cross_entropy", "class_mean"):
        leaf = images.clone().requires_grad_()
        ClassifierLoss(classifier, form=form)(leaf, targets=names).sum().backward()
        gradients[form] = leaf.grad.abs().max()
    assert gradients["cross_entropy"] == 0
    assert gradients["class_mean"] > 0


@pytest.mark.parametrize("form", ["cross_entropy", "class_mean"])
def test_loss_and_score_evaluate_the_classifier_once(tiny_models, images, form):
    objective = ClassifierLoss(str(tiny_models / "guide"), form=form)
    calls = []
    objective.classifier.model.conv1.register_forward_hook(lambda *_: calls.append(1))
    objective.loss_and_score(images, ["pirate", "wizard", "pirate"])
    objective.losses(images, ["pirate", "wizard"])
    assert len(calls) == 2


def test_models_can_be_shared(folder, tiny_models, images):
    classifier = TimmClassifier(str(tiny_models / "guide"))
    pirate, wizard = (ClassifierLoss(classifier, label) for label in ("pirate", "wizard"))
    assert pirate.classifier is wizard.classifier
    assert list(pirate.models()) == [str(tiny_models / "guide")]
    clip, head = ClipModel(str(folder / "clip")), AestheticHead(str(folder / "head"))
    assert CLIPTextLoss(clip, "a king").clip is CLIPImageLoss(clip, [str(folder / "red.png")]).clip
    assert torch.equal(AestheticLoss(head)(images), AestheticLoss(str(folder / "head"))(images))


def test_bad_settings(folder, tiny_models, tmp_path):
    guide, clip = str(tiny_models / "guide"), str(folder / "clip")
    (tmp_path / "broken.png").write_text("not an image")
    for make, words in (
        (lambda: ClassifierLoss(guide, "pirat"), "'pirat'.*'pirate'"),
        (lambda: ClassifierLoss(str(tmp_path / "no" / "such"), "pirate"), "no/such"),
        (lambda: ClassifierLoss(guide, form="class_means"), "form of ClassifierLoss.*class_mean, got 'class_means'"),
        (lambda: CLIPTextLoss(clip, " "), "text of CLIPTextLoss"),
        (lambda: CLIPImageLoss(clip, []), "images of CLIPImageLoss"),
        (lambda: CLIPImageLoss(clip, [str(tmp_path / "broken.png")]), "broken.png' of CLIPImageLoss"),
        (lambda: CLIPImageLoss(clip, [str(tmp_path / "none.png")]), "none.png' of CLIPImageLoss"),
        (lambda: AestheticLoss(str(folder / "head"), target=math.nan), "target of AestheticLoss.*nan"),
        (lambda: SymmetryLoss(weight=math.inf), "weight of SymmetryLoss.*inf"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            make()
        assert "\n" not in str(raised.value)


def test_targets_by_name(folder, tiny_models, images):
    objective, names = ClassifierLoss(str(tiny_models / "guide")), ["wizard", "ordinary person", "pirate"]
    logits = objective.classifier(images)
    assert torch.equal(
        objective.loss(images, names), functional.cross_entropy(logits, torch.tensor([1, 0, 2]), reduction="none")
    )
    each = torch.stack([objective.loss(images, [name] * 3) for name in names], dim=1)
    torch.testing.assert_close(objective.losses(images, names), each)
    fixed = ClassifierLoss(objective.classifier, "pirate")
    assert torch.equal(fixed.loss(images, names), fixed.loss(images))
    assert torch.equal(fixed.losses(images, names), fixed.loss(images)[:, None].expand(3, 3))

    text = CLIPTextLoss(str(folder / "clip"), "a portrait of a {}")
    fixed_texts = [CLIPTextLoss(text.clip, f"a portrait of a {name}") for name in names]
    expected = torch.stack([fixed(images) for fixed in fixed_texts], dim=1)
    torch.testing.assert_close(text(images, 0, names), expected.diagonal())
    torch.testing.assert_close(text.losses(images, names), expected)
    torch.testing.assert_close(
        text.score(images, names), torch.stack([fixed.score(images) for fixed in fixed_texts], dim=1).diagonal()
    )
    torch.testing.assert_close(
        CLIPTextLoss(text.clip)(images, 0, ["a king"] * 3), CLIPTextLoss(text.clip, "a king")(images)
    )


def test_each_target_may_have_its_text(folder, images):
    described = {"king": "a person with a crown", "nurse": "a person with a cap"}
    text = CLIPTextLoss(str(folder / "clip"), described)
    names = ["nurse", "king", "nurse"]
    expected = [CLIPTextLoss(text.clip, described[name])(images[row, None]) for row, name in enumerate(names)]
    torch.testing.assert_close(text(images[:3], 0, names), torch.cat(expected))
    with pytest.raises(UserError, match=r"'wizard'.*king, nurse"):
        text.check(["king", "wizard"])


def test_directions_of_targets_from_inference_mode_serve_gradients(folder, images):
    objective = CLIPTextLoss(str(folder / "clip"))
    with torch.inference_mode():
        objective.score(images, ["a king"] * 3)
    leaf = images.clone().requires_grad_()
    objective(leaf, 0, ["a king"] * 3).sum().backward()
    assert leaf.grad is not None


def test_unknown_and_missing_targets_are_refused(folder, tiny_models, images):
    classifier, text = ClassifierLoss(str(tiny_models / "guide")), CLIPTextLoss(str(folder / "clip"), "a {}")
    classifier.check(["pirate"])
    text.check(["pirat"])
    for objective in (classifier, text, classifier + text):
        with pytest.raises(UserError, match=r"ClassifierLoss|CLIPTextLoss"):
            objective.check(None)
    for objective in (classifier, text):
        with pytest.raises(UserError):
            objective(images)
    with pytest.raises(UserError, match="'pirat'"):
        (text + classifier).check(["pirat"])
    ClassifierLoss(classifier.classifier, "pirate").check(None)
    SymmetryLoss().check(None)
