"""Checks of the rows, one module a category, one function a row: `check_statistics_07`."""
