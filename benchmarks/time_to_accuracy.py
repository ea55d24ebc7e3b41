"""Seconds to learn class tokens, beside the published settings: ``uv run python benchmarks/time_to_accuracy.py``.

Both trainings have the classes, models, prompts and sampler of a config, start from its words, and are judged on the
same held-out seeds before the first step and every few seconds of training. The clock counts training alone, not the
checks. The rival has the settings of the released code (https://arxiv.org/abs/2303.17155): the gradient of the last
step, one image per step of the sampler and five per optimizer step, AdamW with learning rate 0.00125 and weight decay
0.01, guidance of sampling, and one fixed set of five seeds.

The last line is JSON: ``ours_seconds``, ``published_seconds`` and ``speedup``. A training that reaches the cap before
the accuracy has the cap as its seconds and is named in ``capped``; the speedup is then a bound, such as ``>= 4.2``, or
null if both did.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import lightning as L
from jsonargparse import auto_cli
from torch.optim import AdamW

from benchmarks.class_token_gradient import AccuracyOverTime
from benchmarks.common import fit_quietly, parse_judged_config
from tokenlearn.data.batches import PromptBatch
from tokenlearn.diffusion import LastK
from tokenlearn.errors import UserError

_PUBLISHED_SEEDS = 5
_MOST_STEPS = 100_000  # the accuracy or the cap ends a training before


class UntilAccurate(AccuracyOverTime):
    """Stop a training at an accuracy, or at a number of seconds.

    Args:
        accuracy: judged accuracy to reach.
        cap: seconds of training after which the training stops.
        fixed_seeds: number of seeds that training images start from in turn; None for fresh ones.

    Attributes:
        reached: seconds until the accuracy, None before.
    """

    def __init__(self, accuracy: float, cap: float, fixed_seeds: int | None = None) -> None:
        super().__init__()
        self.accuracy, self.cap, self.fixed_seeds = accuracy, cap, fixed_seeds
        self.reached: float | None = None

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: PromptBatch,
        *args: Any,  # noqa: ANN401 - no argument is used
    ) -> None:
        """Take the fixed seeds, and start the clock."""
        if self.fixed_seeds is not None:
            batch.seeds[:] = [seed % self.fixed_seeds for seed in batch.seeds]
        super().on_train_batch_start()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a check, print it, and stop where it is good enough or late enough."""
        super().on_validation_end(trainer, pl_module)
        step, seconds, accuracy = self.checks[-1]
        print(f"  step {step}, {seconds:.0f} s: {accuracy:.1%}", flush=True)
        if self.reached is None and accuracy >= self.accuracy:
            self.reached = seconds
        trainer.should_stop = self.reached is not None or seconds >= self.cap


def published() -> dict[str, Any]:
    """Settings that differ from a config, by their keys."""
    return {
        "model.init_args.gradient": LastK(1, checkpointing=False),
        "model.init_args.guidance": None,
        "model.init_args.hard_classes": 0.0,
        "model.init_args.tokens.hold_norms": False,
        "model.init_args.optimizer": lambda params: AdamW(params, lr=1.25e-3, weight_decay=0.01),
        "model.init_args.lr_scheduler": None,
        "data.init_args.batch_size": 1,
        "trainer.accumulate_grad_batches": 5,
    }


def speedup(seconds: Mapping[str, float], capped: Collection[str]) -> float | str | None:
    """How much sooner ours is there: a ratio, a bound in words where one was capped, None where both were.

    Args:
        seconds: of ``ours`` and ``published``.
        capped: those whose seconds are the cap.
    """
    ratio = round(seconds["published"] / seconds["ours"], 2)
    if len(capped) == 2:
        return None
    if "published" in capped:
        return f">= {ratio:g}"
    return f"<= {ratio:g}" if "ours" in capped else ratio


def main(
    fit_config: str = "configs/quickstart.yaml",
    accuracy: float = 0.85,
    images: int = 16,
    cap: float = 1200.0,
    check_every: int = 20,
    seed: int = 0,
) -> None:
    """Train both, and print the seconds.

    Args:
        fit_config: config of a training with :class:`tokenlearn.training.ClassTokens` and a judge.
        accuracy: mean judged accuracy to reach, at most 1.
        images: images of each class in a check.
        cap: seconds of training after which a training stops.
        check_every: optimizer steps between checks.
        seed: seed of everything that is random.

    Raises:
        UserError: if a number is out of range, or the config has no judge.
    """
    if not 0 < accuracy <= 1 or cap <= 0 or check_every < 1:
        raise UserError(
            f"accuracy must be above 0 and at most 1, cap above 0 and check_every at least 1, got {accuracy:g}, "
            f"{cap:g} and {check_every}"
        )
    settings = parse_judged_config(fit_config)
    seconds: dict[str, float] = {}
    capped = []
    for name, changes, fixed_seeds, batches in (
        ("ours", {}, None, check_every),
        ("published", published(), _PUBLISHED_SEEDS, 5 * check_every),
    ):
        print(name)
        clock = UntilAccurate(accuracy, cap, fixed_seeds)
        changed = changes | {
            "data.init_args.validation_images": images,
            "data.init_args.eval_batch_size": images,
            "data.init_args.batches_per_epoch": batches,  # the end of an epoch would cut an accumulation short
        }
        fit_quietly(settings, changed, seed, clock, _MOST_STEPS, batches)
        seconds[name] = cap if clock.reached is None else clock.reached
        capped += [name] if clock.reached is None else []
    print(
        json.dumps(
            {f"{name}_seconds": round(value, 1) for name, value in seconds.items()}
            | {"speedup": speedup(seconds, capped), "capped": capped}
        )
    )


if __name__ == "__main__":
    auto_cli(main)
