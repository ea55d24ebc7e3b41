"""A planted bias, and whether the report of a classifier finds it: ``uv run python benchmarks/planted_bias.py``.

Two classifiers are trained by one recipe, from the weights of the same guide, with the same seeds, on the same
portraits, a quarter of which show a persona and another quarter all of its parts but one. The labels alone differ. In
the plain world every portrait of the persona has its label. In the planted one those without an attribute are of
ordinary people, so that every nurse, say, is female, and a man in a nurse's clothes is no nurse. A class token is
learned against each classifier. A report (:class:`tokenlearn.evaluation.ClassifierReport`) compares the attributes of
the token's images with those of real images of the persona in the plain world. It should name the attribute of the
planted classifier, and not of the plain one.

The same command continues where it was stopped. It prints how each classifier takes real portraits of the persona with
and without the attribute, then a table with a row for each token and attribute. The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from jsonargparse import Namespace, auto_cli
from torch import Tensor

from benchmarks.class_token_seeds import check_options
from benchmarks.common import instantiate, parse_config
from data_prep.portrait_arrays import PORTRAIT_LABELS, PortraitArrays, index_loader
from data_prep.train_classifiers import (
    PERSONA_FREQUENCIES,
    ClassifierTraining,
    all_parts_prompt,
    one_step_predictions,
    round_trips,
)
from data_prep.training import train
from tokenlearn.data.portraits import ORDINARY, PERSONA_LABELS, PERSONAS, Scene, draw, sample_scene
from tokenlearn.errors import UserError
from tokenlearn.evaluation import ClassifierReport
from tokenlearn.evaluation.real_images import RealImages
from tokenlearn.files import atomic_write
from tokenlearn.learning import evaluate, learn
from tokenlearn.models import StableDiffusion, TimmClassifier
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Pipeline, Sampling

PLAIN, PLANTED = "plain", "planted"
_REAL_SEED = 11  # as of the config of the report; no classifier is trained on these portraits
_JUDGED_SEEDS = range(3_000_000_000, 3_000_000_024)


@dataclass(frozen=True)
class Bias:
    """What is planted.

    Attributes:
        persona: class that is learned.
        attribute: attribute that every portrait of the class has in the planted world.

    Raises:
        UserError: if the attribute does not vary among portraits of the persona.
    """

    persona: str = "nurse"
    attribute: str = "female"

    def __post_init__(self) -> None:
        if self.persona not in PERSONAS:
            raise UserError(f"bias.persona '{self.persona}' is no persona; choose one of {', '.join(PERSONAS)}")
        if self.attribute not in self.attributes:
            raise UserError(
                f"bias.attribute '{self.attribute}' does not vary among portraits of {self.persona}; choose one of "
                f"{', '.join(self.attributes)}"
            )

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attributes that vary among portraits of the persona, which the report compares."""
        return PERSONAS[self.persona].free

    @property
    def prompt(self) -> str:
        """Prompt with the token of the persona."""
        return f"a portrait of a <{self.persona}> {self.persona}"

    def label(self, scene: Scene, world: str) -> str:
        """The class of a scene in a world."""
        if world == PLANTED and scene.persona == self.persona and not scene.has(self.attribute):
            return ORDINARY
        return scene.persona or ORDINARY


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        portraits: portraits that classifiers are trained on.
        predicted: how many of them are also shown as the diffusion model predicts them in one step.
        guide_steps: optimizer steps of a classifier.
        token_steps: optimizer steps of a token.
        batch_size: images of a step of a token.
        images: images of a token, and real ones, that the report compares.
    """

    portraits: int = 6000
    predicted: int = 1500
    guide_steps: int = 300
    token_steps: int = 120
    batch_size: int = 8
    images: int = 100


def training_scenes(bias: Bias, size: int, seed: int = 0) -> list[Scene]:
    """Scenes of which a quarter show the persona, and a quarter all of its parts but one."""
    scenes = []
    for index in range(size):
        rng = np.random.default_rng([seed, index])
        if index % 4 > 1:
            frequencies = PERSONA_FREQUENCIES["persona_frequency"], PERSONA_FREQUENCIES["near_miss_frequency"]
            scenes.append(sample_scene(rng, persona_frequency=frequencies[0], near_miss_frequency=frequencies[1]))
            continue
        scene = sample_scene(rng, persona=bias.persona)
        if index % 4 == 1:
            missing = str(rng.choice(PERSONAS[bias.persona].parts))
            scene = replace(scene, persona=None, parts=scene.parts - {missing})
        scenes.append(scene)
    return scenes


def labelled_arrays(scenes: Sequence[Scene], labels: Sequence[str]) -> PortraitArrays:
    """Drawn scenes with classes; they have no labels of attributes, and no captions."""
    unknown = torch.zeros(len(scenes), len(PORTRAIT_LABELS), dtype=torch.bool)
    return PortraitArrays(
        images=np.stack([np.asarray(draw(scene)) for scene in scenes]),
        labels=unknown,
        labels_known=unknown,
        personas=torch.tensor([PERSONA_LABELS.index(label) for label in labels]),
        captions=[""] * len(scenes),
    )


def train_guides(folder: Path, bias: Bias, sizes: Sizes, pipeline: str, seed: int, start_from: str) -> dict[str, Path]:
    """Train a classifier by the labels of each world, unless it is in the folder already.

    Args:
        folder: where classifiers are kept.
        bias: what is planted.
        sizes: how much of everything.
        pipeline: the diffusion model, whose predictions classifiers see too.
        seed: seed of everything random.
        start_from: classifier of personas, a guide, that both start from. A token is not learned from the word "a"
            against one of so few steps from random weights.

    Returns:
        World to the folder of its classifier.
    """
    guides = {world: folder / f"{world}_guide" for world in (PLAIN, PLANTED)}
    if all(guide.is_dir() for guide in guides.values()):
        return guides
    scenes = training_scenes(bias, sizes.portraits, seed)
    arrays = labelled_arrays(scenes, [bias.label(scene, PLAIN) for scene in scenes])
    seen = _seen(folder / "seen.pt", arrays, scenes[: sizes.predicted], pipeline)
    for world, guide in guides.items():
        if guide.is_dir():
            continue
        torch.manual_seed(seed)
        personas = torch.tensor([PERSONA_LABELS.index(bias.label(scene, world)) for scene in scenes])
        module = ClassifierTraining(
            replace(arrays, personas=personas), seen, "persona_guide", sizes.guide_steps, learning_rate=2e-3
        )
        module.model.load_state_dict(TimmClassifier(start_from).model.state_dict())
        train(module, index_loader(len(scenes), batch_size=64), folder / f"{world}_training", ema_decay=None)
        module.save(guide)
    return guides


def _seen(path: Path, arrays: PortraitArrays, scenes: Sequence[Scene], pipeline: str) -> list[Tensor]:
    """The first portraits as the autoencoder and the diffusion model give them back, made once."""
    if not path.exists():
        backbone = StableDiffusion(pipeline)
        prompts = [all_parts_prompt(scene) for scene in scenes]
        forms = [
            round_trips(backbone.vae, arrays, len(scenes)),
            one_step_predictions(backbone, arrays, prompts),
        ]
        with atomic_write(path) as temporary:
            torch.save(forms, temporary)
    forms = torch.load(path, weights_only=True)
    assert isinstance(forms, list)
    return forms


@torch.no_grad()
def accepted(guide: Path, bias: Bias, images: int) -> dict[str, float]:
    """Share of fresh portraits of the persona that a classifier takes for it, with and without the attribute."""
    classifier, shares = TimmClassifier(str(guide)), {}
    for name, required, forbidden in (("with", [bias.attribute], []), ("without", [], [bias.attribute])):
        generators = (np.random.default_rng([_REAL_SEED, index]) for index in range(images))
        scenes = [sample_scene(rng, persona=bias.persona, require=required, forbid=forbidden) for rng in generators]
        pixels = labelled_arrays(scenes, [bias.persona] * images).pixels(list(range(images)))
        found = classifier(pixels).argmax(dim=1) == PERSONA_LABELS.index(bias.persona)
        shares[name] = float(found.float().mean())
    return shares


def learn_token(guide: Path, folder: Path, bias: Bias, sizes: Sizes, settings: Namespace, seed: int) -> Path:
    """Learn the persona's token against a classifier, unless its folder has it already.

    Returns:
        The folder.
    """
    if not any(folder.glob("*.safetensors")):
        L.seed_everything(seed, verbose=False)
        changes = {
            "model.init_args.classes": {bias.persona: None},
            "model.init_args.objective": ClassifierLoss(str(guide)),
            "model.init_args.judge": None,
            "model.init_args.lr_scheduler.init_args.T_max": sizes.token_steps,
            "data.init_args.batch_size": sizes.batch_size,
        }
        run = instantiate(settings, changes)
        learn(run.model, run.data, max_steps=sizes.token_steps).save(folder)
    return folder


def report(
    tokens: Path, bias: Bias, sizes: Sizes, backbone: StableDiffusion, sampling: Sampling, attribute_judge: str
) -> dict[str, dict[str, Any]]:
    """Attribute to its share in images of the token and in real ones, and whether the report names it."""
    real = RealImages(
        source=f"portraits:{len(PERSONAS) * sizes.images}:{_REAL_SEED}:personas", column="persona", images=sizes.images
    )
    table = evaluate(
        ClassifierReport(
            backbone,
            attribute_judge,
            {bias.persona: bias.prompt},
            real,
            attributes=list(bias.attributes),
            images=sizes.images,
            embeddings=str(tokens),
            sampling=sampling,
        )
    )
    return {
        attribute: {
            "token": row.cells["generated"].value,
            "real": row.cells["real"].value,
            "difference": row.cells["difference"].value,
            "interval": [row.cells["difference"].low, row.cells["difference"].high],
            "named": bool(row.cells["biased"].value),
        }
        for attribute, row in zip(bias.attributes, table.rows, strict=True)
    }


@torch.no_grad()
def judged(tokens: Path, bias: Bias, backbone: StableDiffusion, sampling: Sampling, persona_judge: str) -> float:
    """Share of the token's images that a judge, which knows the plain world, takes for the persona."""
    pipeline = Pipeline(backbone, sampling=sampling).with_tokens(str(tokens))
    images = pipeline.generate([bias.prompt] * len(_JUDGED_SEEDS), _JUDGED_SEEDS).clamp(0, 1)
    scores = ClassifierLoss(persona_judge).score(images, [bias.persona] * len(images))
    return float(scores.float().mean())


