from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saelab.activations.shards import HEADER, ShardInfo, ShardReader, write_shard
from saelab.core.errors import CorruptError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "site": torch.randn(7, 3, generator=generator).to(dtype),
        "other": torch.randn(7, 5, generator=generator).to(dtype),
        "row": torch.arange(7),
        "token_id": torch.arange(7, dtype=torch.int32),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shard_is_a_safetensors_file_and_reads_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    written = tensors(dtype)
    info = write_shard(tmp_path, "shard.safetensors", written)
    assert info.bytes == (tmp_path / "shard.safetensors").stat().st_size
    loaded = load_file(tmp_path / "shard.safetensors")
    reader = ShardReader(tmp_path, ShardInfo.from_dict(info.to_dict()))
    for name, tensor in written.items():
        assert reader.tensor(name).dtype == tensor.dtype == loaded[name].dtype
        for found in (reader.tensor(name), loaded[name]):
            assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    info = write_shard(tmp_path, "s", tensors())
    good = (tmp_path / "s").read_bytes()
    assert set(info.checksums) == {HEADER, *tensors()}
    for byte in range(len(good)):
        bad = bytearray(good)
        bad[byte] ^= 1 << (byte % 8)
        (tmp_path / "s").write_bytes(bad)
        problem = ShardReader(tmp_path, info).problem()
        assert problem is not None
        assert "shard" in problem
        assert str(tmp_path / "s") in problem
    (tmp_path / "s").write_bytes(good)
    assert ShardReader(tmp_path, info).problem() is None


def test_truncated_grown_and_missing_files_are_named(tmp_path: Path) -> None:
    info = write_shard(tmp_path, "s", tensors())
    good = (tmp_path / "s").read_bytes()
    for bad in (good[:-1], good[:4], b"", good + b"\0"):
        (tmp_path / "s").write_bytes(bad)
        with pytest.raises(CorruptError, match=rf"{tmp_path / 's'} has {len(bad)} bytes, expected {len(good)}"):
            ShardReader(tmp_path, info).tensor("site")
    (tmp_path / "s").unlink()
    with pytest.raises(CorruptError, match="is missing"):
        ShardReader(tmp_path, info).tensor("site")


def test_only_the_tensor_that_is_read_is_verified(tmp_path: Path) -> None:
    info = write_shard(tmp_path, "s", tensors())
    data = bytearray((tmp_path / "s").read_bytes())
    at = bytes(data).index(tensors()["other"].numpy().tobytes())
    data[at + 3] ^= 4
    (tmp_path / "s").write_bytes(data)
    reader = ShardReader(tmp_path, info)
    assert torch.equal(reader.tensor("site"), tensors()["site"])
    with pytest.raises(CorruptError, match="checksum of 'other'"):
        reader.tensor("other")
    assert "checksum of 'other'" in str(reader.problem())
