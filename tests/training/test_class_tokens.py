import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional

from tokenlearn.data import PromptBatch
from tokenlearn.diffusion import full_chain
from tokenlearn.errors import UserError
from tokenlearn.main import main
from tokenlearn.methods import ClassTokens, TokenTask, class_tokens
from tokenlearn.methods.concepts import SemanticEdit
from tokenlearn.models import StableDiffusion
from tokenlearn.tokens import load_embedding, whole_words

BATCH = PromptBatch(["a photo of a {}", "a portrait of a {}"], [3, 4], [0, 1], ["token", "token"])


def task(models, **options):
    arguments = {"num_inference_steps": 4, "gradient_steps": 2, "guidance_scale": 3.0} | options
    return ClassTokens(
        StableDiffusion(str(models / "pipeline")),
        str(models / "guide"),
        {"wizard": "man with a hat", "pirate": None},
        judge=str(models / "judge"),
        **arguments,
    )


def loss_of(module, batch=BATCH):
    images = module.generate(module.prompts(batch), batch.seeds, module.gradient_steps, module.checkpointing)
    targets = torch.tensor([module.classifier.label_index(module.class_names[index]) for index in batch.class_indices])
    return functional.cross_entropy(module.classifier(images), targets)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_token_gradient_equals_a_plain_loop(tiny_models, checkpointing):
    module = task(tiny_models, checkpointing=checkpointing)
    loss_of(module).backward()
    ours = module.bank.vectors[0].grad.clone()

    module.bank.zero_grad()
    backbone, scheduler = module.backbone, module.backbone.make_scheduler(None, 4)
    scheduler.set_timesteps(4)
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in BATCH.seeds]
    latents = torch.cat(noise)
    for index, timestep in enumerate(scheduler.timesteps):
        if index == 2:
            latents = latents.detach()
        empty = backbone(latents, timestep, backbone.encode_prompts(["", ""]))
        prompts = ["a photo of a <wizard> wizard", "a portrait of a <pirate> pirate"]
        wanted = backbone(latents, timestep, backbone.encode_prompts(prompts))
        latents = scheduler.step(empty + 3.0 * (wanted - empty), timestep, latents).prev_sample
    targets = torch.tensor([1, 2])
    functional.cross_entropy(module.classifier(backbone.decode_latents(latents)), targets).backward()
    reference = module.bank.vectors[0].grad
    assert reference.abs().max() > 0
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


def gradient_of(module):
    images = module.draw_differentiably(module.prompts(BATCH), BATCH.seeds)
    functional.cross_entropy(module.classifier(images), torch.tensor([1, 2])).backward()
    return module.bank.vectors[0].grad


def test_the_checkpointed_chain_is_all_of_the_steps(tiny_models):
    whole, last = (gradient_of(task(tiny_models, chain="checkpointed", gradient_steps=steps)) for steps in (1, 2))
    assert torch.equal(whole, last)
    assert torch.equal(whole, gradient_of(task(tiny_models, gradient_steps=4)))
    assert not torch.equal(whole, gradient_of(task(tiny_models, gradient_steps=1)))


@pytest.mark.parametrize("chain", ["edict", "leapfrog", "o_belm"])
def test_tokens_learn_through_reversible_chains(tiny_models, chain, monkeypatch):
    ours = gradient_of(task(tiny_models, chain=chain))
    stored = functools.partial(full_chain.sample_reversible, constant_memory=False)
    monkeypatch.setattr(full_chain, "sample_reversible", stored)
    reference = gradient_of(task(tiny_models, chain=chain))
    assert reference.abs().max() > 0
    # What is rebuilt on the way back is as far off as a round trip in float32.
    assert (ours - reference).norm() < 0.01 * reference.norm()


