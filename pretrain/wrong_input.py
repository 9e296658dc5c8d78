"""Which errors are the user's: one message and exit code 2, no traceback."""

from data_pipeline.errors import DataError
from parallel.errors import DamagedError, LayoutError
from pretrain.cluster.site import LinksError
from pretrain.cluster.status import StatusError
from pretrain.cluster.submit import SubmitError
from pretrain.config import ConfigError
from pretrain.coordinates import CoordinateError
from pretrain.evaluate import EvaluationError
from pretrain.layouts.rules import WeightsError
from pretrain.manifest import CheckpointError
from pretrain.metrics import LogError
from pretrain.models.mup import MupError
from pretrain.run import RunError
from pretrain.sampling import SamplingError
from pretrain.tune_search import TuneError

INPUT_ERRORS = (
    ConfigError,
    CoordinateError,
    LayoutError,
    DataError,
    DamagedError,
    CheckpointError,
    WeightsError,
    SamplingError,
    EvaluationError,
    LogError,
    MupError,
    RunError,
    LinksError,
    StatusError,
    SubmitError,
    TuneError,
)
