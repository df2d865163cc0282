"""transformers' own model tests on the classes with zero experts; what the stock class passes, they have to pass.

    python tests/serving/transformers_suite.py CHECKOUT [--families ...] [--arms stock zero ...] [-k EXPRESSION]

CHECKOUT is a checkout of transformers' repository, whose library and tests are used (the packages on PyPI lack the
tests). Prints the tests that fail for an arm and not for the stock class; exit code 1 if there are any.
"""

import argparse
import importlib
import os
import sys
import unittest
from pathlib import Path

from zeda_megatron.serving.vllm.register import FAMILIES

ARMS = {
    "stock": {},
    "zero": {"zce_nums": [4], "zce_types": ["zero"]},
    "copy": {"zce_nums": [4], "zce_types": ["copy"]},
    "learned": {"zce_nums": [4], "zce_types": ["learned"]},
    "paired": {"zce_types": ["zero"], "zce_routing": "paired", "zce_threshold": -2.0},
}
CLASSES = "ZEDA_SUITE_CLASSES"
"""Environment variable: family:arm of every class to test."""
# They start processes for every test, or want what a machine without a GPU has not.
LEFT_OUT = "not pipeline and not tp and not ep_ and not fsdp and not test_training"


def make_case(family: str, arm: str) -> type[unittest.TestCase]:
    """The tests of one class of models: `CausalLMModelTest`, or the family's own ones, on ...ForCausalLM."""
    theirs = importlib.import_module(f"tests.models.{family}.test_modeling_{family}")
    suite = importlib.import_module("tests.causal_lm_tester").CausalLMModelTest
    stem = FAMILIES[family]
    stock = getattr(importlib.import_module("transformers"), f"{stem}ForCausalLM")
    ours = importlib.import_module(f"zeda_megatron.serving.transformers.modeling_{family}_zero")
    dynamic = getattr(ours, f"{stem}PlusPlusForCausalLM")

    class Tester(getattr(theirs, f"{stem}ModelTester")):
        causal_lm_class = stock

        @property
        def all_model_classes(self):
            return [stock if arm == "stock" else dynamic]

        def get_config(self):
            config = super().get_config()
            for key, value in ARMS[arm].items():
                setattr(config, key, value)
            if arm == "paired":
                config.zce_nums = [getattr(config, dynamic.NUM_EXPERTS)]
            return config

    Tester.__name__ = f"{stem}_{arm}_Tester"
    fields = {
        "model_tester_class": Tester,
        "test_all_params_have_gradient": False,  # a pick decides which experts have one
        "is_pipeline_test_to_skip": lambda self, *args, **kwargs: True,
        "test_model": lambda self: self.skipTest("of the base model"),
    }
    if not issubclass(Tester, importlib.import_module("tests.causal_lm_tester").CausalLMModelTester):
        suite = getattr(theirs, f"{stem}ModelTest")
        classes = (stock if arm == "stock" else dynamic,)

        def set_up(self):
            suite.setUp(self)
            self.model_tester = Tester(self)

        fields |= {"setUp": set_up, "all_model_classes": classes, "all_generative_model_classes": classes}
    return type(f"Test_{family}_{arm}", (suite, unittest.TestCase), fields)


class Outcomes:
    """A pytest plugin that remembers {class: {test: outcome}}."""

    def __init__(self):
        self.found: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            case, _, name = report.nodeid.partition("::")[2].partition("::")
            self.found.setdefault(case, {})[name] = report.outcome


def main() -> int:
    import pytest

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("-k", default=LEFT_OUT, help=f"which tests (default: {LEFT_OUT!r})")
    given = parser.parse_args()
    checkout, here = given.checkout.resolve(), Path(__file__).resolve()
    if not (checkout / "tests" / "causal_lm_tester.py").is_file():
        print(f"error: {checkout}: no checkout of transformers with its tests", file=sys.stderr)
        return 2
    paths = [str(checkout / "src"), str(checkout), str(here.parents[2])]
    if os.environ.get(CLASSES) is None:  # once more, with the checkout first on the path of all processes
        classes = [
            f"{family}:{arm}" for family in given.families for arm in dict.fromkeys(["stock", *given.arms])
        ]
        environment = {"PYTHONPATH": os.pathsep.join(paths), CLASSES: " ".join(classes)}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)
    outcomes = Outcomes()
    pytest.main(
        [
            str(here),
            "-q",
            "-c",
            "/dev/null",
            "--rootdir",
            str(here.parent),
            "-p",
            "no:cacheprovider",
            "-k",
            given.k,
        ]
        + ["--disable-warnings", "--tb=short", "-o", "python_files=transformers_suite.py"],
        plugins=[outcomes],
    )
    worse = 0
    for case, found in outcomes.found.items():
        stock = outcomes.found.get(case.rpartition("_")[0] + "_stock", {})
        lost = sorted(name for name, outcome in found.items() if outcome == "failed" != stock.get(name))
        count = {kind: list(found.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        print(case.removeprefix("Test_"), *(f"{number} {kind}" for kind, number in count.items()), sep=", ")
        print(
            *(f"  fails, and not for the stock class: {name}" for name in lost),
            sep="\n",
            end="\n" if lost else "",
        )
        worse += len(lost)
    return 1 if worse or not outcomes.found else 0


if __name__ == "__main__":
    sys.exit(main())
# Collected by pytest: the classes that `main` has named.
globals().update(
    {
        case.__name__: case
        for case in (make_case(*name.split(":")) for name in os.environ.get(CLASSES, "").split())
    }
)
