"""Files of stage 0, made in this process and read back."""

from __future__ import annotations

import json

import tiny_world


def stage0_options(world, path, **values):
    """Options of a stage 0 that writes to `path`."""
    fields = {
        "stage": "0",
        "pretrained_checkpoint": world.static,
        "data_path": world.prompts,
        "rollout_path": path,
        "max_new_tokens": 5,
    }
    return tiny_world.options(world, **(fields | values))


def stage0(world, path, expected_code=0, **values):
    """Run stage 0 in this process; its file."""
    from zeda_megatron.training.stage0 import run_stage0

    assert run_stage0(stage0_options(world, path, **values)) == expected_code
    return path


def answers(*files) -> dict[str, dict]:
    """Answers by key; every key once."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    by_key = {line["key"]: line for line in lines}
    assert len(by_key) == len(lines)
    return by_key
