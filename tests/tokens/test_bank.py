import pytest
import torch
from torch import nn

from tokenlearn.errors import UserError
from tokenlearn.tokens import TokenBank


def two_tokens() -> TokenBank:
    bank = TokenBank({"<wizard>": 2, "<viking>": 1}, [4, 6])
    for width, vectors in zip(bank.embedding_widths, bank.vectors, strict=True):
        vectors.data.copy_(torch.arange(3 * width).reshape(3, width))
    return bank


def test_rows_follow_the_order_of_placeholders():
    bank = two_tokens()
    assert [tuple(vectors.shape) for vectors in bank.vectors] == [(3, 4), (3, 6)]
    assert bank.get("<viking>")[0].tolist() == [[8, 9, 10, 11]]
    assert [tuple(vectors.shape) for vectors in bank.get("<wizard>")] == [(2, 4), (2, 6)]
    assert bank.unit_names("<wizard>") == ["<wizard>", "<wizard>_1"]


def test_get_is_a_view_with_gradient():
    bank = two_tokens()
    bank.get("<viking>")[1].sum().backward()
    assert bank.vectors[0].grad is None
    assert bank.vectors[1].grad.sum(dim=1).tolist() == [0, 0, 6]


def test_set_writes_only_its_rows_and_keeps_the_parameter():
    bank = two_tokens()
    parameter, before = bank.vectors[0], bank.vectors[0].clone()
    bank.set("<wizard>", [torch.full((2, 4), -1, dtype=torch.float16), torch.zeros(2, 6)])
    assert bank.vectors[0] is parameter
    assert parameter.dtype == torch.float32
    assert parameter[:2].eq(-1).all()
    assert torch.equal(parameter[2], before[2])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([torch.zeros(1, 5), torch.zeros(1, 6)], "width 5, this backbone's text encoder has 4"),
        ([torch.zeros(4), torch.zeros(1, 6)], "width 4"),
        ([torch.zeros(3, 4), torch.zeros(3, 6)], "has 3 vectors, the token has 1"),
        ([torch.zeros(1, 4)], "for 1 text encoder"),
        ([torch.zeros(1, 4), torch.full((1, 6), float("nan"))], "not finite"),
    ],
)
def test_set_refuses_and_leaves_every_encoder_as_it_was(vectors: list[torch.Tensor], message: str):
    bank = two_tokens()
    before = [parameter.clone() for parameter in bank.vectors]
    with pytest.raises(UserError, match=message):
        bank.set("<viking>", vectors)
    assert all(torch.equal(a, b) for a, b in zip(before, bank.vectors, strict=True))


@pytest.mark.parametrize(
    "num_vectors",
    [
        {},
        {"": 1},
        {"<two words>": 1},
        {"<tab\t>": 1},
        {"<bell\a>": 1},
        {"<wizard>": 0},
        {"<wizard>": 1, "<wizard>_1": 1},
        {"wiz": 1, "<Wizard>": 1},
        {"<Wizard>": 1, "<wizard>": 1},
    ],
)
def test_bad_placeholders(num_vectors: dict[str, int]):
    with pytest.raises(UserError) as caught:
        TokenBank(num_vectors, [4])
    assert "\n" not in str(caught.value)


def test_unknown_placeholder_names_the_known_ones():
    with pytest.raises(UserError, match="no token '<witch>'; take one of <wizard>, <viking>"):
        two_tokens().get("<witch>")


def test_renormalise_clamps_each_vector_per_encoder():
    bank = TokenBank({"<wizard>": 4}, [2, 2])
    rows = torch.tensor([[0.3, 0.4], [3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    bank.set("<wizard>", [rows, rows])
    bank.renormalise_([1.0, 0.1], [2.5, 9.0])
    assert torch.allclose(bank.vectors[0].norm(dim=1), torch.tensor([1.0, 2.5, 2.0, 0.0]))
    assert torch.allclose(bank.vectors[0][1], torch.tensor([1.5, 2.0]))
    assert torch.equal(bank.vectors[1], rows)


def test_half_precision_conversion_of_a_parent_keeps_float32_bits():
    parent = nn.ModuleDict({"bank": two_tokens(), "other": nn.Linear(2, 2)})
    bank = parent["bank"]
    bank.vectors[0].data.fill_(1 / 3)
    before = bank.vectors[0].clone()
    for convert in (parent.half, parent.bfloat16, lambda: parent.to("cpu", torch.bfloat16)):
        convert()
        assert parent["other"].weight.dtype != torch.float32
        assert bank.vectors[0].dtype == torch.float32
        assert torch.equal(bank.vectors[0], before)


def test_state_round_trip_through_weights_only(tmp_path):
    bank = two_tokens()
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other = TokenBank({"<wizard>": 2, "<viking>": 1}, [4, 6])
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(bank.vectors, other.vectors, strict=True))


@pytest.mark.parametrize(
    "num_vectors", [{"<viking>": 1, "<wizard>": 2}, {"<pirate>": 2, "<viking>": 1}, {"<wizard>": 1, "<viking>": 2}]
)
def test_state_of_other_tokens_of_the_same_shape_is_refused(num_vectors: dict[str, int]):
    other = TokenBank(num_vectors, [4, 6])
    with pytest.raises(UserError, match="saved token bank"):
        other.load_state_dict(two_tokens().state_dict())
    assert not any(vectors.any() for vectors in other.vectors)
