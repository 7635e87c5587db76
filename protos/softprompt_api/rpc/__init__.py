"""gRPC plumbing that all services share: channels, servers, statuses."""
