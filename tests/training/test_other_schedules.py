"""Tasks on pipelines with other noise schedules than Stable Diffusion's own."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from tests.tiny import tiny_pipeline
from tests.training.caso_tasks import ATTRIBUTES, TOKENS, image_batch
from tests.training.runs import no_change, one_step
from tokenlearn.data.batches import PromptBatch
from tokenlearn.diffusion import EDICT, OBELM, Checkpointed, Leapfrog, Reversible, Stored
from tokenlearn.editing import Editing, ImageEditor
from tokenlearn.models import StableDiffusion
from tokenlearn.objectives import ClassifierLoss
from tokenlearn.pipeline import Sampling
from tokenlearn.training import Caso, ClassTokens, TextualInversion, TrainingEdit

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_TERMINAL = DDIMScheduler(
    **SD,
    clip_sample=False,
    set_alpha_to_one=False,
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
    prediction_type="v_prediction",
)
SCHEDULERS = {
    "zero terminal SNR": ZERO_TERMINAL,
    "DPM-Solver": DPMSolverMultistepScheduler(**SD),
    "Euler": EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),
    "Euler as it comes": EulerDiscreteScheduler(**SD),
}


@pytest.fixture(scope="module")
def backbone_with(tmp_path_factory):
    """The tiny pipeline with another scheduler."""
    made = {}

    def backbone(name):
        if name not in made:
            scheduler, folder = SCHEDULERS[name], tmp_path_factory.mktemp("pipeline")
            tiny_pipeline(folder, scheduler.config.prediction_type)
            pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
            pipeline.scheduler = scheduler
            pipeline.save_pretrained(folder)
            made[name] = StableDiffusion(str(folder))
        return made[name]

    return backbone


@pytest.mark.parametrize("timestep", [999, 998, 401])
def test_edits_in_one_step_where_no_image_is_left(backbone_with, faces, timestep):
    """With x0 = alpha z - sigma v in double precision: finite even where alpha is 0."""
    backbone = backbone_with("zero terminal SNR")
    task = Caso(
        backbone, str(faces / "guide"), ATTRIBUTES, edit=TrainingEdit(timestep, guidance=5.0), optimizer=no_change
    )
    loss, gradient, _ = one_step(task, image_batch(2))
    assert torch.tensor(loss).isfinite()
    assert gradient.isfinite().all()
    assert gradient.any()

    noisy, at = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), timestep)
    with torch.no_grad():
        tokens = [TOKENS[0], TOKENS[2]]
        edited = task.editor.edits(noisy, at).edited(tokens)
        empty, prompted = (backbone(noisy, at, task.pipeline.encode(texts)).double() for texts in (["", ""], tokens))
    bar = ZERO_TERMINAL.alphas_cumprod[timestep].double()
    expected = bar.sqrt() * noisy - (1 - bar).sqrt() * (empty + 5 * (prompted - empty))
    torch.testing.assert_close(edited.double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "timestep", "inversion"),
    [
        ("zero terminal SNR", 999, "ddim"),
        ("zero terminal SNR", 999, "edit_friendly"),
        ("DPM-Solver", 901, "ddim"),
        ("DPM-Solver", 901, "edit_friendly"),
        ("DPM-Solver", 901, EDICT()),
    ],
    ids=str,
)
def test_images_are_inverted_and_come_back(backbone_with, name, timestep, inversion):
    backbone = backbone_with(name)
    empty, latents = backbone.encode_prompts([""]), 0.3 * backbone.initial_latents([0, 1])
    editor = ImageEditor(backbone, Editing(timestep, 10, inversion))
    noisy = editor.invert(latents, empty)
    images = editor.denoise_towards(noisy, empty, [], [])
    assert noisy.latents.isfinite().all()
    assert images.isfinite().all()
    if inversion != "ddim":
        torch.testing.assert_close(images, backbone.decode_latents(latents).clamp(0, 1), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    "edit",
    [
        TrainingEdit(401),
        TrainingEdit((300, 500), "inversion"),
        TrainingEdit((300, 500), gradient=Checkpointed()),
        TrainingEdit((300, 500), gradient=Reversible()),
    ],
    ids=lambda edit: f"{edit.noising} {edit.gradient}",
)
def test_edits_are_trained_on_evenly_spaced_pipelines(backbone_with, faces, edit):
    sampling = Sampling(steps=10, solver=EDICT() if isinstance(edit.gradient, Reversible) else None)
    task = Caso(
        backbone_with("DPM-Solver"),
        str(faces / "guide"),
        ATTRIBUTES,
        edit=edit,
        sampling=sampling,
        optimizer=no_change,
    )
    _, gradient, _ = one_step(task, image_batch(2))
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("solver", [EDICT(), Leapfrog(), OBELM()], ids=str)
@pytest.mark.parametrize("name", ["Euler", "Euler as it comes"])
def test_tokens_learn_through_reversible_solvers(backbone_with, tiny_models, name, solver):
    batch = PromptBatch(["a photo of a {}"], [3], [0], ["token"])
    guide = ClassifierLoss(str(tiny_models / "guide"))
    gradients = [
        one_step(
            ClassTokens(
                backbone_with(name),
                ["wizard"],
                guide,
                sampling=Sampling(4, 3.0),
                solver=solver,
                gradient=way,
                optimizer=no_change,
            ),
            batch,
        )[1]
        for way in (Reversible(), Stored())
    ]
    assert gradients[1].any()
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


def test_textual_inversion_counts_all_timesteps(backbone_with):
    """At the last timestep the noise is known from the latents alone; the velocity is not."""
    task = TextualInversion(backbone_with("zero terminal SNR"), {"smile": None}, optimizer=no_change)
    batch = image_batch(2, {"smile": torch.tensor([0, 1])})
    task.sample = lambda rng, classes, shape: type(task).sample(task, rng, classes, shape)._replace(timestep=999)
    loss, gradient, _ = one_step(task, batch)
    assert loss > 0.1
    assert gradient.any()
