"""Benchmark files: every format, the authors' folder and downloaded copies, and what is said when one is missing."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.benchmarks import registry
from zeda_megatron.evaluation.benchmarks.registry import BENCHMARKS, GROUPS, find, load
from zeda_megatron.evaluation.benchmarks.rows import read_rows

ROWS = [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(3)]
GSM = BENCHMARKS["gsm8k"]


def write(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("question,answer\n" + "".join(f'"{r["question"]}","{r["answer"]}"\n' for r in rows))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow", ".csv"])
def test_every_format_is_read(tmp_path, ending):
    write(tmp_path / f"gsm8k{ending}", ROWS)
    assert read_rows(GSM, str(tmp_path)) == ROWS


def test_the_authors_files_may_lie_one_folder_below(tmp_path):
    write(tmp_path / "benchmark" / "gsm8k.jsonl", ROWS)
    assert read_rows(GSM, str(tmp_path)) == ROWS
    write(tmp_path / "gsm8k.jsonl", ROWS[:1])
    assert read_rows(GSM, str(tmp_path)) == ROWS[:1]


def test_a_downloaded_data_set_gives_its_test_split(tmp_path):
    write(tmp_path / "gsm8k/main/train-00000-of-00001.parquet", [{"question": "train", "answer": "#### 9"}])
    write(tmp_path / "gsm8k/main/test-00000-of-00001.parquet", ROWS)
    write(
        tmp_path / "gsm8k/socratic/test-00000-of-00001.parquet", [{"question": "other", "answer": "#### 9"}]
    )
    assert read_rows(GSM, str(tmp_path)) == ROWS


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in ("humaneval", "tasks")])
def test_missing_data_says_what_to_download_from_where_to_where(tmp_path, name):
    benchmark = BENCHMARKS[name]
    if benchmark.package_rows:
        pytest.skip("its data come with a package")
    with pytest.raises(UserError) as error:
        read_rows(benchmark, str(tmp_path))
    text = str(error.value)
    assert "\n" not in text
    for part in (f"{name}.jsonl", "TsinghuaC3I/ZEDA-Evaluation", benchmark.source.dataset, str(tmp_path)):
        assert part in text


def test_a_bad_line_is_named(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question":\n')
    with pytest.raises(UserError, match=r"gsm8k.jsonl line 2: not valid JSON"):
        read_rows(GSM, str(tmp_path))
    (tmp_path / "gsm8k.jsonl").unlink()
    (tmp_path / "gsm8k.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"gsm8k.parquet: cannot be read"):
        read_rows(GSM, str(tmp_path))


def test_names_and_groups_are_found_and_others_refused():
    assert [one.name for one in find(["paper"])] == GROUPS["paper"] and len(GROUPS["paper"]) == 11
    assert [one.name for one in find(["gsm8k", "paper", "reasoning_gym:chain_sum"])].count("gsm8k") == 1
    with pytest.raises(UserError, match="did you mean gsm8k"):
        find(["gsm8"])


def test_a_missing_verifier_names_the_extra(monkeypatch, tmp_path):
    write(tmp_path / "gsm8k.jsonl", ROWS)
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[evaluation\]'"):
        load(GSM, str(tmp_path), None, 0)


def test_two_questions_of_one_name_are_refused(tmp_path):
    write(tmp_path / "gsm8k.jsonl", [{**ROWS[0], "id": "a"}, {**ROWS[1], "id": "a"}])
    with pytest.raises(UserError, match="two questions are called a"):
        load(GSM, str(tmp_path), None, 0)
    assert [q.uid for q in load(GSM, str(tmp_path), 1, 0)] == ["a"]
