"""A job as values: each step takes what the steps before returned, and leaves it as it was."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
from helpers.command import identical
from theseus_transport.jobs.align_job import AlignSession
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session, carry_out, check, fit, open_inputs, prepare, rehearse


@pytest.fixture
def job(models, tmp_path):
    sides = [str(models / "causal" / name) for name in ("source", "tuned", "target")]
    return Job(*sides, tmp_path / "out", str(models / "ids.safetensors"), tokens=128, alpha=1.0)


def test_steps_write_what_a_session_does(job, tmp_path):
    """From values that were rehearsed before, too."""
    inputs = open_inputs(job)
    check(inputs)
    prepared = prepare(inputs)
    fitted = fit(prepared)
    assert not job.out.exists() and rehearse(prepared, fitted).coverage and not job.out.exists()
    session, told = Session(replace(job, out=tmp_path / "session")), []
    assert session.plan.choice == fitted.plan.choice and not session.done
    session.run()
    carry_out(prepared, fitted, finished=lambda: told.append(job.out.exists()))
    assert session.done and told == [True] and identical(job.out, tmp_path / "session")


def test_what_a_step_returns_stays_as_it_is(job, tmp_path):
    session = Session(job)
    aligning = AlignSession(replace(job.alignment, out=tmp_path / "maps"))
    for value in (session.inputs, session.inputs.bases, session.prepared, session.fitted, aligning.fitted):
        for field in fields(value):
            with pytest.raises(FrozenInstanceError):
                setattr(value, field.name, None)
    few = replace(session.fitted, plan=replace(session.plan, choice=replace(session.plan.choice, batch_size=3)))
    assert len(few.calibration().batches) > len(session.fitted.calibration().batches)
