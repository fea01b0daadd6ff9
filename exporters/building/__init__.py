"""From a budget to a folder that runs: search, prune, recover, export, quantise, measure, report."""

from exporters.building.asked import PRECISIONS, Budget, Subject, Ways
from exporters.building.candidate import Candidate
from exporters.building.files import file_subject
from exporters.building.result import Built, build

__all__ = ["PRECISIONS", "Budget", "Built", "Candidate", "Subject", "Ways", "build", "file_subject"]
