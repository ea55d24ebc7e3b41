import pytest
import torch

from tokenlearn.guidance import ClassifierFreeGuidance, classifier_free_guidance


def test_scale_moves_along_the_line_through_both_predictions():
    unconditional, conditional = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(classifier_free_guidance(unconditional, conditional, 0.0), unconditional)
    torch.testing.assert_close(classifier_free_guidance(unconditional, conditional, 1.0), conditional)
    # Ho and Salimans' own form, (1 + w) e_cond - w e_uncond.
    torch.testing.assert_close(
        classifier_free_guidance(unconditional, conditional, 7.5), 7.5 * conditional - 6.5 * unconditional
    )


@pytest.mark.parametrize(("scale", "evaluated"), [(1, ["prompt"]), (4.0, ["empty", "prompt"])])
def test_what_is_evaluated_fits_what_is_combined(scale, evaluated):
    guidance = ClassifierFreeGuidance(scale)
    assert guidance.conditionings("empty", "prompt") == evaluated
    predictions = {"empty": torch.zeros(1, 1, 1, 1), "prompt": torch.ones(1, 1, 1, 1)}
    assert guidance([predictions[name] for name in evaluated], 0).item() == scale
