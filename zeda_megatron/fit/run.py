"""Fit paired zero experts, heads and stand-ins, on the teacher's answers: `zeda fit`, seconds to minutes.

Also under torchrun: data parallel, expert parallel, tensor parallel; one pipeline stage.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state

from ..checkpoint.state import holds_mtp_head, model_state, save_checkpoint
from ..config.arguments import parse
from ..config.fit import FitOptions
from ..config.model import ModelOptions
from ..config.parallel import ParallelConfig
from ..data.rows import read_fit_rows
from ..data.tokenizers import load_tokenizer
from ..durable_file import write_atomically, writing
from ..errors import UserError
from ..models.architecture import read_architecture
from ..models.build import build_gpt_model, transformer_config
from ..models.hf_config import describe_checkpoint
from ..models.load import load_weights
from ..models.on_disk import (
    ZEDA_NAME,
    ModelFacts,
    adapted_steps,
    read_facts,
    weight_folders,
    weights_id,
)
from ..moe import stats
from ..moe.router_dials import calibrate_threshold, format_thresholds
from ..runtime import process_groups
from ..runtime.agreement import on_rank0
from ..runtime.terminal import ending, progress_bar, warn
from ..runtime.whole_folder import new_folder
from ..text_table import text_table
from ..training.build import hf_folder, zero_experts
from .hidden_units import RowStore, fit_hidden_units, store_bytes
from .paired_fit import Sensitivity, WatchedPasses, moe_layers
from .ridge import Explained, RidgeSums, fill_empty, sums_bytes
from .stand_in_fit import StandInFit

CALIBRATION_PASSES = 4


def main(argv: list[str]) -> int:
    """Entry point: fits, writes the checkpoint and fit.json, prints a table."""
    made = parse(
        argv,
        {"fit": FitOptions, "parallel": ParallelConfig},
        prog="zeda fit",
    )
    options, parallel = made["fit"], made["parallel"]
    options.validate(parallel)
    with process_groups.started(parallel):
        return HeadFit(options, parallel).run()


def _check_target(options: FitOptions) -> None:
    """Raise `UserError` for a `--save` that holds something else, or something that nobody said to replace."""
    folder = Path(options.save)
    if not folder.exists():
        return
    if not options.overwrite:
        raise UserError(
            f"--save {folder}: exists; train or export it, choose another folder, or give --overwrite"
        )
    if not (folder / ZEDA_NAME).is_file():
        raise UserError(
            f"--overwrite replaces checkpoints only: --save {folder} has no {ZEDA_NAME}; choose another folder"
        )


class HeadFit:
    """One fit, from checkpoint to checkpoint."""

    def __init__(self, options: FitOptions, parallel: ParallelConfig):
        _check_target(options)
        self.options, self.started = options, time.perf_counter()
        self.first = torch.distributed.get_rank() == 0
        source = ModelOptions(pretrained_checkpoint=options.pretrained_checkpoint)
        self.hf = hf_folder(source)
        arch = read_architecture(self.hf)
        # A head of multi-token prediction comes along; what it skips is left to training.
        start = options.pretrained_checkpoint
        if holds_mtp_head(weight_folders(start, "--pretrained-checkpoint"), "--pretrained-checkpoint"):
            arch = arch.with_mtp_head("--pretrained-checkpoint")
        have = zero_experts(source, arch)
        if have.num_zero_experts and not have.paired:
            raise UserError(
                f"--pretrained-checkpoint {options.pretrained_checkpoint}: has shared zero experts; give the static "
                "model (convert it without --num-zero-experts)"
            )
        self.zero = options.zero(arch.megatron["num_moe_experts"], arch.megatron["moe_ffn_hidden_size"])
        # The weights stay what they are: an original's, or adapted ones.
        self.facts = replace(
            (read_facts(start) or ModelFacts()).with_zero(self.zero).whole(),
            adapted_steps=adapted_steps(start, "--pretrained-checkpoint"),
            source_sha256=weights_id(start, "--pretrained-checkpoint"),
        )
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        self.model = build_gpt_model(arch, transformer_config(arch, parallel, dtype), self.zero)
        self.rows = read_fit_rows(options, load_tokenizer(self.hf), warn)
        load_weights([self.model], start, "--pretrained-checkpoint", heads="fresh")
        self.model.to(dtype).eval().requires_grad_(False)
        self.layers = moe_layers(self.model)
        self.effect, self.floors = options.fit_target == "effect", {}
        self.experts = parallel_state.get_expert_model_parallel_group()
        self.replicas = parallel_state.get_expert_data_parallel_group()
        self.without_rows = self.few_rows = 0
        self.bar = progress_bar(None, "row", "fit", options.progress)
        self.passes = WatchedPasses(self.model, self.layers, arch.vocab_size, self.effect, self.bar.update)
        self.stand_ins = None
        if self.zero.zero_experts_type != "zero":
            room = options.max_memory_gb * 1e9
            self.stand_ins = StandInFit(
                self.layers, self.passes, options.ridge, room, self._gather, self.replicas
            )

    def run(self) -> int:
        """Fit, set the threshold, save. Returns the exit code."""
        with new_folder(self.options.save, "--save") as staging, self.bar:
            report = self._fit_and_calibrate()
            with writing(f"--save {self.options.save}"):
                on_rank0(lambda: describe_checkpoint(staging, self.hf, self.facts))
                on_rank0(lambda: write_atomically(staging / "fit.json", json.dumps(report, indent=2) + "\n"))
            save_checkpoint(
                staging, 0, model_state([self.model]) | {"adapted_steps": self.facts.adapted_steps}
            )
        if self.first:
            save, start = self.options.save, self.options.pretrained_checkpoint
            print(format_fit(report))
            data = " ".join(map(str, self.options.data_path))
            train = f"zeda train --stage 1 --pretrained-checkpoint {save} --teacher-load {start} --data-path {data}"
            export = f"zeda convert megatron-to-hf --megatron {save}"
            print(ending(f"saved {save}", f"{train} trains it, {export} exports it"))
        return 0

    def _fit_and_calibrate(self) -> dict:
        options, rows = self.options, self.rows
        fitted = "head" in self.zero.score_terms
        passes = self._passes() if fitted else []
        self.bar.total = len(rows.calibration) * (CALIBRATION_PASSES + 1)
        if self.stand_ins:
            self.bar.total += len(rows.fit) * len(self.stand_ins.plan) + len(rows.held_out)
            self.bar.total += len(rows.calibration) * CALIBRATION_PASSES
        self.bar.total += (
            (len(passes) * len(rows.fit) + len(rows.held_out) * (1 + self.effect)) if fitted else 0
        )
        quality = self._fit(passes) if fitted else {}
        threshold, explained, skipped_below = self._calibrate(), None, None
        if self.stand_ins:
            # Fitted to what this threshold skips; with them other picks follow, so it is set once more.
            skipped_below = threshold
            self.stand_ins.run(rows.fit)
            explained = self.stand_ins.explained(rows.held_out, self._sum)
            threshold = self._calibrate()
        return {
            "paired_score": self.zero.paired_score,
            "fit_target": options.fit_target if fitted else None,
            "effect_floor": options.effect_floor if fitted and self.effect else None,
            "constants_only": options.constants_only,
            "ridge": options.ridge if fitted and not options.constants_only else None,
            "rows": rows.fit_count if fitted else 0,
            "held_out_rows": rows.held_out_count if fitted else 0,
            "passes": len(passes),
            "threshold": threshold[0] if len(threshold) == 1 else threshold,
            **self._shares(),
            "r2_by_layer": {number: values[0] for number, values in quality.items()},
            "r2_of_constants_by_layer": {number: values[1] for number, values in quality.items()},
            "paired_head_width": self.zero.paired_head_width,
            "zero_experts_type": self.zero.zero_experts_type,
            "stand_in_rank": self.zero.stand_in_rank,
            "stand_in_explains_by_layer": explained,
            "stand_ins_fitted_below": skipped_below,
            "experts_without_rows": self.without_rows if fitted else None,
            "experts_with_few_rows": self.few_rows if fitted else None,
            "seconds": time.perf_counter() - self.started,
        }

    def _calibrate(self) -> list[float]:
        return calibrate_threshold(
            self.model,
            self.rows.calibration,
            self.options.target_zero_share,
            self.passes.forward,
            CALIBRATION_PASSES,
            by_layer=self.options.paired_budget == "layer",
        )

    def _passes(self) -> list[list[int]]:
        """Layers of each pass over the data: as many as have room for their sums (and rows)."""
        first = next(iter(self.layers.values()))
        size = sums_bytes(first.num_local_experts, first.config.hidden_size)
        if self.zero.paired_head_width:
            size += store_bytes(first.config.hidden_size, 2 if self.options.bf16 else 4)
        room, numbers = max(int(self.options.max_memory_gb * 1e9 / size), 1), sorted(self.layers)
        return [numbers[i : i + room] for i in range(0, len(numbers), room)]

    @torch.no_grad()
    def _fit(self, passes: list[list[int]]) -> dict[int, tuple[float, float]]:
        """Install the heads of all layers; returns layer number -> R^2 of head and of constants, held out."""
        first, constants = next(iter(self.layers.values())), {}
        if self.effect:
            self.floors = self._floors()
        for group in passes:
            sums = {
                number: RidgeSums(first.num_local_experts, first.config.hidden_size, process_groups.device())
                for number in group
            }
            stores = {number: RowStore() for number in group if self.zero.paired_head_width}
            sinks = {number: _both(sums[number], stores.get(number)) for number in group}
            self.passes.run(self.rows.fit, sinks, self.floors)
            for number in group:
                constants[number] = self._install(number, sums.pop(number), stores.pop(number, None))
        return self._explained(constants)

    def _floors(self) -> dict[int, float]:
        """Per layer, what the norm of an output counts beside its effect: --effect-floor times the sensitivity."""
        found = {number: Sensitivity() for number in self.layers}
        nowhere, none = dict.fromkeys(self.layers, lambda *rows: None), dict.fromkeys(self.layers, 0.0)
        self.passes.run(self.rows.held_out, nowhere, none, found)
        for part in found.values():
            sums = torch.tensor([part.effect, part.size], dtype=torch.float64, device=process_groups.device())
            part.effect, part.size = self._sum(sums).tolist()
        return {number: self.options.effect_floor * part.ratio() for number, part in found.items()}

    def _install(self, number: int, sums: RidgeSums, store: RowStore | None) -> torch.Tensor:
        """Solve one layer and give all ranks the whole head; returns the constants of all experts."""
        sums.reduce(self.replicas)
        count = self._gather(sums.count)
        constant = fill_empty(self._gather(sums.constants()), count)
        head = self.layers[number].router.paired
        if self.options.constants_only:
            head.weight.zero_()
            head.bias.copy_(constant)
        else:
            weight, bias = sums.solve(self.options.ridge)
            made = {"weight": weight, "bias": bias}
            if store is not None:
                width = self.zero.paired_head_width
                made = fit_hidden_units(store.rows(), weight, bias, width, self.replicas)
            for name, part in made.items():
                whole = part if name in ("hidden_weight", "hidden_bias") else self._gather(part)
                getattr(head, name).copy_(
                    torch.where(count > 0, whole, constant) if name == "bias" else whole
                )
        self.without_rows += int((count == 0).sum())
        self.few_rows += int(((count > 0) & (count < head.weight.shape[1])).sum())
        return constant

    def _explained(self, constants: dict[int, torch.Tensor]) -> dict[int, tuple[float, float]]:
        quality, sinks = {}, {}
        for number, layer in self.layers.items():
            own = layer.local_expert_indices
            quality[number] = Explained(partial(_prediction, layer), constants[number][own].float())
            sinks[number] = quality[number].add
        self.passes.run(self.rows.held_out, sinks, self.floors)
        for part in quality.values():
            self._sum(part.sums)
        return {number: part.r2() for number, part in quality.items()}

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over all ranks, in place."""
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(values)
        return values

    def _gather(self, part: torch.Tensor) -> torch.Tensor:
        """All experts' rows from the expert-parallel ranks, in the experts' order."""
        if self.experts.size() == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.experts.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.experts)
        return torch.cat(parts)

    @torch.no_grad()
    def _shares(self) -> dict:
        """Zero share on the calibration rows under the threshold, over all layers and per layer."""
        stats.reset(self.model)
        for row in self.rows.calibration:
            self.passes.forward(self.model, row)
        report = stats.collect(self.model, self.model.config.num_layers, process_groups.device())
        return {"zero_share": report.zero_share, "zero_share_by_layer": report.zero_share_by_layer}


