"""The nodes of ComfyUI on a stand-in of it: equal to tokenlearn's SEGA, strengths where weights are ignored."""

import importlib
import itertools
import sys

import pytest
import torch

from tests.integrations import comfy_stand_in as comfy
from tests.tiny import tiny_pipeline
from tokenlearn.diffusion import sample
from tokenlearn.errors import UserError
from tokenlearn.guidance import ClassifierFreeGuidance, Concept, ConceptSettings, GuidedModel, SemanticGuidance
from tokenlearn.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from tokenlearn.integrations.comfyui.strengths import tokenize_with_strengths
from tokenlearn.models import StableDiffusion

STEPS, SCALE = 5, 4.0
PROMPTS = {"positive": "a portrait of a man", "negative": "", "glasses": "glasses", "king": "king", "man": "man"}
GUIDER = "tokenlearn.integrations.comfyui.guider"


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """ComfyUI's modules; the guider is imported anew with them."""
    samplers = comfy.install(monkeypatch)
    monkeypatch.delitem(sys.modules, GUIDER, raising=False)
    yield samplers
    sys.modules.pop(GUIDER, None)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return StableDiffusion(str(tiny_pipeline(tmp_path_factory.mktemp("sd")))).double()


@pytest.fixture(scope="module")
def encoded(backbone):
    with torch.no_grad():
        return {name: backbone.encode_prompts([text]) for name, text in PROMPTS.items()}


@pytest.fixture(scope="module")
def conditionings(encoded):
    """Prompts as ComfyUI passes them between nodes."""
    return {name: [[item.prompt_embeds, {}]] for name, item in encoded.items()}


@pytest.fixture(scope="module")
def euler(backbone):
    return backbone.make_scheduler("EulerDiscrete")


@pytest.fixture
def model(backbone, encoded, euler):
    """The tiny model as ComfyUI runs it: noise levels are sigmas, predictions are clean latents."""
    euler.set_timesteps(STEPS)

    @torch.no_grad()
    def predict(x, sigma, states):
        timestep = euler.timesteps[(euler.sigmas[:-1] - sigma).abs().argmin()]
        (like,) = [item for item in encoded.values() if torch.equal(item.prompt_embeds, states)]
        noise = backbone(x / (1 + sigma**2).sqrt(), timestep, like.expand(len(x)))
        return x - sigma * noise

    return comfy.ModelPatcher(comfy.InnerModel(predict))


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def concept(scale, **changes):
    """Inputs of the concept's node, as a workflow gives them."""
    required = NODE_CLASS_MAPPINGS["TokenlearnSegaConcept"].INPUT_TYPES()["required"]
    defaults = {name: options["default"] for name, (_, options) in required.items() if name != "concept"}
    return defaults | {"scale": scale} | changes


def made(model, conditionings, scale, cfg=SCALE, after="own_warmup"):
    """The guider of a workflow with two concepts: glasses, and a king minus a man."""
    add, make = (NODE_CLASS_MAPPINGS[f"TokenlearnSega{name}"]() for name in ("Concept", "Guider"))
    moved = concept(scale, threshold=0.71, warmup_steps=1, momentum_scale=0.3)
    (concepts,) = add.add(conditionings["glasses"], **moved)
    plain = concept(-scale / 2, threshold=0, warmup_steps=2)
    (concepts,) = add.add(conditionings["king"], **plain, minus=conditionings["man"], concepts=concepts)
    (guider,) = make.make(model, conditionings["positive"], conditionings["negative"], concepts, cfg, "tensor", after)
    return guider


def run(guider, noise, sigmas, heun=False):
    return guider.sample(noise, torch.zeros_like(noise), comfy.EulerSampler(heun), sigmas)


