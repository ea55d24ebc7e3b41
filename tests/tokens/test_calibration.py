import json

import numpy as np
import pytest

from tokenlearn.errors import UserError
from tokenlearn.tokens.calibration import Calibration, calibrate_strengths, unevenness


def path(strengths, position):
    """Neighbour distances and distances from 0 of a path on a line."""
    places = [position(strength) for strength in strengths]
    zero = position(0.0)
    return np.abs(np.diff(places)).tolist(), [abs(place - zero) for place in places]


def test_a_path_of_known_length_is_inverted():
    """At strength s the image is at s^2, so half of the way to s = 2 is at the root of 2."""
    strengths = np.linspace(0, 2, 2001).tolist()
    found = calibrate_strengths(strengths, *path(strengths, lambda s: s * s), bound=10)
    assert found.range == (0, 1)
    for share in (0, 0.25, 0.5, 0.81, 1):
        assert found.strength(share) == pytest.approx(2 * share**0.5, abs=1e-3)
    even = [found.strength(share) for share in np.linspace(0, 1, 9)]
    assert unevenness(path(even, lambda s: s * s)[0]) < 1e-3
    # Equal steps of s make steps of 1, 3, 5, ..., 15 of 64, whose deviation is the root of 21 and mean 8.
    plain = path(np.linspace(0, 2, 9).tolist(), lambda s: s * s)[0]
    assert unevenness(plain) == pytest.approx(21**0.5 / 8)


def test_the_range_ends_at_the_bound_on_either_side():
    # At s the image is at 2 s above 0 and at s below it.
    strengths = [-4.0, -2.0, 0.0, 1.0, 3.0]
    found = calibrate_strengths(strengths, *path(strengths, lambda s: 2 * s if s > 0 else s), bound=3)
    assert found.strengths == pytest.approx((-3, -2, 0, 1, 1.5))
    assert found.lengths == pytest.approx((-1, -2 / 3, 0, 2 / 3, 1))
    assert found.strength(-0.5) == pytest.approx(-1.5)
    assert found.strength(0.5) == pytest.approx(0.75)
    inside = calibrate_strengths(strengths, *path(strengths, lambda s: 2 * s if s > 0 else s), bound=5)
    # 4 to the left within the bound, 5 to the right: the longer side is 1.
    assert inside.range == pytest.approx((-0.8, 1))
    assert inside.strengths == pytest.approx((-4, -2, 0, 1, 2.5))


def test_a_path_that_turns_back_is_as_long_as_it_is():
    # Out by 1 and back by half of it: the length is 1.5, although the distance from 0 is never above 1.
    found = calibrate_strengths([0.0, 1.0, 2.0], [1.0, 0.5], [0.0, 1.0, 0.5], bound=2)
    assert found.lengths == pytest.approx((0, 2 / 3, 1))


def test_strengths_that_change_nothing_are_left_out():
    found = calibrate_strengths([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 2.0], bound=5)
    assert found.lengths == (0, 0.5, 1)
    assert found.strengths == (0, 2, 3)
    one_side = calibrate_strengths([-1.0, 0.0, 1.0], [0.0, 1.0], [0.0, 0.0, 1.0], bound=5)
    assert one_side.range == (0, 1)


def test_entries_of_files():
    found = Calibration((-1.0, 0.0, 2.0), (-0.5, 0.0, 1.0), 0.4, (0.7, 0.1))
    assert Calibration.from_json(found.to_json()) == found
    assert Calibration.from_json(Calibration((0.0, 2.0), (0.0, 1.0), 0.4).to_json()).unevenness is None
    good = json.loads(found.to_json())
    for bad in ("nothing", "[]", json.dumps(good | {"bound": "a"}), json.dumps({"strengths": [0, 1]})):
        with pytest.raises(UserError, match=r"'hat' .*cannot be read"):
            Calibration.from_json(bad, "hat")
    for bad in ({"strengths": [0, 2, 1]}, {"lengths": [0, 1]}, {"lengths": [0, float("nan"), 1]}):
        with pytest.raises(UserError, match="does not rise"):
            Calibration.from_json(json.dumps(good | bad), "hat")


def test_bad_values():
    with pytest.raises(UserError, match=r"1\.5 is out of the range from -0\.5 to 1"):
        Calibration((-1.0, 0.0, 2.0), (-0.5, 0.0, 1.0), 0.4).strength(1.5)
    with pytest.raises(UserError, match="changes nothing"):
        calibrate_strengths([0.0, 1.0], [0.0], [0.0, 0.0], bound=1)
    with pytest.raises(UserError, match="must rise"):
        calibrate_strengths([1.0, 2.0], [1.0], [0.0, 1.0], bound=1)
    with pytest.raises(UserError, match="not finite"):
        calibrate_strengths([0.0, 1.0], [float("nan")], [0.0, 1.0], bound=1)
    with pytest.raises(UserError, match="bound"):
        calibrate_strengths([0.0, 1.0], [1.0], [0.0, 1.0], bound=0)
