"""Ways into other libraries' training loops. Nothing here is imported by `precond` itself, and none imports the other library."""
