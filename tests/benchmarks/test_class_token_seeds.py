import json

import pytest
from safetensors.torch import load_file

from benchmarks import class_token_seeds
from benchmarks.class_token_seeds import Judged, figures
from tokenlearn.errors import UserError
from tokenlearn.main import main


def test_figures_by_hand():
    tables = {
        0: {"wizard": Judged(8, 10), "pirate": Judged(4, 10)},
        3: {"wizard": Judged(10, 10), "pirate": Judged(4, 10)},
    }
    found = figures(tables)
    assert found["classes"]["wizard"]["mean"] == pytest.approx(0.9)
    assert found["classes"]["wizard"]["lowest"] == 0.8
    assert found["classes"]["wizard"]["interval"] == pytest.approx([0.699, 0.972], abs=1e-3)  # of 18 of 20
    assert found["seeds"] == {0: pytest.approx(0.6), 3: pytest.approx(0.7)}
    assert found["mean"] == pytest.approx(0.65)
    assert found["interval"] == pytest.approx([0.65 - 12.7062 * 0.05, 1.0], abs=1e-4)  # the upper end is 1.29
    assert figures({0: tables[0]})["interval"] is None


def test_every_seed_is_trained_once(tiny_config, tmp_path, capsys, monkeypatch):
    config, folder = tiny_config({"trainer.max_steps": 2}), tmp_path / "seeds"
    trained = []
    monkeypatch.setattr(class_token_seeds, "tokenlearn", lambda words: trained.append(words) or main(words))
    settings = {"fit_config": config, "seeds": (0, 7), "output_dir": str(folder)}
    class_token_seeds.main(**settings)
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert list(found["classes"]) == ["wizard", "pirate"]
    assert list(found["minutes"]) == ["0", "7"]
    table = max(place for place, line in enumerate(lines) if line.startswith("class "))
    assert lines[table].split()[-4:] == ["seed", "0", "seed", "7"]
    assert lines[table + 3].startswith(f"mean {found['mean']:.1%} [")
    first, second = (load_file(folder / f"seed{seed}" / "embeddings" / "wizard-tl.safetensors") for seed in (0, 7))
    assert any(not first[name].equal(second[name]) for name in first)
    assert len(trained) == 2

    class_token_seeds.main(**settings)
    assert len(trained) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    # A fit that was stopped before its table continues from its last step.
    (folder / "seed7" / "summary.json").unlink()
    class_token_seeds.main(**settings)
    assert len(trained) == 3
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["classes"] == found["classes"]
    assert again["minutes"]["0"] == found["minutes"]["0"]
    with pytest.raises(UserError, match=r"has runs with another config or other options"):
        class_token_seeds.main(**settings, options=("--trainer.max_steps=3",))


def test_bad_seeds_are_one_line():
    with pytest.raises(UserError, match=r"seeds must be different.*\[1, 1\]"):
        class_token_seeds.main(seeds=(1, 1))
