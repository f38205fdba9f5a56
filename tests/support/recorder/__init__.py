"""Records conversations over real sockets with real TLS into small captures for the tests."""
