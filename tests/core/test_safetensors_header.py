"""A safetensors file whose header is 640 bytes long begins with the two bytes of a pickle."""

import torch

from saelab.core.artifacts import read_safetensors, write_safetensors


def test_header_length_that_looks_like_a_pickle(tmp_path):
    path, tensors = tmp_path / "weights.safetensors", {"w": torch.ones(2)}
    write_safetensors(path, tensors, {"note": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    write_safetensors(path, tensors, {"note": "x" * (640 - length)})
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(read_safetensors(path)["w"], torch.ones(2))
