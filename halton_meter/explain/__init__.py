"""What a response body costs, whoever kept it: `pricing explain` and the tests use it."""
