"""Side effects of runs: pictures, embedding files, tables."""

from tokenlearn.callbacks.edit_writer import EditWriter
from tokenlearn.callbacks.embedding_export import EmbeddingExport
from tokenlearn.callbacks.image_grid import ImageGrid
from tokenlearn.callbacks.prediction_writer import PredictionWriter
from tokenlearn.callbacks.report_writer import ReportWriter

__all__ = ["EditWriter", "EmbeddingExport", "ImageGrid", "PredictionWriter", "ReportWriter"]
