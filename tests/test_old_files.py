"""Checkpoints and embedding files from before the settings had their present names still load."""

from pathlib import Path

import pytest
import torch

from tokenlearn.main import main
from tokenlearn.pipeline import Pipeline, Sampling
from tokenlearn.tokens import load_embedding, vocabulary_hash
from tokenlearn.tokens.checkpoint import checkpoint_about

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).parent / "old_files"
TOKENS = {"class_tokens": "<pirate>", "caso": "<smile>", "textual_inversion": "<ti-smile>"}
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SHORT = [
    "--model.sampling.steps=4",
    "--model.gradient=LastK",
    "--model.gradient.steps=3",
    "--model.tokens.hold_norms=false",
    "--model.lr_scheduler=null",
    "--model.judge=null",
    "--data.batch_size=3",
    "--data.batches_per_epoch=2",
    "--data.validation_images=1",
    "--trainer.max_steps=3",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.mark.parametrize("method", TOKENS)
def test_embedding_files(method):
    pipe = Pipeline.from_pretrained(str(ROOT / "checkpoints" / "portraits"), sampling=Sampling(steps=2))
    path = OLD / f"{method}.safetensors"
    file = load_embedding(path)
    assert (file.token, file.metadata["method"]) == (TOKENS[method], method)
    with pytest.warns(UserWarning, match="text encoder differs"):  # the bundled one has been trained on since
        with_token = pipe.with_tokens([str(path)])
    prompts = [f"a portrait of a {TOKENS[method]} person", "a portrait of a person"]
    with torch.no_grad():
        images = with_token.generate(prompts, [1, 1])
    assert not torch.equal(*images)


@pytest.mark.parametrize("method", TOKENS)
def test_checkpoints_are_exported(method, tmp_path, capsys):
    main(["export", "--ckpt_path", str(OLD / f"{method}.ckpt"), "--output_dir", str(tmp_path)])
    checkpoint = torch.load(OLD / f"{method}.ckpt", weights_only=True)
    tokens = list(checkpoint_about(checkpoint)["num_vectors"])
    assert len(capsys.readouterr().out.split()) == len(tokens)
    for row, token in enumerate(tokens):
        vectors = load_embedding(tmp_path / f"{token.strip('<>')}-tl.safetensors").vectors[0]
        assert torch.equal(vectors, checkpoint["state_dict"]["bank.vectors.0"][row : row + 1])


def test_a_fit_goes_on_from_an_old_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run = ["fit", "--config", str(QUICKSTART), "--output_dir", str(tmp_path / "run"), *SHORT]
    run += ["--model.tokens.num_vectors", "1"]
    with pytest.raises(SystemExit):
        main([*run, "--ckpt_path", str(OLD / "class_tokens.ckpt")])
    assert "text encoder differs" in capsys.readouterr().err  # the bundled one has been trained on since

    before = torch.load(OLD / "class_tokens.ckpt", weights_only=True)
    text_encoder = Pipeline.from_pretrained("checkpoints/portraits").backbone.text_encoders[0]
    checkpoint_about(before)["vocabulary_hash"] = vocabulary_hash(text_encoder)
    torch.save(before, tmp_path / "old.ckpt")
    main([*run, "--ckpt_path", str(tmp_path / "old.ckpt")])
    after = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (before["global_step"], after["global_step"]) == (2, 3)
    start, end = (checkpoint["state_dict"]["bank.vectors.0"] for checkpoint in (before, after))
    assert 0 < (end - start).abs().max() < 0.05
    metadata = checkpoint_about(after)["metadata"]["<pirate>"]
    assert metadata["config"].count("initial_words") == 1
