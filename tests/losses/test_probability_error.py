import torch

from tokenlearn.losses import attribute_logits, probability_error


def test_binary_attribute_is_the_released_loss():
    logit = torch.linspace(-4, 4, 9)
    logits = attribute_logits(logit[:, None], [(0, True), (0, False)], multi_label=True)
    for target, probability in ((0, 1), (1, 0)):
        losses = probability_error(logits, torch.full((9,), target))
        torch.testing.assert_close(losses, (probability - logit.sigmoid()) ** 2)


def test_several_classes_use_the_softmax():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, 3, 0])
    expected = (1 - logits.softmax(1)[torch.arange(6), targets]) ** 2
    torch.testing.assert_close(probability_error(logits, targets), expected)


def test_gradient_vanishes_where_the_classifier_is_confidently_wrong():
    logits = torch.tensor([[-20.0, 20.0]], requires_grad=True)
    probability_error(logits, torch.tensor([0])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-10