def ours(backbone, encoded, noise, rule, terms):
    """The same images by tokenlearn, with the same scheduler's levels."""
    prompts = rule.conditionings(encoded["negative"], encoded["positive"], *(encoded[term] for term in terms))
    with torch.no_grad():
        solver = backbone.make_solver("EulerDiscrete", STEPS)
        return sample(GuidedModel(backbone, rule, prompts), noise, solver=solver).double()


@pytest.mark.parametrize("after", ["own_warmup", "all_warmups"])
def test_the_guider_is_tokenlearns_sega(model, backbone, encoded, conditionings, euler, noise, after):
    rule = SemanticGuidance(
        SCALE,
        [
            Concept(ConceptSettings(8.0, 0.71, 1, momentum_scale=0.3)),
            Concept(ConceptSettings(-4.0, None, 2), (1, -1)),
        ],
        momentum_after=after,
    )
    expected = ours(backbone, encoded, noise, rule, ["glasses", "king", "man"])
    sigmas = euler.sigmas.double()
    scaled = noise * euler.init_noise_sigma / sigmas[0]  # diffusers begins at sqrt(sigma^2 + 1), ComfyUI at sigma
    found = run(made(model, conditionings, 8.0, after=after), scaled, sigmas)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = ours(backbone, encoded, noise, ClassifierFreeGuidance(SCALE), [])
    assert (found - plain).abs().mean() > 0.02


def test_scale_0_is_comfyuis_own_guidance_exactly(model, conditionings, euler, noise, program):
    plain = program.CFGGuider(model)
    plain.set_conds(conditionings["positive"], conditionings["negative"])
    plain.set_cfg(SCALE)
    sigmas = euler.sigmas.double()
    assert torch.equal(run(made(model, conditionings, 0.0), noise, sigmas), run(plain, noise, sigmas))
    assert model.model.calls == [2] * 2 * STEPS


def test_concepts_are_evaluated_with_the_prompts_in_one_call(model, conditionings, euler, noise):
    run(made(model, conditionings, 8.0), noise, euler.sigmas.double())
    assert model.model.calls == [5] * STEPS  # momentum gathers before the warm-ups are over
    model.model.calls.clear()
    run(made(model, conditionings, 8.0, cfg=1.0), noise, euler.sigmas.double())
    assert model.model.calls == [5] * STEPS


def test_velocity_of_a_flow_model(conditionings, noise):
    """``(x - x0) / sigma`` of a flow model is its velocity: the guider steps as the rule on velocities does."""

    def velocity(x, sigma, states):
        return torch.tanh(x * (1 + sigma) + states.double().mean() * 40 + states.double().std() * x.roll(1, -1))

    flow = comfy.ModelPatcher(comfy.InnerModel(lambda x, sigma, states: x - sigma * velocity(x, sigma, states)))
    sigmas = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.2, 0.0], dtype=torch.float64)
    found = run(made(flow, conditionings, 3.0), noise, sigmas)
    parts = [
        Concept(ConceptSettings(3.0, 0.71, 1, momentum_scale=0.3)),
        Concept(ConceptSettings(-1.5, None, 2), (1, -1)),
    ]
    rule = SemanticGuidance(SCALE, parts).fresh()
    states = [conditionings[name][0][0] for name in ("negative", "positive", "glasses", "king", "man")]
    x = noise
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        x = x + (following - sigma) * rule([velocity(x, sigma, states[index]) for index in rule.needed(step)], step)
    torch.testing.assert_close(found, x)


def test_further_evaluations_of_a_sampler_belong_to_its_step(model, conditionings, euler, noise, monkeypatch):
    steps = []
    guider = made(model, conditionings, 8.0)
    needed = guider._rule.needed
    monkeypatch.setattr(guider._rule, "needed", lambda step: steps.append(step) or needed(step))
    run(guider, noise, euler.sigmas.double(), heun=True)
    assert steps == [0, 1, 1, 2, 2, 3, 3, 4, 4]  # the second evaluation of a step is at the next step's level


