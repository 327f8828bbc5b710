"""What was skipped: written down, counted in a row, and cut back like the metrics."""

import json

from saisa_jax.training.telemetry.skipped import SkippedSteps


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_steps_in_a_row_are_counted_across_a_restart(tmp_path):
    nan = {"loss": float("nan"), "tokens": 3.0}
    skipped = SkippedSteps(tmp_path / "stage", 0)
    assert [skipped.add(step, nan, ("a/1", "a/2")) for step in (2, 4, 5, 6)] == [1, 1, 2, 3]
    row = json.loads(skipped.path.read_text().splitlines()[0])
    assert row == {"step": 2, "loss": None, "tokens": 3.0, "samples": ["a/1", "a/2"]}
    again = SkippedSteps(tmp_path / "stage", 5)  # restored after step 5: step 6 will be taken once more
    assert steps(again.path) == [2, 4, 5]
    assert again.add(6, nan, ()) == 3 and again.add(8, nan, ()) == 1
    assert steps(again.path) == [2, 4, 5, 6, 8]
