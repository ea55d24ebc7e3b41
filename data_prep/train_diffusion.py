"""Train the text encoder and UNet of the bundled pipeline: ``uv run python -m data_prep.train_diffusion``.

Needs the autoencoder of ``data_prep.train_autoencoder``. Writes a Stable Diffusion folder that
``StableDiffusionPipeline.from_pretrained`` loads, of averaged weights in half precision.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jsonargparse import auto_cli
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from data_prep.portrait_arrays import WORK_FOLDER, PortraitArrays, index_loader, portrait_arrays
from data_prep.train_autoencoder import latents_of
from data_prep.training import TrainedBySteps, train
from tokenlearn.data.portraits import PERSONAS, portrait_captions

MAX_PROMPT_LENGTH = 48
_VOCABULARY_SIZE = 1000
_TEXT_WIDTH = 128
_EMPTY_CAPTIONS = 0.1
_MIN_SNR = 5.0
_CAPTIONS_PER_PORTRAIT = 4


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair vocabulary comes from the captions."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    spaced = (text.replace(",", " ,").replace("-", " - ") for text in [*captions, *PERSONAS])
    bpe.train_from_iterator(spaced, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=MAX_PROMPT_LENGTH,
        pad_token="<|endoftext|>",
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model for the tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet with cross-attention where the latents are 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def stable_diffusion_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class DiffusionTraining(TrainedBySteps):
    """Noise prediction (Ho et al., 2020) with min-SNR weights (Hang et al., 2023) and dropped captions.

    Half of the timesteps are logit-normal (Esser et al., 2024), which is where a caption decides what is drawn.
    """

    def __init__(
        self, latents: Tensor, tokenizer: CLIPTokenizer, captions: list[str], steps: int, learning_rate: float
    ) -> None:
        super().__init__(steps, learning_rate, weight_decay=1e-2)
        self.latents = latents
        tokenize = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.input_ids = tokenizer(captions, **tokenize).input_ids.unflatten(0, (len(latents), -1))
        self.empty_ids = tokenizer("", **tokenize).input_ids
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build_unet()
        self.noise_schedule = DDPMScheduler.from_config(stable_diffusion_scheduler().config)

    def training_step(self, indices: Tensor) -> Tensor:
        """One denoising step."""
        latents = self.latents[indices].to(self.device)
        captions = torch.randint(self.input_ids.shape[1], (len(indices),))
        ids = self.input_ids[indices, captions].to(self.device)
        dropped = torch.rand(len(ids), 1, device=self.device) < _EMPTY_CAPTIONS
        prompt_embeds = self.text_encoder(torch.where(dropped, self.empty_ids.to(self.device), ids)).last_hidden_state
        noise = torch.randn_like(latents)
        uniform, logit_normal = torch.rand(len(latents)), torch.randn(len(latents)).sigmoid()
        timesteps = (1000 * torch.where(torch.rand(len(latents)) < 0.5, uniform, logit_normal)).long().clamp(max=999)
        timesteps = timesteps.to(self.device)
        noisy = self.noise_schedule.add_noise(latents, noise, timesteps)
        predicted = self.unet(noisy, timesteps, prompt_embeds).sample.float()
        alpha_bar = self.noise_schedule.alphas_cumprod.to(self.device)[timesteps]
        weights = (_MIN_SNR * (1 - alpha_bar) / alpha_bar).clamp(max=1)
        loss = (weights * functional.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3))).mean()
        self.log("loss", loss, prog_bar=True)
        return loss


def save_pipeline(module: DiffusionTraining, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the pipeline folder in half precision."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=module.text_encoder,
        tokenizer=tokenizer,
        unet=module.unet,
        scheduler=stable_diffusion_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (vae, module.unet):
        part.register_to_config(_name_or_path="")  # type: ignore[union-attr]  # a path of the machine that trained it
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    # Half precision is for the size of the files; transformers would compute in it, and diffusers' other parts not.
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


def scaled_latents(vae: AutoencoderKL, arrays: PortraitArrays, cache: Path) -> Tensor:
    """Latents (N, 4, 16, 16) times the autoencoder's scaling factor, computed once."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(latents_of(vae, arrays) * vae.config.scaling_factor, cache)
    return torch.load(cache, weights_only=True)


def main(
    steps: int = 7500,
    batch_size: int = 32,
    learning_rate: float = 8e-4,
    size: int = 40000,
    start_from: Path | None = None,
    work_folder: Path = WORK_FOLDER,
    output_folder: Path = Path("checkpoints/portraits"),
) -> None:
    """Train, resume or finish the diffusion model.

    Args:
        steps: optimizer steps.
        batch_size: portraits per step.
        learning_rate: peak learning rate.
        size: number of rendered portraits to draw from.
        start_from: pipeline folder whose network and text encoder are trained on, with its tokenizer.
        work_folder: where renderings and checkpoints are kept.
        output_folder: where the pipeline is written.
    """
    torch.manual_seed(0)
    arrays = portrait_arrays(size, seed=0, work_folder=work_folder)
    vae = AutoencoderKL.from_pretrained(work_folder / "autoencoder" / "vae").eval()
    folder = work_folder / "diffusion"
    captions = [text for index in range(size) for text in portrait_captions(0, index, _CAPTIONS_PER_PORTRAIT)]
    if start_from is None:
        tokenizer = train_tokenizer(captions, folder / "tokenizer")
    else:
        tokenizer = CLIPTokenizer.from_pretrained(start_from, subfolder="tokenizer")
    latents = scaled_latents(vae, arrays, folder / f"latents-{size}.pt")
    module = DiffusionTraining(latents, tokenizer, captions, steps, learning_rate)
    if start_from is not None:
        module.unet = UNet2DConditionModel.from_pretrained(start_from, subfolder="unet").train()
        module.text_encoder = CLIPTextModel.from_pretrained(start_from, subfolder="text_encoder").train()
    train(module, index_loader(size, batch_size), folder, ema_decay=0.99)
    save_pipeline(module, vae, tokenizer, output_folder)


if __name__ == "__main__":
    auto_cli(main)
