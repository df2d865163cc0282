"""Ask all questions of a benchmark that have no answer yet; judge all answers that have no verdict yet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ...config.generate import SamplingConfig
from ...durable_file import write_result, writing
from ...regular_file import is_regular
from ...runtime.lines_file import LinesFile, Parse, read_whole_lines
from ..benchmarks.benchmark import Benchmark, Question, Verdict
from .engine import Engine, Request, stream_of
from .run_folder import ANSWERS, SLOTS, VERDICTS
from .saved import answers_of, slots_line, verdicts_of

Job = tuple[Question, int]
"""A question and the number of the answer, from 0."""


def ask_all(
    folder: Path,
    benchmark: Benchmark,
    questions: list[Question],
    engine: Engine,
    sampling: SamplingConfig,
    samples: int,
) -> None:
    """Fill `answers.jsonl`. Every answer is on disk before the next group of its thread begins."""
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
    bar = tqdm(total=len(jobs), initial=len(done), desc=benchmark.name, unit="answer")
    with bar, _slots_counted(folder, engine):
        if engine.parallel == 1:
            for group in pending:
                bar.update(make(group))
        else:
            for made in _in_threads(engine.parallel, make, pending):
                bar.update(made)


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
    folder: Path, benchmark: Benchmark, questions: list[Question], samples: int, workers: int, again: bool
) -> None:
    """Fill `verdicts.jsonl`. Programs are judged `workers` at a time, other answers in this thread."""
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

    if not pending:
        return
    with tqdm(total=len(pending), desc=f"{benchmark.name}: judging", unit="answer") as bar:
        made = _in_threads(workers, judge, pending) if benchmark.runs_code else map(judge, pending)
        for line in made:
            file.append([line])
            bar.update()


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
