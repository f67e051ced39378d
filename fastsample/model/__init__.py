"""Any noise predictor as one call: a tensor in, a tensor out.

predictor       the call itself
output          the tensor in what a model returns
dtype           the dtype that a model wants
device          where a model computes
placement       both, of all modules that a model calls
schedule        the noise schedule that a model was trained with
prediction      what a model predicts, and what its network gives for that
training        the warning about a model in training mode
called_modules  which torch modules a model calls, behind wrappers, closures and lambdas
modules         the modules inside one
hooks           what accelerate and diffusers leave at a module
"""

from fastsample.model.called_modules import attribute
from fastsample.model.output import unwrapped
from fastsample.model.placement import decoder_dtype
from fastsample.model.prediction import prediction_of, variance_of
from fastsample.model.predictor import Model, Predictor
from fastsample.model.schedule import schedule_of

__all__ = [
    "Model",
    "Predictor",
    "attribute",
    "decoder_dtype",
    "prediction_of",
    "schedule_of",
    "unwrapped",
    "variance_of",
]
