"""Hypothesis as these tests use it: few examples, the same ones every time, nothing kept."""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, configuration, settings

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), "state-of-gpt-hypothesis"))
settings.register_profile(
    "ours",
    max_examples=50,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("ours")
