"""What samples are worth: distances from real images, each with its interval, and the classifier that sees digits."""

from fastsample.evaluate.classifier import DigitsClassifier, digits_classifier
from fastsample.evaluate.distances import Figure
from fastsample.evaluate.sources import load_samples
from fastsample.evaluate.yardstick import Distances, Evaluation, Yardstick, evaluate

__all__ = [
    "DigitsClassifier",
    "Distances",
    "Evaluation",
    "Figure",
    "Yardstick",
    "digits_classifier",
    "evaluate",
    "load_samples",
]
