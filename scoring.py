"""Log-likelihoods: a model and a plan of batches -> what the model says to each request.

    Scorer(model, info, dtype).score(plan(requests, ...)) -> list[Scores], alike on every rank

Only states that predict something scored are projected onto the vocabulary, a few hundred at a
time; the softmax is taken in float32. Ranks compute different batches and add up what they found,
once, at the end: whatever happens to one of them before that, the others do not wait for it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from config import UserError
from likelihood import Scores
from loss import softcap
from packing import Batch, Plan
from training.distributed import DistInfo, all_reduce_sum, autocast

# What `score` calls with the requests this rank has just finished; True asks it to stop.
Progress = Callable[[list[int], list[Scores]], bool]

# Columns of the sums of a slot.
LOGPROB, TOKENS, MISSES, FILTERED_MISSES = range(4)


# What a rank says of a failure that another one had.
ELSEWHERE = "on another process"


class Scorer:
    """A model made ready to be asked, on this process, about any number of plans."""

    def __init__(
        self, model: nn.Module, info: DistInfo, dtype: torch.dtype, compile_mode: str = "off"
    ):
        """Take a model on the device of `info`; products are computed in `dtype`.

        `compile_mode` is auto, on or off, as in a run's config.
        """
        self.model, self.info, self.dtype = model, info, dtype
        on_cuda = info.device.type == "cuda"
        # What is compiled, and what a GPU's kernels are chosen for, had better not change shape.
        self.few_shapes = compile_mode == "on" or info.device.type != "cpu"
        self._hidden, self._compiled = model.hidden, False
        if compile_mode == "on" or (compile_mode == "auto" and on_cuda):
            # Shapes are few and fixed; one program for all of them would be slower.
            torch._dynamo.config.recompile_limit = 64
            self._hidden, self._compiled = torch.compile(model.hidden, dynamic=False), True

    @torch.no_grad()
    def score(
        self, plan: Plan, excluded: np.ndarray | None = None, on_progress: Progress | None = None
    ) -> list[Scores] | None:
        """Return the scores of every request in the plan, or None if a rank was asked to stop.

        `excluded` are the ids with which an ending cannot begin in `Scores.greedy_filtered`. Raises
        UserError when they are not finite, and on every rank RuntimeError when one of them failed.
        """
        sums = np.zeros((int(plan.first_slots[-1]), 4))
        training, stopped, error = self.model.training, False, None
        self.model.eval()
        try:
            stopped = self._score_share(plan, excluded, on_progress, sums)
        except Exception as raised:
            error = raised
        finally:
            self.model.train(training)
        failures, stops = all_reduce_sum(torch.tensor([int(error is not None), int(stopped)]))
        if failures:
            lines = f"{error}".splitlines() or [""]
            why = f"{type(error).__name__}: {lines[0]}" if error else ELSEWHERE
            raise RuntimeError(f"scoring failed ({why})") from error
        if stops:
            return None
        sums = all_reduce_sum(torch.from_numpy(sums)).numpy()
        if not np.isfinite(sums).all():
            raise UserError(
                "The model's log-likelihoods are not numbers: its weights have diverged. Take an "
                "earlier checkpoint."
            )
        return [_scores(plan, sums, i) for i in range(len(plan.first_slots) - 1)]

    def _score_share(
        self,
        plan: Plan,
        excluded: np.ndarray | None,
        on_progress: Progress | None,
        sums: np.ndarray,
    ) -> bool:
        """Add what this rank's batches say to the sums; return whether it was asked to stop."""
        info = self.info
        waiting = np.bincount(
            [i for batch in plan.batches for i in batch.requests],
            minlength=len(plan.first_slots) - 1,
        )
        head = _Head(self.model, self.dtype, excluded)
        # Autocast keeps the weights it has rounded for as long as it lasts.
        with autocast(info.device, self.dtype):
            for batch in plan.batches[info.rank :: info.world_size]:
                self._add(batch, head, sums)
                np.subtract.at(waiting, batch.requests, 1)
                done = [i for i in dict.fromkeys(batch.requests) if waiting[i] == 0]
                if on_progress is not None and on_progress(
                    done, [_scores(plan, sums, i) for i in done]
                ):
                    return True
        return False

    def _add(self, batch: Batch, head: "_Head", sums: np.ndarray) -> None:
        """Add what one batch says to the sums (slots, 4)."""
        device = self.info.device
        idx = torch.from_numpy(batch.tokens).to(device)
        if batch.causal and idx.size(1) <= self.model.config.block_size:
            x = self._states(idx)
        else:
            positions = torch.from_numpy(batch.positions).to(device)
            x = self._states(idx, positions=positions, mask=sight(batch, device, self.dtype))
        x = x.flatten(0, 1)[torch.from_numpy(batch.states).to(device)]
        with torch.autocast(device.type, enabled=False):
            found = head.predict(x.float(), batch)
        for column, values in found.items():
            np.add.at(sums[:, column], batch.slots, values)

    def _states(self, idx: Tensor, **rows: Tensor) -> Tensor:
        """Return `model.hidden`, compiled if that was asked for and works."""
        try:
            return self._hidden(idx, **rows)
        except Exception as error:
            if not self._compiled:
                raise
            if self.info.is_main:
                reason = (f"{error}".splitlines() or [type(error).__name__])[0]
                print(f"torch.compile failed ({reason}): scoring goes on without it.", flush=True)
            self._hidden, self._compiled = self.model.hidden, False
            return self._hidden(idx, **rows)


