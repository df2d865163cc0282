"""The training loop: rows in, steps, logs, checkpoints, resume."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..checkpoint.integrity import intact_checkpoint
from ..checkpoint.saving import CheckpointSaver
from ..checkpoint.state import load_checkpoint, load_plain_values, model_state, require_checkpoint
from ..config.options import Options
from ..distill.hidden_match import HiddenMatch
from ..distill.passes import forward_only
from ..errors import UserError
from ..models.hf_config import describe_checkpoint
from ..models.on_disk import ModelFacts, adapted_steps, read_facts, weights_id
from ..moe import stats
from ..moe.router_dials import calibrate_threshold, format_thresholds
from ..runtime.lock import RunLock
from ..runtime.process_groups import device, peak_memory_gib
from ..runtime.terminal import ending, told, warn
from .build import build_student, build_teacher, hf_folder, teacher_id, trained_parameters
from .build_feed import data_facts, prepare_feed, what_differs
from .controls import build_share_control
from .evaluate import build_evaluation
from .guards import FiniteCheck, Guards, GuardTripped, NotFinite
from .log import RunLog
from .optimizer import build_optimizer, load_optimizer_state, optimizer_step, sharded_optimizer_state
from .signals import StopRequest, exit_code_if_stopped
from .step import Stepper


class TrainingRun:
    """A run of stage 1 or 2 (or of plain training, `--stage pretrain`).

    `lock`: of its --save folder, held by the caller.
    """

    def __init__(self, options: Options, lock: RunLock | None = None):
        self.options = options
        self.lock = lock or RunLock(None)
        feed_for = prepare_feed(options)
        self.student = build_student(options)
        self.feed = feed_for(self.student)
        has_teacher = options.model.stage != "pretrain"
        self.teacher = build_teacher(options, self.student) if has_teacher else None
        self.teacher_id = teacher_id(options) if has_teacher else None
        self.facts = self._first_facts()
        named = [pair for chunk in self.student.chunks for pair in chunk.named_parameters()]
        self.trained = {name for name, parameter in named if parameter.requires_grad}
        self.trained_parameters = trained_parameters(self.student.chunks)
        self.optimizer, self.schedule = build_optimizer(
            options.optimizer, self.student, options.model.bf16, options.share.paired_head_lr
        )
        run = options.run
        self.finite = FiniteCheck(
            self.student.chunks,
            self.teacher,
            run.save,
            options.optimizer.check_for_nan_in_loss_and_grad,
        )
        coeff = options.distill.hidden_loss_coeff
        self.stepper = Stepper(
            self.student,
            self.teacher,
            self.optimizer,
            options.loss(),
            options.data.seq_length,
            alongside=options.distill.teacher_schedule == "alongside",
            per_token=options.distill.calculate_per_token_loss,
            check=self.finite.loss,
            replay=options.generate.routing_replay,
            vocab_size=self.feed.vocab_size,
            matching=HiddenMatch(self.student.chunks, self.teacher, coeff) if coeff else None,
            mtp_scale=options.distill.mtp_loss_scale,
        )
        self.control = build_share_control(options, self.student)
        self.evaluation = build_evaluation(options, self.student, self.teacher)
        self.guards = Guards(options.guard, self.evaluation.fingerprint)
        self.saver = CheckpointSaver(run.save, run.most_recent_k, run.async_save) if run.save else None
        self.iteration = 0
        self.consumed_tokens = 0
        self.lr = 0.0
        self._resume()

    def run(self) -> int:
        """Train to --train-iters (or to a signal). Returns the exit code of this rank."""
        options, run = self.options.optimizer, self.options.run
        if self.iteration >= options.train_iters:
            told(
                f"nothing to do: all {self.iteration} steps of --train-iters are in {run.load or run.save}; a larger "
                "--train-iters goes on from there, another --save begins anew"
            )
            if self.saver and not run.load:
                self.saver.tidy()
        elif not run.save:
            kept = f" but the figures in --metrics-path {run.metrics_path}" if run.metrics_path else ""
            warn(f"no --save: nothing of this run will be kept{kept}")
        log = RunLog(run, torch.distributed.get_rank() == 0, self.iteration, options.train_iters)
        stopping, begun = False, self.iteration
        try:
            with StopRequest() as stop:
                if self.iteration == 0:
                    self.guards.start(self.evaluation.start(log))
                while self.iteration < options.train_iters and not stopping:
                    self._one_step(log)
                    stopping = stop.agreed() or (
                        run.exit_interval and self.iteration % run.exit_interval == 0
                    )
                    due = run.save_interval and self.iteration % run.save_interval == 0
                    self._keep(due or stopping or self.iteration == options.train_iters)
                self._finish_saving()
            if stopping:
                where = (
                    f"saved step {self.iteration}" if self.saver else "nothing saved: --save was not given"
                )
                log.say(f"stopped at step {self.iteration} on request; {where}")
                if self.iteration < options.train_iters:
                    return exit_code_if_stopped(run.stopped_exit_code)
            elif self.saver and self.iteration > begun:
                log.say(ending(f"saved {self.saver.folder(self.iteration)}", self._next()))
        except (NotFinite, GuardTripped):
            self._finish_saving()  # a checkpoint of before, still on its way to the disk
            raise
        except BaseException:
            if self.saver:
                self.saver.abandon()
            raise
        finally:
            log.close()
        return 0

    def _next(self) -> str:
        """What becomes of a finished run."""
        model, save = self.options.model, self.options.run.save
        on = ""
        if model.stage == "1":
            teacher = self.options.distill.teacher_load or model.pretrained_checkpoint
            on = f", zeda train --stage 2 --pretrained-checkpoint {save} --teacher-load {teacher} goes on"
        return (
            f"zeda train --stage eval --pretrained-checkpoint {save} measures it{on}, "
            f"zeda convert megatron-to-hf --megatron {save} exports it"
        )

    def _keep(self, due: bool) -> None:
        """Publish what was written in the background meanwhile; save if it is time to."""
        if self.saver:
            self.saver.poll()
            if due:
                self.save()

    def _finish_saving(self) -> None:
        if self.saver:
            self.saver.finish()

    def _one_step(self, log: RunLog) -> None:
        started = time.perf_counter()
        self.lr = lr = self.schedule.get_lr({})
        self.control.before_step(self.iteration)
        self.finite.step = self.iteration + 1
        fed = self.feed.next_rows(self.iteration)
        metrics = self.stepper.step(fed.rows, fed.padding_factor)
        self.schedule.step(increment=1)
        self.iteration += 1
        self.consumed_tokens += int(metrics["tokens"])
        layers = self.student.chunks[0].config.num_layers
        by_layer = self.options.share.paired_budget == "layer"
        report = stats.collect(self.student.chunks, layers, device(), scores_by_layer=by_layer)
        zero = self.student.zero
        metrics["kd_loss"] = metrics["loss"]
        metrics["group_loss"] = report.group_loss * zero.group_loss_coeff
        metrics["loss"] = metrics["kd_loss"] + metrics["group_loss"]
        if self.student.arch.mtp_layers:
            metrics["mtp_group_loss"] = report.mtp_group_loss * zero.group_loss_coeff
            scale = self.options.distill.mtp_loss_scale
            metrics["loss"] += scale * (metrics["mtp_loss"] + metrics["mtp_group_loss"])
            metrics["mtp_zero_share"] = report.mtp_zero_share
        self.finite.update(metrics)
        metrics["zero_share"] = report.zero_share
        metrics |= on_policy_metrics(metrics, fed.metrics)
        metrics |= self.control.after_step(report)
        metrics["lr"] = lr
        metrics["consumed_tokens"] = self.consumed_tokens
        metrics["seconds"] = time.perf_counter() - started
        metrics["tokens_per_second"] = metrics["tokens"] / metrics["seconds"]
        metrics["peak_memory_gib"] = peak_memory_gib()
        metrics["trained_parameters"] = self.trained_parameters
        if self.iteration == self.options.optimizer.train_iters:
            self._calibrate(log)
        metrics |= self.evaluation.after_step(self.iteration, log)
        log.step(self.iteration, metrics, report.zero_share_by_layer)
        self.guards.after_step(self.iteration, metrics)

    def _calibrate(self, log: RunLog) -> None:
        """Set the threshold of paired zero experts so that training rows give the target share in evaluation."""
        wanted, chunks = self.options.share, self.student.chunks
        if not (self.student.zero.paired and wanted.calibration_rows and wanted.paired_control != "none"):
            return
        if self.options.model.trainable == "mtp":  # the decoder stays what it is
            return
        rows = self.feed.calibration_rows(wanted.calibration_rows)
        # All rows in one run of the pipeline.
        forward = partial(forward_only, seq_length=self.options.data.seq_length)
        share, by_layer = wanted.paired_target, wanted.paired_budget == "layer"
        found = calibrate_threshold(chunks, [rows], share, forward, by_layer=by_layer)
        log.say(f"threshold {format_thresholds(found)} for a zero share of {share:.1%}")

    def state(self, is_loading: bool = False) -> dict[str, Any]:
        """Everything that a resumed run needs, as a Megatron sharded state dict."""
        model = model_state(self.student.chunks)
        kept = {
            name: {key: item for key, item in part.items() if self._is_kept(key)}
            for name, part in model.items()
        }
        return {
            **kept,
            "optimizer": sharded_optimizer_state(
                self.optimizer, model if len(self.student.chunks) > 1 else model["model"], is_loading
            ),
            "schedule": self.schedule.state_dict(),
            "progress": {
                "iteration": self.iteration,
                "consumed_tokens": self.consumed_tokens,
                "optimizer_step": optimizer_step(self.optimizer),
                "distributed_optimizer": self.options.optimizer.use_distributed_optimizer,
                "teacher": self.teacher_id,
                "adapted_steps": self.adapted_steps(),
                "schedule": self.options.optimizer.schedule(),
                "lr": self.lr,
                "mtp_layers": self.student.arch.mtp_layers,
            },
            "feed": self.feed.state_dict(),
            "share_control": self.control.state_dict(),
            "data": self.feed.fingerprint(),
            "data_facts": data_facts(self.options, self.feed),
            "guards": self.guards.state_dict(),
        }

    def _is_kept(self, name: str) -> bool:
        """A parameter or buffer is in this run's checkpoints: the rest is in the one that it started from."""
        return self.facts.base is None or ".router." in name or name in self.trained

    def save(self) -> None:
        """Write `iter_*`, and beside it what export and evaluation need to know."""
        self.finite.weights()
        self.lock.require()
        facts = replace(self.facts, adapted_steps=self.adapted_steps())
        describe = partial(describe_checkpoint, self.saver.root, hf_folder(self.options.model), facts)
        self.saver.save(self.iteration, self.state(), describe)
        self.guards.newest = self.saver.folder(self.iteration)

    def _first_facts(self) -> ModelFacts:
        """What is known of the weights that this run starts from."""
        start, flag = self.options.model.pretrained_checkpoint, "--pretrained-checkpoint"
        if not start:
            return replace(ModelFacts().with_zero(self.student.zero), lora=self.options.model.lora)
        facts = (read_facts(start) or ModelFacts()).with_zero(self.student.zero)
        facts = replace(facts, adapted_steps=adapted_steps(start, flag))
        if self.options.model.trainable in ("all", "mtp"):
            return facts.whole()
        base = require_checkpoint(start, flag).resolve()
        lora = self.options.model.lora or facts.lora
        return replace(facts, lora=lora, base=str(base), base_weights=weights_id(base, flag))

    def adapted_steps(self) -> int | None:
        """Steps that the weights have been distilled for, by this run and by those before it; None: nobody knows."""
        before = self.facts.adapted_steps
        return None if before is None else before + self._steps_of_adaptation()

    def _steps_of_adaptation(self) -> int:
        """Steps of this run that have moved the model away from its original; drafts alone do not."""
        return self.iteration if self.teacher and self.options.model.trainable != "mtp" else 0

    def _resume(self) -> None:
        run = self.options.run
        flag, root = ("--load", run.load) if run.load else ("--save", run.save)
        if not root:
            return
        folder = intact_checkpoint(root, flag, run.verify_checkpoint, warn)
        if folder is None:
            if run.load:
                require_checkpoint(root, flag)  # says what is missing
            return
        plain = load_plain_values(folder, flag)
        if plain.get("progress", {}).get("mtp_layers", 0) != self.student.arch.mtp_layers:
            asked = "without" if self.student.arch.mtp_layers else "with"
            raise UserError(
                f"{flag} {folder}: was trained {asked} a head of multi-token prediction; resume {asked} "
                "--mtp-loss-scale, or start in a new --save folder"
            )
        sharded = plain.get("progress", {}).get("distributed_optimizer")
        if sharded not in (None, self.options.optimizer.use_distributed_optimizer):
            raise UserError(
                f"{flag} {folder}: was saved {'with' if sharded else 'without'} --use-distributed-optimizer; resume "
                f"{'with' if sharded else 'without'} it (the two keep the optimizer's state in different forms)"
            )
        loaded = load_checkpoint(folder, self.state(is_loading=True), flag)
        progress = loaded["progress"]
        if loaded.get("data") != self.feed.fingerprint():
            differ = what_differs(loaded.get("data_facts", {}), data_facts(self.options, self.feed))
            differ = differ or "the text of --data-path, its tokenizer or its chat template is another"
            sampled = ", or how answers are sampled has changed" if self.options.model.stage == "2" else ""
            raise UserError(
                f"{flag} {folder}: was trained on other data{sampled} ({differ}); resume with the same, or start in a "
                "new --save folder"
            )
        if progress.get("teacher", self.teacher_id) != self.teacher_id:
            raise UserError(
                f"{flag} {folder}: was trained with another teacher; resume with the same --teacher-load, or start in "
                "a new --save folder"
            )
        for name, chunk in zip(model_state(self.student.chunks), self.student.chunks):
            chunk.load_state_dict(loaded[name], strict=self.facts.base is None)
        load_optimizer_state(self.optimizer, loaded["optimizer"], progress.get("optimizer_step"))
        self.schedule.load_state_dict(loaded["schedule"])
        self.control.load_state_dict(loaded.get("share_control", {}))
        self.guards.load_state_dict(loaded.get("guards", {}))
        self.guards.newest = folder
        self.iteration = progress["iteration"]
        adapted, here = progress.get("adapted_steps", self.adapted_steps()), self._steps_of_adaptation()
        self.facts = replace(self.facts, adapted_steps=None if adapted is None else adapted - here)
        self.feed.load_state_dict(loaded.get("feed", progress))  # older checkpoints: among the progress
        self.consumed_tokens = progress["consumed_tokens"]
        differ = what_differs(progress.get("schedule", {}), self.options.optimizer.schedule())
        if differ and self.iteration < self.options.optimizer.train_iters:
            warn(
                f"the schedule of the learning rate has changed ({differ}): step {self.iteration} had "
                f"{progress['lr']:.3g}, step {self.iteration + 1} gets {self.schedule.get_lr({}):.3g}"
            )


def on_policy_metrics(trained: dict[str, float], fed: dict[str, float]) -> dict[str, float]:
    """What is logged about the rows of a step; with sampled answers also `logp_gap`: their mean log-probability in the
    training pass minus that in the rollout (nats per token; 0 but for rounding if both compute alike)."""
    made = dict(fed)
    if "rollout_logp" in made:
        made["logp_gap"] = -trained["ce"] - made.pop("rollout_logp")
    return made
