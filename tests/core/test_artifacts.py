"""Writes are atomic, reads refuse what is not what it should be."""

import errno
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from saelab.core import artifacts
from saelab.core.errors import CorruptError, FormatError, MissingFileError, OutputError, OutputExistsError


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"a": 1})
    with pytest.raises(TypeError), artifacts.atomic_writer(path) as file:
        file.write(b"half" + None)
    assert artifacts.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_kill_while_writing_leaves_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "a.json"
    code = (
        "import sys; from saelab.core.artifacts import write_json\n"
        "i = 0\n"
        "while True:\n"
        "    i += 1; write_json(sys.argv[1], {'i': i, 'fill': 'x' * 200000})\n"
        "    if i == 3: print('go', flush=True)\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"go\n"
        process.kill()
        process.wait()
        process.stdout.close()
        assert len(json.loads(path.read_text())["fill"]) == 200000


def test_json_has_no_nan(tmp_path):
    artifacts.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.5]})
    assert artifacts.read_json(tmp_path / "a.json") == {"x": None, "y": [None, 1.5]}


def test_half_written_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 1')
    with pytest.raises(CorruptError, match=r"a.json is not valid JSON"):
        artifacts.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_line(tmp_path, code):
    with (
        pytest.raises(OutputError, match="no space left on the disk while writing"),
        artifacts.atomic_writer(tmp_path / "a"),
    ):
        raise OSError(code, "full")
    assert list(tmp_path.iterdir()) == []


def test_require_disk_refuses_what_does_not_fit(tmp_path):
    assert artifacts.require_disk(tmp_path / "new" / "folder", 10, "it") > 10
    with pytest.raises(OutputError, match=r"the store needs .* TiB but only .* are free"):
        artifacts.require_disk(tmp_path, 1 << 60, "the store")


def test_pickle_is_refused_not_executed(tmp_path):
    class Boom:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Boom()))
    torch.save({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        with pytest.raises(FormatError, match="is a pickle, expected safetensors"):
            artifacts.read_safetensors(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "executed").exists()


def test_safetensors_round_trip_and_corruption(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.randn(4, 3).to(torch.bfloat16), "y": torch.arange(6).reshape(2, 3).T}
    artifacts.write_safetensors(path, tensors)
    loaded = artifacts.read_safetensors(path)
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors.items())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorruptError, match="not a readable safetensors file"):
        artifacts.read_safetensors(path)
    with pytest.raises(MissingFileError):
        artifacts.read_safetensors(tmp_path / "none.safetensors")


def test_checksums_agree_and_see_one_flipped_bit(tmp_path):
    data = bytearray(os.urandom(5_000_000))
    (tmp_path / "a").write_bytes(data)
    assert artifacts.file_checksum(tmp_path / "a") == artifacts.checksum(data)
    data[3_000_000] ^= 1
    assert artifacts.checksum(data) != artifacts.file_checksum(tmp_path / "a")


def test_manifest_says_the_kind(tmp_path):
    with pytest.raises(FormatError, match=r"is not a saelab sae folder: it has no manifest.json"):
        artifacts.read_manifest(tmp_path, "sae")
    artifacts.write_manifest(tmp_path, "sae", {"d_in": 3})
    assert artifacts.read_manifest(tmp_path)["d_in"] == 3
    with pytest.raises(FormatError, match="is a saelab sae folder, expected feature-store"):
        artifacts.read_manifest(tmp_path, "feature-store")
    with pytest.raises(MissingFileError, match="does not exist"):
        artifacts.read_manifest(tmp_path / "no")


def test_prepare_output(tmp_path):
    folder = artifacts.prepare_output(tmp_path / "a" / "b")
    assert folder.is_dir()
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="add --force"):
        artifacts.prepare_output(folder)
    with pytest.raises(OutputExistsError, match="was not made by saelab"):
        artifacts.prepare_output(folder, force=True)
    assert (folder / "precious.txt").exists()
    artifacts.write_manifest(folder, "sae", {})
    assert artifacts.prepare_output(folder, resume=True) == folder
    assert (folder / "precious.txt").exists()
    artifacts.prepare_output(folder, force=True)
    assert list(folder.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError, match="is a file"):
        artifacts.prepare_output(tmp_path / "file")


def test_check_output_refuses_the_same_and_changes_nothing(tmp_path):
    artifacts.check_output(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    folder = artifacts.prepare_output(tmp_path / "a" / "b")
    artifacts.check_output(folder)
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="add --force"):
        artifacts.check_output(folder)
    with pytest.raises(OutputExistsError, match="was not made by saelab"):
        artifacts.check_output(folder, force=True)
    artifacts.write_manifest(folder, "sae", {})
    artifacts.check_output(folder, force=True)
    assert (folder / "precious.txt").exists()
    for path in (folder / "precious.txt", folder / "precious.txt" / "below"):
        with pytest.raises(OutputExistsError, match="is a file"):
            artifacts.check_output(path)


def test_unwritable_folder_is_one_line(tmp_path, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", denied)  # the tests may run as root, whom no mode bits stop
    with pytest.raises(OutputError, match="choose a folder you may write to"):
        artifacts.prepare_output(tmp_path / "a")
    with pytest.raises(OutputError, match="cannot write"):
        artifacts.prepare_output("/proc/nope")


def test_human_bytes():
    assert [artifacts.human_bytes(n) for n in (0, 1536, 5 << 20, 3 << 40)] == ["0 B", "1.5 KiB", "5.0 MiB", "3.0 TiB"]
