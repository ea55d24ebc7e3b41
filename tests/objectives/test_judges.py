import pytest
import torch

from tests.tiny import tiny_classifier
from tokenlearn.errors import UserError
from tokenlearn.objectives import ClassifierLoss, SymmetryLoss, is_same_model, require_judge_differs
from tokenlearn.paths import bundled_root


def test_same_model_in_any_spelling(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_same_model("resnet18.a1_in1k", "resnet18.a1_in1k")
    assert is_same_model("one", str(tmp_path / "two" / ".." / "one"))
    assert not is_same_model("one", "two")
    assert not is_same_model("resnet18", "one")
    assert is_same_model("checkpoints/persona_guide", str(bundled_root() / "checkpoints" / "persona_guide"))


def test_a_judge_must_not_guide(tmp_path):
    folders = [str(tiny_classifier(tmp_path / name, ["cat", "dog"])) for name in ("guide", "judge")]
    guide, judge = (ClassifierLoss(folder, "cat") for folder in folders)
    require_judge_differs(judge, guide)
    require_judge_differs(judge, guide + SymmetryLoss())
    require_judge_differs(SymmetryLoss(), SymmetryLoss())
    again = ClassifierLoss(f"{tmp_path}/./guide", "dog")
    for one, other in ((again, guide), (again, 8 * (SymmetryLoss() + guide)), (judge + guide, guide)):
        with pytest.raises(UserError, match="guide'"):
            require_judge_differs(one, other)


def test_a_sum_names_all_its_models(tmp_path):
    guide = ClassifierLoss(str(tiny_classifier(tmp_path, ["cat", "dog"])), "cat")
    assert list((SymmetryLoss() + 2 * guide + guide).models()) == [str(tmp_path)] * 2
    assert torch.equal((guide + guide).score(torch.zeros(1, 3, 16, 16)), guide.score(torch.zeros(1, 3, 16, 16)))
