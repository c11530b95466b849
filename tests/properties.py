"""Settings of the tests by properties."""

from hypothesis import HealthCheck, settings

# The same examples in each run; those of tests that use tmp_path write over each other's files.
same_examples = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
