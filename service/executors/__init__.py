"""Where runs execute: one protocol, a local implementation and an in-memory one."""