@pytest.mark.parametrize(
    "options", [{"detach_inputs": True}, {"edits": [SemanticEdit(concept="hat", warmup_steps=1)]}]
)
def test_reversible_chains_refuse_what_they_cannot_make_again(tiny_models, options):
    with pytest.raises(UserError, match=r"model\.chain leapfrog .* checkpointed or last_k"):
        task(tiny_models, chain="leapfrog", **options)
    task(tiny_models, chain="checkpointed", **options)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_tokens_learn_under_semantic_guidance_and_as_its_concepts(tiny_models, checkpointing):
    edits = [SemanticEdit(concept="hat - <wizard>", scale=4.0, threshold=None, warmup_steps=1, momentum_scale=0.5)]
    module = task(tiny_models, edits=edits, checkpointing=checkpointing)
    batch = PromptBatch(["a photo"], [3], [0], ["token"])  # the token is in the concept alone
    loss_of(module, batch).backward()
    ours = module.bank.vectors[0].grad.clone()

    module.bank.zero_grad()
    backbone, scheduler = module.backbone, module.backbone.make_scheduler(None, 4)
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    momentum = torch.zeros_like(latents)
    for index, timestep in enumerate(scheduler.timesteps):
        if index == 2:
            latents, momentum = latents.detach(), momentum.detach()
        texts = ["", "a photo", "hat", "<wizard>"]
        empty, wanted, plus, minus = (backbone(latents, timestep, backbone.encode_prompts([text])) for text in texts)
        guidance = 4.0 * (plus - minus) + 0.5 * momentum
        momentum = 0.4 * momentum + 0.6 * guidance
        guided = empty + 3.0 * (wanted - empty) + (guidance if index >= 1 else 0)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    functional.cross_entropy(module.classifier(backbone.decode_latents(latents)), torch.tensor([1])).backward()
    reference = module.bank.vectors[0].grad
    assert reference.abs().max() > 0
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


def test_concepts_of_a_fit_may_only_have_its_tokens(tiny_models):
    with pytest.raises(UserError, match="'<nurse>' of concept '<nurse>' is not loaded, only <wizard>, <pirate>"):
        task(tiny_models, edits=[SemanticEdit(concept="<nurse>", warmup_steps=1)])


def test_each_class_has_its_own_token(tiny_models):
    module = task(tiny_models)
    loss_of(module, PromptBatch(["a photo of a {}"], [0], [0], ["token"])).backward()
    gradient = module.bank.vectors[0].grad
    assert gradient[module.bank.rows("<wizard>")].abs().max() > 0
    assert gradient[module.bank.rows("<pirate>")].abs().max() == 0


def test_nothing_else_can_learn(tiny_models):
    module = task(tiny_models)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trainable == {"bank.vectors.0"}
    assert {key.split(".")[0] for key in module.state_dict()} == {"bank"}
    optimized = module.configure_optimizers().param_groups[0]["params"]
    assert [id(parameter) for parameter in optimized] == [id(module.bank.vectors[0])]


def test_a_model_cannot_judge_itself(tiny_models):
    with pytest.raises(UserError, match="must be another model"):
        ClassTokens(
            StableDiffusion(str(tiny_models / "pipeline")),
            str(tiny_models / "guide"),
            {"wizard": None},
            judge=f"{tiny_models}/../{tiny_models.name}/guide",
        )


def test_subject__kinds(tiny_models):
    module = task(tiny_models)
    assert module.subject("wizard", "name") == "wizard"
    assert module.subject("wizard", "token") == "<wizard> wizard"
    assert module.subject("wizard", "described") == "man with a hat"
    with pytest.raises(UserError, match="no description"):
        module.subject("pirate", "described")


def test_hold_norms_keeps_the_vocabularys_range(tiny_models):
    module = task(tiny_models, hold_norms=True)
    module.bank.set("<wizard>", [100 * module.bank.get("<wizard>")[0].detach()])
    module.on_train_batch_end()
    (low, high), norms = module._norm_ranges[0], module.bank.vectors[0].norm(dim=1)
    assert norms.min() >= low * 0.999
    assert norms.max() <= high * 1.001


