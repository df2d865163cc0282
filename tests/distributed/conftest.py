"""Starts the workers, once per set of cases, when the first test asks for one of them."""

import pytest
import tiny_world
from cases import STEPS
from runs import Alone, Runs, differences, make_worlds


@pytest.fixture(scope="session")
def worlds(one_process, world, tmp_path_factory):
    """All worlds by name."""
    return make_worlds(tmp_path_factory.mktemp("worlds"), world)


@pytest.fixture(scope="session")
def alone(worlds, tmp_path_factory):
    """The runs in one process: world -> (metrics, final state)."""
    return Alone(worlds, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="session")
def runs(worlds, tmp_path_factory):
    """Results of the cases."""
    halfway = tmp_path_factory.mktemp("halfway")
    tiny_world.start(worlds["plain"], save=halfway, exit_interval=2, **STEPS).run()
    return Runs(worlds, halfway, tmp_path_factory.mktemp("torchrun"))


@pytest.fixture
def results(runs):
    """`results(name)`: of all ranks, none of which failed."""

    def of(name: str) -> list[dict]:
        ranks, _ = runs(name)
        for rank in ranks:
            assert "error" not in rank, rank.get("traceback")
        return [{k: v for k, v in rank.items() if k != "cpu"} for rank in ranks]

    return of


@pytest.fixture
def assert_same_run(runs, results, alone, worlds):
    """Metrics, weights and Adam's moments of a case equal those of one process, to 1e-5."""

    def check(case: dict, first_step: int = 1) -> None:
        assert {rank["iteration"] for rank in results(case["name"])} == {3}
        found = differences(case, runs(case["name"])[1], worlds, alone, first_step)
        assert max(found.values()) < 1e-5, found

    return check
