"""The transports: HTTP and gRPC, the state that both use, and the server that runs them."""