def test_clipping_treats_tokens_apart(tiny_models):
    module = task(tiny_models)
    gradient = torch.zeros_like(module.bank.vectors[0])
    gradient[module.bank.rows("<wizard>"), 0] = 1e6
    gradient[module.bank.rows("<pirate>"), 0] = 0.5
    module.bank.vectors[0].grad = gradient
    module.configure_gradient_clipping(module.configure_optimizers(), 1.0, "norm")
    assert module.bank.vectors[0].grad[:, 0].tolist() == pytest.approx([1.0, 0.5], rel=1e-3)


def test_a_token_can_start_from_its_classs_name(tiny_models):
    module = task(tiny_models, initial_words="{}")
    for name in ("wizard", "pirate"):
        assert torch.equal(module.bank.get(f"<{name}>")[0], module.vectors_of(name, 1)[0])
    assert not torch.equal(*(module.bank.get(f"<{name}>")[0] for name in ("wizard", "pirate")))


def test_words_are_found_as_trying_them_all_finds_them(tiny_models, monkeypatch):
    module = task(tiny_models, initial_words=None, search_steps=2)
    words = ["man", "king", "hat", "glasses", "night"]
    monkeypatch.setattr(class_tokens, "whole_words", lambda tokenizer: words)
    monkeypatch.setattr(class_tokens, "_SHORTLIST", len(words))
    found = module.find_words("a photo of a {}")
    seeds = list(range(len(words)))
    for name in ("wizard", "pirate"):
        target = module.classifier.label_index(name)
        with torch.no_grad():
            scores = [
                module.classifier(
                    module.generate([f"a photo of a {word} {name}"] * len(seeds), seeds, num_inference_steps=2)
                )
                .log_softmax(dim=1)[:, target]
                .mean()
                .item()
                for word in words
            ]
        assert scores[words.index(found[name])] == pytest.approx(max(scores), abs=1e-5)


def test_a_large_vocabulary_is_narrowed_down_along_the_gradient(tiny_models):
    module = task(tiny_models, initial_words=None, search_words=4)
    words = whole_words(module.backbone.tokenizers[0])
    promising = module._promising(words, "a photo of a {}")
    assert len(promising) <= 4 < len(words)

    module.bank.zero_grad()
    images = module.generate(["a photo of a <wizard>"] * 4, list(range(4)), 2)
    target = module.classifier.label_index("wizard")
    module.classifier(images).log_softmax(dim=1)[:, target].mean().backward()
    gradient = module.bank.vectors[0].grad[0]
    scores = {word: float(module.vectors_of(word, 1)[0] @ gradient) for word in words}
    assert set(sorted(words, key=scores.get)[-2:]) <= set(promising)


def test_only_a_fresh_fit_looks_for_words(tiny_config, tmp_path, monkeypatch):
    searches = []

    def find(self, template):
        searches.append(template)
        return {"wizard": "king", "pirate": "hat"}

    monkeypatch.setattr(ClassTokens, "find_words", find)
    common = {"model.init_args.judge": None, "model.init_args.initial_words": None}
    main(["fit", "--config", tiny_config(common | {"trainer.max_steps": 2})])
    assert searches == ["a photo of a {}"]
    file = tmp_path / "run" / "embeddings" / "wizard.safetensors"
    assert json.loads(load_embedding(file).metadata["config"])["initial_words"] == "king"
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    rest = common | {"trainer.max_steps": 4, "output_dir": str(tmp_path / "rest")}
    main(["fit", "--config", tiny_config(rest), "--ckpt_path", last])
    assert len(searches) == 1
    resumed = torch.load(tmp_path / "rest" / "checkpoints" / "last.ckpt", weights_only=True)
    config = TokenTask.checkpoint_about(resumed)["metadata"]["<wizard>"]["config"]
    assert json.loads(config)["initial_words"] == "king"


def tokens_after(config, *options):
    """Vectors of the last checkpoint of a fit."""
    main(["fit", "--config", config, *options])
    return last_tokens(config)


def last_tokens(config):
    run = Path(yaml.safe_load(Path(config).read_text())["output_dir"])
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"]["bank.vectors.0"]


