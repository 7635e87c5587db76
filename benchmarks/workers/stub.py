"""The engine over a model that takes a fixed time for each step: what B7's stub system is compared with."""

from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.engine import Engine

from benchmarks.stub.engine import FixedStepRunner
from benchmarks.workers.ours import EngineWorker
from benchmarks.workers.protocol import main


def make(*, model: str) -> EngineWorker:
    """An engine of the shape of the model in a folder."""
    config = EngineConfig(model_path=model)
    return EngineWorker(Engine(FixedStepRunner(config), config))


if __name__ == "__main__":
    main(make, [])
