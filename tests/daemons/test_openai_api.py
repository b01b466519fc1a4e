"""Errors in OpenAI's form, there and back."""

from pdkv.daemons.openai_api import ApiError


def test_errors_survive_the_way_through_the_router() -> None:
    error = ApiError.of(429, "full", code="no_capacity", param="p", retry_after_s=2)
    assert error.body.type == "rate_limit_error"
    again = ApiError.decode(429, error.encode(), "2")
    assert (again.status, again.body, again.retry_after_s) == (429, error.body, 2)
    assert ApiError.decode(500, b"oops", None).status == 502
