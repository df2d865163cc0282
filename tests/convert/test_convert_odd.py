"""Odd folders: converted to what transformers makes of them, or refused in one line; never waited for, never wrong."""

import shutil
import time

import pytest
import tiny
import torch
from odd_folders import FILES, MEGATRON_ODD, VALUES
from transformers import AutoModelForCausalLM

from zeda_megatron.__main__ import main as zeda
from zeda_megatron.runtime.worker import run_worker

FAMILIES = {
    "qwen": lambda: tiny.hf_model(num_experts=4, num_experts_per_tok=2),
    "glm": lambda: tiny.glm_model(n_routed_experts=4, num_experts_per_tok=2),
    "mixtral": lambda: tiny.mixtral_model(num_local_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Per family a folder of two shards with the small files, and its conversion."""
    root = tmp_path_factory.mktemp("folders")
    for name, make in FAMILIES.items():
        hf = root / name
        make().save_pretrained(hf, max_shard_size="30kB")
        files = sorted(hf.glob("*.safetensors"))
        assert len(files) > 1
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (hf / file).write_text('{"a": 1}')
        (hf / "chat_template.jinja").write_text("{{ messages }}")
        assert (
            zeda(
                [
                    "convert",
                    "hf-to-megatron",
                    "--hf",
                    str(hf),
                    "--out",
                    str(root / f"{name}_m"),
                    "--num-zero-experts",
                    "2",
                ]
            )
            == 0
        )
    return root


def outcome(capsys, *arguments) -> str | None:
    """The one line of a refusal, None for a conversion; fails for whatever else may happen."""
    started, _ = time.monotonic(), capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_worker(lambda: zeda(["convert", *map(str, arguments)]))
    said = capsys.readouterr().err
    assert time.monotonic() - started < 60, "it takes too long"
    if stop.value.code == 0:
        return None
    lines = [line for line in said.split("\n") if line and not line.startswith("[transformers]")]
    assert stop.value.code == 2 and lines[-1].startswith("error: ") and len(lines) == 1, said
    assert len(lines[0]) < 2000 and lines[0].isprintable()
    return lines[0]


def opened(folder):
    """The model as transformers opens it; None if it does not, or invents weights."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    except Exception:
        return None
    return None if info["missing_keys"] or info["unexpected_keys"] else model.eval()


@torch.no_grad()
def same_model(one, other) -> bool:
    tokens = torch.arange(24).reshape(2, 12)
    names = {"rope_parameters", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"}
    equal = all(getattr(one.config, name) == getattr(other.config, name) for name in names)
    return equal and torch.equal(one(tokens).logits, other(tokens).logits)


def check_hf(capsys, source, work, cases) -> tuple[int, list[str]]:
    """(conversions, misses) of many cases."""
    converted, misses = 0, []
    for number, (name, spoil) in enumerate(cases):
        hf, out, back = (work / f"{number}{end}" for end in ("", "_m", "_back"))
        shutil.copytree(source, hf)
        spoil(hf)
        try:
            line = outcome(capsys, "hf-to-megatron", "--hf", hf, "--out", out)
            if line is None:
                converted += 1
                template = ("--hf-template", out / "hf_config")
                assert outcome(capsys, "megatron-to-hf", "--megatron", out, *template, "--out", back) is None
                theirs, ours = opened(hf), opened(back)
                assert theirs is not None, "transformers does not open it, we convert it"
                assert ours is not None and same_model(theirs, ours), "another model than transformers opens"
            else:
                assert not out.exists() and not (work / f"{number}_m.partial").exists()
        except Exception as error:  # the next case shall run, too
            misses.append(f"{name}: {type(error).__name__} {' '.join(str(error).split())[:300]}")
        for folder in (hf, out, back):
            shutil.rmtree(folder, ignore_errors=True)
    return converted, misses


def check_megatron(capsys, source, work, cases, level) -> list[str]:
    misses = []
    for number, (name, spoil) in enumerate(cases):
        m, back = work / f"{number}_m", work / f"{number}_back"
        shutil.copytree(source, m)
        spoil(m)
        flags = ("--hf-template", m / "hf_config", "--out", back, "--verify-checkpoint", level)
        try:
            line = outcome(capsys, "megatron-to-hf", "--megatron", m, *flags)
            if line is None:  # what was spoilt was not needed: the same weights as before
                want = outcome(capsys, "verify", "--hf", back, "--megatron", source)
                assert want is None
        except Exception as error:  # the next case shall run, too
            misses.append(f"{name}: {type(error).__name__} {' '.join(str(error).split())[:300]}")
        for folder in (m, back):
            shutil.rmtree(folder, ignore_errors=True)
    return misses


def test_there_are_enough_cases_and_no_two_are_alike():
    for cases, least in (([*FILES, *VALUES[::10]], 150), (MEGATRON_ODD, 60)):
        names = [name for name, _ in cases]
        assert len(set(names)) == len(names) >= least


def test_odd_files_weights_and_sources(folders, capsys, tmp_path):
    converted, misses = check_hf(capsys, folders / "qwen", tmp_path, FILES)
    assert not misses, "\n".join(misses)
    assert converted >= 5


def test_odd_values_of_config(folders, capsys, tmp_path):
    converted, misses = check_hf(capsys, folders / "qwen", tmp_path, VALUES[::10])
    assert not misses, "\n".join(misses)
    assert converted >= 5


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("family", FAMILIES)
def test_odd_values_and_files_of_every_family(folders, capsys, tmp_path, family, part):
    _, misses = check_hf(capsys, folders / family, tmp_path, [*FILES, *VALUES][part::8])
    assert not misses, "\n".join(misses)


@pytest.mark.parametrize("level", ["hash", "none"])
def test_odd_megatron_folders(folders, capsys, tmp_path, level):
    misses = check_megatron(capsys, folders / "qwen_m", tmp_path, MEGATRON_ODD, level)
    assert not misses, "\n".join(misses)
