"""The contract that all services share: protos with their generated code, and a few hand-written words."""
