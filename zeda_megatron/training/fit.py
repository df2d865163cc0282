"""Fit the heads of paired zero experts on the teacher's answers: `python tools/fit_zero_rows.py`, seconds to minutes.

Also under torchrun: data parallel, expert parallel, tensor parallel; one pipeline stage.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from ..arguments import parse
from ..config import ZeroExpertConfig
from ..errors import UserError
from ..runtime import cpu, process_groups
from ..runtime.process_groups import ParallelConfig
from .fit_options import SCORES, FitOptions


def main(argv: list[str] | None = None) -> int:
    """Entry point: fits, writes the checkpoint and fit.json, prints a table."""
    cpu.install()
    made = parse(
        sys.argv[1:] if argv is None else argv,
        {"fit": FitOptions, "parallel": ParallelConfig},
        prog="fit_zero_rows",
    )
    options, parallel = made["fit"], made["parallel"]
    options.validate(parallel)
    process_groups.initialize(parallel)
    try:
        return HeadFit(options, parallel).run()
    finally:
        process_groups.destroy()


class HeadFit:
    """One fit, from checkpoint to checkpoint."""

    def __init__(self, options: FitOptions, parallel: ParallelConfig):
        from megatron.core import parallel_state

        from ..checkpoint.state import load_weights, require_checkpoint
        from ..models.architecture import read_architecture
        from ..models.build import build_gpt_model, transformer_config
        from ..moe.paired_fit import moe_layers
        from .fit_rows import read_fit_rows
        from .options import ModelOptions
        from .setup import hf_folder, zero_experts

        self.options, self.started = options, time.perf_counter()
        self.first = torch.distributed.get_rank() == 0
        source = ModelOptions(pretrained_checkpoint=options.pretrained_checkpoint)
        self.hf = hf_folder(source)
        arch = read_architecture(self.hf)
        have = zero_experts(source, arch)
        if have.num_zero_experts and not have.paired:
            raise UserError(
                f"--pretrained-checkpoint {options.pretrained_checkpoint}: has shared zero experts; give the static "
                "model"
            )
        self.zero = ZeroExpertConfig(
            arch.megatron["num_moe_experts"],
            zero_expert_routing="paired",
            paired_score=options.paired_score or SCORES[options.fit_target],
        )
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        self.model = build_gpt_model(arch, transformer_config(arch, parallel, dtype), self.zero)
        folder = require_checkpoint(options.pretrained_checkpoint, "--pretrained-checkpoint")
        load_weights([self.model], folder, "--pretrained-checkpoint", fresh_heads=True)
        self.model.eval().requires_grad_(False)
        self.model.return_hidden = True
        self.vocab_size = arch.vocab_size
        self.layers = moe_layers(self.model)
        self.experts = parallel_state.get_expert_model_parallel_group()
        self.replicas = parallel_state.get_expert_data_parallel_group()
        self.fit_rows, self.held_out = read_fit_rows(options, self.hf)

    def run(self) -> int:
        """Fit, set the threshold, save. Returns the exit code."""
        from ..moe.threshold import calibrate_threshold
        from .step import forward_model

        fitted = "head" in self.zero.score_terms
        quality = self._fit() if fitted else {}
        calibration = (self.fit_rows + self.held_out)[-16:]
        share = self.options.target_zero_share
        threshold = calibrate_threshold(self.model, calibration, share, forward_model)
        report = {
            "paired_score": self.zero.paired_score,
            "fit_target": self.options.fit_target if fitted else None,
            "effect_floor": self.options.effect_floor if fitted else None,
            "constants_only": self.options.constants_only,
            "ridge": self.options.ridge if fitted else None,
            "rows": self._all_ranks(len(self.fit_rows)),
            "held_out_rows": self._all_ranks(len(self.held_out)),
            "threshold": threshold,
            **self._shares(calibration),
            "r2_by_layer": {number: values[0] for number, values in quality.items()},
            "r2_of_constants_by_layer": {number: values[1] for number, values in quality.items()},
            "experts_without_rows": self.empty if fitted else None,
            "seconds": time.perf_counter() - self.started,
        }
        self._save(report)
        if self.first:
            print(format_fit(report))
        return 0

    def _fit(self) -> dict[int, tuple[float, float]]:
        """Install the heads of all layers; returns layer number -> R^2 of head and of constants, held out."""
        from ..moe.paired_fit import RidgeSums, sums_bytes

        first = next(iter(self.layers.values()))
        local, hidden = first.num_local_experts, first.config.hidden_size
        at_a_time = max(int(self.options.max_memory_gb * 1e9 / sums_bytes(local, hidden)), 1)
        numbers = sorted(self.layers)
        passes = [numbers[i : i + at_a_time] for i in range(0, len(numbers), at_a_time)]
        device = process_groups.device()
        self.empty, constants = 0, {}
        effect = self.options.fit_target == "effect"
        bar = tqdm(
            total=len(passes) * len(self.fit_rows) + len(self.held_out) * (1 + effect),
            desc="fit",
            unit="row",
            disable=None if self.first else True,
        )
        self.floors = self._floors(bar) if effect else {}
        for group in passes:
            sums = {number: RidgeSums(local, hidden, device) for number in group}
            self._run_masked(self.fit_rows, {number: sums[number].add for number in group}, bar)
            for number in group:
                constants[number] = self._install(number, sums.pop(number))
        quality = self._explained(constants, bar)
        bar.close()
        return quality

    def _floors(self, bar) -> dict[int, float]:
        """Per layer, what the norm of an output counts beside its effect: --effect-floor times the sensitivity."""
        from ..moe.paired_fit import Sensitivity

        found, self.floors = (
            {number: Sensitivity() for number in self.layers},
            dict.fromkeys(self.layers, 0.0),
        )
        self._run_masked(self.held_out, dict.fromkeys(self.layers, lambda *rows: None), bar, found)
        for part in found.values():
            part.effect, part.size = self._sum([part.effect, part.size])
        return {number: self.options.effect_floor * part.ratio() for number, part in found.items()}

    def _install(self, number: int, sums) -> torch.Tensor:
        """Solve one layer and give all ranks the whole head; returns this rank's constants."""
        sums.reduce(self.replicas)
        constant = sums.constants().float()
        weight, bias = sums.solve(self.options.ridge)
        if self.options.constants_only:
            weight, bias = torch.zeros_like(weight), constant
        self.empty += int(self._gather((sums.count == 0).float()).sum())
        head = self.layers[number].router.paired
        head.weight.copy_(self._gather(weight))
        head.bias.copy_(self._gather(bias))
        return constant

    def _explained(self, constants: dict[int, torch.Tensor], bar) -> dict[int, tuple[float, float]]:
        from ..moe.paired_fit import Explained

        quality, sinks = {number: Explained() for number in self.layers}, {}
        for number, layer in self.layers.items():
            head, own = layer.router.paired, torch.tensor(layer.local_expert_indices)
            weight, bias = head.weight[own].float(), head.bias[own].float()

            def score(x_RH, y_R, expert_R, into=quality[number], w=weight, b=bias, c=constants[number]):
                predicted_R = (x_RH.float() * w[expert_R]).sum(1) + b[expert_R]
                into.add(y_R, predicted_R, c[expert_R])

            sinks[number] = score
        self._run_masked(self.held_out, sinks, bar)
        for part in quality.values():
            names = [field.name for field in fields(part)]
            for name, value in zip(names, self._sum([getattr(part, name) for name in names])):
                setattr(part, name, value)
        return {number: part.r2() for number, part in quality.items()}

    def _sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=process_groups.device())
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def _run_masked(self, rows: list, sinks: dict, bar, sensitivities: dict | None = None) -> None:
        from ..moe.paired_fit import watch_effects, watch_experts
        from ..moe.router import zero_mask
        from .step import forward_model

        effect = self.options.fit_target == "effect"
        # Gradients flow from the embedding on; no parameter keeps one.
        self.model.embedding.word_embeddings.weight.requires_grad_(effect)
        watch = (
            watch_effects(self.layers, sinks, self.floors, sensitivities)
            if effect
            else watch_experts(self.layers, sinks)
        )
        with zero_mask(self.model), watch:
            for row in rows:
                with torch.set_grad_enabled(effect):
                    hidden = forward_model(self.model, row)
                    if effect:
                        torch.autograd.grad(
                            self._answers(hidden, row), self.model.embedding.word_embeddings.weight
                        )
                bar.update()
        self.model.requires_grad_(False)

    def _answers(self, hidden: torch.Tensor, row) -> torch.Tensor:
        """Minus the log-probability of the row's response tokens."""
        from megatron.core import parallel_state

        from ..distill.losses import LossConfig, distill_loss

        head = self.model.head_weight()
        loss, _ = distill_loss(
            hidden.to(head.dtype),
            head,
            None,
            None,
            row.labels.to(hidden.device),
            row.loss_mask.to(hidden.device),
            LossConfig("ce"),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            sequence_parallel=self.model.config.sequence_parallel,
            vocab_size=self.vocab_size,
        )
        return loss

    def _gather(self, part: torch.Tensor) -> torch.Tensor:
        """All experts' rows from the expert-parallel ranks, in the experts' order."""
        if self.experts.size() == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.experts.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.experts)
        return torch.cat(parts)

    def _all_ranks(self, count: int) -> int:
        from megatron.core import parallel_state

        return count * parallel_state.get_data_parallel_world_size()

    @torch.no_grad()
    def _shares(self, rows: list) -> dict:
        """Zero share on these rows under the threshold, over all layers and per layer."""
        from ..moe import stats
        from .step import forward_model

        stats.reset(self.model)
        for row in rows:
            forward_model(self.model, row)
        report = stats.collect(self.model, self.model.config.num_layers, process_groups.device())
        return {"zero_share": report.zero_share, "zero_share_by_layer": report.zero_share_by_layer}

    def _save(self, report: dict) -> None:
        from ..checkpoint.state import barrier, model_state, save_checkpoint, write_atomically
        from .side_files import write_side_files

        root = Path(self.options.save)
        staging, old = (root.with_name(f".{root.name}.{word}") for word in ("partial", "replaced"))
        if self.first:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            write_side_files(staging, self.hf, self.zero)
            write_atomically(staging / "fit.json", json.dumps(report, indent=2) + "\n")
        barrier()
        save_checkpoint(staging, 0, model_state([self.model]))
        if self.first:  # what stood there goes when its successor is whole
            shutil.rmtree(old, ignore_errors=True)
            if root.exists():
                os.replace(root, old)
            os.replace(staging, root)
            shutil.rmtree(old, ignore_errors=True)
        barrier()


def format_fit(report: dict) -> str:
    """The table that a fit prints."""
    lines = []
    if report["r2_by_layer"]:
        lines.append("layer  R^2 of the head  R^2 of constants  zero share")
        for number, r2 in report["r2_by_layer"].items():
            constant = report["r2_of_constants_by_layer"][number]
            share = report["zero_share_by_layer"][int(number) - 1]
            lines.append(f"{number:>5}  {r2:>15.3f}  {constant:>16.3f}  {share:>10.3f}")
    lines.append(
        f"threshold {report['threshold']:.4f}: zero share {report['zero_share']:.1%} "
        f"({report['rows']} rows, {report['seconds']:.0f} s)"
    )
    return "\n".join(lines)
