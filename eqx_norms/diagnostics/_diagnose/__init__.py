"""What is wrong with a model: measured, judged, told."""

from ._diagnose import Diagnosis as Diagnosis, diagnose as diagnose
from ._findings import Finding as Finding
