"""The transports: HTTP and gRPC, what both ask of the server, and the server's life."""
