"""Malformed and hostile embedding files: one short line each, in bounded time and memory, and nothing is run."""

import io
import json
import os
import pickle
import resource
import struct
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save

from tokenlearn.errors import UserError
from tokenlearn.tokens import load_bank, load_embedding
from tokenlearn.tokens.files.base import MOST_VECTORS

WIDTH = 16
GOOD = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)


class Evil:
    """Leaves a trace if it is unpickled as an object."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def pickled(content, legacy=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def header_of(entries, body=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def nested(depth=60, fan=9):
    """Lists of lists that share their parts: few bytes, and more letters than atoms when they are spelled out."""
    content = ["lol"]
    for _ in range(depth):
        content = [content] * fan
    return content


def zip_bomb():
    """A PyTorch file with a compressed record of 257 MiB of zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with zipfile.ZipFile(io.BytesIO(pickled({"emb_params": GOOD}))) as whole:
            for record in whole.infolist():
                archive.writestr(record.filename, whole.read(record))
        with archive.open("archive/data/bomb", "w", force_zip64=True) as record:
            for _ in range(257):
                record.write(bytes(2**20))
    return file.getvalue()


def sized_call(name):
    """A pickle that asks a type for 2^40 elements."""
    return b"\x80\x02c" + name + b"\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R."


def safetensors_cases():
    whole = save({"emb_params": GOOD}, {"token": "<a>"})
    for size in (0, 1, 7, 8, 9, 20, 60, len(whole) // 2, len(whole) - 1):
        yield f"cut at {size}", whole[:size]
    yield "longer", whole + b"more"
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        yield f"header of {length}", struct.pack("<Q", length) + whole[8:]
    yield "text", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield "HTML", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "zeros", bytes(4096)
    yield "PNG", b"\x89PNG\r\n\x1a\n" + bytes(100)
    yield "a pickle", pickled({"emb_params": GOOD})
    for content in (None, [], 3, "x", {"emb_params": 3}, {"emb_params": None}, {"__metadata__": 3}, {}):
        yield f"JSON {content!r}", header_of(content)
    body = GOOD.numpy().tobytes()
    for change in (
        {"shape": [2, 10**9]},
        {"shape": [2**40, 2**40]},
        {"shape": [-2, 16]},
        {"shape": [2, 15]},
        {"shape": "two"},
        {"dtype": "F4096"},
        {"dtype": "I32"},
        {"dtype": "BOOL"},
        {"dtype": "F4"},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [64, 0]},
        {"data_offsets": [-1, 128]},
        {"data_offsets": [0]},
    ):
        entry = {"dtype": "F32", "shape": [2, WIDTH], "data_offsets": [0, len(body)]} | change
        yield f"header {change}", header_of({"emb_params": entry}, body)
    twice = {"dtype": "F32", "shape": [2, WIDTH], "data_offsets": [0, len(body)]}
    yield "overlapping", header_of({"clip_l": twice, "clip_g": twice}, body)
    yield "many keys", save({f"layer.{index}": torch.zeros(1) for index in range(2000)})
    yield "a model", save({"conv.weight": torch.zeros(2, 3, 1, 1), "conv.bias": torch.zeros(2)})
    for name, value in tensors():
        plain = value.layout == torch.strided and not (value.is_meta or value.is_nested or value.is_quantized)
        if plain and value.is_contiguous():
            yield name, save({"emb_params": value})
    for name, token in tokens():
        yield name, save({"emb_params": GOOD}, {"token": token})
        yield f"{name} as a key", save({token: GOOD})


def tensors():
    yield "no vectors", torch.zeros(0, WIDTH)
    yield "a number", torch.tensor(1.0)
    yield "three axes", torch.zeros(1, 2, WIDTH)
    yield "integers", torch.zeros(2, WIDTH, dtype=torch.int64)
    yield "truth values", torch.zeros(2, WIDTH, dtype=torch.bool)
    yield "complex", torch.zeros(2, WIDTH, dtype=torch.complex64)
    yield "NaN", torch.full((2, WIDTH), torch.nan)
    yield "infinite", torch.full((2, WIDTH), torch.inf)
    yield "beyond float32", torch.full((2, WIDTH), 1e300, dtype=torch.float64)
    yield "beyond half precision", torch.full((2, WIDTH), 3e38)
    yield "just beyond half precision", torch.full((2, WIDTH), -65600.0)
    yield "a million vectors", torch.zeros(10**6, 4)
    yield "too many vectors", torch.zeros(MOST_VECTORS + 1, WIDTH)
    yield "another width", torch.zeros(2, WIDTH + 1)
    yield "sparse COO", GOOD.to_sparse()
    yield "sparse CSR", GOOD.to_sparse_csr()
    yield "meta", torch.zeros(2, WIDTH, device="meta")
    yield "stride 0", torch.zeros(1).expand(MOST_VECTORS, 10**9)
    yield "stride 0 of one row", torch.zeros(1, WIDTH).expand(10**6, WIDTH)
    yield "nested", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    yield "quantized", torch.quantize_per_tensor(GOOD, 0.1, 0, torch.qint8)


def tokens():
    yield "control characters", "<a\x1b[31m\x00>"
    yield "a new line", "<a\nb>"
    yield "right to left", "<a\u202eb>"
    yield "long", "<" + "a" * 100_000 + ">"
    yield "spaces", "<my style v2>"


