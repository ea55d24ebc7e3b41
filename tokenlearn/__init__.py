"""Learn semantic tokens for frozen text-to-image diffusion models, and edit and guide images with them.

Names are imported when they are first used, so that ``import tokenlearn`` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenlearn.calibration import calibrate as calibrate
    from tokenlearn.data import GeneratedDataModule as GeneratedDataModule
    from tokenlearn.data import HeldOut as HeldOut
    from tokenlearn.data import ImageDataModule as ImageDataModule
    from tokenlearn.data import PromptDataModule as PromptDataModule
    from tokenlearn.diffusion import EDICT as EDICT
    from tokenlearn.diffusion import OBELM as OBELM
    from tokenlearn.diffusion import Checkpointed as Checkpointed
    from tokenlearn.diffusion import Detached as Detached
    from tokenlearn.diffusion import LastK as LastK
    from tokenlearn.diffusion import Leapfrog as Leapfrog
    from tokenlearn.diffusion import OneStep as OneStep
    from tokenlearn.diffusion import Reversible as Reversible
    from tokenlearn.diffusion import Stored as Stored
    from tokenlearn.diffusion.latent_optimisation import LatentOptimisation as LatentOptimisation
    from tokenlearn.editing import Editing as Editing
    from tokenlearn.errors import UserError as UserError
    from tokenlearn.generation import Doodl as Doodl
    from tokenlearn.generation import Edit as Edit
    from tokenlearn.generation import Generate as Generate
    from tokenlearn.generation import Sega as Sega
    from tokenlearn.guidance import SEGA as SEGA
    from tokenlearn.guidance import TFG as TFG
    from tokenlearn.guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
    from tokenlearn.guidance import ClassifierGuidance as ClassifierGuidance
    from tokenlearn.guidance import ComposableGuidance as ComposableGuidance
    from tokenlearn.guidance import SafeGuidance as SafeGuidance
    from tokenlearn.guidance import SemanticEdit as SemanticEdit
    from tokenlearn.guidance import TFGSettings as TFGSettings
    from tokenlearn.hub import load_tokens as load_tokens
    from tokenlearn.image_functions import optimise_latents as optimise_latents
    from tokenlearn.learning import evaluate as evaluate
    from tokenlearn.learning import learn as learn
    from tokenlearn.losses import CasoObjective as CasoObjective
    from tokenlearn.losses import Crops as Crops
    from tokenlearn.models import DeepFloydIF as DeepFloydIF
    from tokenlearn.models import StableDiffusion as StableDiffusion
    from tokenlearn.models import StableDiffusionXL as StableDiffusionXL
    from tokenlearn.objectives import AestheticLoss as AestheticLoss
    from tokenlearn.objectives import ClassifierLoss as ClassifierLoss
    from tokenlearn.objectives import CLIPImageLoss as CLIPImageLoss
    from tokenlearn.objectives import CLIPTextLoss as CLIPTextLoss
    from tokenlearn.objectives import SymmetryLoss as SymmetryLoss
    from tokenlearn.pipeline import Pipeline as Pipeline
    from tokenlearn.pipeline import Sampling as Sampling
    from tokenlearn.tokens import LearnedTokens as LearnedTokens
    from tokenlearn.tokens import load_embedding as load_embedding
    from tokenlearn.tokens.directions import PairTemplates as PairTemplates
    from tokenlearn.tokens.directions import direction as direction
    from tokenlearn.tokens.settings import TokenSettings as TokenSettings
    from tokenlearn.training import Caso as Caso
    from tokenlearn.training import ClassTokens as ClassTokens
    from tokenlearn.training import Initialisation as Initialisation
    from tokenlearn.training import TextualInversion as TextualInversion
    from tokenlearn.training import TrainingEdit as TrainingEdit
    from tokenlearn.training import WordSearch as WordSearch

_NAMES = {
    "calibration": "calibrate",
    "data": "GeneratedDataModule HeldOut ImageDataModule PromptDataModule",
    "diffusion": "EDICT OBELM Checkpointed Detached LastK Leapfrog OneStep Reversible Stored",
    "diffusion.latent_optimisation": "LatentOptimisation",
    "editing": "Editing",
    "errors": "UserError",
    "generation": "Doodl Edit Generate Sega",
    "guidance": "SEGA TFG ClassifierFreeGuidance ClassifierGuidance ComposableGuidance SafeGuidance SemanticEdit "
    "TFGSettings",
    "hub": "load_tokens",
    "image_functions": "optimise_latents",
    "learning": "evaluate learn",
    "losses": "CasoObjective Crops",
    "models": "DeepFloydIF StableDiffusion StableDiffusionXL",
    "objectives": "AestheticLoss ClassifierLoss CLIPImageLoss CLIPTextLoss SymmetryLoss",
    "pipeline": "Pipeline Sampling",
    "tokens": "LearnedTokens load_embedding",
    "tokens.directions": "PairTemplates direction",
    "tokens.settings": "TokenSettings",
    "training": "Caso ClassTokens Initialisation TextualInversion TrainingEdit WordSearch",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - type checkers read the block above
    if name not in _MODULES:
        raise AttributeError(f"module 'tokenlearn' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"tokenlearn.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
