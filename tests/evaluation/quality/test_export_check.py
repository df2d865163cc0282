"""An exported folder answers like the Megatron checkpoint it came from, as transformers opens it."""

import json
import shutil

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.quality import export_check
from zeda_megatron.evaluation.quality.export_check import CheckOptions, check, main


def options(world, megatron, hf, **more):
    return CheckOptions(str(megatron), str(hf), str(world.rollouts), prompts=4, max_new_tokens=8, **more)


def test_paired_export_gives_equal_answers_and_logits(world, paired_export):
    result = check(options(world, *paired_export))
    assert result["equal_answers"] == result["prompts"] >= 4
    assert result["equal_logits"] and result["max_logit_difference"] < 1e-4 * result["max_logit"]
    assert 0.1 < result["zero_share_transformers"] < 0.9


def test_an_export_with_another_threshold_is_noticed(world, paired_export):
    megatron, hf = paired_export
    text = (hf / "config.json").read_text()
    try:
        (hf / "config.json").write_text(json.dumps(json.loads(text) | {"zce_threshold": -1.0}))
        result = check(options(world, megatron, hf))
        assert result["max_logit_difference"] > 1e-3 * result["max_logit"] and not result["equal_logits"]
    finally:
        (hf / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("answers", "logits", "code"),
    [(2, True, 0), (1, True, 1), (2, False, 1)],
    ids=["equal", "answers", "logits"],
)
def test_the_exit_code_fails_for_other_answers_and_for_other_logits(
    monkeypatch, capsys, answers, logits, code
):
    found = {"prompts": 2, "equal_answers": answers, "equal_logits": logits}
    monkeypatch.setattr(export_check, "check", lambda options: found)
    for name in ("initialize", "destroy"):
        monkeypatch.setattr(export_check.process_groups, name, lambda *given: None)
    assert main(["--megatron", "m", "--hf", "h", "--heldout", "f"]) == code
    good = "h answers as m does; next: vllm serve h, or zeda evaluate run --model h"
    said = capsys.readouterr().err.strip()
    assert said == (good if code == 0 else "h does not answer as m does: export it again, and tell us")


def test_missing_flags_are_named(world):
    with pytest.raises(UserError, match="--hf is missing"):
        main(["--megatron", "x"])


def test_no_code_of_a_folder_runs_without_consent(world, paired_export, tmp_path):
    """A canary in the folder's Python files, in a folder of theirs, and in what config.json names."""
    megatron, hf = paired_export
    canary = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    config = json.loads((hf / "config.json").read_text())
    (module,) = {name.split(".")[0] for name in config["auto_map"].values()}
    own = (hf / f"{module}.py").read_text()
    spoilt = [
        {f"{module}.py": canary + own},
        {"custom_generate/generate.py": canary},
        {
            "evil.py": canary,
            "config.json": json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.C"}}),
        },
        {
            "config.json": json.dumps(
                config | {"auto_map": config["auto_map"] | {"AutoConfig": "a/b--evil.C"}}
            )
        },
    ]
    for number, files in enumerate(spoilt):
        folder = tmp_path / str(number)
        shutil.copytree(hf, folder)
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        with pytest.raises(UserError, match="--trust-remote-code"):
            check(options(world, megatron, folder))
    assert not (tmp_path / "ran").exists()
    result = check(options(world, megatron, tmp_path / "0", trust_remote_code=True))
    assert result["equal_answers"] == result["prompts"] and (tmp_path / "ran").exists()
