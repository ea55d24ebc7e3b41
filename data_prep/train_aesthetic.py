"""Train the bundled aesthetic heads: ``uv run python -m data_prep.train_aesthetic aesthetic_guide``, or ``.._judge``.

Each head rates images from the features of the CLIP of its role, and learned the portraits' ratings from images
that this CLIP was trained on. Needs ``data_prep.train_clip``; takes minutes, nearly all of them for the features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torchmetrics.functional.regression import spearman_corrcoef

from data_prep.evaluate_models import _HELD_OUT_SEED, _write_card
from data_prep.portrait_arrays import WORK_FOLDER, PortraitArrays, portrait_arrays, portrait_ratings
from data_prep.train_classifiers import GUIDE_SEED, JUDGE_SEED
from tokenlearn.models.aesthetic import AestheticHead, build_aesthetic_head, save_aesthetic_head
from tokenlearn.models.clip import ClipModel

Name = Literal["aesthetic_guide", "aesthetic_judge"]

HIDDEN_SIZES = (64,)
_CLIPS: dict[Name, str] = {"aesthetic_guide": "clip_guide", "aesthetic_judge": "clip_judge"}
_SEEDS: dict[Name, int] = {"aesthetic_guide": GUIDE_SEED, "aesthetic_judge": JUDGE_SEED}


@torch.no_grad()
def image_features(clip: ClipModel, arrays: PortraitArrays) -> Tensor:
    """Unit features (N, D) of portraits as drawn."""
    rows = torch.arange(len(arrays.captions)).split(200)
    return torch.cat([clip.image_features(arrays.pixels(part)) for part in rows])


def fit_head(features: Tensor, scores: Tensor, steps: int, learning_rate: float, batch_size: int = 256) -> nn.Module:
    """A head trained on the mean squared error.

    Args:
        features: (N, D) unit features.
        scores: (N,) ratings.
        steps: optimizer steps; the learning rate falls to zero along half a cosine.
        learning_rate: at the start.
        batch_size: images per step.
    """
    head = build_aesthetic_head(features.shape[1], HIDDEN_SIZES)
    optimizer = AdamW(head.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    centre = scores.mean()
    for _ in range(steps):
        rows = torch.randint(len(features), (batch_size,))
        loss = functional.mse_loss(head(features[rows]).squeeze(1), scores[rows] - centre)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        list(head.parameters())[-1].add_(centre)  # the last bias: ratings lie far from zero, where the head starts
    return head


@torch.no_grad()
def evaluate(name: Name, folder: Path, work_folder: Path, held_out: int = 2000) -> tuple[float, float]:
    """Rank correlation with the true ratings on drawn portraits that no training saw; writes the card.

    Returns:
        The correlation, and the mean absolute error in units of the rating.
    """
    rater = AestheticHead(str(folder))
    arrays = portrait_arrays(held_out, _HELD_OUT_SEED, work_folder)
    rows = torch.arange(held_out).split(200)
    scores = torch.cat([rater.score(arrays.pixels(part)) for part in rows])
    truth = portrait_ratings(held_out, _HELD_OUT_SEED)
    correlation = float(spearman_corrcoef(scores, truth))
    error = float((scores - truth).abs().mean())
    judge = " It only reports and must never be optimised against." if name == "aesthetic_judge" else ""
    text = (
        f"Rates how pleasing a portrait is, from 1 to 10: a perceptron on the image features of "
        f"`{_CLIPS[name]}`.{judge} "
        "A smile, a warm background, a head near the middle and a shirt that stands out raise the rating; a pipe and "
        f"a dark image lower it.\n\nOn {held_out} held-out drawn portraits, whose ratings range from "
        f"{truth.min():.1f} to {truth.max():.1f}, Spearman's rank correlation with the true rating is "
        f"{correlation:.1%}, the mean absolute error {error:.2f}; predicting the mean rating gives "
        f"{(truth - truth.mean()).abs().mean():.2f}."
    )
    _write_card(folder, f"Portraits: {name.replace('_', ' ')}", text)
    print(f"{name}: rank correlation {correlation:.3f}, mean absolute error {error:.2f}", flush=True)
    return correlation, error


def main(
    name: Name,
    steps: int = 3000,
    learning_rate: float = 3e-3,
    size: int = 10000,
    work_folder: Path = WORK_FOLDER,
    output_folder: Path = Path("checkpoints"),
) -> None:
    """Train one head, measure it and write its card.

    Args:
        name: which of the two.
        steps: optimizer steps.
        learning_rate: at the start.
        size: number of rendered portraits to learn from.
        work_folder: where renderings are kept.
        output_folder: where the CLIPs are, and the head's folder is written.
    """
    seed = _SEEDS[name]
    torch.manual_seed(seed)
    clip = ClipModel(str(output_folder / _CLIPS[name]))
    features = image_features(clip, portrait_arrays(size, seed, work_folder))
    head = fit_head(features, portrait_ratings(size, seed), steps, learning_rate)
    save_aesthetic_head(head, output_folder / name, f"../{_CLIPS[name]}", HIDDEN_SIZES)
    evaluate(name, output_folder / name, work_folder)


if __name__ == "__main__":
    auto_cli(main)
