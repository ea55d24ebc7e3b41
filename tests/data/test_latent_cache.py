import json
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tokenlearn.data import LatentCache, LatentCaching
from tokenlearn.data.latent_cache import in_full_batches, json_hash, weights_hash
from tokenlearn.errors import UserError

ITEMS = range(11)


def latents_of(item):
    """Every fifth item has none."""
    return None if item % 5 == 2 else torch.full((4, 2, 2), item + 1 / 3)


class Encoder:
    def __init__(self, stop_after=100):
        self.seen, self.stop_after = [], stop_after

    def __call__(self, items):
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(list(items))
        return [latents_of(item) for item in items]


def cache(folder, key="a", dtype="float32", shard_size=3, **options):
    return LatentCache(LatentCaching(str(folder), dtype, shard_size), {"model": key}, **options)


def assert_holds_everything(made):
    for item in ITEMS:
        expected, found = latents_of(item), made[item]
        assert (expected is None) == (found is None)
        assert expected is None or torch.equal(found, expected)


def test_what_comes_out_is_what_went_in(tmp_path):
    made = cache(tmp_path)
    made.build(iter(ITEMS), Encoder(), len(ITEMS))
    assert_holds_everything(made)
    assert_holds_everything(cache(tmp_path))
    assert [path.name for path in sorted(made.folder.iterdir())] == [
        "00000.safetensors", "00001.safetensors", "00002.safetensors", "00003.safetensors", "key.json"
    ]  # fmt: skip
    assert json.loads((made.folder / "key.json").read_text())["items"] == len(ITEMS)


def test_half_precision_takes_half_the_space(tmp_path):
    made = cache(tmp_path, dtype="float16")
    made.build(ITEMS, Encoder())
    assert load_file(made.folder / "00000.safetensors")["latents"].dtype == torch.float16
    assert made[0].dtype == torch.float32
    torch.testing.assert_close(made[9], latents_of(9), rtol=1e-3, atol=0)


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path).build(ITEMS, Encoder(stop_after=2))
    assert not cache(tmp_path).complete
    rest = Encoder()
    cache(tmp_path).build(ITEMS, rest)
    assert rest.seen == [[6, 7, 8], [9, 10]]
    assert_holds_everything(cache(tmp_path))
    again = Encoder()
    cache(tmp_path).build(ITEMS, again)
    assert again.seen == []


def test_another_key_is_another_cache(tmp_path):
    cache(tmp_path).build(ITEMS, Encoder())
    for other in (cache(tmp_path, "b"), cache(tmp_path, dtype="float16"), cache(tmp_path, shard_size=4)):
        assert not other.complete
        with pytest.raises(UserError, match=str(tmp_path)):
            other[0]


def test_ranks_share_the_work(tmp_path):
    encoders = [Encoder(), Encoder()]
    met = []
    for rank in (1, 0):  # rank 0, which says that all is done, comes last here as the barrier would have it
        cache(tmp_path, rank=rank, world_size=2, barrier=met.append).build(ITEMS, encoders[rank])
    assert encoders[0].seen == [[0, 1, 2], [6, 7, 8]]
    assert sorted(chain.from_iterable(encoders[0].seen + encoders[1].seen)) == list(ITEMS)
    assert len(met) == 4
    assert_holds_everything(cache(tmp_path))


def test_a_damaged_shard_is_named(tmp_path):
    made = cache(tmp_path)
    made.build(ITEMS, Encoder())
    (made.folder / "00001.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(UserError, match=r"00001.safetensors") as raised:
        cache(tmp_path)[4]
    assert "\n" not in str(raised.value)


def test_batches_are_filled_up():
    sizes = []

    def double(batch):
        sizes.append(len(batch))
        return torch.tensor(batch) * 2

    assert torch.stack(list(in_full_batches(double, range(10), 4))).tolist() == [2 * n for n in range(10)]
    assert sizes == [4, 4, 4]


def test_weights_hash_sees_every_weight_and_the_configuration():
    module = nn.Linear(3, 2)
    first = weights_hash(module)
    assert weights_hash(module) == first
    with torch.no_grad():
        module.bias[1] += 1e-6
    second = weights_hash(module)
    module.config = {"scaling_factor": 0.5}
    assert len({first, second, weights_hash(module)}) == 3


def test_keys_tell_modules_apart_by_weights_and_settings():
    def key(weight=1.0, bias=0.0):
        module = nn.Sequential(nn.Linear(3, 2))
        nn.init.constant_(module[0].weight, 0.5)
        nn.init.constant_(module[0].bias, bias)
        module[0].settings = {"weight": weight}
        return json_hash({"guidance": ["Rule", {"objective": module, "scale": 2}]})

    assert key() == key()
    assert len({key(), key(weight=2.0), key(bias=1.0)}) == 3
