"""Forward-only fine-tuning of one decoder layer: probe, score, train, evaluate."""

from dlzo import probe
from dlzo.adapter import load_adapter
from dlzo.config import TrainConfig
from dlzo.errors import UserError
from dlzo.evaluation import evaluate
from dlzo.export import export
from dlzo.metrics import Metrics
from dlzo.models import decoder_layers, load_model
from dlzo.replay import replay
from dlzo.tasks.hub import public_data
from dlzo.trainer import resume, train
from dlzo_kernels import __version__

__all__ = [
    "Metrics",
    "TrainConfig",
    "UserError",
    "__version__",
    "decoder_layers",
    "evaluate",
    "export",
    "load_adapter",
    "load_model",
    "probe",
    "public_data",
    "replay",
    "resume",
    "train",
]
