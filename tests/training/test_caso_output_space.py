"""CASO's tokens in the text encoder's output."""

import pytest
import torch

from tests.training.caso_tasks import ATTRIBUTES, TOKENS, Faces, image_batch, targets_of, tokens_of
from tests.training.runs import fit, no_change, one_step
from tokenlearn.editing import Editing
from tokenlearn.errors import UserError
from tokenlearn.evaluation import AttributeEdits
from tokenlearn.export import export
from tokenlearn.generation import Generate
from tokenlearn.learning import learn
from tokenlearn.losses import CasoObjective
from tokenlearn.tokens import load_embedding
from tokenlearn.tokens.directions import PairTemplates, find_direction
from tokenlearn.tokens.settings import TokenSettings
from tokenlearn.training import Caso, Initialisation, TextualInversion, adamw

OUTPUT = TokenSettings(space="output", initial_words="glasses")
PROMPTS = {
    "smile": "a portrait of a smiling man",
    "no smile": "a portrait of a man",
    "black": "a portrait of a king",
    "brown": "a portrait of a queen",
    "red": "a portrait of a clown",
}
DIRECTION = Initialisation(
    "direction", prompts=PROMPTS, directions=PairTemplates(["a portrait of a {}", "a photo of a {}"])
)


@pytest.fixture
def make(backbone, faces):
    def task(**settings):
        settings = {"judge": str(faces / "judge"), "optimizer": no_change, "tokens": OUTPUT} | settings
        return Caso(backbone, str(faces / "guide"), ATTRIBUTES, **settings)

    return task


def test_the_gradient_is_that_of_a_plain_loop(make):
    """The parameter is added to the outputs for the empty prompt, and guidance moves along it."""
    task, batch = make(objective=CasoObjective(reconstruction_weight=1.0)), image_batch(6)
    targets = targets_of(task, batch)
    loss, gradient, _ = one_step(task, batch)

    backbone, process = task.backbone, task.backbone.process
    vectors = task.bank.vectors[0].detach().clone().requires_grad_()
    clean = backbone.encode_images(batch.images)
    empty = backbone.encode_prompts([""])
    losses = []
    for row, token in enumerate(tokens_of(targets)):
        timestep = targets.timesteps[row]
        noisy = process.add_noise(clean[row, None], targets.noise[row, None], timestep[None])
        shifted = backbone.add_to_outputs(empty, vectors[None, TOKENS.index(token)], "output")
        without, prompted = (backbone(noisy, timestep, conditioning) for conditioning in (empty, shifted))
        edited = process.x0(noisy, without + 10 * (prompted - without), timestep)
        logits = task.classifier(backbone.decode_latents(edited))[0]
        attribute, target = targets.attributes[row], int(targets.classes[row])
        logits = torch.stack([-logits[0] / 2, logits[0] / 2]) if attribute == 0 else logits[2:5]
        losses.append((edited - clean[row, None]).square().mean() - logits.log_softmax(dim=0)[target])
    expected = torch.stack(losses).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    (found,) = torch.autograd.grad(expected, vectors)
    assert found.abs().max() > 0
    torch.testing.assert_close(gradient, found, rtol=1e-3, atol=1e-3 * float(found.abs().max()))


