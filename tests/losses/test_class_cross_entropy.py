import torch
from torch.nn import functional

from tokenlearn.losses import class_cross_entropy


def test_single_label_is_negative_log_softmax_per_sample():
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, -1.0]])
    expected = [torch.log(torch.tensor(3.0)), -logits[1].softmax(0)[2].log()]
    torch.testing.assert_close(class_cross_entropy(logits, torch.tensor([0, 2])), torch.stack(expected))


def test_multi_label_depends_on_the_target_class_only():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 4, 2, 2])
    losses = class_cross_entropy(logits, targets, multi_label=True)
    target_logits = logits[torch.arange(4), targets]
    torch.testing.assert_close(
        losses, functional.binary_cross_entropy_with_logits(target_logits, torch.ones(4), reduction="none")
    )
    losses.sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, functional.one_hot(targets, 5).bool())


def test_gradient_does_not_vanish_where_the_classifier_is_confidently_wrong():
    for multi_label in (False, True):
        logits = torch.tensor([[-60.0, 60.0]], requires_grad=True)
        class_cross_entropy(logits, torch.tensor([0]), multi_label).sum().backward()
        assert logits.grad is not None
        assert logits.grad[0, 0] < -0.99
