"""Fixtures of object stores."""

from object_stores import any_bucket, bucket, faulty, store_servers

__all__ = ["any_bucket", "bucket", "faulty", "store_servers"]