def pickle_cases(trace):
    for legacy in (False, True):
        kind = "old" if legacy else "new"
        for name, content in {
            "a key of 3": {3: GOOD},
            "a key of a tuple": {("a", 1): GOOD},
            "a key of None": {None: GOOD, "a": GOOD},
            "keys of bytes": {b"emb_params": GOOD},
            "text": "text",
            "None": None,
            "a number": 3,
            "a list": [GOOD],
            "a set": {1, 2},
            "an empty dict": {},
            "an ordered dict of text": OrderedDict(a="b"),
            "params of None": {"string_to_param": None},
            "params of a list": {"string_to_param": [GOOD]},
            "params of text": {"string_to_param": {"*": "text"}},
            "nested names": {"emb_params": nested()},
            "nested as a whole": nested(),
            "nested keys": {"a": nested(), "b": nested()},
            "an evil object": {"emb_params": GOOD, "x": Evil(trace)},
            "an evil key": {"emb_params": Evil(trace)},
            "a checkpoint": {"state_dict": {"a": GOOD}, "epoch": 1, "global_step": 7},
        }.items():
            yield f"{kind}: {name}", pickled(content, legacy)
        for name, value in tensors():
            yield f"{kind}: {name}", pickled({"emb_params": value}, legacy)
        for name, token in tokens():
            yield f"{kind}: {name}", pickled({token: GOOD}, legacy)
        for name, value in {
            "a number for a tensor": {"emb_params": 3},
            "a list for a tensor": {"emb_params": [[0.0] * WIDTH]},
            "a dict for a tensor": {"emb_params": {"a": GOOD}},
            "counts that differ": {"clip_l": GOOD, "clip_g": GOOD[:1]},
            "an outputs file without vectors": {"format": torch.tensor([1])},
            "an outputs file of another version": {"format": torch.tensor([9]), "output_0": GOOD},
            "outputs that lack one": {"format": torch.tensor([1]), "output_1": GOOD},
            "two tensors": {"a": GOOD, "b": GOOD},
            "an empty key": {"": GOOD, " ": GOOD},
        }.items():
            yield f"{kind}: {name}", pickled(value, legacy)
        whole = pickled({"emb_params": GOOD}, legacy)
        for size in (0, 1, 2, 10, len(whole) // 2, len(whole) - 30):
            yield f"{kind}: cut at {size}", whole[:size]
    yield "plain evil", pickle.dumps(Evil(trace), protocol=2)
    yield "bytes of a size", sized_call(b"builtins\nbytearray")
    yield "bytes of a size, old name", sized_call(b"__builtin__\nbytearray")
    yield "bytes of a size before a zip", sized_call(b"builtins\nbytearray") + b"PK\x05\x06" + bytes(18)
    yield "a module", b"cos\nsystem\n(S'mkdir " + trace.encode() + b"'\ntR."
    yield "deep", b"\x80\x02" + b"(" * 50_000 + b"l" * 50_000 + b"."
    yield "a zip bomb", zip_bomb()
    yield "an empty zip", b"PK\x05\x06" + bytes(18)
    yield "safetensors", save({"emb_params": GOOD})
    yield "HTML", b"<!DOCTYPE html><html></html>"


def refused(path, width=WIDTH):
    """Why a file is not one short line, None if it is."""
    started = time.process_time()
    try:
        load_bank([str(path)], [width])
    except UserError as error:
        line = str(error)
        if len(line) > 500 + len(str(path)):
            return f"a line of {len(line)} letters"
        if not line.isprintable():
            return f"control characters in {line!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    else:
        return "loaded"
    return "too slow" if time.process_time() - started > 10 else None


def test_every_malformed_embedding_file_is_one_line(tmp_path, capsys, count_sweep):
    trace = str(tmp_path / "code-was-run")
    cases = [(".safetensors", *case) for case in safetensors_cases()]
    cases += [(suffix, *case) for suffix in (".pt", ".bin") for case in pickle_cases(trace)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failures = {}
    for suffix, name, content in cases:
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        if (found := refused(path)) is not None:
            failures[f"{name} ({suffix})"] = found
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    count_sweep("embedding files", len(cases), failures)
    with capsys.disabled():
        print(f"\n{len(cases)} malformed embedding files, +{grown:.0f} MiB")
    assert not failures
    assert len(cases) >= 300
    assert not os.path.exists(trace)
    assert grown < 600


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "device", "long name"])
def test_paths_that_are_no_files(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path = tmp_path / ("a" * 5000)
    with pytest.raises(UserError) as caught:
        load_embedding(path)
    assert len(str(caught.value)) < 300


def test_the_largest_token_is_loaded(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"emb_params": torch.full((MOST_VECTORS, WIDTH), 65504.0)}, path)
    bank, _ = load_bank([str(path)], [WIDTH])
    assert bank.num_vectors == {"<a>": MOST_VECTORS}


def test_the_name_inside_of_a_file_is_never_its_token(tmp_path):
    for number, name in enumerate(["my style v2", "a\x00b", "x" * 1000, 7]):
        path = tmp_path / f"file{number}.pt"
        torch.save({"string_to_param": {"*": GOOD}, "name": name}, path)
        assert load_bank([str(path)], [WIDTH])[0].placeholders == (f"<file{number}>",)
        bank, _ = load_bank({"<style>": str(path)}, [WIDTH])
        assert torch.equal(bank.get("<style>")[0], GOOD)


def test_a_text_of_another_form_is_no_metadata(tmp_path):
    torch.save({"string_to_param": {"*": GOOD}, "name": "a", "sd_checkpoint": nested(), "step": 5}, tmp_path / "a.pt")
    assert load_embedding(tmp_path / "a.pt").metadata == {"name": "a", "step": "5"}
