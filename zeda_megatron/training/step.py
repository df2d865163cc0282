"""One optimizer step: teacher pipeline, student pipeline, update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from ..config.run import LossConfig
from ..data.packing import PackedBatch
from ..distill.hidden_match import HiddenMatch
from ..distill.passes import SUMS, draft_loss, draft_states, forward_model, means, row_loss, total
from ..distill.teacher import Teacher
from ..moe.paired import forget_residuals
from ..moe.replay import enable_replay, set_targets
from ..moe.router_dials import set_dials
from ..runtime.process_groups import device, seconds_now
from .build import Student


class Stepper:
    """Runs optimizer steps of the distillation (or, without a teacher, of plain training)."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        optimizer: MegatronOptimizer,
        loss: LossConfig,
        seq_length: int,
        alongside: bool = False,
        per_token: bool = True,
        check: Callable[[dict[str, float]], None] | None = None,
        replay: bool = False,
        vocab_size: int | None = None,
        matching: HiddenMatch | None = None,
        mtp_scale: float = 0.0,
    ):
        """`alongside`: run the teacher's micro-batch just before the student's, in one pipeline; else all of its
        micro-batches come first. `per_token`: see `step`. `check` gets the metrics before the weights are
        updated; it may raise. `replay`: the student takes the experts that the rows' `picks` name. `vocab_size`: ids
        that the loss compares (default: the model's). `matching`: also match hidden states. `mtp_scale`: factor of the
        loss on the head of multi-token prediction; 0 does not run it."""
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.loss, self.seq_length = loss, seq_length
        self.alongside, self.per_token = alongside and teacher is not None, per_token
        self.check, self.replay, self.matching = check, replay, matching
        self.vocab_size = vocab_size or student.arch.vocab_size
        self.mtp_scale = mtp_scale
        if replay:
            enable_replay(student.chunks)

    def step(self, batches: list[PackedBatch], padding_factor: float = 1.0) -> dict[str, float]:
        """Train on this data-parallel rank's micro-batches.

        The loss is a mean over all response tokens of the global batch: they are counted first, so gradients do
        not depend on how the batch is cut into micro-batches and ranks. With `per_token` off it is the mean over rows
        of the mean over a row's response tokens.

        Args:
            padding_factor: rows over rows that hold text, on all ranks; the others weigh nothing.

        Returns:
            Means over response tokens (`loss`, `ce`, and with a teacher `kl`, ...), `tokens`, `grad_norm`,
            `update_seconds` (student's passes and update), with a teacher that runs ahead `teacher_seconds`, with
            `matching` `hidden_error`, the mean over layers too, and of a head of multi-token prediction `mtp_loss` and,
            with a teacher, `mtp_top1_agreement`.
        """
        for chunk in self.student.wrapped:
            chunk.zero_grad_buffer()
            chunk.train()
        self.optimizer.zero_grad()
        ahead = self.teacher is not None and not self.alongside
        scales = self._scales(batches, padding_factor)
        with self.matching.step(batches, scales) if self.matching else nullcontext():
            started = seconds_now()
            hidden = self.teacher.hidden_states(batches, self.seq_length) if ahead else []
            teacher_seconds = seconds_now() - started
            set_dials(self.student.chunks, loss_factor=padding_factor)
            if self.mtp_scale:
                set_dials(self._head_holder.mtp, loss_factor=padding_factor * self.mtp_scale)
            sums = self._run_student(batches, hidden or [None] * len(batches), scales)
        forget_residuals(self.student.chunks)
        metrics = self._reduce(sums)
        if self.check is not None:
            self.check(metrics)
        ok, grad_norm, _ = self.optimizer.step()
        metrics["grad_norm"] = float(grad_norm or 0.0)
        metrics["updated"] = float(ok)
        if ahead:
            metrics["teacher_seconds"] = teacher_seconds
        metrics["update_seconds"] = seconds_now() - started - teacher_seconds
        return metrics

    def _run_student(self, batches, hidden, scales) -> list[dict[str, torch.Tensor]]:
        """Forward and backward passes of all micro-batches; `hidden` is the teacher's, None where it runs alongside.

        Returns:
            On the last pipeline stage the sums of each micro-batch.
        """
        rows = list(zip(batches, hidden, scales, strict=True))

        def forward_step(iterator, model):
            batch, teacher_hidden, scale = next(iterator)
            if self.replay:
                picks = None if batch.picks is None else batch.picks[0]
                set_targets(model, picks)
            if self.alongside:
                output, teacher_hidden = self._both(model, batch)
            else:
                output = forward_model(model, batch)
            drafted = draft_states(self._head_holder, batch, output) if self.mtp_scale else None
            return output, partial(self._loss, batch, teacher_hidden, drafted, scale)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(rows) for _ in self.student.wrapped],
            model=self.student.wrapped,
            num_microbatches=len(batches),
            seq_length=self.seq_length,
            micro_batch_size=1,
            forward_only=False,
            adjust_tensor_shapes_fn=_twice_as_wide if self.alongside and self._stages() > 1 else None,
        )

    def _scales(self, batches: list[PackedBatch], padding_factor: float) -> list[torch.Tensor]:
        """What each micro-batch's sum of losses is multiplied by.

        Megatron divides by the number of micro-batches, its DDP by the number of data- and context-parallel ranks.
        """
        tokens_M = torch.stack([batch.loss_mask.sum() for batch in batches]).to(device())
        if self.per_token:
            ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
            tokens_M, factor = tokens_M.sum().expand(len(batches)).clone(), len(batches) * ranks.size()
        else:
            ranks = parallel_state.get_context_parallel_group()
            factor = ranks.size() * padding_factor
        if ranks.size() > 1:
            torch.distributed.all_reduce(tokens_M, group=ranks)
        return list(factor / tokens_M.clamp(min=1))

    def _both(self, model, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Teacher, then student, on this stage. Between stages their hidden states travel side by side.

        Returns:
            What goes to the next stage (or the student's last hidden states), and on the last stage the teacher's.
        """
        (student,) = self.student.chunks
        mine = theirs = None
        if not student.pre_process:
            mine, theirs = student.decoder.input_tensor.chunk(2, dim=-1)
        hidden = self.teacher.stage_output(batch, theirs)
        student.set_input_tensor(mine)
        output = forward_model(model, batch)
        if student.post_process:
            return output, hidden
        return torch.cat([output, hidden.to(output.dtype)], dim=-1), None

    @property
    def _head_holder(self) -> torch.nn.Module:
        """The bare chunk with the head of multi-token prediction: there is one pipeline stage."""
        return self.student.chunks[-1]

    @staticmethod
    def _stages() -> int:
        return parallel_state.get_pipeline_model_parallel_world_size()

    def _loss(self, batch, teacher_hidden, drafted, scale, student_hidden):
        theirs = None if teacher_hidden is None else (teacher_hidden, self.teacher.head_weight())
        loss, sums = row_loss(
            self.student.chunks[-1], batch, student_hidden, theirs, self.loss, self.vocab_size
        )
        logged = {"loss": loss.detach(), **sums}
        if drafted is not None:
            more, sums = draft_loss(self._head_holder, batch, drafted, theirs, self.loss, self.vocab_size)
            loss = loss + self.mtp_scale * more
            logged["mtp"] = {"loss": more.detach(), **sums}
        return loss * scale, torch.ones((), dtype=torch.int), logged

    def _reduce(self, sums: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Add up over micro-batches and ranks, divide by the tokens. Same result on every rank."""
        mine = (
            parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        found = total(sums if mine else [])
        if self.mtp_scale:
            found = torch.cat([found, total([row["mtp"] for row in sums] if mine else [])])
        if self.matching:
            found = torch.cat([found, self.matching.error_sum().double().cpu()[None]])
        if torch.distributed.get_world_size() > 1:
            found = found.to(device())
            torch.distributed.all_reduce(found)
        metrics = means(found[: len(SUMS)])
        if self.matching:
            metrics["hidden_error"] = found[-1].item() / max(metrics["tokens"], 1.0)
        if self.teacher is None:
            metrics = {name: metrics[name] for name in ("loss", "ce", "tokens")}
        if self.mtp_scale:
            drafts = means(found[len(SUMS) : 2 * len(SUMS)])
            names = ("loss",) if self.teacher is None else ("loss", "top1_agreement")
            metrics |= {f"mtp_{name}": drafts[name] for name in names}
        return metrics


def _twice_as_wide(received: list[tuple], sent: list[tuple]) -> tuple[list[tuple], list[tuple]]:
    """Shapes of what pipeline stages exchange where teacher and student travel side by side."""
    return tuple([(*shape[:-1], 2 * shape[-1]) for shape in shapes] for shapes in (received, sent))
