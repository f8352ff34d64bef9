"""Fixtures of all tests. Being here also puts this folder on the path, for the test doubles beside it."""
