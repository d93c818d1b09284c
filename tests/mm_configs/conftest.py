import tests.model_zoo  # noqa: F401
