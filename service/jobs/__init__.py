"""Durable jobs. Kept empty on purpose: the supervisor starts fast because nothing is imported here."""
