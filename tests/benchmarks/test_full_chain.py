import json
import math

import pytest
from lightning.fabric import Fabric

from benchmarks import full_chain
from tokenlearn.errors import UserError
from tokenlearn.models import StableDiffusion

BATCH = 2
NAMES = ("autograd", "checkpointed", "edict", "leapfrog", "o_belm")


def test_prints_ratios_and_evaluates_no_row_in_vain(tiny_models, capsys):
    full_chain.main(
        pipeline=str(tiny_models / "pipeline"),
        steps=(2, 4, 10),
        batch_size=BATCH,
        repetitions=1,
        accelerator="cpu",
    )
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])
    ratio = "default_over_edict_time"
    memory = {f"{name}_memory_10_over_2" for name in NAMES}
    errors = {f"{name}_error" for name in NAMES}
    assert set(results) == {ratio, *memory, *errors, *(f"{ratio}_steps{count}" for count in (2, 4, 10))}
    assert all(math.isfinite(value) for value in results.values())
    assert all(results[key] > 0 for key in set(results) - errors)
    assert results["autograd_error"] == 0
    assert results["checkpointed_error"] < 1e-6
    assert max(results["edict_error"], results["leapfrog_error"]) < 1e-3
    assert results["o_belm_error"] < 0.1  # long steps: it amplifies rounding most
    assert results[ratio] == max(results[f"{ratio}_steps{count}"] for count in (2, 4, 10))
    # Reversible solvers need no more memory for more steps; autograd needs five times as much.
    assert all(results[f"{name}_memory_10_over_2"] < 1.05 for name in ("edict", "leapfrog", "o_belm"))
    assert 4 < results["autograd_memory_10_over_2"] < 6
    assert results["checkpointed_memory_10_over_2"] < 2

    rows = [line.split() for line in lines[2:-1]]
    both = 2 * BATCH  # rows of an evaluation
    expected = []
    for count in (2, 4, 10):
        once = count * both
        expected += [
            [str(count), "autograd", 0, once],
            [str(count), "checkpointed", once, once],
            [str(count), "EDICT", 2 * once, 2 * once],
            [str(count), "leapfrog", once + both, once + both],
            [str(count), "O-BELM", once, once],
        ]
    assert [[*row[:2], int(row[4]), int(row[5])] for row in rows] == expected


def test_all_ways_give_the_gradient_of_one_flow(tiny_models):
    backbone = StableDiffusion(str(tiny_models / "pipeline"))
    fabric = Fabric(accelerator="cpu", devices=1)
    settings = {"steps": 50, "batch_size": BATCH, "prompt": "a wizard", "guidance_scale": 3.0}
    gradients = {
        name: full_chain.SamplingGradient(backbone, fabric, way, **settings).gradients()
        for name, way in full_chain.WAYS.items()
    }
    differences = {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(found, gradients["autograd"], strict=True))
        for name, found in gradients.items()
    }
    assert differences.pop("autograd") == 0
    assert differences.pop("checkpointed") < 1e-5
    # Other solvers of the same equation.
    assert all(1e-5 < difference < 0.2 for difference in differences.values()), differences


def test_without_guidance_the_prompt_alone_is_evaluated(tiny_models, capsys):
    pipeline = str(tiny_models / "pipeline")
    full_chain.main(pipeline, steps=(1, 2), guidance_scale=1.0, repetitions=1, accelerator="cpu")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert [int(row[5]) for row in rows if row[1] == "autograd"] == [1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": (10,)}, r"steps .*\(10,\)"),
        ({"steps": (20, 10)}, r"steps .*\(20, 10\)"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(UserError, match=words):
        full_chain.main(**options)