def test_tokens_start_at_words_or_at_directions(make):
    task = make()
    states = [task.backbone.encode_prompts([words]).prompt_embeds[0].mean(dim=0) for words in ("", "glasses")]
    for token in TOKENS:
        torch.testing.assert_close(task.bank.get(token)[0][0], states[1] - states[0], rtol=1e-4, atol=1e-6)

    task = make(initialisation=DIRECTION)
    smile = find_direction(
        task.pipeline,
        ["a portrait of a smiling man", "a photo of a smiling man"],
        ["a portrait of a man", "a photo of a man"],
    )
    vectors = {token: task.bank.get(token)[0][0] for token in TOKENS}
    torch.testing.assert_close(vectors["<smile>"], smile.unit * smile.vector, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vectors["<no-smile>"], -vectors["<smile>"], rtol=1e-4, atol=1e-6)
    three = torch.stack([vectors[token] for token in ("<black>", "<brown>", "<red>")])
    # Each class against the mean of both others: they add up to zero.
    torch.testing.assert_close(three.sum(dim=0), torch.zeros(16), rtol=0, atol=1e-5)
    content = make(initialisation=DIRECTION, tokens=TokenSettings(space="output_content"))
    torch.testing.assert_close(content.bank.get("<smile>")[0][0], vectors["<smile>"] * 77 / 76, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss_and_the_start_is_kept(make):
    task = make(initialisation=DIRECTION, optimizer=lambda parameters: adamw(parameters))
    start = task.bank.vectors[0].detach().clone()
    batch = image_batch(8)
    before = one_step(make(initialisation=DIRECTION), batch)[0]
    tokens = learn(task, Faces([batch] * 30), max_steps=30, accelerator="cpu", enable_progress_bar=False)
    learned = make()
    learned.bank.load_state_dict(tokens.bank.state_dict())
    assert one_step(learned, batch)[0] < before
    assert not torch.equal(tokens.bank.vectors[0], start)
    assert set(tokens.bank.spaces.values()) == {"output"}


def test_checkpoints_and_files_are_of_the_output_space(make, backbone, tmp_path):
    task, data = make(), Faces([image_batch(2)])
    trainer = fit(task, data, max_steps=1)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    written = export(str(path), output_dir=str(tmp_path / "files"))
    assert {load_embedding(file).space for file in written} == {"output"}
    assert load_embedding(written[0]).metadata["method"] == "caso"
    checkpoint = torch.load(path, weights_only=True)

    generate = Generate(backbone)
    generate.on_load_checkpoint(checkpoint)
    generate.load_state_dict(checkpoint["state_dict"], strict=False)
    ours, theirs = (item.pipeline.encode(["a king <smile>"]).prompt_embeds for item in (generate, task))
    assert torch.equal(ours, theirs)
    make().on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match=r"of the space output, .* of input; set model\.tokens\.space to output"):
        make(tokens=TokenSettings()).on_load_checkpoint(checkpoint)

    names = [str(file) for file in written]
    started = make(tokens=TokenSettings(space="output", initial_embeddings=names))
    assert torch.equal(started.bank.vectors[0], task.bank.vectors[0])
    with pytest.raises(UserError, match="has a token of the space output"):
        make(tokens=TokenSettings(initial_embeddings=names))


def test_random_tokens_of_the_evaluation_are_as_long_as_the_learned(make):
    task = make(initialisation=DIRECTION)
    bank = AttributeEdits(editing=Editing(601, 5)).of(task).random_bank()
    assert bank.spaces == task.bank.spaces
    torch.testing.assert_close(bank.vectors[0].norm(dim=1), task.bank.vectors[0].norm(dim=1))
    assert not torch.allclose(bank.vectors[0], task.bank.vectors[0])


def test_bad_settings(make, backbone):
    with pytest.raises(UserError, match=r"tokens\.space is input; set tokens\.space"):
        make(initialisation=DIRECTION, tokens=TokenSettings())
    with pytest.raises(UserError, match=r"kind vocabulary .* tokens\.space is output"):
        make(initialisation=Initialisation("vocabulary"))
    with pytest.raises(UserError, match=r"initialisation\.prompts is empty"):
        Initialisation("direction")
    with pytest.raises(UserError, match=r"prompts has smile"):
        Initialisation(prompts={"smile": "a smile"})
    with pytest.raises(UserError, match="'blond', which is no class"):
        make(initialisation=Initialisation("direction", prompts=PROMPTS | {"blond": "a portrait of a x"}))
    with pytest.raises(UserError, match=r"tokens\.num_vectors"):
        TokenSettings(space="output", num_vectors=2)
    with pytest.raises(UserError, match=r"tokens\.hold_norms"):
        TokenSettings(space="output", hold_norms=True)
    with pytest.raises(UserError, match=r"TextualInversion learns tokens of the input space"):
        TextualInversion(backbone, {"smile": None}, tokens=OUTPUT)
