"""Mixed layouts of four processes against one."""

import pytest
from cases import FOUR_PROCESSES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.mark.parametrize("case", FOUR_PROCESSES, ids=lambda case: case["name"])
def test_same_numbers_on_mixed_layouts(assert_same_run, case):
    assert_same_run(case)
