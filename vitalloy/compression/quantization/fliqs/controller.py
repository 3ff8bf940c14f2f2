"""The controller of FLIQS: a policy over formats, its rewards, and the schedule that drives it to certainty.

One row of logits a decision, one column an option. A step samples an option for every decision, is told the reward,
and moves the logits by the policy gradient. The reward's running mean is updated *before* it is subtracted, as in the
authors' open code. The entropy of the policy is penalised, more and more as the search goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitalloy.errors import CompressionError, suggest

Value = float | Tensor


def tunas_abs(quality: Value, cost: Value, target: float, beta: float = 1.0) -> Value:
    """quality - beta |1 - cost / target|: both cheaper and dearer than the target are punished."""
    return quality - beta * abs(1 - cost / target)


def one_sided_tunas_abs(quality: Value, cost: Value, target: float, beta: float = 1.0) -> Value:
    """The same, but cheaper than the target is free of punishment."""
    return quality - beta * (_over(cost, target) - 1)


def soft_exponential(quality: Value, cost: Value, target: float, beta: float = -0.07) -> Value:
    """quality (cost / target)^beta with beta below 0, for a quality above 0, such as accuracy."""
    return quality * (cost / target) ** beta


def hard_exponential(quality: Value, cost: Value, target: float, beta: float = -0.07) -> Value:
    """The same, but cheaper than the target earns nothing."""
    return quality * _over(cost, target) ** beta


def _over(cost: Value, target: float) -> Value:
    ratio = cost / target
    return ratio.clamp_min(1) if isinstance(ratio, Tensor) else max(1.0, ratio)


REWARDS: dict[str, Callable[..., Value]] = {
    f.__name__: f for f in (tunas_abs, one_sided_tunas_abs, soft_exponential, hard_exponential)
}
SCHEDULES = ("cosine", "linear", "heaviside", "constant")


def named(kind: str, what: str, table: Any) -> str:
    """`kind`, if the table knows it; CompressionError otherwise."""
    if kind not in table:
        raise CompressionError(f"{kind!r} is no {what}.{suggest(str(kind), table)} Choose one of {', '.join(table)}.")
    return kind


def entropy_weight(step: int, delay: int, total: int, maximum: float = 0.5, schedule: str = "cosine") -> float:
    """The weight of the entropy penalty at a step.

    Args:
        schedule: "cosine" and "linear" are 0 up to step `delay` and rise to `maximum` at step `total`; "heaviside" is 0
            in the first half of `total` and `maximum` after it; "constant" is always `maximum`.
    """
    named(schedule, "entropy schedule", SCHEDULES)
    if schedule == "constant":
        return maximum
    if schedule == "heaviside":
        return maximum if step > total / 2 else 0.0
    if step <= delay:
        return 0.0
    done = min(1.0, (step - delay) / max(total - delay, 1))
    return maximum * (done if schedule == "linear" else (1 - math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Update:
    """What one step did: the advantage of its reward, the mean entropy of the policy after it (nats), the weight of
    the penalty."""

    advantage: float
    entropy: float
    entropy_weight: float


class Controller:
    """A categorical policy for every decision, trained by its rewards.

    Args:
        decisions, options: rows and columns of the logits.
        steps: length of the search, by which the entropy schedule is stretched.
        delay: steps at the start in which options are sampled evenly and the policy stays as it is.
        lr: learning rate of Adam. The authors' command uses 5e-3, their class 5e-2. A step moves a logit by about `lr`
            at most, so `lr` times the steps must reach several units.
        momentum: share of the old value in the running mean of the reward.
        entropy: schedule of the penalty (`entropy_weight`), and `max_entropy_weight` its end.
    """

    def __init__(
        self,
        decisions: int,
        options: int,
        *,
        steps: int,
        delay: int = 0,
        lr: float = 5e-3,
        momentum: float = 0.99,
        entropy: str = "cosine",
        max_entropy_weight: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        self.steps, self.delay, self.momentum, self.temperature = steps, delay, momentum, temperature
        self.schedule, self.max_entropy_weight = named(entropy, "entropy schedule", SCHEDULES), max_entropy_weight
        self.logits = torch.full((decisions, options), 0.5, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=lr)
        self.mean: float | None = None
        self.step = 0

    def probabilities(self) -> Tensor:
        """The policy, (decisions, options); even during the delay."""
        if self.step < self.delay:
            return torch.full_like(self.logits, 1 / self.logits.shape[1]).detach()
        return self._policy().detach()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The index of an option for every decision, (decisions,), on the CPU."""
        return self.probabilities().multinomial(1, generator=generator).squeeze(1)

    def choice(self) -> Tensor:
        """The likeliest option of every decision, (decisions,)."""
        return self.probabilities().argmax(1)

    def update(self, sampled: Tensor, reward: float) -> Update:
        """Learn from the reward of the sampled options (decisions,)."""
        reward = float(reward)
        self.mean = reward if self.mean is None else self.momentum * self.mean + (1 - self.momentum) * reward
        advantage = reward - self.mean
        weight = entropy_weight(self.step, self.delay, self.steps, self.max_entropy_weight, self.schedule)
        if self.step >= self.delay:
            with torch.enable_grad():
                policy = self._policy()
                likelihood = policy.gather(1, sampled.unsqueeze(1)).log().mean()
                loss = -advantage * likelihood + weight * _entropy(policy)
                self.optimizer.zero_grad()
                loss.backward()
            self.optimizer.step()
        self.step += 1
        return Update(advantage, float(_entropy(self._policy().detach())), weight)

    def _policy(self) -> Tensor:
        clipped = (self.logits / self.temperature).softmax(1).clamp(1e-8, 1)
        return clipped / clipped.sum(1, keepdim=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "logits": self.logits.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.mean,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mean, self.step = state["mean"], state["step"]


def _entropy(policy: Tensor) -> Tensor:
    return -(policy * policy.log()).sum(1).mean()
