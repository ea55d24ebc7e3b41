"""Side effects of runs: images, embedding files, tables."""

from tokenlearn.callbacks.embedding_export import EmbeddingExport
from tokenlearn.callbacks.image_grid import ImageGrid
from tokenlearn.callbacks.last_checkpoint import LastCheckpoint
from tokenlearn.callbacks.learning_curve import LearningCurve
from tokenlearn.callbacks.prediction_writer import PredictionWriter
from tokenlearn.callbacks.report_writer import ReportWriter
from tokenlearn.callbacks.result_writer import ResultWriter
from tokenlearn.callbacks.run_config import RunConfig
from tokenlearn.callbacks.run_progress import RunProgress
from tokenlearn.callbacks.step_guard import StepGuard
from tokenlearn.callbacks.whole_files import RunLogger, WholeCheckpoints

__all__ = [
    "EmbeddingExport",
    "ImageGrid",
    "LastCheckpoint",
    "LearningCurve",
    "PredictionWriter",
    "ReportWriter",
    "ResultWriter",
    "RunConfig",
    "RunLogger",
    "RunProgress",
    "StepGuard",
    "WholeCheckpoints",
]
