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

from zeda_megatron.serving.vllm.register import FAMILIES, SEEING

ARMS = {
    "stock": {},
    "zero": {"zce_nums": [4], "zce_types": ["zero"]},
    "copy": {"zce_nums": [4], "zce_types": ["copy"]},
    "learned": {"zce_nums": [4], "zce_types": ["learned"]},
    "paired": {"zce_types": ["zero"], "zce_routing": "paired", "zce_threshold": -2.0},
}
CLASSES = "ZEDA_SUITE_CLASSES"
"""Environment variable: family:arm:kind of every class to test."""
# They start processes for every test, or want what a machine without a GPU has not.
LEFT_OUT = "not pipeline and not tp and not ep_ and not fsdp and not test_training"


def make_case(family: str, arm: str, tail: str) -> type[unittest.TestCase]:
    """The family's own tests (most add little to `CausalLMModelTest`) on its class of this kind, `ForCausalLM` or
    `ForConditionalGeneration`."""
    theirs = importlib.import_module(f"tests.models.{family}.test_modeling_{family}")
    common = importlib.import_module("tests.causal_lm_tester").CausalLMModelTest
    own = [kind for kind in vars(theirs).values() if getattr(kind, "__module__", None) == theirs.__name__]
    suites = [kind for kind in own if kind.__name__.endswith("ModelTest")]
    suite = suites[
        -1 if tail == "ForConditionalGeneration" else 0
    ]  # a model that sees: its language model first
    testers = [kind for kind in own if kind.__name__.endswith("ModelTester")]
    tester = getattr(suite, "model_tester_class", None) or testers[-1]
    stem = FAMILIES[family]
    stock = getattr(importlib.import_module("transformers"), stem + tail)
    ours = importlib.import_module(f"zeda_megatron.serving.transformers.modeling_{family}_zero")
    dynamic = getattr(ours, f"{stem}PlusPlus{tail}")
    tested = stock if arm == "stock" else dynamic

    class Tester(tester):
        causal_lm_class = stock

        @property
        def all_model_classes(self):
            return [tested]

        def get_config(self):
            config = super().get_config()
            text = config.get_text_config()
            for key, value in ARMS[arm].items():
                setattr(text, key, value)
            if arm == "paired":
                text.zce_nums = [getattr(text, dynamic.NUM_EXPERTS)]
            return config

    Tester.__name__ = f"{stem}{tail}_{arm}_Tester"
    fields = {
        "model_tester_class": Tester,
        "test_all_params_have_gradient": False,  # a pick decides which experts have one
        "is_pipeline_test_to_skip": lambda self, *args, **kwargs: True,
        "test_model": lambda self: self.skipTest("of the base model"),
    }
    if not issubclass(suite, common):

        def set_up(self):
            suite.setUp(self)
            self.model_tester = Tester(self)

        fields |= {"setUp": set_up, "all_model_classes": (tested,), "all_generative_model_classes": (tested,)}
    return type(f"Test_{family}{tail}_{arm}", (suite, unittest.TestCase), fields)


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
            f"{family}:{arm}:{tail}"
            for family in given.families
            for tail in ["ForCausalLM"] + ["ForConditionalGeneration"] * (family in SEEING)
            for arm in dict.fromkeys(["stock", *given.arms])
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
