"""Engines: what turns a request for text into tokens. ``base`` is the interface; importing it never imports torch."""
