"""Norms and probes as messages, and back."""

from datetime import UTC

from google.protobuf.timestamp_pb2 import Timestamp

from softprompt_api.quality import Effect, Norms, Probe
from softprompt_api.registry.v1 import registry_pb2 as pb


def norms_from(owner: pb.BaseModel | pb.AdapterVersion) -> Norms | None:
    """The norms of a model's vocabulary, or of a version's rows; None where they are not told."""
    field = "vocabulary_norms" if isinstance(owner, pb.BaseModel) else "row_norms"
    if not owner.HasField(field):  # type: ignore[arg-type]
        return None
    message: pb.Norms = getattr(owner, field)
    return Norms(low=message.low, median=message.median, high=message.high)


def norms_to(norms: Norms | None) -> pb.Norms | None:
    """The message; None where they are not known."""
    return pb.Norms(low=norms.low, median=norms.median, high=norms.high) if norms else None


def probe_from(message: pb.Probe) -> Probe:
    """What was measured."""
    return Probe(
        effects=tuple(
            Effect(
                task=effect.task if effect.HasField("task") else None,
                mean_kl=effect.mean_kl,
                max_kl=effect.max_kl,
                num_flips=effect.num_flips,
                num_prompts=effect.num_prompts,
            )
            for effect in message.effects
        ),
        base_model_id=message.base_model_id,
        dtype=message.dtype,
        probed_at=message.probed_at.ToDatetime(tzinfo=UTC) if message.HasField("probed_at") else None,
    )


def probe_of(version: pb.AdapterVersion) -> Probe | None:
    """What was measured of a version last; None: nothing yet."""
    return probe_from(version.probe) if version.HasField("probe") else None


def probe_to(probe: Probe | None) -> pb.Probe | None:
    """The message; None where there is none."""
    if probe is None:
        return None
    message = pb.Probe(base_model_id=probe.base_model_id, dtype=probe.dtype)
    message.effects.extend(
        pb.Effect(
            task=effect.task,
            mean_kl=effect.mean_kl,
            max_kl=effect.max_kl,
            num_flips=effect.num_flips,
            num_prompts=effect.num_prompts,
        )
        for effect in probe.effects
    )
    if probe.probed_at is not None:
        probed_at = Timestamp()
        probed_at.FromDatetime(probe.probed_at)
        message.probed_at.CopyFrom(probed_at)
    return message


def warnings_of(version: pb.AdapterVersion) -> list[str]:
    """What a person should know of a version: what was noticed at its registration, and what its probe says."""
    probe = probe_of(version)
    return [*version.warnings, *(probe.warnings if probe else [])]
