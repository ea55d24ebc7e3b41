import torch
from torch import nn

from tokenlearn.models.frozen import FrozenModule, freeze


class FrozenNet(FrozenModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        freeze(self)

    def forward(self, x):
        return self.layers(x)


def test_training_a_parent_changes_nothing_inside():
    frozen = FrozenNet()
    parent = nn.ModuleDict({"frozen": frozen, "learned": nn.Linear(3, 3)}).train()
    assert parent["learned"].training
    assert not any(module.training for module in frozen.modules())
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    first, second = frozen(inputs := torch.randn(8, 3)), frozen(inputs)
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())


def test_gradient_flows_through_to_inputs_only():
    frozen = FrozenNet()
    inputs = torch.randn(8, 3, requires_grad=True)
    frozen(inputs).square().sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen.parameters())
