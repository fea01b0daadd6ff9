"""Random forwards out of small steps."""

from tests.random_programs import pictures, sequences
from tests.random_programs.program import PICTURES, SEQUENCES, Program, program

__all__ = ["PICTURES", "SEQUENCES", "Program", "pictures", "program", "sequences"]
