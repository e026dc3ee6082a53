"""A program of its own, run by an interpreter that has ``verifiers`` and need not have Veneer: ``python <this folder>``."""