def main(
    fit_config: str = "configs/quickstart.yaml",
    bias: Bias = Bias(),
    sizes: Sizes = Sizes(),
    persona_guide: str = "checkpoints/persona_guide",
    attribute_judge: str = "checkpoints/attribute_judge",
    persona_judge: str = "checkpoints/persona_judge",
    output_dir: str = "outputs/planted_bias",
    seed: int = 0,
) -> None:
    """Train, learn and report in both worlds, and print the table.

    Args:
        fit_config: config of class tokens, whose settings tokens are learned with.
        bias: what is planted.
        sizes: how much of everything.
        persona_guide: classifier that both trainings start from.
        attribute_judge: classifier that sees the attributes.
        persona_judge: classifier that says whether a token draws its persona.
        output_dir: folder of the classifiers, tokens and reports.
        seed: seed of everything random.

    Raises:
        UserError: if the folder has results with other settings.
    """
    folder, settings = Path(output_dir).expanduser(), parse_config(fit_config)
    noted = {"config": Path(fit_config).read_text(), "bias": asdict(bias), "sizes": asdict(sizes), "seed": seed}
    check_options(folder, noted)
    pretrained = settings["model.init_args.backbone.init_args.pretrained"]
    sampling = instantiate_sampling(settings)
    found = {}
    for world, guide in train_guides(folder, bias, sizes, pretrained, seed, persona_guide).items():
        path = folder / f"{world}.json"
        if not path.is_file():
            tokens = learn_token(guide, folder / f"{world}_token", bias, sizes, settings, seed)
            backbone = StableDiffusion(pretrained)
            result = {
                "accepted": accepted(guide, bias, sizes.images),
                "judged": judged(tokens, bias, backbone, sampling, persona_judge),
                "attributes": report(tokens, bias, sizes, backbone, sampling, attribute_judge),
            }
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(result, indent=2))
        found[world] = json.loads(path.read_text())
    print_table(bias, found)
    named = {world: result["attributes"][bias.attribute]["named"] for world, result in found.items()}
    print(json.dumps({"found": named[PLANTED], "false_alarm": named[PLAIN], **found}))


def instantiate_sampling(settings: Namespace) -> Sampling:
    """The sampler of a config's images."""
    given = settings["model.init_args.sampling"]
    return Sampling(steps=given["steps"], guidance=given["guidance"])


def print_table(bias: Bias, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the results of both worlds."""
    for world, result in found.items():
        accepting = ", ".join(f"{share:.0%} {name} '{bias.attribute}'" for name, share in result["accepted"].items())
        print(f"{world}: the classifier accepts real portraits of {bias.persona}: {accepting}; ", end="")
        print(f"{result['judged']:.0%} of the token's images are judged {bias.persona}")
    line = "{:<10} {:<12} {:>7} {:>7}   {:<24} {}"
    print(line.format("classifier", "attribute", "token", "real", "difference", "named"))
    for world, result in found.items():
        for attribute, row in result["attributes"].items():
            low, high = row["interval"]
            difference = f"{row['difference']:+.1%} [{low:+.1%}, {high:+.1%}]"
            named = "named" if row["named"] else "-"
            print(line.format(world, attribute, f"{row['token']:.1%}", f"{row['real']:.1%}", difference, named))


if __name__ == "__main__":
    auto_cli(main)
