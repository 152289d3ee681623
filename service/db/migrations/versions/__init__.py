"""Schema history; applied by ``service.db.engine.migrate``."""
