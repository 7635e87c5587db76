"""What can be told of an adapter without knowing what it is for: how long its rows are, and what it changes."""

from dataclasses import dataclass
from datetime import datetime

# Rows this many times longer than the vocabulary's, or shorter, are told of.
FAR = 4.0
# A mean divergence below this, in nats, is what rounding makes of an adapter that does nothing in bfloat16.
NO_EFFECT_KL = 1e-3
MAX_PROBED_TASKS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """Euclidean norms of many vectors; `low` and `high` are the ends, or percentiles near them."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g} (median {self.median:.3g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """How much an adapter changes the next token after a few prompts; fields as in the protocol."""

    task: int | None = None
    mean_kl: float
    max_kl: float
    num_flips: int
    num_prompts: int

    @property
    def is_none(self) -> bool:
        """Whether it changes no more than rounding might."""
        return self.mean_kl < NO_EFFECT_KL and self.num_flips == 0

    def __str__(self) -> str:
        return (
            f"mean KL {self.mean_kl:.3g} nats, highest {self.max_kl:.3g}; the likeliest next token changes after "
            f"{self.num_flips} of {self.num_prompts} prompts"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was measured of a version, with which model and when."""

    effects: tuple[Effect, ...]
    base_model_id: str
    dtype: str
    probed_at: datetime | None = None

    @property
    def warnings(self) -> list[str]:
        """What a person should know of it."""
        return [_no_effect(effect) for effect in self.effects if effect.is_none]


def norm_warning(rows: Norms | None, vocabulary: Norms | None) -> str:
    """What to say of rows that are far from the vocabulary's in length; "" where there is nothing to say."""
    if rows is None or vocabulary is None:
        return ""
    if vocabulary.low <= FAR * rows.low and rows.high <= FAR * vocabulary.high:
        return ""
    return (
        f"the virtual tokens have norms of {rows}, the model's vocabulary has {vocabulary}; so far apart, "
        "they may be for another model, or their training may have diverged"
    )


def _no_effect(effect: Effect) -> str:
    which = "the adapter" if effect.task is None else f"task {effect.task}"
    return f"{which} changes next to nothing: {effect}. Was it trained, and for this model?"
