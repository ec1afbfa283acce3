"""Looking inside radiology vision-language models: what a user of the library needs, each name imported when it is first asked for."""
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:   # what an editor sees; `import saerad` itself loads none of it
    from .activations.extraction import ExtractionConfig, extract
    from .activations.store import Store
    from .interpretation.exemplars import ExemplarsConfig, collect_exemplars
    from .interpretation.interpret import InterpretationConfig, interpret
    from .run.config import Config, load_config
    from .run.stages import run_config
    from .sae.evaluation import EvaluationConfig, evaluate
    from .sae.model import MatryoshkaSAE, SAEConfig
    from .sae.training import TrainingConfig, train_sae
    from .show.lab import open_run
    from .steering.steer import SteeringConfig, steer
    from .studies.record import StudiesConfig
    from .studies.sources import open_source
    from .subjects.subject import SubjectConfig, open_subject

_HOME = {
    "StudiesConfig": "studies.record", "open_source": "studies.sources",
    "SubjectConfig": "subjects.subject", "open_subject": "subjects.subject",
    "ExtractionConfig": "activations.extraction", "extract": "activations.extraction", "Store": "activations.store",
    "SAEConfig": "sae.model", "MatryoshkaSAE": "sae.model", "TrainingConfig": "sae.training", "train_sae": "sae.training",
    "EvaluationConfig": "sae.evaluation", "evaluate": "sae.evaluation",
    "ExemplarsConfig": "interpretation.exemplars", "collect_exemplars": "interpretation.exemplars",
    "InterpretationConfig": "interpretation.interpret", "interpret": "interpretation.interpret",
    "SteeringConfig": "steering.steer", "steer": "steering.steer",
    "Config": "run.config", "load_config": "run.config", "run_config": "run.stages", "open_run": "show.lab"}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME: raise AttributeError(f"module 'saerad' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"saerad.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]: return sorted({*globals(), *_HOME})
