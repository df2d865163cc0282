"""The measuring of conversions itself, on a tiny model: every step is done, timed and its memory seen."""

import pytest

from tools.measure.conversion import measure
from tools.measure.random_model import QWEN3_30B_A3B

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_step_is_timed_and_its_memory_is_its_own(tmp_path):
    ballast = bytearray(500_000_000)  # this process's memory must not count
    report = measure(tmp_path / "work", QWEN3_30B_A3B | TINY, 100_000, 2, 1)
    assert [step["name"] for step in report["steps"]] == ["copy", "import", "export", "verify"]
    for step in report["steps"]:
        assert step["seconds"] > 0 and step["gb_per_second"] == report["model_bytes"] / step["seconds"] / 1e9
    copy, *conversions = report["steps"]
    assert 0 < copy["peak_bytes"] < 50_000_000 < len(ballast)
    assert all(report["base_bytes"] / 2 < step["peak_bytes"] for step in conversions)
