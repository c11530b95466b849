"""Settings of the tests by properties, beside those of conftest.py."""

from hypothesis import settings

same_examples = settings(max_examples=200)
