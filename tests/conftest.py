import huggingface_hub.constants
import pytest
import yaml

from tests.tiny import tiny_classifier, tiny_pipeline

CLASSES = ["ordinary person", "wizard", "pirate"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folders of a tiny pipeline and of two tiny classifiers, one to guide and one to judge."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder / "pipeline")
    for name in ("guide", "judge"):
        tiny_classifier(folder / name, CLASSES)
    return folder


@pytest.fixture
def tiny_config(tiny_models, tmp_path):
    """Write a class token config for the tiny models, with changes: ``tiny_config({"trainer.max_steps": 2})``."""

    def write(changes=None, name="tiny"):
        config = {
            "seed_everything": 0,
            "model": {
                "class_path": "ClassTokens",
                "init_args": {
                    "backbone": {
                        "class_path": "StableDiffusion",
                        "init_args": {"pretrained": str(tiny_models / "pipeline")},
                    },
                    "classes": {"wizard": "man with a hat", "pirate": None},
                    "objective": {
                        "class_path": "ClassifierLoss",
                        "init_args": {"classifier": str(tiny_models / "guide")},
                    },
                    "judge": {
                        "class_path": "ClassifierLoss",
                        "init_args": {"classifier": str(tiny_models / "judge")},
                    },
                    "sampling": {"steps": 4, "guidance": 7.0},
                    "gradient": {"class_path": "LastK", "init_args": {"steps": 2}},
                },
            },
            "data": {
                "class_path": "PromptDataModule",
                "init_args": {
                    "templates": ["a photo of a {}", "a portrait of a {}"],
                    "batch_size": 2,
                    "batches_per_epoch": 2,
                    "validation_images": 2,
                    "test_images": 2,
                    "eval_batch_size": 4,
                },
            },
            "trainer": {
                "max_steps": 4,
                "accelerator": "cpu",
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
            },
            "output_dir": str(tmp_path / "run"),
        }
        for key, value in (changes or {}).items():
            *parents, last = key.split(".")
            section = config
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return str(path)

    return write
