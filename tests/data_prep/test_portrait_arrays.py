import torch

from data_prep.portrait_arrays import portrait_ratings
from tokenlearn.data.portraits import portrait


def test_ratings_are_those_of_the_portraits():
    expected = [portrait(7, index)[0].rating for index in range(5)]
    torch.testing.assert_close(portrait_ratings(5, 7), torch.tensor(expected))
