"""Cohortium: one private synthetic dataset from many hospitals."""