def _both(sums: RidgeSums, store: RowStore | None):
    """A sink that fills both."""

    def take(x_RH, y_R, expert_R):
        sums.add(x_RH, y_R, expert_R)
        if store is not None:
            store.add(x_RH, y_R, expert_R)

    return take


def _prediction(layer, expert: int, x_RH: torch.Tensor) -> torch.Tensor:
    return layer.router.paired.predict(x_RH, layer.local_expert_indices[expert])


def format_fit(report: dict) -> str:
    """Lines a layer, then what the threshold gives; `report` is what fit.json holds."""
    lines, rows = [], [["layer", "R^2 of the head", "R^2 of constants", "zero share"]]
    stand_ins = report["stand_in_explains_by_layer"] or {}
    if stand_ins:
        rows[0].append("stand-ins explain")
    for number, r2 in report["r2_by_layer"].items():
        values = (
            r2,
            report["r2_of_constants_by_layer"][number],
            report["zero_share_by_layer"][int(number) - 1],
        )
        values += tuple(stand_ins[n] for n in stand_ins if str(n) == str(number))
        rows.append([str(number), *(f"{value:.3f}" for value in values)])
    if len(rows) > 1:
        lines += text_table(rows, "rrrrr")
    if report["experts_without_rows"] or report["experts_with_few_rows"]:
        lines.append(
            f"{report['experts_without_rows']} experts had no row and got the mean over the others, "
            f"{report['experts_with_few_rows']} had fewer rows than channels (more --fit-rows would help)"
        )
    threshold = report["threshold"]
    told = format_thresholds(threshold if isinstance(threshold, list) else [threshold])
    lines.append(
        f"threshold {told}: zero share {report['zero_share']:.1%} "
        f"({report['rows']} rows, {report['seconds']:.0f} s)"
    )
    return "\n".join(lines)
