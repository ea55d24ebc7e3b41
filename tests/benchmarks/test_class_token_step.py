import json
import math

import pytest

from benchmarks import class_token_step


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prints_ratios_and_evaluates_no_row_in_vain(tiny_models, capsys, monkeypatch, checkpointing):
    monkeypatch.setattr(class_token_step, "CLIP_TABLE", (10, 4))
    class_token_step.main(
        pipeline=str(tiny_models / "pipeline"),
        classifier=str(tiny_models / "guide"),
        classes=("wizard", "pirate"),
        steps=3,
        gradient_steps=2,
        checkpointing=checkpointing,
        batch_sizes=(1, 2),
        repetitions=1,
        accelerator="cpu",
    )
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])
    assert {"step_over_floor", "memory_over_floor", "whole_table_over_ours"} <= set(results)
    assert all(math.isfinite(value) and value > 0 for value in results.values())
    rows = [line.split() for line in lines if line.split()[0] in ("1", "2")]
    for batch, (without_gradient, with_gradient) in {1: (2 + 1, 1 + 2), 2: (4 + 2, 2 + 4)}.items():
        for name in ("ours", "floor", "whole"):
            (row,) = [row for row in rows if row[:2] == [str(batch), name]]
            counts = row[5:7] if name == "whole" else row[4:6]
            expected = (without_gradient, with_gradient)
            if checkpointing and name == "floor":  # torch's own records a graph both times
                expected = (without_gradient, 2 * with_gradient)
            elif checkpointing:
                expected = (without_gradient + with_gradient, with_gradient)
            assert counts == [str(count) for count in expected]
