"""Where a command's time went."""

from __future__ import annotations

import pytest

from onp.report.profile import Stopwatch, profile


def test_steps_stages_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("onp.report.profile.time.perf_counter", lambda: now[0])

    def spend(watch: Stopwatch, step: str, seconds: float) -> None:
        with watch.step(step):
            now[0] += seconds

    watch = Stopwatch()
    spend(watch, "read", 1.0)
    now[0] += 0.5  # in no step
    spend(watch, "repair", 6.0)
    spend(watch, "read", 0.5)
    report = {
        "seconds": {"probe": 2.0, "choose": 3.5, "total": 5.5},
        "image_forwards": {"probe": 100, "choose": 40, "total": 140},
    }
    found = profile(watch, "repair", report)
    assert found["wall"] == 8.0
    assert found["accounted"] == pytest.approx((1.5 + 5.5) / 8)
    assert found["stages"] == [
        {"stage": "read", "seconds": 1.5, "share": 0.1875, "image_forwards": 0},
        {"stage": "probe", "seconds": 2.0, "share": 0.25, "image_forwards": 100},
        {"stage": "choose", "seconds": 3.5, "share": 0.4375, "image_forwards": 40},
    ]
