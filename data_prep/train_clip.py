"""Train the bundled CLIPs: ``uv run python -m data_prep.train_clip clip_guide``, then the same with ``clip_judge``.

Guide and judge differ in width, seed and training portraits. Both see portraits as drawn and as the autoencoder gives
them back; the guide also sees one-step predictions of the diffusion model from noisy latents. They share the tokenizer
of the bundled pipeline, and both are taught by texts which portraits please, as captions of the web do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from data_prep.evaluate_models import _HELD_OUT_SEED, _mean, _table, _write_card
from data_prep.portrait_arrays import WORK_FOLDER, PortraitArrays, index_loader, portrait_arrays, portrait_ratings
from data_prep.train_classifiers import (
    GUIDE_SEED,
    JUDGE_SEED,
    _augment,
    _cached,
    one_step_predictions,
    round_trips,
)
from data_prep.training import TrainedBySteps, train
from tokenlearn.data.portraits import (
    ABSENCE_PHRASES,
    ATTRIBUTE_PHRASES,
    ATTRIBUTES,
    IMAGE_SIZE,
    attribute_prompt,
    portrait_captions,
)
from tokenlearn.models import StableDiffusion
from tokenlearn.models.clip import ClipModel

Name = Literal["clip_guide", "clip_judge"]

SEEDS: dict[Name, int] = {"clip_guide": GUIDE_SEED, "clip_judge": JUDGE_SEED}
WIDTHS: dict[Name, int] = {"clip_guide": 128, "clip_judge": 160}
_HEAD_WIDTH = 32
_TEXT_WIDTH = 128
_FEATURE_DIM = 128
_CAPTIONS_PER_PORTRAIT = 4
_WITH_ABSENCES = 0.35
_GREATEST_LOGIT_SCALE = 100.0


def absence_prompt(attribute: str) -> str:
    """A prompt for the absence of an attribute: the captions' own, or one with "without" where they have none."""
    if attribute in ABSENCE_PHRASES:
        return attribute_prompt(attribute, present=False)
    return f"a portrait of a person without {_missing_thing(attribute)}"


def _missing_thing(attribute: str) -> str:
    return "a bald head" if attribute == "bald" else ATTRIBUTE_PHRASES[attribute]


_ATTRIBUTE_PROMPTS = [prompt(name) for prompt in (attribute_prompt, absence_prompt) for name in ATTRIBUTES]
_RATING_PROMPTS = ["a pleasing portrait", "an unpleasing portrait"]
"""Captions of the web praise images, from which CLIP knows what pleases; those of the portraits do not."""
_RATING_WEIGHT = 0.3


def training_text(captions: Sequence[str], shown: Sequence[bool], known: Sequence[bool], rng: random.Random) -> str:
    """A caption of a portrait, now and then followed by what the image is without, which captions hardly ever say.

    Args:
        captions: captions of the portrait, one of which is taken.
        shown: whether each attribute is there.
        known: false where that is left open.
        rng: the source of every choice.
    """
    text = rng.choice(captions)
    missing = [
        _missing_thing(name)
        for name, is_shown, is_known in zip(ATTRIBUTES, shown, known, strict=True)
        if is_known and not is_shown and name not in ABSENCE_PHRASES
    ]
    if missing and rng.random() < _WITH_ABSENCES:
        text += f" without {' and '.join(rng.sample(missing, k=min(2, len(missing))))}"
    return text


def contrastive_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Symmetric cross-entropy of CLIP (Radford et al., 2021) where the same text may belong to several images.

    Args:
        logits: (B, B) scaled cosines of images (rows) and texts (columns); row and column of a pair are the same.
        input_ids: (B, T) padded ids of the texts. An image's target is spread evenly over all copies of its text, and
            a text's over the images of all copies.

    Returns:
        () loss.
    """
    same = (input_ids[:, None] == input_ids[None]).all(dim=-1).float()
    targets = same / same.sum(dim=1, keepdim=True)
    return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def prompted_loss(features: Tensor, prompts: Tensor, logit_scale: Tensor, likely: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy of telling by pairs of prompts whether each of several things holds for an image.

    Labels written out as texts are pairs of images and texts like any other (Yang et al., 2022,
    https://arxiv.org/abs/2204.03610). A caption names few of the attributes, so these teach most of them.

    Args:
        features: (B, D) unit features of images.
        prompts: (2 K, D) unit features of the prompts of K things, then of those of their contrary.
        logit_scale: () inverse temperature.
        likely: (B, K) in [0, 1], how likely each holds; bool where that is certain.
        known: (B, K) bool, false where it is left open.

    Returns:
        () mean over what is known.
    """
    present, absent = (features @ prompts.T).chunk(2, dim=1)
    logits = logit_scale * (present - absent)
    return functional.binary_cross_entropy_with_logits(logits[known], likely[known].float())


