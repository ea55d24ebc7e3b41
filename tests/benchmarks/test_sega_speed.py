import json
import math

import pytest

from benchmarks import sega_speed
from tokenlearn.errors import UserError

STEPS, BATCH = 5, 2


def test_prints_ratios_of_the_same_images(tiny_models, capsys):
    sega_speed.main(
        pipeline=str(tiny_models / "pipeline"),
        steps=STEPS,
        batch_size=BATCH,
        repetitions=2,
        threshold=0.87,  # with a quantile between two elements, so that rounding errors do not choose
        accelerator="cpu",
    )
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])
    cases = ("one", "four", "four_no_momentum")
    assert set(results) == {f"{key}_{case}" for key in ("time", "memory") for case in cases}
    assert all(math.isfinite(value) and value > 0 for value in results.values())
    rows = [line.split() for line in lines[2:-1]]
    assert [row[:3] for row in rows] == [
        [count, momentum, name]
        for count, momentum in (("1", "yes"), ("4", "yes"), ("4", "no"))
        for name in ("ours", "diffusers")
    ]
    assert all(float(row[-1]) < 1e-4 for row in rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"concepts": ("hat",)}, r"concepts .* 4, .* 1"),
        ({"guidance_scale": 1.0}, r"guidance_scale .* 1.0"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(UserError, match=words):
        sega_speed.main(**options)
