"""Sweeps in MLflow: a parent run per sweep, a child per run; live, or imported afterwards. Only this package imports
mlflow.

Results are files; MLflow is a view of them. Whatever goes wrong with it is said once and changes nothing else.
"""

from bench.tracking.importing import Imported as Imported
from bench.tracking.importing import import_records as import_records
from bench.tracking.mirror import Mirror as Mirror
from bench.tracking.server import TrackingFailed as TrackingFailed
from bench.tracking.server import default_uri as default_uri
from bench.tracking.server import has_mlflow as has_mlflow
from bench.tracking.server import import_command as import_command
from bench.tracking.server import interface_command as interface_command