def test_accumulation_equals_one_large_batch(tiny_config, tmp_path):
    common = {"model.init_args.judge": None, "trainer.max_steps": 2, "trainer.gradient_clip_val": 0.01}
    large = common | {"data.init_args.batch_size": 4, "output_dir": str(tmp_path / "large")}
    small = common | {"trainer.accumulate_grad_batches": 2, "output_dir": str(tmp_path / "small")}
    small["data.init_args.batches_per_epoch"] = 4
    torch.testing.assert_close(
        tokens_after(tiny_config(small, "small")), tokens_after(tiny_config(large, "large")), rtol=0, atol=1e-5
    )


def test_two_processes_equal_one(tiny_config, tmp_path):
    common = {"model.init_args.judge": None, "trainer.max_steps": 2}
    one = common | {"data.init_args.batch_size": 4, "output_dir": str(tmp_path / "one")}
    two = common | {"trainer.devices": 2, "trainer.strategy": "ddp", "output_dir": str(tmp_path / "two")}
    config = tiny_config(two, "two")
    run = [sys.executable, "-m", "tokenlearn", "fit", "--config", config]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(last_tokens(config), tokens_after(tiny_config(one, "one")), rtol=0, atol=1e-5)


def test_killed_and_resumed_equals_uninterrupted(tiny_config, tmp_path):
    scheduler = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 7}}
    common = {
        "model.init_args.judge": None,
        "model.init_args.lr_scheduler": scheduler,
        "data.init_args.batches_per_epoch": 4,
        "checkpoint.every_n_train_steps": 1,
        "checkpoint.monitor": None,
    }
    whole = tokens_after(
        tiny_config(common | {"trainer.max_steps": 7, "output_dir": str(tmp_path / "whole")}, "whole")
    )
    for stop in (3, 4):  # in the middle and at the end of an epoch
        output = {"output_dir": str(tmp_path / f"part{stop}")}
        tokens_after(tiny_config(common | output | {"trainer.max_steps": stop}, "part"))
        rest = tiny_config(common | {"trainer.max_steps": 7, "output_dir": str(tmp_path / f"rest{stop}")}, "rest")
        last = str(tmp_path / f"part{stop}" / "checkpoints" / "last.ckpt")
        assert torch.equal(tokens_after(rest, "--ckpt_path", last), whole)


def test_bf16_keeps_tokens_in_fp32(tiny_config):
    tokens = tokens_after(tiny_config({"trainer.precision": "bf16-mixed", "model.init_args.judge": None}))
    assert tokens.dtype == torch.float32


def test_fit_leaves_everything_that_it_names(tiny_config, tmp_path, capsys):
    main(["fit", "--config", tiny_config()])
    run = tmp_path / "run"
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1] == str(run)
    summary = json.loads((run / "summary.json").read_text())
    assert {"judged_accuracy_before", "judged_accuracy_after", "embeddings", "minutes"} <= summary.keys()
    assert summary["embeddings"] == [str(run / "embeddings" / f"{name}.safetensors") for name in ("wizard", "pirate")]
    for path in summary["embeddings"]:
        assert path in out
        (vectors,) = load_file(path).values()
        assert vectors.shape == (1, 16)
    for name in ("config.yaml", "table.csv", "table.png", "before_after.png"):
        assert (run / name).is_file()
    assert list(run.glob("events.out.tfevents*"))
    assert list((run / "pictures").glob("*.png"))
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        assert checkpoint.stat().st_size < 2**20
    assert not list(run.rglob(".*-*"))


def test_the_first_bad_loss_stops_the_run_and_keeps_the_good_files(tiny_config, tmp_path, monkeypatch, capsys):
    steps = []
    real = ClassTokens.generate

    def overflow_at_third_step(self, *args, **kwargs):
        images = real(self, *args, **kwargs)
        if self.trainer.training:
            steps.append(1)
        return images * float("nan") if len(steps) == 3 else images

    monkeypatch.setattr(ClassTokens, "generate", overflow_at_third_step)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", tiny_config()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite at step 2" in error
    (vectors,) = load_file(tmp_path / "run" / "embeddings" / "wizard.safetensors").values()
    assert vectors.isfinite().all()
