"""The unary methods of a service as JSON over HTTP: the Connect protocol, through the same pipeline as gRPC."""
