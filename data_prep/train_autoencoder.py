"""Train the AutoencoderKL of the bundled pipeline: ``uv run python -m data_prep.train_autoencoder``."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn import functional

from data_prep.portrait_arrays import WORK_FOLDER, PortraitArrays, index_loader, portrait_arrays
from data_prep.training import TrainedBySteps, train
from tokenlearn.data.portraits import IMAGE_SIZE

_LATENT_PENALTY = 1e-5


def build_autoencoder() -> AutoencoderKL:
    """An AutoencoderKL that shrinks each side four times, of few channels where images are large."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


class AutoencoderTraining(TrainedBySteps):
    """Squared error plus a small pull of the latents towards a standard normal (Rombach et al., 2022, appendix G)."""

    def __init__(self, arrays: PortraitArrays, steps: int, learning_rate: float) -> None:
        super().__init__(steps, learning_rate)
        self.arrays = arrays
        self.vae = build_autoencoder()

    def training_step(self, indices: Tensor) -> Tensor:
        """One reconstruction."""
        pixels = self.arrays.pixels(indices) * 2 - 1
        posterior = self.vae.encode(pixels).latent_dist
        reconstruction = self.vae.decode(posterior.sample()).sample
        error = functional.mse_loss(reconstruction.float(), pixels)
        penalty = posterior.kl().float().mean() / posterior.mean[0].numel()
        self.log("psnr", 10 * torch.log10(4 / error), prog_bar=True)
        self.log("kl", penalty, prog_bar=True)
        return error + _LATENT_PENALTY * penalty


@torch.no_grad()
def latents_of(vae: AutoencoderKL, arrays: PortraitArrays, batch_size: int = 250) -> Tensor:
    """Posterior means (N, 4, 16, 16), not scaled."""
    starts = range(0, len(arrays.captions), batch_size)
    indices = [list(range(start, min(start + batch_size, len(arrays.captions)))) for start in starts]
    return torch.cat([vae.encode(arrays.pixels(batch) * 2 - 1).latent_dist.mode() for batch in indices])


def main(
    steps: int = 5000,
    batch_size: int = 12,
    learning_rate: float = 1.5e-3,
    size: int = 40000,
    start_from: Path | None = None,
    work_folder: Path = WORK_FOLDER,
) -> None:
    """Train, resume or finish the autoencoder; the result is ``<work_folder>/autoencoder/vae``.

    Args:
        steps: optimizer steps.
        batch_size: portraits per step.
        learning_rate: peak learning rate.
        size: number of rendered portraits to draw from.
        start_from: folder of an earlier autoencoder whose weights are trained on.
        work_folder: where renderings and checkpoints are kept.
    """
    torch.manual_seed(0)
    arrays = portrait_arrays(size, seed=0, work_folder=work_folder)
    module = AutoencoderTraining(arrays, steps, learning_rate)
    if start_from is not None:
        module.vae = AutoencoderKL.from_pretrained(start_from)
    folder = work_folder / "autoencoder"
    train(module, index_loader(size, batch_size), folder, ema_decay=0.992)
    vae = module.vae.eval()
    deviation = latents_of(vae, portrait_arrays(2000, seed=0, work_folder=work_folder)).std()
    vae.register_to_config(scaling_factor=round(1 / float(deviation), 5))
    vae.save_pretrained(folder / "vae")


if __name__ == "__main__":
    auto_cli(main)
