"""The faults are tried on the same real server as the integration tests."""

from tests.integration.conftest import locked_valkey, valkey

__all__ = ["locked_valkey", "valkey"]
