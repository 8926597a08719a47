"""A procedural physics sandbox: short clips with exact masks and state (docs/sandbox.md)."""
