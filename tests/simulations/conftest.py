"""The small consortium's fixtures."""

from small import quick, simulate, write_study

__all__ = ["quick", "simulate", "write_study"]
