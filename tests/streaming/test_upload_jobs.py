"""Whole jobs whose weights are sent ahead to a device write what jobs on the CPU write."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command import held
from helpers.simulated_device import bits, simulated_devices
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft", reason="tiny tunes are made with peft")
    from helpers import tiny_models

    return tiny_models.build(tmp_path_factory.mktemp("models"))


def job_of(root: Path, out: Path, pair: str, **options: object) -> Job:
    folders = (str(root / pair / name) for name in ("source", "tuned", "target"))
    return Job(*folders, out, str(root / "ids.safetensors"), tokens=256, batch_size=4, **options)


@pytest.mark.parametrize("pair", ["causal", "bf16"])
def test_a_job_writes_the_same_bytes(pair: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(root, tmp_path / "plain", pair)
    Session(job).run()
    machines = simulated_devices(monkeypatch)
    Session(replace(job, out=tmp_path / "sent")).run()
    plain, sent = held(tmp_path / "plain"), held(tmp_path / "sent")
    assert machines and all(machine.memory for machine in machines)
    assert plain.keys() == sent.keys() and all(bits(plain[name]) == bits(sent[name]) for name in plain)


def test_a_job_on_a_gpu_makes_the_maps_of_the_cpu(gpu: None, root: Path, tmp_path: Path) -> None:
    """What CONTRIBUTING asks of float32 wherever an answer is known: 1e-3, of the update and of every map's quality."""
    outcomes = {}
    for device in ("cpu", "cuda"):
        outcomes[device] = Session(job_of(root, tmp_path / device, "causal", device=device)).run()
    base = held(root / "causal" / "target")
    ours, theirs = (
        {name: (value - base[name]).double() for name, value in held(tmp_path / device).items() if name in base}
        for device in ("cuda", "cpu")
    )
    assert ours.keys() == theirs.keys() and len(ours) > 10
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
    assert apart <= 1e-3**2 * sum(float(value.square().sum()) for value in theirs.values())
    for mine, other in zip(outcomes["cuda"].quality, outcomes["cpu"].quality, strict=True):
        assert mine["space"] == other["space"] and mine["held"] == pytest.approx(other["held"], abs=1e-3)