def build_clip(tokenizer: CLIPTokenizer, width: int) -> CLIPModel:
    """A CLIP of portraits whose image tower has four layers of the given width."""
    return CLIPModel(
        CLIPConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": _TEXT_WIDTH,
                "hidden_act": "gelu",
                "intermediate_size": 2 * _TEXT_WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": _TEXT_WIDTH // _HEAD_WIDTH,
                "max_position_embeddings": tokenizer.model_max_length,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "hidden_size": width,
                "hidden_act": "gelu",
                "intermediate_size": 2 * width,
                "num_hidden_layers": 4,
                "num_attention_heads": width // _HEAD_WIDTH,
                "image_size": IMAGE_SIZE,
                "patch_size": 8,
            },
            projection_dim=_FEATURE_DIM,
        )
    )


def build_image_processor() -> CLIPImageProcessor:
    """Images of any size to the network's, in [-1, 1]."""
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


class ClipTraining(TrainedBySteps):
    """Contrastive training on augmented images, their captions and prompts of their attributes."""

    def __init__(
        self,
        arrays: PortraitArrays,
        captions: Sequence[Sequence[str]],
        ratings: Tensor,
        seen: Sequence[Tensor],
        tokenizer: CLIPTokenizer,
        width: int,
        steps: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        super().__init__(steps, learning_rate, weight_decay=0.1)
        self.arrays, self.captions, self.seen, self.tokenizer = arrays, captions, seen, tokenizer
        self.rank = ratings.argsort().argsort() / (len(ratings) - 1)
        self.rng = random.Random(seed)
        self.model = build_clip(tokenizer, width)

    def training_step(self, indices: Tensor) -> Tensor:
        """One batch; each image as drawn or in one of the other forms in which it is known."""
        pixels = self.arrays.pixels(indices)
        for form in self.seen:
            replaced = (torch.rand(len(indices)) < 0.4) & (indices < len(form))
            pixels[replaced] = form[indices[replaced]].float() / 255
        shown, known = (flags[indices, : len(ATTRIBUTES)] for flags in (self.arrays.labels, self.arrays.labels_known))
        texts = [
            training_text(self.captions[index], own_shown, own_known, self.rng)
            for index, own_shown, own_known in zip(indices.tolist(), shown.tolist(), known.tolist(), strict=True)
        ]
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=torch.tensor(_GREATEST_LOGIT_SCALE).log())
        every_text = [*texts, *_ATTRIBUTE_PROMPTS, *_RATING_PROMPTS]
        tokens = self.tokenizer(every_text, padding=True, truncation=True, return_tensors="pt")
        output = self.model(**tokens, pixel_values=_augment(pixels) * 2 - 1)
        pairs = len(texts)
        scale, features = self.model.logit_scale.exp(), output.image_embeds
        _, attributes, rating = output.text_embeds.split([pairs, len(_ATTRIBUTE_PROMPTS), len(_RATING_PROMPTS)])
        contrasted = contrastive_loss(output.logits_per_image[:, :pairs], tokens.input_ids[:pairs])
        told = prompted_loss(features, attributes, scale, shown, known)
        rank = self.rank[indices, None]
        rated = prompted_loss(features, rating, scale, rank, torch.ones_like(rank, dtype=torch.bool))
        loss = contrasted + told + _RATING_WEIGHT * rated
        self.log("attribute_loss", told, prog_bar=True)
        self.log("rating_loss", rated, prog_bar=True)
        self.log("loss", loss, prog_bar=True)
        return loss


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a folder that transformers loads, in half precision; the model is then in half precision itself."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
    # Half precision is for the size of the file; transformers would compute in it.
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


@torch.no_grad()
def prompted_accuracy(clip: ClipModel, arrays: PortraitArrays, opening: str = "a portrait of") -> dict[str, float]:
    """Share of portraits for which the prompt of an attribute, against that of its absence, says what is there.

    Args:
        clip: the CLIP.
        arrays: portraits that it was not trained on.
        opening: what the prompts begin with; those of the training begin with "a portrait of".
    """
    images = arrays.pixels(list(range(len(arrays.captions))))
    features = torch.cat([clip.image_features(part) for part in images.split(200)])
    accuracy = {}
    for index, name in enumerate(ATTRIBUTES):
        prompts = [prompt(name).replace("a portrait of", opening) for prompt in (attribute_prompt, absence_prompt)]
        present, absent = (features @ clip.text_features(prompts).T).unbind(dim=1)
        known = arrays.labels_known[:, index]
        accuracy[name] = float(((present > absent) == arrays.labels[:, index])[known].float().mean())
    return accuracy


