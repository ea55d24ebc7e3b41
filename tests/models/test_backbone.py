import pytest
import torch

from tokenlearn.models.backbones.base import pool_at_end_of_text
from tokenlearn.models.backbones.conditioning import Conditioning


def conditioning(rows, start=0.0, **extra):
    values = start + torch.arange(rows, dtype=torch.float32)
    return Conditioning(values[:, None, None].repeat(1, 3, 2), values[:, None].repeat(1, 2), extra)


def test_cat_then_index_gives_the_parts_back():
    first = conditioning(2, size=torch.ones(2, 4))
    second = conditioning(3, 10.0, size=torch.zeros(3, 4))
    both = Conditioning.cat([first, second])
    assert len(both) == 5
    for rows, part in ((slice(0, 2), first), (torch.tensor([2, 3, 4]), second)):
        chosen = both[rows]
        assert torch.equal(chosen.prompt_embeds, part.prompt_embeds)
        assert torch.equal(chosen.pooled_prompt_embeds, part.pooled_prompt_embeds)
        assert torch.equal(chosen.extra["size"], part.extra["size"])


def test_expand_shares_one_row():
    one = conditioning(1, 5.0)
    assert one.expand(4).prompt_embeds.shape == (4, 3, 2)
    assert one.expand(4).prompt_embeds.data_ptr() == one.prompt_embeds.data_ptr()
    with pytest.raises(ValueError, match="2 rows to 4"):
        conditioning(2).expand(4)


def test_requires_grad_looks_at_every_part():
    plain = conditioning(1)
    assert not plain.requires_grad
    for learned in (
        Conditioning(plain.prompt_embeds.clone().requires_grad_()),
        Conditioning(plain.prompt_embeds, torch.ones(1, 2, requires_grad=True)),
        Conditioning(plain.prompt_embeds, None, {"size": torch.ones(1, 2, requires_grad=True)}),
    ):
        assert learned.requires_grad


@pytest.mark.parametrize("other", [Conditioning(torch.ones(1, 3, 2)), conditioning(1, size=torch.ones(1, 4))])
def test_cat_refuses_different_parts(other):
    with pytest.raises(ValueError, match="different parts"):
        Conditioning.cat([conditioning(1), other])


def test_pooling_takes_the_first_end_of_text_of_each_row():
    end = 9
    ids = torch.tensor([[8, 1, 12, end, end], [8, 2, end, 0, 0]])  # 12: a placeholder, larger than the end
    states = torch.arange(10.0).reshape(2, 5, 1)
    assert pool_at_end_of_text(states, ids, end).tolist() == [[3.0], [7.0]]
