"""Interrupted trainings end bit for bit where uninterrupted ones do, log included."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saelab.core.errors import CorruptError, ResumeError
from saelab.sae import load_sae
from saelab.training import Stopped, fit
from tests.training.crash_script import ROWS, STEPS, configs
from tests.training.planted import PlantedSource

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("SAELAB_KILLS", "2"))


def source() -> PlantedSource:
    return PlantedSource(16, 24, ROWS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fit(configs(), source(), out)
    torch.set_num_threads(threads)
    return out


def log(path: Path) -> list[str]:
    """The log without the one thing that is not reproducible, otherwise as it is written."""
    lines = [json.loads(line) for line in (path / "training.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in line.items() if k != "tokens_per_second"}) for line in lines]


def same(a: Path, b: Path) -> None:
    for name in ("a", "b"):
        one, other = (out / name / "weights.safetensors" for out in (a, b))
        assert one.read_bytes() == other.read_bytes()
        assert log(a / name) == log(b / name)
        assert (a / name / "meta.json").read_text() == (b / name / "meta.json").read_text()


def start(out: Path, mode: str, seconds: float = 0.0) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.training.crash_script", str(out), mode, str(seconds)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    """Read until ``step`` batches of the training have been taken (the first few lines are the look at the data)."""
    last = 0
    for line in process.stdout:
        now = int(line)
        if now >= step and (now > last or now > 4):
            return
        last = now


@pytest.mark.parametrize("repeat", range(KILLS))
def test_kill_9_then_resume(repeat, whole, tmp_path):
    """Killed at two random moments, then left alone."""
    rng, out = random.Random(repeat), tmp_path / "out"
    for mode in ("fresh", "resume"):
        process = start(out, mode, seconds=0.002)
        wait_for_step(process, rng.randrange(5, STEPS))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(out, "resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    same(out, whole)
    assert not (out / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(number, whole, tmp_path):
    process = start(tmp_path / "out", "fresh", seconds=0.02)
    wait_for_step(process, 10)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    message = errors.strip().splitlines()[-1]
    assert message.startswith(f"stopped by {number.name} after step ")
    assert "--resume" in message
    process = start(tmp_path / "out", "resume")
    process.communicate(timeout=120)
    same(tmp_path / "out", whole)


class Stopping(PlantedSource):
    """Asks this very process to stop at a batch."""

    def batch(self, index):
        if index == 20:
            signal.raise_signal(signal.SIGINT)
        return super().batch(index)


@pytest.fixture
def stopped(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match=f"stopped by SIGINT after step 21 of {STEPS}"):
        fit(configs(), Stopping(16, 24, ROWS), tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is before
    return tmp_path / "out"


def test_resume_in_process(stopped, whole):
    a, b = fit(configs(), source(), stopped, resume=True)
    assert (a.steps, b.steps) == (STEPS, STEPS)
    assert len(log(a.path)) == len(log(whole / "a"))


def test_changed_setting_is_named(stopped):
    changed = configs()
    training = changed[1].training.model_copy(update={"lr": 5e-3})
    changed[1] = changed[1].model_copy(update={"training": training})
    with pytest.raises(ResumeError, match=r"run 'b': training\.lr was 0\.01, now it is 0\.005"):
        fit(changed, source(), stopped, resume=True)


def test_other_runs_are_refused(stopped):
    with pytest.raises(ResumeError, match="the runs were a, b, now they are a"):
        fit(configs()[:1], source(), stopped, resume=True)


def test_checkpoint_interval_may_change(stopped):
    changed = [
        c.model_copy(update={"training": c.training.model_copy(update={"checkpoint_every": 50})}) for c in configs()
    ]
    assert len(fit(changed, source(), stopped, resume=True)) == 2


def test_broken_checkpoint_is_one_line(stopped):
    path = stopped / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptError, match=r"checkpoint\.safetensors"):
        fit(configs(), source(), stopped, resume=True)


def test_nothing_to_resume(tmp_path, whole):
    with pytest.raises(ResumeError, match="holds no interrupted training"):
        fit(configs(), source(), tmp_path / "nothing", resume=True)
    with pytest.raises(ResumeError, match="is finished"):
        fit(configs(), source(), whole, resume=True)


def test_each_run_equals_the_run_alone(whole, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (alone,) = fit(configs()[1:], source(), tmp_path / "alone")
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(load_sae(alone.path).tensors().values(), load_sae(whole / "b").tensors().values(), strict=True):
        assert torch.equal(a, b)
    assert log(alone.path) == log(whole / "b")
