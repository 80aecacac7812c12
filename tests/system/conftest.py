"""Fixtures of object stores."""

from object_stores import bucket, faulty, s3_endpoint

__all__ = ["bucket", "faulty", "s3_endpoint"]
