"""A tiny model, its tokenizer and a few conversations: enough to start training for three steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def save_tokenizer(folder: Path) -> int:
    """One token per byte and Qwen's markers; returns the size of the vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=CHATML
    ).save_pretrained(folder)
    return len(letters) + len(SPECIAL)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with `hf/`, `mcore/` (converted, two zero experts), `rollouts.jsonl` and `run.yaml`."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=save_tokenizer(folder / "hf"),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            norm_topk_prob=True,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder / "hf")
    convert = [sys.executable, "tools/checkpoint_convert.py", "hf-to-megatron", "--num-zero-experts", "2"]
    subprocess.run(
        [*convert, "--hf", str(folder / "hf"), "--out", str(folder / "mcore")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    with open(folder / "rollouts.jsonl", "w") as file:
        for number in range(8):
            question = {"role": "user", "content": f"{number}+1?"}
            answer = {"role": "assistant", "content": str(number + 1)}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    (folder / "run.yaml").write_text(
        "stage: 1\n"
        f"pretrained_checkpoint: {folder / 'mcore'}\n"
        f"data_path: {folder / 'rollouts.jsonl'}\n"
        "seq_length: 64\n"
        "global_batch_size: 2\n"
        "train_iters: 3\n"
        "progress: false\n"
    )
    return folder