def test_hooks_of_other_nodes_act_on_the_prompts_guidance(model, conditionings, euler, noise):
    seen = []
    model.model_options |= {
        "sampler_pre_cfg_function": [lambda given: seen.append(len(given["conds_out"])) or given["conds_out"]],
        "sampler_post_cfg_function": [lambda given: seen.append("post") or given["denoised"]],
    }
    run(made(model, conditionings, 8.0), noise, euler.sigmas.double())
    assert seen == [2, "post"] * STEPS


def test_a_warm_up_of_all_steps_is_one_line(model, conditionings, euler, noise):
    (concepts,) = NODE_CLASS_MAPPINGS["TokenlearnSegaConcept"]().add(conditionings["king"], **concept(5.0))
    make = NODE_CLASS_MAPPINGS["TokenlearnSegaGuider"]().make
    (guider,) = make(
        model, conditionings["positive"], conditionings["negative"], concepts, SCALE, "tensor", "own_warmup"
    )
    with pytest.raises(UserError, match="warmup_steps 10 of a concept leaves no step of 5"):
        run(guider, noise, euler.sigmas.double())


def test_nodes_are_as_comfyui_wants_them():
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        code = getattr(node, node.FUNCTION).__code__
        arguments = code.co_varnames[1 : code.co_argcount]
        assert set(arguments) == {name for kind in inputs.values() for name in kind}
        assert isinstance(node.RETURN_TYPES, tuple)
        assert node.CATEGORY == "tokenlearn"


def test_the_pack_is_imported_without_comfyui(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tokenlearn.integrations.comfyui")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "comfy", None)
    assert importlib.import_module("tokenlearn.integrations.comfyui").NODE_CLASS_MAPPINGS


SMILE, HAT = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])


@pytest.fixture
def clip():
    wide = {"l": HAT, "t5xxl": torch.cat([HAT, HAT], dim=1)}
    return comfy.Clip({"smile-tl": {"l": SMILE, "t5xxl": 2 * SMILE}, "hat-tl": wide, "clip-only": {"l": HAT}})


def vectors(tokens, encoder):
    return [unit[0].tolist() for batch in tokens[encoder] for unit in batch if isinstance(unit[0], torch.Tensor)]


def test_strengths_multiply_vectors_in_all_encoders(clip):
    text = "a embedding:smile-tl*1.5 man, embedding:hat-tl*-2 and embedding:smile-tl again, embedding:clip-only*3"
    (encode,) = [NODE_CLASS_MAPPINGS["TokenlearnTextEncode"]()]
    assert encode.encode(clip, text)[0][0][0].shape == (1, 77, 8)
    smile, hat = (1.5 * SMILE).tolist(), (-2 * HAT).tolist()
    assert vectors(clip.encoded, "l") == [*smile, *hat, *SMILE.tolist(), *(3 * HAT).tolist()]
    assert vectors(clip.encoded, "t5xxl") == [*(3 * SMILE).tolist(), [-10, -12, -10, -12], *(2 * SMILE).tolist()]
    plain = clip.tokenize(text.replace("*1.5", "").replace("*-2", "").replace("*3", ""))
    words = [
        [unit for batch in tokens["t5xxl"] for unit in batch if isinstance(unit[0], int)]
        for tokens in (plain, clip.encoded)
    ]
    assert words[0] == words[1]


def test_a_prompt_without_strengths_is_comfyuis_own(clip):
    text = "a (man with embedding:hat-tl:1.2) and embedding:unknown"
    assert str(tokenize_with_strengths(clip, text)) == str(clip.tokenize(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a embedding:smile-tl*x man", r"strength 'x'; write a number, as in embedding:smile-tl\*1.5"),
        ("a embedding:Smile-tl*2 man", "found no vectors of embedding:Smile-tl"),
    ],
)
def test_wrong_strengths_are_one_line(clip, text, message):
    with pytest.raises(UserError, match=message) as raised:
        tokenize_with_strengths(clip, text)
    assert "\n" not in str(raised.value)
