import torch
from torch.nn import functional

from data_prep.train_aesthetic import fit_head


def test_the_head_learns_ratings_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    features = functional.normalize(torch.randn(400, 6, generator=generator), dim=1)
    scores = 5 + 2 * features[:, 0] + features[:, 1].abs()
    torch.manual_seed(0)
    head = fit_head(features[:300], scores[:300], steps=300, learning_rate=1e-2)
    with torch.no_grad():
        errors = head(features[300:]).squeeze(1) - scores[300:]
    assert errors.abs().mean() < 0.1
