"""What a dry run says is what the run then does, and it leaves nothing behind."""

import pytest

from interviewmate_mlx.config import load_run
from interviewmate_mlx.errors import TrainingError
from interviewmate_mlx.results import dry_run
from interviewmate_mlx.results.dry_run import Forecast, rehearse
from interviewmate_mlx.training.events import Started, Stepped
from interviewmate_mlx.training.loop import train
from interviewmate_mlx.training.task import prepare


@pytest.fixture
def run(tiny_base, questions):
    """12 rows, three steps an epoch."""
    settings = [f"model.base={tiny_base}", f"data.path={questions}", "train.grad_accumulation=5"]
    return load_run("A", settings)


def test_it_starts_as_the_run_does_and_writes_nothing(run, tmp_path):
    started, forecast = rehearse(run, tmp_path / "out")
    assert isinstance(started, Started)
    assert list(tmp_path.iterdir()) == []
    assert next(train(run, tmp_path / "out")) == started
    assert isinstance(forecast, Forecast)


def test_forecast_is_the_rest_at_the_measured_speed(run, tmp_path, monkeypatch):
    def steps_of_two_seconds(task, step, first, last, stop):
        for number in range(first, last):
            yield Stepped(number + 1, 1, 1.0, 1e-3, 1.0, 5, 100, 50, 2.0, 0)

    monkeypatch.setattr(dry_run, "run_steps", steps_of_two_seconds)
    _, forecast = rehearse(run, tmp_path / "out")
    assert isinstance(forecast, Forecast)
    assert (forecast.timed_steps, forecast.tokens_per_s) == (4, 50.0)
    rows = prepare(run).rows
    train_tokens, valid_tokens = (sum(map(len, part)) for part in (rows.train, rows.valid))
    assert forecast.training_s == pytest.approx(3 * train_tokens / 50)
    # The base alone, and each of three epochs; a validated token costs half a trained one.
    assert forecast.num_validations == 4
    assert forecast.validation_s == pytest.approx(4 * valid_tokens / 50 / 2)


def test_slow_steps_are_few(run, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "_TIMED_SECONDS", 0.0)
    _, forecast = rehearse(run, tmp_path / "out")
    assert forecast.timed_steps == 1


def test_of_a_run_that_goes_on_the_rest_is_told(run, tmp_path):
    out = tmp_path / "out"
    events = train(run, out)
    for event in events:
        if isinstance(event, Stepped) and event.step == 3:
            break
    events.close()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    started, forecast = rehearse(run, out, resume=True)
    assert started.step >= 3
    assert forecast.num_validations == 2
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match="not empty"):
        next(rehearse(run, out))
    list(train(run, out, resume=True))
    (started,) = rehearse(run, out, resume=True)  # nothing is left to do
    assert started.step == started.total_steps == 9
