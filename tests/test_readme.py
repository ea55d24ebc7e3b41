"""What the README shows is what happens."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from tokenlearn.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_diffusers_script_draws_what_predict_draws(tmp_path, monkeypatch):
    (script,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(script.strip().splitlines()) <= 10
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {})
    settings = [
        "--model.init_args.embeddings=[checkpoints/class_tokens/pirate.safetensors]",
        "--data.init_args.prompts=[a portrait of a <pirate> pirate]",
        "--data.init_args.seeds=[7]",
    ]
    config = str(ROOT / "configs" / "portraits" / "generate.yaml")
    main(["predict", "--config", config, "--output_dir", "run", "--trainer.enable_progress_bar=false", *settings])
    (ours,) = Path("run/images").glob("*.png")
    difference = np.asarray(Image.open(ours), dtype=int) - np.asarray(Image.open("pirate.png"), dtype=int)
    assert np.abs(difference).max() <= 1  # rounding to 8 bits may fall to either side


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for config in re.findall(r"configs/[\w/]+\.yaml", README):
        assert (ROOT / config).exists(), config