def sight(batch: Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the mask (B, 1, L, L) of a batch: 0 where a token sees another, -inf elsewhere.

    A token sees those before it, and itself, that are its context's or its own ending's. Padding
    sees itself: a softmax over nothing is not a number.
    """
    tree, branch = (torch.from_numpy(ids).to(device) for ids in (batch.tree, batch.branch))
    mine, theirs = branch[:, :, None], branch[:, None, :]
    sees = (tree[:, :, None] == tree[:, None, :]) & ((theirs == 0) | (theirs == mine))
    length = tree.size(1)
    sees &= torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, -torch.inf)[
        :, None
    ]


class _Head:
    """The projection onto the vocabulary, in the arithmetic of an evaluation."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, excluded: np.ndarray | None):
        self.weight, self.vocab_size = model.head_weight.detach(), model.config.vocab_size
        self.softcap = model.config.logit_softcap
        # Subtracting one vector from all rows shifts a state's logits alike, which leaves the
        # softmax as it is. Logits of OpenAI's models lie around -100, where bfloat16 has steps of
        # 0.5; without what they have in common they are small, and so are their rounding errors.
        self.shift = self.weight[: self.vocab_size].mean(0)
        if self.softcap:
            # Bent logits are small, and a shift before the bend would not be the same for all.
            self.shift = torch.zeros_like(self.shift)
        self.centred = (self.weight - self.shift).to(dtype)
        self.excluded = None
        if excluded is not None:
            self.excluded = torch.from_numpy(excluded).to(self.weight.device)
        # A CPU keeps 256 rows of logits, and the memory they lie in.
        self.rows = 256 if self.weight.device.type == "cpu" else 4096
        self.memory = self.weight.new_empty(self.rows, len(self.weight), dtype=torch.float32)

    def predict(self, x: Tensor, batch: Batch) -> dict[int, np.ndarray]:
        """Return each prediction's values by their column, from states (N, C) in float32."""
        parts = []
        for start in range(0, len(x), self.rows):
            stop = start + self.rows
            inside = slice(*np.searchsorted(batch.predicts, [start, stop]))
            rows = torch.from_numpy(batch.predicts[inside] - start).to(x.device)
            targets = torch.from_numpy(batch.targets[inside]).to(x.device)
            parts.append(self._predict(x[start:stop], rows, targets))
        logprobs, misses, filtered = (
            torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)
        )
        return {
            LOGPROB: logprobs.astype(np.float64),
            TOKENS: np.ones(len(logprobs)),
            MISSES: misses,
            FILTERED_MISSES: np.where(batch.begins, filtered, misses),
        }

    def _predict(self, x: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (log p, is not likeliest, the same less excluded ids) of targets after states."""
        logits = self.memory[: len(x)]
        if self.centred.dtype == torch.float32:
            torch.mm(x, self.centred.T, out=logits)
        else:
            logits.copy_(x.to(self.centred.dtype) @ self.centred.T)
        if self.softcap:
            logits.copy_(softcap(logits, self.softcap))
        logits[:, self.vocab_size :] = -torch.inf
        # The largest value is found much faster than its place, and it is all that is needed.
        top, target_logits = logits.amax(1), logits[rows, targets]
        misses = filtered = target_logits < top[rows]
        if self.excluded is not None:
            kept = logits[:, self.excluded]
            logits[:, self.excluded] = -torch.inf
            # An excluded target is at minus infinity now, below the largest.
            filtered = logits[rows, targets] < logits.amax(1)[rows]
            logits[:, self.excluded] = kept
        total = logits.sub_(top[:, None]).exp_().sum(1)[rows]
        top = top[rows]
        others = (total - (target_logits - top).exp()).clamp(min=0)
        # The target's own logit is cheap to have without rounding.
        exact = (x[rows] * (self.weight[targets] - self.shift)).sum(1)
        above = (softcap(exact, self.softcap) if self.softcap else exact) - top
        logprobs = above - (others + above.exp()).log()
        return logprobs, misses, filtered


def _scores(plan: Plan, sums: np.ndarray, request: int) -> Scores:
    first, last = plan.first_slots[request : request + 2]
    endings, context = sums[first : last - 1], sums[last - 1]
    return Scores(
        endings[:, LOGPROB].copy(),
        endings[:, TOKENS].astype(np.int64),
        endings[:, MISSES] == 0,
        endings[:, FILTERED_MISSES] == 0,
        float(context[LOGPROB]),
        int(context[TOKENS]),
    )
