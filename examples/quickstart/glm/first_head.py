"""A head of multi-token prediction for the quickstart's GLM teacher, which has none: a folder to train it in.

    python examples/quickstart/glm/first_head.py --teacher examples/quickstart/glm/teacher --out DIR

The head's layer begins as a copy of the last layer, its final norm as the model's. `eh_proj` begins as the mean of both
inputs. Training does the rest (mtp.sh); the model's own tensors keep their bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def with_head(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The tensors of a model of `layers` layers, and those of a head behind them, under their published names."""
    last, head = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    copied = {head + key.removeprefix(last): t.clone() for key, t in tensors.items() if key.startswith(last)}
    embedding, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    half = torch.eye(embedding.shape[1], dtype=embedding.dtype) / 2
    own = {
        "enorm.weight": torch.ones_like(norm),
        "hnorm.weight": torch.ones_like(norm),
        "eh_proj.weight": torch.cat([half, half], dim=1),
        "shared_head.norm.weight": norm.clone(),
        "shared_head.head.weight": tensors["lm_head.weight"].clone(),
        "embed_tokens.weight": embedding.clone(),
    }
    return tensors | copied | {head + key: tensor for key, tensor in own.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--teacher", type=Path, required=True, help="HF folder of the model without a head")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    args = parser.parse_args()
    config = json.loads((args.teacher / "config.json").read_text())
    tensors = load_file(args.teacher / "model.safetensors")
    shutil.copytree(
        args.teacher, args.out, ignore=shutil.ignore_patterns("model.safetensors", "*.md", "*.csv")
    )
    made = with_head(tensors, config["num_hidden_layers"])
    save_file(made, args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "config.json").write_text(
        json.dumps(config | {"num_nextn_predict_layers": 1}, indent=2) + "\n"
    )
    print(f"{args.out}: {len(made) - len(tensors)} tensors more")


if __name__ == "__main__":
    main()
