"""The HTTP surface: one thin file per resource."""