def evaluate(name: Name, folder: Path, work_folder: Path, held_out: int = 2000) -> None:
    """Measure a CLIP on drawn portraits that no training saw, and write its card."""
    clip = ClipModel(str(folder))
    arrays = portrait_arrays(held_out, _HELD_OUT_SEED, work_folder)
    learned = prompted_accuracy(clip, arrays)
    reworded = prompted_accuracy(clip, arrays, "a picture of")
    role = {
        "clip_guide": "It was trained on drawn portraits, their autoencoder round trips and one-step predictions of "
        "the diffusion model from noisy latents, so that it can guide through blurred predictions",
        "clip_judge": "It is wider than the guide and was trained on other portraits, as drawn and after the "
        "autoencoder's round trip. It only reports and must never be optimised against",
    }
    vision = clip.model.config.vision_config
    table = _table(
        ("attribute", "prompts", "accuracy", 'with "a picture of"'),
        [
            *(
                (
                    key,
                    f"{attribute_prompt(key)} / {absence_prompt(key)}",
                    f"{learned[key]:.1%}",
                    f"{reworded[key]:.1%}",
                )
                for key in ATTRIBUTES
            ),
            ("mean", "", f"{_mean(learned):.1%}", f"{_mean(reworded):.1%}"),
        ],
    )
    text = (
        f"A CLIP of portraits and their captions, {vision.num_hidden_layers} layers of width {vision.hidden_size} "
        f"for {IMAGE_SIZE} x {IMAGE_SIZE} pixels, with the tokenizer of the pipeline in `portraits`. {role[name]}. "
        f'Captions of highly rated portraits say "{_RATING_PROMPTS[0]}", of low ones "{_RATING_PROMPTS[1]}".\n\n'
        f"Share of {held_out} held-out drawn portraits that are closer to the right one of two prompts, for the "
        "presence and the absence of an attribute. These prompts were among the training texts, beside captions; the "
        f"prompts of the last column begin with other words:\n\n{table}"
    )
    _write_card(folder, f"Portraits: {name.replace('_', ' ').replace('clip', 'CLIP')}", text)
    for prompts, accuracy in (("learned prompts", learned), ("other prompts", reworded)):
        print(f"{name}, {prompts}: {_mean(accuracy):.2%}, worst {min(accuracy.values()):.2%}", flush=True)


def main(
    name: Name,
    seed: int | None = None,
    width: int | None = None,
    steps: int = 3000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    size: int = 20000,
    blurred: int = 4000,
    pipeline: str = "checkpoints/portraits",
    work_folder: Path = WORK_FOLDER,
    output_folder: Path = Path("checkpoints"),
) -> None:
    """Train, resume or finish one CLIP, measure it and write its card.

    Args:
        name: which of the two.
        seed: names the training portraits and the initial weights; null for that of ``name``.
        width: width of the image tower, a multiple of 32; null for that of ``name``.
        steps: optimizer steps.
        batch_size: portraits per step.
        learning_rate: peak learning rate.
        size: number of rendered portraits to draw from.
        blurred: how many of them are also shown as the autoencoder or the diffusion model give them back.
        pipeline: the diffusion model, for its tokenizer, its autoencoder and the guide's one-step predictions.
        work_folder: where renderings and checkpoints are kept.
        output_folder: the CLIP is written to a folder of its name in here.
    """
    seed = SEEDS[name] if seed is None else seed
    width = WIDTHS[name] if width is None else width
    torch.manual_seed(seed)
    arrays = portrait_arrays(size, seed, work_folder)
    captions = [portrait_captions(seed, index, _CAPTIONS_PER_PORTRAIT) for index in range(size)]
    tokenizer = CLIPTokenizer.from_pretrained(pipeline, subfolder="tokenizer")
    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae").eval()
    cache = work_folder / "classifiers"  # the classifiers are shown the same
    seen = [_cached(cache / f"round-trips-{seed}.pt", lambda: round_trips(vae, arrays, blurred))]
    if name == "clip_guide":
        one_step = cache / ("one-step.pt" if seed == GUIDE_SEED else f"one-step-{seed}.pt")
        seen.append(_cached(one_step, lambda: one_step_predictions(StableDiffusion(pipeline), arrays, blurred)))
    ratings = portrait_ratings(size, seed)
    module = ClipTraining(arrays, captions, ratings, seen, tokenizer, width, steps, learning_rate, seed)
    train(module, index_loader(size, batch_size), work_folder / "clip" / f"{name}-{seed}-{width}", ema_decay=None)
    save_clip(module.model.eval(), tokenizer, output_folder / name)
    evaluate(name, output_folder / name, work_folder)


if __name__ == "__main__":
    auto_cli(main)
