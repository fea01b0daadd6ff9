"""Random forwards out of small steps."""

from tests.random_programs import pictures, sequences, values
from tests.random_programs.program import PICTURES, SEQUENCES, VALUES, Program, program

__all__ = ["PICTURES", "SEQUENCES", "VALUES", "Program", "pictures", "program", "sequences", "values"]
