"""What a job was, told once when it has ended: to its key's limits, its log line, and metrics."""

import time

from softprompt_api.tenants import full_name

from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.generation import Generation, finish_reason
from softprompt_gateway.openai.job import Work
from softprompt_gateway.outcome import Outcome


def settle(work: Work, generation: Generation, metrics: Metrics) -> None:
    """Tell of a generation that has ended, in whatever way."""
    outcome = _outcome(work, generation)
    work.meter.tokens += generation.num_tokens
    work.meter.facts |= outcome.facts()
    metrics.generated(outcome)


def _outcome(work: Work, generation: Generation) -> Outcome:
    target, meter = work.target, work.meter
    broken_off = "error" if generation.has_failed else "abort"
    reasons = [finish_reason(finished) for finished in generation.finished]
    num_choices = len(generation.accepted) * work.choices_per_prompt
    first_s, last_s = generation.first_token_at_s, generation.ended_at_s
    return Outcome(
        model=target.served.base_model.id,
        adapters=[full_name(target.caller.tenant, bound.version.name) for bound in target.adapters],
        usage=generation.usage if generation.has_ended else generation.usage_so_far,
        reasons=reasons + [broken_off] * (num_choices - len(reasons)),
        is_whole=generation.has_ended,
        duration_s=(last_s or time.perf_counter()) - meter.began_s,
        first_token_s=None if first_s is None else first_s - meter.began_s,
    )
